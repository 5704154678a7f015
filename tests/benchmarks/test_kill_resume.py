"""The claim that a run may be killed at any moment: the same command then ends as if nothing had been."""

import json
import re
from pathlib import Path

import pytest

from helpers.cli import REPOSITORY, assert_same_weights, start_process


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_a_run_killed_at_five_moments_is_the_undisturbed_one(tmp_path: Path) -> None:
    """Bit for bit, weights and logged losses; no kill costs more than the steps since the last save.

    One process is `run_jepa.py` itself. `benchmarks/reliability/kill_resume.py` does fifty kills of the same kind.
    """
    runs = tmp_path / "runs"
    benchmark = REPOSITORY / "benchmarks" / "reliability" / "kill_resume.py"
    flags = ["--points", "5", "--per_run", "5", "--commands", "1", "--steps", "18", "--seed", "1"]
    completed = start_process(benchmark, *flags, "--folder", runs, cwd=tmp_path)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    assert_same_weights(runs / "killed-0", runs / "undisturbed")
    assert_same_weights(runs / "killed-0" / "jepa", runs / "undisturbed" / "jepa")
    kills = json.loads((runs / "kills.json").read_text())
    assert [kill["moment"] for kill in kills] == ["start", "save", "step", "start", "end"]
    assert {kill["started_as"] for kill in kills} == {"fork", "command"}
    assert all(0 <= kill["again"] <= 5 for kill in kills)
    assert any(re.match(r"_checkpoint-\d+\.new", name) for kill in kills for name in kill["left"])
