"""Claims about `jepa_hf/cli/encoder_loading.py`: configurations of random starts."""

import pytest
from transformers import AutoConfig, LlamaConfig, ModernBertConfig

from jepa_hf.cli.encoder_loading import apply_config_overrides


def test_what_follows_from_an_overridden_size_follows_it() -> None:
    """A Llama of 48 columns and 6 heads has heads of 8, not the default's 128; key-value heads as many as heads."""
    config = apply_config_overrides(
        AutoConfig.for_model("llama"), "hidden_size=48,num_attention_heads=6,num_hidden_layers=2", True
    )
    expected = LlamaConfig(hidden_size=48, num_attention_heads=6, num_hidden_layers=2)
    assert (config.head_dim, config.num_key_value_heads) == (8, 6)
    assert config.to_dict() == expected.to_dict()


def test_what_a_configuration_says_itself_is_kept() -> None:
    """Heads of another width than derived stay, as does all else that is not overridden."""
    given = LlamaConfig(hidden_size=48, num_attention_heads=6, num_hidden_layers=3, head_dim=16, vocab_size=99)
    config = apply_config_overrides(given, "num_hidden_layers=2")
    assert (config.head_dim, config.vocab_size, config.hidden_size, config.num_hidden_layers) == (16, 99, 48, 2)


@pytest.mark.parametrize("layers", [1, 4, 30])
@pytest.mark.parametrize("is_default", [True, False])
def test_layer_types_follow_the_number_of_layers(layers: int, is_default: bool) -> None:
    """ModernBERT's layers alternate as in a configuration made with that number."""
    config = apply_config_overrides(AutoConfig.for_model("modernbert"), f"num_hidden_layers={layers}", is_default)
    assert config.layer_types == ModernBertConfig(num_hidden_layers=layers).layer_types


def test_a_value_that_is_the_default_can_be_given() -> None:
    """An override wins over a configuration's own value even where it names the class's default."""
    given = LlamaConfig(hidden_size=48, num_attention_heads=6, rms_norm_eps=1e-3)
    assert (
        apply_config_overrides(given, f"rms_norm_eps={LlamaConfig().rms_norm_eps}").rms_norm_eps
        == LlamaConfig().rms_norm_eps
    )
