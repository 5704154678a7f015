"""Configuration of a JEPA: an encoder's configuration, the predictor, the objective."""

import inspect
import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from types import NoneType
from typing import Any, ClassVar, Self

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, IJepaConfig, PreTrainedConfig

from .argument_names import refuse_unread_arguments
from .configuration_feature_encoder import FeatureEncoderConfig
from .encoder_adapter import EncoderAdapter
from .encoder_adapters import encoder_adapter_for
from .errors import UsageError, one_line
from .jepa_config_checks import validate_jepa_config

# Defaults of a modality that differ from those of `JepaConfig`; explicit values override both.
_MODALITY_DEFAULTS: dict[str, dict[str, Any]] = {
    "text": {},
    # I-JEPA (Assran et al. 2023, appendix A): normalized last layer, a predictor of at least six layers.
    "images": {"average_top_k_layers": 1, "pred_num_hidden_layers": 6},
    "features": {"average_top_k_layers": 1, "pred_dropout": 0.1},
}
# Those of text with a pretrained start: they learn content and forget little (benchmarks/RESULTS.md, entry 27).
_PRETRAINED_TEXT_DEFAULTS: dict[str, Any] = {
    "predictor_type": "mlp",
    "contrastive_predictor": "none",
    "contrastive_temperature": 0.05,
}
# Settings that only a transformer predictor has, and so ask for one.
_TRANSFORMER_SETTINGS = ("pred_hidden_size", "pred_num_hidden_layers", "pred_num_attention_heads", "pred_init")
# EMA decay of the first and the last update; None: computed from the run's length and start.
_MODALITY_EMA_DECAY: dict[str, tuple[float, float] | None] = {
    "text": None,
    "images": (0.996, 1.0),
    "features": (0.996, 0.996),
}


class JepaConfig(PreTrainedConfig):
    """Configuration of `JepaForRepresentationPrediction`.

    Args:
        encoder_config: configuration of the context and target encoder, or its dictionary.
        masked_tokens: "mask_token": masked positions stay in the context view as [MASK] tokens. "drop":
            the context encoder reads visible positions only. Default: "drop" with a transformer
            predictor if the encoder supports it exactly, else "mask_token".
        predictor_type: "transformer" (narrow, I-JEPA section 3; default) or "mlp" (reads [MASK]
            positions; see `for_encoder` for its use from a pretrained start).
        pred_hidden_size: width of the transformer predictor; default half the encoder's.
        pred_num_hidden_layers: its depth, default 4.
        pred_num_attention_heads: its heads; default the greatest common divisor of the encoder's
            heads and the predictor's width.
        pred_mlp_ratio: hidden over input width of the predictor's MLPs, default 4.
        pred_dropout: dropout in the predictor, default 0.
        loss: "smooth_l1" (default), "l2", "l1" or "cosine".
        smooth_l1_beta: transition of smooth L1 from quadratic to linear, default 1.
        average_top_k_layers: number of the target encoder's top layers to average; default half of them (data2vec).
        target_norm: "layer" (default), "instance" or "none": normalization without affine part, of
            each layer and of their average.
        prediction_weight: weight of the prediction loss, a mean over D; 0 trains on the other
            terms. Default √D for text, which gives data2vec's sum over D divided by √D. Default 1
            for images and features (I-JEPA) and with the cosine loss.
        mlm_weight: weight of a masked-language-model loss on the same encoder, default 0.
        variance_weight: weight of the variance hinge on the context encoder's outputs, default 0.
        covariance_weight: weight of their covariance penalty, default 0.
        sigreg_weight: weight of their SIGReg term, default 0.
        contrastive_weight: weight of InfoNCE between samples. A prediction from the mean of a
            sample's context is compared with the means of all samples' target layers. Default 1 for
            text, where it improved all measured runs (benchmarks/RESULTS.md, entry 14), else 0.
        contrastive_temperature: divisor of the cosines in InfoNCE, default 0.1.
        contrastive_predictor: "mlp" (default) predicts as above. "none" compares the vectors that
            an export gives, without a predictor: the means of the last layers of both encoders. It
            keeps a pretrained encoder's similarity and retrieval (benchmarks/RESULTS.md, entry 27).
        pool_targets: predict one vector per mask, the mean of its targets' representations.
        lora: arguments of `peft.LoraConfig`, such as `{"r": 16, "lora_alpha": 32}`; default None
            trains all weights. Adapters of the frozen context encoder are trained, the target
            encoder has their moving average, and an export has them merged.
        pred_init: standard deviation of the predictor's linear layers. "unit_gain": 1/√fan-in,
            which preserves scale. "small": `initializer_range`. Default unit gain if the encoder's
            outputs carry no absolute position (ModernBERT, DeBERTa), else small: with absolute
            positions and unit gain, a predictor learns the positions only.
        initializer_range: standard deviation of the other random weights outside the encoder, default 0.02.
        add_pooling_layer: whether the encoders have a pooler, which is never trained; set if a
            pretrained start has one.
        pretrained_encoder: whether the encoders started from pretrained weights, which decides
            defaults (see `for_encoder`) and what an export contains (see
            `default_exported_encoder`); set by `from_encoder_pretrained`.
        sentence_transformers: settings of a pretrained start that is a `SentenceTransformer`, by file
            name, for the export.

    Raises:
        UsageError: values contradict each other or the encoder.

    >>> from transformers import BertConfig
    >>> config = JepaConfig(BertConfig(num_hidden_layers=4), mlm_weight=0.5)
    >>> config.masked_tokens, config.average_top_k_layers, config.pred_hidden_size
    ('drop', 2, 384)
    """

    model_type = "jepa"
    sub_configs: ClassVar[dict[str, type]] = {"encoder_config": AutoConfig}
    has_no_defaults_at_init = True

    def __init__(
        self,
        encoder_config: PreTrainedConfig | dict[str, Any] | None = None,
        masked_tokens: str | None = None,
        predictor_type: str = "transformer",
        pred_hidden_size: int | None = None,
        pred_num_hidden_layers: int = 4,
        pred_num_attention_heads: int | None = None,
        pred_mlp_ratio: float = 4.0,
        pred_dropout: float = 0.0,
        loss: str = "smooth_l1",
        smooth_l1_beta: float = 1.0,
        average_top_k_layers: int | None = None,
        target_norm: str = "layer",
        prediction_weight: float | None = None,
        mlm_weight: float = 0.0,
        variance_weight: float = 0.0,
        covariance_weight: float = 0.0,
        sigreg_weight: float = 0.0,
        contrastive_weight: float | None = None,
        contrastive_temperature: float = 0.1,
        contrastive_predictor: str = "mlp",
        pool_targets: bool = False,
        lora: dict[str, Any] | None = None,
        pred_init: str | None = None,
        initializer_range: float = 0.02,
        add_pooling_layer: bool = False,
        pretrained_encoder: bool = False,
        sentence_transformers: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        # A line of the signature and one of the body for each setting: there is nothing to split.
        refuse_unread_arguments(kwargs, self.argument_names(), "JepaConfig")
        if encoder_config is None:
            raise UsageError("JepaConfig needs encoder_config, the configuration of an encoder such as BertConfig().")
        encoder_config = _resolve_encoder_config(encoder_config)
        adapter = encoder_adapter_for(encoder_config)
        is_text, width = adapter.modality == "text", encoder_config.hidden_size
        self.encoder_config = encoder_config
        self.masked_tokens = _or_default(masked_tokens, _default_masked_tokens(adapter, predictor_type))
        self.predictor_type = predictor_type
        self.pred_hidden_size = _or_default(pred_hidden_size, width // 2)
        self.pred_num_hidden_layers = pred_num_hidden_layers
        self.pred_num_attention_heads = _or_default(
            pred_num_attention_heads, _default_heads(encoder_config, self.pred_hidden_size)
        )
        self.pred_mlp_ratio = pred_mlp_ratio
        self.pred_dropout = pred_dropout
        self.loss = loss
        self.smooth_l1_beta = smooth_l1_beta
        self.average_top_k_layers = _or_default(average_top_k_layers, math.ceil(encoder_config.num_hidden_layers / 2))
        self.target_norm = target_norm
        self.prediction_weight = _or_default(prediction_weight, width**0.5 if is_text and loss != "cosine" else 1.0)
        self.mlm_weight = mlm_weight
        self.variance_weight = variance_weight
        self.covariance_weight = covariance_weight
        self.sigreg_weight = sigreg_weight
        self.contrastive_weight = _or_default(contrastive_weight, float(is_text))
        self.contrastive_temperature = contrastive_temperature
        self.contrastive_predictor = contrastive_predictor
        self.pool_targets = pool_targets
        self.lora = lora
        self.pred_init = _or_default(pred_init, "small" if adapter.absolute_positions else "unit_gain")
        self.initializer_range = initializer_range
        self.add_pooling_layer = add_pooling_layer
        self.pretrained_encoder = pretrained_encoder
        self.sentence_transformers = sentence_transformers
        validate_jepa_config(self, adapter)
        # Trainer compares these with the tokenizer's.
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            kwargs.setdefault(name, getattr(encoder_config, name, None))
        with _usage_error_on_bad_config("The JEPA's configuration"):
            super().__init__(**kwargs)
        _validate_dtype(self)

    @classmethod
    def argument_names(cls) -> tuple[str, ...]:
        """Return the names of the arguments."""
        return tuple(inspect.signature(cls.__init__).parameters)

    @classmethod
    def for_encoder(cls, encoder_config: PreTrainedConfig | dict[str, Any], **kwargs: Any) -> Self:
        """Build a configuration with the defaults of the encoder's modality and start.

        Text with `pretrained_encoder=True` gets an MLP predictor that reads [MASK] tokens, unless a setting asks for
        dropped positions or a transformer, and the contrast of the exported vectors at a temperature of 0.05.

        Args:
            encoder_config: configuration of the encoder, or its dictionary.
            kwargs: arguments of `JepaConfig`; they override the defaults.

        >>> from transformers import BertConfig
        >>> [JepaConfig.for_encoder(BertConfig(), pretrained_encoder=start).masked_tokens for start in (False, True)]
        ['drop', 'mask_token']
        """
        encoder_config = _resolve_encoder_config(encoder_config)
        modality = encoder_adapter_for(encoder_config).modality
        defaults = _MODALITY_DEFAULTS[modality]
        if modality == "text" and kwargs.get("pretrained_encoder"):
            defaults = dict(_PRETRAINED_TEXT_DEFAULTS)
            if kwargs.get("masked_tokens") == "drop" or any(name in kwargs for name in _TRANSFORMER_SETTINGS):
                defaults["predictor_type"] = "transformer"
        return cls(encoder_config, **{**defaults, **kwargs})

    @classmethod
    def for_images(cls, encoder_config: PreTrainedConfig | dict[str, Any] | None = None, **kwargs: Any) -> Self:
        """Build an I-JEPA: last-layer targets, a predictor of six layers, EMA 0.996 to 1.

        Args:
            encoder_config: configuration of a vision transformer; default `IJepaConfig()`.
            kwargs: arguments of `JepaConfig`; they override the defaults.

        >>> JepaConfig.for_images().average_top_k_layers
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
        """Build the Edifice JEPA for feature vectors and series, with its names and defaults.

        Its EMA decay is 0.996.

        Args:
            input_dim: number of features.
            mode: "patches": a vector is cut into patches of features; "flat": it is one token; "time": a series.
            embed_dim: width of the encoder.
            predictor_embed_dim: width of the predictor.
            encoder_depth: layers of the encoder.
            predictor_depth: layers of the predictor.
            num_heads: attention heads of both.
            mlp_ratio: hidden over input width of the MLPs of both.
            dropout: dropout of both.
            patch_size: features per patch, see `FeatureEncoderConfig`.
            max_position_embeddings: maximum length of a series, in time steps.
            kwargs: arguments of `JepaConfig`; they override the defaults.

        >>> JepaConfig.for_features(input_dim=287, mode="flat").masked_tokens
        'mask_token'
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
        """Default EMA decay of the first and the last update; None: from the run's length."""
        return _MODALITY_EMA_DECAY[encoder_adapter_for(self.encoder_config).modality]

    @property
    def default_exported_encoder(self) -> str:
        """Encoder that an export contains by default, "context" or "target".

        The target encoder for text with a pretrained start: its average of the start and of the
        run forgets less of what the start could do (benchmarks/RESULTS.md, entry 27).
        """
        is_text = encoder_adapter_for(self.encoder_config).modality == "text"
        return "target" if is_text and self.pretrained_encoder else "context"

    @property
    def hidden_size(self) -> int:
        """Width of the representations."""
        return self.encoder_config.hidden_size

    def to_dict(self) -> dict[str, Any]:
        """Serialize without the encoder's `_name_or_path`, which may be a local path."""
        values = super().to_dict()
        values["encoder_config"].pop("_name_or_path", None)
        return values


def check_predictor_settings(config: dict[str, Any], given: Collection[str]) -> None:
    """Refuse settings of a transformer predictor for a JEPA that has an MLP, unless the MLP is asked for, too."""
    unread = [name for name in _TRANSFORMER_SETTINGS if name in given]
    if config.get("predictor_type") == "mlp" and "predictor_type" not in given and unread:
        raise UsageError(f"{unread[0]} is for a transformer predictor, but that of this JEPA is an mlp. Leave it out.")


def _or_default(value: Any, default: Any) -> Any:
    """Return the value, or the default if it is None; 0 and "" are values."""
    return default if value is None else value


def _default_masked_tokens(adapter: EncoderAdapter, predictor_type: str) -> str:
    """Return the adapter's first mode; an MLP predictor needs [MASK] positions if there are any."""
    reads_mask_tokens = predictor_type != "transformer" and "mask_token" in adapter.masked_tokens_options
    return "mask_token" if reads_mask_tokens else adapter.masked_tokens_options[0]


def _default_heads(encoder_config: PreTrainedConfig, pred_hidden_size: Any) -> int:
    """Return the encoder's number of heads, reduced to a divisor of the predictor's width."""
    heads = encoder_config.num_attention_heads
    return math.gcd(heads, pred_hidden_size) if isinstance(pred_hidden_size, int) else heads


def _resolve_encoder_config(encoder_config: PreTrainedConfig | dict[str, Any]) -> PreTrainedConfig:
    """Build the encoder's configuration from its dictionary."""
    if isinstance(encoder_config, PreTrainedConfig):
        return encoder_config
    if not isinstance(encoder_config, dict) or not isinstance(encoder_config.get("model_type"), str):
        raise UsageError("encoder_config must be a configuration, or its dictionary with a model_type such as 'bert'.")
    with _usage_error_on_bad_config("encoder_config"):
        return _validate_dtype(AutoConfig.for_model(**encoder_config))


def _validate_dtype(config: PreTrainedConfig) -> PreTrainedConfig:
    """Refuse a `dtype` that transformers accepts and cannot serialize."""
    if not isinstance(config.dtype, (str, torch.dtype, NoneType)):
        raise UsageError(f"dtype must be a name such as 'float32', not {config.dtype!r:.80}.")
    return config


@contextmanager
def _usage_error_on_bad_config(subject: str) -> Iterator[None]:
    """Convert errors of transformers about a configuration's values to a `UsageError`."""
    try:
        yield
    except UsageError:
        raise
    except (ValueError, TypeError, AttributeError, LookupError, StrictDataclassError) as error:
        raise UsageError(
            f"{subject} cannot be read by transformers: {one_line(error):.300}. Correct its values."
        ) from error
