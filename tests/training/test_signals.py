"""Claims about Ctrl-C and SIGTERM during `train` in a program of the user's."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.runs import RunAtStep, largest_difference, trainer, weights
from jepa_hf.training.checkpoints import latest_valid_checkpoint

STOPPED = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: SystemExit}


@pytest.fixture(autouse=True)
def own_handlers() -> Iterator[None]:
    """Python's handlers, which a shell's background process does not have."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def at_step(step: int, function: Callable[[], Any]) -> RunAtStep:
    return RunAtStep(on_step_begin=lambda model, state: function() if state.global_step == step else None)


@pytest.mark.parametrize("number", STOPPED)
def test_a_signal_saves_a_checkpoint_ends_the_program_and_the_run_continues(
    number: signal.Signals, tmp_path: Path
) -> None:
    """Without any save strategy; the continued run ends with the weights of an undisturbed one."""
    handler = signal.getsignal(number)
    stopped = trainer(tmp_path, callbacks=[at_step(1, lambda: os.kill(os.getpid(), number))])
    with pytest.raises(STOPPED[number]) as caught:
        stopped.train()
    if number == signal.SIGTERM:
        assert caught.value.code == 143
    assert signal.getsignal(number) is handler
    assert latest_valid_checkpoint(tmp_path)[0] == tmp_path / "checkpoint-2"
    stopped.train(resume_from_checkpoint=True)  # as the next cell of a notebook does
    undisturbed = trainer(tmp_path / "undisturbed")
    undisturbed.train()
    assert stopped.state.global_step == undisturbed.state.global_step == 4
    assert largest_difference(weights(stopped.model), weights(undisturbed.model)) == 0


def test_a_second_ctrl_c_interrupts_at_once_and_leaves_the_process(tmp_path: Path) -> None:
    """The first one would end the run after its step."""

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    run = trainer(tmp_path, callbacks=[at_step(1, twice)])
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert run.state.global_step == 1
    assert latest_valid_checkpoint(tmp_path)[0] is None


def test_a_handler_of_the_program_stays(tmp_path: Path) -> None:
    received = []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        run = trainer(tmp_path, callbacks=[at_step(1, lambda: os.kill(os.getpid(), signal.SIGTERM))])
        run.train()
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert received == [signal.SIGTERM]
    assert run.state.global_step == 4


def test_another_thread_trains_without_handlers(tmp_path: Path) -> None:
    """Python allows them in the main thread only."""
    run = trainer(tmp_path, max_steps=1)
    thread = threading.Thread(target=run.train)
    thread.start()
    thread.join()
    assert run.state.global_step == 1
