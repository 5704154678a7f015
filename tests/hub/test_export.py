"""Every loader of an exported model computes the same representations."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

from helpers.batches import image_batch, image_config, skip_unless_transformers_loads, text_batch, tiny_jepa
from helpers.cli import WITHOUT_JEPA_HF, start_process
from helpers.tiny_models import CORPUS, FAMILIES, save_tiny_encoder, tiny_config, tiny_tokenizer
from jepa_hf import DataCollatorForFeatureJEPA, JepaConfig, JepaForRepresentationPrediction, UsageError
from jepa_hf.hub.export import export_custom_code, export_encoder, export_masked_lm, export_run

SMALL_FEATURES = {"embed_dim": 16, "predictor_embed_dim": 8, "encoder_depth": 1, "predictor_depth": 1, "num_heads": 2}
TEXTS = [CORPUS[3], CORPUS[15], "Wild rivers."]


def differing(one: nn.Module, other: nn.Module) -> list[str]:
    """Return the names of the parameters in which two modules differ."""
    ours = dict(one.named_parameters())
    return [name for name, parameter in other.named_parameters() if not torch.equal(ours[name], parameter)]


@torch.no_grad()
def mean_pooled(model: JepaForRepresentationPrediction, family: str, which: str, text: str) -> torch.Tensor:
    """Compute the embedding of one text without padding."""
    ids = torch.tensor([tiny_tokenizer(family)(text)["input_ids"]])
    states = model.get_encoder(which)(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    return states[0].mean(dim=0)


@torch.no_grad()
def loaded_embeddings(folder: Path, loader: str) -> torch.Tensor:
    """Return the mean-pooled embeddings of `TEXTS` of a loader, without trust_remote_code."""
    if loader == "sentence_transformers":
        # Imported late: it takes seconds.
        from sentence_transformers import SentenceTransformer

        return torch.tensor(SentenceTransformer(str(folder), device="cpu").encode(TEXTS))
    if loader == "pipeline":
        extract = pipeline("feature-extraction", model=str(folder), device="cpu")
        return torch.stack([torch.tensor(extract(text)[0]).mean(dim=0) for text in TEXTS])
    tokens = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    if loader == "classifier":
        encoder = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2).base_model
    else:
        encoder = AutoModel.from_pretrained(folder)
    states, mask = encoder.eval()(**tokens).last_hidden_state, tokens["attention_mask"][..., None]
    return (states * mask).sum(dim=1) / mask.sum(dim=1)


@pytest.mark.parametrize("loader", ["AutoModel", "classifier", "pipeline", "sentence_transformers"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loaders_compute_mean_pooled_embeddings(family: str, loader: str, tmp_path: Path) -> None:
    """Each loader gives the context encoder's mean-pooled embeddings."""
    model = tiny_jepa(family)
    export_run(model, tmp_path, tiny_tokenizer(family))
    embeddings = loaded_embeddings(tmp_path, loader)
    for text, embedding in zip(TEXTS, embeddings, strict=True):
        expected = mean_pooled(model, family, "context", text)
        torch.testing.assert_close(embedding, expected, rtol=1e-4, atol=1e-4)
        assert (embedding - mean_pooled(model, family, "target", text)).abs().max() > 0.1


@pytest.mark.parametrize("which", ["context", "target", "both"])
def test_run_layout(which: str, tmp_path: Path) -> None:
    """The encoder is at the root, the full model under `jepa/`, a second encoder under `target_encoder/`."""
    model = tiny_jepa("bert")
    export_run(model, tmp_path, tiny_tokenizer("bert"), which=which)
    folders = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert folders == {"1_Pooling", "jepa"} | ({"target_encoder"} if which == "both" else set())
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "bert"
    assert json.loads((tmp_path / "jepa" / "config.json").read_text())["model_type"] == "jepa"
    root = model.target_encoder if which == "target" else model.context_encoder
    other = model.context_encoder if which == "target" else model.target_encoder
    exported = AutoModel.from_pretrained(tmp_path)
    assert differing(exported, root) == []
    assert differing(exported, other) == [name for name, _ in other.named_parameters()]
    if which == "both":
        assert differing(AutoModel.from_pretrained(tmp_path / "target_encoder"), model.target_encoder) == []
        assert (tmp_path / "target_encoder" / "modules.json").exists()
    assert differing(AutoModel.from_pretrained(tmp_path / "jepa"), model) == []
    for folder in (tmp_path, tmp_path / "jepa"):
        assert AutoTokenizer.from_pretrained(folder).get_vocab() == tiny_tokenizer("bert").get_vocab()
    # No pickle is ever written.
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".pth")]


def test_encoder_without_tokenizer(tmp_path: Path) -> None:
    """Without a tokenizer, only configuration and weights are written."""
    model = tiny_jepa("bert")
    export_encoder(model, tmp_path, which="target")
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert differing(AutoModel.from_pretrained(tmp_path), model.target_encoder) == []


def test_state_dict_is_written(tmp_path: Path) -> None:
    # As when they are sharded: the model in memory has others.
    """Given weights are written in place of the model's own."""
    full, empty = tiny_jepa("bert"), tiny_jepa("bert")
    with torch.no_grad():
        for parameter in empty.parameters():
            parameter.zero_()
    export_run(empty, tmp_path, tiny_tokenizer("bert"), "both", state_dict=full.state_dict())
    for folder, expected in (
        (tmp_path, full.context_encoder),
        (tmp_path / "target_encoder", full.target_encoder),
        (tmp_path / "jepa", full),
    ):
        assert differing(AutoModel.from_pretrained(folder), expected) == []


@pytest.mark.parametrize(("family", "expected"), [("bert", 128), ("roberta", 128), ("modernbert", 128)])
def test_maximum_sequence_length(family: str, expected: int, tmp_path: Path) -> None:
    """sentence-transformers truncates at the encoder's maximum length."""
    from sentence_transformers import SentenceTransformer

    export_run(tiny_jepa(family), tmp_path, tiny_tokenizer(family))
    model = SentenceTransformer(str(tmp_path), device="cpu")
    assert model.max_seq_length == expected
    assert model.encode([" ".join(CORPUS)]).shape == (1, 32)


HEADS = [*((family, {}) for family in FAMILIES), ("deberta-v2", {"legacy": False})]


@pytest.mark.parametrize("which", ["context", "target"])
@pytest.mark.parametrize(("family", "encoder"), HEADS, ids=str)
@torch.no_grad()
def test_exported_masked_lm_has_the_same_logits(
    family: str, encoder: dict[str, Any], which: str, tmp_path: Path
) -> None:
    """The exported model computes the logits of the head."""
    model = tiny_jepa(family, mlm_weight=0.5, encoder=encoder)
    export_masked_lm(model, tmp_path, tiny_tokenizer(family), which)
    inputs = {k: v for k, v in text_batch(family, "mask_token").items() if k in ("input_ids", "attention_mask")}
    ours = model.get_encoder(which)
    expected = model.mlm_head(ours(**inputs).last_hidden_state, ours.get_input_embeddings().weight)
    skip_unless_transformers_loads(AutoModelForMaskedLM.from_config(ours.config))
    loaded, info = AutoModelForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path).mask_token_id == tiny_tokenizer(family).mask_token_id


def test_masked_lm_export_needs_a_head(tmp_path: Path) -> None:
    """A model without a masked-language-model head is a usage error."""
    with pytest.raises(UsageError, match="--mlm_weight above 0"):
        export_masked_lm(tiny_jepa("bert"), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("head", [None, "mlm"])
@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "vit"])
def test_pooler_survives(family: str, head: Any, tmp_path: Path) -> None:
    """A pretrained pooler is exported as it was; each export loads without missing weights, always the same.

    A classifier misses its head alone. A further run does not take the export's random pooler for the start's.
    """
    config = image_config() if family == "vit" else tiny_config(family)
    start = AutoModelForMaskedLM.from_config(config) if head and family != "vit" else AutoModel.from_config(config)
    start.save_pretrained(tmp_path / "start")
    weight = {"mlm_weight": 0.5} if family != "vit" else {}
    model = JepaForRepresentationPrediction.from_encoder_pretrained(str(tmp_path / "start"), **weight)
    export_run(model, tmp_path / "out")
    jepa = JepaForRepresentationPrediction.from_pretrained(tmp_path / "out" / "jepa")
    export_encoder(jepa, tmp_path / "again", which="target")
    export_custom_code(jepa, tmp_path / "code")
    for folder in ("out", "again"):
        loaded, info = AutoModel.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        twice = AutoModel.from_pretrained(tmp_path / folder)
        assert differing(loaded, twice) == []
        poolers = {name: value for name, value in loaded.state_dict().items() if name.startswith("pooler.")}
        assert bool(poolers) == (family != "electra")
        for name, value in poolers.items():
            assert (name in start.state_dict()) == (head is None or family == "vit")
            if name in start.state_dict():
                assert torch.equal(value, start.state_dict()[name])
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".pooler." in name)
    further = JepaForRepresentationPrediction.from_encoder_pretrained(str(tmp_path / "out"))
    assert further.config.add_pooling_layer == model.config.add_pooling_layer
    classifier = AutoModelForImageClassification if family == "vit" else AutoModelForSequenceClassification
    _, info = classifier.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert all(name.startswith("classifier.") for name in info["missing_keys"])
    if weight:
        export_masked_lm(jepa, tmp_path / "mlm")
        _, info = AutoModelForMaskedLM.from_pretrained(tmp_path / "mlm", output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_sentence_transformers_settings_survive(pooling: str, tmp_path: Path) -> None:
    """A SentenceTransformer's maximum length, pooling, normalization and prompts are those of the start."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers import models as modules

    save_tiny_encoder("bert", tmp_path / "plain")
    transformer = modules.Transformer(str(tmp_path / "plain"), max_seq_length=9)
    layers = [transformer, modules.Pooling(32, pooling_mode=pooling), modules.Normalize()]
    start = SentenceTransformer(modules=layers, prompts={"query": "find: "}, device="cpu")
    start.save(str(tmp_path / "start"))
    # The maximum length is in this file in older checkpoints, and in the tokenizer in newer ones.
    settings = tmp_path / "start" / "sentence_bert_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"max_seq_length": 9}))
    model = JepaForRepresentationPrediction.from_encoder_pretrained(str(tmp_path / "start"))
    export_run(model, tmp_path / "out", tiny_tokenizer("bert"))
    jepa = JepaForRepresentationPrediction.from_pretrained(tmp_path / "out" / "jepa")
    export_encoder(jepa, tmp_path / "again", tiny_tokenizer("bert"))
    for folder in ("out", "again"):
        loaded = SentenceTransformer(str(tmp_path / folder), device="cpu")
        assert loaded.max_seq_length == 9
        assert loaded.prompts["query"] == "find: "
        np.testing.assert_allclose(loaded.encode(TEXTS), start.encode(TEXTS), atol=1e-6)


ELSEWHERE = (
    WITHOUT_JEPA_HF
    + """

from pathlib import Path
import torch
from transformers import AutoModel, AutoTokenizer

torch.set_num_threads(1)
for folder in sorted(Path(sys.argv[1]).iterdir()):
    try:
        AutoModel.from_pretrained(folder, trust_remote_code=False)
    except ValueError:
        pass
    else:
        sys.exit("loaded without its code: this proves nothing")
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    assert not any(parameter.requires_grad for parameter in model.target_encoder.parameters())
    if (folder / "tokenizer_config.json").exists():
        AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        output = model(**torch.load(folder / "batch.pt"))
    print(folder.name, output.loss.item().hex())
"""
)


@pytest.mark.slow
def test_exported_code_loads_without_jepa_hf(tmp_path: Path) -> None:
    """The full model loads with `trust_remote_code=True` without the package."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = []
    try:
        for family, mode, predictor in (
            ("bert", "mask_token", "mlp"),
            ("deberta-v2", "mask_token", "transformer"),
            ("modernbert", "drop", "transformer"),
        ):
            model = tiny_jepa(family, mode, predictor, mlm_weight=0.5, sigreg_weight=0.1)
            folder = tmp_path / "exported" / family
            export_custom_code(model, folder, tiny_tokenizer(family))
            batch = text_batch(family, mode)
            torch.save(batch, folder / "batch.pt")
            with torch.no_grad():
                expected.append(f"{family} {model(**batch).loss.item().hex()}")
        for mode in ("flat", "patches", "time"):
            model = JepaForRepresentationPrediction(JepaConfig.for_features(6, mode=mode, **SMALL_FEATURES)).eval()
            model.set_standardization(torch.ones(6), torch.full((6,), 2.0))
            collator = DataCollatorForFeatureJEPA(
                model.config.encoder_config, masked_tokens=model.config.masked_tokens, mask_ratio=0.5
            )
            batch = collator([{"features": np.ones((5, 6) if mode == "time" else 6) * n} for n in range(3)])
            export_custom_code(model, tmp_path / "exported" / f"features-{mode}")
            torch.save(batch, tmp_path / "exported" / f"features-{mode}" / "batch.pt")
            with torch.no_grad():
                expected.append(f"features-{mode} {model(**batch).loss.item().hex()}")
        model = JepaForRepresentationPrediction(JepaConfig.for_images(image_config(), pred_hidden_size=16)).eval()
        export_custom_code(model, tmp_path / "exported" / "images")
        torch.save(image_batch(), tmp_path / "exported" / "images" / "batch.pt")
        with torch.no_grad():
            expected.append(f"images {model(**image_batch()).loss.item().hex()}")
    finally:
        torch.set_num_threads(threads)
    command = ("-c", ELSEWHERE, tmp_path / "exported")
    process = start_process(*command, cwd=tmp_path, fresh=True, HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.split("\n")[:-1] == sorted(expected)


def test_code_export_does_not_change_classes(tmp_path: Path) -> None:
    """Later exports in the same process contain no code."""
    model = tiny_jepa("bert")
    export_custom_code(model, tmp_path / "code")
    written = json.loads((tmp_path / "code" / "config.json").read_text())
    assert written["auto_map"] == {
        "AutoConfig": "configuration_jepa.JepaConfig",
        "AutoModel": "modeling_jepa.JepaForRepresentationPrediction",
    }
    assert {path.stem for path in (tmp_path / "code").glob("*.py")} >= {"configuration_jepa", "modeling_jepa"}

    fresh = tiny_jepa("bert")
    # Where jepa_hf is installed, its own classes load the folder, without being asked to trust anything.
    assert type(AutoModel.from_pretrained(tmp_path / "code")) is JepaForRepresentationPrediction
    for number, later in enumerate((model, fresh)):
        later.save_pretrained(tmp_path / str(number))
        assert {path.name for path in (tmp_path / str(number)).iterdir()} == {"config.json", "model.safetensors"}
        assert "auto_map" not in json.loads((tmp_path / str(number) / "config.json").read_text())
    fresh.config.save_pretrained(tmp_path / "config")
    assert "auto_map" not in json.loads((tmp_path / "config" / "config.json").read_text())
    assert JepaConfig._auto_class is None
    assert JepaForRepresentationPrediction._auto_class is None
    # The encoder of a model once exported with its code stays plain.
    export_run(model, tmp_path / "run")
    assert "auto_map" not in json.loads((tmp_path / "run" / "config.json").read_text())


def test_files_hold_every_weight_once(tmp_path: Path) -> None:
    """Weight files have exactly the keys of their models."""
    model = tiny_jepa("bert", mlm_weight=0.5)
    export_run(model, tmp_path)
    assert load_file(tmp_path / "jepa" / "model.safetensors").keys() == model.state_dict().keys()
    pooler = {"pooler.dense.weight", "pooler.dense.bias"}
    assert load_file(tmp_path / "model.safetensors").keys() == {*model.context_encoder.state_dict(), *pooler}
