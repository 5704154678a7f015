"""`DataCollatorForFeatureJEPA`: views and targets of feature vectors or time series."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from ..errors import UsageError
from ..models.configuration_feature_encoder import FeatureEncoderConfig
from .base_collator import SpanMaskingCollator, derive_mask_keys, padded_positions, to_tensors, without_padding
from .counter_rng import content_hash, sample_keys
from .span_sampling import sample_span_mask


class DataCollatorForFeatureJEPA(SpanMaskingCollator):
    """Pad a batch of feature rows and mask spans of it.

    Mode "time" masks steps, mode "patches" masks patches. Mode "flat" masks groups of `patch_size`
    features and has the complete vector as its single target. Steps at the ends of a series that its
    own `attention_mask` `[T]` marks with 0 are padding, which is removed.

    A call returns, for B rows of F features, T steps, M masks, at most K targets and C visible positions: `features`
    float32 `[B, F]`, over time `[B, T, F]`, padded with zeros, and `attention_mask` long `[B, T]`; `target_positions`
    long and `target_valid` bool `[B, M, K]`. "mask_token" adds `context_features` float32, shaped as `features`, with M
    after B if M > 1. "drop" adds `context_positions` long and `context_valid` bool `[B, M, C]`.

    Args:
        encoder_config: Its mode, `input_dim` and `patch_size` determine the shape of a row.
        mask_ratio: Share of the masked positions (groups in mode "flat"), in (0, 1).
        mean_span_length: Mean of the geometric distribution of span lengths. Default: 5 steps over
            time, else 1, which masks single patches or groups independently.
        masked_tokens: "drop": the context lists the visible positions. "mask_token": masked features
            are replaced by `fill_values`. Mode "flat", which has one position, requires "mask_token".
        num_masks: Masks per sample. They share one pass of the target encoder.
        fill_values: `[F]`, raw features in place of masked ones, preferably the training means; default zeros.
        on_too_short: Treatment of a series of fewer than two steps: "error", or "skip" for a series without targets.
        max_length: Pad every batch of series to this many steps: static shapes for torch.compile.
            Batches of vectors always have static shapes.
        seed: Seed of the masks.

    Raises:
        UsageError: An option is out of range. In a call: a row has another shape, or is too short or too long.
    """

    def __init__(
        self,
        encoder_config: FeatureEncoderConfig,
        mask_ratio: float = 0.3,
        mean_span_length: float | None = None,
        masked_tokens: str = "drop",
        num_masks: int = 1,
        fill_values: np.ndarray | Sequence[float] | None = None,
        on_too_short: str = "error",
        max_length: int | None = None,
        seed: int = 42,
    ):
        mode, width = encoder_config.mode, encoder_config.input_dim
        if mean_span_length is None:
            mean_span_length = 5.0 if mode == "time" else 1.0
        super().__init__(mask_ratio, mean_span_length, masked_tokens, num_masks, on_too_short, max_length, seed)
        if masked_tokens == "drop" and mode == "flat":
            raise UsageError(
                "An encoder of mode flat has one position, which cannot be dropped. Use --masked_tokens mask_token."
            )
        if mode != "time" and encoder_config.num_patches < 2:
            raise UsageError(
                f"patch_size {encoder_config.patch_size} makes one patch of {width} features, but one must be "
                "masked and one must stay visible. Lower patch_size."
            )
        longest = encoder_config.max_position_embeddings
        if mode == "time" and max_length is not None and not 2 <= max_length <= longest:
            raise UsageError(
                f"max_length must lie between 2 and the encoder's max_position_embeddings {longest}, not {max_length}."
            )
        fill_values = np.zeros(width) if fill_values is None else np.asarray(fill_values)
        if fill_values.shape != (width,):
            raise UsageError(f"fill_values must have input_dim {width} values, not the shape {fill_values.shape}.")
        self.encoder_config = encoder_config
        self.fill_values = fill_values.astype(np.float32)

    @property
    def target_requirement(self) -> str:
        """Condition of a row that has targets, and the remedy for data without such rows."""
        return "Only series of at least two steps have one. Provide longer series."

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Pad and mask the rows of a batch."""
        rows = [self._row(number, feature) for number, feature in enumerate(features)]
        if self.encoder_config.mode == "time":
            values, maskable = self._pad(rows)
            batch = {"features": values, "attention_mask": maskable.astype(np.int64)}
        else:
            values, maskable = np.stack(rows), np.ones((len(rows), self.encoder_config.num_patches), dtype=bool)
            batch = {"features": values}

        content = np.array([content_hash(row.tobytes()) for row in rows], dtype=np.uint64)
        keys = derive_mask_keys(sample_keys(content, self.seed, self.epoch), self.num_masks)
        repeated = np.repeat(maskable, self.num_masks, axis=0)
        masks = sample_span_mask(repeated, keys, self.mask_ratio, self.mean_span_length)
        masks = masks.reshape(len(rows), self.num_masks, -1)
        target_capacities, visible_capacities = self._static_sizes
        is_flat = self.encoder_config.mode == "flat"  # the vector is one position, and a target
        batch |= padded_positions("target", np.ones_like(masks[..., :1]) if is_flat else masks, target_capacities)
        view = partial(self._fill_masked, values, masks)
        batch |= self._context("features", masks, maskable, view, visible_capacities)
        return to_tensors(batch)

    def _row(self, number: int, feature: dict[str, Any]) -> np.ndarray:
        """Return a row's features, float32 `[F]` or `[T, F]`, without padding."""
        try:
            row = np.ascontiguousarray(feature["features"], dtype=np.float32)
        except (TypeError, ValueError, OverflowError) as error:
            raise UsageError(
                f"The features of row {number} of the batch are not a rectangle of numbers. Fix or remove the row."
            ) from error
        width, is_series = self.encoder_config.input_dim, self.encoder_config.mode == "time"
        if row.ndim != 1 + is_series or row.shape[-1] != width:
            expected = f"[steps, {width}]" if is_series else f"[{width}]"
            raise UsageError(
                f"The features of row {number} of the batch have the shape {row.shape}, not {expected}. Pass the "
                "columns that the encoder was built for."
            )
        if not is_series:
            return row
        if feature.get("attention_mask") is not None:
            mask = np.asarray(feature["attention_mask"])
            if mask.shape != row.shape[:1]:
                raise UsageError(
                    f"Row {number} of the batch has an attention_mask of the shape {list(mask.shape)} for {len(row)} "
                    "steps. Provide one value for each step."
                )
            row = np.ascontiguousarray(row[without_padding(mask, number, "steps")])
        longest = self.encoder_config.max_position_embeddings if self.max_length is None else self.max_length
        if row.shape[0] > longest:
            name = "max_position_embeddings" if self.max_length is None else "max_length"
            raise UsageError(
                f"Row {number} of the batch has {row.shape[0]} steps, more than {name} {longest}. Cut the series."
            )
        if row.shape[0] < 2 and self.on_too_short == "error":
            raise UsageError(
                f'Row {number} of the batch has fewer than two steps. Remove such series or set on_too_short to "skip".'
            )
        return row

    def _pad(self, rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Pad at the end: `[B, T, F]` features and bool validity `[B, T]`."""
        lengths = np.array([row.shape[0] for row in rows])
        steps = max(int(lengths.max()), 1) if self.max_length is None else self.max_length
        valid = np.arange(steps) < lengths[:, None]
        values = np.zeros((*valid.shape, self.encoder_config.input_dim), dtype=np.float32)
        values[valid] = np.concatenate(rows)
        return values, valid

    def _fill_masked(self, values: np.ndarray, masked: np.ndarray) -> np.ndarray:
        """Build the masked views: `[B, ..., F]`, bool `[B, M, positions]` -> `[B, M, ..., F]`."""
        if self.encoder_config.mode == "time":
            masked = masked[..., None]
        else:
            columns = np.arange(self.encoder_config.input_dim)
            masked = masked[..., columns // self.encoder_config.patch_size]
        return np.where(masked, self.fill_values, values[:, None])

    @property
    def _static_sizes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Maximum targets and visible positions per row; empty without static shapes."""
        if self.max_length is None or self.encoder_config.mode != "time":
            return (), ()
        # The sampler masks exactly this many steps of a full row. A shorter row has no more masked or visible steps.
        max_targets = min(max(round(self.max_length * self.mask_ratio), 1), self.max_length - 1)
        return (max_targets,), (self.max_length - max_targets,)
