"""Claims about `jepa-hf export`: from whatever holds a full model to what others load; refusals write nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, BertModel

from helpers.cli import snapshot, start_process, train, weights
from helpers.tiny_models import CORPUS, save_tiny_encoder, tiny_config, write_lines
from jepa_hf import JepaForRepresentationPrediction, UsageError
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


@pytest.mark.parametrize("error", [KeyboardInterrupt, UsageError])
def test_an_interrupted_export_leaves_nothing(
    error: type[BaseException], out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its half was refused as a directory that is not empty, or taken for a whole."""

    def interrupted(model: Any, folder: Path, *others: Any) -> None:
        (folder / "config.json").write_text("{}")
        raise error

    target = tmp_path / "exported"
    with monkeypatch.context() as patch:
        patch.setattr("jepa_hf.cli.export.export_encoder", interrupted)
        if error is UsageError:
            assert main(["export", str(out), str(target)]) == 2
        else:
            with pytest.raises(KeyboardInterrupt):
                main(["export", str(out), str(target)])
    assert not target.exists()
    assert main(["export", str(out), str(target)]) == 0


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


def test_the_default_is_the_encoder_that_a_run_leaves_too(out: Path, headless: Path, tmp_path: Path) -> None:
    """The target encoder of a pretrained start, the context encoder of a random one."""
    for run, which in ((out, "target"), (headless, "context")):
        folder = tmp_path / which
        assert main(["export", str(run), str(folder)]) == 0
        assert same(weights(folder), weights(run))
        assert same(encoder_weights(folder), part(weights(run / "jepa"), f"{which}_encoder."))


@pytest.mark.parametrize("encoder", [None, "target"])
def test_an_average_lies_between_the_start_and_the_trained_weights(
    encoder: str | None, out: Path, tmp_path: Path
) -> None:
    """A share of 0.25 of the start, of the context encoder unless --encoder names the other; 0 changes nothing."""
    start, full = out.parent / "bert", weights(out / "jepa")
    which = [] if encoder is None else ["--encoder", encoder]
    for share in ("0.25", "0"):
        assert main(["export", str(out), str(tmp_path / share), "--average", share, "--start", str(start), *which]) == 0
    first = {name.removeprefix("bert."): value for name, value in weights(start).items()}
    trained = part(full, f"{encoder or 'context'}_encoder.")
    assert same(encoder_weights(tmp_path / "0"), trained)
    averaged = encoder_weights(tmp_path / "0.25")
    assert averaged.keys() == trained.keys()
    for name, value in averaged.items():
        torch.testing.assert_close(value, 0.25 * first[name] + 0.75 * trained[name])


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--average", "1.5", "--start", "{start}"], "average must be between 0 (the trained weights) and 1"),
        (["--average", "0.5"], "Name it with --start"),
        (["--start", "{start}"], "start is read with --average only"),
        (["--average", "0.5", "--start", "nowhere"], "start 'nowhere'"),
        (["--average", "0.5", "--start", "{wide}"], "is not the encoder that the run started from"),
        (["--average", "0.5", "--start", "{start}", "--custom_code"], "not for --custom_code"),
    ],
)
def test_an_average_that_cannot_be_is_refused(
    flags: list[str], expected: str, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start, wide = out.parent / "bert", tmp_path / "wide"
    BertModel(tiny_config("bert", intermediate_size=48)).save_pretrained(wide)
    target = tmp_path / "exported"
    flags = [flag.format(start=start, wide=wide) for flag in flags]
    assert main(["export", str(out), str(target), *flags]) == 2
    assert expected in " ".join(capsys.readouterr().err.split())
    assert not target.exists()


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
    result = start_process("-c", script, cwd=tmp_path, fresh=True, HF_MODULES_CACHE=str(tmp_path / "modules"))
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
