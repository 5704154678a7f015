"""Progress of a run on the console: a bar, and one short line per entry of the log."""

import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length
from transformers.utils import is_in_notebook

from ..monitoring.assessment import Verdict
from ..monitoring.health import is_measurement
from ..utils.counts import counted
from ..utils.formatting import format_number, format_share
from ..utils.streams import print_all_characters
from .training_args import BaseJepaTrainingArguments, JepaTrainingArguments

_BAR = "{desc}{percentage:3.0f} %|{bar}| step {n_fmt}/{total_fmt} · {rate_noinv_fmt} · ETA {remaining}"
# Seconds between two signs of progress without a bar.
_PROGRESS_INTERVAL_S = 60.0
# Log entries of a run whose `logging_steps` is not set, and the most steps between two of them.
_LOG_ENTRIES, _MAX_LOGGING_STEPS = 20, 500

# Terms of the losses: name in the log without `_loss`, and on the console.
_TERMS = {"contrastive": "contrast", "lm": "next token", "pair": "views"}
# Accuracies: name in the log, and on the console. Each may have a chance level.
_ACCURACIES = {
    "top1_accuracy": "hit",
    "view_top1_accuracy": "hit",
    "sample_top1_accuracy": "sample hit",
    "probe_linear": "linear probe",
    "probe_knn": "kNN probe",
    "exact_match": "exact match",
    "prefix_match": "prefix match",
    "gsm8k": "gsm8k",
    "sql": "sql",
}
_RANKS = ("context_rank", "view_rank")
# Health that the line of a log entry shows.
_LOGGED_HEALTH = ("top1_accuracy", "top1_accuracy_chance", "context_rank")


class ConsoleCallback(TrainerCallback):
    """Show the progress of training and evaluation.

    In a terminal and in a notebook it shows a bar on stderr, unless `disable_tqdm` is set. Otherwise the lines include
    the time left, and at least one line per minute is printed. The main process prints; trackers and `log_history`
    receive the complete entries.

    Args:
        weights: Weight of each term of the loss, by its name in the log, such as `prediction_loss`.
        width: Number of dimensions of the representations; None if it is not shown.
        counts_tokens: Whether the throughput is in tokens; otherwise it is in samples.
        verdict: Returns the verdict at the end of the run, or None.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        width: int | None,
        counts_tokens: bool,
        verdict: Callable[[], Verdict | None],
    ):
        print_all_characters()
        self.weights, self.width, self.counts_tokens, self.verdict = weights, width, counts_tokens, verdict
        self._bar: tqdm | None = None
        self._evaluation_bar: tqdm | None = None
        self._health: dict[str, float] = {}  # measured since the last line, at the step behind
        self._health_step = 0
        self._evaluated_batches = 0
        self._evaluation_start: float | None = None
        self._start = self._last_line = self._last_entry = time.monotonic()
        self._start_step = self._last_step = self._last_tokens = 0

    # ---- progress

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar, and adapt `logging_steps` to the length of the run where it is not set."""
        if adapts_logging(args):
            state.logging_steps = min(math.ceil(state.max_steps / _LOG_ENTRIES), _MAX_LOGGING_STEPS)
        self._start = self._last_line = self._last_entry = time.monotonic()
        self._start_step = self._last_step = state.global_step
        self._last_tokens = state.num_input_tokens_seen
        if state.is_world_process_zero and _shows_bars(args):
            self._bar = tqdm(
                total=state.max_steps, initial=state.global_step, bar_format=_BAR, unit=" steps", dynamic_ncols=True,
                leave=False,
            )  # fmt: skip

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar; without one, print a line at least once a minute."""
        if adapts_logging(args) and state.global_step >= state.max_steps:
            control.should_log = True
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)
        elif self._is_line_due(args, state):
            self._print(state, [f"step {state.global_step:,}/{state.max_steps:,}", *self._pace(state)])

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the bar of the evaluation; without one, print a line at least once a minute."""
        if self._evaluation_start is None:
            self._evaluation_start, self._evaluated_batches = time.monotonic(), 0
        self._evaluated_batches += 1
        loader = kwargs.get("eval_dataloader")
        total = len(loader) if loader is not None and has_length(loader) else None
        if state.is_world_process_zero and _shows_bars(args):
            if self._evaluation_bar is None:
                bar = _BAR.replace("step", "batch")
                self._evaluation_bar = tqdm(
                    total=total, desc="evaluation ", bar_format=bar, unit=" batches", dynamic_ncols=True, leave=False
                )
            self._evaluation_bar.update()
        elif self._is_line_due(args, state):
            of_total = "" if total is None else f"/{total:,}"
            self._print(state, [f"evaluation: batch {self._evaluated_batches:,}{of_total}"])

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Close the bar of the evaluation."""
        self._end_evaluation()

    def on_predict(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any, **kwargs: Any
    ) -> None:
        """Close the bar of the prediction."""
        self._end_evaluation()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar, and print the verdict unless an evaluation follows that it needs."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        verdict = self.verdict()
        if verdict is not None and can_be_judged(args, state):
            for line in verdict.lines:
                self._print(state, [line])

    # ---- lines

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Print the entry as one line: a training loss, an evaluation, or the end of training."""
        logs = logs or {}
        prefix = next((name.removesuffix("_runtime") for name in logs if name.endswith("_runtime")), "train")
        if prefix != "train":
            self._end_evaluation()
            values = {name.removeprefix(f"{prefix}_"): value for name, value in logs.items()}
            name = "evaluation" if prefix == "eval" else prefix.removeprefix("eval_")
            self._print(state, [f"{name} at step {state.global_step:,}", *self._parts(values)])
        elif "train_loss" in logs:
            steps, seconds = state.global_step - self._start_step, time.monotonic() - self._start
            self._print(state, [f"trained {counted(steps, 'step')} in {tqdm.format_interval(seconds)}"])
        elif "loss" in logs:
            line = [*self._parts(logs), *self._health_parts(state), f"lr {_scientific(logs['learning_rate'])}"]
            line += self._throughput(args, state)
            self._print_step(state, line if self._bar is not None else [*line, *self._pace(state)[1:]])
        else:
            self._health = {name: logs[f"health_{name}"] for name in _LOGGED_HEALTH if f"health_{name}" in logs}
            self._health_step = state.global_step
            if self._health and _asks_for_health(args) and state.global_step % state.logging_steps:
                self._print_step(state, self._parts(self._health))

    def _health_parts(self, state: TrainerState) -> list[str]:
        """Describe the last health, with its step if that is not this line's."""
        parts = self._parts(self._health)
        if not parts or self._health_step == state.global_step:
            return parts
        return [f"step {self._health_step:,}: {', '.join(parts)}"]

    def _print_step(self, state: TrainerState, parts: list[str]) -> None:
        self._print(state, [f"step {state.global_step:,}/{state.max_steps:,}", *parts])
        self._health = {}

    def _print(self, state: TrainerState, parts: list[str]) -> None:
        """Print a line from the main process, above the bar if there is one."""
        self._last_line = time.monotonic()
        if not state.is_world_process_zero:
            return
        line = " · ".join(parts)
        if self._bar is not None or self._evaluation_bar is not None:
            tqdm.write(line)
        else:
            print(line, flush=True)

    def _parts(self, values: Mapping[str, Any]) -> list[str]:
        """Describe the loss with its terms, the accuracies and the rank."""
        parts = []
        if "loss" in values:
            terms = [
                f"{_TERMS.get(name, name)} {format_number(values[f'{name}_loss'])}"
                + ("" if weight == 1 else f"×{weight:.3g}")
                for name, weight in ((name.removesuffix("_loss"), weight) for name, weight in self.weights.items())
                if weight and f"{name}_loss" in values
            ]
            parts.append(f"loss {format_number(values['loss'])}" + (f" ({', '.join(terms)})" if terms else ""))
        for name, label in _ACCURACIES.items():
            if name in values:
                chance = values.get(f"{name}_chance")
                parts.append(
                    f"{label} {format_share(values[name])}"
                    + ("" if chance is None else f" (chance {format_share(chance)})")
                )
        for name in _RANKS:
            if name in values:
                parts.append(f"rank {values[name]:.0f}" + ("" if self.width is None else f"/{self.width}"))
        return parts

    def _throughput(self, args: TrainingArguments, state: TrainerState) -> list[str]:
        """Return tokens or samples per second since the last entry with a loss."""
        now, steps = time.monotonic(), state.global_step - self._last_step
        seconds = max(now - self._last_entry, 1e-9)
        tokens = state.num_input_tokens_seen - self._last_tokens
        self._last_entry, self._last_step, self._last_tokens = now, state.global_step, state.num_input_tokens_seen
        if self.counts_tokens and tokens > 0:
            return [f"{_short(tokens / seconds)} tok/s"]
        samples = steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return [f"{_short(samples / seconds)} samples/s"]

    def _pace(self, state: TrainerState) -> list[str]:
        """Return steps per second since the start, and the time left."""
        rate = (state.global_step - self._start_step) / max(time.monotonic() - self._start, 1e-9)
        if not rate > 0:
            return []
        left = (state.max_steps - state.global_step) / rate
        return [f"{_short(rate)} steps/s", f"ETA {tqdm.format_interval(left)}"]

    def _is_line_due(self, args: TrainingArguments, state: TrainerState) -> bool:
        is_late = time.monotonic() - self._last_line >= _PROGRESS_INTERVAL_S
        return is_late and state.is_world_process_zero and not args.disable_tqdm

    def _end_evaluation(self) -> None:
        """Close the bar, and keep the evaluation's time out of the throughput of training."""
        if self._evaluation_start is not None:
            self._last_entry += time.monotonic() - self._evaluation_start
            self._evaluation_start = None
        if self._evaluation_bar is not None:
            self._evaluation_bar.close()
            self._evaluation_bar = None


def has_last_evaluation(state: TrainerState) -> bool:
    """Return whether an evaluation was made after the last step."""
    return any("eval_loss" in entry and entry["step"] == state.global_step > 0 for entry in state.log_history)


def can_be_judged(args: TrainingArguments, state: TrainerState) -> bool:
    """Return whether the log has all measurements of the verdict; else an evaluation after training adds them."""
    return not args.do_eval or has_last_evaluation(state) or any(map(is_measurement, state.log_history))


def adapts_logging(args: TrainingArguments) -> bool:
    """Return whether `logging_steps` follows from the length of the run."""
    return isinstance(args, BaseJepaTrainingArguments) and args.adapts_logging_steps


def _asks_for_health(args: TrainingArguments) -> bool:
    """Return whether the user chose how often health is measured."""
    return isinstance(args, JepaTrainingArguments) and args.health_steps != JepaTrainingArguments.health_steps


def _shows_bars(args: TrainingArguments) -> bool:
    return not args.disable_tqdm and (sys.stderr.isatty() or is_in_notebook())


def _scientific(value: float) -> str:
    """Format a learning rate.

    >>> [_scientific(value) for value in (9.7e-4, 0.0, 1e-10)]
    ['9.7e-4', '0', '1.0e-10']
    """
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if value else "0"


def _short(rate: float) -> str:
    """Format a rate with two or three digits.

    >>> [_short(rate) for rate in (0.52, 42.3, 4210.0, 12400.0, 1.3e6)]
    ['0.52', '42', '4.2k', '12k', '1.3M']
    """
    scale, unit = next(((scale, unit) for scale, unit in ((1e6, "M"), (1e3, "k")) if rate >= scale), (1.0, ""))
    rate /= scale
    return f"{rate:.0f}{unit}" if rate >= 10 else f"{rate:.2g}{unit}"
