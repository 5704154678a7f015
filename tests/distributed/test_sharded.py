"""Claims about parameters that two ranks share (FSDP2): outputs, EMA and distance are those of one process."""

from pathlib import Path

import pytest
import torch

from helpers.processes import run_ranks

from .workers.shard_two_ranks import steps

SCRIPT = Path(__file__).resolve().parent / "workers" / "shard_two_ranks.py"


@pytest.mark.distributed
@pytest.mark.slow
def test_two_ranks_that_share_the_parameters_do_as_one_process(tmp_path: Path) -> None:
    """Also in the step after an evaluation, which leaves the outermost parameters gathered: none of them is stale."""
    run_ranks(SCRIPT, tmp_path, cwd=tmp_path)
    files = sorted(tmp_path.glob("rank-*.pt"))
    assert len(files) == 2
    expected = steps(sharded=False)
    assert expected[0]["distance"] > expected[2]["distance"] > 0
    for rank in (torch.load(file, weights_only=True) for file in files):
        for ours, theirs in zip(rank, expected, strict=True):
            for name in ("loss", "context", "targets"):
                torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=1e-5)
            assert abs(ours["distance"] - theirs["distance"]) < 1e-5
