"""What every objective prepares for the trainer."""

from dataclasses import dataclass
from typing import Any

from ..masking.base_collator import MaskingCollator
from ..models.modeling_jepa import JepaForRepresentationPrediction
from ..utils.types import ProcessingClass


@dataclass
class Prepared:
    """All that a run needs, checked; nothing of it has been written.

    Args:
        model: the JEPA.
        collator: makes its batches.
        train_dataset, eval_dataset: what the collator reads; None where there is no evaluation.
        processing_class: tokenizer or image processor; None for feature vectors.
    """

    model: JepaForRepresentationPrediction
    collator: MaskingCollator
    train_dataset: Any
    eval_dataset: Any
    processing_class: ProcessingClass | None = None
