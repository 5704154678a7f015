"""`jepa-hf export` of a language model: a plain model, into which adapters are merged."""

import argparse
import json
from pathlib import Path
from typing import Any, cast

from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from ..errors import UsageError
from ..hub.loading import load_or_usage_error
from ..llm_jepa.model_setup import is_adapter_dir
from .language_model_loading import load_lm_tokenizer


def is_language_model_dir(folder: Path) -> bool:
    """Return whether a directory holds a causal language model, or adapters of one."""
    if is_adapter_dir(str(folder)):
        return True
    if not (folder / CONFIG_NAME).is_file():
        return False
    try:
        architectures = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8")).get("architectures") or ()
    except (ValueError, AttributeError):  # reported by the loading of an encoder
        return False
    return any(name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for name in architectures)


def export_language_model(options: argparse.Namespace, target: Path) -> None:
    """Write the model of a checkpoint or of a finished run with its tokenizer, for `AutoModelForCausalLM`."""
    source = options.source
    if options.head or options.custom_code or options.onnx or options.encoder == "target":
        raise UsageError(
            f"{source!r} holds a language model, and --encoder, --head and --custom_code are for encoders, as --onnx "
            "is. Omit them."
        )
    tokenizer = load_lm_tokenizer("source", source, {}, None)
    model = load_or_usage_error(source, _load, {}, "source")
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _load(source: str) -> PreTrainedModel:
    if not is_adapter_dir(source):
        return AutoModelForCausalLM.from_pretrained(source)
    from peft import AutoPeftModelForCausalLM  # only adapters need peft

    adapted: Any = AutoPeftModelForCausalLM.from_pretrained(source)
    model = cast(PreTrainedModel, adapted.merge_and_unload())
    if (Path(source) / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(source)
    return model
