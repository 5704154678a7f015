"""The configuration of a JEPA: any encoder's configuration, the predictor, the objective."""

import difflib
import inspect
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from numbers import Real
from types import NoneType
from typing import Any, ClassVar, Self

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, IJepaConfig, PreTrainedConfig

from .backbones import Backbone, backbone_for
from .configuration_feature_encoder import FeatureEncoderConfig
from .errors import UsageError
from .lora import lora_config

# What an objective other than text changes about the defaults; explicit values always win.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "text": {},
    # I-JEPA (Assran et al. 2023, appendix A): the last layer's output, normalised; a predictor of six layers or more.
    "images": {"target_layers": 1, "pred_num_hidden_layers": 6},
    "features": {"target_layers": 1, "pred_dropout": 0.1},
}
# EMA decay of the first and the last update; None: derived from the run's length and start.
_EMA_DECAY: dict[str, tuple[float, float] | None] = {
    "text": None,
    "images": (0.996, 1.0),
    "features": (0.996, 0.996),
}

# The weights of the terms that the loss is a sum of.
WEIGHTS = (
    "prediction_weight",
    "mlm_weight",
    "variance_weight",
    "covariance_weight",
    "sigreg_weight",
    "contrastive_weight",
)
_REAL_NUMBERS = (
    *WEIGHTS,
    "pred_mlp_ratio",
    "pred_dropout",
    "smooth_l1_beta",
    "contrastive_temperature",
    "initializer_range",
)


class JepaConfig(PreTrainedConfig):
    """Configuration of `JepaForRepresentationPrediction`.

    Args:
        encoder_config: configuration of the context and target encoder, or its dictionary.
        context_mode: "kept": masked positions stay in the context view as [MASK] tokens; "dropped": the context encoder
            reads only what is visible. Default: dropped with a transformer predictor where the encoder can leave
            positions out exactly, kept otherwise.
        predictor_type: "transformer" (a narrow one, I-JEPA section 3) or "mlp" (reads the [MASK] positions).
        pred_hidden_size: width of the transformer predictor; default half the encoder's.
        pred_num_hidden_layers: its depth, default 4.
        pred_num_attention_heads: its heads; default as many as the encoder has, where they divide its width.
        pred_mlp_ratio: width of the hidden layer over that of the input, in the MLP predictor and in the transformer's
            feed-forward parts, default 4.
        pred_dropout: dropout in the predictor, default 0.
        loss: "smooth_l1", "l2", "l1" or "cosine".
        smooth_l1_beta: where smooth L1 turns from quadratic to linear, default 1.
        target_layers: how many of the target encoder's top layers are averaged; default half of them (data2vec).
        target_norm: "layer", "instance" or "none": normalisation, without affine, of each layer and of their average.
        prediction_weight: weight of the prediction loss, which is a mean over D; 0 trains on the other terms alone.
            Default √D for text, which makes it data2vec's sum over D divided by √D; 1 for images and features (I-JEPA)
            and with the cosine loss.
        mlm_weight: weight of a masked-language-model loss on the same encoder, default 0.
        variance_weight: weight of the variance hinge on the context encoder's token representations, default 0.
        covariance_weight: weight of their covariance penalty, default 0.
        sigreg_weight: weight of their SIGReg term, default 0.
        contrastive_weight: weight of finding each sample among those of the batch: what the mean of its context
            predicts is compared with the mean of every sample's target layers (InfoNCE). Default 1 for text, where
            less is learnt without it on every start that was measured (benchmarks/RESULTS.md, section 14), else 0.
        contrastive_temperature: what the cosines of that comparison are divided by, default 0.1.
        pooled_targets: predict one vector per mask, the mean of its targets' representations, instead of each of them.
        lora: train adapters beside the context encoder's frozen weights: arguments of `peft.LoraConfig`, such as
            `{"r": 16, "lora_alpha": 32}`; default None, all weights are trained. The target encoder is then the same
            frozen weights with the moving average of the adapters, and what is exported has them merged.
        pred_init: standard deviation of the random weights of the predictor's linear layers. "unit_gain": 1/√fan-in,
            which keeps the scale of what passes through; "small": `initializer_range`. Default unit gain where the
            encoder's outputs carry no absolute position (ModernBERT, DeBERTa), else small: with unit gain a predictor
            of an encoder with absolute positions learns the positions and nothing more.
        initializer_range: standard deviation of the other random weights outside the encoder, default 0.02.

    Raises:
        UsageError: values that contradict each other or the encoder.

    >>> from transformers import BertConfig
    >>> config = JepaConfig(BertConfig(num_hidden_layers=4), mlm_weight=0.5)
    >>> config.context_mode, config.target_layers, config.pred_hidden_size
    ('dropped', 2, 384)
    """

    model_type = "jepa"
    sub_configs: ClassVar[dict[str, type]] = {"encoder_config": AutoConfig}
    has_no_defaults_at_init = True

    def __init__(
        self,
        encoder_config: PreTrainedConfig | dict[str, Any] | None = None,
        context_mode: str | None = None,
        predictor_type: str = "transformer",
        pred_hidden_size: int | None = None,
        pred_num_hidden_layers: int = 4,
        pred_num_attention_heads: int | None = None,
        pred_mlp_ratio: float = 4.0,
        pred_dropout: float = 0.0,
        loss: str = "smooth_l1",
        smooth_l1_beta: float = 1.0,
        target_layers: int | None = None,
        target_norm: str = "layer",
        prediction_weight: float | None = None,
        mlm_weight: float = 0.0,
        variance_weight: float = 0.0,
        covariance_weight: float = 0.0,
        sigreg_weight: float = 0.0,
        contrastive_weight: float | None = None,
        contrastive_temperature: float = 0.1,
        pooled_targets: bool = False,
        lora: dict[str, Any] | None = None,
        pred_init: str | None = None,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ):
        _refuse_misspelt(kwargs)
        if encoder_config is None:
            raise UsageError("JepaConfig needs encoder_config, the configuration of an encoder such as BertConfig()")
        encoder_config = _as_configuration(encoder_config)
        backbone = backbone_for(encoder_config)
        depth, width = encoder_config.num_hidden_layers, encoder_config.hidden_size
        if context_mode is None:
            both = predictor_type == "transformer" or "kept" not in backbone.context_modes
            context_mode = backbone.context_modes[0] if both else "kept"
        if pred_hidden_size is None:
            pred_hidden_size = width // 2
        if pred_num_attention_heads is None and isinstance(pred_hidden_size, int):
            pred_num_attention_heads = math.gcd(encoder_config.num_attention_heads, pred_hidden_size)
        if target_layers is None:
            target_layers = math.ceil(depth / 2)
        if prediction_weight is None:
            prediction_weight = width**0.5 if backbone.modality == "text" and loss != "cosine" else 1.0
        if pred_init is None:
            pred_init = "small" if backbone.absolute_positions else "unit_gain"
        if contrastive_weight is None:
            contrastive_weight = 1.0 if backbone.modality == "text" else 0.0

        self.encoder_config = encoder_config
        self.context_mode = context_mode
        self.predictor_type = predictor_type
        self.pred_hidden_size = pred_hidden_size
        self.pred_num_hidden_layers = pred_num_hidden_layers
        self.pred_num_attention_heads = pred_num_attention_heads
        self.pred_mlp_ratio = pred_mlp_ratio
        self.pred_dropout = pred_dropout
        self.loss = loss
        self.smooth_l1_beta = smooth_l1_beta
        self.target_layers = target_layers
        self.target_norm = target_norm
        self.prediction_weight = prediction_weight
        self.mlm_weight = mlm_weight
        self.variance_weight = variance_weight
        self.covariance_weight = covariance_weight
        self.sigreg_weight = sigreg_weight
        self.contrastive_weight = contrastive_weight
        self.contrastive_temperature = contrastive_temperature
        self.pooled_targets = pooled_targets
        self.lora = lora
        self.pred_init = pred_init
        self.initializer_range = initializer_range
        self._validate_choices(backbone, depth)
        if len(backbone.grid) == 2 and pred_hidden_size % 4:
            raise UsageError(
                f"pred_hidden_size must be a multiple of 4 over a plane of patches, not {pred_hidden_size}"
            )
        # Trainer compares these with the tokenizer's.
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            kwargs.setdefault(name, getattr(encoder_config, name, None))
        with _as_transformers_reads_it("the JEPA's configuration"):
            super().__init__(**kwargs)
        _checked(self)

    @classmethod
    def for_encoder(cls, encoder_config: PreTrainedConfig | dict[str, Any], **kwargs: Any) -> Self:
        """The configuration around an encoder, with the defaults of what it reads: text, images or features.

        Args:
            encoder_config: as `JepaConfig` takes it.
            kwargs: arguments of `JepaConfig`; they win over the defaults.
        """
        encoder_config = _as_configuration(encoder_config)
        return cls(encoder_config, **{**_DEFAULTS[backbone_for(encoder_config).modality], **kwargs})

    @classmethod
    def for_images(cls, encoder_config: PreTrainedConfig | dict[str, Any] | None = None, **kwargs: Any) -> Self:
        """I-JEPA: normalised targets of the last layer, a narrow predictor of six layers, EMA 0.996 to 1.

        Args:
            encoder_config: of a vision transformer; default `IJepaConfig()`.
            kwargs: arguments of `JepaConfig`; they win.

        >>> JepaConfig.for_images().target_layers
        1
        """
        return cls.for_encoder(IJepaConfig() if encoder_config is None else encoder_config, **kwargs)

    @classmethod
    def for_features(
        cls,
        input_dim: int,
        *,
        mode: str = "patches",
        embed_dim: int = 256,
        predictor_embed_dim: int = 128,
        encoder_depth: int = 6,
        predictor_depth: int = 4,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        dropout: float = 0.1,
        patch_size: int | None = None,
        max_position_embeddings: int = 512,
        **kwargs: Any,
    ) -> Self:
        """The Edifice JEPA for vectors of features and series of them, with its names and defaults (EMA: 0.996).

        Args:
            input_dim: number of features.
            mode: "patches": a vector is cut into patches of features; "flat": it is one token; "time": a series.
            embed_dim, encoder_depth: width and depth of the encoder.
            predictor_embed_dim, predictor_depth: of the predictor.
            num_heads, mlp_ratio, dropout: of both.
            patch_size: features per patch, see `FeatureEncoderConfig`.
            max_position_embeddings: longest series, in time steps.
            kwargs: arguments of `JepaConfig`; they win.

        >>> JepaConfig.for_features(input_dim=287, mode="flat").context_mode
        'kept'
        """
        encoder_config = FeatureEncoderConfig(
            input_dim=input_dim,
            mode=mode,
            hidden_size=embed_dim,
            num_hidden_layers=encoder_depth,
            num_attention_heads=num_heads,
            mlp_ratio=mlp_ratio,
            hidden_dropout_prob=dropout,
            patch_size=patch_size,
            max_position_embeddings=max_position_embeddings,
        )
        predictor = {
            "pred_hidden_size": predictor_embed_dim,
            "pred_num_hidden_layers": predictor_depth,
            "pred_num_attention_heads": num_heads,
            "pred_mlp_ratio": mlp_ratio,
            "pred_dropout": dropout,
        }
        return cls.for_encoder(encoder_config, **{**predictor, **kwargs})

    @property
    def ema_decay_range(self) -> tuple[float, float] | None:
        """EMA decay of the first and the last update where no flag says otherwise; None: from the run's length."""
        return _EMA_DECAY[backbone_for(self.encoder_config).modality]

    @property
    def hidden_size(self) -> int:
        """Width of the representations."""
        return self.encoder_config.hidden_size

    def to_dict(self) -> dict[str, Any]:
        """As `PreTrainedConfig`'s, without the place that the encoder was read from: a path on somebody's machine."""
        values = super().to_dict()
        values["encoder_config"].pop("_name_or_path", None)
        return values

    def _validate_choices(self, backbone: Backbone, depth: int) -> None:
        for name, choices in (
            ("context_mode", ("kept", "dropped")),
            ("predictor_type", ("transformer", "mlp")),
            ("loss", ("smooth_l1", "l2", "l1", "cosine")),
            ("target_norm", ("layer", "instance", "none")),
            ("pred_init", ("unit_gain", "small")),
        ):
            if getattr(self, name) not in choices:
                raise UsageError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        for name in ("target_layers", "pred_hidden_size", "pred_num_hidden_layers", "pred_num_attention_heads"):
            if not isinstance(getattr(self, name), int):
                raise UsageError(f"{name} must be a whole number, not {getattr(self, name)!r:.80}")
        for name in _REAL_NUMBERS:
            value = getattr(self, name)
            if not isinstance(value, Real) or not math.isfinite(value):
                raise UsageError(f"{name} must be a finite number, not {value!r:.80}")
        if not isinstance(self.pooled_targets, bool):
            raise UsageError(f"pooled_targets must be true or false, not {self.pooled_targets!r:.80}")
        if self.context_mode == "kept" and "kept" not in backbone.context_modes:
            raise UsageError(
                f"context_mode 'kept' is not there for {self.encoder_config.model_type} encoders, which have no [MASK] "
                "token for hidden patches; use --context_mode dropped"
            )
        if self.context_mode == "dropped" and "dropped" not in backbone.context_modes:
            reason = "depends on every position" if backbone.grid else "has one position only"
            raise UsageError(
                f"context_mode 'dropped' is not exact for {self.encoder_config.model_type} encoders, whose attention "
                f"{reason}; use --context_mode kept"
            )
        if self.context_mode == "dropped" and self.predictor_type == "mlp":
            raise UsageError(
                "the mlp predictor reads the [MASK] positions, which context_mode 'dropped' leaves out; use "
                "--predictor_type transformer or --context_mode kept"
            )
        if self.target_norm == "instance" and not backbone.grid:
            raise UsageError(
                "target_norm instance is over a sample's positions, and there is one only; use layer or none"
            )
        if self.pooled_targets and self.mlm_weight > 0:
            raise UsageError("pooled_targets has one target per mask, and mlm_weight one per token; give one of them")
        if not 1 <= self.target_layers <= depth:
            raise UsageError(
                f"target_layers must lie between 1 and the encoder's {depth} layers, not {self.target_layers}"
            )
        for name in ("pred_hidden_size", "pred_num_hidden_layers", "pred_num_attention_heads"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.lora is not None:
            lora_config(self.lora)
        if self.pred_mlp_ratio <= 0:
            raise UsageError(f"pred_mlp_ratio must be above 0, not {self.pred_mlp_ratio}")
        if not 0.0 <= self.pred_dropout < 1.0:
            raise UsageError(f"pred_dropout must lie in [0, 1), not {self.pred_dropout}")
        if self.pred_hidden_size % self.pred_num_attention_heads:
            raise UsageError(
                f"pred_hidden_size {self.pred_hidden_size} is not a multiple of pred_num_attention_heads "
                f"{self.pred_num_attention_heads}"
            )
        if self.smooth_l1_beta <= 0:
            raise UsageError(f"smooth_l1_beta must be above 0, not {self.smooth_l1_beta}; use --loss l1 for its limit")
        if self.contrastive_temperature <= 0:
            raise UsageError(f"contrastive_temperature must be above 0, not {self.contrastive_temperature}")
        for name in WEIGHTS:
            if getattr(self, name) < 0:
                raise UsageError(f"{name} must not be negative, but is {getattr(self, name)}")
        if not any(getattr(self, name) for name in WEIGHTS):
            raise UsageError(f"every weight is 0, so nothing is learned: give one of {', '.join(WEIGHTS)} above 0")


def _refuse_misspelt(names: Iterable[str]) -> None:
    """Refuse names that are nearly an argument's: `PreTrainedConfig` would keep them, and nothing would read them.

    Others pass, because configurations carry names of transformers, of tools and of users.

    Raises:
        UsageError: a name is nearly that of an argument of `JepaConfig`.
    """
    known = list(inspect.signature(JepaConfig.__init__).parameters)
    for name in names:
        if meant := difflib.get_close_matches(name, known, n=1, cutoff=0.8):
            raise UsageError(f"Expected an argument of JepaConfig, got {name!r}. Did you mean {meant[0]!r}?")


def _as_configuration(encoder_config: PreTrainedConfig | dict[str, Any]) -> PreTrainedConfig:
    """The configuration that a dictionary, perhaps from somebody else's file, means."""
    if isinstance(encoder_config, PreTrainedConfig):
        return encoder_config
    if not isinstance(encoder_config, dict) or not isinstance(encoder_config.get("model_type"), str):
        raise UsageError("encoder_config must be a configuration, or its dictionary with a model_type such as 'bert'")
    with _as_transformers_reads_it("encoder_config"):
        return _checked(AutoConfig.for_model(**encoder_config))


def _checked(config: PreTrainedConfig) -> PreTrainedConfig:
    """Refuse a type that transformers would read, and trip over when it writes it."""
    if not isinstance(config.dtype, (str, torch.dtype, NoneType)):
        raise UsageError(f"dtype must be a name such as 'float32', not {config.dtype!r:.80}")
    return config


@contextmanager
def _as_transformers_reads_it(what: str) -> Iterator[None]:
    """Make a `UsageError` of what transformers raises when a value in a configuration is of the wrong kind."""
    try:
        yield
    except UsageError:
        raise
    except (ValueError, TypeError, AttributeError, LookupError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{what} is none that transformers can read: {reason:.300}; mend its values") from error
