"""Shared type aliases."""

from transformers import BaseImageProcessor, PreTrainedTokenizerBase

# What turns raw samples into the model's inputs; feature vectors need nothing.
ProcessingClass = PreTrainedTokenizerBase | BaseImageProcessor
