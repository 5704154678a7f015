"""The objective: next-token loss on the answers, and a distance between what two views of a row mean to the model."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

from ..errors import UsageError
from ..models.contrastive import candidates_of_all_ranks, infonce
from .losses import draw_triples, pair_distance, patch_distance, tube_distance
from .view_tokenizer import IGNORED

# By this name a model knows its objective.
_ATTACHED = "_paired_view_objective"


@dataclass
class PairedViewOutput(ModelOutput):
    """What a model gives while `PairedViewObjective` is attached to it. B rows, width D.

    Args:
        loss: scalar, the weighted sum of the parts, each divided by what the update has of it.
        lm_loss: scalar, mean next-token loss over this batch's labels; with what a mixture of experts adds for its
            router, where its configuration asks for it.
        pair_loss: scalar, mean distance over its pairs; None where the views were left out.
        tube_loss: scalar, mean over its rows, of which one too short for a path counts 0; None where its weight is 0.
        num_labels, num_pairs: scalars.
        predictions, targets: the views' representations `[B, D]`; None where they were left out.
    """

    loss: torch.Tensor | None = None
    lm_loss: torch.Tensor | None = None
    pair_loss: torch.Tensor | None = None
    tube_loss: torch.Tensor | None = None
    num_labels: torch.Tensor | None = None
    num_pairs: torch.Tensor | None = None
    predictions: torch.Tensor | None = None
    targets: torch.Tensor | None = None


@dataclass
class PairedViewObjective:
    """lm_weight · next-token loss + pair_weight · d(predictor's embedding of view 1, embedding of view 2).

    LLM-JEPA (Huang, LeCun and Balestriero, arXiv 2509.14252), equation 3, and as an option the straightness of
    STP (arXiv 2602.22617). `attach` lets a causal language model compute it: the model stays what it is, and so do
    DDP, FSDP and PEFT around it, for which one call of the model is one call.

    Args:
        lm_weight: gamma; 0 leaves nothing that keeps the embeddings apart.
        pair_weight: lambda.
        pair_loss: "cosine", "l2", "mse" or "infonce", see `losses`.
        temperature: of "infonce".
        target_gradient: "full": both views learn, as in the paper; "stop": the second does not; "ema": it is read by
            `teacher`.
        teacher: a decoder whose weights are an average of the model's, for "ema".
        tube_weight: of the straightness of paths through the conversation; 0 for none.
        tube_form: "triple", three random positions (the paper); "patch", a random patch against what surrounds it
            (its released code).
    """

    lm_weight: float = 1.0
    pair_weight: float = 1.0
    pair_loss: str = "cosine"
    temperature: float = 0.07
    target_gradient: str = "full"
    teacher: nn.Module | None = None
    tube_weight: float = 0.0
    tube_form: str = "triple"

    # While a model computes: which states its head is to read, and what its last layer gave.
    _read: torch.Tensor | None = field(default=None, init=False, repr=False)
    _states: torch.Tensor | None = field(default=None, init=False, repr=False)

    def attach(self, model: PreTrainedModel) -> None:
        """Have the model compute this objective of batches of `DataCollatorForPairedViews`, and all else as before.

        An objective that is attached already makes way. A copy of the model has a copy of its objective.

        Args:
            model: a causal language model, or a `PeftModel` around one.

        Raises:
            UsageError: its views cannot be read: see `_check_decoder`.
        """
        _check_decoder(model)
        earlier = vars(model).get(_ATTACHED)
        if earlier is self:
            return
        if earlier is not None:
            earlier._remove_hooks()
        if earlier is None or earlier._plain == model.forward:  # a model that was pickled has its own forward again
            self._plain = model.forward
            model.forward = MethodType(_forward_like(model.forward), model)
        else:
            self._plain = earlier._plain
        setattr(model, _ATTACHED, self)
        self._takes_positions = _takes_positions(model)
        # For good, because torch.compile does not trace how a hook is registered.
        self._hooks = [
            model.get_output_embeddings().register_forward_pre_hook(self._choose),
            decoder_of(model).register_forward_hook(self._keep),
        ]

    def detach(self, model: PreTrainedModel) -> None:
        """Give the model its own forward back."""
        del model.forward
        delattr(model, _ATTACHED)
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _choose(self, head: nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        """Before the language-model head: leave out the states that no label follows, those of views among them.

        Prompts have no labels, and a token's logits are as many as there are words: more than all else that it takes.
        """
        if self._read is None:
            return None
        states, *others = given
        return _at(states, self._read), *others

    def _keep(self, decoder: nn.Module, given: Any, found: Any) -> None:
        """After the last layer, without keeping all others."""
        if self._read is not None:
            self._states = found.last_hidden_state

    def _compute(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor,
        content: torch.Tensor,
        label_positions: torch.Tensor,
        view_input_ids: torch.Tensor | None = None,
        view_position_ids: torch.Tensor | None = None,
        view_ends: torch.Tensor | None = None,
        second_view: torch.Tensor | None = None,
        row_valid: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> PairedViewOutput:
        """The loss of a batch of `DataCollatorForPairedViews`; without its views, of the other parts.

        Args:
            row_valid: bool `[B]`, on all ranks or none; False for rows that count nowhere, whose labels are masked.
            num_items_in_batch: `[2]`, labels and rows of the whole update; default those of this batch.
        """
        labelled = (labels[:, 1:] != IGNORED).sum()
        counts = labels.new_ones(len(labels)) if row_valid is None else row_valid.long()
        rows = counts.sum()
        total = torch.stack([labelled, rows]) if num_items_in_batch is None else num_items_in_batch
        total = total.clamp_min(1)
        output = PairedViewOutput(num_labels=labelled, num_pairs=rows)

        together = view_ends is not None and view_input_ids.dim() == 2
        read = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self._takes_positions:
            read["position_ids"] = _positions(attention_mask)
        else:
            view_position_ids = None
        if together:
            if not self._takes_positions:
                raise _without_positions(model)
            read = _in_one_row(input_ids, attention_mask, view_input_ids, view_position_ids)
        # The model compares each state with the next label, so that the last state, any one, is compared with none.
        successors = F.pad(labels[:, 1:], (0, 1), value=IGNORED).gather(1, label_positions)
        self._read = F.pad(label_positions, (0, 1))
        try:
            found = self._plain(
                **read,
                labels=F.pad(successors, (1, 0), value=IGNORED),
                num_items_in_batch=total[0],
                use_cache=False,
                return_dict=True,
            )
            states = self._states
        finally:
            self._read = self._states = None
        loss = self.lm_weight * found.loss
        output.lm_loss = found.loss.detach() * total[0] / labelled.clamp_min(1)
        if self.tube_weight:
            uniform = (
                torch.rand(len(labels), 3, device=labels.device)
                if model.training
                else _draws_of_rows(input_ids, attention_mask)
            )
            each = self._tubes(states, content, counts, uniform)
            output.tube_loss = each.sum() / rows.clamp_min(1)
            loss = loss + self.tube_weight * each.sum() / total[1]
        if view_ends is not None:
            views = view_input_ids, view_position_ids, view_ends
            both = _at(states, labels.shape[1] + view_ends) if together else _at_ends(decoder_of(model), *views)
            predictions, targets = both.unbind(dim=1)
            if self.target_gradient == "ema":
                with torch.no_grad():
                    targets = _at_ends(self.teacher, *_second_view(*views, second_view))[:, 0]
            elif self.target_gradient == "stop":
                targets = targets.detach()
            each = self._distance(predictions, targets, row_valid) * counts
            output.pair_loss = each.sum() / rows.clamp_min(1)
            loss = loss + self.pair_weight * each.sum() / total[1]
            output.predictions, output.targets = predictions, targets
        output.loss = loss
        return output

    def _distance(
        self, predictions: torch.Tensor, targets: torch.Tensor, row_valid: torch.Tensor | None
    ) -> torch.Tensor:
        if self.pair_loss != "infonce":
            return pair_distance(self.pair_loss, predictions, targets)
        candidates, own = candidates_of_all_ranks(targets)
        if row_valid is not None:
            row_valid = candidates_of_all_ranks(row_valid.to(targets.dtype)[:, None])[0][:, 0] > 0
        return infonce(predictions, candidates, own, self.temperature, row_valid)

    def _tubes(
        self, states: torch.Tensor, content: torch.Tensor, counts: torch.Tensor, uniform: torch.Tensor
    ) -> torch.Tensor:
        """Give the turn of a random path in each row, `[B]`, 0 where a row counts nowhere or is too short for one.

        Args:
            uniform: `[B, 3]`, numbers in [0, 1) that say which path.
        """
        first, last = content.unbind(dim=1)
        long_enough = (last - first >= 2) & (counts > 0)
        if self.tube_form == "triple":
            each = tube_distance(states, draw_triples(first, last, uniform).clamp_max(states.shape[1] - 1))
        else:
            triples = draw_triples(first, last, uniform).clamp_max(states.shape[1] - 1)
            patches = torch.stack([first, triples[:, 0], triples[:, 2], last], dim=1)
            each = patch_distance(states, patches)
        return torch.where(long_enough, each, torch.zeros_like(each))


def _forward_like(plain: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of models with an objective, which it asks the model for: accelerate keeps it in a copy's too."""

    def forward(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        objective = getattr(model, _ATTACHED)
        if "labels" not in kwargs or "content" not in kwargs:
            return objective._plain(*args, **kwargs)
        return objective._compute(model, *args, **kwargs)

    # generate() and the Trainer look at it.
    own = inspect.Parameter("model", inspect.Parameter.POSITIONAL_ONLY)
    signature = inspect.signature(plain)
    forward.__signature__ = signature.replace(parameters=[own, *signature.parameters.values()])
    return forward


@torch.no_grad()
def check_model(model: PreTrainedModel, collator: Callable[..., dict[str, torch.Tensor]], row: dict[str, Any]) -> None:
    """Refuse a model that lets views in one row, or padding, change each other, or whose loss is not the shared one.

    Args:
        collator: `DataCollatorForPairedViews`; the batches of one that makes no views are not looked at for them.
        row: of `PairedViewTokenizer`.

    Raises:
        UsageError: its second view, which comes after the first, has another representation by itself; it takes no
            positions, and views are to share a row; or its loss is not the sum over the next tokens, divided by
            `num_items_in_batch`.
    """
    _check_decoder(model)
    device = model.get_input_embeddings().weight.device
    # Two rows, because there are attentions that look at positions where a batch is one row, and nowhere else.
    batch = {name: value.to(device) for name, value in collator([row, row]).items()}
    training, decoder = model.training, decoder_of(model)
    model.eval()
    try:
        _check_loss(model, torch.tensor([row["input_ids"][:16]], device=device))
        if "view_ends" not in batch:
            return
        ids, positions, ends = (batch[name] for name in ("view_input_ids", "view_position_ids", "view_ends"))
        if not _takes_positions(model):
            positions = None
        if ids.dim() == 2:
            if positions is None:
                raise _without_positions(model)
            ids, positions = _in_one_row(batch["input_ids"], batch["attention_mask"], ids, positions).values()
            ends = batch["input_ids"].shape[1] + ends
        among = _at_ends(decoder, ids, positions, ends)[0, 1]
        ids = torch.tensor([row["code_input_ids"]], device=device)
        alone = decoder(input_ids=ids, use_cache=False, return_dict=True).last_hidden_state[0, row["code_end"]]
    finally:
        model.train(training)
    # Rounding is below 1e-6 in float32 on a CPU; convolutions with small random weights let 1e-4 through.
    exact = alone.dtype == torch.float32 and device.type == "cpu"
    if (among - alone).float().norm() > (1e-5 if exact else 0.02) * alone.float().norm():
        remedy = "another model" if batch["view_input_ids"].dim() == 3 else "--view_passes separate, or another model"
        raise UsageError(
            f"{type(model).__name__} does not keep the views apart by their positions: what it makes of a view changes "
            f"beside others; use {remedy}"
        )


def _check_loss(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """Refuse a model whose loss is a mean whatever it is told, or compares a state with its own token.

    Args:
        ids: `[1, N]`, a few tokens.
    """
    count = torch.tensor(ids.shape[1] - 1, device=ids.device)
    once, twice = (
        model(input_ids=ids, labels=ids, num_items_in_batch=total, use_cache=False, return_dict=True)
        for total in (count, 2 * count)
    )
    half = F.cross_entropy(once.logits[0, :-1].float(), ids[0, 1:]) / 2
    # The difference, without what a mixture of experts adds for its router.
    if ((once.loss - twice.loss).float() - half).abs() > 0.02 * half:
        raise UsageError(
            f"{type(model).__name__} has a loss of its own, not the sum over next tokens divided by "
            "num_items_in_batch, by which the parts of an update add up; use another model"
        )


def _positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """`[B, L]`: those of rows that are padded on either side."""
    return (attention_mask.cumsum(dim=1) - 1).clamp_min(0)


def _in_one_row(
    ids: torch.Tensor, attention_mask: torch.Tensor, view_ids: torch.Tensor, view_positions: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Conversations and then their views, `[B, L + V]` each; positions alone keep them apart, and the padding too."""
    positions = torch.cat([_positions(attention_mask), view_positions], dim=1)
    return {"input_ids": torch.cat([ids, view_ids], dim=1), "position_ids": positions}


def _check_decoder(model: PreTrainedModel) -> None:
    """Refuse a model that has no decoder but itself, or that peft gives tokens of its own to."""
    if has_adapters(model) and model.peft_config[model.active_adapter].is_prompt_learning:
        raise UsageError(
            f"{model.peft_config[model.active_adapter].peft_type.value} puts tokens of its own before a row, and views "
            "are read without them; take adapters that change layers, such as LoRA"
        )
    if isinstance(decoder_of(model), GenerationMixin):
        raise UsageError(
            f"{type(model).__name__} does not tell its decoder from its head (get_decoder), and views are read by the "
            "one without the other; use another model"
        )


def _takes_positions(model: PreTrainedModel) -> bool:
    return "position_ids" in inspect.signature(decoder_of(model).forward).parameters


def _without_positions(model: PreTrainedModel) -> UsageError:
    return UsageError(
        f"{type(model).__name__} takes no position_ids, by which views in one row are kept apart; use --view_passes "
        "separate, or another model"
    )


def decoder_of(model: nn.Module) -> nn.Module:
    """The part of a causal language model before its head, inside what PEFT puts around it."""
    if has_adapters(model):
        model = model.get_base_model()
    return model.get_decoder()


def has_adapters(model: nn.Module) -> bool:
    """Whether it is a `PeftModel` around a language model. Asked so, peft need not be there."""
    return hasattr(model, "get_base_model")


def _second_view(
    ids: torch.Tensor, positions: torch.Tensor | None, ends: torch.Tensor, second: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """The second view in a row of its own, `[B, 1, W]`, as `_at_ends` reads it.

    Args:
        ids, positions, ends, second: `view_input_ids`, `view_position_ids`, `view_ends` and `second_view` of
            `DataCollatorForPairedViews`; views in rows of their own need no `second`.
    """
    if second is None:
        return ids[:, 1:], None if positions is None else positions[:, 1:], ends[:, 1:]
    own = torch.arange(second.shape[1], device=second.device).expand_as(second)
    return ids.gather(1, second)[:, None], own[:, None], ends[:, 1:] - second[:, :1]


def _draws_of_rows(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Numbers in [0, 1), `[B, 3]`, that a row's tokens fix, whichever batch it is in: every evaluation draws alike."""
    tokens = (input_ids * attention_mask).sum(dim=1, keepdim=True)
    # Multiplicative hashing (Knuth, The Art of Computer Programming 3, section 6.4), of which the high bits are good.
    hashed = tokens * tokens.new_tensor([2654435761, 2246822519, 3266489917]) % 2**32
    return (hashed >> 8).float() / 2**24


def _at_ends(decoder: nn.Module, ids: torch.Tensor, positions: torch.Tensor | None, ends: torch.Tensor) -> torch.Tensor:
    """The last layer at the token that stands for each view, `[B, 2, D]`, in a pass without the language-model head.

    Views in rows of their own may be any number V: ids `[B, V, L]`, ends `[B, V]`, `[B, V, D]`.
    """
    read = {"input_ids": ids.flatten(0, -2)}
    if positions is not None:
        read["position_ids"] = positions.flatten(0, -2)
    states = decoder(**read, use_cache=False, return_dict=True).last_hidden_state
    if ids.dim() == 2:
        return _at(states, ends)
    return _at(states, ends.reshape(-1, 1)).reshape(*ends.shape, -1)


def _at(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """`[B, N, D]`: the states `[B, L, D]` at `positions`, `[B, N]`."""
    return states.gather(1, positions[..., None].expand(-1, -1, states.shape[-1]))
