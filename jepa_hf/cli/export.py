"""`jepa-hf export`: a checkpoint or full model as a directory that transformers loads."""

import argparse
from pathlib import Path

from transformers import AutoImageProcessor

from ..errors import UsageError
from ..hub.averaging import average_with_start, check_share
from ..hub.export import JEPA_FOLDER, export_custom_code, export_encoder, export_masked_lm
from ..hub.loading import load_or_usage_error
from ..hub.onnx_export import check_onnx_installed, export_onnx
from ..models.configuration_jepa import JepaConfig
from ..models.modeling_jepa import JepaForRepresentationPrediction
from ..training.run_directory import check_has_model
from ..utils.atomic_files import atomic_write_dir
from ..utils.output_directory import check_output_dir
from ..utils.types import ProcessingClass
from .encoder_loading import load_tokenizer
from .export_llm import export_language_model, is_language_model_dir


def run(options: argparse.Namespace) -> None:
    """Check source and target, load the model, write the export."""
    target = check_output_dir(options.output_dir)
    if target.exists() and any(target.iterdir()):
        raise UsageError(f"output_dir {options.output_dir!r} is not empty; name a new directory")
    check_has_model("source", options.source)
    is_language_model = is_language_model_dir(Path(options.source))
    _check_average(options, is_language_model)
    if is_language_model:
        with atomic_write_dir(target) as new:
            export_language_model(options, new)
        print(f"written to {target}")
        return
    if options.onnx:
        check_onnx_installed()
    source = _find_jepa(Path(options.source))
    model = load_or_usage_error(str(source), JepaForRepresentationPrediction.from_pretrained, {})
    processing_class = _processing_class(source)
    is_trained = options.average is not None or options.head is not None  # the head was trained on the context encoder
    encoder = options.encoder or ("context" if is_trained else model.config.default_exported_encoder)
    if options.average is not None:
        average_with_start(model, encoder, options.average, options.start)
    with atomic_write_dir(target) as new:  # nothing is left of an export that fails or is interrupted
        if options.custom_code:
            export_custom_code(model, new, processing_class)
        elif options.onnx:
            export_onnx(model, new, processing_class, encoder)
        elif options.head:
            export_masked_lm(model, new, processing_class, encoder)
        else:
            export_encoder(model, new, processing_class, encoder)
    print(f"written to {target}")


def _check_average(options: argparse.Namespace, is_language_model: bool) -> None:
    """Refuse what does not go with an average of trained weights and the start's."""
    if options.average is None and options.start is not None:
        raise UsageError("start is read with --average only. Add --average 0.5, or leave --start out.")
    if options.average is None:
        return
    check_share(options.average)
    if options.custom_code or is_language_model:
        what = "--custom_code, which exports the full model" if options.custom_code else "a language model"
        raise UsageError(f"average is for an encoder, not for {what}. Leave --average out.")


def _processing_class(folder: Path) -> ProcessingClass | None:
    """Load the tokenizer or image processor saved with the model; a model of features has none."""
    if (folder / "tokenizer_config.json").is_file():
        return load_tokenizer("source", str(folder), {"trust_remote_code": False})
    if (folder / "preprocessor_config.json").is_file():
        return load_or_usage_error(
            str(folder), AutoImageProcessor.from_pretrained, {"trust_remote_code": False}, "source"
        )
    return None


def _find_jepa(folder: Path) -> Path:
    """Return the folder itself or its subfolder of the full model."""
    for candidate in (folder, folder / JEPA_FOLDER):
        if (candidate / "config.json").is_file():
            config, _ = JepaConfig.get_config_dict(candidate)
            if config.get("model_type") == JepaConfig.model_type:
                return candidate
    raise UsageError(f"{str(folder)!r} contains no full JEPA model; name a checkpoint-N, an out/jepa, or its out/")
