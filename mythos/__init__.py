"""Pretraining of recurrent-depth (looped) transformers."""

from mythos.hf.auto_classes import register

__version__ = "0.1.0"

# AutoModelForCausalLM opens our exports once mythos has been imported; transformers is not imported for that.
register()
del register
