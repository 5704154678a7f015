"""All-reduced maxima, copied to the host asynchronously and read one step later."""

import torch


class DeferredMax:
    """Maxima over all ranks of a few numbers, which the host reads one update after they were sent.

    By then the copy has long arrived, so no host waits for its device.
    """

    def __init__(self) -> None:
        self._pending: torch.Tensor | None = None
        self._ready_event: torch.cuda.Event | None = None

    def submit(self, numbers: torch.Tensor) -> torch.Tensor:
        """Reduce numbers `[n]` over all ranks, and start copying them to the host.

        All ranks must call this equally often.

        Returns:
            Their maxima `[n]`, on the device.
        """
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(numbers, op=torch.distributed.ReduceOp.MAX)
        self._pending = numbers.to("cpu", non_blocking=True)
        if numbers.is_cuda:
            self._ready_event = torch.cuda.Event()
            self._ready_event.record()
        return numbers

    def poll(self) -> list[float] | None:
        """Return the numbers that were sent last, once; None if there are no unread ones."""
        if self._pending is None:
            return None
        if self._ready_event is not None:
            self._ready_event.synchronize()
        numbers, self._pending = self._pending.tolist(), None
        return numbers
