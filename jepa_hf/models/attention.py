"""SDPA without a mask where nothing is masked, also under torch.compile."""

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

# Attention implementations; both are torch's scaled dot product attention.
SDPA, SDPA_SKIP_EMPTY_MASK = "sdpa", "sdpa_unmasked"


def sdpa_mask_or_none(
    *args: Any,
    attention_mask: torch.Tensor | None = None,
    allow_is_bidirectional_skip: bool = False,
    local_size: int | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """Call `transformers.masking_utils.sdpa_mask`, or return None if nothing is masked.

    transformers does the same, except under torch.compile. There torch before 2.14 reports an export
    (pytorch/pytorch#176347), for which transformers builds a mask of ones; transformers before 5.18 builds one whenever
    it is traced. With such a mask attention runs in its slowest kernels.
    """
    if attention_mask is None and allow_is_bidirectional_skip and local_size is None:
        return None
    kwargs |= {
        "attention_mask": attention_mask,
        "allow_is_bidirectional_skip": allow_is_bidirectional_skip,
        "local_size": local_size,
    }
    return sdpa_mask(*args, **kwargs)


AttentionInterface.register(SDPA_SKIP_EMPTY_MASK, sdpa_attention_forward)
AttentionMaskInterface.register(SDPA_SKIP_EMPTY_MASK, sdpa_mask_or_none)
