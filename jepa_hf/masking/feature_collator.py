"""The collator for features: from vectors or time series of numbers to two views and target positions."""

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import torch

from ..errors import UsageError
from ..models.configuration_feature_encoder import FeatureEncoderConfig
from .base_collator import MaskingCollator, check_span_settings, chosen_positions, mask_keys
from .counter_rng import content_keys
from .span_sampling import sample_span_mask


class DataCollatorForFeatureJEPA(MaskingCollator):
    """Pads a batch of feature rows and hides spans of it: of steps (mode "time"), of patches ("patches"), or of groups
    of `patch_size` features ("flat", where the whole vector is the one target).

    Args:
        encoder_config: of the encoder; its mode, `input_dim` and `patch_size` say what a row is.
        mask_ratio: share of the positions (groups in mode "flat") that is hidden, in (0, 1).
        mean_span_length: mean of the geometric distribution of span lengths; default 5 steps over time, else 1: single
            patches or groups, independently of their neighbours.
        context_mode: "dropped": the view lists the visible positions; "kept": hidden features stay, with
            `fill_values` in their place. Mode "flat", which has one position, needs "kept".
        num_masks: masks per sample, which share one pass of the target encoder.
        fill_values: `[F]`, raw features that stand for hidden ones, best the training means; default zeros.
        on_short: what happens to a series of fewer than two steps: "error", or "skip" to give it no target.
        max_length: pad every batch of series to this many steps: static shapes for torch.compile. Batches of vectors
            have static shapes anyway.
        seed: seed of the masks.

    Returns of a call (B rows of F features, T steps, M masks, K targets and C visible positions at most):
        `features` float32 `[B, F]`, over time `[B, T, F]` with zeros for padding and `attention_mask` long `[B, T]`;
        `target_positions` long and `target_valid` bool `[B, M, K]`; with "kept" `context_features` float32, shaped as
        `features`, with M after B where M > 1; with "dropped" `context_positions` long and `context_valid` bool
        `[B, M, C]`.

    Raises:
        UsageError: an option out of range, or a row of another shape, that is too short or too long.
    """

    def __init__(
        self,
        encoder_config: FeatureEncoderConfig,
        mask_ratio: float = 0.3,
        mean_span_length: float | None = None,
        context_mode: str = "dropped",
        num_masks: int = 1,
        fill_values: np.ndarray | Sequence[float] | None = None,
        on_short: str = "error",
        max_length: int | None = None,
        seed: int = 42,
    ):
        mode, width = encoder_config.mode, encoder_config.input_dim
        if mean_span_length is None:
            mean_span_length = 5.0 if mode == "time" else 1.0
        check_span_settings(mask_ratio, mean_span_length, context_mode, on_short)
        if context_mode == "dropped" and mode == "flat":
            raise UsageError(
                "an encoder of mode flat has one position, which cannot be dropped: use --context_mode kept"
            )
        if mode != "time" and encoder_config.num_patches < 2:
            raise UsageError(
                f"patch_size {encoder_config.patch_size} makes one patch of {width} features, but one must be hidden "
                "and one left: lower patch_size"
            )
        longest = encoder_config.max_position_embeddings
        if mode == "time" and max_length is not None and not 2 <= max_length <= longest:
            raise UsageError(
                f"max_length must lie between 2 and the encoder's max_position_embeddings {longest}, not {max_length}"
            )
        fill = np.zeros(width) if fill_values is None else np.asarray(fill_values)
        if fill.shape != (width,):
            raise UsageError(f"fill_values must have input_dim {width} values, not the shape {fill.shape}")
        super().__init__(num_masks, seed)
        self.encoder_config = encoder_config
        self.mask_ratio = mask_ratio
        self.mean_span_length = mean_span_length
        self.context_mode = context_mode
        self.fill_values = fill.astype(np.float32)
        self.on_short = on_short
        self.max_length = max_length

    @property
    def summary(self) -> dict[str, Any]:
        return {"mask ratio": self.mask_ratio, "mean span length": self.mean_span_length}

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        rows = [self._row(number, feature["features"]) for number, feature in enumerate(features)]
        if self.encoder_config.mode == "time":
            values, maskable = self._pad(rows)
            batch = {"features": values, "attention_mask": maskable.astype(np.int64)}
        else:
            values, maskable = np.stack(rows), np.ones((len(rows), self.encoder_config.num_patches), dtype=bool)
            batch = {"features": values}

        content = np.array([_content_hash(row) for row in rows], dtype=np.uint64)
        keys = mask_keys(content_keys(content, self.seed, self.epoch), self.num_masks)
        repeated = np.repeat(maskable, self.num_masks, axis=0)
        hidden = sample_span_mask(repeated, keys, self.mask_ratio, self.mean_span_length)

        shape = (len(rows), self.num_masks)
        target_capacities, visible_capacities = self._capacities
        if self.encoder_config.mode == "flat":
            targets, target_valid = np.zeros((*shape, 1), dtype=np.int64), np.ones((*shape, 1), dtype=bool)
        else:
            targets, target_valid = chosen_positions(hidden, target_capacities)
        batch["target_positions"] = targets.reshape(*shape, -1)
        batch["target_valid"] = target_valid.reshape(*shape, -1)
        if self.context_mode == "kept":
            view = self._fill(values, hidden.reshape(*shape, -1))
            batch["context_features"] = view[:, 0] if self.num_masks == 1 else view
        else:
            positions, valid = chosen_positions(repeated & ~hidden, visible_capacities)
            batch["context_positions"] = positions.reshape(*shape, -1)
            batch["context_valid"] = valid.reshape(*shape, -1)
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in batch.items()}

    def _row(self, number: int, features: Any) -> np.ndarray:
        """A row's features, float32 `[F]` or `[T, F]`."""
        try:
            row = np.ascontiguousarray(features, dtype=np.float32)
        except (TypeError, ValueError, OverflowError) as error:
            raise UsageError(
                f"the features of row {number} of the batch are not a rectangle of numbers: mend or leave out the row"
            ) from error
        width, is_series = self.encoder_config.input_dim, self.encoder_config.mode == "time"
        if row.ndim != 1 + is_series or row.shape[-1] != width:
            expected = f"[steps, {width}]" if is_series else f"[{width}]"
            raise UsageError(
                f"the features of row {number} of the batch have the shape {row.shape}, not {expected}: give the "
                "encoder the columns it was built for"
            )
        if not is_series:
            return row
        longest = self.encoder_config.max_position_embeddings if self.max_length is None else self.max_length
        if row.shape[0] > longest:
            name = "max_position_embeddings" if self.max_length is None else "max_length"
            raise UsageError(
                f"row {number} of the batch has {row.shape[0]} steps, more than {name} {longest}: cut the series"
            )
        if row.shape[0] < 2 and self.on_short == "error":
            raise UsageError(
                f'row {number} of the batch has fewer than two steps: leave such series out or set on_short to "skip"'
            )
        return row

    def _pad(self, rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """`[B, T, F]` features and bool validity `[B, T]`, padded at the end."""
        lengths = np.array([row.shape[0] for row in rows])
        steps = max(int(lengths.max()), 1) if self.max_length is None else self.max_length
        valid = np.arange(steps) < lengths[:, None]
        values = np.zeros((*valid.shape, self.encoder_config.input_dim), dtype=np.float32)
        values[valid] = np.concatenate(rows)
        return values, valid

    def _fill(self, values: np.ndarray, hidden: np.ndarray) -> np.ndarray:
        """The masked views: `[B, ..., F]`, bool `[B, M, positions]` -> `[B, M, ..., F]`."""
        if self.encoder_config.mode == "time":
            hidden = hidden[..., None]
        else:
            columns = np.arange(self.encoder_config.input_dim)
            hidden = hidden[..., columns // self.encoder_config.patch_size]
        return np.where(hidden, self.fill_values, values[:, None])

    @property
    def _capacities(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Most targets and most visible positions of a row, under static shapes; without, nothing."""
        if self.max_length is None or self.encoder_config.mode != "time":
            return (), ()
        # The sampler hides exactly this many of a full row; a shorter row neither hides nor shows more.
        most = min(max(round(self.max_length * self.mask_ratio), 1), self.max_length - 1)
        return (most,), (self.max_length - most,)


def _content_hash(row: np.ndarray) -> int:
    """64 bits of a row's float32 bytes."""
    return int.from_bytes(blake2b(row.tobytes(), digest_size=8).digest(), "little")
