"""The vectors of a number of rows, from which `health` measures an evaluation or a run."""

from collections import defaultdict

import torch

from .configuration_jepa import JepaConfig
from .health import prediction_health, representation_health
from .metrics import sample_hit_rate
from .modeling_jepa import JepaOutput
from .packing import positions_in_documents


class HealthSample:
    """Collects a model's outputs on the first rows of a data set, and measures them together.

    The measures are those of the rows, however they are cut into batches.

    Args:
        most_targets: take no more rows once there are as many targets; None takes all rows.
    """

    def __init__(self, most_targets: int | None = None):
        self.most_targets = most_targets
        self.targets = 0
        self._samples = 0
        self._parts: dict[str, list[torch.Tensor]] = defaultdict(list)

    def add(self, output: JepaOutput, batch: dict[str, torch.Tensor], pooled_targets: bool) -> None:
        """Take the rows of a batch. It waits for the device.

        Args:
            output: what the model gives for it, with `output_hidden_states`.
            pooled_targets: as in `JepaConfig`.
        """
        rows = self._rows(output.target_valid)
        if not rows:
            return
        valid = output.target_valid[:rows]
        views = len(output.context_valid) // len(output.target_valid)
        there = batch["sequence_valid"][:rows] if "sequence_valid" in batch else torch.ones_like(valid[:, 0, :1])
        # A row is one sample, or as many as documents fit in any.
        samples = torch.arange(rows, device=valid.device) * there.shape[1] + self._samples
        self._samples += there.numel()
        seen = output.context_valid[: rows * views]
        readers = samples.repeat_interleave(views)[:, None] + output.context_samples[: rows * views]
        self._parts["context"].append(output.context_state[: rows * views][seen].float())
        self._parts["context samples"].append(readers[seen])
        self._parts["prediction"].append(output.predictions[:rows][valid].float())
        self._parts["target"].append(output.targets[:rows][valid].float())
        self._parts["samples"].append((samples[:, None, None] + output.target_samples[:rows])[valid])
        if not pooled_targets:  # one target that stands for all of a mask has no place of its own
            masks = torch.arange(valid.shape[1], device=valid.device)[None, :, None].expand_as(valid)
            places = batch["target_positions"][:rows]
            if "sequence_ids" in batch:
                within = positions_in_documents(batch["sequence_ids"][:rows])
                places = within.gather(1, places.flatten(1)).view_as(places)
            self._parts["masks"].append(masks[valid])
            self._parts["positions"].append(places[valid])
        if output.sample_targets is not None:
            there = there.flatten()
            by_sample = output.sample_predictions.unflatten(0, (-1, views))[: len(there)]
            self._parts["sample predictions"].append(by_sample[there])
            self._parts["sample targets"].append(output.sample_targets[: len(there)][there])

    def measure(self, config: JepaConfig) -> dict[str, float]:
        """The measures of the rows so far.

        Returns:
            As `target_...` and `context_...` what `representation_health` gives of the targets and of the context
            encoder's outputs; what `prediction_health` gives; with `contrastive_weight` `sample_hit_rate` and its
            chance, see `metrics.sample_hit_rate`. Empty where the rows have targets of fewer than two samples.
        """
        whole = {name: torch.cat(parts) for name, parts in self._parts.items()}
        if not whole or len(whole["samples"].unique()) < 2:
            return {}
        values = {}
        for encoder, samples in (("target", whole["samples"]), ("context", whole["context samples"])):
            health = representation_health(whole[encoder], samples)
            values |= {f"{encoder}_{name}": value for name, value in health.items()}
        positions = whole.get("positions")
        values |= prediction_health(
            whole["prediction"],
            whole["target"],
            config.loss,
            config.smooth_l1_beta,
            None if positions is None else whole["samples"],
            whole.get("masks"),
            positions,
        )
        if "sample targets" in whole:
            predictions = whole["sample predictions"].flatten(0, 1)
            values["sample_hit_rate"] = sample_hit_rate(predictions, whole["sample targets"]).item()
            values["sample_hit_rate_chance"] = 1 / len(whole["sample targets"])
        return values

    def _rows(self, valid: torch.Tensor) -> int:
        """How many rows of a batch are taken, from the first on."""
        counts = valid.flatten(1).sum(dim=1)
        before = self.targets + counts.cumsum(dim=0) - counts
        rows = len(counts) if self.most_targets is None else int((before < self.most_targets).sum())
        self.targets += int(counts[:rows].sum())
        return rows
