"""`GuardedTrainer`: ends a run whose loss or gradients are not finite."""

import math
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader

from ..errors import RunError, UsageError
from ..utils.counts import counted
from .checkpoint_trainer import CheckpointTrainer
from .data_loading import describe_samples
from .nonfinite_guard import NonFiniteGuard, NonFiniteUpdate


class GuardedTrainer(CheckpointTrainer):
    """A `Trainer` that skips an update that is not finite, saves the weights before it, and raises.

    Subclasses call `_check_last_update` where the host waits for the device anyway.
    """

    def __init__(self, **kwargs: Any):
        self._guard: NonFiniteGuard | None = None
        super().__init__(**kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Like `CheckpointTrainer.train`.

        Raises:
            UsageError: As by `CheckpointTrainer.train`.
            RunError: An update was not finite.
        """
        try:
            return super().train(*args, **kwargs)
        finally:
            self._guard = None

    # As in `CheckpointTrainer`; the guard needs the prepared model and optimizer.
    def _prepare_for_training(self, max_steps: int, train_dataloader: DataLoader, checkpoint: str | None) -> Any:
        """Like `CheckpointTrainer`'s, and build the non-finite guard."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, checkpoint)
        model = cast(nn.Module, self.model)
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        if not trained:
            raise UsageError("Nothing of the model is trained: no parameter has requires_grad. Unfreeze some.")
        # With a gradient scaler (fp16) such updates are regular: it skips them and lowers its
        # scale. DeepSpeed does not expose its gradients.
        unguarded = self.accelerator.scaler is not None or self.is_deepspeed_enabled
        self._guard = None if unguarded else NonFiniteGuard(self.optimizer.optimizer, trained)
        return prepared

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

    # Without clipping, this is the only method between backward and the optimizer that returns the
    # logged norm.
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
        """End a run whose last update was skipped, with a checkpoint of the weights before it.

        Raises:
            RunError: `update` is not None.
        """
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
