"""Model, tokenizer and adapters that `LlmJepaTrainer` starts with."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..distributed.deepspeed_state import zero3_init_disabled
from ..errors import UsageError
from ..hub.loading import load_or_usage_error
from .decoder import has_lora
from .lora import add_adapters
from .predictor_tokens import add_predictor_tokens, predictor_tokens
from .row_tokenization import has_label, last_label
from .view_tokenizer import PairedViewTokenizer, special_ids

# Written by peft next to the adapters.
_ADAPTER_CONFIG = "adapter_config.json"


def is_adapter_dir(name: str) -> bool:
    """Return whether a directory holds adapters and no model of its own."""
    return (Path(name) / _ADAPTER_CONFIG).is_file()


def refuse_adapter_dir(name: str, argument: str) -> None:
    """Refuse adapters as the start of a training."""
    if is_adapter_dir(name):
        raise UsageError(
            f"{argument} {name!r} contains adapters, and no others can be trained on top; start from their base "
            f"model, or merge them into it with `jepa-hf export {name} NEW_DIR`"
        )


def load_start(
    model: Any, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a model and a tokenizer that can pad; a model's name is loaded in float32, with its tokenizer."""
    if isinstance(model, (str, Path)):
        name = str(model)
        refuse_adapter_dir(name, "model")
        tokenizer = tokenizer or load_or_usage_error(name, AutoTokenizer.from_pretrained, {}, "model")
        with zero3_init_disabled():
            model = load_or_usage_error(name, AutoModelForCausalLM.from_pretrained, {"dtype": torch.float32}, "model")
    if not isinstance(model, nn.Module):
        raise UsageError(f"LlmJepaTrainer needs a model or its name, not {type(model).__name__}.")
    if tokenizer is None:
        raise UsageError("LlmJepaTrainer needs the model's tokenizer (processing_class=...).")
    set_padding_token(tokenizer)
    return cast(PreTrainedModel, model), tokenizer


def set_padding_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a tokenizer without a padding token pad with its stop token or unknown token, as TRL does.

    Without both it stays without: `DataCollatorForPairedViews` then pads with token 0. No padding is attended to.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token


def prepare_language_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    view_tokenizer: PairedViewTokenizer | None,
    peft_config: Any,
) -> Any:
    """Give the model embeddings of the predictor tokens, and adapters if `peft_config` is not None."""
    if not model.can_generate():
        raise UsageError(
            f"{type(model).__name__} is not a causal language model. LLM-JEPA adds to next-token prediction; use "
            "JepaTrainer for encoders."
        )
    count = 0 if view_tokenizer is None else len(view_tokenizer.predictors)
    if not has_lora(model):
        add_predictor_tokens(model, tokenizer, count)
    elif len(tokenizer) > len(cast(torch.Tensor, model.get_input_embeddings().weight)):
        raise _missing_embeddings()
    return model if peft_config is None else add_adapters(model, tokenizer, peft_config, count)


def default_view_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PairedViewTokenizer:
    """Return a view tokenizer with one predictor token, which is added to the tokenizer."""
    if has_lora(model) and predictor_tokens(1)[0] not in tokenizer.get_added_vocab():
        raise _missing_embeddings()
    tokenizer.add_tokens(predictor_tokens(1), special_tokens=True)
    return PairedViewTokenizer(tokenizer)


def _missing_embeddings() -> UsageError:
    # They would not be trained, and the adapters would not load into a model with fewer embeddings.
    return UsageError(
        "The model has adapters, but no embeddings of the predictor tokens. Pass the plain model and "
        "LlmJepaTrainer(peft_config=...), or call add_predictor_tokens before adding the adapters."
    )


def set_stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Iterable[Any]) -> None:
    """Add the tokenizer's and the template's stop tokens to those at which `generate` ends."""
    config = model.generation_config
    stops = [*(config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id])]
    stops.append(tokenizer.eos_token_id)
    complete = next((row for row in rows if not row.get("truncated") and has_label(row)), None)
    if complete is not None:
        stop = last_label(complete)
        stops += [stop] if stop in special_ids(tokenizer) else []
    config.eos_token_id = sorted({stop for stop in stops if stop is not None}) or None
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id


def check_model_init(model_init: Any, target_gradient: str, peft_config: Any) -> None:
    """Refuse `model_init` with a teacher or adapters, which belong to one model."""
    if model_init is None:
        return
    if target_gradient == "ema":
        raise UsageError("model_init does not go with target_gradient ema, whose teacher copies one model.")
    if peft_config is not None:
        raise UsageError("model_init does not go with peft_config. Return a model with adapters from model_init.")


def refuse_names(**datasets: Any) -> None:
    """Refuse names of data sets, by the name of the argument."""
    for name, dataset in datasets.items():
        if isinstance(dataset, (str, Path)):
            raise UsageError(f"{name} is the name {str(dataset)!r}. Pass rows, such as datasets.load_dataset(...).")
