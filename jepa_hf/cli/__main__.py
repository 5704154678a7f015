"""`python -m jepa_hf.cli` is `jepa-hf`."""

import sys

from .main import main

sys.exit(main())
