"""Masking: samplers of spans and blocks, and the collators that make the two views."""
