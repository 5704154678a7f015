"""Claims about DeepSpeed's ZeRO, on two CPU ranks; skipped where DeepSpeed is not installed.

The first run compiles DeepSpeed's CPU communication, which takes a minute or two and a C++ compiler.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import zero_two_ranks  # noqa: E402

STAGES = (1, 2, 3)


def start(stage: int, folder: Path, *checkpoint: Path) -> None:
    paths = os.pathsep.join(filter(None, [str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]))
    wanted = {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = str(HERE / "zero_two_ranks.py")
    done = subprocess.run(
        [*command, script, str(stage), str(folder), *map(str, checkpoint)],
        env=os.environ | wanted,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def model_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "jepa" / "model.safetensors")


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def logged(folder: Path, name: str) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [entry[name] for entry in history if name in entry]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process without DeepSpeed leaves, its batches twice as large."""
    folder = tmp_path_factory.mktemp("alone")
    zero_two_ranks.run(folder, 1)
    return folder


@pytest.fixture(scope="module", params=STAGES)
def sharded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    folder = tmp_path_factory.mktemp(f"zero{request.param}")
    start(request.param, folder)
    return request.param, folder


def test_it_ends_with_the_weights_of_one_process(sharded: tuple[int, Path], alone: Path) -> None:
    """Both encoders, the predictors and the head to 1e-5; the target moved as it should, and is whole."""
    _, folder = sharded
    assert largest_difference(model_of(folder), model_of(alone)) < 1e-5
    assert logged(folder, "loss") == pytest.approx(logged(alone, "loss"), abs=1e-5)
    distances = logged(folder, "health_encoder_distance")
    assert distances == pytest.approx(logged(alone, "health_encoder_distance"), rel=1e-4)
    assert distances[-1] > 0


def test_it_goes_on_from_a_checkpoint_bit_for_bit(sharded: tuple[int, Path], tmp_path: Path) -> None:
    stage, folder = sharded
    start(stage, tmp_path, folder / "checkpoint-2")
    assert largest_difference(model_of(tmp_path), model_of(folder)) == 0.0
    assert logged(tmp_path, "loss") == logged(folder, "loss")
