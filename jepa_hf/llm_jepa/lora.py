"""LoRA on a language model with trainable predictor tokens."""

from copy import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UsageError
from ..models.lora import lora_config
from .view_tokenizer import MAX_PREDICTOR_TOKENS, predictor_tokens

ADAPTER_FILE = "adapter_model.safetensors"


def add_lm_lora(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any], num_predictor_tokens: int
) -> Any:
    """Wrap a model in a `PeftModel` that trains LoRA and the predictor tokens' embeddings.

    Args:
        model: a causal language model with embeddings of the predictor tokens, see
            `add_predictor_tokens`.
        tokenizer: the tokenizer, with the predictor tokens.
        settings: arguments of peft's `LoraConfig`; default for `target_modules`: every linear
            layer.
        num_predictor_tokens: k.

    Raises:
        UsageError: peft is missing, does not accept these settings, or finds no matching layers.
    """
    token_ids = tokenizer.convert_tokens_to_ids(predictor_tokens(num_predictor_tokens))
    config = lora_config({"task_type": "CAUSAL_LM", "trainable_token_indices": token_ids or None, **settings})
    from peft import get_peft_model  # lora_config raises a UsageError if peft is missing

    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise UsageError(
            f"LoRA matches no layer of {type(model).__name__}; check lora_target_modules: "
            f"{' '.join(str(error).split())[:300]}"
        ) from None


def save_lm_lora(
    model: Any, tokenizer: PreTrainedTokenizerBase, folder: str | Path, state_dict: dict[str, torch.Tensor] | None
) -> None:
    """Save the LoRA weights of a `PeftModel` for `AutoModelForCausalLM.from_pretrained(folder)`.

    The predictor tokens' embeddings are not saved, because the base model has no embedding rows for
    them and generation does not need them. Checkpoints keep them. If other embeddings were trained,
    peft saves everything.

    Args:
        model: the `PeftModel`.
        tokenizer: its tokenizer.
        folder: output directory, created if missing.
        state_dict: full weights; needed if the model's own are sharded.
    """
    config = model.peft_config[model.active_adapter]
    tokens = predictor_tokens(MAX_PREDICTOR_TOKENS)
    predictor_token_ids = {tokenizer.convert_tokens_to_ids(token) for token in tokens}
    trained_ids = config.trainable_token_indices
    if not isinstance(trained_ids, list) or not predictor_token_ids.issuperset(trained_ids):
        model.save_pretrained(folder, state_dict=state_dict)
        return
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, state_dict, model.active_adapter, save_embedding_layers=False)
    state = {
        name: value.contiguous()
        for name, value in state.items()
        if "trainable_tokens" not in name and "token_adapter" not in name
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(state, Path(folder) / ADAPTER_FILE, metadata={"format": "pt"})
    export_config = copy(config)
    export_config.trainable_token_indices, export_config.inference_mode = None, True
    export_config.save_pretrained(folder)
