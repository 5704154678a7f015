"""LoRA on a language model, by peft, where the predictor's tokens learn too."""

from copy import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UsageError
from ..models.lora import lora_config
from .view_tokenizer import MOST_PREDICTOR_TOKENS, predictor_tokens

ADAPTER_FILE = "adapter_model.safetensors"


def add_adapters(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any], num_predictor_tokens: int
) -> Any:
    """A `PeftModel` around the model: what is trained are the adapters, and the predictor tokens' embeddings.

    Args:
        model: it knows the predictor tokens, see `add_predictor_tokens`.
        tokenizer: it knows them too.
        settings: arguments of peft's `LoraConfig`; without `target_modules`, adapters stand beside every linear layer.
        num_predictor_tokens: k.

    Raises:
        UsageError: peft is not installed, does not take these settings, or finds no such layers.
    """
    rows = tokenizer.convert_tokens_to_ids(predictor_tokens(num_predictor_tokens))
    config = lora_config({"task_type": "CAUSAL_LM", "trainable_token_indices": rows or None, **settings})
    from peft import get_peft_model  # lora_config has said in a sentence where it is missing

    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise UsageError(f"lora finds no place in the model: {' '.join(str(error).split())[:300]}") from None


def save_adapters(
    model: Any, tokenizer: PreTrainedTokenizerBase, folder: str | Path, state_dict: dict[str, torch.Tensor] | None
) -> None:
    """Write the adapters of a `PeftModel` so that `AutoModelForCausalLM.from_pretrained(folder)` loads them.

    The predictor tokens' embeddings are left out, as an encoder is exported without its predictor: answers do not need
    them, and the model that the adapters belong to has no room for them. Checkpoints hold them. Where other tokens'
    embeddings were trained, all is left to peft.

    Args:
        state_dict: the weights, where they are sharded and the model does not hold them.
    """
    config = model.peft_config[model.active_adapter]
    known = set(tokenizer.convert_tokens_to_ids(predictor_tokens(MOST_PREDICTOR_TOKENS)))
    trained = config.trainable_token_indices
    if not isinstance(trained, list) or not set(trained) <= known:
        model.save_pretrained(folder, state_dict=state_dict)
        return
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, state_dict, model.active_adapter, save_embedding_layers=False)
    state = {name: value.contiguous() for name, value in state.items() if "trainable_tokens" not in name}
    state = {name: value for name, value in state.items() if "token_adapter" not in name}
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(state, Path(folder) / ADAPTER_FILE, metadata={"format": "pt"})
    alone = copy(config)
    alone.trainable_token_indices, alone.inference_mode = None, True
    alone.save_pretrained(folder)
