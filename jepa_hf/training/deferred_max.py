"""What the device knows now and the host may learn a little later."""

import torch


class LateMaximum:
    """The largest of each of a few numbers over all ranks, which the host learns an update later.

    So no host waits for its device: what it reads was sent an update ago, and has long arrived.
    """

    def __init__(self) -> None:
        self._sent: torch.Tensor | None = None
        self._arrived: torch.cuda.Event | None = None

    def send(self, numbers: torch.Tensor) -> torch.Tensor:
        """Send numbers `[n]` on their way; every rank does this as often as the others.

        Returns:
            Their maxima `[n]`, on the device.
        """
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(numbers, op=torch.distributed.ReduceOp.MAX)
        self._sent = numbers.to("cpu", non_blocking=True)
        if numbers.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        return numbers

    def read(self) -> list[float] | None:
        """What was sent last, once; None where that was read already, or nothing was sent."""
        if self._sent is None:
            return None
        if self._arrived is not None:
            self._arrived.synchronize()
        numbers, self._sent = self._sent.tolist(), None
        return numbers
