"""Arguments that a configuration would store and never read are refused with the place they belong to."""

import inspect
from dataclasses import fields
from typing import Any

import pytest
from transformers import TrainingArguments

from helpers.tiny_models import save_tiny_encoder, tiny_config
from jepa_hf import (
    DataCollatorForBlockJEPA,
    DataCollatorForFeatureJEPA,
    DataCollatorForSpanJEPA,
    FeatureEncoderConfig,
    JepaConfig,
    JepaForRepresentationPrediction,
    JepaTrainingArguments,
    UsageError,
)
from jepa_hf.llm_jepa import LlmJepaTrainingArguments, PairedViewTokenizer
from jepa_hf.models import argument_names


def test_names_of_other_classes() -> None:
    """The names listed in `models` are those of the training arguments and of the collators."""
    plain = {field.name for field in fields(TrainingArguments)}
    assert {field.name for field in fields(JepaTrainingArguments)} - plain == set(argument_names._TRAINING)
    llm_names = {field.name for field in fields(LlmJepaTrainingArguments)} - plain
    assert llm_names == set(argument_names._LLM_TRAINING)
    collators = (DataCollatorForBlockJEPA, DataCollatorForFeatureJEPA, DataCollatorForSpanJEPA)
    names = {name for collator in collators for name in inspect.signature(collator).parameters}
    assert names - set(JepaConfig.argument_names()) == set(argument_names._COLLATORS)
    views = set(inspect.signature(PairedViewTokenizer).parameters) - {"tokenizer", "max_length"}
    assert views == set(argument_names._VIEWS)


@pytest.mark.parametrize(
    ("argument", "place"),
    [
        ("ema_decay", "JepaTrainingArguments"),
        ("learning_rate", "JepaTrainingArguments"),
        ("per_device_train_batch_size", "JepaTrainingArguments"),
        ("jepa_weight", "LlmJepaTrainingArguments"),
        ("num_predictor_tokens", "PairedViewTokenizer"),
        ("mask_ratio", "the data collator"),
        ("target_scale", "the data collator"),
        ("mlm_wieght", "'mlm_weight'"),
    ],
)
@pytest.mark.parametrize("build", ["JepaConfig", "for_encoder", "for_features", "from_encoder_pretrained"])
def test_argument_of_another_class(
    build: str, argument: str, place: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """An argument of the training or the collator, or a misspelled one, is refused with its place."""
    builders: dict[str, Any] = {
        "JepaConfig": lambda **kwargs: JepaConfig(tiny_config("bert"), **kwargs),
        "for_encoder": lambda **kwargs: JepaConfig.for_encoder(tiny_config("bert"), **kwargs),
        "for_features": lambda **kwargs: JepaConfig.for_features(3, **kwargs),
        "from_encoder_pretrained": lambda **kwargs: JepaForRepresentationPrediction.from_encoder_pretrained(
            "not read", **kwargs
        ),
    }
    with pytest.raises(UsageError, match=f"{argument}.*{place}"):
        builders[build](**{argument: 0.5})


def test_unknown_argument_of_a_loader(tmp_path: Any) -> None:
    """The loaders refuse every unknown name, and say where the encoder's arguments go."""
    start = save_tiny_encoder("bert", tmp_path)
    for load in (
        JepaForRepresentationPrediction.from_encoder_pretrained,
        JepaForRepresentationPrediction.from_any_pretrained,
    ):
        with pytest.raises(UsageError, match=r"attn_implementation.*encoder_kwargs"):
            load(start, attn_implementation="eager")
        with pytest.raises(UsageError, match=r"'mlm_w'.*'mlm_weight'"):
            load(start, mlm_w=0.5)


@pytest.mark.parametrize(("argument", "meant"), [("hiden_size", "hidden_size"), ("embeddim", "embed_dim")])
def test_misspelled_argument_of_the_feature_encoder(argument: str, meant: str) -> None:
    """The feature encoder's configuration refuses a misspelled argument, also of its other names."""
    with pytest.raises(UsageError, match=f"'{argument}'. Did you mean '{meant}'"):
        FeatureEncoderConfig(3, **{argument: 8})
