"""Claims about the console: progress everywhere, one short line per log entry, no dictionaries, one process prints."""

import io
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState

from helpers import llm
from helpers.batches import rows, tiny_jepa
from helpers.runs import arguments, trainer
from jepa_hf.training import console
from jepa_hf.training.console import ConsoleCallback

LOSS = r"step \d+/4 · loss [\d.]+ \([a-z, ×\d.]+\)"


def printed(capsys: pytest.CaptureFixture[str], run: Any) -> list[str]:
    """The lines on stdout of a training and an evaluation."""
    capsys.readouterr()
    run.train()
    run.evaluate()
    return capsys.readouterr().out.splitlines()


def test_a_log_entry_is_one_short_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss with its terms and weights, top-1 accuracy with its chance, rank, throughput; evaluation; verdict."""
    model = tiny_jepa(contrastive_weight=0.5, mlm_weight=0.0)
    run = trainer(tmp_path, model=model, eval_data=rows("bert", 12), health_steps=2)
    lines = printed(capsys, run)
    steps = [line for line in lines if line.startswith("step")]
    assert [line.split(" ")[1] for line in steps] == ["1/4", "2/4", "3/4", "4/4"]
    assert all(re.match(LOSS, line) for line in steps)
    assert all(len(line) < 150 for line in steps)
    assert not any("{" in line for line in lines)
    logged = [entry["prediction_loss"] for entry in run.state.log_history if "loss" in entry]
    assert [re.search(r"prediction ([\d.]+)", line)[1] for line in steps] == [f"{loss:.3g}" for loss in logged]
    assert "×0.5)" in steps[0]
    assert "mlm" not in steps[0]
    assert re.search(r"· step 0: hit [\d.]+ % \(chance [\d.]+ %\), rank \d+/32 · lr", steps[0])  # of another step
    assert re.search(r"· hit [\d.]+ % \(chance [\d.]+ %\) · rank \d+/32 · lr [\d.e-]+ · [\d.kM]+ tok/s", steps[1])
    assert "hit" not in steps[2]  # measured every second step
    assert [line.split(":")[0] for line in lines if line.startswith("Next")] == ["Next"]
    (evaluation,) = [line for line in lines if line.startswith("evaluation")]
    assert re.match(r"evaluation at step 4 · loss [\d.]+ \(.*· hit .*· rank \d+/32", evaluation)


def test_a_script_trains_in_a_locale_without_the_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that only takes ASCII ended the training at its first line."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr("sys.stdout", stream)
    trainer(tmp_path).train()
    assert b"step 4/4 - loss " in stream.buffer.getvalue()


def test_language_models_log_in_the_same_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With their own terms."""
    lines = printed(capsys, llm.trainer(tmp_path, jepa_weight=2.0, max_steps=8))
    steps = [line for line in lines if line.startswith("step")]
    assert len(steps) == 8
    assert all(re.match(r"step \d/8 · loss [\d.]+ \(next token [\d.]+, views [\d.]+×2\) · lr", line) for line in steps)
    assert not any("{" in line for line in lines)
    verdict = lines.index(next(line for line in lines if line.startswith("Healthy")))
    assert re.match(r"Healthy. No collapse .* The next-token loss in training fell from [\d.]+ to", lines[verdict])
    assert lines[verdict + 1].startswith("Next: jepa-hf generate ")


@pytest.mark.parametrize(
    ("given", "max_steps", "entries"), [({}, 40, 20), ({}, 5, 5), ({"logging_steps": 15}, 40, 2), ({}, 3, 3)]
)
def test_a_run_logs_about_20_times_unless_the_user_decides(
    given: dict[str, int], max_steps: int, entries: int, tmp_path: Path
) -> None:
    """The last step is among the entries. Evaluations keep the default of `eval_steps`."""
    run = trainer(tmp_path, health_steps=0, max_steps=max_steps, **{"logging_steps": None} | given)
    run.train()
    steps = [entry["step"] for entry in run.state.log_history if "loss" in entry]
    assert len(steps) == entries
    assert (steps[-1] == max_steps) == (not given)


def test_a_long_run_logs_every_500_steps() -> None:
    callback, state = (
        ConsoleCallback({}, None, True, lambda: None),
        TrainerState(max_steps=100_000),
    )
    callback.on_train_begin(arguments("out", logging_steps=None), state, TrainerControl())
    assert state.logging_steps == 500
    assert arguments("out", logging_steps=None, eval_strategy="steps").eval_steps == 500


@pytest.mark.parametrize("disabled", [False, True])
def test_a_terminal_shows_a_bar_unless_it_is_disabled(
    disabled: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For training and evaluation, at any verbosity of transformers."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    run = trainer(tmp_path, eval_data=rows("bert", 12), disable_tqdm=disabled or None)
    run.train()
    run.evaluate()
    bars = capsys.readouterr().err
    assert ("step 4/4" in bars and "steps/s" in bars and "ETA" in bars) == (not disabled)
    assert ("evaluation" in bars) == (not disabled)


@pytest.mark.parametrize("disabled", [False, True])
def test_a_log_file_gets_a_line_at_least_once_a_minute(
    disabled: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the log entries, with the time left."""
    monkeypatch.setattr(console, "_PROGRESS_INTERVAL_S", 0.0)
    run = trainer(tmp_path, eval_data=rows("bert", 12), health_steps=0, logging_steps=100, disable_tqdm=disabled)
    lines = printed(capsys, run)
    progress = [line for line in lines if re.fullmatch(r"step \d/4 · [\d.k]+ steps/s · ETA [\d:]+", line)]
    assert len(progress) == (0 if disabled else 4)
    assert ("evaluation: batch 2/2" in lines) == (not disabled)


def test_one_process_prints(capsys: pytest.CaptureFixture[str]) -> None:
    state = TrainerState(max_steps=4, global_step=1, is_world_process_zero=False)
    callback = ConsoleCallback({}, None, True, lambda: None)
    callback.on_log(arguments("out"), state, TrainerControl(), logs={"loss": 1.0, "learning_rate": 1e-3})
    assert capsys.readouterr().out == ""


def test_health_is_printed_where_it_was_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Between two log entries, if `health_steps` was set; by default it waits for the next entry."""
    for health_steps, expected in ((1, 3), (0.05, 0)):
        data = {"eval_data": rows("bert", 12)}
        lines = printed(
            capsys, trainer(tmp_path / str(health_steps), health_steps=health_steps, logging_steps=4, **data)
        )
        assert len([line for line in lines if re.match(r"step [123]/4 · hit", line)]) == expected
