"""Pretraining of recurrent-depth (looped) transformers."""

from mythos.hf.auto_classes import register

__version__ = "0.1.0"

register()
del register
