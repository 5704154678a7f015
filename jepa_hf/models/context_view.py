"""The context encoder's view of a batch: masked positions replaced, or dropped."""

from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from .encoder_adapters import EncoderAdapter
from .positions import repeat_interleave_samples


class ContextView(NamedTuple):
    """An encoded view. N = B × M, or N = B where the M masks of a sample share one context.

    Args:
        encoded: the context encoder's output; `last_hidden_state` is `[N, C, D]`.
        positions: long `[N, C]`.
        valid: bool `[N, C]`, False on padding.
        is_context: bool `[N, C]`, False on padding and on masked positions.
    """

    encoded: Any
    positions: torch.Tensor
    valid: torch.Tensor
    is_context: torch.Tensor


def encode_masked_view(
    adapter: EncoderAdapter,
    encoder: PreTrainedModel,
    clean: dict[str, torch.Tensor],
    masked_input: torch.Tensor | None,
    target_positions: torch.Tensor,
    target_valid: torch.Tensor,
    hidden_states: bool,
) -> ContextView:
    """Encode the view with [MASK] tokens or replaced features at masked positions.

    Args:
        adapter: the encoder's adapter.
        encoder: the context encoder.
        clean: clean inputs, `[B, L]` each.
        masked_input: replaces the first clean input, `[B, ...]` or `[B, M, ...]`.
        target_positions: long `[B * M, T]`.
        target_valid: bool `[B * M, T]`.
        hidden_states: also return the layers' outputs.

    Returns:
        The view of all L positions.

    Raises:
        ValueError: no `masked_input`.
    """
    name = adapter.input_names[0]
    if masked_input is None:
        raise ValueError(
            f"masked_tokens 'mask_token' needs context_{name}. Make the collator with masked_tokens='mask_token'."
        )
    masks = len(target_positions) // len(clean[name])
    inputs = {other: repeat_interleave_samples(value, masks) for other, value in clean.items()}
    inputs[name] = masked_input.reshape(-1, *clean[name].shape[1:])
    valid = adapter.valid_mask(inputs)
    encoded = adapter.encode(encoder, inputs, hidden_states)
    positions = torch.arange(valid.shape[1], device=valid.device).expand_as(valid)
    # A sum, because padded entries of `target_positions` point at position 0, which may be context.
    is_target = torch.zeros_like(valid, dtype=torch.int32).scatter_add(1, target_positions, target_valid.int()) > 0
    return ContextView(encoded, positions, valid, valid & ~is_target)


def encode_visible_view(
    adapter: EncoderAdapter,
    encoder: PreTrainedModel,
    clean: dict[str, torch.Tensor],
    context_positions: torch.Tensor | None,
    context_valid: torch.Tensor | None,
    hidden_states: bool,
) -> ContextView:
    """Encode the visible positions only.

    Args:
        adapter: the encoder's adapter.
        encoder: the context encoder.
        clean: clean inputs, `[B, L]` each.
        context_positions: visible positions, long `[B, M, C]`; `[B, 1, C]` is shared by all masks.
        context_valid: bool of the same shape; None if nothing is padded.
        hidden_states: also return the layers' outputs.

    Returns:
        The view of C positions.

    Raises:
        ValueError: no `context_positions`.
    """
    if context_positions is None:
        raise ValueError("masked_tokens 'drop' needs context_positions. Make the collator with masked_tokens='drop'.")
    inputs = {name: repeat_interleave_samples(value, context_positions.shape[1]) for name, value in clean.items()}
    positions = context_positions.flatten(0, 1)
    valid = None if context_valid is None else context_valid.flatten(0, 1)
    encoded = adapter.encode_visible(encoder, inputs, positions, valid, hidden_states)
    if valid is None:
        valid = torch.ones_like(positions, dtype=torch.bool)
    return ContextView(encoded, positions, valid, valid)
