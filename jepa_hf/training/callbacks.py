"""Callbacks that move the target encoder, count, schedule and watch."""

import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..models.lora import is_adapter
from ..models.modeling_jepa import JepaForRepresentationPrediction
from ..monitoring.health import diagnose, findings, is_measurement
from .ema import decay_at, default_decay_range, match_parameters, start_share, update_target

logger = logging.getLogger(__name__)

# Steps between two measurements of health, at least, where a share of the run is asked for.
_LEAST_STEPS = 25


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

    During training `pairs` holds the parameters of both encoders in the same order; under FSDP, this rank's shards.
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
        self.pairs: tuple[list[torch.Tensor], list[torch.Tensor]] | None = None

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
        self._warn_of_a_slow_target(state.max_steps)
        jepa = unwrapped(model)
        self.pairs = match_parameters(
            *(_averaged(encoder, jepa.config.lora) for encoder in (jepa.context_encoder, jepa.target_encoder))
        )

    def _warn_of_a_slow_target(self, max_steps: int) -> None:
        """A target that should stay near a pretrained start is meant; one that stays near a random start is useless."""
        if self.pretrained:
            return
        kept = start_share(max_steps, *self.decay_range(max_steps), self.schedule)
        if kept > 1 / math.e:
            logger.warning(
                "the EMA is slower than the run is long: at its end the target encoder is still %.0f %% its random "
                "start; train for more than %d steps, or lower --ema_decay and --ema_decay_end",
                100 * kept,
                max_steps,
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if kwargs["optimizer"].step_was_skipped:
            return
        first, last = self.decay_range(state.max_steps)
        self.decay = decay_at(state.global_step, state.max_steps, first, last, self.schedule)
        update_target(*self.pairs, self.decay)


def _averaged(encoder: nn.Module, lora: dict[str, Any] | None) -> Iterator[tuple[str, torch.Tensor]]:
    """The named parameters whose average the target holds: all, or the adapters beside weights that stay."""
    return ((name, value) for name, value in encoder.named_parameters() if lora is None or is_adapter(name))


class PassCallback(TrainerCallback, ExportableState):
    """Count the passes over the training rows, and the updates of the current pass, for checkpoints.

    A stream has no length, so that the number of steps alone does not say where a resumed run continues.

    Attributes:
        passes: passes that have ended.
        updates: updates of the current pass.
        of_ranks: both numbers of each rank, as the last checkpoint has them. Ranks with shards of their own differ.
    """

    def __init__(self) -> None:
        self.passes = self.updates = 0
        self.of_ranks: list[tuple[int, int]] = []

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"of_ranks": self.of_ranks}}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.updates += 1

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not control.should_training_stop:  # else the pass may go on after a resume
            self.passes, self.updates = self.passes + 1, 0


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


class HealthCallback(TrainerCallback):
    """Measures on a fixed batch whether representations are healthy, and warns in words where they collapse.

    Measures before the first step, every `every` steps and after the last one. Each kind of finding of
    `health.diagnose` is a warning once per run; whether anything was learned is judged after the last step.

    Args:
        measure: gives the numbers, as `JepaTrainer.measure_health` does; none at all where they cannot be had.
        log: writes them to the run's log, as `Trainer.log` does.
        every: steps between two measurements; below 1, a share of the run, but 25 steps at least.
        stop: end the run at the first finding.
    """

    def __init__(
        self,
        measure: Callable[[], dict[str, float]],
        log: Callable[[dict[str, float]], None],
        every: float,
        stop: bool = False,
    ):
        self.measure, self.log, self.every, self.stop = measure, log, every, stop
        self._measured: list[dict[str, float]] = []
        self._told: set[str] = set()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A resumed run has its start, and what was told since, in the log.
        self._measured = [entry for entry in state.log_history if is_measurement(entry)]
        self._told = set(findings(self._measured, state.max_steps))
        if not self._measured:
            self._measure()
        if not self._measured:
            logger.warning(
                "health is not measured, so that no collapse is reported: it needs targets of two samples, from the "
                "evaluation rows or else from the training rows"
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        every = self.every if self.every >= 1 else max(math.ceil(self.every * state.max_steps), _LEAST_STEPS)
        if state.global_step % every and state.global_step < state.max_steps:
            return
        wanted = control.should_log
        self._measure()
        control.should_log = wanted  # which writing to the log takes back
        # Every rank measures the same batch, but must not stop for a last digit of its own.
        finished = state.global_step >= state.max_steps
        (found,) = broadcast_object_list([diagnose(self._measured, finished) if self._measured else {}])
        for kind, sentence in found.items():
            if kind not in self._told:
                logger.warning("step %d: %s", state.global_step, sentence)
        self._told |= found.keys()
        if found and self.stop:
            control.should_training_stop = True

    def _measure(self) -> None:
        values = self.measure()
        if values:
            self._measured.append(values)
            self.log(values)
