"""The fixed batch on which health is measured during training."""

from collections.abc import Iterable
from typing import Any

import torch

from ..masking.base_collator import MaskingCollator
from .inputs import check_batch
from .upstream import signature_columns

# Samples of the fixed batch.
_HEALTH_SAMPLES = 128


def health_batches(trainer: Any) -> list[dict[str, torch.Tensor]]:
    """Collate the first 128 evaluation samples, else training samples, with fixed masks.

    A packed row holds several samples.
    """
    rows: Any = trainer.eval_dataset if trainer.eval_dataset is not None else trainer.train_dataset
    if isinstance(rows, dict):
        rows = next(iter(rows.values()))
    collator, size = trainer.data_collator, trainer.args.per_device_train_batch_size
    # As a loader: a collator of the user may read columns that the model does not.
    first = _first_rows(rows, signature_columns(trainer) if trainer.args.remove_unused_columns else None)
    if isinstance(collator, MaskingCollator):
        collator = collator.for_evaluation()
    batches = [collator(first[start : start + size]) for start in range(0, len(first), size)]
    for batch in batches[:1]:
        check_batch(batch, trainer.batch_keys)
    return batches


def _first_rows(rows: Iterable[dict[str, Any]], columns: list[str] | None) -> list[dict[str, Any]]:
    first: list[dict[str, Any]] = []
    samples = 0
    for row in rows:
        first.append(row if columns is None else {name: row[name] for name in columns if name in row})
        samples += row["document_ids"][-1] + 1 if "document_ids" in row else 1
        if samples >= _HEALTH_SAMPLES:
            break
    return first
