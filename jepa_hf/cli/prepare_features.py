"""Components of a JEPA run on feature vectors or series: data, model, collator."""

import logging
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedConfig

from ..data.feature_datasets import (
    feature_column_names,
    feature_shape,
    feature_statistics,
    load_feature_datasets,
    series_lengths,
)
from ..errors import UsageError
from ..masking.feature_collator import DataCollatorForFeatureJEPA
from ..models.configuration_feature_encoder import FeatureEncoderConfig
from ..utils.counts import counted, left_out_message
from .arguments import Parsed
from .encoder_loading import TrainingComponents, apply_config_overrides, build_model

logger = logging.getLogger(__name__)

_MASKS = ("mask_ratio", "mean_span_length", "num_masks", "on_too_short")


def prepare_features(parsed: Parsed, config: PreTrainedConfig | None) -> TrainingComponents:
    """Prepare model, collator and rows of features; without `config`, the encoder has the width of the data."""
    model_args, data_args, mask_args, args = parsed
    masks = {"on_too_short": "skip", **mask_args.given_for("features", _MASKS)}
    columns = None if config is None else config.feature_column_names
    with args.main_process_first(desc="loading data"):
        train_rows, eval_rows = load_feature_datasets(
            data_args, seed=args.seed, need_validation=args.do_eval, column_names=columns
        )
    is_series, width = feature_shape(train_rows)
    longest = _longest_series(train_rows, eval_rows, masks["on_too_short"]) if is_series else 0
    names = feature_column_names(train_rows)
    if config is None:
        config = _random_start(is_series, width, longest, model_args.config_overrides)
    _check_shape(config, is_series, width, longest)
    model = build_model(model_args, data_args, config)
    for encoder in (model.config.encoder_config, model.context_encoder.config, model.target_encoder.config):
        encoder.feature_column_names = names if columns is None else columns
    if model_args.model_name_or_path is None:
        mean, std = feature_statistics(train_rows)
        model.set_standardization(torch.from_numpy(mean), torch.from_numpy(std))
    collator = DataCollatorForFeatureJEPA(
        cast(FeatureEncoderConfig, config),
        masked_tokens=model.config.masked_tokens,
        fill_values=cast(torch.Tensor, model.context_encoder.feature_mean).numpy(force=True),
        max_length=config.max_position_embeddings if data_args.pad_to_max_length or args.torch_compile else None,
        seed=args.seed,
        **masks,
    )
    train_rows, eval_rows = (None if rows is None else rows.with_format("numpy") for rows in (train_rows, eval_rows))
    return TrainingComponents(model, collator, train_rows, eval_rows)


def _longest_series(train_rows: Dataset, eval_rows: Dataset | None, on_too_short: str) -> int:
    """Return the number of steps of the longest series; refuse, or count, those of one step, which have no targets."""
    longest = 0
    for part, rows in (("training", train_rows), ("validation", eval_rows)):
        if rows is None:
            continue
        lengths = series_lengths(rows)
        too_short = np.flatnonzero(lengths < 2)
        if len(too_short) == len(lengths):
            raise UsageError(
                f"All {part} series have one step, but one must be masked and one must stay visible. Provide longer "
                "series."
            )
        if too_short.size and on_too_short == "error":
            raise UsageError(
                f"Row {too_short[0] + 1} of the {part} series has one step. Remove it, or set --on_too_short skip."
            )
        if too_short.size:
            reasons = {"with fewer than two steps": too_short.size}
            logger.warning("%s", left_out_message(reasons, len(lengths), f"{part} series"))
        longest = max(longest, int(lengths.max()))
    return longest


def _random_start(is_series: bool, width: int, longest: int, overrides: str | None) -> FeatureEncoderConfig:
    """Return a configuration with the default sizes, the width of the data, and positions for its longest series."""
    settings: dict[str, Any] = {"input_dim": width}
    if is_series:
        settings |= {"mode": "time", "max_position_embeddings": max(longest, 2)}
    return cast(FeatureEncoderConfig, apply_config_overrides(FeatureEncoderConfig(**settings), overrides))


def _check_shape(config: PreTrainedConfig, is_series: bool, width: int, longest: int) -> None:
    if (config.mode == "time") != is_series:
        raise UsageError(
            f"an encoder of mode {config.mode} reads {'series' if config.mode == 'time' else 'vectors'}, but the data "
            f"contains {'series' if is_series else 'vectors'}; give other data, or a random start without mode="
        )
    if config.input_dim != width:
        raise UsageError(
            f"the encoder reads {counted(config.input_dim, 'feature')}, but the data has {width}; give other columns"
        )
    if is_series and longest > config.max_position_embeddings:
        raise UsageError(
            f"a series has {longest} steps, more than the encoder's {config.max_position_embeddings}; cut it, or set "
            f"max_position_embeddings={longest} in --config_overrides for a random start"
        )
