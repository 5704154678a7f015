"""Data loaders: generators, workers, padded streams, rows of incomplete updates."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any, cast

import datasets
import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import DataLoader, SequentialSampler
from transformers import Trainer
from transformers.trainer_utils import has_length

from ..errors import UsageError
from .signals import install_worker_signal_handlers
from .stream_padding import FixedBatchSizeCollator, PadStreamToMultiple
from .upstream import loader_batch_size, row_sampler, torch_loader

# Maximum number of rows that a message about a failed update lists.
_MAX_LISTED_ROWS = 16


def isolate_generator(loader: DataLoader, seed: int) -> DataLoader:
    """Give a loader its own random generator.

    A loader draws a seed for its workers whenever it starts them. Persistent workers start once in
    an uninterrupted run, but once more after a resume: drawn from the global generator, that seed
    would change the dropout of all later steps.
    """
    torch_loader(loader).generator = torch.Generator().manual_seed(seed)
    return loader


def keep_workers_through_signals(loader: DataLoader, training: torch.Tensor) -> None:
    """Install `install_worker_signal_handlers` in the loader's workers, after its own `worker_init_fn`."""
    inner = torch_loader(loader)
    inner.worker_init_fn = partial(_start_worker, inner.worker_init_fn, training)


def _start_worker(init: Callable[[int], None] | None, training: torch.Tensor, worker: int) -> None:
    if init is not None:
        init(worker)
    install_worker_signal_handlers(training)


@contextmanager
def padded_stream(trainer: Trainer) -> Iterator[None]:
    """Make loaders that are built meanwhile pad a stream's last batches, see `stream_padding`.

    Only streams on several ranks need it. `train_dataset` and `data_collator` are replaced for the time being.
    """
    rows, collator = trainer.train_dataset, trainer.data_collator
    args, ranks = trainer.args, trainer.args.world_size
    if ranks > 1 and isinstance(rows, datasets.IterableDataset):
        batch_size = loader_batch_size(trainer)
        trainer.data_collator = FixedBatchSizeCollator(cast(Any, collator), batch_size)
        if rows.n_shards < ranks:  # otherwise accelerate gives each rank its own shards, which end separately
            trainer.train_dataset = PadStreamToMultiple(rows, batch_size * ranks)
        elif "epoch" in (args.eval_strategy, args.save_strategy, args.logging_strategy):
            raise UsageError(
                'Expected strategies "steps" or "no" for a stream whose shards are split among ranks, got "epoch" '
                "(eval_strategy, save_strategy or logging_strategy). Set it to steps."
            )
    try:
        yield
    finally:
        trainer.train_dataset, trainer.data_collator = rows, collator


# ---- rows that repeat others


def rows_of_incomplete_update(loader: Any, drop_last: bool) -> int:
    """Count the rows of all ranks in an epoch's last update; 0 for a full one and for streams.

    accelerate's `gradient_state.remainder` is lost when an epoch is resumed in its middle.
    """
    if drop_last or not has_length(loader.dataset):
        return 0
    return len(loader.dataset) % loader.total_batch_size


def own_rows(batch_size: int, remainder: int, rank: int) -> int:
    """Count the rows of a rank's last batch that are not repeated to fill it up.

    `remainder` is the number of rows of all ranks in the last batches; 0 or less if these are full.
    """
    return batch_size if remainder <= 0 else min(max(remainder - rank * batch_size, 0), batch_size)


# ---- samples of an update


def describe_samples(loader: Any, step: int, accumulation_steps: int) -> str:
    """Name the batches, and if possible the rows, that this rank read in update `step`."""
    length = len(loader) if has_length(loader) else None
    if length is None:
        first_batch = (step - 1) * accumulation_steps + 1
        return f"batches {first_batch} to {step * accumulation_steps} read from the stream"
    epoch, update = divmod(step - 1, math.ceil(length / accumulation_steps))
    first = update * accumulation_steps
    last = min(first + accumulation_steps, length)
    batches = f"batches {first + 1} to {last}" if accumulation_steps > 1 else f"batch {last}"
    description = f"{batches} of epoch {epoch + 1}"
    sampler = row_sampler(loader)
    if not isinstance(sampler, (SeedableRandomSampler, SequentialSampler)):
        return description
    if isinstance(sampler, SeedableRandomSampler):
        sampler.set_epoch(epoch)
    rows = [row for batch in islice(loader.batch_sampler, first, last) for row in batch]
    listed = ", ".join(map(str, rows[:_MAX_LISTED_ROWS])) + (", ..." if rows[_MAX_LISTED_ROWS:] else "")
    return f"{description}, training rows {listed} counted from 0"
