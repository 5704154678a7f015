"""Checks of a trainer's arguments and rows, before a run starts and after it has ended."""

from collections.abc import Collection, Iterator, Mapping
from itertools import islice
from typing import Any

import datasets
from transformers import EarlyStoppingCallback, TrainingArguments
from transformers.trainer_utils import has_length

from ..errors import RunError, UsageError
from ..masking.base_collator import MaskingCollator
from ..utils.counts import counted, evenly_spaced
from .inputs import is_packed

# Rows that `check_targets` collates at most, and at a time.
_MAX_ROWS, _BATCH_ROWS = 1024, 16


def check_arguments(args: TrainingArguments, kwargs: Mapping[str, Any]) -> None:
    """Refuse arguments of `Trainer` that would be ignored or would break a loss per target."""
    if args.n_gpu > 1:
        raise UsageError(
            f"DataParallel is not supported, but this process sees {args.n_gpu} GPUs. Launch with "
            "`accelerate launch run_jepa.py ...`, or set CUDA_VISIBLE_DEVICES=0."
        )
    if args.dataloader_persistent_workers and not args.dataloader_num_workers:
        raise UsageError(
            "dataloader_persistent_workers needs workers, got dataloader_num_workers 0. Set --dataloader_num_workers "
            "above 0, or --dataloader_persistent_workers false."
        )
    if args.world_size > 1 and args.train_sampling_strategy == "batch_rebalance":
        raise UsageError(
            "train_sampling_strategy batch_rebalance gives ranks batches of different sizes, whose samples cannot "
            "be compared across ranks. Use group_by_length."
        )
    if args.label_smoothing_factor:
        raise UsageError(
            "label_smoothing_factor is for a loss that Trainer computes, but the model computes its own. Leave it out."
        )
    for name in ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"):
        if kwargs.get(name) is not None:
            raise UsageError(
                f"{name} would not be called: the model computes the loss, and no predictions are gathered. Leave it "
                "out, and evaluate in a callback's on_evaluate."
            )


def check_run_length(args: TrainingArguments) -> None:
    """Refuse a run of no steps, which would leave an untrained model."""
    if args.max_steps == 0 or args.max_steps < -1:
        raise UsageError(
            f"max_steps must be at least 1, not {args.max_steps}. Leave it out to train for num_train_epochs."
        )
    if args.max_steps == -1 and not args.num_train_epochs > 0:
        raise UsageError(
            f"num_train_epochs must be above 0, not {args.num_train_epochs:g}. Raise it, or set max_steps."
        )


def check_train_rows(rows: Any, batch_size: int, drop_last: bool) -> None:
    """Refuse rows that give no batch."""
    if rows is None or (has_length(rows) and len(rows) == 0):
        raise UsageError("There are no rows to train on. Pass train_dataset=... to the trainer.")
    if drop_last and has_length(rows) and len(rows) < batch_size:
        rows_given = counted(len(rows), "row")
        raise UsageError(
            f"The training data has {rows_given}, fewer than a batch of {batch_size:,} on all processes, and "
            "dataloader_drop_last drops incomplete batches, so nothing would be trained. Lower "
            f"--per_device_train_batch_size, or set --dataloader_drop_last false."
        )


def check_batch_size(args: TrainingArguments, rows: Any) -> None:
    """Refuse batches of one sample for a contrastive term."""
    if args.train_batch_size * args.world_size < 2 and not is_packed(rows):
        raise UsageError(
            "contrastive_weight compares the samples of a batch with each other, and a batch here has one. Raise "
            "--per_device_train_batch_size, or set --contrastive_weight 0."
        )


def check_comparable(name: str, rows: Any) -> None:
    """Refuse a data set of one sample for a contrastive term."""
    for part in rows.values() if isinstance(rows, dict) else [rows]:
        if has_length(part) and len(part) == 1 and not is_packed(part):
            raise UsageError(
                f"contrastive_weight compares samples with each other, and {name} has one. Provide more rows "
                "(--validation_split_percentage says how many are held out), or set contrastive_weight 0."
            )


def check_best_metric(args: TrainingArguments, callbacks: Collection[Any], names: Collection[str]) -> None:
    """Check that evaluations measure `metric_for_best_model`."""
    metric, evaluates = args.metric_for_best_model, args.eval_strategy != "no"
    if any(isinstance(callback, EarlyStoppingCallback) for callback in callbacks) and (metric is None or not evaluates):
        raise UsageError(
            "EarlyStoppingCallback needs a metric of repeated evaluations. Set metric_for_best_model, and "
            "eval_strategy to steps or epoch."
        )
    if metric is None or not evaluates or not names:
        return
    name = metric.removeprefix("eval_")
    if name not in names:
        hint = " It needs --probe_task (in Python: JepaTrainer(probe=...))." if name.startswith("probe_") else ""
        raise UsageError(
            f"metric_for_best_model {metric!r} is not measured by this run's evaluations.{hint} Take one of: "
            f"{', '.join(sorted(names))}."
        )


def check_learned(steps: int, targets: int) -> None:
    """Refuse the result of a run that has learned nothing.

    Raises:
        RunError: No step was taken, or no row had a target.
    """
    if steps == 0:
        raise RunError(
            "The run took no step, because the training data gave no batch. Give it more rows, or lower "
            "--per_device_train_batch_size."
        )
    if targets == 0:
        raise RunError(
            f"No row had a target in {counted(steps, 'step')}, so the run learned nothing and its loss is 0. Check "
            "that tokenizer and data fit together, and that rows have at least two positions to mask."
        )


def check_targets(dataset: Any, collator: Any, name: str) -> None:
    """Check that some row of a data set has a target, from as few rows as possible.

    At most 1024 rows are collated: of a map-style data set evenly spaced ones, of a stream the first
    ones. Streams of other libraries, which may be read only once, are not checked.
    """
    if isinstance(dataset, dict):
        for part_name, part in dataset.items():
            check_targets(part, collator, f"{name} {part_name!r}")
        return
    if not isinstance(collator, MaskingCollator):
        return
    rows, count = _sample(dataset), 0
    while batch := list(islice(rows, _BATCH_ROWS)):
        if collator(batch)["target_valid"].any():
            return
        count += len(batch)
    if not count and isinstance(dataset, datasets.IterableDataset):
        raise UsageError(f"The stream of {name} has no rows. {collator.target_requirement}")
    if count:
        raise UsageError(
            f"None of {counted(count, 'row')} of the {name} has a target to predict. {collator.target_requirement}"
        )


def _sample(dataset: Any) -> Iterator[Any]:
    if isinstance(dataset, datasets.IterableDataset):
        return islice(iter(dataset), _MAX_ROWS)
    if not hasattr(dataset, "__len__"):
        return iter(())
    return (dataset[index] for index in evenly_spaced(len(dataset), _MAX_ROWS))
