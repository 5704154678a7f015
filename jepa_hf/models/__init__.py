"""Models: what `save_pretrained` writes and an export copies; its files import each other with one dot only."""
