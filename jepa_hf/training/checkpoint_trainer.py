"""`CheckpointTrainer`: complete checkpoints, exact resumes, atomic final directories, no non-finite update."""

import logging
import math
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length

from ..distributed import deepspeed_state, fsdp_state
from ..errors import RunError, UsageError, one_line
from ..utils.atomic_files import atomic_write_dir
from ..utils.counts import counted
from . import checkpoint_io, upstream
from .callbacks import PassCallback
from .checkpoints import is_staging_checkpoint, remove_incomplete, rotate
from .data_loading import describe_samples
from .hub_trainer import HubTrainer
from .nonfinite_guard import NonFiniteGuard, NonFiniteUpdate

logger = logging.getLogger(__name__)


class CheckpointTrainer(HubTrainer):
    """A `Trainer` that resumes exactly, from complete checkpoints only.

    It skips an update that is not finite, saves the weights before it, and raises. Subclasses call
    `_check_last_update` where the host waits for the device anyway.

    Each private method of `Trainer` that is overridden here or in a subclass has a comment on why
    no public hook serves, and a contract in `test_upstream.py`.
    """

    optimizer: AcceleratedOptimizer

    def __init__(self, **kwargs: Any):
        self.resumed = False
        self._guard: NonFiniteGuard | None = None
        super().__init__(**kwargs)
        self.add_callback(PassCallback)

    # ---- resuming

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Like `Trainer.train`, but resume from complete checkpoints only: a path, or True for the newest one.

        Raises:
            UsageError: The checkpoint is incomplete, or there is none.
            RunError: An update was not finite.
        """
        checkpoint = checkpoint_io.resolve_checkpoint(self._output_dir, resume_from_checkpoint)
        if checkpoint is not None:
            checkpoint_io.check_states(self, Path(checkpoint))
        if self.args.should_save:
            remove_incomplete(self._output_dir)
        try:
            with checkpoint_io.pickles_as_usage_errors(checkpoint):
                return super().train(checkpoint, *args, **kwargs)
        finally:
            self._guard = None

    @property
    def _passes(self) -> PassCallback:
        return next(callback for callback in self.callback_handler.callbacks if isinstance(callback, PassCallback))

    @property
    def _is_stream(self) -> bool:
        return not has_length(self.train_dataset)

    # No public hook: `Trainer` computes the resumed position between two private methods.
    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, epochs: int, checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        """Like `Trainer`'s, which takes a stream's pass to last `max_steps`.

        A resumed stream continues in its own pass.

        Returns:
            Passes that have ended, and micro-batches of the current pass to skip.
        """
        passes, skipped = super()._init_training_state(max_steps, steps_per_epoch, epochs, checkpoint, trial)
        accumulated = self.args.gradient_accumulation_steps
        if self._is_stream and checkpoint is not None:
            callbacks = cast(dict[str, Any], self.state.stateful_callbacks)
            of_ranks = callbacks[PassCallback.__name__]["attributes"]["of_ranks"]
            passes, updates = of_ranks[self.args.process_index % len(of_ranks)]
            skipped = 0 if self.args.ignore_data_skip else updates * accumulated
            if skipped:  # the state of a stream of datasets lacks the rows in its shuffle buffer (datasets 5.2)
                logger.info(
                    "the stream is read again from the start of its pass: %s are skipped, which takes as long as "
                    "reading them did",
                    counted(skipped * self.args.train_batch_size, "row"),
                )
        self._passes.passes, self._passes.updates = passes, skipped // accumulated
        if self.state.global_step >= max_steps:
            # A run that was killed while it wrote its results: `Trainer` would do one more step.
            return epochs, 0
        return passes, skipped

    # No public hook lies between wrapping the model and loading a checkpoint into it.
    def _prepare_for_training(self, max_steps: int, train_dataloader: DataLoader, checkpoint: str | None) -> Any:
        """Like `Trainer`'s, but load sharded states from full ones, and build the non-finite guard."""
        sharded = checkpoint_io.sharded_states(self)
        try:
            prepared = super()._prepare_for_training(
                max_steps, train_dataloader, checkpoint if sharded is None else None
            )
        except ValueError as error:
            if "DeepSpeed config values" not in str(error):
                raise
            raise UsageError(one_line(error)) from None  # numbers that contradict the flags
        if sharded is not None and checkpoint is not None:
            self._load_from_checkpoint(checkpoint)
            checkpoint_io.load_sharded_optimizer(self, checkpoint, sharded)
            upstream.load_scaler(self, checkpoint)
        trained = [
            (name, parameter)
            for name, parameter in cast(nn.Module, self.model).named_parameters()
            if parameter.requires_grad
        ]
        if not trained:
            raise UsageError("Nothing of the model is trained: no parameter has requires_grad. Unfreeze some.")
        # With a gradient scaler (fp16) such updates are regular: it skips them and lowers its
        # scale. DeepSpeed does not expose its gradients.
        unguarded = self.accelerator.scaler is not None or self.is_deepspeed_enabled
        self._guard = None if unguarded else NonFiniteGuard(self.optimizer.optimizer, trained)
        return prepared

    # `Trainer` loads a sharded model only from the files that FSDP or DeepSpeed write themselves.
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._load_sharded(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.resumed = True

    # As above, at the end of training.
    def _load_best_model(self) -> None:
        if not self._load_sharded(cast(str, self.state.best_model_checkpoint)):
            super()._load_best_model()

    def _load_sharded(self, checkpoint: str) -> bool:
        """Load weights into a sharded model; return False where `Trainer` does it."""
        if checkpoint_io.sharded_states(self) is None:
            return False
        model: Any = self.model
        if self.is_fsdp_enabled:
            keys = fsdp_state.load_full_state_dict(model, checkpoint)
        elif checkpoint_io.saves_full_model(self):
            keys = deepspeed_state.load_full_state_dict(model, self.optimizer.optimizer, checkpoint)
        else:  # PEFT adapters under DeepSpeed
            with deepspeed_state.gathered_trainable_parameters(model, self.optimizer.optimizer):
                super()._load_from_checkpoint(checkpoint, model)
            return True
        unwrapped = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        checkpoint_io.check_keys(unwrapped, keys.missing_keys, keys.unexpected_keys)
        return True

    # ---- non-finite updates

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Like `Trainer.training_step`, and hand the loss to the non-finite guard."""
        loss = super().training_step(model, *args, **kwargs)
        if self._guard is not None:
            self._guard.add_loss(loss)
        return loss

    # `on_pre_optimizer_step` comes after clipping, which spreads a NaN to all gradients.
    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        self._inspect_gradients()
        guard = self._norm_guard()
        return super()._clip_grad_norm(model) if guard is None else guard.clip(self.args.max_grad_norm)

    # Without clipping, this is the only method between backward and the optimizer that returns the logged norm.
    def _get_grad_norm(self, model: nn.Module, grad_norm: torch.Tensor | None = None) -> Any:
        if grad_norm is None:
            self._inspect_gradients()
            guard = self._norm_guard()
            grad_norm = None if guard is None else guard.clip(math.inf)
        return super()._get_grad_norm(model, grad_norm)

    def _norm_guard(self) -> NonFiniteGuard | None:
        """Return the guard if it has the norms of full gradients."""
        has_full_gradients = self._guard is not None and self._guard.has_full_gradients and not self.is_fsdp_enabled
        return self._guard if has_full_gradients else None

    def _inspect_gradients(self) -> None:
        if self._guard is not None:
            self._raise_non_finite(self._guard.inspect_gradients(self.state.global_step + 1))

    def _check_last_update(self) -> None:
        """Raise if the last update was not finite. This synchronizes with the device."""
        if self._guard is not None:
            self._raise_non_finite(self._guard.poll())

    def _raise_non_finite(self, update: NonFiniteUpdate | None) -> None:
        """End a run whose last update was skipped, with a checkpoint of the weights before it."""
        if update is None:
            return
        self._guard = None  # raise once
        checkpoint = self._checkpoint_path()
        cast(nn.Module, self.model).zero_grad()
        self._write_checkpoint(checkpoint)
        subject = "The loss is" if update.parameter is None else f"The gradient of {update.parameter} is"
        others = f", like that of {counted(update.parameters - 1, 'more parameter')}," if update.parameters > 1 else ""
        samples = describe_samples(
            self.callback_handler.train_dataloader, update.step, self.args.gradient_accumulation_steps
        )
        raise RunError(
            f"{subject} not finite{others} in step {update.step} ({samples}). The step was skipped, and the weights "
            f"before it are in {checkpoint}. Start from them with --model_name_or_path, another --output_dir, and a "
            "lower --learning_rate or other data."
        )

    # ---- checkpoints and the final directory

    # `on_save` comes after `Trainer` has written in place, and has deleted older checkpoints.
    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint atomically, push it, and delete surplus ones.

        `Trainer`'s writes to the final path, and may delete the only complete checkpoint.
        """
        args, state = self.args, self.state
        if trial is None and self.hp_search_backend is None:
            self.store_flos()
        checkpoint = self._checkpoint_path(trial)
        if state.best_global_step:
            best = checkpoint.with_name(f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}")
            if best == checkpoint or best.is_dir():
                state.best_model_checkpoint = str(best)
        self._write_checkpoint(checkpoint)
        if args.push_to_hub:
            self.push_checkpoint(checkpoint)
        if args.should_save:
            best_one = [Path(state.best_model_checkpoint)] if state.best_model_checkpoint else []
            rotate(checkpoint.parent, args.save_total_limit, [checkpoint, *best_one])

    def _checkpoint_path(self, trial: Any = None) -> Path:
        return upstream.output_dir(self, trial) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"

    def _write_checkpoint(self, checkpoint: Path) -> None:
        self._passes.of_ranks = gather_object([(self._passes.passes, self._passes.updates)])
        size = self.model_nbytes + checkpoint_io.optimizer_bytes(self.optimizer)
        checkpoint_io.write_checkpoint(self, checkpoint, size)

    @property
    def model_nbytes(self) -> int:
        """Approximate size of the full model in bytes; the exported encoder is smaller."""
        model = cast(nn.Module, self.model)
        return checkpoint_io.tensor_bytes(*model.parameters(), *model.buffers())

    # `save_model` gathers sharded weights and then calls this with them.
    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Write a checkpoint's model, or the final directory (see `export_final_model`).

        `training_args.bin` is not written: it is a pickle, and nothing reads it.
        """
        if not self.args.should_save:
            return
        folder = Path(output_dir or self._output_dir)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if is_staging_checkpoint(folder.name):  # the staging directory of a checkpoint
            model.save_pretrained(folder, state_dict=state_dict)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
            return
        with atomic_write_dir(folder) as staging:
            self.export_final_model(model, str(staging), state_dict)
