"""`jepa-hf export`: from a checkpoint or a full model to a directory that others load."""

from collections.abc import Sequence
from pathlib import Path

from transformers import AutoImageProcessor

from ..errors import UsageError
from ..hub.export import JEPA_FOLDER, export_custom_code, export_encoder, export_masked_lm
from ..hub.loading import load_pretrained
from ..models.configuration_jepa import JepaConfig
from ..models.modeling_jepa import JepaForRepresentationPrediction
from ..utils.types import ProcessingClass
from .console import complain, quiet_libraries
from .encoder_loading import load_tokenizer
from .parsing import CommandParser


def main(argv: Sequence[str]) -> int:
    """Export; returns the exit code."""
    quiet_libraries()
    parser = CommandParser(
        prog="jepa-hf export", description="Write what others load, from a checkpoint or a full model."
    )
    parser.add_argument("source", help="checkpoint-N, out/jepa, or an out/ that holds one")
    parser.add_argument("output_dir", help="directory to write, new or empty")
    parser.add_argument("--encoder", choices=("context", "target"), default="context", help="which encoder")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--head", choices=("mlm",), help="with the masked-language-model head, for AutoModelForMaskedLM")
    kind.add_argument(
        "--custom_code", action="store_true", help="the full model and its code, for use without jepa_hf installed"
    )
    try:
        options = parser.parse_args(argv)
        source = _find_jepa(Path(options.source))
        target = Path(options.output_dir)
        if any(place.exists() and not place.is_dir() for place in (target, *target.parents)):
            raise UsageError(f"output_dir {options.output_dir!r} is a file, or lies under one; name a new directory")
        if target.exists() and any(target.iterdir()):
            raise UsageError(f"output_dir {options.output_dir!r} is not empty; name a new directory")
        model = load_pretrained(str(source), JepaForRepresentationPrediction.from_pretrained, {})
        beside = _processing_class(source)
        if options.custom_code:
            export_custom_code(model, target, beside)
        elif options.head:
            export_masked_lm(model, target, beside, options.encoder)
        else:
            export_encoder(model, target, beside, options.encoder)
    except UsageError as error:
        return complain("jepa-hf export", error)
    print(f"written to {target}")
    return 0


def _processing_class(folder: Path) -> ProcessingClass | None:
    """The tokenizer or image processor that lies beside the model; feature vectors need none."""
    if (folder / "tokenizer_config.json").is_file():
        return load_tokenizer("source", str(folder), {"trust_remote_code": False})
    if (folder / "preprocessor_config.json").is_file():
        return load_pretrained(str(folder), AutoImageProcessor.from_pretrained, {"trust_remote_code": False}, "source")
    return None


def _find_jepa(folder: Path) -> Path:
    for candidate in (folder, folder / JEPA_FOLDER):
        if (candidate / "config.json").is_file() and _is_jepa(candidate):
            return candidate
    raise UsageError(f"{str(folder)!r} holds no full JEPA model; name a checkpoint-N, an out/jepa, or its out/")


def _is_jepa(folder: Path) -> bool:
    config, _ = JepaConfig.get_config_dict(folder)
    return config.get("model_type") == JepaConfig.model_type
