"""Weighted means and counts, accumulated on the device, reduced when logged."""

from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object


class MetricAccumulator:
    """Weighted means and counts that stay on the device until they are read.

    Added values are folded into totals once per micro-batch, in a few kernels for all names together.
    """

    def __init__(self) -> None:
        self._pending: list[tuple[str, torch.Tensor, torch.Tensor]] = []
        self._totals: dict[tuple[str, ...], torch.Tensor] = {}  # of names added together: [2, n], sums and weights
        self._counts: dict[str, torch.Tensor] = {}

    def add(self, name: str, value: torch.Tensor, weight: torch.Tensor) -> None:
        """Add the scalar `value` to a mean, with the scalar `weight`."""
        self._pending.append((name, value.detach(), weight.detach()))

    def accumulate(self) -> None:
        """Fold the added values into the totals."""
        if not self._pending:
            return
        names, values, weights = zip(*self._pending, strict=True)
        self._pending = []
        both = torch.stack([*values, *weights]).float().view(2, -1)
        # A weight of 0 means that the batch has no such value: it may be anything, NaN included.
        both[0].mul_(both[1]).masked_fill_(both[1] <= 0, 0.0)
        self._totals[names] = self._totals[names] + both if names in self._totals else both

    def count(self, name: str, number: torch.Tensor) -> None:
        """Add the scalar `number` to a count."""
        self._counts[name] = self._counts[name] + number.detach() if name in self._counts else number.detach()

    def totals(self, accelerator: Accelerator) -> tuple[dict[str, tuple[float, float]], dict[str, float]]:
        """Return the sums over all ranks: value times weight and weight of each mean, and the counts."""
        self.accumulate()
        pairs: dict[str, torch.Tensor] = {}
        for names, totals in self._totals.items():
            for name, pair in zip(names, totals.unbind(dim=1), strict=True):
                pairs[name] = pairs[name] + pair if name in pairs else pair
        names_of_ranks = gather_object([(sorted(pairs), sorted(self._counts))])
        means, counts = (sorted(set().union(*names)) for names in zip(*names_of_ranks, strict=True))
        if not means and not counts:
            return {}, {}
        zeros = torch.zeros(2, device=accelerator.device)
        rows = [pairs.get(name, zeros) for name in means]
        for name in counts:
            number = self._counts[name].float() if name in self._counts else zeros[0]
            rows.append(torch.stack([number, zeros[0]]))
        sums = accelerator.reduce(torch.stack(rows), reduction="sum").tolist()
        return (
            {name: (total, weight) for name, (total, weight) in zip(means, sums, strict=False)},
            {name: total for name, (total, _) in zip(counts, sums[len(means) :], strict=True)},
        )

    def load_totals(
        self, means: Mapping[str, Sequence[float]], counts: Mapping[str, float], device: torch.device
    ) -> None:
        """Start from the sums that `totals` returned, on one rank."""
        self._totals = {(name,): torch.tensor(pair, device=device)[:, None] for name, pair in means.items()}
        self._counts = {name: torch.tensor(number, device=device) for name, number in counts.items()}

    def compute_and_reset(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the means and counts over all ranks, and reset them; missing names are 0."""
        means, counts = self.totals(accelerator)
        self._totals, self._counts = {}, {}
        return {name: total / max(weight, 1e-12) for name, (total, weight) in means.items()} | counts
