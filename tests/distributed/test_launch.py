"""Claims about `jepa-hf train --accelerate_config`: no further flag, our sentence and exit code, no traceback."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.cli import REPOSITORY, start_process
from helpers.processes import forked_python

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture(autouse=True, scope="module")
def _forked() -> Iterator[None]:
    """The launcher and the ranks that it starts need not import torch."""
    with forked_python():
        yield


TRAIN = ("-m", "jepa_hf.cli", "train", "--accelerate_config", str(REPOSITORY / "configs/accelerate/cpu2.yaml"))
SMOKE = ("--smoke_test", "--report_to", "none")


def test_ranks_on_the_cpu_need_no_flag_and_print_once(tmp_path: Path) -> None:
    result = start_process(*TRAIN, *SMOKE, "--max_steps", "2", "--output_dir", "out", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("step 1/2 · loss") == 1
    assert result.stdout.count("written to out") == 1
    assert result.stderr.count("rows were longer than") == 1


def test_bad_input_ends_in_one_sentence(tmp_path: Path) -> None:
    """Found out by the ranks, after the launch."""
    result = start_process(*TRAIN, *SMOKE, "--mask_ratio", "2", "--output_dir", "out", cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("mask_ratio must lie strictly between 0 and 1") == 1
    assert "Traceback" not in result.stderr
    assert "ChildFailedError" not in result.stderr


def test_ctrl_c_saves_and_exits_with_130(tmp_path: Path) -> None:
    """As in a terminal, which signals the launcher and all ranks."""
    log = tmp_path / "log"
    flags = (*SMOKE, "--max_steps", "5000", "--logging_steps", "1", "--save_strategy", "no", "--output_dir", "out")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("w") as said:
        run = subprocess.Popen(
            [sys.executable, "-u", *TRAIN, *flags],
            stdout=said, stderr=said, cwd=tmp_path, env=environment, start_new_session=True,
        )  # fmt: skip
        while "· loss" not in log.read_text() and run.poll() is None:
            time.sleep(0.1)
        os.killpg(run.pid, signal.SIGINT)
        code = run.wait(timeout=90)
    text = log.read_text()
    assert code == 130, text
    assert "Traceback" not in text
    assert "Run the same command again to continue" in text
