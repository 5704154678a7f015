"""Checks of a language model before training: its views are independent, its loss is the standard one."""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from ..errors import UsageError, one_line
from ..training.inputs import check_batch
from ..utils.modes import evaluation_mode
from .decoder import accepts_position_ids, check_decoder, concat_views, encode_views, get_decoder


@torch.no_grad()
def verify_view_isolation(
    model: PreTrainedModel, collator: Callable[..., dict[str, torch.Tensor]], row: dict[str, Any]
) -> None:
    """Check that a model encodes views independently of their row and has the standard loss.

    Raises:
        UsageError: the second view's representation depends on its neighbours or on padding; the
            model accepts no positions, but views are packed; or its loss is not the sum over next
            tokens, divided by `num_items_in_batch`. Or the collator is for other rows.
    """
    check_decoder(model)
    device = cast(torch.Tensor, model.get_input_embeddings().weight).device
    # Two rows: some attention implementations read positions only if the batch has one row.
    batch = {name: value.to(device) for name, value in _collate(collator, row).items()}
    with evaluation_mode(model):
        _check_loss(model, torch.tensor([row["input_ids"][:16]], device=device))
        if "view_ends" not in batch:
            return
        batch_state = _second_view_state(model, batch)
        ids = torch.tensor([row["code_input_ids"]], device=device)
        output = get_decoder(model)(input_ids=ids, use_cache=False, return_dict=True)
        single_state = output.last_hidden_state[0, row["code_end"]]
    # Rounding is below 1e-6 in float32 on a CPU; convolutions with small random weights reach 1e-4.
    is_exact = single_state.dtype == torch.float32 and device.type == "cpu"
    if (batch_state - single_state).float().norm() > (1e-5 if is_exact else 0.02) * single_state.float().norm():
        remedy = "another model" if batch["view_input_ids"].dim() == 3 else "--view_passes separate, or another model"
        raise UsageError(
            f"{type(model).__name__} does not separate views by their positions: the representation of a view depends "
            f"on the rest of its row; use {remedy}."
        )


def _collate(collator: Callable[..., Any], row: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return a batch of two rows, or refuse a collator that is for other rows."""
    name = type(collator).__name__
    try:
        batch = collator([dict(row), dict(row)])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UsageError(
            f"The data_collator {name} cannot read rows with two views ({one_line(error)[:200]}). Use "
            "DataCollatorForPairedViews, or leave data_collator out."
        ) from None
    check_batch(batch, ("labels", "label_positions", "stp_span"))
    return batch


def _second_view_state(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the state of the first row's second view, `[D]`, computed in the batch."""
    ids, ends = batch["view_input_ids"], batch["view_ends"]
    positions = batch["view_position_ids"] if accepts_position_ids(model) else None
    if ids.dim() == 2:
        ids, positions = concat_views(model, batch["input_ids"], batch["attention_mask"], ids, positions).values()
        ends = batch["input_ids"].shape[1] + ends
    return encode_views(get_decoder(model), ids, positions, ends)[0, 1]


def _check_loss(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """Check the loss on a few tokens `[1, N]`: shifted labels, division by `num_items_in_batch`."""
    count = torch.tensor(ids.shape[1] - 1, device=ids.device)
    once, twice = (
        model(input_ids=ids, labels=ids, num_items_in_batch=total, use_cache=False, return_dict=True)
        for total in (count, 2 * count)
    )
    half = F.cross_entropy(once.logits[0, :-1].float(), ids[0, 1:]) / 2
    # The difference cancels the router loss of a mixture of experts.
    if ((once.loss - twice.loss).float() - half).abs() > 0.02 * half:
        raise UsageError(
            f"{type(model).__name__} has a loss of its own, not the sum over next tokens divided by "
            "num_items_in_batch, which gradient accumulation needs; use another model."
        )
