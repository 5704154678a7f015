"""Claims about `jepa-hf report`: it says where it wrote, and refuses with one sentence what it cannot do."""

import shutil
from pathlib import Path

import pytest
import torch

from helpers.cli import snapshot, train
from helpers.report import text_run
from jepa_hf.cli.main import main

torch.set_num_threads(1)

pytestmark = pytest.mark.usefixtures("no_curves")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_run(tmp_path_factory.mktemp("runs"))


def test_it_writes_one_file_and_prints_its_name(
    finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    before = snapshot(run)
    assert main(["report", str(run), "--max_samples", "10"]) == 0
    assert capfd.readouterr().out.splitlines()[-1] == f"written to {run / 'report.html'}"
    after = snapshot(run)
    assert after.keys() - before.keys() == {"report.html"}
    assert {name: after[name] for name in before} == before
    other = tmp_path / "other.html"
    assert main(["report", str(run), "--output", str(other), "--max_samples", "10"]) == 0
    assert other.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


@pytest.mark.slow
def test_starting_over_deletes_the_report(tmp_path: Path) -> None:
    """It is the run's, so neither a repetition nor a fresh start stumbles over it."""
    smoke = ("--smoke_test", "--max_steps", "2", "--output_dir", tmp_path / "out")
    train(*smoke)
    assert main(["report", str(tmp_path / "out"), "--max_samples", "5"]) == 0
    (tmp_path / "out" / "evaluation").mkdir()
    assert "is finished" in train(*smoke)
    train(*smoke, "--overwrite_output_dir")
    assert {"report.html", "evaluation"}.isdisjoint(path.name for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ([], "RUN_DIR"),
        (["missing"], "'missing' is not a directory. Name the output_dir of a run"),
        (["empty"], "holds no run"),
        (["run", "--evaluation", "missing.json"], "--evaluation: 'missing.json' does not exist"),
        (["run", "--output", "empty"], "Output 'empty' is not a file in an existing folder"),
        (["run", "--output", "missing/page.html"], "Output 'missing/page.html' is not a file in an existing folder"),
        (["run", "--output", f"{'x' * 300}.html"], "cannot be written"),
        (["run", "--max_samples", "1"], "--max_samples: must be at least 2, not 1"),
        (["run", "--max_samples", "many"], "max_samples"),
        (["run", "--samples", "3"], "--samples"),
    ],
)
def test_refusals(
    flags: list[str],
    named: str,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    shutil.copytree(finished, "run")
    before = snapshot(tmp_path)
    capfd.readouterr()
    assert main(["report", *flags]) == 2
    output = capfd.readouterr()
    assert output.out == ""
    assert output.err.startswith("jepa-hf report: error: ")
    assert named in output.err
    assert output.err.count("\n") == 1
    assert snapshot(tmp_path) == before


def test_its_help_is_on_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["report", "--help"])
    assert left.value.code == 0
    output = capfd.readouterr()
    assert output.err == ""
    assert {"--output", "--max_samples", "--evaluation"} <= set(output.out.split())
