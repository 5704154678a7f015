"""Claims about `jepa-hf export`: from whatever holds a full model to what others load; refusals write nothing."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

from helpers.cli import snapshot, start_process, train, weights
from helpers.tiny_models import CORPUS, save_tiny_encoder, write_lines
from jepa_hf import JepaForRepresentationPrediction
from jepa_hf.cli.main import main


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a masked-language-model head, and a checkpoint of an earlier step."""
    folder = tmp_path_factory.mktemp("run")
    start = save_tiny_encoder("bert", folder / "bert", head="mlm")
    data = write_lines(folder / "data.txt", CORPUS)
    flags = "--max_steps 4 --save_steps 2 --learning_rate 1e-2 --mlm_weight 0.5 --ema_decay 0.5"
    train("--model_name_or_path", start, "--train_file", data, "--output_dir", folder / "out", *flags.split())
    return folder / "out"


@pytest.fixture(scope="module")
def headless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without that head."""
    folder = tmp_path_factory.mktemp("headless")
    train("--smoke_test", "--max_steps", "1", "--output_dir", folder)
    return folder


def encoder_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The exported weights without the pooler, which this run does not have."""
    return {name: value for name, value in weights(folder).items() if not name.startswith("pooler.")}


def part(model: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in model.items() if name.startswith(prefix)}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(value.equal(other[name]) for name, value in one.items())


@pytest.mark.parametrize("encoder", ["context", "target"])
@pytest.mark.parametrize("source", ["", "jepa", "checkpoint-2", "checkpoint-4"])
def test_every_source_gives_its_own_encoder(
    source: str, encoder: str, out: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "a" / "exported"
    before = snapshot(out)
    capfd.readouterr()
    assert main(["export", str(out / source), str(target), "--encoder", encoder]) == 0
    output, err = capfd.readouterr()
    assert output == f"written to {target}\n"
    assert err == ""
    assert snapshot(out) == before
    full = weights(out / (source or "jepa"))
    assert same(encoder_weights(target), part(full, f"{encoder}_encoder."))
    other = {"context": "target", "target": "context"}[encoder]
    assert not same(encoder_weights(target), part(full, f"{other}_encoder."))
    assert AutoModel.from_pretrained(target).config.model_type == "bert"
    assert AutoTokenizer.from_pretrained(target).get_vocab() == AutoTokenizer.from_pretrained(out).get_vocab()
    assert (target / "modules.json").is_file()


def test_the_default_is_the_context_encoder_which_a_run_leaves_too(out: Path, tmp_path: Path) -> None:
    assert main(["export", str(out), str(tmp_path)]) == 0
    assert same(weights(tmp_path), weights(out))


def test_with_the_head_it_is_a_masked_language_model(out: Path, tmp_path: Path) -> None:
    assert main(["export", str(out), str(tmp_path), "--head", "mlm"]) == 0
    masked_lm, info = AutoModelForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    jepa = JepaForRepresentationPrediction.from_pretrained(out / "jepa").eval()
    tokens = AutoTokenizer.from_pretrained(tmp_path)(CORPUS[3], return_tensors="pt")
    with torch.no_grad():
        encoded = jepa.get_encoder()(**tokens).last_hidden_state
        expected = jepa.mlm_head(encoded, jepa.get_input_embeddings().weight)
        torch.testing.assert_close(masked_lm.eval()(**tokens).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_with_its_code_the_full_model_loads_where_jepa_hf_is_not(out: Path, tmp_path: Path) -> None:
    target = tmp_path / "exported"
    assert main(["export", str(out / "checkpoint-2"), str(target), "--custom_code"]) == 0
    script = f"""
import sys
sys.modules["jepa_hf"] = None  # importing it is an error
from transformers import AutoModel
model = AutoModel.from_pretrained({str(target)!r}, trust_remote_code=True)
print(type(model).__name__, sum(p.double().sum().item() for p in model.parameters()))
"""
    result = start_process("-c", script, cwd=tmp_path, HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert result.returncode == 0, result.stderr
    name, total = result.stdout.split()[-2:]
    model = JepaForRepresentationPrediction.from_pretrained(out / "checkpoint-2")
    assert name == "JepaForRepresentationPrediction"
    assert float(total) == sum(p.double().sum().item() for p in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nothing", "new"], "SOURCE: 'nothing' is not a directory. Name the output_dir of a run"),
        (["../bert", "new"], "contains no full JEPA model"),
        (["../data.txt", "new"], "is not a directory"),
        (["jepa", "checkpoint-2"], "output_dir 'checkpoint-2' is not empty; name a new directory"),
        (["jepa", "README.md"], "output_dir 'README.md' is a file, or lies under one. Name a directory"),
        (["jepa", "README.md/new"], "'README.md/new'"),
        (["jepa"], "the following arguments are required: OUTPUT_DIR"),
        (["jepa", "new", "--encoder", "both"], "--encoder: invalid choice: 'both'"),
        (["jepa", "new", "--head", "mlm", "--custom_code"], "not allowed with argument"),
        (["jepa", "new", "--haed", "mlm"], "unrecognized arguments: --haed mlm"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refusals_are_one_sentence_and_write_nothing(
    arguments: list[str], expected: str, out: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(out)
    before = snapshot(out)
    capfd.readouterr()
    assert main(["export", *arguments]) == 2
    output, err = capfd.readouterr()
    assert output == ""
    assert err.startswith("jepa-hf export: error: ")
    assert err.count("\n") == 1
    assert expected in err
    assert snapshot(out) == before


def test_a_model_without_the_head_has_none_to_export(
    headless: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(headless), str(tmp_path / "new"), "--head", "mlm"]) == 2
    err = capfd.readouterr().err
    assert "trained without a masked-language-model head; train it with --mlm_weight above 0." in err
    assert err.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_damaged_weights_are_one_sentence(out: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    damaged = tmp_path / "jepa"
    damaged.mkdir()
    (damaged / "config.json").write_bytes((out / "jepa" / "config.json").read_bytes())
    for content in (None, b"\xff" * 100):
        if content:
            (damaged / "model.safetensors").write_bytes(content)
        capfd.readouterr()
        assert main(["export", str(damaged), str(tmp_path / "new")]) == 2
        err = capfd.readouterr().err
        assert err.startswith(f"jepa-hf export: error: {str(damaged)!r} cannot be loaded: ")
        assert err.count("\n") == 1
    assert not (tmp_path / "new").exists()
