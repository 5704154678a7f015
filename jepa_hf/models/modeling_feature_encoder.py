"""The feature encoder: a pre-norm transformer over the steps of a series, or over patches of a vector of features."""

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

from .configuration_feature_encoder import FeatureEncoderConfig
from .errors import UsageError
from .positions import gather_positions


class TimeEmbeddings(nn.Module):
    """One projection for all steps, plus a learned position: `[B, T, F]` -> `[B, T, D]`."""

    def __init__(self, config: FeatureEncoderConfig):
        super().__init__()
        self.projection = nn.Linear(config.input_dim, config.hidden_size)
        self.position_embeddings = nn.Parameter(torch.zeros(config.max_position_embeddings, config.hidden_size))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        steps, longest = features.shape[1], self.position_embeddings.shape[0]
        if steps > longest:
            raise UsageError(
                f"a series of {steps} steps is longer than max_position_embeddings {longest}: cut it, or build the "
                "encoder with more"
            )
        return self.projection(features.to(self.projection.weight.dtype)) + self.position_embeddings[:steps]


class PatchEmbeddings(nn.Module):
    """A projection of its own for each patch, as columns have meanings of their own: `[B, F]` -> `[B, P, D]`."""

    def __init__(self, config: FeatureEncoderConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.num_patches, config.patch_size, config.hidden_size))
        self.position_embeddings = nn.Parameter(torch.zeros(config.num_patches, config.hidden_size))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        patches, size, _ = self.weight.shape
        features = F.pad(features.to(self.weight.dtype), (0, patches * size - features.shape[1]))
        projected = torch.einsum("bps,psd->bpd", features.view(-1, patches, size), self.weight)
        return projected + self.position_embeddings


class FlatEmbedding(nn.Module):
    """The whole vector as one position, through GELU: `[B, F]` -> `[B, 1, D]`."""

    def __init__(self, config: FeatureEncoderConfig):
        super().__init__()
        self.projection = nn.Linear(config.input_dim, config.hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
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
    """Attention written out: `[B, heads, L, d]` each and a mask to add -> `[B, L, heads, d]` and the weights."""
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


class FeatureEncoderAttention(nn.Module):
    """Multi-head self-attention in both directions, without dropout."""

    is_causal = False

    def __init__(self, config: FeatureEncoderConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        batch, length, width = hidden_states.shape
        qkv = self.qkv(hidden_states).view(batch, length, 3, -1, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        mixed, _ = attend(self, query, key, value, attention_mask, scaling=self.head_dim**-0.5)
        return self.proj(mixed.reshape(batch, length, width))


class FeatureEncoderLayer(GradientCheckpointingLayer):
    """A pre-norm transformer block: x + Dropout(Attn(LN(x))), then x + Dropout(fc2(GELU(fc1(LN(x)))))."""

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
        """`[B, L, D]` and the mask of the attention in use -> `[B, L, D]`."""
        attended = self.attention(self.norm1(hidden_states), attention_mask)
        hidden_states = hidden_states + self.dropout(attended)
        fed = self.fc2(F.gelu(self.fc1(self.norm2(hidden_states))))
        return hidden_states + self.dropout(fed)


class FeatureEncoderModel(PreTrainedModel):
    """A transformer over features. It takes them raw: mean and standard deviation are part of the model.

    In mode "flat" this is the encoder of Edifice's JEPA code (dense, GELU, blocks, layer norm): with one position,
    attention passes the value on, and the query and key weights get no gradient.

    >>> model = FeatureEncoderModel(FeatureEncoderConfig(10, hidden_size=8, num_hidden_layers=1, patch_size=4))
    >>> model(torch.zeros(2, 10)).last_hidden_state.shape
    torch.Size([2, 3, 8])
    """

    config_class = FeatureEncoderConfig
    config: FeatureEncoderConfig
    base_model_prefix = "encoder"
    main_input_name = "features"
    supports_gradient_checkpointing = True
    _no_split_modules = ("FeatureEncoderLayer",)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: FeatureEncoderConfig):
        super().__init__(config)
        # Raw features may lie far from 0, where half precision is too coarse: float32 also in a model that is not.
        self.register_buffer("feature_mean", torch.zeros(config.input_dim, dtype=torch.float32))
        self.register_buffer("feature_std", torch.ones(config.input_dim, dtype=torch.float32))
        if config.mode == "time":
            self.embeddings = TimeEmbeddings(config)
        elif config.mode == "patches":
            self.embeddings = PatchEmbeddings(config)
        else:
            self.embeddings = FlatEmbedding(config)
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
            # from_pretrained builds on the meta device: what no checkpoint gave is uninitialised.
            init.zeros_(module.feature_mean)
            init.ones_(module.feature_std)

    def get_input_embeddings(self) -> nn.Module:
        """What makes vectors of the features, which accelerate's FSDP2 asks for."""
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings = value

    @torch.no_grad()
    def set_standardization(self, mean: torch.Tensor | Sequence[float], std: torch.Tensor | Sequence[float]) -> None:
        """Set what the input is standardised with: `(features - mean) / std`.

        Args:
            mean, std: `[F]` each, of the raw training features, in their units.

        Raises:
            UsageError: another length, or a value that is not finite, or a deviation that is not above 0.
        """
        mean, std = (torch.as_tensor(values, dtype=torch.float32) for values in (mean, std))
        for name, values, good in (("mean", mean, mean.isfinite()), ("std", std, std.isfinite() & (std > 0))):
            if values.shape != self.feature_mean.shape:
                raise UsageError(
                    f"the {name} of the features must have input_dim {self.config.input_dim} values, not the shape "
                    f"{tuple(values.shape)}"
                )
            if not good.all():
                feature = int((~good).nonzero()[0])
                raise UsageError(
                    f"the {name} of feature {feature} is {float(values[feature])}: a mean must be finite, a standard "
                    "deviation also above 0 (give 1 for a constant feature)"
                )
        self.feature_mean.copy_(mean)
        self.feature_std.copy_(std)

    def forward(
        self,
        features: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPooling | tuple[torch.Tensor, ...]:
        """Encode raw features.

        Args:
            features: float `[B, T, F]` in mode "time", `[B, F]` in the others; not standardised.
            attention_mask: long or bool `[B, L]` (`[B, C]` with `positions`); what is 0 is attended to by none and left
                out of the pooled output. L is T, the number of patches, or 1. Default: all ones.
            positions: long `[B, C]`, optional: the blocks run on these positions only, which equals the full pass with
                the others hidden by `attention_mask`.
            output_hidden_states, return_dict: default as in the configuration.

        Returns:
            `last_hidden_state` `[B, L, D]`; `pooler_output` `[B, D]`, its mean over the valid positions, 0 where there
            is none; on request `hidden_states`, the embeddings and each block's output (before the final layer norm).

        Raises:
            UsageError: features of another shape, a series that is too long, or a mask of another length.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if return_dict is None:
            return_dict = self.config.return_dict
        hidden_states = self.embeddings(self._standardize(features))
        if positions is not None:
            hidden_states = gather_positions(hidden_states, positions)

        visible = None
        if attention_mask is not None:
            if attention_mask.shape != hidden_states.shape[:2]:
                raise UsageError(
                    f"attention_mask has the shape {tuple(attention_mask.shape)}, but the encoder reads "
                    f"{tuple(hidden_states.shape[:2])} positions: give one entry for each"
                )
            visible = attention_mask.bool()
            # A row without a single valid position would attend to nothing and give NaN: let it attend to itself.
            attention_mask = visible | ~visible.any(dim=1, keepdim=True)
        attention_mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask
        )

        states = (hidden_states,)
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask)
            if output_hidden_states:
                states += (hidden_states,)
        last_hidden_state = self.norm(hidden_states)
        output = BaseModelOutputWithPooling(
            last_hidden_state=last_hidden_state,
            pooler_output=_mean_over_valid(last_hidden_state, visible),
            hidden_states=states if output_hidden_states else None,
        )
        return output if return_dict else output.to_tuple()

    def _standardize(self, features: torch.Tensor) -> torch.Tensor:
        width, is_series = self.config.input_dim, self.config.mode == "time"
        if features.dim() != 2 + is_series:
            expected = "[batch, steps, features]" if is_series else "[batch, features]"
            raise UsageError(
                f"an encoder of mode {self.config.mode} reads features {expected}, not the shape "
                f"{tuple(features.shape)}: reshape them, or build the encoder with another mode"
            )
        if features.shape[-1] != width:
            raise UsageError(
                f"the input has {features.shape[-1]} features, but the encoder reads {width}: give it the columns it "
                f"was built for, or build one with input_dim {features.shape[-1]}"
            )
        return (features.float() - self.feature_mean.float()) / self.feature_std.float()


def _mean_over_valid(states: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """`[B, L, D]`, bool `[B, L]` -> `[B, D]`."""
    if valid is None:
        return states.mean(dim=1)
    kept = torch.where(valid[..., None], states, 0.0)
    return kept.sum(dim=1) / valid.sum(dim=1, keepdim=True).clamp_min(1)


AutoModel.register(FeatureEncoderConfig, FeatureEncoderModel, exist_ok=True)
