"""`Task`, the data that encoders are scored on, and its parts."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..data.arguments import check_at_least_one

Kind = Literal["labels", "similarity", "retrieval"]


@dataclass(frozen=True)
class Split:
    """Rows of a task.

    Args:
        samples: one list of samples, or for pairs two lists of the same length.
        targets: classes as strings `[N]`, or scores, float64 `[N]`; None for retrieval pairs.
    """

    samples: tuple[list[Any], ...]
    targets: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.samples[0])

    def rows(self, chosen: Iterable[int]) -> "Split":
        """Select rows by their numbers."""
        chosen = list(chosen)
        samples = tuple([side[row] for row in chosen] for side in self.samples)
        return Split(samples, None if self.targets is None else self.targets[chosen])


def require_targets(split: Split | None) -> np.ndarray:
    """Return the targets of a split that has to have them.

    Raises:
        ValueError: there is no split, or it has no targets.
    """
    if split is None or split.targets is None:
        raise ValueError("Expected a split with targets, got none.")
    return split.targets


@dataclass(frozen=True)
class Task:
    """Data that encoders are scored on.

    Args:
        name: name in tables.
        source: file, folder or Hub name that it was read from.
        kind: "labels" (linear probe and kNN), "similarity" (pairs with scores) or "retrieval" (pairs).
        modality: input of the encoder: "text", "images" or "features".
        test: rows that are scored.
        train: rows that probes are fitted on; None unless the kind is "labels".
        validation: rows to choose C of the linear probe on; None: part of `train`.
        feature_column_names: columns behind the features, by which an encoder finds its own; None
            for other modalities and for arrays.
    """

    name: str
    source: str
    kind: Kind
    modality: str
    test: Split
    train: Split | None = None
    validation: Split | None = None
    feature_column_names: tuple[str, ...] | None = None


@dataclass(frozen=True)
class TaskArguments:
    """Columns to read and maximum numbers of rows, the same for all tasks.

    Args:
        text_column_name: column with the text, or two columns, comma-separated, with the texts of
            retrieval pairs. Default: text or sentence, else the only column other than the label.
        label_column_name: column with the labels. Default: label, labels, class or target.
        feature_column_names: columns of features, comma-separated. Default: all numeric columns but the label.
        max_train_samples: draw this many training rows, stratified by class. Default: all.
        max_test_samples: draw this many test rows, stratified by class if they have labels. Default: all.
        seed: seed of the drawn and the held-out rows.

    Raises:
        UsageError: a maximum is not positive.
    """

    text_column_name: str | None = None
    label_column_name: str | None = None
    feature_column_names: str | None = None
    max_train_samples: int | None = None
    max_test_samples: int | None = None
    seed: int = 42

    def __post_init__(self) -> None:
        check_at_least_one(self, "max_train_samples", "max_test_samples")
