"""Claims about DeepSpeed's ZeRO, on two CPU ranks; skipped where DeepSpeed is not installed.

The first run compiles DeepSpeed's CPU communication, which takes a minute or two and a C++ compiler.
"""

import sys
from pathlib import Path

import pytest

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from divide_two_ranks import logged, model_of, run, start, told  # noqa: E402
from jepa_runs import largest_difference  # noqa: E402


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process without DeepSpeed leaves, its batches twice as large."""
    folder = tmp_path_factory.mktemp("alone")
    run(folder, 1)
    return folder


@pytest.fixture(scope="module", params=["zero1", "zero2", "zero3"])
def sharded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    start(request.param, folder)
    return request.param, folder


def test_it_ends_with_the_weights_of_one_process(sharded: tuple[str, Path], alone: Path) -> None:
    """Both encoders, the predictors and the head to 1e-5; the target moved as it should, and is whole."""
    _, folder = sharded
    assert told(folder)["launch"] == "DEEPSPEED"
    assert largest_difference(model_of(folder), model_of(alone)) < 1e-5
    assert logged(folder, "loss") == pytest.approx(logged(alone, "loss"), abs=1e-5)
    distances = logged(folder, "health_encoder_distance")
    assert distances == pytest.approx(logged(alone, "health_encoder_distance"), rel=1e-4)
    assert distances[-1] > 0


def test_it_goes_on_from_a_checkpoint_bit_for_bit(sharded: tuple[str, Path], tmp_path: Path) -> None:
    launch, folder = sharded
    start(launch, tmp_path, folder / "checkpoint-2")
    assert largest_difference(model_of(tmp_path), model_of(folder)) == 0.0
    assert logged(tmp_path, "loss") == logged(folder, "loss")
