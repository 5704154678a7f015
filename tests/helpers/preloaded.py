"""What a server of processes imports before it starts any: libraries, but not this package."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # as all processes of tests; it is read once

import accelerate  # noqa: F401
import datasets  # noqa: F401
import matplotlib.figure  # noqa: F401
import torch  # noqa: F401
import transformers.trainer  # noqa: F401

import helpers.processes  # noqa: F401
