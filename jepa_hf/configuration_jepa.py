"""The configuration of a JEPA: any encoder's configuration, the predictor, the objective."""

import math
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

from .backbones import backbone_for
from .errors import UsageError


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
        mlm_weight: weight of a masked-language-model loss on the same encoder, default 0.
        variance_weight: weight of the variance hinge on the context encoder's token representations, default 0.
        covariance_weight: weight of their covariance penalty, default 0.
        sigreg_weight: weight of their SIGReg term, default 0.
        initializer_range: standard deviation of the predictor's random weights, default 0.02.

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
        mlm_weight: float = 0.0,
        variance_weight: float = 0.0,
        covariance_weight: float = 0.0,
        sigreg_weight: float = 0.0,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ):
        if encoder_config is None:
            raise UsageError("JepaConfig needs encoder_config, the configuration of an encoder such as BertConfig()")
        if isinstance(encoder_config, dict):
            encoder_config = AutoConfig.for_model(**encoder_config)
        backbone = backbone_for(encoder_config)
        depth, width = encoder_config.num_hidden_layers, encoder_config.hidden_size
        if context_mode is None:
            context_mode = "dropped" if backbone.drops_exactly and predictor_type == "transformer" else "kept"
        if pred_hidden_size is None:
            pred_hidden_size = width // 2
        if pred_num_attention_heads is None:
            pred_num_attention_heads = math.gcd(encoder_config.num_attention_heads, pred_hidden_size)
        if target_layers is None:
            target_layers = math.ceil(depth / 2)

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
        self.mlm_weight = mlm_weight
        self.variance_weight = variance_weight
        self.covariance_weight = covariance_weight
        self.sigreg_weight = sigreg_weight
        self.initializer_range = initializer_range
        self._validate_choices(backbone.drops_exactly, depth)
        if len(backbone.grid) == 2 and pred_hidden_size % 4:
            raise UsageError(
                f"pred_hidden_size must be a multiple of 4 over a plane of patches, not {pred_hidden_size}"
            )
        # Trainer compares these with the tokenizer's.
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            kwargs.setdefault(name, getattr(encoder_config, name, None))
        super().__init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """Width of the representations."""
        return self.encoder_config.hidden_size

    def _validate_choices(self, drops_exactly: bool, depth: int) -> None:
        for name, choices in (
            ("context_mode", ("kept", "dropped")),
            ("predictor_type", ("transformer", "mlp")),
            ("loss", ("smooth_l1", "l2", "l1", "cosine")),
            ("target_norm", ("layer", "instance", "none")),
        ):
            if getattr(self, name) not in choices:
                raise UsageError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        if self.context_mode == "dropped" and not drops_exactly:
            raise UsageError(
                f"context_mode 'dropped' is not exact for {self.encoder_config.model_type} encoders, whose attention "
                "depends on every position; use --context_mode kept"
            )
        if self.context_mode == "dropped" and self.predictor_type == "mlp":
            raise UsageError(
                "the mlp predictor reads the [MASK] positions, which context_mode 'dropped' leaves out; use "
                "--predictor_type transformer or --context_mode kept"
            )
        if not 1 <= self.target_layers <= depth:
            raise UsageError(
                f"target_layers must lie between 1 and the encoder's {depth} layers, not {self.target_layers}"
            )
        for name in ("pred_hidden_size", "pred_num_hidden_layers", "pred_num_attention_heads"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}")
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
        for name in ("mlm_weight", "variance_weight", "covariance_weight", "sigreg_weight"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} must not be negative, but is {getattr(self, name)}")
