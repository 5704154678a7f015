"""`python -m jepa_hf.cli` is `jepa-hf`."""

from .main import console

console()
