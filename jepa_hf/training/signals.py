"""SIGTERM and Ctrl-C: a run saves a checkpoint after the step that it is in, and leaves."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .deferred_max import LateMaximum

# `accelerate launch` passes on to its ranks what the terminal has sent them already: within this many seconds a second
# signal is the same Ctrl-C.
_SAME_SIGNAL_SECONDS = 2.0


def outlast_signals(training: torch.Tensor) -> None:
    """Let a data loader's worker serve on when it is asked to go while its run trains.

    Terminals and schedulers send their signals to all processes of a run: the one that trains ends its workers when it
    has saved. A second SIGTERM ends the worker, and so does the first one once training is over: Python sends one when
    it exits, after an error for instance, and waits. torch takes any exit code but 0 for a worker's failure.

    Args:
        training: one number in shared memory, 0 where nothing trains.
    """
    asked = 0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked += 1
        if not training.item():
            os._exit(0)
        if asked > 1:
            os._exit(128 + number)

    signal.signal(signal.SIGTERM, note)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class InterruptionCallback(TrainerCallback):
    """Ends training with a checkpoint once this process, or that of another rank, was asked to go.

    While `listening`, a first SIGTERM or SIGINT (Ctrl-C) is noted, and the step at hand is the last one: a checkpoint
    is saved, whatever the save strategy, and training ends. An evaluation that is due is left out. A second Ctrl-C ends
    the process at once, with exit code 130. Ranks tell each other, and stop after the same step, the one after the step
    at hand: none waits for its device to learn what the others were asked.

    Attributes:
        received: the signal that this process, or that of another rank, was asked with; None where none came.
        stopped: training ended because of it.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.stopped = False
        self._at = 0.0
        self._late = LateMaximum()
        self._saved = -1

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note signals instead of ending; in the main thread only, as Python demands."""
        process = os.getpid()

        def note(number: int, frame: FrameType | None) -> None:
            if os.getpid() != process:  # a child that was forked meanwhile
                return
            if self.received is None:
                self.received, self._at = signal.Signals(number), time.monotonic()
                if os.environ.get("RANK", "0") == "0":
                    os.write(2, f"\n{self.received.name}: saving a checkpoint after this step\n".encode())
            elif number == signal.SIGINT and (
                int(os.environ.get("WORLD_SIZE", "1")) == 1 or time.monotonic() - self._at > _SAME_SIGNAL_SECONDS
            ):
                os.write(2, b"\nSIGINT again: leaving at once\n")
                os._exit(128 + signal.SIGINT)

        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @property
    def exit_code(self) -> int:
        """By convention 128 + the signal's number: 143 after SIGTERM, 130 after SIGINT."""
        return 128 + self.received

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.world_size > 1:
            before = self._late.read()
            self._late.send(torch.tensor([float(self.received or 0)], device=args.device))
            asked = before is not None and before[0] > 0
            if asked:
                self.received = signal.Signals(int(before[0]))
        else:
            asked = self.received is not None
        if asked:
            self.stopped = True
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._saved = state.global_step

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.stopped and self._saved == state.global_step:  # in the middle of an epoch: nothing is due
            control.should_save = control.should_evaluate = False
