"""`BaseJepaTrainer`: losses per target, data loaders, evaluation over targets."""

import logging
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from typing import Any, cast

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainingArguments
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_utils import has_length
from transformers.training_args import OptimizerNames

from ..distributed import deepspeed_state
from ..errors import UsageError
from ..masking.base_collator import MaskingCollator
from . import data_loading, upstream
from .callbacks import MaskEpochCallback
from .console import ConsoleCallback
from .inputs import check_batch
from .metric_accumulator import MetricAccumulator
from .run_trainer import RunTrainer
from .stream_padding import PADDING_ROW_KEY, FixedBatchSizeCollator, PadStreamToMultiple

logger = logging.getLogger(__name__)


class BaseJepaTrainer(RunTrainer):
    """Base of the trainers: a `Trainer` whose loss is the mean over the targets of an update.

    Subclasses define a target (`count_targets`) and the logged metrics (`update_metrics`).
    """

    # Entries that a batch must have.
    batch_keys: tuple[str, ...] = ()
    _compares_rows = False

    def __init__(self, args: TrainingArguments, **kwargs: Any):
        super().__init__(args=args, **kwargs)
        if isinstance(self.data_collator, MaskingCollator):
            self.add_callback(MaskEpochCallback(self.data_collator, lambda: self._passes.passes))
        self.remove_callback(PrinterCallback if args.disable_tqdm else DEFAULT_PROGRESS_CALLBACK)
        self.add_callback(self.console_callback())
        # Saves DDP's copies of all gradients: 5 % of a compiled step.
        self.accelerator.ddp_handler.gradient_as_bucket_view = True
        if self.is_fsdp_enabled:
            self._check_fsdp(self.accelerator.state.fsdp_plugin)
        if self.is_deepspeed_enabled:
            config = self.accelerator.state.deepspeed_plugin.deepspeed_config
            deepspeed_state.validate_deepspeed_config(config, OptimizerNames(args.optim).value)
        # The loss needs no labels: without this, evaluation would report none.
        self.can_return_loss = True

    def _check_fsdp(self, plugin: FullyShardedDataParallelPlugin) -> None:
        """Refuse settings under which nothing can be trained or resumed, and set the precision.

        Raises:
            UsageError: FSDP1, or sharded checkpoints.
        """
        if plugin.fsdp_version != 2:
            raise UsageError("fsdp_version must be 2, as in configs/accelerate/fsdp2.yaml.")
        if "FULL" not in str(plugin.state_dict_type):
            # torch reads the metadata of a sharded checkpoint as a pickle, and Trainer writes no model at its end.
            raise UsageError("fsdp_state_dict_type must be FULL_STATE_DICT, as in configs/accelerate/fsdp2.yaml.")
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        if half is not None:
            # accelerate's policy would also reduce gradients in half precision, and cast the inputs and the loss.
            plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False
            )

    # ---- defined by subclasses

    @abstractmethod
    def count_targets(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Count the targets of one micro-batch, a scalar tensor."""

    def count_items(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Count the divisors of a micro-batch's loss: its targets, or `[n]` for n terms."""
        return self.count_targets(inputs)

    @staticmethod
    @abstractmethod
    def mask_rows(inputs: dict[str, torch.Tensor], own: torch.Tensor) -> None:
        """Remove the rows where `own`, bool `[B]`, is False from the loss, in place."""

    @abstractmethod
    def update_metrics(self, outputs: Any, inputs: dict[str, torch.Tensor], means: MetricAccumulator) -> None:
        """Add the logged metrics of one micro-batch to `means`."""

    @abstractmethod
    def console_callback(self) -> ConsoleCallback:
        """Return the callback that shows the progress of the run."""

    # ---- data

    def get_train_dataloader(self) -> DataLoader:
        """Like `Trainer`'s, with a generator of its own and workers that outlast signals.

        On several ranks a stream's batches have the same size.
        """
        with self._with_collator(MaskingCollator.for_training), data_loading.padded_stream(self):
            loader = data_loading.isolate_generator(super().get_train_dataloader(), self.args.seed)
        data_loading.keep_workers_through_signals(loader, self._training)
        return loader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Like `Trainer.get_eval_dataloader`, with masks that are the same in every evaluation.

        The loader has a generator of its own. Rows may be untokenized.
        """
        with self._evaluation_rows(eval_dataset) as rows:
            loader = super().get_eval_dataloader(rows)
        return data_loading.isolate_generator(loader, self.args.seed)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """Like `Trainer.get_test_dataloader`, with the masks of evaluations; rows may be untokenized."""
        with self._evaluation_rows(test_dataset) as rows:
            return super().get_test_dataloader(rows)

    @contextmanager
    def _evaluation_rows(self, dataset: Any) -> Iterator[Any]:
        """Yield tokenized rows for a loader that is built meanwhile.

        On several ranks streams are padded, and batches say which rows `prediction_step` leaves out.
        """
        if self._compares_rows:  # the training one may have changed: auto_find_batch_size, a trial
            self.args.per_device_eval_batch_size = upstream.loader_batch_size(self)
        rows = self.tokenize_rows(dataset)
        evaluated: Any = self.eval_dataset if rows is None or isinstance(rows, str) else rows
        if isinstance(rows, str):
            evaluated = evaluated[rows]
        with self._with_collator(MaskingCollator.for_evaluation):
            if self.args.world_size > 1 and not has_length(evaluated):
                size = self.args.eval_batch_size
                self.data_collator = FixedBatchSizeCollator(cast(Any, self.data_collator), size)
                rows = PadStreamToMultiple(evaluated, size * self.args.world_size)
            yield rows

    @contextmanager
    def _with_collator(self, change: Callable[[MaskingCollator], MaskingCollator]) -> Iterator[None]:
        """Give loaders that are built meanwhile a changed copy of a collator that masks."""
        collator = self.data_collator
        if isinstance(collator, MaskingCollator):
            self.data_collator = change(collator)
        try:
            yield
        finally:
            self.data_collator = collator

    # ---- micro-batches

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Collect the micro-batches of an update, and count its divisors.

        The last update of a stream's pass gets as many micro-batches as the others: `Trainer` would
        not end a shorter one, and add its gradients to the next pass's first update. Padded rows
        and micro-batches are removed from the loss.
        """
        batches = list(islice(epoch_iterator, num_batches))
        for batch in batches:
            is_padding = batch.pop(PADDING_ROW_KEY, None)
            if is_padding is not None:
                self.mask_rows(batch, ~is_padding)
        count = self._count_update(batches, device) if batches else None
        missing = num_batches - len(batches)
        if self._is_stream and batches and missing:
            empty = dict(batches[-1])
            self._keep_first_rows(empty, 0)
            batches += [empty] * missing
        return batches, count

    def _count_update(self, batches: list[dict[str, torch.Tensor]], device: torch.device) -> torch.Tensor:
        """Count the divisors of an update's loss, over rows that this epoch reads first.

        On several ranks accelerate fills up an epoch's last batches with rows of its first ones.
        """
        if self.args.world_size > 1 and self.accelerator.gradient_state.end_of_dataloader and self._last_update_size:
            size = len(next(iter(batches[-1].values())))
            rows = data_loading.own_rows(size, self._last_update_size, self.accelerator.process_index)
            self._keep_first_rows(batches[-1], rows)
        check_batch(batches[0], self.batch_keys)
        count = torch.stack([self.count_items(batch) for batch in batches]).sum(dim=0).to(device)
        self._targets = self._targets + count.sum()
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = self.accelerator.gather(count[None]).sum(dim=0)
        # Without any target the loss is 0, not 0 / 0.
        return count.clamp_min(1)

    def _keep_first_rows(self, inputs: dict[str, torch.Tensor], rows: int) -> None:
        """Remove all rows of a micro-batch but the first `rows` from the loss."""
        first = next(iter(inputs.values()))
        self.mask_rows(inputs, torch.arange(len(first), device=first.device) < rows)

    @property
    def _last_update_size(self) -> int:
        """Rows of all ranks in the last update of an epoch, 0 if it is full."""
        loader = self.callback_handler.train_dataloader
        return data_loading.rows_of_incomplete_update(loader, self.args.dataloader_drop_last)

    # ---- one update

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Run the model; with `num_items_in_batch` return this micro-batch's share of the loss.

        DDP averages gradients over ranks, so a share of the global sum is multiplied by the number of ranks.
        """
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        loss = outputs.loss
        processes = self.accelerator.num_processes
        if num_items_in_batch is not None and self.args.average_tokens_across_devices and processes > 1:
            loss = loss * processes
        if model.training:
            self.update_metrics(outputs, inputs, self._means["train"])
            self._means["train"].accumulate()
        return (loss, outputs) if return_outputs else loss

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager:
        """Autocast under FSDP2, because accelerate does not wrap the forward of a sharded model."""
        return self.accelerator.autocast() if self.is_fsdp_enabled else nullcontext()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Like `Trainer.create_optimizer`, without empty parameter groups.

        DeepSpeed drops them, and a checkpoint has the same groups however a run was started.
        """
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new:
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    # ---- evaluation

    def evaluate_in_training_batches(self, args: TrainingArguments) -> None:
        """Set the evaluation batch size to the training one, for losses that compare rows.

        Among fewer rows such a loss is lower, and not comparable with the training loss.
        """
        self._compares_rows = True
        if args.per_device_eval_batch_size == args.per_device_train_batch_size:
            return
        if args.process_index == 0:
            logger.warning(
                "evaluation uses batches of %d rows, as training does, instead of %d, because the loss compares the "
                "rows of a batch",
                args.per_device_train_batch_size,
                args.per_device_eval_batch_size,
            )
        args.per_device_eval_batch_size = args.per_device_train_batch_size

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        """Evaluate one batch; its tensors, of different shapes, are not gathered."""
        check_batch(inputs, self.batch_keys)
        inputs = upstream.to_device(self, inputs)
        is_padding = inputs.pop(PADDING_ROW_KEY, None)
        gradient_state, rows = self.accelerator.gradient_state, len(next(iter(inputs.values())))
        if is_padding is not None:
            rows = int((~is_padding).sum())
        elif gradient_state.end_of_dataloader:
            rows = data_loading.own_rows(rows, gradient_state.remainder, self.accelerator.process_index)
        # A rank without own rows also runs the model, because it takes part in collectives. Its one row is masked.
        inputs = {name: value[: max(rows, 1)] for name, value in inputs.items()}
        if self.args.world_size > 1 and (gradient_state.end_of_dataloader or is_padding is not None):
            self._keep_first_rows(inputs, rows)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs)
        if rows:
            self.update_metrics(outputs, inputs, self._means["eval"])
            self._means["eval"].accumulate()
        return outputs.loss.detach(), None, None

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Add the tracked means, over targets and not over batches, to the metrics."""
        self._means["eval"] = MetricAccumulator()
        output: Any = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        self.finish_evaluation(self._means["eval"])
        for name, value in self._means["eval"].compute_and_reset(self.accelerator).items():
            output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output

    def finish_evaluation(self, means: MetricAccumulator) -> None:
        """Add to `means` the metrics that are computed once, at the end of an evaluation."""
