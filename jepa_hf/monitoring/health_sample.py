"""The vectors of a number of rows, from which `health` measures an evaluation or a run."""

from itertools import accumulate, zip_longest

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..models.configuration_jepa import JepaConfig
from ..models.modeling_jepa import JepaOutput
from ..models.packed_sequences import document_counts, positions_in_documents
from .health import prediction_health, representation_health
from .metrics import sample_hit_rate


class HealthSample:
    """Collects a model's outputs on the first rows of a data set, and measures them together.

    The measures are those of the rows, however they are cut into batches.

    Args:
        most_targets: take no more rows once there are as many targets; None takes all rows.
    """

    def __init__(self, most_targets: int | None = None):
        self.most_targets = most_targets
        self._targets = 0
        self._batches: list[dict[str, torch.Tensor]] = []

    def add(self, output: JepaOutput, batch: dict[str, torch.Tensor], pooled_targets: bool) -> None:
        """Take the rows of a batch. It waits for the device.

        Args:
            output: what the model returns for it in eval mode.
            pooled_targets: as in `JepaConfig`.
        """
        rows = self._rows(output.target_valid)
        if not rows:
            return
        valid = output.target_valid[:rows]
        views = len(output.context_valid) // len(output.target_valid)
        # A row is one sample, or as many as documents fit in any.
        most = batch["sequence_valid"].shape[1] if "sequence_valid" in batch else 1
        samples = torch.arange(rows, device=valid.device) * most
        # As in the contrastive term, samples without targets are no candidates.
        counted = document_counts(output.target_samples[:rows].flatten(1), most) > 0
        seen = output.context_valid[: rows * views]
        readers = samples.repeat_interleave(views)[:, None] + output.context_samples[: rows * views]
        taken = {
            "context": output.context_state[: rows * views][seen].float(),
            "context samples": readers[seen],
            "predictions": output.predictions[:rows][valid].float(),
            "targets": output.targets[:rows][valid].float(),
            "samples": (samples[:, None, None] + output.target_samples[:rows])[valid],
            "counted": counted.flatten(),
        }
        if not pooled_targets:  # one target that stands for all of a mask has no place of its own
            places = batch["target_positions"][:rows]
            if "sequence_ids" in batch:
                within = positions_in_documents(batch["sequence_ids"][:rows])
                places = within.gather(1, places.flatten(1)).view_as(places)
            masks = torch.arange(valid.shape[1], device=valid.device)[None, :, None].expand_as(valid)
            taken |= {"masks": masks[valid], "positions": places[valid]}
        if output.sample_targets is not None:
            taken["sample targets"] = output.sample_targets[: counted.numel()]
            taken["sample predictions"] = output.sample_predictions.unflatten(0, (-1, views))[: counted.numel()]
        self._batches.append(taken)

    def gather(self, accelerator: Accelerator) -> None:
        """Take the rows of all ranks, in the order in which accelerate deals batches out to them."""
        if accelerator.num_processes == 1:
            return
        ranks = gather_object([[{name: part.cpu() for name, part in taken.items()} for taken in self._batches]])
        self._batches = [
            {name: part.to(accelerator.device) for name, part in taken.items()}
            for turn in zip_longest(*ranks)
            for taken in turn
            if taken is not None
        ]

    def measure(self, config: JepaConfig) -> dict[str, float]:
        """The measures of the rows so far.

        Returns:
            As `target_...` and `context_...` what `representation_health` gives of the targets and of the context
            encoder's outputs; what `prediction_health` gives; with `contrastive_weight` `sample_hit_rate` and its
            chance, see `metrics.sample_hit_rate`. Empty where the rows have targets of fewer than two samples.
        """
        if not self._batches:
            return {}
        first = list(accumulate((len(taken["counted"]) for taken in self._batches), initial=0))
        joined = {name: torch.cat([taken[name] for taken in self._batches]) for name in self._batches[0]}
        samples, context_samples = (
            torch.cat([taken[name] + number for taken, number in zip(self._batches, first, strict=False)])
            for name in ("samples", "context samples")
        )
        if len(samples.unique()) < 2:
            return {}
        values = {}
        for encoder, states, owners in (("target", "targets", samples), ("context", "context", context_samples)):
            health = representation_health(joined[states], owners)
            values |= {f"{encoder}_{name}": value for name, value in health.items()}
        predictions = joined["predictions"] if config.prediction_weight > 0 else None
        targets, positions = joined["targets"], joined.get("positions")
        values |= prediction_health(
            predictions, targets, config.loss, config.smooth_l1_beta, samples, joined.get("masks"), positions
        )
        if "sample targets" in joined:
            predicted, candidates = (joined[f"sample {name}"][joined["counted"]] for name in ("predictions", "targets"))
            values |= {
                "sample_hit_rate": sample_hit_rate(predicted.flatten(0, 1), candidates).item(),
                "sample_hit_rate_chance": 1 / len(candidates),
            }
        return values

    def _rows(self, valid: torch.Tensor) -> int:
        """How many rows of a batch are taken, from the first on."""
        counts = valid.flatten(1).sum(dim=1)
        before = self._targets + counts.cumsum(dim=0) - counts
        rows = len(counts) if self.most_targets is None else int((before < self.most_targets).sum())
        self._targets += int(counts[:rows].sum())
        return rows
