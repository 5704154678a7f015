"""`python -m jepa_hf.cli` is `jepa-hf`."""

from .main import entry_point

entry_point()
