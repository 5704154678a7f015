"""`HealthSample`: model outputs on the first rows of a data set, and their health metrics."""

from itertools import accumulate, zip_longest
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..models.configuration_jepa import JepaConfig
from ..models.packed_sequences import document_counts, document_position_ids
from .health import BASELINES, REPRESENTATION_METRICS, prediction_health, representation_health
from .metrics import sample_top1_accuracy


def metric_names(config: JepaConfig) -> set[str]:
    """Return the names of all metrics that `HealthSample.measure` may return."""
    names = {f"{encoder}_{name}" for encoder in ("target", "context") for name in REPRESENTATION_METRICS} | {*BASELINES}
    if config.prediction_weight > 0:
        names |= {"prediction_loss"}
        names |= {f"top1_accuracy{suffix}" for suffix in ("", "_chance", "_in_sample", "_in_sample_chance")}
    if config.contrastive_weight > 0:
        names |= {"sample_top1_accuracy", "sample_top1_accuracy_chance"}
    return names


class HealthSample:
    """Collect a model's outputs on the first rows of a data set, and measure them together.

    The metrics do not depend on the batch size.

    Args:
        max_targets: Stop taking rows at this number of targets; None takes all rows.
    """

    def __init__(self, max_targets: int | None = None):
        self.max_targets = max_targets
        self._targets = 0
        self._batches: list[dict[str, torch.Tensor]] = []

    def add(self, output: Any, batch: dict[str, torch.Tensor], pool_targets: bool) -> None:
        """Add the rows of a batch. This synchronizes with the device."""
        rows = self._rows_to_take(output.target_valid)
        if not rows:
            return
        valid = output.target_valid[:rows]
        num_masks = len(output.context_valid) // len(output.target_valid)
        # A row is one sample, or up to this number of documents.
        max_samples = batch["document_valid"].shape[1] if "document_valid" in batch else 1
        samples = torch.arange(rows, device=valid.device) * max_samples
        # As in the contrastive term, samples without targets are not candidates.
        has_targets = document_counts(output.target_samples[:rows].flatten(1), max_samples) > 0
        context_valid = output.context_valid[: rows * num_masks]
        context_samples = samples.repeat_interleave(num_masks)[:, None] + output.context_samples[: rows * num_masks]
        vectors = {
            "context": output.context_state[: rows * num_masks][context_valid].float(),
            "context samples": context_samples[context_valid],
            "predictions": output.predictions[:rows][valid].float(),
            "targets": output.targets[:rows][valid].float(),
            "samples": (samples[:, None, None] + output.target_samples[:rows])[valid],
            "has targets": has_targets.flatten(),
        }
        if not pool_targets:  # a target that stands for all positions of a mask has no position
            positions = batch["target_positions"][:rows]
            if "document_ids" in batch:
                within_document = document_position_ids(batch["document_ids"][:rows])
                positions = within_document.gather(1, positions.flatten(1)).view_as(positions)
            masks = torch.arange(valid.shape[1], device=valid.device)[None, :, None].expand_as(valid)
            vectors |= {"masks": masks[valid], "positions": positions[valid]}
        if output.sample_targets is not None:
            count = has_targets.numel()
            vectors["sample targets"] = output.sample_targets[:count]
            vectors["sample predictions"] = output.sample_predictions.unflatten(0, (-1, num_masks))[:count]
        self._batches.append(vectors)

    def gather(self, accelerator: Accelerator) -> None:
        """Gather the rows of all ranks, in the order in which accelerate deals batches."""
        if accelerator.num_processes == 1:
            return
        ranks = gather_object([[{name: part.cpu() for name, part in batch.items()} for batch in self._batches]])
        self._batches = [
            {name: part.to(accelerator.device) for name, part in batch.items()}
            for batches in zip_longest(*ranks)
            for batch in batches
            if batch is not None
        ]

    def measure(self, config: JepaConfig) -> dict[str, float]:
        """Measure the rows so far.

        Returns:
            The metrics of `representation_health` for the targets (`target_...`) and for the context encoder's outputs
            (`context_...`); those of `prediction_health`; with `contrastive_weight` also `sample_top1_accuracy` and its
            chance, see `metrics.sample_top1_accuracy`. Empty if the rows have targets of fewer than two samples.
        """
        if not self._batches:
            return {}
        offsets = list(accumulate((len(batch["has targets"]) for batch in self._batches), initial=0))
        joined = {name: torch.cat([batch[name] for batch in self._batches]) for name in self._batches[0]}
        samples, context_samples = (
            torch.cat([batch[name] + offset for batch, offset in zip(self._batches, offsets, strict=False)])
            for name in ("samples", "context samples")
        )
        if len(samples.unique()) < 2:
            return {}
        values: dict[str, float] = {}
        for encoder, states, owners in (("target", "targets", samples), ("context", "context", context_samples)):
            health = representation_health(joined[states], owners)
            values |= {f"{encoder}_{name}": value for name, value in health.items()}
        predictions = joined["predictions"] if config.prediction_weight > 0 else None
        targets, positions = joined["targets"], joined.get("positions")
        values |= prediction_health(
            predictions, targets, config.loss, config.smooth_l1_beta, samples, joined.get("masks"), positions
        )
        if "sample targets" in joined:
            predicted, candidates = (
                joined[f"sample {name}"][joined["has targets"]] for name in ("predictions", "targets")
            )
            values |= {
                "sample_top1_accuracy": sample_top1_accuracy(predicted.flatten(0, 1), candidates).item(),
                "sample_top1_accuracy_chance": 1 / len(candidates),
            }
        return values

    def _rows_to_take(self, valid: torch.Tensor) -> int:
        """Return the number of rows of a batch that are taken, from the first on."""
        counts = valid.flatten(1).sum(dim=1)
        before = self._targets + counts.cumsum(dim=0) - counts
        rows = len(counts) if self.max_targets is None else int((before < self.max_targets).sum())
        self._targets += int(counts[:rows].sum())
        return rows
