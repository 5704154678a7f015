"""Claims about parameters that two ranks share (FSDP2): outputs, EMA and distance are those of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .workers.shard_two_ranks import steps

HERE = Path(__file__).resolve().parent


@pytest.mark.distributed
@pytest.mark.slow
def test_two_ranks_that_share_the_parameters_do_as_one_process(tmp_path: Path) -> None:
    """Also in the step after an evaluation, which leaves the outermost parameters gathered: none of them is stale."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    paths = os.pathsep.join(filter(None, [str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(
        [*command, str(HERE / "workers" / "shard_two_ranks.py"), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    files = sorted(tmp_path.glob("rank-*.pt"))
    assert len(files) == 2, done.stderr[-3000:]
    expected = steps(sharded=False)
    assert expected[0]["distance"] > expected[2]["distance"] > 0
    for rank in (torch.load(file, weights_only=True) for file in files):
        for ours, theirs in zip(rank, expected, strict=True):
            for name in ("loss", "context", "targets"):
                torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=1e-5)
            assert abs(ours["distance"] - theirs["distance"]) < 1e-5
