"""LLM-JEPA's objective: next-token loss plus a distance between two views of a row."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..models.contrastive import all_gather_candidates, infonce
from ..models.positions import gather_positions
from .decoder import accepts_position_ids, check_decoder, concat_views, encode_views, get_decoder, row_positions
from .losses import pair_distance, sample_ordered_triples, stp_distance, stp_patch_distance
from .view_tokenizer import IGNORE_INDEX

# Attribute of a model that holds its objective.
_OBJECTIVE_ATTR = "_paired_view_objective"


@dataclass
class PairedViewOutput(ModelOutput):
    """Output of a model with an attached `PairedViewObjective`. B rows, width D.

    Args:
        loss: scalar, the weighted sum of the parts, each divided by its count in the update.
        lm_loss: scalar, mean next-token loss over this batch's labels.
        router_loss: scalar, what a mixture of experts adds to it for its router, times its
            coefficient; None if the model's configuration does not enable it.
        pair_loss: scalar, mean distance over the batch's pairs; None without views.
        stp_loss: scalar, mean over the batch's rows, where rows too short for a path count 0; None if its weight is 0.
        num_labels: scalar, number of labels of the batch.
        num_pairs: scalar, number of rows of the batch that count.
        predictions: representations of the predicting views, `[B, D]`; None without views.
        targets: representations of the predicted views, `[B, D]`; None without views.
    """

    loss: torch.Tensor | None = None
    lm_loss: torch.Tensor | None = None
    router_loss: torch.Tensor | None = None
    pair_loss: torch.Tensor | None = None
    stp_loss: torch.Tensor | None = None
    num_labels: torch.Tensor | None = None
    num_pairs: torch.Tensor | None = None
    predictions: torch.Tensor | None = None
    targets: torch.Tensor | None = None


class _Views(NamedTuple):
    """Views of a batch, see `DataCollatorForPairedViews`."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor | None
    ends: torch.Tensor
    second: torch.Tensor | None

    @property
    def is_packed(self) -> bool:
        return self.input_ids.dim() == 2


@dataclass
class PairedViewObjective:
    """Objective of LLM-JEPA, attached to a causal language model.

    lm_weight · next-token loss + jepa_weight · d(pred(view 1), view 2), of the views' embeddings.

    LLM-JEPA (Huang, LeCun and Balestriero, arXiv 2509.14252), equation 3, optionally with the path
    loss of STP (arXiv 2602.22617). `attach` makes a causal language model compute it in its
    forward. The model's class does not change, so DDP, FSDP and PEFT see one ordinary forward call.

    Args:
        lm_weight: gamma; with 0, nothing prevents the embeddings from collapsing.
        jepa_weight: lambda.
        pair_loss: "cosine", "l2", "mse" or "infonce", see `losses`.
        temperature: temperature of "infonce".
        target_gradient: "full": gradients flow through both views, as in the paper; "stop": not
            through the second; "ema": `teacher` encodes the second view.
        teacher: a decoder whose weights are an average of the model's, for "ema".
        stp_weight: weight of the path loss on the conversation; 0 disables it.
        stp_variant: "triple": three random positions (the paper); "patch": a random patch against its
            surroundings (the paper's released code).
    """

    lm_weight: float = 1.0
    jepa_weight: float = 1.0
    pair_loss: str = "cosine"
    temperature: float = 0.07
    target_gradient: str = "full"
    teacher: nn.Module | None = None
    stp_weight: float = 0.0
    stp_variant: str = "triple"

    # Set during a forward pass: positions that the head reads, and the last layer's output.
    _selected_positions: torch.Tensor | None = field(default=None, init=False, repr=False)
    _states: torch.Tensor | None = field(default=None, init=False, repr=False)

    def attach(self, model: PreTrainedModel) -> None:
        """Make the model compute this objective on batches of `DataCollatorForPairedViews`.

        Other calls are unchanged. The objective replaces an attached one. A copy of the model gets
        a copy of the objective.

        Args:
            model: a causal language model, or a `PeftModel` around one.

        Raises:
            UsageError: the model cannot encode views, see `check_decoder`.
        """
        check_decoder(model)
        earlier = vars(model).get(_OBJECTIVE_ATTR)
        if earlier is self:
            return
        if earlier is not None:
            earlier._remove_hooks()
        # An unpickled model has its original forward again.
        if earlier is None or earlier._original_forward == model.forward:
            self._original_forward = model.forward
            model.forward = MethodType(_make_patched_forward(model.forward), model)
        else:
            self._original_forward = earlier._original_forward
        setattr(model, _OBJECTIVE_ATTR, self)
        self._accepts_position_ids = accepts_position_ids(model)
        # The hooks stay registered, because torch.compile cannot trace their registration.
        self._hooks = [
            model.get_output_embeddings().register_forward_pre_hook(self._select_labelled_states),
            get_decoder(model).register_forward_hook(self._store_last_hidden_state),
        ]

    def detach(self, model: PreTrainedModel) -> None:
        """Restore the model's original forward."""
        del model.forward
        delattr(model, _OBJECTIVE_ATTR)
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _select_labelled_states(
        self, head: nn.Module, inputs: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...] | None:
        """Drop states whose next token has no label, before the language-model head.

        Logits are vocabulary-sized per token and dominate memory; prompts and views have no labels.
        """
        if self._selected_positions is None:
            return None
        states, *others = inputs
        return gather_positions(states, self._selected_positions), *others

    def _store_last_hidden_state(self, decoder: nn.Module, inputs: Any, output: Any) -> None:
        """Store the last layer's output; `output_hidden_states` would keep those of all layers."""
        if self._selected_positions is not None:
            self._states = output.last_hidden_state

    def _compute(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor,
        stp_span: torch.Tensor,
        label_positions: torch.Tensor,
        view_input_ids: torch.Tensor | None = None,
        view_position_ids: torch.Tensor | None = None,
        view_ends: torch.Tensor | None = None,
        second_view: torch.Tensor | None = None,
        row_valid: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> PairedViewOutput:
        """Compute the loss of a batch of `DataCollatorForPairedViews`, with or without views.

        `row_valid` is bool `[B]`, False for rows that do not count, whose labels are masked. It is given on all ranks
        or on none. `num_items_in_batch` is `[2]`, labels and rows of the full update; default those of this batch.
        """
        num_labels = (labels[:, 1:] != IGNORE_INDEX).sum()
        row_weights = labels.new_ones(len(labels)) if row_valid is None else row_valid.long()
        num_rows = row_weights.sum()
        totals = torch.stack([num_labels, num_rows]) if num_items_in_batch is None else num_items_in_batch
        totals = totals.clamp_min(1)
        # Collected first, because older transformers leave fields that are set later out of the mapping.
        terms = {"num_labels": num_labels, "num_pairs": num_rows}
        views = None
        if view_ends is not None:
            positions = view_position_ids if self._accepts_position_ids else None
            views = _Views(cast(torch.Tensor, view_input_ids), positions, view_ends, second_view)

        inputs = self._model_inputs(model, input_ids, attention_mask, views)
        lm_loss, router_loss, states = self._run_model(model, inputs, labels, label_positions, totals[0])
        loss = self.lm_weight * lm_loss
        terms["lm_loss"] = lm_loss.detach() * totals[0] / num_labels.clamp_min(1)
        if router_loss is not None:
            terms["router_loss"] = router_loss.detach()
            loss = loss + self.lm_weight * router_loss * num_labels / totals[0]
        if self.stp_weight:
            uniform = (
                torch.rand(len(labels), 3, device=labels.device)
                if model.training
                else _draws_of_rows(input_ids, attention_mask)
            )
            distances = self._stp_loss(states, stp_span, row_weights, uniform)
            terms["stp_loss"] = distances.sum() / num_rows.clamp_min(1)
            loss = loss + self.stp_weight * distances.sum() / totals[1]
        if views is not None:
            predictions, targets = self._view_states(model, states, labels.shape[1], views)
            distances = self._distance(predictions, targets, row_valid) * row_weights
            terms["pair_loss"] = distances.sum() / num_rows.clamp_min(1)
            loss = loss + self.jepa_weight * distances.sum() / totals[1]
            terms |= {"predictions": predictions, "targets": targets}
        return PairedViewOutput(loss=loss, **terms)

    def _model_inputs(
        self, model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, views: _Views | None
    ) -> dict[str, torch.Tensor]:
        """Return the inputs of the model's pass, with packed views in it."""
        if views is not None and views.is_packed:
            return concat_views(model, input_ids, attention_mask, views.input_ids, views.position_ids)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self._accepts_position_ids:
            inputs["position_ids"] = row_positions(attention_mask)
        return inputs

    def _run_model(
        self,
        model: PreTrainedModel,
        inputs: dict[str, torch.Tensor],
        labels: torch.Tensor,
        label_positions: torch.Tensor,
        total_labels: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Run the original forward with the head on labelled positions only.

        Returns:
            The next-token loss, a sum divided by `total_labels`; the router loss, if there is one;
            and the last layer's output.
        """
        # The model's loss shifts labels by one: pad at the front, and give the last state no next label.
        next_labels = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).gather(1, label_positions)
        self._selected_positions = F.pad(label_positions, (0, 1))
        try:
            output = self._original_forward(
                **inputs,
                labels=F.pad(next_labels, (1, 0), value=IGNORE_INDEX),
                num_items_in_batch=total_labels,
                use_cache=False,
                return_dict=True,
            )
            states = cast(torch.Tensor, self._states)
        finally:
            self._selected_positions = self._states = None
        # A mixture of experts has added the loss of its router, which is a mean and no sum.
        weight = getattr(model.config.get_text_config(), "router_aux_loss_coef", None)
        if weight is None or output.get("aux_loss") is None:
            return output.loss, None, states
        router_loss = weight * output.aux_loss.to(output.loss.device)
        return output.loss - router_loss, router_loss, states

    def _view_states(
        self, model: PreTrainedModel, states: torch.Tensor, row_length: int, views: _Views
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the states of the predicting and of the predicted views, `[B, D]` each.

        Packed views are in `states`, after the first `row_length` positions; separate ones need a pass of their own.
        """
        if views.is_packed:
            both = gather_positions(states, row_length + views.ends)
        else:
            both = encode_views(get_decoder(model), views.input_ids, views.position_ids, views.ends)
        predictions, targets = both.unbind(dim=1)
        if self.target_gradient == "ema":
            with torch.no_grad():
                targets = encode_views(cast(nn.Module, self.teacher), *_second_view(views))[:, 0]
        elif self.target_gradient == "stop":
            targets = targets.detach()
        return predictions, targets

    def _distance(
        self, predictions: torch.Tensor, targets: torch.Tensor, row_valid: torch.Tensor | None
    ) -> torch.Tensor:
        if self.pair_loss != "infonce":
            return pair_distance(self.pair_loss, predictions, targets)
        candidates, positives = all_gather_candidates(targets)
        if row_valid is not None:
            row_valid = all_gather_candidates(row_valid.to(targets.dtype)[:, None])[0][:, 0] > 0
        return infonce(predictions, candidates, positives, self.temperature, row_valid)

    def _stp_loss(
        self, states: torch.Tensor, stp_span: torch.Tensor, row_weights: torch.Tensor, uniform: torch.Tensor
    ) -> torch.Tensor:
        """Return the turn of a random path in each row, `[B]`.

        It is 0 for rows that are too short or do not count. The random numbers `uniform`, `[B, 3]`
        in [0, 1), select the path.
        """
        first, last = stp_span.unbind(dim=1)
        is_long_enough = (last - first >= 2) & (row_weights > 0)
        triples = sample_ordered_triples(first, last, uniform).clamp_max(states.shape[1] - 1)
        if self.stp_variant == "triple":
            distances = stp_distance(states, triples)
        else:
            distances = stp_patch_distance(states, torch.stack([first, triples[:, 0], triples[:, 2], last], dim=1))
        return torch.where(is_long_enough, distances, torch.zeros_like(distances))


def _make_patched_forward(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward with the signature of `plain` that calls the model's objective.

    It reads the objective from the model, because accelerate copies the function to copies of the model.
    """

    def forward(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        objective = getattr(model, _OBJECTIVE_ATTR)
        if "labels" not in kwargs or "stp_span" not in kwargs:
            return objective._original_forward(*args, **kwargs)
        return objective._compute(model, *args, **kwargs)

    # generate() and the Trainer inspect the signature.
    model_parameter = inspect.Parameter("model", inspect.Parameter.POSITIONAL_ONLY)
    signature = inspect.signature(plain)
    cast(Any, forward).__signature__ = signature.replace(parameters=[model_parameter, *signature.parameters.values()])
    return forward


def _second_view(views: _Views) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Return ids, positions and ends of the second views as separate rows, `[B, 1, W]`."""
    ids, positions, ends, second = views
    if second is None:
        return ids[:, 1:], None if positions is None else positions[:, 1:], ends[:, 1:]
    view_positions = torch.arange(second.shape[1], device=second.device).expand_as(second)
    return ids.gather(1, second)[:, None], view_positions[:, None], ends[:, 1:] - second[:, :1]


def _draws_of_rows(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Hash each row's tokens to numbers in [0, 1), `[B, 3]`, for repeatable evaluations."""
    tokens = (input_ids * attention_mask).sum(dim=1, keepdim=True)
    # Multiplicative hashing (Knuth, The Art of Computer Programming 3, section 6.4); its high bits are well mixed.
    hashed = tokens * tokens.new_tensor([2654435761, 2246822519, 3266489917]) % 2**32
    return (hashed >> 8).float() / 2**24
