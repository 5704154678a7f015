"""Claims about full runs under accelerate's FSDP2, on two CPU ranks, with the configuration that is shipped."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.distributed.fsdp import MixedPrecisionPolicy

from helpers.runs import largest_difference
from jepa_hf.errors import UsageError

from .workers.divide_two_ranks import facts, logged, model_of, run, start, trainer

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process leaves, its batches twice as large."""
    folder = tmp_path_factory.mktemp("alone")
    run(folder, 1)
    return folder


@pytest.fixture(scope="module")
def runs(alone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks leave: `whole`; `again`, from its checkpoint; `from_one`, from the one process's checkpoint; and
    `bf16`, which is `whole` in bfloat16."""
    folder = tmp_path_factory.mktemp("fsdp2")
    undisturbed, bf16 = folder / "whole", folder / "bf16"
    resumed = {folder / "again": undisturbed / "checkpoint-2", folder / "from_one": alone / "checkpoint-2"}
    start("fsdp2", {undisturbed: None, **resumed, bf16: None}, bf16={bf16})
    return folder


@pytest.fixture(scope="module")
def divided(runs: Path) -> Path:
    return runs / "whole"


def test_it_ends_with_the_weights_of_one_process(divided: Path, alone: Path) -> None:
    """Both encoders, the predictors and the head to 1e-5; the target moved as it should, and is whole."""
    assert [facts(folder)["launch"] for folder in sorted(divided.parent.iterdir())] == ["FSDP"] * 4
    assert largest_difference(model_of(divided), model_of(alone)) < 1e-5
    assert logged(divided, "loss") == pytest.approx(logged(alone, "loss"), abs=1e-5)
    distances = logged(divided, "health_encoder_distance")
    assert distances == pytest.approx(logged(alone, "health_encoder_distance"), rel=1e-4)
    assert distances[-1] > 0


def test_it_goes_on_from_a_checkpoint_bit_for_bit(runs: Path, divided: Path) -> None:
    assert largest_difference(model_of(runs / "again"), model_of(divided)) == 0.0
    assert logged(runs / "again", "loss") == logged(divided, "loss")


def test_a_checkpoint_goes_on_in_one_process(divided: Path, alone: Path, tmp_path: Path) -> None:
    """It holds what one process's holds, and the run ends with the weights of one process to 1e-5."""
    kept = {path.name for path in (alone / "checkpoint-2").iterdir() if not path.name.startswith("rng_state")}
    assert {path.name for path in (divided / "checkpoint-2").iterdir()} == kept | {"rng_state_0.pth", "rng_state_1.pth"}
    run(tmp_path, 1, divided / "checkpoint-2")
    assert largest_difference(model_of(tmp_path), model_of(alone)) < 1e-5


def test_one_processs_checkpoint_goes_on_divided(alone: Path, runs: Path) -> None:
    """Moments and all: without them the difference is 7e-4."""
    assert largest_difference(model_of(runs / "from_one"), model_of(alone)) < 1e-5


def test_in_bfloat16_the_loss_is_float32_and_that_of_float32(runs: Path, alone: Path) -> None:
    """accelerate's own policy casts the loss, where a step is a hundredth, and leaves out autocast, without which the
    head's product of bfloat16 states and float32 embeddings fails."""
    assert facts(runs / "bf16") == {"launch": "FSDP", "loss": "torch.float32"}
    assert logged(runs / "bf16", "loss") == pytest.approx(logged(alone, "loss"), rel=2e-2)
    assert logged(runs / "bf16", "loss") != logged(alone, "loss")


def test_neither_what_is_read_nor_what_is_summed_is_in_bfloat16(tmp_path: Path) -> None:
    """Raw features far from 0 would lose all but their first digits."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="FULL_STATE_DICT")
    trainer(tmp_path, bf16=True)._check_fsdp(plugin)
    assert plugin.mixed_precision_policy == MixedPrecisionPolicy(
        torch.bfloat16, torch.float32, output_dtype=None, cast_forward_inputs=False
    )


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"fsdp_version": 1}, "fsdp_version must be 2, as in configs/accelerate/fsdp2.yaml"),
        ({"fsdp_version": 2, "state_dict_type": "SHARDED_STATE_DICT"}, "fsdp_state_dict_type must be FULL_STATE_DICT"),
    ],
)
def test_what_cannot_be_resumed_is_refused(given: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=sentence):
        trainer(tmp_path)._check_fsdp(FullyShardedDataParallelPlugin(**given))
