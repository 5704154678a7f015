"""The context encoder's view of a batch: masked positions replaced, or dropped."""

from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from .batch import JepaBatch
from .encoder_adapter import EncoderAdapter
from .packed_sequences import gather_document_ids
from .positions import repeat_interleave_samples


class ContextView(NamedTuple):
    """An encoded view. N = B × M, or N = B where the M masks of a sample share one context.

    Args:
        encoded: the context encoder's output; `last_hidden_state` is `[N, C, D]`.
        positions: long `[N, C]`.
        valid: bool `[N, C]`, False on padding.
        num_views: N / B.
        samples: long `[N, C]`, index of each position's sample in its row, -1 on padding.
        is_context: bool `[N, C]`, False on padding and on masked positions.
    """

    encoded: Any
    positions: torch.Tensor
    valid: torch.Tensor
    num_views: int
    samples: torch.Tensor
    is_context: torch.Tensor


def encode_masked_view(
    adapter: EncoderAdapter,
    encoder: PreTrainedModel,
    batch: JepaBatch,
    masked_input: torch.Tensor | None,
    **flags: bool,
) -> ContextView:
    """Encode the view with [MASK] tokens or replaced features at masked positions.

    `masked_input`, `[B, ...]` or `[B, M, ...]`, replaces the first clean input. `flags` are those of
    `EncoderAdapter.encode`.

    Returns:
        The view of all L positions, N = B × M.

    Raises:
        ValueError: no `masked_input`.
    """
    name = adapter.input_names[0]
    if masked_input is None:
        raise ValueError(
            f"masked_tokens 'mask_token' needs context_{name}. Make the collator with masked_tokens='mask_token'."
        )
    clean, masks = batch.clean, batch.num_masks
    inputs = {other: repeat_interleave_samples(value, masks) for other, value in clean.items()}
    inputs[name] = masked_input.reshape(-1, *clean[name].shape[1:])
    valid = adapter.valid_mask(inputs)
    encoded = adapter.encode(encoder, inputs, **flags)
    positions = torch.arange(valid.shape[1], device=valid.device).expand_as(valid)
    # A sum, because padded entries of `positions` point at position 0, which may be context.
    is_target = torch.zeros_like(valid, dtype=torch.int32).scatter_add(1, batch.positions, batch.valid.int()) > 0
    samples = gather_document_ids(batch.samples, positions, valid)
    return ContextView(encoded, positions, valid, masks, samples, valid & ~is_target)


def encode_visible_view(
    adapter: EncoderAdapter,
    encoder: PreTrainedModel,
    batch: JepaBatch,
    context_positions: torch.Tensor | None,
    context_valid: torch.Tensor | None,
    **flags: bool,
) -> ContextView:
    """Encode the visible positions only, long `[B, M, C]`; `[B, 1, C]` is shared by all masks.

    `context_valid`, bool of the same shape, is None if nothing is padded. `flags` are those of `EncoderAdapter.encode`.

    Returns:
        The view of C positions.

    Raises:
        ValueError: no `context_positions`.
    """
    if context_positions is None:
        raise ValueError("masked_tokens 'drop' needs context_positions. Make the collator with masked_tokens='drop'.")
    views = context_positions.shape[1]
    inputs = {name: repeat_interleave_samples(value, views) for name, value in batch.clean.items()}
    positions = context_positions.flatten(0, 1)
    valid = None if context_valid is None else context_valid.flatten(0, 1)
    encoded = adapter.encode_visible(encoder, inputs, positions, valid, **flags)
    if valid is None:
        valid = torch.ones_like(positions, dtype=torch.bool)
    samples = gather_document_ids(batch.samples, positions, valid)
    return ContextView(encoded, positions, valid, views, samples, valid)
