"""Processes that are forked from that of the tests, so that they need not import torch and transformers again (5 s)."""

import contextlib
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import pytest
from accelerate.state import AcceleratorState, PartialState


def fork(work: Callable[[], Any], environment: Mapping[str, str], cwd: str | Path, out: IO[str], err: IO[str]) -> int:
    """Start a process that calls a function and exits with the code of its `SystemExit`, 0 or 1; return its id."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(cwd)
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()
        work()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(processes: Sequence[int], timeout: float) -> list[int]:
    """Return the exit codes; kill all processes after `timeout` seconds, or as soon as one fails."""
    codes: dict[int, int] = {}
    end = time.monotonic() + timeout
    while len(codes) < len(processes):
        for process in set(processes) - codes.keys():
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                codes[process] = os.waitstatus_to_exitcode(status)
        if any(codes.values()) or time.monotonic() > end:
            for process in set(processes) - codes.keys():
                os.kill(process, signal.SIGKILL)
        time.sleep(0.02)
    return [codes[process] for process in processes]


def run_script(script: str | Path, arguments: Sequence[str]) -> None:
    """Run a script as `python script arguments` would, in this process."""
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(str(script), run_name="__main__")


def run_ranks(script: Path, *arguments: str | Path, processes: int = 2, cwd: Path, timeout: float = 240) -> str:
    """Run a script on several CPU ranks, as `accelerate launch` with configs/accelerate/cpu2.yaml does.

    Returns:
        What the ranks print.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    shared = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "no"}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as out, tempfile.TemporaryFile("w+", encoding="utf-8") as err:
        ranks = [
            fork(
                lambda: run_script(script, [str(argument) for argument in arguments]),
                {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                cwd,
                out,
                err,
            )
            for rank in range(processes)
        ]
        codes = wait(ranks, timeout)
        printed, errors = ([file.seek(0), file.read()][1] for file in (out, err))
    assert codes == [0] * processes, printed + errors[-4000:]
    return printed


@contextlib.contextmanager
def forked_scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have `subprocess.run` of a Python script fork this process."""
    start = subprocess.run

    def run(command: Sequence[str], **settings: Any) -> subprocess.CompletedProcess[str]:
        python, *arguments = command
        if arguments[:2] == ["-W", "ignore"]:
            arguments = arguments[2:]
        script, *arguments = map(str, arguments)
        if python != sys.executable or not script.endswith(".py"):
            return start(command, **settings)
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8")) for _ in range(2)]
            out = files[0] if settings.get("stdout") in (None, subprocess.PIPE) else settings["stdout"]
            err = out if settings.get("stderr") == subprocess.STDOUT else files[1]
            environment = settings.get("env") or os.environ
            process = fork(lambda: run_script(script, arguments), environment, settings.get("cwd") or ".", out, err)
            (code,) = wait([process], 240)
            printed, errors = ([file.seek(0), file.read()][1] for file in files)
        completed = subprocess.CompletedProcess(command, code, printed, errors)
        if settings.get("check"):
            completed.check_returncode()
        return completed

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", run)
        yield
