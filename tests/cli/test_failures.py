"""Claims about what happens to a run from outside: one sentence, the right exit code, and the same command goes on."""

import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import TrainerCallback

from helpers.cli import QUIET, REPOSITORY, assert_same_weights, snapshot, start_process, train
from helpers.processes import start_python
from helpers.tiny_models import CORPUS, save_tiny_encoder, write_lines
from jepa_hf import JepaTrainer
from jepa_hf.cli import train as train_module
from jepa_hf.cli.train import main
from jepa_hf.training.checkpoints import find_corruption
from jepa_hf.training.signals import GracefulShutdownCallback

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bert`, a tiny encoder, `data.txt`, and `whole`, an undisturbed run."""
    folder = tmp_path_factory.mktemp("start")
    save_tiny_encoder("bert", folder / "bert")
    write_lines(folder / "data.txt", CORPUS)
    train(*command(folder, folder / "whole"), pictures=True)
    return folder


def command(folder: Path, out: Path, *flags: str) -> list[str]:
    """Eight steps, each second saved."""
    own = f"--model_name_or_path {folder / 'bert'} --train_file {folder / 'data.txt'} --output_dir {out}"
    fast = "--max_steps 8 --save_steps 2 --learning_rate 1e-3 --per_device_train_batch_size 4 --logging_steps 1"
    return [*own.split(), *fast.split(), *flags]


class At(TrainerCallback):
    """Does something after a step."""

    def __init__(self, step: int, what: Callable[[], Any]):
        self.step, self.what = step, what

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.what()


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Have something happen after a step of the runs inside the block."""

    @contextmanager
    def at(step: int, what: Callable[[], Any]) -> Iterator[None]:
        class Disturbed(JepaTrainer):
            def __init__(self, *args: Any, **kwargs: Any):
                super().__init__(*args, **kwargs)
                self.add_callback(At(step, what))

        with monkeypatch.context() as patch:
            patch.setattr(train_module, "JepaTrainer", Disturbed)
            yield

    return at


def outcome(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, list[str]]:
    """Exit code of a run in this process, and what it said on stderr."""
    capsys.readouterr()
    code = main([*argv, *QUIET])
    return code, [line for line in capsys.readouterr().err.splitlines() if line.startswith("run_jepa.py: error: ")]


def valid_checkpoints(out: Path) -> set[str]:
    return {path.name for path in out.glob("checkpoint-*") if find_corruption(path) is None}


def assert_goes_on(folder: Path, out: Path, *flags: str) -> None:
    """The same command ends as the undisturbed run, and leaves nothing half-written."""
    output = train(*command(folder, out, *flags))
    assert "resuming the unfinished run" in output
    assert_same_weights(out / "jepa", folder / "whole" / "jepa")
    assert_same_weights(out, folder / "whole")
    assert not [path.name for path in out.iterdir() if ".new" in path.name or path.name.endswith(".old")]


# ---- the disk


@contextmanager
def mounted(place: Path, options: str) -> Iterator[None]:
    """A disk of its own, in memory; where mounting is not allowed, the test is left out."""
    place.mkdir(exist_ok=True)
    completed = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True, check=False
    )
    if completed.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize(
    "share",
    [
        pytest.param(0.2, id="0.2 of a checkpoint fits", marks=pytest.mark.slow),
        pytest.param(0.6, id="0.6 of a checkpoint fits"),
        pytest.param(0.75, id="0.75 of a checkpoint fits", marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_costs_no_complete_checkpoint(
    share: float, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second save does not fit: the message has needed and free bytes, the incomplete checkpoint is deleted."""
    one = sum(path.stat().st_size for path in (folder / "whole" / "checkpoint-2").iterdir())
    other_files = sum((folder / "whole" / name).stat().st_size for name in ("_run.json", "masks.png"))
    disk = tmp_path / "disk"
    with mounted(disk, f"size={int(one * (1 + share) + other_files + 16 * 4096)}"):
        out = disk / "out"
        flags = ("--save_total_limit", "1")
        code, output = outcome(capsys, *command(folder, out, *flags))
        assert code == 1
        assert len(output) == 1
        assert f"{out}/checkpoint-4 could not be written (" in output[0]
        assert "It takes about 0." in output[0]
        assert f"Make room, and give the same command again to go on from {out}/checkpoint-2." in output[0]
        assert {path.name for path in out.iterdir()} == {"_run.json", "masks.png", "checkpoint-2"}
        assert valid_checkpoints(out) == {"checkpoint-2"}
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        assert_goes_on(folder, out, *flags)


@pytest.mark.parametrize("size", [pytest.param(20_000, marks=pytest.mark.slow), 300_000])
def test_a_limit_on_files_is_reported_like_a_full_disk(
    size: int, folder: Path, tmp_path: Path, fault: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which makes safetensors fail or torch.save, each in its own words."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    out = tmp_path / "out"
    try:
        with fault(3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))):
            code, output = outcome(capsys, *command(folder, out))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 1
    assert f"{out}/checkpoint-4 could not be written (" in output[0]
    assert valid_checkpoints(out) == {"checkpoint-2"}
    assert not list(out.glob("_checkpoint*"))
    assert_goes_on(folder, out)


def test_results_that_find_no_room_are_written_by_the_same_command(
    folder: Path, tmp_path: Path, fault: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model at the end is written aside too: an earlier one is not torn."""
    out = tmp_path / "out"
    train(*command(folder, out))
    earlier = snapshot(out / "jepa")
    longer = command(folder, out, "--max_steps", "9", "--save_strategy", "no")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with fault(9, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))):
            code, output = outcome(capsys, *longer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 1
    assert f"{out} could not be written (" in output[0]
    assert snapshot(out / "jepa") == earlier
    assert not (out / "_final.new").exists()
    train(*longer)
    assert snapshot(out / "jepa") != earlier


def test_a_read_only_directory_is_refused_first(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    if os.geteuid() == 0:  # root can write everywhere except on a read-only disk
        with mounted(place, "ro"):
            outcomes = [outcome(capsys, *command(folder, place / name)) for name in ("", "a/b")]
    else:
        place.chmod(0o555)
        outcomes = [outcome(capsys, *command(folder, place / name)) for name in ("", "a/b")]
    for code, output in outcomes:
        assert code == 2
        assert "cannot be written to" in output[0]
        assert f"({place} is read-only). Choose another directory" in output[0]


# ---- the data


def test_missing_data_at_a_resume_is_reported_and_nothing_is_lost(
    folder: Path, tmp_path: Path, fault: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    out, data = tmp_path / "out", tmp_path / "data.txt"
    shutil.copy(folder / "data.txt", data)
    flags = ("--train_file", str(data))
    with fault(3, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        assert outcome(capsys, *command(folder, out, *flags))[0] == 143
    data.unlink()
    before = snapshot(out)
    code, output = outcome(capsys, *command(folder, out, *flags))
    assert (code, output) == (2, [f"run_jepa.py: error: train_file '{data}' does not exist. Check the path."])
    assert snapshot(out) == before
    shutil.copy(folder / "data.txt", data)
    assert_goes_on(folder, out, *flags)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_streamed_file_that_vanishes_while_it_is_trained_on_is_named(
    workers: str, folder: Path, tmp_path: Path, fault: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """As soon as it is read again, also by a worker; checkpoints stay."""
    out, data = tmp_path / "out", write_lines(tmp_path / "data.txt", CORPUS[:12])
    flags = ("--train_file", str(data), "--streaming", "--dataloader_num_workers", workers, "--max_steps", "30")
    with fault(2, data.unlink):
        code, output = outcome(capsys, *command(folder, out, *flags))
    assert code == 2
    assert output == [
        f"run_jepa.py: error: '{data}' cannot be read: No such file or directory. Restore it, or name another file."
    ]
    assert "checkpoint-2" in valid_checkpoints(out)


def test_an_image_that_vanishes_while_it_is_trained_on_is_named(
    tmp_path: Path, fault: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for index in range(16):
        pixels = np.random.default_rng(index).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{index}.png")
    sizes = "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64,image_size=32,patch_size=4"
    flags = f"--model_type ijepa --config_overrides {sizes} --train_file {images} --output_dir {tmp_path / 'out'} "
    flags += "--max_steps 12 --save_steps 2 --per_device_train_batch_size 4"
    with fault(2, (images / "3.png").unlink):
        code, output = outcome(capsys, *flags.split())
    assert code == 2
    assert f"'{images}/3.png' cannot be read: No such file or directory. Restore it or leave it out." in output[0]
    assert "checkpoint-2" in valid_checkpoints(tmp_path / "out")


def test_a_killed_loader_worker_is_reported(
    folder: Path, tmp_path: Path, fault: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    others = {*multiprocessing.active_children()}

    def kill() -> None:
        (worker,) = {*multiprocessing.active_children()} - others
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()

    out = tmp_path / "out"
    flags = ("--dataloader_num_workers", "1")
    with fault(3, kill):
        code, output = outcome(capsys, *command(folder, out, *flags))
    assert code == 1
    assert "A data-loader worker died (" in output[0]
    assert "killed by signal: Killed" in output[0] or "exited unexpectedly" in output[0]
    assert "Lower --dataloader_num_workers if so, and give the same command again to go on from" in output[0]
    assert_goes_on(folder, out, *flags)


# ---- numbers


def test_a_gradient_that_is_not_finite_ends_the_run_with_exit_code_1(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint that it names can be started from, as it says."""

    class Poisoned(JepaTrainer):
        def training_step(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(model, *args, **kwargs)
            if self.state.global_step == 4:
                model.get_parameter("predictor.fc1.bias").grad.fill_(float("inf"))
            return loss

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "JepaTrainer", Poisoned)
        code, output = outcome(capsys, *command(folder, out))
    assert code == 1
    assert len(output) == 1
    assert "The gradient of predictor.fc1.bias is not finite in step 5 (batch 5 of epoch 1, training rows " in output[0]
    assert valid_checkpoints(out) == {"checkpoint-2", "checkpoint-4", "checkpoint-5"}
    again = command(folder, tmp_path / "again", "--model_name_or_path", str(out / "checkpoint-5"), "--max_steps", "1")
    train(*again)


# ---- signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize(
    "strategy",
    ["steps", pytest.param("no", marks=pytest.mark.slow), pytest.param("epoch", marks=pytest.mark.slow)],
)
def test_a_signal_saves_after_the_step_and_leaves(
    strategy: str, number: int, code: int, folder: Path, tmp_path: Path, fault: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Whatever the save strategy; the handlers are then those from before; the same command goes on."""
    out = tmp_path / "out"
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    flags = ("--save_strategy", strategy)
    with fault(3, lambda: os.kill(os.getpid(), number)):
        assert main([*command(folder, out, *flags), *QUIET]) == code
    output = capsys.readouterr().out.splitlines()[-1]
    outcomes = f"after step 3. Run the same command again to continue from {out / 'checkpoint-3'}."
    assert output == f"Stopped by {signal.Signals(number).name} {outcomes}"
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert "checkpoint-3" in valid_checkpoints(out)
    assert not (out / "jepa").exists()
    assert_goes_on(folder, out, *flags)


def test_a_signal_in_the_last_step_leaves_the_end_to_the_same_command(
    folder: Path, tmp_path: Path, fault: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with fault(8, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        assert outcome(capsys, *command(folder, out))[0] == 143
    assert_goes_on(folder, out)


def test_how_to_go_on_leaves_out_what_would_start_over(
    folder: Path, tmp_path: Path, fault: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with fault(3, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        main([*command(folder, out, "--overwrite_output_dir"), *QUIET])
    assert "the same command again without --overwrite_output_dir to continue" in capsys.readouterr().out
    with fault(5, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        main([*command(folder, out, "--resume_from_checkpoint", str(out / "checkpoint-3")), *QUIET])
    assert "the same command again with --resume_from_checkpoint true to continue" in capsys.readouterr().out
    assert_goes_on(folder, out, "--resume_from_checkpoint", "true")


@pytest.mark.slow
def test_the_command_itself_saves_on_sigterm_and_goes_on(folder: Path, tmp_path: Path) -> None:
    """In a process of its own, with workers that the same signal reaches, as a scheduler sends it to all."""
    out, log = tmp_path / "out", tmp_path / "log"
    log.touch()
    flags = command(folder, out, "--dataloader_num_workers", "2", "--max_steps", "2000", "--save_steps", "1000")
    command_line = [REPOSITORY / "run_jepa.py", *flags, *QUIET]
    run = start_python(command_line, os.environ, tmp_path, log, log, new_session=True)
    while "· loss" not in log.read_text() and run.is_alive():
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGTERM)
    run.join(60)
    text = log.read_text()
    assert run.exitcode == 143, text
    (saved,) = valid_checkpoints(out)
    assert f"Run the same command again to continue from {out / saved}" in text
    assert "Traceback" not in text
    shorter = str(int(saved.partition("-")[2]) + 1)
    assert f"from {saved} with another length" in train(*flags, "--max_steps", shorter)


def broken_compiler(name: str = "") -> None:
    """What torch raises when a signal ends its compiler, or has left half a library in its cache."""
    if name:
        os.kill(os.getpid(), getattr(signal, name))
    error = type("InductorError", (RuntimeError,), {"__module__": "torch._inductor.exc"})
    raise error("CppCompileError: C++ compile error\n" + "a line of the compiler\n" * 1000)


@pytest.mark.parametrize(("name", "code", "words"), [
    ("SIGTERM", 143, "Stopped by SIGTERM in an unfinished step. Run the same command again to continue."),
    ("", 1, r"CppCompileError: C\+\+ compile error An interrupted .* Set TORCHINDUCTOR_CACHE_DIR to a new folder"),
])  # fmt: skip
def test_an_interrupted_compilation_is_one_sentence(
    name: str, code: int, words: str, folder: Path, tmp_path: Path, fault: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its compiler gets the same signal as the run, and fails with a thousand lines."""
    with fault(3, lambda: broken_compiler(name)):
        assert main([*command(folder, tmp_path / "out"), *QUIET]) == code
    error = capsys.readouterr().err
    assert re.search(words, error)
    assert error.count("a line of the compiler") == 0


def leaves_with(names: str, output: Path) -> int:
    """The exit code of a process that gets these signals one after the other while it listens; 7 where it goes on."""
    child = os.fork()
    if not child:
        try:
            os.dup2(os.open(output, os.O_CREAT | os.O_WRONLY), 2)
            with GracefulShutdownCallback().handle_signals():
                for name in names.split():
                    os.kill(os.getpid(), getattr(signal, f"SIG{name}"))
                os._exit(7)
        finally:
            os._exit(1)  # never into pytest's own way out
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.slow
@pytest.mark.parametrize(("signals", "code"), [("INT INT", 130), ("TERM TERM", 7), ("TERM INT", 130)])
def test_a_second_ctrl_c_leaves_at_once(signals: str, code: int, tmp_path: Path) -> None:
    """While a second SIGTERM waits for the save."""
    assert leaves_with(signals, tmp_path / "said") == code
    output = (tmp_path / "said").read_text()
    assert "saving a checkpoint after this step" in output
    assert ("leaving at once" in output) == (code == 130)


# ---- scripts of one's own

SCRIPT = """
import multiprocessing
import sys
from transformers import TrainerCallback
from jepa_hf import JepaTrainer, JepaTrainingArguments

class Fault(TrainerCallback):
    def on_step_end(self, *args, **kwargs):
        if sys.argv[1] == "fails":
            raise ArithmeticError("a fault of one's own")

args = JepaTrainingArguments(
    "out", max_steps=2, per_device_train_batch_size=4, dataloader_num_workers=1, use_cpu=True, report_to="none",
    save_strategy="no", dataloader_persistent_workers=sys.argv[1] == "ends with workers that stay",
)
data = [{"text": line} for line in open("data.txt")]
trainer = JepaTrainer("bert", args, train_dataset=data, eval_dataset=data[:8], callbacks=[Fault()])
trainer.train()
trainer.evaluate()
for process in multiprocessing.active_children():
    print("still there:", process.pid)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fails", "ends with workers that stay"])
def test_a_script_ends_though_workers_are_still_there(how: str, folder: Path) -> None:
    """Python asks workers once to go, and then waits for them for as long as it takes."""
    (folder / "script.py").write_text(SCRIPT)
    completed = start_process(folder / "script.py", how, cwd=folder)
    assert completed.returncode == (1 if how == "fails" else 0), completed.stderr
    assert ("still there" in completed.stdout) == (how != "fails")  # an evaluation's, which a next one would ask again
    last = completed.stderr.strip().splitlines()[-1:]
    assert (last == ["ArithmeticError: a fault of one's own"]) == (how == "fails"), completed.stderr
