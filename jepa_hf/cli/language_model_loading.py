"""From names and flags to a causal language model and its tokenizer, each mistake with its sentence."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from ..distributed.deepspeed_state import whole_weights
from ..errors import UsageError
from ..hub.loading import load_pretrained
from .arguments import StartArguments
from .encoder_loading import overridden

_DTYPES = ("float32", "bfloat16", "float16")
# What peft writes beside the adapters.
_ADAPTER_CONFIG = "adapter_config.json"


def dtype_of(name: str) -> torch.dtype:
    """A type of weights by its name."""
    if name not in _DTYPES:
        raise UsageError(f"dtype must be one of {', '.join(_DTYPES)}, not {name!r}")
    return getattr(torch, name)


def load_language_config(model_args: StartArguments, kwargs: dict[str, Any]) -> PreTrainedConfig:
    """The configuration of the pretrained model, or of a random start.

    Raises:
        UsageError: it is not that of a causal language model.
    """
    name = model_args.model_name_or_path or model_args.config_name
    if name is not None:
        argument = "model_name_or_path" if model_args.model_name_or_path else "config_name"
        if _holds_adapters(name):
            raise UsageError(
                f"{argument} {name!r} holds adapters, beside which no others are trained: start from the model they "
                "belong to, or merge them into it with peft's merge_and_unload"
            )
        config = load_pretrained(name, AutoConfig.from_pretrained, kwargs, argument)
    elif model_args.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        config = AutoConfig.for_model(model_args.model_type)
    else:
        raise UsageError(f"model_type {model_args.model_type!r} is no causal language model's; use llama, gpt2, qwen3")
    check_causal(config)
    return overridden(config, model_args.config_overrides, is_default=name is None)


def check_causal(config: PreTrainedConfig) -> None:
    """Refuse a configuration that is not a causal language model's."""
    reads_both_ways = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(
        config, "is_decoder", False
    )
    if reads_both_ways or config.is_encoder_decoder or config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UsageError(
            f"a {config.model_type} model is no causal language model, which the objective llm trains: name one such "
            "as llama, gpt2 or qwen3; for encoders leave out --objective llm"
        )


def load_words(argument: str, name: str, kwargs: dict[str, Any], template: str | None) -> Tokenizer:
    """A language model's tokenizer.

    Args:
        argument: whose value the name is, for the sentence.
        template: file of a chat template in the place of its own.
    """
    tokenizer = load_pretrained(name, AutoTokenizer.from_pretrained, kwargs, argument)
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        # What transformers makes of a directory without a tokenizer knows special tokens only.
        raise UsageError(f"{argument} {name!r} holds no tokenizer; name one with --tokenizer_name")
    if isinstance(tokenizer.chat_template, dict):
        # Their names would become names of files.
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    if template is not None:
        tokenizer.chat_template = read_template(template)
    return tokenizer


def read_template(path: str) -> str:
    """A chat template out of a file."""
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
    model_args: StartArguments, config: PreTrainedConfig, tokenizer: Tokenizer, kwargs: dict[str, Any]
) -> PreTrainedModel:
    """The pretrained model, or one with random weights of this configuration and the tokenizer's vocabulary."""
    given = {"dtype": dtype_of(model_args.dtype)}
    if model_args.attn_implementation is not None:
        given["attn_implementation"] = model_args.attn_implementation
    if model_args.model_name_or_path is None:
        config.vocab_size = len(tokenizer)
        for name in ("pad", "bos", "eos"):
            setattr(config, f"{name}_token_id", getattr(tokenizer, f"{name}_token_id"))
        if config.pad_token_id == config.eos_token_id:  # the embedding of a padding token stays at 0
            config.pad_token_id = None
        try:
            with whole_weights():
                return AutoModelForCausalLM.from_config(config, **given)
        except (ValueError, ImportError, RuntimeError, TypeError, ZeroDivisionError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UsageError(f"no {config.model_type} model can be built like that: {reason}") from None
    name = model_args.model_name_or_path
    return load_pretrained(name, AutoModelForCausalLM.from_pretrained, {**kwargs, **given}, "model_name_or_path")


def load_answering_model(name: str, kwargs: dict[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    """A language model, or adapters with the model that they belong to, to generate with."""
    if not _holds_adapters(name):
        check_causal(load_pretrained(name, AutoConfig.from_pretrained, kwargs, "MODEL"))
    return load_pretrained(name, AutoModelForCausalLM.from_pretrained, {**kwargs, "dtype": dtype}, "MODEL")


def _holds_adapters(name: str) -> bool:
    return (Path(name) / _ADAPTER_CONFIG).is_file()
