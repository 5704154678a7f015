"""`python -m jepa_hf.cli` is `jepa-hf`."""

from .main import leave, main

leave(main())
