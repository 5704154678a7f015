"""Tests of the online probe: it equals a later evaluation and does not affect training."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from helpers.batches import image_config, rows, tiny_jepa
from helpers.runs import trainer
from helpers.tiny_models import tiny_tokenizer
from jepa_hf import JepaConfig, JepaForRepresentationPrediction, UsageError
from jepa_hf.cli.train import main
from jepa_hf.evaluation.embedder import Embedder
from jepa_hf.evaluation.online_probe import OnlineProbe
from jepa_hf.evaluation.scoring import evaluate
from jepa_hf.evaluation.tasks import load_tasks

ANIMALS, METALS = "the cat and the dog saw a small bird", "iron and gold and old silver melt in the fire"
QUIET = ["--use_cpu", "--report_to", "none", "--disable_tqdm", "--save_strategy", "no"]


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Sixty sentences of two kinds, any six words of each."""
    path = tmp_path / "labelled.jsonl"
    lines = []
    for number in range(60):
        words = (METALS if number % 2 else ANIMALS).split()
        text = " ".join(words[(number + step * (1 + number // 8)) % len(words)] for step in range(6))
        lines.append(json.dumps({"text": text, "label": number % 2}))
    path.write_text("\n".join(lines))
    return path


def test_its_scores_are_metrics_of_every_evaluation(labelled: Path, tmp_path: Path) -> None:
    """The last ones equal those of `evaluate` on the saved encoder."""
    probe = OnlineProbe.from_source(str(labelled), tiny_tokenizer("bert"))
    run = trainer(tmp_path / "out", eval_data=rows("bert", 8), eval_strategy="steps", eval_steps=2, probe=probe)
    run.train()
    entries = [entry for entry in run.state.log_history if "eval_loss" in entry]
    assert [entry["step"] for entry in entries] == [2, 4]
    assert all(0 <= entry["eval_probe_knn"] <= 1 for entry in entries)
    run.model.get_encoder().save_pretrained(tmp_path / "encoder")
    tiny_tokenizer("bert").save_pretrained(tmp_path / "encoder")
    actual = evaluate([Embedder.from_pretrained(tmp_path / "encoder")], load_tasks([str(labelled)]))
    expected = {score.metric: score.score.value for score in actual.scores}
    assert entries[-1]["eval_probe_linear"] == expected["linear_probe"]
    assert entries[-1]["eval_probe_knn"] == expected["knn"]


def test_columns_of_features_are_found_by_name(tmp_path: Path) -> None:
    """Whatever their order in the task, and whether the probe knows the encoder's columns when it reads the task."""
    config = JepaConfig.for_features(
        3, embed_dim=16, encoder_depth=1, num_heads=2, predictor_embed_dim=16, predictor_depth=1, patch_size=1
    )
    model = JepaForRepresentationPrediction(config)
    model.context_encoder.config.feature_column_names = list("abc")
    values = np.random.default_rng(0).normal(size=(80, 3)) * [1, 10, 100]
    frame = pd.DataFrame(values, columns=list("abc")).assign(label=(values[:, 0] > 0).astype(int))
    scores = []
    for order, names in (("abc", None), ("cab", None), ("cab", list("abc"))):
        frame[[*order, "label"]].to_csv(tmp_path / "task.csv", index=False)
        probe = OnlineProbe.from_source(str(tmp_path / "task.csv"), feature_column_names=names)
        probe.validate(model)
        scores.append(probe(model))
    assert scores[0] == scores[1] == scores[2]


def test_the_probe_does_not_affect_training(labelled: Path, tmp_path: Path) -> None:
    """Dropout and all: the same weights, and the model is back in training mode."""
    common = {"eval_data": rows("bert", 8), "eval_strategy": "steps", "eval_steps": 1}
    models = []
    for probe in (OnlineProbe.from_source(str(labelled), tiny_tokenizer("bert")), None):
        run = trainer(tmp_path, tiny_jepa(encoder={"hidden_dropout_prob": 0.1}), probe=probe, **common)
        run.train()
        models.append(run.model)
    for name, value in models[1].state_dict().items():
        assert models[0].state_dict()[name].equal(value), name


def test_the_best_model_may_be_chosen_by_it(labelled: Path, tmp_path: Path) -> None:
    """The probe's own list of scores, so that the second of three evaluations is the best."""
    scores = iter([0.1, 0.9, 0.3])
    run = trainer(
        tmp_path,
        eval_data=rows("bert", 8),
        probe=lambda model: {"probe_linear": next(scores)},
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="probe_linear",
        greater_is_better=True,
    )
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-2")
    assert run.state.best_metric == 0.9


def test_from_the_command_line(labelled: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    flags = [
        "--smoke_test",
        "--max_steps",
        "2",
        "--eval_strategy",
        "steps",
        "--eval_steps",
        "1",
        "--max_eval_samples",
        "8",
    ]
    assert main([*flags, "--output_dir", str(folder), "--probe_task", str(labelled), *QUIET]) == 0
    metrics = json.loads((folder / "metrics.json").read_text())
    assert 0 <= metrics["eval"]["eval_probe_linear"] <= 1
    assert sum("eval_probe_knn" in entry for entry in metrics["history"]) == 2


def test_an_unusable_task_is_refused_before_the_run(
    labelled: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    numbers = tmp_path / "numbers.csv"
    numbers.write_text("a,b,label\n" + "1.5,2,x\n2,3,y\n" * 10)
    start = ["--smoke_test", "--output_dir", str(tmp_path / "out"), *QUIET]
    for flags, expected in (
        (["--probe_task", str(labelled)], "probe_task is measured in evaluations"),
        (["--probe_task", str(numbers), "--eval_strategy", "epoch"], "has features, but the encoder reads text"),
        (["--probe_task", str(tmp_path / "nothing.csv"), "--eval_strategy", "epoch"], "does not exist"),
    ):
        assert main([*start, *flags]) == 2
        assert expected in capfd.readouterr().err.splitlines()[-1]
        assert not (tmp_path / "out").exists()


def test_an_encoder_of_something_else_is_refused(labelled: Path) -> None:
    model = JepaForRepresentationPrediction(JepaConfig(image_config()))
    with pytest.raises(UsageError, match="lacks its image processor"):
        OnlineProbe.from_source(str(labelled)).validate(model)


def test_an_error_of_the_probe_leaves_the_mode_of_the_model(labelled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout would stay off for the rest of a training that survives the error."""
    probe, model = OnlineProbe.from_source(str(labelled), tiny_tokenizer("bert")), tiny_jepa().train()

    def fail(*args: Any, **kwargs: Any) -> None:
        assert not model.context_encoder.training  # embedding has begun
        raise UsageError("a sample cannot be read")

    monkeypatch.setattr(model.context_encoder, "forward", fail)
    for call in (probe, probe.validate):
        with pytest.raises(UsageError, match="cannot be read"):
            call(model)
        assert model.training
        assert model.context_encoder.training
