"""Configuration of the feature encoder, a transformer over feature vectors or time series."""

import inspect
import math
from numbers import Real
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

from .argument_names import refuse_unread_arguments
from .errors import UsageError


class FeatureEncoderConfig(PreTrainedConfig):
    """Configuration of `FeatureEncoderModel`.

    Args:
        input_dim: number of features F of a vector or of a time step; required.
        mode: meaning of a position. "time": a step of a series; "patches" (default): `patch_size`
            adjacent features of a vector; "flat": the complete vector (Edifice's JEPA).
        hidden_size: width D of the representations, default 256; also `embed_dim`.
        num_hidden_layers: transformer blocks, default 6; also `encoder_depth`.
        num_attention_heads: default 8; also `num_heads`.
        mlp_ratio: width of the blocks' hidden layer over D, default 4.
        hidden_dropout_prob: dropout after attention and after the MLP, default 0.1; also `dropout`.
        layer_norm_eps: epsilon of the layer norms, default 1e-5.
        patch_size: features per patch; default the smallest that gives at most 64 patches. In mode
            "flat", features per masked group; unused in mode "time".
        max_position_embeddings: maximum steps of a series, default 512; used in mode "time" only.
        initializer_range: standard deviation of the random weights, default 0.02.
        feature_column_names: names of the features in the table that the encoder was trained on, in
            order, or of the one column of lists; default None, unknown.

    Raises:
        UsageError: `input_dim` is missing, the mode is unknown, or numbers are invalid.

    >>> config = FeatureEncoderConfig(287, num_heads=4)
    >>> config.patch_size, config.num_patches, config.num_attention_heads
    (5, 58, 4)
    """

    model_type = "feature_encoder"
    has_no_defaults_at_init = True
    attribute_map: ClassVar[dict[str, str]] = {
        "embed_dim": "hidden_size",
        "encoder_depth": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "dropout": "hidden_dropout_prob",
    }

    def __init__(
        self,
        input_dim: int | None = None,
        mode: str = "patches",
        hidden_size: int = 256,
        num_hidden_layers: int = 6,
        num_attention_heads: int = 8,
        mlp_ratio: float = 4.0,
        hidden_dropout_prob: float = 0.1,
        layer_norm_eps: float = 1e-5,
        patch_size: int | None = None,
        max_position_embeddings: int = 512,
        initializer_range: float = 0.02,
        feature_column_names: list[str] | None = None,
        **kwargs: Any,
    ):
        known = (*inspect.signature(FeatureEncoderConfig.__init__).parameters, *self.attribute_map)
        refuse_unread_arguments(kwargs, known, "FeatureEncoderConfig")
        if input_dim is None:
            raise UsageError("FeatureEncoderConfig needs input_dim, the number of features.")
        if patch_size is None and isinstance(input_dim, int):
            patch_size = max(math.ceil(input_dim / 64), 1)
        self.input_dim = input_dim
        self.mode = mode
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.mlp_ratio = mlp_ratio
        self.hidden_dropout_prob = hidden_dropout_prob
        self.layer_norm_eps = layer_norm_eps
        self.patch_size = patch_size
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.feature_column_names = feature_column_names
        # Sets values passed under a name in attribute_map, so they are final only afterwards.
        super().__init__(**kwargs)
        self._validate_numbers()

    @property
    def num_patches(self) -> int:
        """Number of patches of a vector; the last is padded with zeros."""
        return math.ceil(self.input_dim / self.patch_size)

    def _validate_numbers(self) -> None:
        """Check the mode, then types and ranges of the numbers."""
        if self.mode not in ("time", "patches", "flat"):
            raise UsageError(f"mode must be one of time, patches, flat, not {self.mode!r}.")
        sizes = ("input_dim", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
        for name in (*sizes, "patch_size"):
            if not isinstance(getattr(self, name), int):
                raise UsageError(f"{name} must be an integer, not {getattr(self, name)!r:.80}.")
        for name in sizes:
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}.")
        for name in ("mlp_ratio", "hidden_dropout_prob", "layer_norm_eps", "initializer_range"):
            value = getattr(self, name)
            if not isinstance(value, Real) or not math.isfinite(value):
                raise UsageError(f"{name} must be a finite number, not {value!r:.80}.")
        if not 1 <= self.patch_size <= self.input_dim:
            raise UsageError(
                f"patch_size must be between 1 and the {self.input_dim} features of input_dim, not {self.patch_size}."
            )
        names = self.feature_column_names
        if names is not None and len(names) not in (1, self.input_dim):
            raise UsageError(
                f"feature_column_names has {len(names)} names for {self.input_dim} features. Name each of them, or one "
                "column of lists."
            )
        if self.hidden_size % self.num_attention_heads:
            raise UsageError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}."
            )
        if not 0.0 <= self.hidden_dropout_prob < 1.0:
            raise UsageError(f"hidden_dropout_prob must be in [0, 1), not {self.hidden_dropout_prob}.")
        for name in ("mlp_ratio", "layer_norm_eps", "initializer_range"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} must be above 0, not {getattr(self, name)}.")


# Registered here, so that a JEPA's configuration loads alone, also from code in a checkpoint.
AutoConfig.register(FeatureEncoderConfig.model_type, FeatureEncoderConfig, exist_ok=True)
