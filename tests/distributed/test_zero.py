"""Claims about DeepSpeed's ZeRO, on two CPU ranks; skipped where DeepSpeed is not installed.

The first run compiles DeepSpeed's CPU communication, which takes a minute or two and a C++ compiler.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")

from helpers.runs import largest_difference

from .workers.divide_two_ranks import facts, logged, model_of, run, start

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process without DeepSpeed leaves, its batches twice as large."""
    folder = tmp_path_factory.mktemp("alone")
    run(folder, 1)
    return folder


@pytest.fixture(scope="module", params=["zero1", "zero2", "zero3"])
def sharded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    start(request.param, {folder: None})
    return request.param, folder


def optimizer_of(folder: Path) -> dict[str, Any]:
    """The optimizer's state after two steps."""
    return torch.load(folder / "checkpoint-2" / "optimizer.pt", weights_only=True)


def test_it_ends_with_the_weights_of_one_process(sharded: tuple[str, Path], alone: Path) -> None:
    """Both encoders, the predictors and the head to 1e-5; the target moved as it should, and is whole."""
    _, folder = sharded
    assert facts(folder)["launch"] == "DEEPSPEED"
    assert largest_difference(model_of(folder), model_of(alone)) < 1e-5
    assert logged(folder, "loss") == pytest.approx(logged(alone, "loss"), abs=1e-5)
    distances = logged(folder, "health_encoder_distance")
    assert distances == pytest.approx(logged(alone, "health_encoder_distance"), rel=1e-4)
    assert distances[-1] > 0


def test_it_goes_on_from_a_checkpoint_bit_for_bit(sharded: tuple[str, Path], tmp_path: Path) -> None:
    launch, folder = sharded
    start(launch, {tmp_path: folder / "checkpoint-2"})
    assert largest_difference(model_of(tmp_path), model_of(folder)) == 0.0
    assert logged(tmp_path, "loss") == logged(folder, "loss")


def test_a_checkpoint_goes_on_in_one_process(sharded: tuple[str, Path], alone: Path, tmp_path: Path) -> None:
    """It holds what one process's holds, and the run ends with the weights and losses of one process to 1e-5."""
    _, folder = sharded
    kept = {path.name for path in (alone / "checkpoint-2").iterdir() if not path.name.startswith("rng_state")}
    assert {path.name for path in (folder / "checkpoint-2").iterdir()} == kept | {"rng_state_0.pth", "rng_state_1.pth"}
    ours, theirs = (optimizer_of(each) for each in (folder, alone))
    assert ours["param_groups"] == theirs["param_groups"]
    for number, each in theirs["state"].items():
        assert ours["state"][number].keys() == each.keys()
        for name, value in each.items():
            torch.testing.assert_close(ours["state"][number][name], value, rtol=1e-3, atol=1e-7)
    run(tmp_path, 1, folder / "checkpoint-2")
    assert largest_difference(model_of(tmp_path), model_of(alone)) < 1e-5
    assert logged(tmp_path, "loss") == pytest.approx(logged(alone, "loss"), abs=1e-5)


def test_one_processs_checkpoint_goes_on_sharded(sharded: tuple[str, Path], alone: Path, tmp_path: Path) -> None:
    start(sharded[0], {tmp_path: alone / "checkpoint-2"})
    assert largest_difference(model_of(tmp_path), model_of(alone)) < 1e-5
    assert logged(tmp_path, "loss") == pytest.approx(logged(alone, "loss"), abs=1e-5)


@pytest.mark.parametrize("sharded", ["zero3"], indirect=True)
def test_a_checkpoint_goes_on_under_fsdp2(sharded: tuple[str, Path], alone: Path, tmp_path: Path) -> None:
    start("fsdp2", {tmp_path: sharded[1] / "checkpoint-2"})
    assert facts(tmp_path)["launch"] == "FSDP"
    assert largest_difference(model_of(tmp_path), model_of(alone)) < 1e-5


def test_the_best_weights_are_loaded_at_the_end(sharded: tuple[str, Path]) -> None:
    """Bit for bit, the target's too; they are not the last ones."""
    _, folder = sharded
    best = load_file(folder / "checkpoint-4" / "model.safetensors")
    assert largest_difference(model_of(folder / "best"), best) == 0.0
    assert largest_difference(model_of(folder), best) > 1e-5
