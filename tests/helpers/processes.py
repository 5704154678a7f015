"""Scripts in processes that need not import torch and transformers again (5 s).

They are forked from a server that has imported these and done nothing else: a fork of the tests' own process would
inherit the locks of threads that it does not have (Arrow's, the tokenizers', autograd's), and may wait for them.
"""

import contextlib
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["helpers.preloaded"])


def start_script(
    script: str | Path,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    cwd: str | Path,
    out: str | Path,
    err: str | Path,
) -> BaseProcess:
    """Start a process that does as `python script arguments` would; what it prints goes to the end of two files."""
    process = _SERVER.Process(target=_run, args=(str(script), list(arguments), dict(environment), cwd, out, err))
    process.start()
    return process


def _run(script: str, arguments: list[str], environment: dict[str, str], cwd: str, out: str, err: str) -> None:
    for number, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    try:
        run_script(script, arguments)
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def wait(processes: Sequence[BaseProcess], timeout: float) -> list[int]:
    """Return the exit codes; kill all processes after `timeout` seconds, or as soon as one fails."""
    end = time.monotonic() + timeout
    while any(process.is_alive() for process in processes):
        if any(process.exitcode for process in processes) or time.monotonic() > end:
            for process in processes:
                process.kill()
        time.sleep(0.02)
    return [process.exitcode or 0 for process in processes]


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
    with tempfile.TemporaryDirectory() as folder:
        out, err = (Path(folder, name) for name in ("out", "err"))
        ranks = []
        for rank in range(processes):
            environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(start_script(script, [str(argument) for argument in arguments], environment, cwd, out, err))
        codes = wait(ranks, timeout)
        printed, errors = out.read_text("utf-8"), err.read_text("utf-8")
    assert codes == [0] * processes, printed + errors[-4000:]
    return printed


@contextlib.contextmanager
def forked_scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have `subprocess.run` of a Python script take a process of the server."""
    start = subprocess.run

    def run(command: Sequence[str], **settings: Any) -> subprocess.CompletedProcess[str]:
        python, *arguments = command
        if arguments[:2] == ["-W", "ignore"]:
            arguments = arguments[2:]
        script, *arguments = map(str, arguments)
        if python != sys.executable or not script.endswith(".py"):
            return start(command, **settings)
        with tempfile.TemporaryDirectory() as folder:
            out, err = (settings.get(name) for name in ("stdout", "stderr"))
            out = Path(folder, "out") if out in (None, subprocess.PIPE) else Path(out.name)
            err = out if err == subprocess.STDOUT else Path(folder, "err")
            environment = settings.get("env") or os.environ
            process = start_script(script, arguments, environment, settings.get("cwd") or os.getcwd(), out, err)
            (code,) = wait([process], 240)
            printed, errors = out.read_text("utf-8"), err.read_text("utf-8")
        completed = subprocess.CompletedProcess(command, code, printed, errors)
        if settings.get("check"):
            completed.check_returncode()
        return completed

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", run)
        yield
