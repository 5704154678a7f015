"""The outputs of an encoder exported to ONNX are those of the encoder, for other batches and lengths."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from helpers.batches import tiny_jepa
from helpers.tiny_models import CORPUS, FAMILIES, tiny_tokenizer
from jepa_hf import JepaConfig, JepaForRepresentationPrediction, UsageError
from jepa_hf.cli.main import main
from jepa_hf.hub import onnx_export

Inputs = dict[str, np.ndarray]


def text(family: str) -> tuple[JepaForRepresentationPrediction, Any, list[Inputs]]:
    tokenizer = tiny_tokenizer(family)
    batches = [dict(tokenizer(CORPUS[:count], padding=True, return_tensors="np")) for count in (1, 5)]
    return tiny_jepa(family), tokenizer, batches


def images(family: str) -> tuple[JepaForRepresentationPrediction, Any, list[Inputs]]:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 8, "patch_size": 2}
    config = JepaConfig.for_images(AutoConfig.for_model(family, **sizes), pred_hidden_size=16)
    batches = [{"pixel_values": np.random.randn(count, 3, 8, 8).astype(np.float32)} for count in (1, 3)]
    return JepaForRepresentationPrediction(config).eval(), None, batches


def features(mode: str) -> tuple[JepaForRepresentationPrediction, Any, list[Inputs]]:
    config = JepaConfig.for_features(6, mode=mode, embed_dim=16, predictor_embed_dim=8, num_heads=2)
    batches: list[Inputs] = []
    for count, length in ((1, 5), (3, 9)):
        shape = (count, length, 6) if mode == "time" else (count, 6)
        batches.append({"features": np.random.randn(*shape).astype(np.float32)})
        if mode == "time":
            batches[-1]["attention_mask"] = np.ones((count, length), dtype=np.int64)
            batches[-1]["attention_mask"][0, -2:] = 0
    return JepaForRepresentationPrediction(config).eval(), None, batches


CASES = [
    *((text, family) for family in FAMILIES),
    *((images, family) for family in ("vit", "ijepa", "dinov2")),
    *((features, mode) for mode in ("time", "patches", "flat")),
]


@pytest.mark.slow
@pytest.mark.parametrize(("build", "name"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_outputs_are_equal(build: Any, name: str, tmp_path: Path) -> None:
    """The session's outputs are the encoder's, where the attention mask is 1."""
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    onnxruntime = pytest.importorskip("onnxruntime")
    model, tokenizer, batches = build(name)
    onnx_export.export_onnx(model, tmp_path, tokenizer)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    names = [output.name for output in session.get_outputs()]
    for batch in batches:
        with torch.no_grad():
            expected = model.get_encoder()(**{key: torch.from_numpy(value) for key, value in batch.items()})
        for key, value in zip(names, session.run(None, batch), strict=True):
            reference = expected[key].numpy()
            if key == "last_hidden_state" and "attention_mask" in batch:
                value, reference = (states[batch["attention_mask"] > 0] for states in (value, reference))
            np.testing.assert_allclose(value, reference, atol=1e-4)
    assert AutoConfig.from_pretrained(tmp_path).model_type == model.config.encoder_config.model_type
    if tokenizer is not None:
        assert set(AutoTokenizer.from_pretrained(tmp_path).model_input_names) >= {i.name for i in session.get_inputs()}


def test_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without onnx the command ends with the line that installs it, and writes nothing."""
    model = tiny_jepa("bert")
    model.save_pretrained(tmp_path / "jepa")
    monkeypatch.setattr(onnx_export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install"):
        onnx_export.export_onnx(model, tmp_path / "out")
    assert main(["export", str(tmp_path / "jepa"), str(tmp_path / "out"), "--onnx"]) == 2
    assert "pip install 'jepa_hf[onnx]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
