"""Export of a trained JEPA to directories that other tools load."""

import inspect
import json
import shutil
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import get_relative_import_files

from ..distributed.deepspeed_state import zero3_init_disabled
from ..errors import UsageError
from ..models.encoders import untrained_pooler
from ..models.mlm_head import masked_lm_state
from ..models.modeling_feature_encoder import FeatureEncoderModel
from ..models.modeling_jepa import JepaForRepresentationPrediction
from ..models.sentence_transformers_files import sentence_transformers_files
from ..utils.types import ProcessingClass

JEPA_FOLDER = "jepa"
TARGET_FOLDER = "target_encoder"


def export_encoder(
    model: JepaForRepresentationPrediction,
    output_dir: str | Path,
    processing_class: ProcessingClass | None = None,
    which: str = "context",
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a plain encoder with its tokenizer or image processor, loadable by `AutoModel`.

    A text encoder also loads as a `SentenceTransformer`, with the settings of a start that was
    one. The feature encoder is saved with its code, so that it loads with
    `trust_remote_code=True` without jepa_hf. The pooler is that of the pretrained start; see
    `untrained_pooler` for other starts.

    Args:
        model: the trained model.
        output_dir: directory to write to.
        processing_class: tokenizer or image processor.
        which: "context" or "target".
        state_dict: the full model's weights; needed if `model`'s own are sharded.
    """
    weights = None
    if state_dict is not None:
        prefix = f"{which}_encoder."
        weights = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
    encoder = model.merged_encoder(which, weights)
    if model.config.lora is not None:
        weights = None  # the merged copy holds them
    if isinstance(encoder, FeatureEncoderModel):
        _save_with_code(encoder, output_dir, weights)
    else:
        with zero3_init_disabled():
            pooler = {} if model.config.add_pooling_layer else untrained_pooler(encoder)
        if pooler:
            weights = {**(encoder.state_dict() if weights is None else weights), **pooler}
        encoder.save_pretrained(output_dir, state_dict=weights)
    if processing_class is not None:
        processing_class.save_pretrained(output_dir)
    if isinstance(processing_class, PreTrainedTokenizerBase):
        max_length = min(cast(Any, model.encoder_adapter).max_length, processing_class.model_max_length)
        files = sentence_transformers_files(model.config.sentence_transformers, model.config.hidden_size, max_length)
        for name, content in files.items():
            path = Path(output_dir) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def export_run(
    model: JepaForRepresentationPrediction,
    output_dir: str | Path,
    processing_class: ProcessingClass | None = None,
    which: str = "context",
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a run's final layout: the plain encoder at the root, the full model under `jepa/`.

    Args:
        model: the trained model.
        output_dir: directory to write to.
        processing_class: tokenizer or image processor.
        which: encoder at the root, "context" or "target"; "both" adds the target encoder under
            `target_encoder/`.
        state_dict: the full model's weights; needed if `model`'s own are sharded.
    """
    output_dir = Path(output_dir)
    export_encoder(model, output_dir, processing_class, "target" if which == "target" else "context", state_dict)
    if which == "both":
        export_encoder(model, output_dir / TARGET_FOLDER, processing_class, "target", state_dict)
    model.save_pretrained(output_dir / JEPA_FOLDER, state_dict=state_dict)
    if processing_class is not None:
        processing_class.save_pretrained(output_dir / JEPA_FOLDER)


def export_masked_lm(
    model: JepaForRepresentationPrediction,
    output_dir: str | Path,
    processing_class: ProcessingClass | None = None,
    which: str = "context",
) -> None:
    """Write the encoder with its masked-language-model head, loadable by `AutoModelForMaskedLM`.

    Raises:
        UsageError: the model has no such head.
    """
    if model.mlm_head is None:
        raise UsageError(
            "This model was trained without a masked-language-model head; train it with --mlm_weight above 0."
        )
    encoder = model.merged_encoder(which)
    masked_lm = AutoModelForMaskedLM.from_config(encoder.config)
    state = masked_lm_state(encoder.state_dict(), model.mlm_head, encoder.config)
    result = masked_lm.load_state_dict(state, strict=False)
    tied_keys = set(masked_lm.all_tied_weights_keys)
    mismatched_keys = [name for name in result.missing_keys if name not in tied_keys] + result.unexpected_keys
    if mismatched_keys:
        raise RuntimeError(
            "Expected the same weights in the masked language model and in the JEPA, got differences in "
            f"{', '.join(mismatched_keys[:3])}."
        )
    masked_lm.tie_weights()
    masked_lm.save_pretrained(output_dir)
    if processing_class is not None:
        processing_class.save_pretrained(output_dir)


def export_custom_code(
    model: JepaForRepresentationPrediction, output_dir: str | Path, processing_class: ProcessingClass | None = None
) -> None:
    """Write the full model with its code, for `trust_remote_code=True` without jepa_hf."""
    _save_with_code(model, output_dir)
    if processing_class is not None:
        processing_class.save_pretrained(output_dir)


def _save_with_code(
    model: PreTrainedModel, output_dir: str | Path, state_dict: dict[str, torch.Tensor] | None = None
) -> None:
    """Save the model with its source files and their names in the configuration's `auto_map`."""
    config, source_file = model.config, inspect.getfile(type(model))
    config.auto_map = {"AutoConfig": _file_and_class(config), "AutoModel": _file_and_class(model)}
    try:
        model.save_pretrained(output_dir, state_dict=state_dict)
    finally:
        del config.auto_map
    for file in (source_file, *get_relative_import_files(source_file)):
        shutil.copyfile(file, Path(output_dir) / Path(file).name)


def _file_and_class(value: Any) -> str:
    """Return the name of an object's class as `auto_map` has it, such as "modeling_jepa.Jepa"."""
    return f"{type(value).__module__.rpartition('.')[2]}.{type(value).__name__}"
