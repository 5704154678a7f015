"""An update whose loss or gradients are not finite is left out, and told."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .deferred_max import LateMaximum


@dataclass(frozen=True)
class NotFinite:
    """What was wrong with an update.

    Args:
        step: its number; the run's first is 1.
        parameter: the first parameter whose gradient held a NaN or an inf; None where only the loss did.
        parameters: how many parameters' gradients did.
    """

    step: int
    parameter: str | None
    parameters: int


class UpdateGuard:
    """Looks at the loss and at every gradient of an update before the optimizer does.

    Nothing waits for the device: norms are compared there, and an optimizer with fused kernels is told there to leave
    the update out, as `torch.amp.GradScaler` tells it (`found_inf`), and all later ones too. The host reads one update
    later what was found, or before it logs, saves or ends. By then the run has counted the step, and the target encoder
    has taken in the context encoder's unchanged weights once more; what is trained and the optimizer are bit for bit
    what they were before. An optimizer without fused kernels cannot be told so: there the host waits in every update.

    The norms serve clipping too (`clip`), so that gradients are read no more often than without a guard; where they
    are shards (`whole` is False) a total takes the ranks, and clipping is left to those who know them.

    Args:
        optimizer: the bare one, without what accelerate puts around it.
        parameters: those that are trained, by name.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Sequence[tuple[str, nn.Parameter]]):
        self.optimizer, self.parameters = optimizer, parameters
        # As GradScaler asks.
        self.waits = not getattr(optimizer, "_step_supports_amp_scaling", False)
        device = parameters[0][1].device
        self._zero = torch.zeros((), device=device)
        self._found = self._loss = self._zero
        self._late, self._step, self._names = LateMaximum(), 0, []
        self.whole = not any(isinstance(each, DTensor) for _, each in parameters)
        self._norms = self._loss[None]
        # Parameters are numbered from the last, so that the first of all ranks is a maximum too.
        self._numbers = torch.arange(len(parameters), 0, -1, device=device)

    def add_loss(self, loss: torch.Tensor) -> None:
        """Look at the loss of one micro-batch."""
        self._loss = self._loss + loss.detach()  # NaN and inf stay in a sum

    @torch.no_grad()
    def look(self, step: int) -> NotFinite | None:
        """Look at the gradients of update `step`, before they are clipped and before the optimizer's step.

        Returns:
            What was found in the update before this one; where the host waits, in this one.
        """
        found = self.read()
        there = [(name, _shard(each.grad)) for name, each in self.parameters if each.grad is not None]
        self._names = [name for name, _ in there]
        self._norms = torch.stack(torch._foreach_norm([gradient for _, gradient in there]) if there else [self._zero])
        bad, bad_loss = _not_finite(self._norms), _not_finite(self._loss)
        first = (bad * self._numbers[-len(bad) :]).amax()
        sent = self._late.send(torch.stack([bad_loss, first, bad.sum()]))
        self._found = torch.maximum(self._found, sent.amax().clamp_max(1.0))
        self._loss, self._step = self._zero, step
        if self.waits:
            return found or self.read()
        self.optimizer.found_inf = self._found
        return found

    def clip(self, max_norm: float) -> torch.Tensor:
        """Clip the gradients that were looked at last, as `torch.nn.utils.clip_grad_norm_` does.

        Args:
            max_norm: at most what norm they are to have together; `inf` leaves them as they are.

        Returns:
            The norm that they had, a scalar tensor.
        """
        norm = torch.linalg.vector_norm(self._norms)
        if max_norm < math.inf:
            torch.nn.utils.clip_grads_with_norm_([each for _, each in self.parameters], max_norm, norm)
        return norm

    def read(self) -> NotFinite | None:
        """What was found in the last update that was looked at, told once; this may wait for the device."""
        numbers = self._late.read()
        if numbers is None or max(numbers) == 0:
            return None
        _, first, count = map(int, numbers)
        return NotFinite(self._step, self._names[len(self._names) - first] if first else None, count)


def _not_finite(values: torch.Tensor) -> torch.Tensor:
    """1 where a value is not finite, else 0: only of a finite x is x - x 0, which is quicker to ask than `isfinite`."""
    return (values - values).ne(0).float()


def _shard(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
