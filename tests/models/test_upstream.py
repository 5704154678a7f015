"""Contracts of the undocumented names of transformers that `jepa_hf.models` uses, and what they are used for."""

import copy
import inspect
import pickle
import re
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import output_capturing

from helpers.batches import image_batch, image_config, text_batch, tiny_jepa
from helpers.cli import REPOSITORY
from helpers.tiny_models import FAMILIES
from jepa_hf import JepaConfig, JepaForRepresentationPrediction
from jepa_hf.models import upstream

Model = tuple[JepaForRepresentationPrediction, dict[str, torch.Tensor]]


def test_names_exist() -> None:
    """The undocumented names are there, with the arguments that are used."""
    assert tiny_jepa("bert").get_encoder().config._attn_implementation == "sdpa"
    assert next(iter(inspect.signature(PreTrainedModel._from_config).parameters)) == "config"
    assert list(inspect.signature(output_capturing.maybe_install_capturing_hooks).parameters) == ["model"]
    parameters = inspect.signature(output_capturing.install_output_capuring_hook).parameters
    assert list(parameters)[:3] == ["module", "key", "index"]
    assert isinstance(nn.Identity()._forward_hooks, dict)


def test_only_upstream_uses_them() -> None:
    """No other file of `models` has an attribute of another object that begins with an underscore."""
    for path in sorted((REPOSITORY / "jepa_hf" / "models").glob("*.py")):
        names = set(re.findall(r"(?<![\w.])(?!self\b|super\b|cls\b)\w+(?:\.\w+)*\.(_[a-z]\w+)", path.read_text()))
        assert path.name == "upstream.py" or names <= {"_prepare_encoders"}, path.name


def models() -> dict[str, Any]:
    """Return functions that build a model and a batch, by modality."""

    def features(mode: str) -> Model:
        config = JepaConfig.for_features(6, mode=mode, embed_dim=16, predictor_embed_dim=8, num_heads=2)
        model = JepaForRepresentationPrediction(config).eval()
        steps = {"time": 4, "patches": config.encoder_config.num_patches, "flat": 1}[mode]
        positions = torch.arange(steps).expand(2, 1, steps)
        shape = (2, 4, 6) if mode == "time" else (2, 6)
        batch = {"features": torch.randn(shape), "target_positions": positions[..., :1]}
        batch["target_valid"] = torch.ones_like(batch["target_positions"], dtype=torch.bool)
        if mode == "flat":
            return model, batch | {"context_features": torch.randn(2, 1, 6)}
        return model, batch | {"context_positions": positions[..., 1:]}

    def images() -> Model:
        config = JepaConfig.for_images(image_config(), pred_hidden_size=16)
        return JepaForRepresentationPrediction(config).eval(), image_batch()

    text: dict[str, Any] = {
        family: lambda family=family: (tiny_jepa(family), text_batch(family, tiny_jepa(family).config.masked_tokens))
        for family in FAMILIES
    }
    return text | {"images": images, **{mode: lambda mode=mode: features(mode) for mode in ("time", "patches", "flat")}}


MODELS = models()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", ["pickle", "deepcopy"])
@torch.no_grad()
def test_models_pickle(name: str, way: str) -> None:
    """A model that has run, and its encoders, pickle and copy; the copy computes the same outputs."""
    model, batch = MODELS[name]()
    expected = model(**batch, output_hidden_states=True)
    copied = pickle.loads(pickle.dumps(model)) if way == "pickle" else copy.deepcopy(model)
    output = copied(**batch, output_hidden_states=True)
    assert torch.equal(output.loss, expected.loss)
    encoder = model.get_encoder()
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values", "features") if key in batch}
    clone = pickle.loads(pickle.dumps(encoder)) if way == "pickle" else copy.deepcopy(encoder)
    states = clone(**inputs, output_hidden_states=True).hidden_states
    expected_states = encoder(**inputs, output_hidden_states=True).hidden_states
    assert len(states) == len(expected_states) > 1
    assert all(torch.equal(a, b) for a, b in zip(states, expected_states, strict=True))


def test_hooks_are_installed_once() -> None:
    """A second installation adds no hook, and hooks outside transformers stay."""
    encoder = tiny_jepa("bert").get_encoder()
    module = next(module for module in encoder.modules() if module._forward_hooks)
    hook = module.register_forward_hook(lambda *args: None)
    before = list(module._forward_hooks.values())
    upstream.install_capturing_hooks(encoder)
    assert list(module._forward_hooks.values()) == before
    hook.remove()
