"""Defaults of `JepaTrainer`'s arguments: processing class, collator, callbacks."""

from collections.abc import Sequence
from typing import Any, cast

from transformers import AutoImageProcessor, AutoTokenizer, BaseImageProcessor, PreTrainedTokenizerBase, TrainerCallback

from ..errors import UsageError
from ..masking.base_collator import MaskingCollator
from ..masking.block_collator import DataCollatorForBlockJEPA
from ..masking.feature_collator import DataCollatorForFeatureJEPA
from ..masking.span_collator import DataCollatorForSpanJEPA
from ..models.modeling_jepa import JepaForRepresentationPrediction
from ..utils.types import ProcessingClass
from .callbacks import EmaTargetCallback, WeightDecayCallback
from .training_args import JepaTrainingArguments


def load_processing_class(name: str, modality: str) -> ProcessingClass | None:
    """Load a model's tokenizer or image processor; feature vectors need none."""
    if modality == "features":
        return None
    return (AutoTokenizer if modality == "text" else AutoImageProcessor).from_pretrained(name)


def default_collator_class(modality: str) -> type[MaskingCollator]:
    """Return the class of the collator for a modality."""
    return {
        "text": DataCollatorForSpanJEPA,
        "images": DataCollatorForBlockJEPA,
        "features": DataCollatorForFeatureJEPA,
    }[modality]


def default_collator(
    model: JepaForRepresentationPrediction, processing_class: ProcessingClass | None, seed: int
) -> MaskingCollator:
    """Build the collator for the model's modality.

    Raises:
        UsageError: Texts without a tokenizer, or images without an image processor.
    """
    adapter, mode = model.encoder_adapter, model.config.masked_tokens
    config = cast(Any, adapter.config)
    if adapter.modality == "features":
        fill_values = cast(Any, model.context_encoder).feature_mean.numpy(force=True)
        return DataCollatorForFeatureJEPA(config, masked_tokens=mode, fill_values=fill_values, seed=seed)
    if processing_class is None:
        processor = "a tokenizer" if adapter.modality == "text" else "an image processor"
        raise UsageError(f"JepaTrainer needs {processor} (processing_class=...) or a data_collator.")
    if adapter.modality == "images":
        image_processor, grid = cast(BaseImageProcessor, processing_class), cast(tuple[int, int], adapter.grid)
        return DataCollatorForBlockJEPA(image_processor, grid, num_channels=config.num_channels, seed=seed)
    return DataCollatorForSpanJEPA(cast(PreTrainedTokenizerBase, processing_class), masked_tokens=mode, seed=seed)


def default_callbacks(
    callbacks: Sequence[type[TrainerCallback] | TrainerCallback],
    model: JepaForRepresentationPrediction,
    args: JepaTrainingArguments,
) -> list[type[TrainerCallback] | TrainerCallback]:
    """Add the callbacks for the target encoder and the weight decay to those of the user."""
    check_single_ema(callbacks)
    added: list[type[TrainerCallback] | TrainerCallback] = []
    if not any(map(_is_ema, callbacks)):
        ema = EmaTargetCallback(
            args.ema_decay,
            args.ema_decay_end,
            args.ema_schedule,
            pretrained=bool(model.config.name_or_path),
            default=model.config.ema_decay_range,
        )
        added.append(ema)
    added += callbacks
    if args.weight_decay_end is not None:
        added.append(WeightDecayCallback(args.weight_decay_end))
    return added


def _is_ema(callback: type[TrainerCallback] | TrainerCallback) -> bool:
    """Return whether an object or a class is an `EmaTargetCallback`: `Trainer` takes both."""
    return issubclass(callback if isinstance(callback, type) else type(callback), EmaTargetCallback)


def check_single_ema(callbacks: Sequence[type[TrainerCallback] | TrainerCallback]) -> None:
    """Refuse two callbacks that move the target encoder."""
    if sum(map(_is_ema, callbacks)) > 1:
        raise UsageError(
            "There is already an EmaTargetCallback; a second one would move the target encoder twice per step. Pass "
            "your own in JepaTrainer(callbacks=[...]) instead of adding it."
        )
