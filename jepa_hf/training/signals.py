"""Graceful shutdown on SIGTERM and Ctrl-C: save a checkpoint after the current step, and exit."""

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .deferred_max import DeferredMax

logger = logging.getLogger(__name__)

# `accelerate launch` forwards to its ranks a signal that the terminal has already sent them: a
# second one within this many seconds is the same Ctrl-C.
_SAME_SIGNAL_SECONDS = 2.0


def install_worker_signal_handlers(training: torch.Tensor) -> None:
    """Have a data-loader worker outlast SIGTERM and Ctrl-C while its run trains.

    Terminals and schedulers signal all processes of a run; the training process shuts its workers down after it has
    saved. A second SIGTERM ends the worker. So does the first one after training, because Python sends it at exit, for
    instance after an error, and then waits. torch takes every exit code but 0 for a worker's failure.
    """
    received = 0

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received += 1
        if not training.item():
            os._exit(0)
        if received > 1:
            os._exit(128 + number)

    signal.signal(signal.SIGTERM, handler)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class GracefulShutdownCallback(TrainerCallback):
    """End training with a checkpoint after this process or another rank has received a signal.

    Under `handle_signals`, a first SIGTERM or SIGINT (Ctrl-C) makes the current step the last one: a checkpoint is
    saved, regardless of the save strategy, and training ends. An evaluation that is due is skipped. A second Ctrl-C
    ends the process immediately with exit code 130. All ranks stop after the same step, the one after the current step,
    so that none waits for its device to learn of the signal.

    Args:
        raises: For training in a program of the user's, such as a notebook: `leave` raises, a second Ctrl-C raises
            KeyboardInterrupt at once, and handlers that the program has installed stay.

    Attributes:
        signal_received: Signal that this process or another rank received; None if there was none.
        stopped: Whether training ended because of it.
    """

    def __init__(self, raises: bool = False) -> None:
        self.raises = raises
        self.signal_received: signal.Signals | None = None
        self.stopped = False
        self._received_at = 0.0
        self._signal_max = DeferredMax()
        self._saved_step = -1

    @contextmanager
    def handle_signals(self) -> Iterator[None]:
        """Handle signals in the main thread; Python allows it in no other."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        process = os.getpid()
        self.signal_received, self.stopped = None, False

        def handler(number: int, frame: FrameType | None) -> None:
            if os.getpid() != process:  # a child that was forked meanwhile
                return
            if self.signal_received is None:
                self.signal_received, self._received_at = signal.Signals(number), time.monotonic()
                if os.environ.get("RANK", "0") == "0":
                    os.write(2, f"\n{self.signal_received.name}: saving a checkpoint after this step\n".encode())
            elif number == signal.SIGINT and (
                int(os.environ.get("WORLD_SIZE", "1")) == 1
                or time.monotonic() - self._received_at > _SAME_SIGNAL_SECONDS
            ):
                os.write(2, b"\nSIGINT again: leaving at once\n")
                if self.raises:
                    raise KeyboardInterrupt
                os._exit(128 + signal.SIGINT)

        handled = [
            number
            for number in (signal.SIGTERM, signal.SIGINT)
            if not self.raises or signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
        ]
        previous = {number: signal.signal(number, handler) for number in handled}
        try:
            yield
        finally:
            for number, previous_handler in previous.items():
                signal.signal(number, previous_handler)

    def leave(self, checkpoint: Path) -> None:
        """End the program after training has stopped; without `raises` the caller does that."""
        if not self.stopped or not self.raises or self.signal_received is None:
            return
        message = (
            f"{self.signal_received.name} ended the training. trainer.train(resume_from_checkpoint=True), or the same "
            f"call of pretrain, continues from {checkpoint}."
        )
        if self.signal_received == signal.SIGINT:
            raise KeyboardInterrupt(message)
        logger.warning(message)
        raise SystemExit(self.exit_code)

    @property
    def exit_code(self) -> int:
        """128 + the signal's number: 143 for SIGTERM, 130 for SIGINT; 0 without a signal."""
        return 0 if self.signal_received is None else 128 + self.signal_received

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop after a signal."""
        should_stop = self.signal_received is not None
        if args.world_size > 1:
            maxima = self._signal_max.poll()
            self._signal_max.submit(torch.tensor([float(self.signal_received or 0)], device=args.device))
            should_stop = maxima is not None and maxima[0] > 0
            if maxima is not None and should_stop:
                self.signal_received = signal.Signals(int(maxima[0]))
        if should_stop:
            self.stopped = True
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Record the step of the checkpoint."""
        self._saved_step = state.global_step

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prevent a second checkpoint of the step: `Trainer` also ends interrupted epochs."""
        if self.stopped and self._saved_step == state.global_step:
            control.should_save = control.should_evaluate = False
