"""Claims about two ranks of which one has to stop: both do, after the same step, with a complete checkpoint of both."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

from helpers.processes import forked_python, run_python
from jepa_hf.training.checkpoints import find_corruption

pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.skipif(
        Version(transformers.__version__) < Version("5.20"),
        reason="ranks on CPUs cannot resume with this transformers, which looks for a device named cpu:0",
    ),
]

HERE = Path(__file__).resolve().parent
CONFIG = HERE.parents[1] / "configs" / "accelerate" / "cpu2.yaml"


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Where the runs wrote, and what each of the two ranks ended with."""
    folder = tmp_path_factory.mktemp("two")
    paths = [str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = ["-m", "accelerate.commands.launch", "--config_file", str(CONFIG)]
    command += [str(HERE / "workers" / "stop_two_ranks.py"), str(folder)]
    with forked_python():
        code, _, errors = run_python(command, os.environ | environment, folder)
    assert code == 0, errors[-4000:]
    files = sorted(folder.glob("rank-*.pt"))
    assert len(files) == 2
    return folder, [torch.load(file, weights_only=True) for file in files]


def test_both_ranks_stop_after_the_same_step_where_one_is_asked(ended: tuple[Path, list[dict[str, Any]]]) -> None:
    """One step after the step at hand; with a checkpoint of both, and no other."""
    folder, ranks = ended
    assert [rank["stopped"] for rank in ranks] == [{"step": 3, "code": 143}] * 2
    assert find_corruption(folder / "stopped" / "checkpoint-3") is None
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in (folder / "stopped/checkpoint-3").iterdir()}


def test_the_stopped_run_goes_on_exactly(ended: tuple[Path, list[dict[str, Any]]]) -> None:
    """With dropout, of which each rank has its own."""
    for rank in ended[1]:
        assert all(torch.equal(value, rank["resumed"][name]) for name, value in rank["whole"].items())


def test_a_loss_of_one_rank_that_is_not_finite_ends_both_and_each_names_its_samples(
    ended: tuple[Path, list[dict[str, Any]]],
) -> None:
    folder, ranks = ended
    assert ranks[0]["read"] != ranks[1]["read"]
    for rank in ranks:
        rows = ", ".join(map(str, rank["read"]))
        assert f"The loss is not finite in step 3 (batch 3 of epoch 1, training rows {rows} counted" in rank["error"]
        assert f"the weights before it are in {folder / 'spoilt' / 'checkpoint-3'}" in rank["error"]
    assert find_corruption(folder / "spoilt" / "checkpoint-3") is None
