"""The decoder of a causal language model, and its states of views."""

import inspect
from typing import Any, cast

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel

from ..errors import UsageError
from ..models.positions import gather_positions


def check_decoder(model: PreTrainedModel) -> None:
    """Refuse models without a decoder of their own, and peft's prompt-learning methods."""
    if has_lora(model):
        peft_model = cast(Any, model)
        config = peft_model.peft_config[peft_model.active_adapter]
        if config.is_prompt_learning:
            raise UsageError(
                f"{config.peft_type.value} puts tokens of its own before a row, but views are encoded without them. "
                "Use a method that changes layers, such as LoRA."
            )
    if isinstance(get_decoder(model), GenerationMixin):
        raise UsageError(
            f"{type(model).__name__} does not separate its decoder from its head (get_decoder), but views are encoded "
            "by the decoder alone. Use another model."
        )


def accepts_position_ids(model: PreTrainedModel) -> bool:
    """Return whether the decoder takes the positions that separate packed views."""
    return "position_ids" in inspect.signature(get_decoder(model).forward).parameters


def get_decoder(model: nn.Module) -> nn.Module:
    """Return a causal language model without its head, and without a `PeftModel` around it."""
    causal_lm = cast(Any, model)
    return (causal_lm.get_base_model() if has_lora(model) else causal_lm).get_decoder()


def has_lora(model: nn.Module) -> bool:
    """Return whether the model is a `PeftModel`; works without peft installed."""
    return hasattr(model, "get_base_model")


def encode_views(
    decoder: nn.Module, ids: torch.Tensor, positions: torch.Tensor | None, ends: torch.Tensor
) -> torch.Tensor:
    """Run the decoder without the head and return the last layer's states at the views' ends.

    Ids `[B, L]` with ends `[B, V]`, or one view per row with ids `[B, V, L]` and ends `[B, V]`, give `[B, V, D]`.
    """
    inputs = {"input_ids": ids.flatten(0, -2)}
    if positions is not None:
        inputs["position_ids"] = positions.flatten(0, -2)
    states = decoder(**inputs, use_cache=False, return_dict=True).last_hidden_state
    if ids.dim() == 2:
        return gather_positions(states, ends)
    return gather_positions(states, ends.reshape(-1, 1)).reshape(*ends.shape, -1)


def row_positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Return the positions of rows with padding on either side, `[B, L]`."""
    return (attention_mask.cumsum(dim=1) - 1).clamp_min(0)


def concat_views(
    model: PreTrainedModel,
    ids: torch.Tensor,
    attention_mask: torch.Tensor,
    view_ids: torch.Tensor,
    view_positions: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """Concatenate conversations and views to `[B, L + V]`, separated by positions only.

    Raises:
        UsageError: there are no positions, because the model's decoder takes none.
    """
    if view_positions is None:
        raise UsageError(
            f"{type(model).__name__} takes no position_ids, which separate packed views; use --view_passes separate, "
            "or another model."
        )
    positions = torch.cat([row_positions(attention_mask), view_positions], dim=1)
    return {"input_ids": torch.cat([ids, view_ids], dim=1), "position_ids": positions}
