"""SDPA that makes no mask of what hides nothing, compiled or not."""

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

# Both are scaled dot product attention in torch's kernels.
SDPA, SDPA_UNMASKED = "sdpa", "sdpa_unmasked"


def unmasked_where_possible(
    *args: Any,
    attention_mask: torch.Tensor | None = None,
    allow_is_bidirectional_skip: bool = False,
    local_size: int | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """`transformers.masking_utils.sdpa_mask`, but None where no mask is given and every token sees every other.

    So does transformers, except while torch.compile traces: there torch before 2.14 says that a program is exported
    (pytorch/pytorch#176347), for which transformers makes a mask of ones, and transformers before 5.18 makes one
    whenever it is traced. With such a mask attention runs in its slowest kernels.
    """
    if attention_mask is None and allow_is_bidirectional_skip and local_size is None:
        return None
    return sdpa_mask(
        *args,
        attention_mask=attention_mask,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        local_size=local_size,
        **kwargs,
    )


AttentionInterface.register(SDPA_UNMASKED, sdpa_attention_forward)
AttentionMaskInterface.register(SDPA_UNMASKED, unmasked_where_possible)
