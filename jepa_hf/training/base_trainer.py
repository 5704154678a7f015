"""What every trainer here shares: counting targets, logging parts of the loss, whole checkpoints, exact resumes."""

import logging
import math
import os
import pickle  # nosec B403
import re
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import torch
from accelerate.data_loader import SeedableRandomSampler
from accelerate.utils import FullyShardedDataParallelPlugin, gather_object
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import DataLoader, SequentialSampler
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length

from ..distributed import deepspeed_state, fsdp_state
from ..errors import RunError, UsageError
from ..masking.base_collator import MaskingCollator
from ..utils.atomic_files import whole_files
from .callbacks import PassCallback
from .checkpoints import (
    STATE_FILE,
    aside,
    begin,
    check_checkpoint,
    how_to_go_on,
    is_left_behind,
    newest_whole,
    publish,
    remove_left_behind,
    rotate,
    writing,
)
from .hub_trainer import HubTrainer
from .metric_accumulator import RunningMeans
from .nonfinite_guard import NotFinite, UpdateGuard
from .signals import outlast_signals
from .stream_padding import WholeBatchCollator, WholeBatches

logger = logging.getLogger(__name__)

# What torch says of a loader's worker that was ended from outside.
_WORKER_DIED = re.compile(r"DataLoader worker \(pid")
# Of a failed update's rows, at most.
_ROWS_TOLD = 16


class RepresentationTrainer(HubTrainer):
    """Base of the trainers: a `Trainer` whose loss is a sum over targets divided by the targets of the whole update.

    Subclasses say what a target is (`count_targets`) and what is logged (`track`).
    """

    def __init__(self, model: nn.Module, args: TrainingArguments, **kwargs: Any):
        if args.n_gpu > 1:
            raise UsageError(
                f"one process sees {args.n_gpu} GPUs and would fall into DataParallel: start it with "
                "`accelerate launch run_jepa.py ...`, or show it one GPU with CUDA_VISIBLE_DEVICES=0"
            )
        if args.dataloader_persistent_workers and not args.dataloader_num_workers:
            raise UsageError(
                "dataloader_persistent_workers keeps workers from epoch to epoch, and there are none: give "
                "--dataloader_num_workers above 0, or --dataloader_persistent_workers false"
            )
        if args.world_size > 1 and args.train_sampling_strategy == "batch_rebalance":
            raise UsageError(
                "train_sampling_strategy batch_rebalance gives ranks batches of different sizes, whose samples cannot "
                "be compared across ranks: take group_by_length"
            )
        if args.label_smoothing_factor:
            raise UsageError(
                "label_smoothing_factor is for a loss that Trainer computes, which this is not: leave it out"
            )
        for name in ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"):
            if kwargs.get(name) is not None:
                raise UsageError(
                    f"{name} would not be called: the model computes the loss, and no predictions are gathered; leave "
                    "it out, and evaluate in a callback's on_evaluate"
                )
        self.resumed = False
        super().__init__(model=model, args=args, **kwargs)
        self.add_callback(PassCallback)
        # Of DDP: spares copies of all gradients, a twentieth of a compiled step.
        self.accelerator.ddp_handler.gradient_as_bucket_view = True
        if self.is_fsdp_enabled:
            self._check_fsdp(self.accelerator.state.fsdp_plugin)
        if self.is_deepspeed_enabled:
            deepspeed_state.check_config(self.accelerator.state.deepspeed_plugin.deepspeed_config, args.optim.value)
        # There is a loss without labels: otherwise evaluation would report none.
        self.can_return_loss = True
        self._means: dict[str, RunningMeans] = defaultdict(RunningMeans)
        # In shared memory: whether it trains, which workers ask when they are to go.
        self._training = torch.zeros(1, dtype=torch.uint8).share_memory_()
        self._tokens_seen: torch.Tensor | None = None
        self._guard: UpdateGuard | None = None

    def _check_fsdp(self, plugin: FullyShardedDataParallelPlugin) -> None:
        """Refuse what cannot be trained or resumed, and set the precision.

        Raises:
            UsageError: FSDP1, or checkpoints in shards.
        """
        if plugin.fsdp_version != 2:
            raise UsageError("fsdp_version must be 2, as in configs/accelerate/fsdp2.yaml")
        if "FULL" not in str(plugin.state_dict_type):
            # torch reads the description of such a checkpoint as a pickle, and Trainer writes no model at its end.
            raise UsageError("fsdp_state_dict_type must be FULL_STATE_DICT, as in configs/accelerate/fsdp2.yaml")
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        if half is not None:
            # accelerate's policy would add up gradients in it, and cast the loss and what the model reads.
            plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False
            )

    # ---- what a subclass says

    @abstractmethod
    def count_targets(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Number of targets of one micro-batch, a scalar tensor."""

    def count_items(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """What the loss is divided by, over the whole update: the targets; `[n]`, where several things are counted."""
        return self.count_targets(inputs)

    @abstractmethod
    def count_tokens(self, inputs: dict[str, torch.Tensor], padding: bool = False) -> torch.Tensor:
        """Number of tokens, patches or time steps of one micro-batch, with or without padding, a scalar tensor."""

    @staticmethod
    @abstractmethod
    def leave_out(inputs: dict[str, torch.Tensor], own: torch.Tensor) -> None:
        """Change a micro-batch so that nothing is learnt from the rows where `own`, bool `[B]`, is False."""

    @abstractmethod
    def track(self, outputs: Any, inputs: dict[str, torch.Tensor], means: RunningMeans) -> None:
        """Add what is logged about one micro-batch to `means`."""

    @property
    def found(self) -> dict[str, tuple[int, str]]:
        """What was found to be wrong with the run: by kind the first step and a sentence."""
        return {}

    @property
    def gave_up(self) -> bool:
        """Whether the run ended before its last step because of what was found."""
        return False

    # ---- data

    def get_train_dataloader(self) -> DataLoader:
        """As `Trainer`'s, but starting it draws nothing from the generator that dropout draws from.

        Its workers serve until the run has left, see `outlast_signals`. On several ranks a stream's batches are whole.
        """
        with self._whole_batches():
            loader = self._with_own_generator(super().get_train_dataloader())
        inner = _of_torch(loader)
        inner.worker_init_fn = partial(_start_worker, inner.worker_init_fn, self._training)
        return loader

    @contextmanager
    def _whole_batches(self) -> Iterator[None]:
        """Have a loader that is made meanwhile fill up a stream's last batches, see `stream_padding`.

        Raises:
            UsageError: ranks with shards of their own, and a strategy "epoch": their passes end at different times.
        """
        rows, collator, ranks = self.train_dataset, self.data_collator, self.args.world_size
        if ranks > 1 and isinstance(rows, datasets.IterableDataset):
            self._set_signature_columns_if_needed()  # while the collator is there to say what it reads
            self.data_collator = WholeBatchCollator(collator, self._train_batch_size, self.leave_out)
            if rows.n_shards < ranks:  # else accelerate gives each rank its own, which may end before those of others
                self.train_dataset = WholeBatches(rows, self._train_batch_size * ranks)
            elif "epoch" in (self.args.eval_strategy, self.args.save_strategy, self.args.logging_strategy):
                raise UsageError(
                    'Expected strategies "steps" or "no" for a stream whose shards the ranks divide, got "epoch" '
                    "(eval_strategy, save_strategy or logging_strategy). Set it to steps."
                )
        try:
            yield
        finally:
            self.train_dataset, self.data_collator = rows, collator

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As `Trainer`'s, but starting it draws nothing from the generator that dropout draws from."""
        return self._with_own_generator(super().get_eval_dataloader(eval_dataset))

    def _with_own_generator(self, loader: DataLoader) -> DataLoader:
        # A loader draws a seed for its workers whenever it starts them. Persistent ones start once in a whole run, but
        # once more after a resume: from the common generator, that would change the dropout of all later steps.
        _of_torch(loader).generator = torch.Generator().manual_seed(self.args.seed)
        return loader

    # ---- passes over the rows

    @property
    def _passes(self) -> PassCallback:
        return next(each for each in self.callback_handler.callbacks if isinstance(each, PassCallback))

    @property
    def _is_stream(self) -> bool:
        return not has_length(self.train_dataset)

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, epochs: int, checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        """As `Trainer`'s, but a resumed stream continues in its own pass: `Trainer` takes one for `max_steps` long.

        Returns:
            Passes that have ended, and micro-batches of the current pass to skip.
        """
        passes, skipped = super()._init_training_state(max_steps, steps_per_epoch, epochs, checkpoint, trial)
        accumulated = self.args.gradient_accumulation_steps
        if self._is_stream and checkpoint is not None:
            of_ranks = self.state.stateful_callbacks[PassCallback.__name__]["attributes"]["of_ranks"]
            passes, updates = of_ranks[self.args.process_index % len(of_ranks)]
            skipped = 0 if self.args.ignore_data_skip else updates * accumulated
        self._passes.passes, self._passes.updates = passes, skipped // accumulated
        return passes, skipped

    def _run_epoch(self, *args: Any, epoch: int, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            # Resumed after its last step, such as a run that was killed while it wrote its results: the inherited
            # method would do one more.
            self.control.should_training_stop = True
            return
        if isinstance(self.data_collator, MaskingCollator):
            self.data_collator.epoch = epoch
        super()._run_epoch(*args, epoch=epoch, **kwargs)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """As `Trainer`'s, but the last update of a stream's pass has as many micro-batches as the others.

        `Trainer` would not end an update with fewer, and add its gradients to the next pass's first one. Nothing is
        learned from the micro-batches that are added.
        """
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        missing = num_batches - len(batches)
        if self._is_stream and batches and missing:
            empty = dict(batches[-1])
            self._keep_rows(empty, 0)
            batches += [empty] * missing
        return batches, count

    # ---- one update

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | None:
        """What the loss of an update is divided by, counted over rows that this epoch has not read before: with several
        ranks accelerate fills up an epoch's last batches with rows of its first ones."""
        if not batch_samples:
            return None
        if self.args.world_size > 1 and self.accelerator.gradient_state.end_of_dataloader and self._incomplete:
            given = len(next(iter(batch_samples[-1].values())))
            self._keep_rows(batch_samples[-1], self._rows_of_its_own(given, self._incomplete))
        count = sum(self.count_items(batch) for batch in batch_samples).to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = self.accelerator.gather(count[None]).sum(dim=0)
        # An update without any target has a loss of 0, not of 0 / 0.
        return count.clamp_min(1)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Run the model; with `num_items_in_batch` its loss is this micro-batch's share of the update's.

        DDP averages gradients over ranks, so a share of the global sum is multiplied by their number.
        """
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        loss = outputs.loss
        processes = self.accelerator.num_processes
        if num_items_in_batch is not None and self.args.average_tokens_across_devices and processes > 1:
            loss = loss * processes
        if model.training:
            self.track(outputs, inputs, self._means["train"])
            self._means["train"].fold()
        return (loss, outputs) if return_outputs else loss

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager:
        """Autocast, where accelerate puts none around the model: around one that FSDP2 divides."""
        return self.accelerator.autocast() if self.is_fsdp_enabled else nullcontext()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As `Trainer`'s, but without a group that has no parameters.

        DeepSpeed drops such a one, and a checkpoint has the same groups however a run was started.
        """
        made = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if made:
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    # ---- an update that is not finite

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(model, *args, **kwargs)
        if self._guard is not None:
            self._guard.add_loss(loss)
        return loss

    def _prepare_for_training(self, max_steps: int, train_dataloader: DataLoader, checkpoint: str | None) -> Any:
        given = None if self.is_deepspeed_enabled else checkpoint  # the inherited method reads DeepSpeed's own alone
        try:
            prepared = super()._prepare_for_training(max_steps, train_dataloader, given)
        except ValueError as error:
            if "DeepSpeed config values" not in str(error):
                raise
            raise UsageError(" ".join(str(error).split())) from None  # numbers that contradict the flags
        if self.is_deepspeed_enabled and checkpoint is not None:
            self._load_from_checkpoint(checkpoint)
            self._load_optimizer_and_scheduler(checkpoint)
        trained = [(name, each) for name, each in self.model.named_parameters() if each.requires_grad]
        if not trained:
            raise UsageError("nothing of the model is trained: no parameter has requires_grad")
        # A gradient scaler (fp16) leaves such updates out as a matter of course, and goes on with a smaller scale.
        # DeepSpeed keeps its gradients to itself.
        unseen = self.accelerator.scaler is not None or self.is_deepspeed_enabled
        self._guard = None if unseen else UpdateGuard(self.optimizer.optimizer, trained)
        return prepared

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        self._look_at_update()  # before a NaN is spread by clipping
        return self._guard.clip(self.args.max_grad_norm) if self._knows_norms else super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: torch.Tensor | None = None) -> Any:
        if grad_norm is None:  # without clipping
            self._look_at_update()
            grad_norm = self._guard.clip(math.inf) if self._knows_norms else None
        return super()._get_grad_norm(model, grad_norm)

    @property
    def _knows_norms(self) -> bool:
        """Whether the guard looked at gradients that this rank has whole, so that their norm is the model's."""
        return self._guard is not None and self._guard.whole and not self.is_fsdp_enabled

    def _look_at_update(self) -> None:
        if self._guard is not None:
            self._refuse(self._guard.look(self.state.global_step + 1))

    def _refuse_last(self) -> None:
        """Ask what was found in the last update, where the host waits for the device anyway."""
        if self._guard is not None:
            self._refuse(self._guard.read())

    def _refuse(self, found: NotFinite | None) -> None:
        """End a run whose last update was left out, with a checkpoint of the weights before it.

        Raises:
            RunError: always, if anything was found.
        """
        if found is None:
            return
        self._guard = None  # told once
        checkpoint = Path(self._get_output_dir(None)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self.model.zero_grad()
        self._write_checkpoint(checkpoint)
        what = "the loss is" if found.parameter is None else f"the gradient of {found.parameter} is"
        others = f", like that of {found.parameters - 1} more parameters," if found.parameters > 1 else ""
        raise RunError(
            f"{what} not finite{others} in step {found.step} ({self._samples_of(found.step)}): the step was not taken, "
            f"and the weights before it are in {checkpoint}; start from them with --model_name_or_path, another "
            "--output_dir, and a lower --learning_rate or other data"
        )

    def _samples_of(self, step: int) -> str:
        """Which samples this rank read in an update, as far as that can be known afterwards."""
        loader, accumulated = self.callback_handler.train_dataloader, self.args.gradient_accumulation_steps
        if not has_length(loader):
            return f"batches {(step - 1) * accumulated + 1} to {step * accumulated} read from the stream"
        epoch, update = divmod(step - 1, math.ceil(len(loader) / accumulated))
        first, last = update * accumulated, min((update + 1) * accumulated, len(loader))
        told = (
            f"batches {first + 1} to {last} of epoch {epoch + 1}"
            if accumulated > 1
            else f"batch {last} of epoch {epoch + 1}"
        )
        batches = loader.batch_sampler
        sampler = getattr(getattr(batches, "batch_sampler", batches), "sampler", None)
        if not isinstance(sampler, (SeedableRandomSampler, SequentialSampler)):
            return told
        if isinstance(sampler, SeedableRandomSampler):
            sampler.set_epoch(epoch)
        rows = [row for batch in islice(batches, first, last) for row in batch]
        shown = ", ".join(map(str, rows[:_ROWS_TOLD])) + (", ..." if rows[_ROWS_TOLD:] else "")
        return f"{told}, training rows {shown} counted from 0"

    # ---- evaluation

    @staticmethod
    def _evaluate_in_training_batches(args: TrainingArguments) -> None:
        """Set the evaluation batch size to the training one, for losses that compare the rows of a batch.

        With fewer rows to compare such a loss is lower, and could not be compared with the training loss.
        """
        if args.per_device_eval_batch_size == args.per_device_train_batch_size:
            return
        if args.process_index == 0:
            logger.warning(
                "evaluation uses batches of %d rows, as training does, and not of %d, because the loss compares the "
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
        """One evaluation batch. Its loss is per target; its tensors, of differing shapes, are not gathered."""
        inputs = self._prepare_inputs(inputs)
        given = len(next(iter(inputs.values())))
        rows = self._rows_of_its_own(given, self.accelerator.gradient_state.remainder)
        # A rank without any runs the model too, because the others wait for it inside. Its one row is left out.
        inputs = {name: value[: max(rows, 1)] for name, value in inputs.items()}
        if self.args.world_size > 1 and self.accelerator.gradient_state.end_of_dataloader:
            self._keep_rows(inputs, rows)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs)
        if rows:
            self.track(outputs, inputs, self._means["eval"])
            self._means["eval"].fold()
        return outputs.loss.detach(), None, None

    @property
    def _incomplete(self) -> int:
        """Samples in the last update of an epoch, of all ranks, where it is not whole; else 0. A stream has no length.

        Not what accelerate tells, which forgets it where an epoch is resumed in its middle.
        """
        loader = self.callback_handler.train_dataloader
        if self.args.dataloader_drop_last or not has_length(loader.dataset):
            return 0
        return len(loader.dataset) % loader.total_batch_size

    def _keep_rows(self, inputs: dict[str, torch.Tensor], rows: int) -> None:
        """Leave out all rows of a micro-batch but the first `rows`, see `leave_out`."""
        first = next(iter(inputs.values()))
        self.leave_out(inputs, torch.arange(len(first), device=first.device) < rows)

    def _rows_of_its_own(self, batch_size: int, remainder: int) -> int:
        """How many rows of this rank's batch are no repetitions, which fill the last batches up to the same size.

        Args:
            remainder: samples in the last batches of all ranks; 0 or less where they are whole.
        """
        if not self.accelerator.gradient_state.end_of_dataloader or remainder <= 0:
            return batch_size
        return min(max(remainder - self.accelerator.process_index * batch_size, 0), batch_size)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Adds the tracked means, over targets and not over batches, to the metrics."""
        self._means["eval"] = RunningMeans()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        self.finish_evaluation(self._means["eval"])
        for name, value in self._means["eval"].flush(self.accelerator).items():
            output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output

    def finish_evaluation(self, means: RunningMeans) -> None:
        """Add to `means` what is computed once, at the end of an evaluation."""

    # ---- logging

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the tracked means since the last log. It waits for the device, so a failed update is told here."""
        self._refuse_last()
        self._count_tokens()
        if "loss" in logs:
            logs = {**logs, **self.training_logs()}
        super().log(logs, start_time)

    def training_logs(self) -> dict[str, float]:
        """What is logged beside the training loss."""
        return self._means["train"].flush(self.accelerator)

    def _track_num_input_tokens(self, inputs: dict[str, torch.Tensor]) -> None:
        # The inherited method reads the number back from the device on every micro-batch.
        counted = self.args.include_num_input_tokens_seen
        if counted == "no":
            return
        tokens = self.count_tokens(inputs, padding=counted == "all")
        self._tokens_seen = tokens if self._tokens_seen is None else self._tokens_seen + tokens

    def _count_tokens(self) -> None:
        if self._tokens_seen is not None:
            self.state.num_input_tokens_seen += int(self.accelerator.reduce(self._tokens_seen, reduction="sum").item())
            self._tokens_seen = None

    # ---- checkpoints and the final directory

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer`'s, but it resumes from whole checkpoints only.

        Args:
            resume_from_checkpoint: a checkpoint, or True for the newest whole one in `args.output_dir`; a warning tells
                which newer ones were passed over and why.
            args, kwargs: as `Trainer.train` takes them.

        Raises:
            UsageError: the checkpoint is not whole, or there is none.
        """
        run_dir = Path(self.args.output_dir)
        if resume_from_checkpoint is True:
            newest, passed_over = newest_whole(run_dir)
            for sentence in passed_over:
                logger.warning(sentence)
            if newest is None:
                raise UsageError(f"output_dir {str(run_dir)!r} holds no whole checkpoint to resume from")
            resume_from_checkpoint = str(newest)
        elif resume_from_checkpoint:
            check_checkpoint(resume_from_checkpoint)
        if resume_from_checkpoint:
            self._check_states(Path(resume_from_checkpoint))
        if self.args.should_save:
            remove_left_behind(run_dir)
        self._means["train"] = RunningMeans()
        self._training.fill_(1)
        try:
            output = super().train(resume_from_checkpoint, *args, **kwargs)
            self._end_workers()
            return output
        except RuntimeError as error:
            if not _WORKER_DIED.match(str(error)):
                raise
            raise RunError(
                f"a worker of the data loader died ({' '.join(str(error).split())}): one that takes too much memory is "
                f"ended by the system; {how_to_go_on(run_dir, 'lower --dataloader_num_workers if so, and')}"
            ) from error
        finally:
            self._guard = None
            self._training.fill_(0)

    def _end_workers(self) -> None:
        """End the training's persistent workers, whom nobody asks again: the next training makes a loader of its own.

        Torch waits five seconds for each whose loader is left to be garbage.
        """
        loader = _of_torch(self.callback_handler.train_dataloader)
        if loader._iterator is not None:
            loader._iterator._shutdown_workers()
            loader._iterator = None  # who iterates over this loader all the same gets new ones

    def _check_states(self, checkpoint: Path) -> None:
        """Refuse a checkpoint without optimizer states: Trainer would go on with fresh ones.

        Raises:
            UsageError: it has none, because it was written with `save_only_model`, or has them in DeepSpeed's own form.
        """
        trainers_own = self.is_fsdp_enabled and self._divided_states is None
        if not trainers_own and not (checkpoint / OPTIMIZER_NAME).is_file():
            raise UsageError(
                f"{checkpoint} holds no {OPTIMIZER_NAME} to resume from: start from the weights there with "
                "--model_name_or_path and another --output_dir"
            )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint, whole or not at all (see `checkpoints`); push it; delete those that are too many.

        The inherited method writes to where it will be looked for, and may delete the only whole one.
        """
        args, state = self.args, self.state
        self._refuse_last()
        self._count_tokens()
        if trial is None and self.hp_search_backend is None:
            self.store_flos()
        run_dir = Path(self._get_output_dir(trial))
        checkpoint = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if state.best_global_step:
            best = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
            if best == checkpoint or best.is_dir():
                state.best_model_checkpoint = str(best)
        self._write_checkpoint(checkpoint)
        if args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint))
        if args.should_save:
            best_one = [Path(state.best_model_checkpoint)] if state.best_model_checkpoint else []
            rotate(run_dir, args.save_total_limit, [checkpoint, *best_one])

    def _write_checkpoint(self, checkpoint: Path) -> None:
        """Every rank writes its parts aside; then one makes them the checkpoint."""
        with writing(checkpoint, checkpoint.parent, self._checkpoint_bytes):
            if self.args.should_save:
                begin(checkpoint)
            self.accelerator.wait_for_everyone()
            self._write_parts(str(aside(checkpoint)))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                publish(checkpoint)
            self.accelerator.wait_for_everyone()

    @property
    def _checkpoint_bytes(self) -> int:
        """What a checkpoint takes on the disk, about: weights and optimizer."""
        moments = (value for each in self.optimizer.state.values() for value in each.values())
        moments = (value for value in moments if isinstance(value, torch.Tensor))
        return self.result_bytes + sum(value.numel() * value.element_size() for value in moments)

    @property
    def result_bytes(self) -> int:
        """What the full model takes on the disk, about; the plain encoder beside it takes less."""
        tensors = (*self.model.parameters(), *self.model.buffers())
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _write_parts(self, folder: str) -> None:
        """Write this rank's parts of a checkpoint."""
        self._passes.of_ranks = gather_object([(self._passes.passes, self._passes.updates)])
        self.save_model(folder, _internal_call=True)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(folder)
            self._save_scaler(folder)
            self._save_rng_state(folder)
        if self.args.should_save:
            states = defaultdict(list)
            for callback in (*self.callback_handler.callbacks, self.control):
                if isinstance(callback, ExportableState):
                    states[type(callback).__name__].append(callback.state())
            # As Trainer reads them: a list only of several.
            self.state.stateful_callbacks = {name: each if each[1:] else each[0] for name, each in states.items()}
            self.state.save_to_json(os.path.join(folder, STATE_FILE))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._divided_states is None:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # The inherited method writes what only FSDP or DeepSpeed reads, and the weights a second time.
        state = self._divided_states.whole_optimizer_state(self.optimizer.optimizer, self.args.should_save)
        if self.args.should_save:
            torch.save(state, os.path.join(output_dir, OPTIMIZER_NAME))
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _refusing_pickles(checkpoint, "optimizer or scheduler"):
            if checkpoint is None or self._divided_states is None:
                super()._load_optimizer_and_scheduler(checkpoint)
                return
            optimizer, scheduler = (
                torch.load(os.path.join(checkpoint, name), map_location="cpu", weights_only=True)
                for name in (OPTIMIZER_NAME, SCHEDULER_NAME)
            )
        self._divided_states.load_optimizer_state(self.optimizer.optimizer, optimizer)
        self.lr_scheduler.load_state_dict(scheduler)

    @property
    def _divided_states(self) -> ModuleType | None:
        """What writes the optimizer's states whole, and reads them, where they are divided; None where Trainer does.

        Trainer does it also under FSDP2 with PEFT's adapters.
        """
        if self.is_deepspeed_enabled:
            return deepspeed_state
        return fsdp_state if self.is_fsdp_enabled and self._is_saved_whole else None

    @property
    def _is_saved_whole(self) -> bool:
        """Whether checkpoints hold all weights, and not PEFT's adapters alone."""
        return isinstance(self.accelerator.unwrap_model(self.model, keep_torch_compile=False), PreTrainedModel)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with _refusing_pickles(checkpoint, "gradient scaler"):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _refusing_pickles(checkpoint, "random state"):
            super()._load_rng_state(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        described = next(Path(resume_from_checkpoint).rglob(".metadata"), None)
        if described is not None:
            raise UsageError(
                f"{described} is a pickle, which can run any program: it is not loaded; take a checkpoint that was "
                "written with fsdp_state_dict_type FULL_STATE_DICT"
            )
        with _refusing_pickles(resume_from_checkpoint, "weights"):
            if not self._load_divided(resume_from_checkpoint):
                super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.resumed = True

    def _load_best_model(self) -> None:
        if not self._load_divided(self.state.best_model_checkpoint):
            super()._load_best_model()

    def _load_divided(self, checkpoint: str) -> bool:
        """Load weights into a model that is divided; False where Trainer does it."""
        if self._divided_states is None:
            return False
        if self.is_fsdp_enabled:
            self._issue_warnings_after_load(fsdp_state.load_weights(self.model, checkpoint))
        elif self._is_saved_whole:
            self._issue_warnings_after_load(
                deepspeed_state.load_weights(self.model, self.optimizer.optimizer, checkpoint)
            )
        else:
            with deepspeed_state.whole_trained(self.model, self.optimizer.optimizer):
                super()._load_from_checkpoint(checkpoint, self.model)
        return True

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # The inherited method warns, and trains on with what is missing at random.
        tied = set(self.accelerator.unwrap_model(self.model, keep_torch_compile=False).all_tied_weights_keys)
        lost = [name for name in load_result.missing_keys if name not in tied] + load_result.unexpected_keys
        if lost:
            raise UsageError(
                f"the checkpoint to resume from holds another model: {', '.join(lost[:3])} differ; start over, or name "
                "it as --model_name_or_path"
            )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Write a checkpoint (the full model at its root), or the final directory (see `write_final`).

        `training_args.bin` is not written: it is a pickle, and nothing reads it.
        """
        if not self.args.should_save:
            return
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if is_left_behind(folder.name):  # a checkpoint that is being written
            model.save_pretrained(folder, state_dict=state_dict)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
            return
        with whole_files(folder) as new:
            self.write_final(model, str(new), state_dict)


def _of_torch(loader: Any) -> DataLoader:
    """Torch's own loader, below what accelerate puts around it."""
    return getattr(loader, "base_dataloader", loader)


def _start_worker(begin: Callable[[int], None] | None, training: torch.Tensor, worker: int) -> None:
    if begin is not None:
        begin(worker)
    outlast_signals(training)


@contextmanager
def _refusing_pickles(checkpoint: str | None, what: str) -> Iterator[None]:
    """Say in a sentence that part of a checkpoint asks for more than numbers, which torch finds (`weights_only`).

    Raises:
        UsageError: it does.
    """
    try:
        yield
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        why = f"it asks for {asked[1]}" if asked else "but a pickle"
        raise UsageError(
            f"the {what} in {checkpoint} is not only numbers ({why}), which can run any program: it is not "
            "loaded; take a checkpoint from a source that you trust"
        ) from None
