"""Pretraining of recurrent-depth (looped) transformers."""

from mythos.auto_classes import register

register()
del register
