"""Claims about `benchmarks/reliability/multi_gpu_parity.py`, which compares runs on several ranks with one process."""

import importlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

from helpers.cli import REPOSITORY

ROW = {
    "ran_on": 2,
    "launch": "ddp", "processes": 2, "loss_single": 2e-5, "above_single": None, "loss_ddp": 0.0,
    "weights_single": {"context": 1e-4, "target": 1e-6}, "target_moved": 0.025, "resume_loss": 0.0,
    "resume_weights": 0.0, "export": True, "seconds": 31.4,
}  # fmt: skip


@pytest.fixture(scope="module")
def ranks() -> Iterator[ModuleType]:
    folder = str(REPOSITORY / "benchmarks" / "reliability")
    sys.path.insert(0, folder)
    yield importlib.import_module("multi_gpu_parity")
    sys.path.remove(folder)


def test_the_largest_gap_of_two_histories_and_the_first_step_above_the_bound(ranks: ModuleType) -> None:
    """Not the last gap, nor the largest one's step."""
    ours, theirs = {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}, {1: 1.0005, 2: 2.01, 3: 2.5, 4: 4.0}
    assert ranks.loss_gap(ours, theirs) == (0.5, 2)
    assert ranks.loss_gap(theirs, ours) == (0.5, 2)
    assert ranks.loss_gap(ours, theirs, bound=0.1) == (0.5, 3)
    assert ranks.loss_gap(ours, ours) == (0.0, None)


def test_a_loss_that_is_no_number_is_no_agreement(ranks: ModuleType) -> None:
    gap, above = ranks.loss_gap({1: 1.0, 2: math.nan}, {1: 1.0, 2: 1.0})
    assert math.isnan(gap)
    assert above == 2


def test_histories_of_other_steps_are_not_compared(ranks: ModuleType) -> None:
    """A run that ended early would agree in all steps it made; two empty histories would agree too."""
    for ours, theirs in (({1: 1.0}, {1: 1.0, 2: 1.0}), ({}, {})):
        with pytest.raises(ValueError, match="losses of steps"):
            ranks.loss_gap(ours, theirs)


def test_weights_are_compared_by_name(ranks: ModuleType) -> None:
    model = {
        "context_encoder.a": torch.zeros(3),
        "target_encoder.a": torch.tensor([0.0, -2.0, 1.0]),
        "b": torch.ones(1),
    }
    context, target = (ranks.encoder(model, which) for which in ("context", "target"))
    assert list(context) == list(target) == ["a"]
    assert ranks.weight_gap(context, target) == 2.0
    assert ranks.distance(context, target) == pytest.approx(5**0.5)
    with pytest.raises(ValueError, match="other names"):
        ranks.weight_gap(context, {})


def test_the_error_of_a_log_is_the_rank_s_own(ranks: ModuleType) -> None:
    """Not what torchrun and accelerate say after it."""
    log = (
        "loss 1\n[rank0]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB\n"
        "E1122 torch/distributed/elastic/multiprocessing/api.py:1] failed (exitcode: 1)\nTraceback:\n"
        "    raise ChildFailedError(\ntorch.distributed.elastic.multiprocessing.errors.ChildFailedError:\n"
        "  error_file: <N/A>\n============\nsubprocess.CalledProcessError: Command returned non-zero exit status 1.\n"
    )
    assert ranks.error_of(log) == "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"
    assert ranks.error_of("run_jepa.py: error: no such file\n") == "run_jepa.py: error: no such file"
    assert ranks.error_of("one\ntwo\n") == "two"
    assert ranks.error_of("") == "an empty log"


def test_the_table_says_what_agrees_and_what_does_not(ranks: ModuleType) -> None:
    differing = ROW | {
        "launch": "fsdp2",
        "loss_single": 0.5,
        "above_single": 7,
        "resume_weights": 1e-7,
        "export": False,
    }
    failed = {"launch": "zero3", "processes": 2, "failed": "no | module"}
    head, rule, good, bad, lost = ranks.table([ROW, differing, failed]).splitlines()
    assert len({line.count("|") for line in (head, rule, good, bad, lost)}) == 1
    assert good == "| ddp | 2 | 2.0e-05 | 0 | 1.0e-04, 1.0e-06 | 0.0250 | bit for bit | bit for bit | 31 |"
    assert "5.0e-01, above 0.001 from step 7" in bad
    assert "| 0, 1.0e-07 | differs |" in bad
    assert "failed: no / module" in lost


def test_the_table_distinguishes_a_failed_resume_from_none(ranks: ModuleType) -> None:
    row = {name: value for name, value in ROW.items() if not name.startswith("resume")}
    assert "| not tried |" in ranks.table([row])
    assert "| failed: no room |" in ranks.table([row | {"resume_failed": "no room"}])


def test_the_table_says_on_how_many_ranks_a_launch_ran(ranks: ModuleType) -> None:
    """One process would agree with itself to the last bit."""
    assert "| fsdp2, which ran on 1 | 2 |" in ranks.table([ROW | {"launch": "fsdp2", "ran_on": 1}])


def test_a_checkpoint_has_its_number_of_ranks(ranks: ModuleType, tmp_path: Path) -> None:
    for number, states in ((1, ["rng_state.pth"]), (2, ["rng_state_0.pth", "rng_state_1.pth"])):
        checkpoint = tmp_path / str(number)
        checkpoint.mkdir()
        for name in ("optimizer.pt", *states):
            (checkpoint / name).touch()
        assert ranks.ran_on(checkpoint) == number


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_accelerate_takes_what_is_shipped_for_deepspeed(stage: int) -> None:
    """`accelerate launch` refuses a DeepSpeed file together with its own precision, of whatever value."""
    shipped = yaml.safe_load((REPOSITORY / "configs" / "accelerate" / f"zero{stage}.yaml").read_text())
    assert "mixed_precision" not in shipped
    assert (REPOSITORY / shipped["deepspeed_config"]["deepspeed_config_file"]).is_file()
