"""LoRA on a language model with trainable predictor tokens."""

import json
from copy import copy, deepcopy
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UsageError, one_line
from ..models.lora import lora_config
from .decoder import has_lora
from .predictor_tokens import MAX_PREDICTOR_TOKENS, predictor_tokens

ADAPTER_FILE = "adapter_model.safetensors"


def add_lm_lora(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any], num_predictor_tokens: int
) -> Any:
    """Wrap a model in a `PeftModel` that trains LoRA and the predictor tokens' embeddings.

    Args:
        model: a causal language model with embeddings of the predictor tokens, see `add_predictor_tokens`.
        tokenizer: the tokenizer, with the predictor tokens.
        settings: arguments of peft's `LoraConfig`; default for `target_modules`: every linear layer.
        num_predictor_tokens: k.

    Raises:
        UsageError: peft is missing, does not accept these settings, or finds no matching layers.
    """
    return add_adapters(model, tokenizer, lora_config(settings), num_predictor_tokens)


def add_adapters(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: Any, num_predictor_tokens: int
) -> Any:
    """Wrap a model in a `PeftModel` by a configuration of peft, which is not changed."""
    if has_lora(model):
        raise UsageError("The model has adapters already. Leave out peft_config, or merge them (merge_and_unload).")
    from peft import LoraConfig, get_peft_model  # only adapters need peft

    config = copy(config)
    config.task_type = config.task_type or "CAUSAL_LM"
    if isinstance(config, LoraConfig) and not config.trainable_token_indices and not config.modules_to_save:
        token_ids = tokenizer.convert_tokens_to_ids(predictor_tokens(num_predictor_tokens))
        config.trainable_token_indices = cast(Any, token_ids) or None
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise UsageError(
            f"LoRA matches no layer of {type(model).__name__}; check lora_target_modules: {one_line(error)[:300]}"
        ) from None


def save_adapters(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    state_dict: dict[str, torch.Tensor] | None,
    *,
    with_predictor: bool,
) -> None:
    """Save the adapters of a `PeftModel` with a tokenizer for `AutoModelForCausalLM.from_pretrained(folder)`.

    The base model has no embeddings of the predictor tokens, and generation does not need them. So the configuration
    does not mention them, and the tokenizer does not contain them. Their trained embeddings are ignored by all who load
    the adapters into another model. If other embeddings are trained, peft saves everything.
    """
    config = model.peft_config[model.active_adapter]
    base = Path(config.base_model_name_or_path or "")
    if base.is_dir():  # peft writes the path as the user gave it, which may be relative
        config.base_model_name_or_path = str(base.absolute())
    predictor_ids = {tokenizer.convert_tokens_to_ids(token) for token in predictor_tokens(MAX_PREDICTOR_TOKENS)}
    trained_ids = getattr(config, "trainable_token_indices", None) or []
    trains_others = not isinstance(trained_ids, list) or not predictor_ids.issuperset(trained_ids)
    if trains_others or getattr(config, "modules_to_save", None):
        model.save_pretrained(folder, state_dict=state_dict)
        tokenizer.save_pretrained(folder)
        return
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, state_dict, model.active_adapter, save_embedding_layers=False)
    state = {
        name: value.contiguous()
        for name, value in state.items()
        if with_predictor or not ("trainable_tokens" in name or "token_adapter" in name)
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(state, Path(folder) / ADAPTER_FILE, metadata={"format": "pt"})
    export_config = copy(config)
    export_config.trainable_token_indices, export_config.inference_mode = None, True
    export_config.save_pretrained(folder)
    without_predictor_tokens(tokenizer).save_pretrained(folder)
    # The stop tokens of the template, which the base model's configuration may lack.
    model.get_base_model().generation_config.save_pretrained(folder)


def without_predictor_tokens(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return a copy of a fast tokenizer without the predictor tokens, which have its highest ids."""
    names = set(predictor_tokens(MAX_PREDICTOR_TOKENS))
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = [token for token in content["added_tokens"] if token["content"] not in names]
    plain = deepcopy(tokenizer)
    plain._tokenizer = Tokenizer.from_str(json.dumps({**content, "added_tokens": kept}))
    return plain
