"""Means of what is logged, gathered without waiting for the device."""

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object


class RunningMeans:
    """Weighted means, and counts, that stay on the device until they are read, so that no step waits for it.

    What is added is folded in once a micro-batch, in a few operators for all names together.
    """

    def __init__(self) -> None:
        self._added: list[tuple[str, torch.Tensor, torch.Tensor]] = []
        self._totals: dict[tuple[str, ...], torch.Tensor] = {}  # of names added together: [2, n], sums and weights
        self._counts: dict[str, torch.Tensor] = {}

    def add(self, name: str, value: torch.Tensor, weight: torch.Tensor) -> None:
        """Count the scalar `value` with the scalar `weight`."""
        self._added.append((name, value.detach(), weight.detach()))

    def fold(self) -> None:
        """Take in what was added, of which nothing is kept then."""
        if not self._added:
            return
        names, values, weights = zip(*self._added, strict=True)
        self._added = []
        both = torch.stack([*values, *weights]).float().view(2, -1)
        # A weight of 0 stands for "no such thing in this batch": its value may be anything.
        both[0].mul_(both[1]).masked_fill_(both[1] <= 0, 0.0)
        self._totals[names] = self._totals[names] + both if names in self._totals else both

    def count(self, name: str, number: torch.Tensor) -> None:
        """Add the scalar `number` to a count."""
        self._counts[name] = self._counts.get(name, 0) + number.detach()

    def flush(self, accelerator: Accelerator) -> dict[str, float]:
        """The means and counts over all ranks, and start anew. A name that one rank never added counts there as 0."""
        self.fold()
        pairs: dict[str, torch.Tensor] = {}
        for names, totals in self._totals.items():
            for name, pair in zip(names, totals.unbind(dim=1), strict=True):
                pairs[name] = pairs[name] + pair if name in pairs else pair
        known = gather_object([(sorted(pairs), sorted(self._counts))])
        means, counts = (sorted(set().union(*names)) for names in zip(*known, strict=True))
        if not means and not counts:
            return {}
        none = torch.zeros(2, device=accelerator.device)
        rows = [pairs.get(name, none) for name in means]
        for name in counts:
            number = self._counts[name].float() if name in self._counts else none[0]
            rows.append(torch.stack([number, none[0]]))
        totals = accelerator.reduce(torch.stack(rows), reduction="sum").tolist()
        self._totals, self._counts = {}, {}
        values = {name: total / max(weight, 1e-12) for name, (total, weight) in zip(means, totals, strict=False)}
        return values | {name: total for name, (total, _) in zip(counts, totals[len(means) :], strict=True)}
