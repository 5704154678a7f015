"""Skip optimizer steps with a non-finite loss or gradient, and report them."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..distributed.sharding import local_shard
from .deferred_max import DeferredMax
from .upstream import norms, set_found_inf, supports_found_inf


class NonFiniteUpdate(NamedTuple):
    """Step of an update, first parameter (None: only the loss) and number of parameters that were not finite."""

    step: int
    parameter: str | None
    parameters: int


class NonFiniteGuard:
    """Inspect the loss and all gradients of an update before the optimizer's step.

    Nothing waits for the device: norms are compared there, and fused optimizer kernels skip this update and all later
    ones by the flag that `torch.amp.GradScaler` uses (`found_inf`). The host reads the result one update later, or
    before it logs, saves or ends. By then the run has counted the step, and the target encoder has averaged the
    unchanged context encoder once more; trained weights and optimizer states are bit for bit those before the update.
    An optimizer without fused kernels cannot skip by a flag, so there the host waits in every update.

    The norms also serve clipping (`clip`), so that gradients are not read twice. The norms of
    shards (`has_full_gradients` is False) are not the model's, so clipping is then left to `Trainer`.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Sequence[tuple[str, nn.Parameter]]):
        self.optimizer, self.parameters = optimizer, parameters
        self.needs_host_sync = not supports_found_inf(optimizer)
        device = parameters[0][1].device
        self._zero = torch.zeros((), device=device)
        self._skip = self._loss = self._zero
        self._deferred, self._step = DeferredMax(), 0
        self._names: list[str] = []
        self.has_full_gradients = not any(isinstance(parameter, DTensor) for _, parameter in parameters)
        self._norms = self._loss[None]
        # Numbered from the last parameter, so that the first one of all ranks is a maximum.
        self._reverse_index = torch.arange(len(parameters), 0, -1, device=device)

    def add_loss(self, loss: torch.Tensor) -> None:
        """Inspect the loss of one micro-batch."""
        self._loss = self._loss + loss.detach()  # NaN and inf persist in a sum

    @torch.no_grad()
    def inspect_gradients(self, step: int) -> NonFiniteUpdate | None:
        """Inspect the gradients of update `step`, before clipping and before the optimizer's step.

        Returns:
            The update before this one if it was not finite; where the host waits, also this one.
        """
        previous = self.poll()
        named_grads = [(name, local_shard(param.grad)) for name, param in self.parameters if param.grad is not None]
        self._names = [name for name, _ in named_grads]
        self._norms = norms([gradient for _, gradient in named_grads]) if named_grads else self._zero[None]
        bad, bad_loss = _is_nonfinite(self._norms), _is_nonfinite(self._loss)
        first = (bad * self._reverse_index[-len(bad) :]).amax()
        maxima = self._deferred.submit(torch.stack([bad_loss, first, bad.sum()]))
        self._skip = torch.maximum(self._skip, maxima.amax().clamp_max(1.0))
        self._loss, self._step = self._zero, step
        if self.needs_host_sync:
            return previous or self.poll()
        set_found_inf(self.optimizer, self._skip)
        return previous

    def clip(self, max_norm: float) -> torch.Tensor:
        """Clip the gradients that were inspected last, as `torch.nn.utils.clip_grad_norm_` does.

        Returns:
            Their norm before clipping, a scalar tensor.
        """
        norm = torch.linalg.vector_norm(self._norms)
        if max_norm < math.inf:
            torch.nn.utils.clip_grads_with_norm_([param for _, param in self.parameters], max_norm, norm)
        return norm

    def poll(self) -> NonFiniteUpdate | None:
        """Return the last inspected update if it was not finite, once; this may synchronize."""
        numbers = self._deferred.poll()
        if numbers is None or max(numbers) == 0:
            return None
        _, first, count = map(int, numbers)
        return NonFiniteUpdate(self._step, self._names[len(self._names) - first] if first else None, count)


def _is_nonfinite(values: torch.Tensor) -> torch.Tensor:
    """Return 1 where a value is not finite, else 0; x - x is faster than `isfinite`."""
    return (values - values).ne(0).float()
