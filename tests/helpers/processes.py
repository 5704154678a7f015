"""Python commands in processes that need not import torch and transformers again (5 to 8 s).

They are forked from a server that has imported these and done nothing else: a fork of the tests' own process would
inherit the locks of threads that it does not have (Arrow's, the tokenizers', autograd's), and may wait for them.
Variables that the libraries read when they are imported have no effect on such a process.
"""

import contextlib
import json
import multiprocessing
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import reduction
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from transformers import dynamic_module_utils

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["helpers.preloaded"])
_CLIENT = Path(__file__).with_name("forked_python.py")


class _Descriptor:
    """An open file that a process of the server gets as a number of its own."""

    def __init__(self, number: int):
        self.number = number

    def __reduce__(self) -> tuple[Callable[[Any], int], tuple[Any]]:
        return _detach, (reduction.DupFd(self.number),)


def _detach(inherited: Any) -> int:
    return inherited.detach()


def start_python(
    arguments: Sequence[str | Path],
    environment: Mapping[str, str],
    cwd: str | Path,
    out: str | Path | int,
    err: str | Path | int,
    stdin: int | None = None,
    new_session: bool = False,
) -> BaseProcess:
    """Start a process that does as `python arguments` would.

    Args:
        out: File to whose end it prints, or descriptor.
        err: As `out`, for the error stream.
        stdin: Descriptor that it reads; without one, there is nothing to read.
        new_session: The process leads a group of its own, which can be signalled.
    """
    with contextlib.ExitStack() as stack:
        files = {} if stdin is None else {0: _Descriptor(stdin)}
        for number, place in ((1, out), (2, err)):
            if not isinstance(place, int):
                place = os.open(place, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
                stack.callback(os.close, place)
            files[number] = _Descriptor(place)
        given = [str(argument) for argument in arguments]
        process = _SERVER.Process(target=_run, args=(given, dict(environment), str(cwd), files, new_session))
        process.start()
    return process


def _run(arguments: list[str], environment: dict[str, str], cwd: str, files: dict[int, int], new_session: bool) -> None:
    if new_session:
        os.setsid()
    for number, file in files.items():
        os.dup2(file, number)
        os.close(file)
    if 0 in files:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
    # What tests set of all that is read on import.
    dynamic_module_utils.HF_MODULES_CACHE = environment.get("HF_MODULES_CACHE", dynamic_module_utils.HF_MODULES_CACHE)
    multiprocessing.set_start_method("fork", force=True)  # Python's own, not this process's
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    sys.executable = environment.get("FORKED_PYTHON", sys.executable)  # for processes that this one starts
    os.chdir(cwd)
    try:
        _run_python(arguments)
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def _run_python(arguments: list[str]) -> None:
    match arguments:
        case ["-u", *rest]:
            for stream in (sys.stdout, sys.stderr):
                stream.reconfigure(write_through=True)
            _run_python(rest)
        case ["-W", "ignore", *rest]:
            warnings.simplefilter("ignore")
            _run_python(rest)
        case ["-c", code, *rest]:
            sys.argv = ["-c", *rest]
            sys.path.insert(0, "")
            _run_main(code, "<string>")
        case ["-m", name, *rest]:
            sys.argv = [name, *rest]
            sys.path.insert(0, os.getcwd())
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        case [script, *rest]:
            sys.argv = [script, *rest]
            sys.path.insert(0, str(Path(script).parent))
            _run_main(Path(script).read_text("utf-8"), script)


def _run_main(code: str, file: str) -> None:
    """Run a main module that, unlike `runpy`'s, is there until the process has ended, with all its objects."""
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    module.__file__ = file
    exec(compile(code, file, "exec"), module.__dict__)


def wait(processes: Sequence[BaseProcess], timeout: float) -> list[int]:
    """Return the exit codes; kill all processes after `timeout` seconds, or as soon as one fails."""
    end = time.monotonic() + timeout
    while any(process.is_alive() for process in processes):
        if any(process.exitcode for process in processes) or time.monotonic() > end:
            for process in processes:
                process.kill()
        time.sleep(0.02)
    return [process.exitcode or 0 for process in processes]


def run_python(
    arguments: Sequence[str | Path],
    environment: Mapping[str, str],
    cwd: str | Path,
    out: str | Path | None = None,
    err: str | Path | None = None,
    timeout: float = 240,
) -> tuple[int, str, str]:
    """Wait for `start_python`; return its exit code and what it printed to both streams.

    Args:
        out: File to whose end it prints, instead of a temporary one.
        err: As `out`, for the error stream.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, err = out or Path(folder, "out"), err or Path(folder, "err")
        (code,) = wait([start_python(arguments, environment, cwd, out, err)], timeout)
        return code, Path(out).read_text("utf-8"), Path(err).read_text("utf-8")


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
            ranks.append(start_python([script, *arguments], environment, cwd, out, err))
        codes = wait(ranks, timeout)
        printed, errors = out.read_text("utf-8"), err.read_text("utf-8")
    assert codes == [0] * processes, printed + errors[-4000:]
    return printed


@contextlib.contextmanager
def forked_scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have `subprocess.run` of a Python script take a process of the server."""
    start = subprocess.run

    def run(command: Sequence[str], **settings: Any) -> subprocess.CompletedProcess[str]:
        python, *arguments = map(str, command)
        is_script = (arguments[2:] if arguments[:2] == ["-W", "ignore"] else arguments)[0].endswith(".py")
        if python != sys.executable or not is_script:
            return start(command, **settings)
        out, err = (settings.get(name) for name in ("stdout", "stderr"))
        out = None if out in (None, subprocess.PIPE) else out.name
        err = out if err == subprocess.STDOUT else None
        environment, cwd = settings.get("env") or os.environ, settings.get("cwd") or os.getcwd()
        completed = subprocess.CompletedProcess(command, *run_python(arguments, environment, cwd, out, err))
        if settings.get("check"):
            completed.check_returncode()
        return completed

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", run)
        yield


# ---- a command that is one of the server's processes


@contextlib.contextmanager
def forked_python() -> Iterator[None]:
    """Have `sys.executable` be a command that does as Python would, in a process of the server.

    So is that of all processes that it starts, such as a launcher's ranks. It passes on SIGINT and SIGTERM, and its
    process ends with it.
    """
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/socket")
        listener.listen()
        command = Path(folder, "python")
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{_CLIENT}" "{folder}/socket" "$@"\n')
        command.chmod(0o755)
        threading.Thread(target=_accept, args=(listener,), daemon=True).start()
        environment = mock.patch.dict(os.environ, FORKED_PYTHON=str(command))
        with environment, mock.patch.object(sys, "executable", str(command)):
            yield
        listener.shutdown(socket.SHUT_RDWR)


def _accept(listener: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it is closed at the end
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=_serve, args=(connection,), daemon=True).start()


def _serve(connection: socket.socket) -> None:
    """Run a client's order, answer with the process's number and exit code, and end the process with the client."""
    with connection, connection.makefile() as orders:
        _, files, _, _ = socket.recv_fds(connection, 1, 3)
        stdin, out, err = files
        order = json.loads(orders.readline())
        process = start_python(order["arguments"], order["environment"], order["cwd"], out, err, stdin)
        for file in files:
            os.close(file)
        connection.sendall(f"{process.pid}\n".encode())
        ended, _, _ = select.select([process.sentinel, connection], [], [])
        if process.sentinel not in ended:
            process.kill()
        process.join()
        with contextlib.suppress(OSError):  # the client has been killed
            connection.sendall(f"{process.exitcode}\n".encode())
