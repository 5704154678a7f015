"""Tests of the report: a complete, self-contained page without scripts for every kind of run."""

import base64
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors

from helpers.report import MALICIOUS_TEXT, Page, collapse, feature_run, image_run, text_run
from jepa_hf import UsageError
from jepa_hf.cli.main import main
from jepa_hf.monitoring.assessment import Severity
from jepa_hf.report.figures import scatter_svg
from jepa_hf.report.run_report import nearest_neighbours, principal_components, relative_singular_values, write_report

torch.set_num_threads(1)

SECTIONS = ("Loss and health", "What was masked", "Probes", "Representations", "Nearest neighbours", "Settings")
RUNS: dict[str, Callable[[Path], Path]] = {"text": text_run, "images": image_run, "features": feature_run}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Finished runs by modality, in a folder whose name is a script."""
    folder = tmp_path_factory.mktemp("runs") / MALICIOUS_TEXT.replace("/", "_")
    folder.mkdir()
    return {modality: run(folder) for modality, run in RUNS.items()}


@pytest.fixture(scope="module")
def pages(finished: dict[str, Path]) -> dict[str, Page]:
    """Their pages, written into the runs."""
    for folder in finished.values():
        write_report(folder, folder.with_suffix(".html"), max_samples=20)
    return {modality: Page(folder.with_suffix(".html")) for modality, folder in finished.items()}


@pytest.fixture
def run(finished: dict[str, Path], tmp_path: Path, no_curves: None) -> Path:
    """A copy of the run on texts, to change, whose page has no curves."""
    return Path(shutil.copytree(finished["text"], tmp_path / "run"))


def report(run: Path, **options: Any) -> Page:
    write_report(run, **options)
    return Page(run / "report.html")


def rewrite(path: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content)))


@pytest.mark.parametrize("modality", RUNS)
def test_every_modality_has_a_complete_page(modality: str, pages: dict[str, Page]) -> None:
    page = pages[modality]
    assert [section for section in (*SECTIONS, "Versions") if section not in page.text] == []
    described = [description for _, description in page.images]
    assert {"Prediction loss", "Effective rank", "what was masked", "map of the samples"} < set(described)
    assert "20 samples of the run's data" in page.text
    assert "The run finished after 4 steps." in page.text
    assert re.search(r"\d+ % of the samples have the label of their nearest neighbour", page.text)
    if modality == "images":
        assert sum("row" in description for description in described) > 6
    if modality == "features":
        assert "validation row 1" in page.text


@pytest.mark.parametrize("modality", RUNS)
def test_a_page_needs_nothing_and_runs_nothing(modality: str, pages: dict[str, Page]) -> None:
    """Also if data, a column's name, a label or the path contain a script."""
    page = pages[modality]
    assert [address for address in page.references if not address.startswith("data:image/")] == []
    source = page.source
    assert not re.search(r"url\(|@import|https?://", source)
    assert "default-src 'none'" in source
    assert {"script", "iframe", "object", "embed", "link"}.isdisjoint(page.tags)
    assert "<script" not in source.lower()
    assert "<script>" in page.text  # as words
    assert len(source) < 3_000_000


@pytest.mark.parametrize("modality", RUNS)
def test_every_picture_is_one(modality: str, pages: dict[str, Page]) -> None:
    for address, description in pages[modality].images:
        kind, _, data = address.partition(";base64,")
        content = base64.b64decode(data, validate=True)
        if kind == "data:image/svg+xml":
            svg = ElementTree.fromstring(content)
            assert len(list(svg.iter("{http://www.w3.org/2000/svg}path"))) > 5, description
            assert b"#010203" not in content
            assert b"prefers-color-scheme: dark" in content
        else:
            assert content.startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_long_run_gives_no_heavier_page(finished: dict[str, Path], tmp_path: Path) -> None:
    """A curve is drawn with a thousand points at most, and reaches its last one."""

    def lengthened(metrics: dict[str, Any]) -> dict[str, Any]:
        noise = np.random.default_rng(0).random(30_000).tolist()
        names = ("prediction_loss", "health_target_rank", "health_context_rank", "grad_norm", "learning_rate")
        history = [{"step": step} | dict.fromkeys(names, value) for step, value in enumerate(noise)]
        return metrics | {"history": [*metrics["history"], *history]}

    run = Path(shutil.copytree(finished["text"], tmp_path / "run"))
    rewrite(run / "metrics.json", lengthened)
    source = report(run, max_samples=10).source
    assert 100_000 < len(source) < 3_000_000


@pytest.mark.slow
def test_equal_runs_give_equal_pages(finished: dict[str, Path], tmp_path: Path) -> None:
    for name in ("one.html", "two.html"):
        write_report(finished["text"], tmp_path / name, max_samples=10)
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


def test_the_verdict_and_its_reasons_come_first(run: Path) -> None:
    collapse(run)
    verdict = write_report(run, max_samples=10)
    assert verdict.severity == Severity.COLLAPSED
    text = Page(run / "report.html").text
    top = text[: text.index("Loss and health")]
    assert "Step 4: total collapse" in top
    assert "1.2 of 16 directions: the representation has collapsed." in top


def test_a_run_that_its_watchdog_stopped_is_not_called_unfinished(run: Path) -> None:
    record = json.loads((run / "_run.json").read_text())
    (run / "_run.json").write_text(json.dumps(record | {"finished": False, "stopped_early": True}))
    write_report(run, max_samples=10)
    assert "The watchdog stopped the run (--stop_on_collapse) after" in Page(run / "report.html").text


def test_a_collapse_is_detected_from_the_samples(run: Path) -> None:
    """A context encoder that gives every sample the same vector, whatever the log says."""
    from jepa_hf import JepaForRepresentationPrediction

    model = JepaForRepresentationPrediction.from_pretrained(run / "jepa")
    with torch.no_grad():
        model.context_encoder.encoder.layer[-1].output.LayerNorm.weight.zero_()
        model.context_encoder.encoder.layer[-1].output.LayerNorm.bias.fill_(0.5)
    model.save_pretrained(run / "jepa")
    assert write_report(run, max_samples=10).severity == Severity.COLLAPSED
    assert "they are nearly the same, the representation has collapsed." in Page(run / "report.html").text


# ---- runs of which something is missing


def test_a_run_without_its_data_has_a_page_without_samples(run: Path) -> None:
    rewrite(run / "_run.json", lambda noted: noted | {"settings": noted["settings"] | {"train_file": "gone.csv"}})
    page = report(run)
    assert "train_file 'gone.csv' does not exist" in page.text
    assert "Nearest neighbours" not in page.text
    assert "Prediction loss" in page.text


def test_an_unfinished_run_is_reported_from_its_last_checkpoint(run: Path) -> None:
    rewrite(run / "_run.json", lambda noted: noted | {"finished": False})
    (run / "metrics.json").unlink()
    shutil.rmtree(run / "jepa")
    shutil.rmtree(run / "checkpoint-4")
    page = report(run, max_samples=10)
    assert "The run is not finished; this page shows checkpoint-2, after 2 steps." in page.text
    assert "Nearest neighbours" in page.text


def test_a_run_before_its_first_checkpoint_gets_a_page(run: Path) -> None:
    rewrite(run / "_run.json", lambda noted: noted | {"finished": False})
    for name in ("jepa", "checkpoint-2", "checkpoint-4"):
        shutil.rmtree(run / name)
    (run / "metrics.json").unlink()
    (run / "masks.png").unlink()
    page = report(run)
    assert "has started, but has saved no checkpoint yet" in page.text
    assert page.images == []
    assert "jepa-hf masks" in page.text


def test_settings_are_shown_as_in_a_recipe(run: Path) -> None:
    """Without None, True, brackets or braces of Python."""
    changed = {"optim_args": {}, "lr_scheduler_kwargs": {"a": None}}
    rewrite(run / "_run.json", lambda record: record | {"settings": record["settings"] | changed})
    content = (write_report(run), (run / "report.html").read_text())[1]
    settings = dict(re.findall(r"<tr><td>(\w+)</td><td>([^<]*)</td></tr>", content.partition("All settings")[2]))
    shown = {name: settings[name] for name in ("config_name", "do_train", "use_peft", "optim_args")}
    assert shown == {"config_name": "not set", "do_train": "true", "use_peft": "false", "optim_args": "not set"}
    assert settings["lr_scheduler_kwargs"] == "a: not set"
    assert not [value for value in settings.values() if re.search(r"\bNone\b|\bTrue\b|\bFalse\b|[{}\[\]]", value)]


def test_a_run_without_record_has_no_settings(run: Path) -> None:
    (run / "_run.json").unlink()
    page = report(run)
    assert "Unknown: the run directory has no _run.json." in page.text
    assert "Prediction loss" in page.text


def test_an_unreadable_model_is_reported(run: Path) -> None:
    (run / "jepa" / "model.safetensors").write_bytes(b"nothing")
    assert "cannot be loaded" in report(run).text


# ---- probes

EVALUATION = {
    "scores": [
        {"model": "out", "pooling": "mean", "task": MALICIOUS_TEXT, "metric": "linear_probe", "n": 1234}
        | {"value": 0.756, "confidence_interval": [0.7, 0.8123]},
        {"model": "other", "pooling": "mean", "task": MALICIOUS_TEXT, "metric": "linear_probe", "n": 1234}
        | {"value": 0.8, "confidence_interval": [0.75, 0.85]}
        | {"difference_to_first_model": {"value": 0.044, "confidence_interval": [-0.01, 0.09]}},
    ]
}


def test_probes_are_a_table_with_intervals(run: Path, tmp_path: Path) -> None:
    (run / "evaluation").mkdir()
    (run / "evaluation" / "evaluation.json").write_text(json.dumps(EVALUATION))
    text = report(run, max_samples=10).text
    assert "75.670.0 to 81.21,234" in text
    assert "80.075.0 to 85.0+4.4 (-1.0 to +9.0)1,234" in text
    assert MALICIOUS_TEXT in text
    elsewhere = tmp_path / "elsewhere.json"
    elsewhere.write_text(json.dumps({"scores": [EVALUATION["scores"][0] | {"value": 0.1234}]}))
    assert "12.370.0" in report(run, max_samples=10, evaluation=elsewhere).text


def test_what_evaluate_writes_is_understood(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = json.loads((run / "_run.json").read_text())["settings"]["train_file"]
    flags = ("--tasks", data, "--text_column_name", "text", "--output_dir", str(run / "evaluation"))
    assert main(["evaluate", str(run), *flags]) == 0, capfd.readouterr().err
    scores = json.loads((run / "evaluation" / "evaluation.json").read_text())["scores"]
    text = report(run, max_samples=10).text
    for score in scores:
        low, high = score["confidence_interval"]
        assert f"{100 * score['value']:.1f}{100 * low:.1f} to {100 * high:.1f}" in text


def test_without_probes_the_page_says_how_to_make_them(run: Path) -> None:
    assert "jepa-hf evaluate " in report(run, max_samples=10).text


# ---- refusals


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"history": 3}', '{"history": [3]}', '{"history": [{"step": "a"}]}']
)
def test_damaged_metrics_are_refused(content: str, run: Path, tmp_path: Path) -> None:
    (run / "metrics.json").write_text(content)
    with pytest.raises(UsageError, match=r"metrics.json is damaged"):
        write_report(run, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("content", ["{", "[]", '{"settings": 3, "finished": true}'])
def test_damaged_notes_are_refused(content: str, run: Path) -> None:
    (run / "_run.json").write_text(content)
    with pytest.raises(UsageError, match=r"_run.json is damaged"):
        write_report(run)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"scores": [{"task": "a"}]}', '{"scores": 3}'])
def test_damaged_evaluations_are_refused(content: str, run: Path, tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(UsageError, match=r"evaluation.json is"):
        write_report(run, evaluation=tmp_path / "evaluation.json")


# ---- numbers of the page


def test_singular_values_are_shares_of_the_length() -> None:
    """The sum of squares is the variance over the mean squared length."""
    vectors = np.random.default_rng(0).normal(1.0, 2.0, (50, 8)).astype(np.float32)
    values = relative_singular_values(vectors)
    assert (np.diff(values) <= 0).all()
    mean = np.square(vectors.mean(axis=0)).sum() / np.square(vectors).sum(axis=1).mean()
    assert np.square(values).sum() == pytest.approx(1 - mean, abs=1e-5)
    assert relative_singular_values(np.ones((5, 3), dtype=np.float32)).max() < 1e-6


@pytest.mark.parametrize(("count", "width"), [(40, 6), (3, 6), (2, 6), (5, 1)])
def test_the_map_is_that_of_principal_components(count: int, width: int) -> None:
    vectors = np.random.default_rng(0).normal(size=(count, width))
    points, share = principal_components(vectors)
    kept = min(2, count - 1, width)
    pca = PCA(kept).fit(vectors)
    expected = pca.transform(vectors)
    signs = np.sign((points[:, :kept] * expected).sum(axis=0))
    np.testing.assert_allclose(points[:, :kept] * signs, expected, atol=1e-9)
    assert share == pytest.approx(pca.explained_variance_ratio_.sum())


def test_neighbours_are_those_of_scikit_learn_without_the_sample_itself() -> None:
    vectors = np.random.default_rng(0).normal(size=(30, 5))
    queries = np.array([0, 7, 29])
    nearest, cosines = nearest_neighbours(vectors, queries, 3)
    distances, expected = NearestNeighbors(n_neighbors=4, metric="cosine").fit(vectors).kneighbors(vectors[queries])
    assert (nearest == expected[:, 1:]).all()
    np.testing.assert_allclose(cosines, 1 - distances[:, 1:])
    few, _ = nearest_neighbours(vectors[:2], np.array([0]), 3)
    assert few.tolist() == [[1]]


def test_labels_that_matplotlib_or_svg_would_misread() -> None:
    labels = ["_hidden", "$x^2", "a\x07\nb", "&<", "x" * 50, "é"] * 2
    svg = scatter_svg(np.random.default_rng(0).normal(size=(12, 2)), labels)
    texts = "".join(ElementTree.fromstring(svg).itertext())
    for shown in ("_hidden", "$x^2", "&<", "é", "xxxx…"):
        assert shown in texts
