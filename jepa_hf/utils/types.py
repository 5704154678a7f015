"""Shared type aliases."""

from transformers import BaseImageProcessor, PreTrainedTokenizerBase

# Converts raw samples to the model's inputs; feature vectors need none.
ProcessingClass = PreTrainedTokenizerBase | BaseImageProcessor
