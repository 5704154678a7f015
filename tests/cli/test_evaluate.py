"""Claims about `jepa-hf evaluate`: from folders and files to numbers, tables, pictures and cards, or one sentence."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from helpers.cli import snapshot, start_process
from helpers.tiny_models import CORPUS, save_tiny_encoder
from jepa_hf import FeatureEncoderConfig, FeatureEncoderModel
from jepa_hf.cli.main import main
from jepa_hf.training.run_directory import RunPlan, start_run

FILES = {"evaluation.json", "evaluation.md", "scores.png", "spectrum.png"}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiny models, the second with a card, and tasks of each kind."""
    folder = tmp_path_factory.mktemp("work")
    save_tiny_encoder("bert", folder / "models" / "one", std=0.3)
    save_tiny_encoder("roberta", folder / "models" / "two", std=0.3)
    (folder / "models" / "two" / "README.md").write_text("---\nlicense: mit\n---\n\n# Two\n\nIts text.\n")
    topics = folder / "topics"
    topics.mkdir()
    for name, texts in (("train", CORPUS[:60]), ("test", CORPUS[60:100])):
        lines = [json.dumps({"text": text, "label": ["short", "long"][len(text.split()) > 20]}) for text in texts]
        (topics / f"{name}.jsonl").write_text("\n".join(lines))
    pairs = [{"sentence1": CORPUS[row], "sentence2": CORPUS[row + 100], "score": row % 5} for row in range(40)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    questions = [{"question": text, "answer": text.split(",")[0]} for text in CORPUS[:40]]
    (folder / "answers.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (folder / "plain.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in CORPUS[:5]))
    (folder / "one_class.csv").write_text("text,label\n" + "a,1\n" * 5)
    (folder / "empty.csv").touch()
    vectors = [{"x": row % 7, "y": row % 5, "label": row % 2} for row in range(40)]
    (folder / "vectors.jsonl").write_text("\n".join(map(json.dumps, vectors)))
    (folder / "models" / "no_model").mkdir()
    start_run(folder / "evaluated", {"do_train": False, "model_name_or_path": "models/one"}, RunPlan())
    start_run(folder / "started", {"do_train": True}, RunPlan())
    return folder


@pytest.mark.usefixtures("rendered_pictures")
def test_two_models_and_three_tasks_from_end_to_end(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(work)
    out = tmp_path / "a" / "evaluation"
    models = ["models/one", "models/two"]
    before = {model: snapshot(work / model) for model in models}
    arguments = ["evaluate", *models, "--tasks", "topics", "pairs.jsonl", "answers.jsonl", "--output_dir", str(out)]
    assert main([*arguments, "--pooling", "mean", "cls", "layers"]) == 0
    output = capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == FILES | {"map.png"}
    assert {model: snapshot(work / model) for model in models} == before

    actual = json.loads((out / "evaluation.json").read_text())
    assert actual["models"] == models
    assert [(task["name"], task["kind"], task["n_test"]) for task in actual["tasks"]] == [
        ("topics", "labels", 40),
        ("pairs", "similarity", 40),
        ("answers", "retrieval", 40),
    ]
    assert len(actual["scores"]) == 2 * 3 * (2 + 1 + 5)
    assert actual["settings"]["seed"] == 42
    assert set(actual["settings"]["versions"]) >= {"jepa_hf", "torch", "transformers", "scikit-learn"}
    length = next(s for s in actual["scores"] if (s["metric"], s["pooling"]) == ("linear_probe", "mean"))
    assert length["value"] > 0.7  # it says of a text how long it is

    page = (out / "evaluation.md").read_text()
    assert "| one | mean |" in output
    assert output.split("\nwritten to")[0].strip() in page
    for name in ("scores.png", "spectrum.png", "map.png"):
        assert f"({name})" in page
        with Image.open(out / name) as picture:
            assert np.ptp(np.asarray(picture)) > 0

    numbers = {path.name: path.read_bytes() for path in out.iterdir()}
    again = ["evaluate", "models/one", "--tasks", "pairs.jsonl", "--output_dir", str(out)]
    assert main(again) == 2
    assert "holds the results of an earlier command (evaluation.json)" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == numbers
    assert main([*arguments, "--pooling", "mean", "cls", "layers", "--overwrite_output_dir"]) == 0
    assert (out / "evaluation.md").read_bytes() == numbers["evaluation.md"]
    assert main([*again, "--overwrite_output_dir"]) == 0
    assert {path.name for path in out.iterdir()} == FILES


def test_columns_of_features_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train and test in different orders, with row numbers and another column: the scores of tables in order."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = FeatureEncoderConfig(
        3, patch_size=1, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, feature_column_names=list("abc")
    )
    FeatureEncoderModel(config).save_pretrained("encoder")
    values = np.random.default_rng(0).normal(size=(120, 3)) * [1, 10, 100]
    frame = pd.DataFrame(values, columns=list("abc")).assign(label=(values[:, 0] > 0).astype(int))
    for name, columns in (("in_order", "abc"), ("mixed", "cab")):
        Path(name).mkdir()
        frame[:80].to_csv(f"{name}/train.csv", index=name == "mixed")
        frame[80:].assign(d=1.0)[[*columns, "label", "d"]].to_csv(f"{name}/test.csv", index=False)
        assert main(["evaluate", "encoder", "--tasks", name, "--output_dir", f"{name}_out"]) == 0
    scores = [json.loads(Path(f"{name}_out/evaluation.json").read_text())["scores"] for name in ("in_order", "mixed")]
    assert [score["value"] for score in scores[0]] == [score["value"] for score in scores[1]]


def test_a_card_is_updated_and_nothing_else(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(work)
    before = snapshot(work / "models")
    arguments = ["evaluate", "models/one", "models/two", "--tasks", "pairs.jsonl", "--overwrite_output_dir"]
    for _ in range(2):
        assert main([*arguments, "--output_dir", str(tmp_path), "--update_card", "models/two"]) == 0
        assert "updated models/two/README.md\n" in capsys.readouterr().out
        after = snapshot(work / "models")
        assert before.keys() == after.keys()
        assert {name for name in after if after[name][1] != before[name][1]} == {"two/README.md"}
        card = ModelCard.load(work / "models" / "two" / "README.md")
        assert card.data.license == "mit"
        assert card.text.startswith("\n# Two\n\nIts text.\n")
        assert card.text.count("## Evaluation of the frozen representations") == 1
        (result,) = card.data.eval_results
        scores = json.loads((tmp_path / "evaluation.json").read_text())["scores"]
        expected = next(score["value"] for score in scores if score["model"] == "models/two")
        assert result.metric_value == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("models/one", "the following arguments are required: --tasks"),
        ("--tasks topics", "the following arguments are required: MODEL"),
        ("models/one --tasks topics --poling mean", "unrecognized arguments: --poling mean"),
        ("models/one --tasks topics --pooling max", "--pooling: invalid choice: 'max'"),
        ("models/one --tasks topics --pooling mean mean", "pooling contains a name twice: mean mean"),
        ("models/one --tasks topics --seed -1", "--seed: must be at least 0, not -1"),
        ("models/one --tasks topics --batch_size 0", "--batch_size: must be at least 1, not 0"),
        ("models/one --tasks topics --max_seq_length 999", "Expected max_seq_length from 1 to 128"),
        ("models/one --tasks nothing.csv", "--tasks: 'nothing.csv' does not exist. Check the path."),
        ("models/one --tasks plain.jsonl", "'plain.jsonl' has neither a column of labels nor pairs of texts"),
        ("models/one --tasks one_class.csv", "Task 'one_class.csv' has a single class in its training rows, '1'"),
        ("models/one --tasks empty.csv", "'empty.csv' is empty. Give a file with rows."),
        ("models/one --tasks vectors.jsonl", "'models/one' reads text, but task 'vectors.jsonl' has features"),
        ("models/one --tasks topics --label_column_name topic", "has no column 'topic'. Its columns are: text, label"),
        ("models/one models/one --tasks topics", "'models/one' is named twice; name each model once"),
        ("models/no_model --tasks topics", "'models/no_model' cannot be loaded: the directory has no config.json"),
        ("models --tasks topics", "no config.json; name one that holds a model, such as models/one"),
        ("plain.jsonl --tasks topics", "'plain.jsonl' is a file; name the directory of a model"),
        (
            "evaluated --tasks topics",
            "'evaluated' holds the evaluation of a model, and no model; name the model, models/one",
        ),
        ("started --tasks topics", "'started' holds an unfinished run; repeat its command to finish it"),
        ("nobody/nothing --tasks topics", "'nobody/nothing' is neither a local directory nor"),
        (
            "models/one --tasks topics --output_dir plain.jsonl",
            "output_dir 'plain.jsonl' is a file, or lies under one",
        ),
        ("models/one --tasks topics --update_card", "Card 'models/one/README.md' does not exist. Leave this model out"),
        ("models/one models/two --tasks topics --update_card", "name the models whose cards are to be updated"),
        ("models/one --tasks topics --update_card models/two", "'models/two' is not among the models: models/one"),
    ],
)
def test_refusals_are_one_sentence_and_write_nothing(
    arguments: str, sentence: str, work: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(work)
    before = snapshot(work)
    capfd.readouterr()
    assert main(["evaluate", *arguments.split()]) == 2
    output, err = capfd.readouterr()
    assert output == ""
    assert err.startswith("jepa-hf evaluate: error: ")
    assert err.count("\n") == 1
    assert sentence in err
    assert snapshot(work) == before


def test_a_damaged_card_is_refused_before_the_work(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    save_tiny_encoder("bert", tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("---\na: [\n---\n")
    monkeypatch.chdir(tmp_path)
    capfd.readouterr()
    assert main(["evaluate", "model", "--tasks", str(work / "topics"), "--update_card"]) == 2
    assert "Card 'model/README.md' has damaged metadata" in capfd.readouterr().err
    assert not (tmp_path / "evaluation").exists()


@pytest.mark.slow
def test_a_missing_library_is_named_with_what_installs_it_and_help_needs_none(work: Path) -> None:
    script = """
import sys
from contextlib import suppress
sys.modules["sklearn"] = sys.modules["sentence_transformers"] = None  # importing them is an error
from jepa_hf import FeatureEncoderConfig, FeatureEncoderModel
from jepa_hf.cli.main import main
from jepa_hf.training.run_directory import RunPlan, start_run
with suppress(SystemExit):
    main(["evaluate", "--help"])
for name in ("sentence_transformers", "sklearn"):
    assert main(["evaluate", "models/one", "--tasks", "topics"]) == 2
    del sys.modules[name]
"""
    result = start_process("-c", script, cwd=work)
    assert result.returncode == 0, result.stderr
    assert "--pooling" in result.stdout
    lines = result.stderr.splitlines()
    assert len(lines) == 2
    for line, name in zip(lines, ("sentence_transformers", "sklearn"), strict=True):
        assert line.startswith(f"jepa-hf evaluate: error: evaluate needs the package {name}")
        assert "pip install 'jepa_hf[evaluate]'" in line
