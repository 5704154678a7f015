"""Callbacks: EMA target update, passes, mask epoch, weight-decay schedule, watchdog."""

import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..masking.base_collator import MaskingCollator
from ..models.lora import is_lora_parameter
from ..models.modeling_jepa import JepaForRepresentationPrediction
from ..monitoring.health import REMEDIES, diagnose, findings, is_measurement
from .ema import default_decay_range, initial_weight_fraction, interpolate_schedule, match_parameters, update_target
from .upstream import inner_module

logger = logging.getLogger(__name__)

# Minimum number of steps between two health measurements whose interval is a fraction of the run.
_MIN_HEALTH_STEPS = 25


def unwrap_jepa(model: nn.Module) -> JepaForRepresentationPrediction:
    """Return the JEPA inside DDP and torch.compile."""
    while not isinstance(model, JepaForRepresentationPrediction):
        model = inner_module(model)
    return model


class MovingAverageCallback(TrainerCallback):
    """Move averaged parameters once per optimizer step, before evaluation and saving.

    A skipped optimizer step (fp16 overflow) moves nothing.

    Args:
        step_decay: Returns the decay of update number `state.global_step`.

    Attributes:
        pairs: Trained and averaged parameters in the same order (see `match_parameters`); under
            FSDP2 and ZeRO-3, this rank's shards. To be set before the first step.
        decay: Decay of the last update.
    """

    def __init__(self, step_decay: Callable[[TrainerState], float]) -> None:
        self._step_decay = step_decay
        self.pairs: tuple[list[torch.Tensor], list[torch.Tensor]] | None = None
        self.decay: float | None = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Update the averaged parameters."""
        if self.pairs is None or kwargs["optimizer"].step_was_skipped:
            return
        self.decay = self._step_decay(state)
        update_target(*self.pairs, self.decay)


class EmaTargetCallback(MovingAverageCallback):
    """Move the target encoder: an exponential moving average of the context encoder.

    The decay is a pure function of `global_step / max_steps`, so that there is no state to save and
    a resumed run continues exactly. Nothing else moves the target.

    Args:
        first: Decay of the first update (default: that of `default`, or of `default_decay_range`).
        last: Decay of the last update (default: as above, or `first` if only that is set).
        schedule: "constant", "linear" or "cosine".
        pretrained: Whether the run starts from a pretrained encoder, for `default_decay_range`.
        default: Decays that the authors of the objective recommend (`JepaConfig.ema_decay_range`), if any.
    """

    def __init__(
        self,
        first: float | None = None,
        last: float | None = None,
        schedule: str = "linear",
        pretrained: bool = False,
        default: tuple[float, float] | None = None,
    ):
        super().__init__(self.step_decay)
        self.first, self.last, self.schedule, self.pretrained = first, last, schedule, pretrained
        self.default = default

    def decay_range(self, max_steps: int) -> tuple[float, float]:
        """Return the first and the last decay of a run of `max_steps` updates."""
        first, last = self.default or default_decay_range(max_steps, self.pretrained)
        if self.first is not None:
            first = last = self.first
        if self.last is not None:
            last = self.last
        return first, last

    def step_decay(self, state: TrainerState) -> float:
        """Return the decay of update number `state.global_step`."""
        return interpolate_schedule(
            state.global_step, state.max_steps, *self.decay_range(state.max_steps), self.schedule
        )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Match the parameters of both encoders."""
        self._warn_if_ema_too_slow(state.max_steps)
        jepa = unwrap_jepa(kwargs["model"])
        # With LoRA only the adapters are averaged, because the rest is frozen.
        averaged = (
            [item for item in encoder.named_parameters() if jepa.config.lora is None or is_lora_parameter(item[0])]
            for encoder in (jepa.context_encoder, jepa.target_encoder)
        )
        self.pairs = match_parameters(*averaged)

    def _warn_if_ema_too_slow(self, max_steps: int) -> None:
        """Warn of a target that stays near random weights; near pretrained ones it should."""
        if self.pretrained:
            return
        initial_share = initial_weight_fraction(max_steps, *self.decay_range(max_steps), self.schedule)
        if initial_share > 1 / math.e:
            logger.warning(
                "the EMA is slower than the run is long: at its end the target encoder is still %.0f %% its random "
                "start; train for more than %d steps, or lower --ema_decay and --ema_decay_end",
                100 * initial_share,
                max_steps,
            )


class PassCallback(TrainerCallback, ExportableState):
    """Count the passes over the training rows and the updates of the current pass.

    A stream has no length, so the number of steps alone does not locate the row that a resumed run continues at.

    Attributes:
        passes: Passes that have ended.
        updates: Updates of the current pass.
        of_ranks: Both numbers of each rank at the last checkpoint. Ranks with shards of their own differ.
    """

    def __init__(self) -> None:
        self.passes = self.updates = 0
        self.of_ranks: list[tuple[int, int]] = []

    def state(self) -> dict[str, Any]:
        """Return the state that `trainer_state.json` holds."""
        return {"args": {}, "attributes": {"of_ranks": self.of_ranks}}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count an update."""
        self.updates += 1

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count a pass, unless training ends in it: then a resumed run may continue the pass."""
        if not control.should_training_stop:
            self.passes, self.updates = self.passes + 1, 0


@dataclass
class Totals:
    """Sums that a resumed run continues.

    Attributes:
        targets: Targets of all updates so far, of all ranks.
        loss_before_log: Loss summed over the steps up to the last log.
        loss_since_log: Loss summed over the steps since then.
        steps_since_log: Number of these steps.
        means_since_log: Sum and weight of the other logged means, by name.
        counts_since_log: Logged counts, by name.
    """

    targets: int = 0
    loss_before_log: float = 0.0
    loss_since_log: float = 0.0
    steps_since_log: int = 0
    means_since_log: dict[str, tuple[float, float]] = field(default_factory=dict)
    counts_since_log: dict[str, float] = field(default_factory=dict)


class TotalsCallback(TrainerCallback, ExportableState):
    """Keep `totals` in checkpoints; the trainer sets them before each checkpoint."""

    def __init__(self) -> None:
        self.totals = Totals()

    def state(self) -> dict[str, Any]:
        """Return the state that `trainer_state.json` holds."""
        return {"args": {}, "attributes": asdict(self.totals)}

    def restore(self, state: TrainerState) -> None:
        """Set the totals of the checkpoint that a run is resumed from; a new run starts from 0."""
        saved = cast(dict[str, Any], state.stateful_callbacks)
        self.totals = Totals(**saved[type(self).__name__]["attributes"]) if state.global_step else Totals()


class TrainBeginCallback(TrainerCallback):
    """Call a function with the run's state before the first step."""

    def __init__(self, function: Callable[[TrainerState], None]):
        self.function = function

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Call the function."""
        self.function(state)


class MaskEpochCallback(TrainerCallback):
    """Set the collator's epoch, from which masks are drawn, before workers start."""

    def __init__(self, collator: MaskingCollator, passes: Callable[[], int]):
        self.collator, self.passes = collator, passes

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the epoch."""
        self.collator.epoch = self.passes()


class WeightDecayCallback(TrainerCallback):
    """Move the weight decay along a cosine during the run (I-JEPA: 0.04 to 0.4).

    It is a pure function of `global_step / max_steps`, so that a resumed run continues exactly.

    Args:
        last: Weight decay of the last update; that of the first is `args.weight_decay`.
    """

    def __init__(self, last: float):
        self.last = last

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the weight decay of Trainer's first parameter group; the second has none."""
        group = kwargs["optimizer"].param_groups[0]
        group["weight_decay"] = interpolate_schedule(
            state.global_step + 1, state.max_steps, args.weight_decay, self.last, "cosine"
        )


class HealthCallback(TrainerCallback):
    """Measure the health of the representations on a fixed batch, and warn when they collapse.

    It measures before the first step, every `every` steps and after the last one. Each kind of
    collapse and divergence (`health.diagnose`) is logged once per run.

    Args:
        measure: Returns the metrics, as `JepaTrainer.measure_health` does; none if there are too few targets.
        log: Writes them to the run's log, as `Trainer.log` does.
        every: Steps between two measurements; below 1 a fraction of the run, but at least 25 steps.
        stop: End the run at the first finding.
        is_interrupted: Returns whether a signal ends the run, which is to leave without a last measurement.
    """

    def __init__(
        self,
        measure: Callable[[], dict[str, float]],
        log: Callable[[dict[str, float]], None],
        every: float,
        stop: bool = False,
        is_interrupted: Callable[[], bool] = lambda: False,
    ):
        self.measure, self.log, self.every, self.stop = measure, log, every, stop
        self.is_interrupted = is_interrupted
        self._measurements: list[dict[str, float]] = []
        self._last_step = 0  # of a measurement
        self._reported: set[str] = set()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the start of the run; a resumed run has it, and its findings, in the log."""
        self._measurements = [entry for entry in state.log_history if is_measurement(entry)]
        self._reported = set(findings(self._measurements, state.max_steps))
        if not self._measurements:
            self._measure(state)
            self._report(state)  # samples that are all the same
        else:
            self._last_step = int(self._measurements[-1]["step"])
        if not self._measurements:
            logger.warning(
                "health is not measured, so that no collapse is reported: it needs targets of two samples, from the "
                "evaluation rows or else from the training rows"
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure if a measurement is due, and report new findings."""
        is_last = state.global_step >= state.max_steps
        every = self.every if self.every >= 1 else max(math.ceil(self.every * state.max_steps), _MIN_HEALTH_STEPS)
        if state.global_step % every and not is_last:
            return
        should_log = control.should_log
        self._measure(state)
        control.should_log = should_log  # logging resets it
        current = self._report(state)
        if current and self.stop:
            control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the end of a run that another callback has ended."""
        if self._last_step < state.global_step < state.max_steps and not self.is_interrupted():
            self._measure(state)

    def _report(self, state: TrainerState) -> dict[str, str]:
        """Report new findings of the last measurement; returns all of them."""
        is_last = state.global_step >= state.max_steps
        # All ranks measure the same batch, but must not stop because of their own rounding: rank 0 decides.
        (current,) = broadcast_object_list([diagnose(self._measurements, is_last) if self._measurements else {}])
        for kind, sentence in current.items():
            # Whether anything was learned is said by the verdict at the end.
            if kind not in self._reported and kind not in ("nothing_learned", "predictions_at_baseline"):
                logger.warning("step %d: %s. To avoid it, %s", state.global_step, sentence, REMEDIES[kind])
        self._reported |= current.keys()
        return current

    def _measure(self, state: TrainerState) -> None:
        values, self._last_step = self.measure(), state.global_step
        if values:
            self._measurements.append(values)
            self.log(values)
