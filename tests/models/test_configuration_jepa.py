"""Claims about `JepaConfig`: its defaults, what it refuses, and that JSON keeps it whole."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, BertConfig, PreTrainedConfig

from helpers.batches import image_config
from helpers.tiny_models import FAMILIES, tiny_config
from jepa_hf import JepaConfig, UsageError


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("predictor_type", ["transformer", "mlp"])
def test_positions_are_dropped_by_default_only_where_that_is_exact(family: str, predictor_type: str) -> None:
    exact = family != "deberta-v2" and predictor_type == "transformer"
    assert JepaConfig(tiny_config(family), predictor_type=predictor_type).masked_tokens == (
        "drop" if exact else "mask_token"
    )


def test_unknown_encoders_keep_their_positions_by_default() -> None:
    config = AutoConfig.for_model("mpnet", hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    assert JepaConfig(config).masked_tokens == "mask_token"
    with pytest.raises(UsageError, match="mpnet"):
        JepaConfig(config, masked_tokens="drop")


@pytest.mark.parametrize(("depth", "expected"), [(1, 1), (2, 1), (3, 2), (6, 3), (12, 6)])
def test_half_of_the_layers_are_averaged_by_default_rounded_up(depth: int, expected: int) -> None:
    assert JepaConfig(BertConfig(num_hidden_layers=depth)).average_top_k_layers == expected


def test_the_predictor_is_half_as_wide_with_as_many_heads_as_divide_its_width() -> None:
    config = JepaConfig(BertConfig())
    assert (config.pred_hidden_size, config.pred_num_attention_heads) == (384, 12)
    # 12 heads do not divide 40 evenly, 4 do.
    assert JepaConfig(BertConfig(), pred_hidden_size=40).pred_num_attention_heads == 4


def test_a_configuration_of_dimensions_under_other_names_is_understood() -> None:
    # DistilBERT calls them dim and n_layers.
    config = JepaConfig(tiny_config("distilbert"))
    assert (config.hidden_size, config.average_top_k_layers, config.pred_hidden_size) == (32, 1, 16)


EXPLICIT: dict[str, Any] = {
    "masked_tokens": "mask_token",
    "predictor_type": "mlp",
    "pred_hidden_size": 24,
    "pred_num_hidden_layers": 1,
    "pred_num_attention_heads": 3,
    "pred_mlp_ratio": 2.0,
    "pred_dropout": 0.25,
    "loss": "cosine",
    "smooth_l1_beta": 2.0,
    "average_top_k_layers": 2,
    "target_norm": "instance",
    "mlm_weight": 0.5,
    "variance_weight": 0.25,
    "covariance_weight": 0.125,
    "sigreg_weight": 0.0625,
    "contrastive_weight": 0.3,
    "contrastive_temperature": 0.2,
    "contrastive_predictor": "none",
    "initializer_range": 0.5,
}


def test_the_contrastive_term_is_a_default_of_text() -> None:
    """A JEPA of text has a contrastive term by default; one of images or features has none."""
    assert JepaConfig(tiny_config("bert")).contrastive_weight == 1.0
    assert JepaConfig(tiny_config("bert"), contrastive_weight=0).contrastive_weight == 0
    assert JepaConfig.for_images().contrastive_weight == JepaConfig.for_features(3).contrastive_weight == 0.0


def test_the_target_encoder_of_a_pretrained_text_start_is_exported() -> None:
    """It forgets less; a random start's target, and the encoders of other modalities, have no such reason."""
    text, images = (
        JepaConfig.for_encoder(config, pretrained_encoder=True) for config in (tiny_config("bert"), image_config())
    )
    assert text.default_exported_encoder == "target"
    assert images.default_exported_encoder == JepaConfig(tiny_config("bert")).default_exported_encoder == "context"


def test_a_pretrained_text_start_keeps_mask_tokens() -> None:
    """It gets an MLP predictor and the contrast of exported vectors, but a transformer if a setting asks for one."""

    def resolved(**kwargs: Any) -> tuple[Any, ...]:
        config = JepaConfig.for_encoder(tiny_config("bert"), pretrained_encoder=True, **kwargs)
        assert (config.contrastive_predictor, config.contrastive_temperature) == ("none", 0.05)
        return config.masked_tokens, config.predictor_type

    assert resolved() == resolved(masked_tokens="mask_token") == ("mask_token", "mlp")
    dropped = resolved(masked_tokens="drop")
    assert dropped == resolved(pred_num_hidden_layers=1) == resolved(predictor_type="transformer")
    assert dropped == ("drop", "transformer")
    images = JepaConfig.for_encoder(image_config(), pretrained_encoder=True)
    assert (images.masked_tokens, images.predictor_type) == ("drop", "transformer")


def test_explicit_values_win_over_every_default() -> None:
    default, config = JepaConfig(tiny_config("bert")), JepaConfig(tiny_config("bert"), **EXPLICIT)
    for name, value in EXPLICIT.items():
        assert getattr(default, name) != value, name
        assert getattr(config, name) == value, name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("masked_tokens", "hidden"),
        ("predictor_type", "linear"),
        ("loss", "huber"),
        ("target_norm", "batch"),
        ("average_top_k_layers", 0),
        ("average_top_k_layers", 3),
        ("pred_hidden_size", 0),
        ("pred_num_hidden_layers", 0),
        ("pred_num_attention_heads", 3),
        ("pred_num_attention_heads", 0),
        ("pred_mlp_ratio", 0.0),
        ("pred_dropout", 1.0),
        ("pred_dropout", -0.1),
        ("smooth_l1_beta", 0.0),
        ("mlm_weight", -1.0),
        ("variance_weight", -1.0),
        ("covariance_weight", -1.0),
        ("sigreg_weight", -1.0),
        ("contrastive_weight", -1.0),
        ("contrastive_temperature", 0.0),
        ("contrastive_predictor", "linear"),
    ],
)
def test_a_bad_choice_is_refused_by_its_name(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=rf"\b{name}\b"):
        JepaConfig(tiny_config("bert"), **{name: value})


def test_a_configuration_without_an_encoder_is_refused() -> None:
    with pytest.raises(UsageError, match="encoder_config"):
        JepaConfig()


def test_dropping_from_deberta_is_refused_with_the_remedy() -> None:
    with pytest.raises(UsageError, match=r"deberta-v2.*--masked_tokens mask_token"):
        JepaConfig(tiny_config("deberta-v2"), masked_tokens="drop")


def test_dropping_what_the_mlp_predictor_reads_is_refused_with_the_remedy() -> None:
    with pytest.raises(UsageError, match=r"mlp.*--predictor_type transformer or --masked_tokens mask_token"):
        JepaConfig(tiny_config("bert"), masked_tokens="drop", predictor_type="mlp")


def test_a_predictor_over_a_plane_needs_a_width_for_sines_and_cosines_of_two_axes() -> None:
    JepaConfig(image_config(), pred_hidden_size=20, pred_num_attention_heads=2)
    with pytest.raises(UsageError, match="pred_hidden_size must be a multiple of 4"):
        JepaConfig(image_config(), pred_hidden_size=18, pred_num_attention_heads=2)
    JepaConfig(tiny_config("bert"), pred_hidden_size=18, pred_num_attention_heads=2)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("explicit", [{}, EXPLICIT], ids=["defaults", "explicit"])
def test_json_keeps_the_full_configuration(family: str, explicit: dict[str, Any], tmp_path: Path) -> None:
    encoder_config = tiny_config(family)
    config = JepaConfig(encoder_config, **explicit)
    config.save_pretrained(tmp_path)
    for loaded in (JepaConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is JepaConfig
        assert type(loaded.encoder_config) is type(encoder_config)
        assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()
        assert loaded.encoder_config.to_dict() == encoder_config.to_dict()
    # In plain JSON: what is derived is written down, so that a later default cannot change an old model.
    written = json.loads((tmp_path / "config.json").read_text())
    for name in EXPLICIT:
        assert written[name] == getattr(config, name)


def test_special_tokens_are_those_of_the_encoder() -> None:
    # Trainer compares them with the tokenizer's.
    encoder_config = tiny_config("roberta")
    config = JepaConfig(encoder_config)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (1, 0, 2)
    assert JepaConfig(encoder_config, bos_token_id=5).bos_token_id == 5


@pytest.mark.parametrize(
    ("name", "meant"), [("mlm_wieght", "mlm_weight"), ("average_topk_layers", "average_top_k_layers")]
)
def test_a_misspelt_argument_is_refused(name: str, meant: str) -> None:
    """It would be kept as an attribute that nothing reads, however the configuration is made."""
    encoder = tiny_config("bert")
    for make in (JepaConfig, JepaConfig.for_encoder):
        with pytest.raises(UsageError, match=f"got '{name}'. Did you mean '{meant}'"):
            make(encoder, **{name: 1})


def test_names_of_transformers_and_of_users_are_kept(tmp_path: Path) -> None:
    """All that a base configuration has, what saving adds, and an attribute of somebody's own."""
    common = PreTrainedConfig().to_dict()
    config = JepaConfig(
        tiny_config("bert"),
        **{name: value for name, value in common.items() if name != "model_type"},
        auto_map={"AutoModel": "modeling.Model"},
        attn_implementation="eager",
        note="mine",
    )
    config.save_pretrained(tmp_path)
    loaded = JepaConfig.from_pretrained(tmp_path)
    assert loaded.note == "mine"
    assert loaded.to_dict() == config.to_dict()
