"""Loading of causal language models and their tokenizers."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import GENERATION_CONFIG_NAME

from ..distributed.deepspeed_state import zero3_init_disabled
from ..errors import UsageError, one_line
from ..hub.loading import load_or_usage_error
from ..llm_jepa.model_setup import is_adapter_dir, refuse_adapter_dir
from ..training.run_directory import check_has_model
from .arguments import BaseModelArguments
from .encoder_loading import apply_config_overrides, has_tokens
from .quick_checks import suggestion

_DTYPES = ("float32", "bfloat16", "float16")


def parse_dtype(name: str) -> torch.dtype:
    """Return the type of weights with this name."""
    if name not in _DTYPES:
        raise UsageError(f"dtype must be one of {', '.join(_DTYPES)}, not {name!r}")
    return getattr(torch, name)


def load_language_config(model_args: BaseModelArguments, kwargs: dict[str, Any]) -> PreTrainedConfig:
    """Load the configuration of the pretrained causal language model, or create that of a random start."""
    name = model_args.model_name_or_path or model_args.config_name
    if name is not None:
        argument = "model_name_or_path" if model_args.model_name_or_path else "config_name"
        check_has_model(argument, name)
        refuse_adapter_dir(name, argument)
        config = load_or_usage_error(name, AutoConfig.from_pretrained, kwargs, argument)
    elif model_args.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        config = AutoConfig.for_model(str(model_args.model_type))
    else:
        meant = suggestion(str(model_args.model_type), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        raise UsageError(
            f"model_type {model_args.model_type!r} is not a causal language model.{meant} Use llama, gpt2 or qwen3."
        )
    check_causal(config)
    return apply_config_overrides(config, model_args.config_overrides, is_default=name is None)


def check_causal(config: PreTrainedConfig) -> None:
    """Reject a configuration that is not a causal language model's."""
    is_bidirectional = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(
        config, "is_decoder", False
    )
    if is_bidirectional or config.is_encoder_decoder or config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        kind = "an encoder-decoder" if config.is_encoder_decoder else "not a causal language model"
        raise UsageError(
            f"A {config.model_type} model is {kind}, but the objective llm needs a decoder such as llama, gpt2 or "
            "qwen3. Name one, or omit --objective llm to train an encoder."
        )


def load_lm_tokenizer(argument: str, name: str, kwargs: dict[str, Any], template: str | None) -> Tokenizer:
    """Load a language model's tokenizer; the chat template in the file `template` replaces its own."""
    tokenizer = load_or_usage_error(name, AutoTokenizer.from_pretrained, kwargs, argument)
    if not has_tokens(tokenizer):
        raise UsageError(f"{argument} {name!r} contains no tokenizer; name one with --tokenizer_name")
    if isinstance(tokenizer.chat_template, dict):
        # Template names become file names.
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    if template is not None:
        tokenizer.chat_template = read_template(template)
    return tokenizer


def read_template(path: str) -> str:
    """Read a chat template from a file."""
    try:
        template = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise UsageError(
            f"chat_template_path {path!r} cannot be read ({reason}); name a file with a Jinja template"
        ) from None
    if not template.strip():
        raise UsageError(f"chat_template_path {path!r} is empty; name a file with a Jinja template")
    return template


def build_language_model(
    model_args: BaseModelArguments, config: PreTrainedConfig, tokenizer: Tokenizer, kwargs: dict[str, Any]
) -> PreTrainedModel:
    """Load the pretrained model, or build one with random weights and the tokenizer's vocabulary."""
    settings: dict[str, Any] = {"dtype": parse_dtype(model_args.dtype)}
    if model_args.attn_implementation is not None:
        settings["attn_implementation"] = model_args.attn_implementation
    if model_args.model_name_or_path is None:
        config.vocab_size = len(tokenizer)
        for name in ("pad", "bos", "eos"):
            setattr(config, f"{name}_token_id", getattr(tokenizer, f"{name}_token_id"))
        if config.pad_token_id == config.eos_token_id:  # the embedding of a padding token stays at 0
            config.pad_token_id = None
        try:
            with zero3_init_disabled():
                return AutoModelForCausalLM.from_config(config, **settings)
        except (ValueError, ImportError, RuntimeError, TypeError, ZeroDivisionError) as error:
            raise UsageError(
                f"the {config.model_type} model cannot be built with this configuration: {one_line(error):.300}"
            ) from None
    name = model_args.model_name_or_path
    model = load_or_usage_error(
        name, AutoModelForCausalLM.from_pretrained, {**kwargs, **settings}, "model_name_or_path"
    )
    if model_args.passed_model is not None:
        model.config.name_or_path = model_args.passed_model
    return model


def check_generation_model(name: str, kwargs: dict[str, Any]) -> None:
    """Refuse a name that `load_generation_model` cannot load, without its weights."""
    if not is_adapter_dir(name):
        check_causal(load_or_usage_error(name, AutoConfig.from_pretrained, kwargs, "MODEL"))


def load_generation_model(name: str, kwargs: dict[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    """Load a language model, or adapters with their base model, for generation."""
    model = load_or_usage_error(name, AutoModelForCausalLM.from_pretrained, {**kwargs, "dtype": dtype}, "MODEL")
    if is_adapter_dir(name) and (Path(name) / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(name)
    return model
