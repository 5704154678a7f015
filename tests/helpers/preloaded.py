"""What a server of processes imports before it starts any."""

import accelerate  # noqa: F401
import datasets  # noqa: F401
import torch  # noqa: F401
import transformers.trainer  # noqa: F401

import jepa_hf  # noqa: F401
