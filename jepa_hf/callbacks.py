"""Callbacks: the one that moves the target encoder, and those that only keep time."""

from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .data_collator import MaskingCollator
from .ema import decay_at, default_decay_range, match_parameters, update_target
from .modeling_jepa import JepaForRepresentationPrediction


def unwrapped(model: nn.Module) -> JepaForRepresentationPrediction:
    """The JEPA inside what DDP and torch.compile put around it."""
    while not isinstance(model, JepaForRepresentationPrediction):
        model = model._orig_mod if isinstance(model, torch._dynamo.OptimizedModule) else model.module
    return model


class EmaTargetCallback(TrainerCallback):
    """Moves the target encoder once per real optimizer step, after it, and before evaluation and saving.

    The decay is a pure function of `global_step / max_steps`: there is nothing to save, and a resumed run goes on
    exactly. A skipped optimizer step (fp16 overflow) moves nothing. Nothing else moves the target.

    Args:
        first, last: decay of the first and the last update; each default is `default`, or derived, see
            `default_decay_range`.
        schedule: "constant", "linear" or "cosine".
        pretrained: whether the run starts from a pretrained encoder, for the derived default.
        default: what the objective's authors recommend, where they do (`JepaConfig.ema_decay_range`).
    """

    def __init__(
        self,
        first: float | None = None,
        last: float | None = None,
        schedule: str = "linear",
        pretrained: bool = False,
        default: tuple[float, float] | None = None,
    ):
        self.first, self.last, self.schedule, self.pretrained = first, last, schedule, pretrained
        self.default = default
        self.decay: float | None = None
        self._pairs: tuple[list[torch.Tensor], list[torch.Tensor]] | None = None

    def decay_range(self, max_steps: int) -> tuple[float, float]:
        """First and last decay of a run of `max_steps` updates."""
        first, last = self.default or default_decay_range(max_steps, self.pretrained)
        if self.first is not None:
            first = last = self.first
        if self.last is not None:
            last = self.last
        return first, last

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        jepa = unwrapped(model)
        self._pairs = match_parameters(jepa.context_encoder.named_parameters(), jepa.target_encoder.named_parameters())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if kwargs["optimizer"].step_was_skipped:
            return
        first, last = self.decay_range(state.max_steps)
        self.decay = decay_at(state.global_step, state.max_steps, first, last, self.schedule)
        update_target(*self._pairs, self.decay)


class MaskEpochCallback(TrainerCallback):
    """Tells the collator, in all workers, which epoch it is: new masks every epoch, the same ones after a resume."""

    def __init__(self, collator: MaskingCollator):
        self.collator = collator
        self._begun = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._begun = False

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A resumed run begins in the middle of an epoch; later ones are counted, because state.epoch is unknown while
        # streaming.
        self.collator.epoch = self.collator.epoch + 1 if self._begun else int(state.epoch or 0)
        self._begun = True


class WeightDecayCallback(TrainerCallback):
    """Moves the weight decay along a cosine, from its first to its last update (I-JEPA: 0.04 to 0.4).

    A pure function of `global_step / max_steps`, so that a resumed run goes on exactly.

    Args:
        last: weight decay of the last update; the first one's is `args.weight_decay`.
    """

    def __init__(self, last: float):
        self.last = last

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Trainer's first group holds what decays, the second what does not.
        group = kwargs["optimizer"].param_groups[0]
        group["weight_decay"] = decay_at(state.global_step + 1, state.max_steps, args.weight_decay, self.last, "cosine")
