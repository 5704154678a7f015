"""Export of a trained JEPA to directories that other tools load."""

import json
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UsageError
from ..models.configuration_feature_encoder import FeatureEncoderConfig
from ..models.configuration_jepa import JepaConfig
from ..models.mlm_head import masked_lm_head_layout
from ..models.modeling_feature_encoder import FeatureEncoderModel
from ..models.modeling_jepa import JepaForRepresentationPrediction
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

    A text encoder also loads as a `SentenceTransformer`. The feature encoder is saved with its
    code, so that it loads with `trust_remote_code=True` without jepa_hf.

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
        classes = ((FeatureEncoderConfig, "AutoConfig"), (FeatureEncoderModel, "AutoModel"))
        _save_with_code(encoder, output_dir, classes, weights)
    else:
        encoder.save_pretrained(output_dir, state_dict=weights)
    if processing_class is not None:
        processing_class.save_pretrained(output_dir)
    if isinstance(processing_class, PreTrainedTokenizerBase):
        max_length = cast(Any, model.encoder_adapter).max_length
        _write_sentence_transformers_files(Path(output_dir), encoder, processing_class, max_length)


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
    layout = masked_lm_head_layout(encoder.config)
    masked_lm = AutoModelForMaskedLM.from_config(encoder.config)
    state = {f"{layout.base}{name}": value for name, value in encoder.state_dict().items()}
    for source, target in (("dense", layout.dense), ("norm", layout.norm), ("bias", layout.bias)):
        for name, value in model.mlm_head.state_dict().items():
            if name == source or name.startswith(f"{source}."):
                state[target + name.removeprefix(source)] = value
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
    model: JepaForRepresentationPrediction,
    output_dir: str | Path,
    processing_class: ProcessingClass | None = None,
) -> None:
    """Write the full model with its code, for `trust_remote_code=True` without jepa_hf."""
    classes = ((JepaConfig, "AutoConfig"), (JepaForRepresentationPrediction, "AutoModel"))
    _save_with_code(model, output_dir, classes)
    if processing_class is not None:
        processing_class.save_pretrained(output_dir)


def _save_with_code(
    model: PreTrainedModel,
    output_dir: str | Path,
    classes: tuple[tuple[Any, str], ...],
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    """Save the model with its source files; `_auto_class` requests them and is reset afterwards."""
    try:
        for cls, auto_class in classes:
            cls._auto_class = auto_class
        model.save_pretrained(output_dir, state_dict=state_dict)
    finally:
        for cls, _ in classes:
            cls._auto_class = None
        model.config.auto_map = None
        del model.config.auto_map


def _write_sentence_transformers_files(
    folder: Path, encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> None:
    """Write the JSON files that make a plain encoder a mean-pooling SentenceTransformer."""
    files: dict[str, Any] = {
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        ],
        "sentence_bert_config.json": {
            "max_seq_length": min(max_length, tokenizer.model_max_length),
            "do_lower_case": False,
        },
        "1_Pooling/config.json": {
            "word_embedding_dimension": encoder.config.hidden_size,
            "pooling_mode_cls_token": False,
            "pooling_mode_mean_tokens": True,
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
        },
    }
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
