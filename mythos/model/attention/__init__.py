"""Attention: base class, masks and kernels' inputs, and one module for each attention that `model.attention` names."""
