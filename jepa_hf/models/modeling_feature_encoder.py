"""The feature encoder: a pre-norm transformer over time steps or over patches of a vector."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.output_capturing import capture_outputs

from .configuration_feature_encoder import FeatureEncoderConfig
from .errors import UsageError
from .positions import gather_positions
from .upstream import attention_implementation


class TimeEmbeddings(nn.Module):
    """A shared projection of all steps plus learned positions."""

    def __init__(self, config: FeatureEncoderConfig):
        super().__init__()
        self.projection = nn.Linear(config.input_dim, config.hidden_size)
        self.position_embeddings = nn.Parameter(torch.zeros(config.max_position_embeddings, config.hidden_size))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Embed a series: `[B, T, F]` -> `[B, T, D]`."""
        steps, max_steps = features.shape[1], self.position_embeddings.shape[0]
        if steps > max_steps:
            raise UsageError(
                f"A series of {steps} steps is longer than max_position_embeddings {max_steps}. Cut it, or build the "
                "encoder with more."
            )
        return self.projection(features.to(self.projection.weight.dtype)) + self.position_embeddings[:steps]


class PatchEmbeddings(nn.Module):
    """A separate projection for each patch, because columns differ in meaning."""

    def __init__(self, config: FeatureEncoderConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.num_patches, config.patch_size, config.hidden_size))
        self.position_embeddings = nn.Parameter(torch.zeros(config.num_patches, config.hidden_size))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Embed vectors: `[B, F]` -> `[B, P, D]`."""
        patches, size, _ = self.weight.shape
        features = F.pad(features.to(self.weight.dtype), (0, patches * size - features.shape[1]))
        projected = torch.einsum("bps,psd->bpd", features.view(-1, patches, size), self.weight)
        return projected + self.position_embeddings


class FlatEmbedding(nn.Module):
    """A projection of the complete vector, through GELU."""

    def __init__(self, config: FeatureEncoderConfig):
        super().__init__()
        self.projection = nn.Linear(config.input_dim, config.hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Embed vectors: `[B, F]` -> `[B, 1, D]`."""
        return F.gelu(self.projection(features.to(self.projection.weight.dtype)))[:, None]


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute attention: `[B, heads, L, d]` each, additive mask -> `[B, L, heads, d]`, weights."""
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


class FeatureEncoderAttention(nn.Module):
    """Bidirectional multi-head self-attention without dropout."""

    is_causal = False

    def __init__(self, config: FeatureEncoderConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend: `[B, L, D]` -> `[B, L, D]`, and eager attention's weights `[B, heads, L, L]`."""
        batch, length, width = hidden_states.shape
        qkv = self.qkv(hidden_states).view(batch, length, 3, self.num_heads, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        implementation = attention_implementation(self.config)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        attn_output, weights = attention(self, query, key, value, attention_mask, scaling=self.head_dim**-0.5)
        return self.proj(attn_output.reshape(batch, length, width)), weights


class FeatureEncoderLayer(GradientCheckpointingLayer):
    """Pre-norm transformer block: x + Dropout(Attn(LN(x))), then x + Dropout(MLP(LN(x)))."""

    def __init__(self, config: FeatureEncoderConfig):
        super().__init__()
        inner = round(config.hidden_size * config.mlp_ratio)
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = FeatureEncoderAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(config.hidden_size, inner)
        self.fc2 = nn.Linear(inner, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Apply the block: `[B, L, D]`, a mask in the attention's own form -> `[B, L, D]`."""
        attn_output, _ = self.attention(self.norm1(hidden_states), attention_mask=attention_mask)
        hidden_states = hidden_states + self.dropout(attn_output)
        mlp_output = self.fc2(F.gelu(self.fc1(self.norm2(hidden_states))))
        return hidden_states + self.dropout(mlp_output)


_EMBEDDINGS = {"time": TimeEmbeddings, "patches": PatchEmbeddings, "flat": FlatEmbedding}


class FeatureEncoderModel(PreTrainedModel):
    """A transformer over raw features; mean and standard deviation are part of the model.

    Mode "flat" is the encoder of Edifice's JEPA code (dense, GELU, blocks, layer norm). With one
    position, attention returns the value, and query and key weights get no gradient.

    >>> model = FeatureEncoderModel(FeatureEncoderConfig(10, hidden_size=8, num_hidden_layers=1, patch_size=4))
    >>> model(torch.zeros(2, 10)).last_hidden_state.shape
    torch.Size([2, 3, 8])
    """

    config_class = FeatureEncoderConfig
    config: FeatureEncoderConfig
    base_model_prefix = "encoder"
    main_input_name = "features"
    supports_gradient_checkpointing = True
    _no_split_modules = ["FeatureEncoderLayer"]  # noqa: RUF012  (not a ClassVar in the base class)
    _can_record_outputs = {"hidden_states": FeatureEncoderLayer, "attentions": FeatureEncoderAttention}  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    feature_mean: torch.Tensor
    feature_std: torch.Tensor

    def __init__(self, config: FeatureEncoderConfig):
        super().__init__(config)
        # Always float32, because half precision is too coarse for raw features far from 0.
        self.register_buffer("feature_mean", torch.zeros(config.input_dim, dtype=torch.float32))
        self.register_buffer("feature_std", torch.ones(config.input_dim, dtype=torch.float32))
        self.embeddings: nn.Module = _EMBEDDINGS[config.mode](config)
        self.layers = nn.ModuleList(FeatureEncoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=std)
            init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, TimeEmbeddings):
            init.trunc_normal_(module.position_embeddings, std=std)
        elif isinstance(module, PatchEmbeddings):
            init.trunc_normal_(module.weight, std=std)
            init.trunc_normal_(module.position_embeddings, std=std)
        elif isinstance(module, FeatureEncoderModel):
            # from_pretrained builds on the meta device, which leaves missing buffers uninitialized.
            init.zeros_(module.feature_mean)
            init.ones_(module.feature_std)

    def get_input_embeddings(self) -> nn.Module:
        """Return the embeddings, which accelerate wraps under FSDP2."""
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embeddings."""
        self.embeddings = value

    @torch.no_grad()
    def set_standardization(self, mean: torch.Tensor | Sequence[float], std: torch.Tensor | Sequence[float]) -> None:
        """Set the standardization of the input: `(features - mean) / std`.

        Args:
            mean: mean of the raw training features, `[F]`.
            std: their standard deviation, `[F]`.

        Raises:
            UsageError: a wrong length, a value that is not finite, or a deviation of 0 or below.
        """
        mean, std = (torch.as_tensor(values, dtype=torch.float32) for values in (mean, std))
        for name, values, valid in (("mean", mean, mean.isfinite()), ("std", std, std.isfinite() & (std > 0))):
            if values.shape != self.feature_mean.shape:
                raise UsageError(
                    f"The {name} of the features must have input_dim {self.config.input_dim} values, not the shape "
                    f"{tuple(values.shape)}."
                )
            if not valid.all():
                feature = int((~valid).nonzero()[0])
                raise UsageError(
                    f"The {name} of feature {feature} is {float(values[feature])}. A mean must be finite, a standard "
                    "deviation also above 0. Set 1 for a constant feature."
                )
        self.feature_mean.copy_(mean)
        self.feature_std.copy_(std)

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        features: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> BaseModelOutputWithPooling:
        """Encode raw features.

        Args:
            features: raw floats, `[B, T, F]` in mode "time", `[B, F]` in the others.
            attention_mask: long or bool `[B, L]` (`[B, C]` with `positions`); positions with 0 are masked in attention
                and in the pooled output. L is T, the number of patches, or 1. Default: all ones.
            positions: long `[B, C]`; run the blocks on these positions only. Equals the full pass
                with the others masked by `attention_mask`.
            output_hidden_states: default as in the configuration.
            output_attentions: needs "eager" attention; default as in the configuration.

        `return_dict=False`, here or in the configuration, returns a tuple.

        Returns:
            `last_hidden_state` `[B, L, D]`; `pooler_output` `[B, D]`, its mean over the valid positions, 0 without any;
            on request `hidden_states`, the embeddings and each block's output before the final layer norm, and
            `attentions`, each block's weights. Features at masked positions have no effect, NaN included.

        Raises:
            UsageError: wrong shape of features or mask, or a series that is too long.
        """
        standardized = self._standardize(features)
        valid = None if attention_mask is None else attention_mask.bool()
        if positions is None:
            self._check_mask(valid, self._num_positions(features))
            hidden_states = self.embeddings(self._zero_unread(standardized, valid))
        else:
            self._check_mask(valid, tuple(positions.shape))
            read = torch.ones_like(positions) if valid is None else valid.long()
            counts = positions.new_zeros(self._num_positions(features)).scatter_add(1, positions, read)
            hidden_states = gather_positions(self.embeddings(self._zero_unread(standardized, counts > 0)), positions)

        # A row without valid positions attends to itself, because no key at all would give NaN.
        attended = None if valid is None else valid | ~valid.any(dim=1, keepdim=True)
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=hidden_states, attention_mask=attended)
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask=mask)
        last_hidden_state = self.norm(hidden_states)
        return BaseModelOutputWithPooling(
            last_hidden_state=last_hidden_state, pooler_output=_mean_over_valid(last_hidden_state, valid)
        )

    def _num_positions(self, features: torch.Tensor) -> tuple[int, int]:
        """Return the batch size and the number of time steps, of patches, or 1."""
        counts = {"time": features.shape[1], "patches": self.config.num_patches, "flat": 1}
        return features.shape[0], counts[self.config.mode]

    def _check_mask(self, valid: torch.Tensor | None, shape: tuple[int, ...]) -> None:
        """Raise a `UsageError` unless the mask has this shape."""
        if valid is not None and valid.shape != shape:
            raise UsageError(
                f"attention_mask has the shape {tuple(valid.shape)}, but the encoder reads {shape} positions. Pass "
                "one entry for each."
            )

    def _zero_unread(self, features: torch.Tensor, read: torch.Tensor | None) -> torch.Tensor:
        """Set features to 0 at positions that are not read, bool `[B, L]`.

        In attention and in the gradient of the projection, 0 × NaN would be NaN.
        """
        if read is None:
            return features
        if self.config.mode == "time":
            read = read[..., None]
        elif self.config.mode == "patches":
            read = read.repeat_interleave(self.config.patch_size, dim=1)[:, : features.shape[1]]
        return torch.where(read, features, 0.0)

    def _standardize(self, features: torch.Tensor) -> torch.Tensor:
        """Check the shape and standardize in float32."""
        width, is_series = self.config.input_dim, self.config.mode == "time"
        if features.dim() != 2 + is_series:
            expected = "[batch, steps, features]" if is_series else "[batch, features]"
            raise UsageError(
                f"An encoder of mode {self.config.mode} reads features {expected}, not the shape "
                f"{tuple(features.shape)}. Reshape them, or build the encoder with another mode."
            )
        if features.shape[-1] != width:
            raise UsageError(
                f"The input has {features.shape[-1]} features, but the encoder reads {width}. Select the columns it "
                f"was built for, or build one with input_dim {features.shape[-1]}."
            )
        return (features.float() - self.feature_mean.float()) / self.feature_std.float()


def _mean_over_valid(states: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Average valid positions: `[B, L, D]`, bool `[B, L]` -> `[B, D]`."""
    if valid is None:
        return states.mean(dim=1)
    total = torch.where(valid[..., None], states, 0.0).sum(dim=1)
    return total / valid.sum(dim=1, keepdim=True).clamp_min(1)


AutoModel.register(FeatureEncoderConfig, FeatureEncoderModel, exist_ok=True)
