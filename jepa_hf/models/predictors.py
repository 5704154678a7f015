"""Predictors: from the context encoder's outputs to predictions at the target positions."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .packed_sequences import block_diagonal_mask, document_position_ids, gather_document_ids
from .positions import gather_positions, rotary_angles, rotate, sincos_positions


class MLPPredictor(nn.Module):
    """Linear, GELU, dropout, linear at the target positions (data2vec's regression head)."""

    def __init__(self, hidden_size: int, mlp_ratio: float = 4.0, dropout: float = 0.0):
        super().__init__()
        inner = round(hidden_size * mlp_ratio)
        self.fc1 = nn.Linear(hidden_size, inner)
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(inner, hidden_size)

    def forward(
        self,
        context: torch.Tensor,
        context_positions: torch.Tensor,
        context_valid: torch.Tensor,
        target_positions: torch.Tensor,
        target_valid: torch.Tensor,
        document_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Predict each target from the context encoder's output at its own [MASK] position.

        `context` `[N, L, D]` has all positions; with `target_positions` long `[N, T]` this returns
        `[N, T, D]`. The other arguments of `TransformerPredictor.forward` are not used.
        """
        states = gather_positions(context, target_positions)
        return self.fc2(self.dropout(F.gelu(self.fc1(states))))


class PooledPredictor(nn.Module):
    """Linear, GELU, linear: from the mean of a sample's context to the mean of its targets."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, 2 * hidden_size)
        self.fc2 = nn.Linear(2 * hidden_size, hidden_size)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Predict `[N, D]` from `[N, D]`."""
        return self.fc2(F.gelu(self.fc1(states)))


class PredictorBlock(nn.Module):
    """Pre-norm transformer block with dropout after attention and after the MLP."""

    def __init__(self, hidden_size: int, num_attention_heads: int, mlp_ratio: float, dropout: float):
        super().__init__()
        self.num_attention_heads = num_attention_heads
        self.dropout = dropout
        inner = round(hidden_size * mlp_ratio)
        self.norm1 = nn.LayerNorm(hidden_size)
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key_value = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.norm2 = nn.LayerNorm(hidden_size)
        self.fc1 = nn.Linear(hidden_size, inner)
        self.fc2 = nn.Linear(inner, hidden_size)

    def forward(
        self,
        states: torch.Tensor,
        attention_mask: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor] | None = None,
        num_queries: int | None = None,
    ) -> torch.Tensor:
        """Apply attention over the positions, then the MLP.

        Args:
            states: `[N, S, H]`.
            attention_mask: bool `[N, 1, 1 or Q, S]`, True where a query may attend to a key.
            rotation: cosines and sines of the rotary angles, `[N, 1, S, H / heads // 2]` each;
                default no rotary attention.
            num_queries: compute only the last Q positions; default all S.

        Returns:
            `[N, Q, H]`.
        """
        normed = self.norm1(states)
        first = 0 if num_queries is None else states.shape[1] - num_queries
        query = self._heads(self.query(normed[:, first:]))
        key, value = (self._heads(part) for part in self.key_value(normed).chunk(2, dim=-1))
        if rotation is not None:
            cos, sin = rotation
            query, key = rotate(query, cos[:, :, first:], sin[:, :, first:]), rotate(key, cos, sin)
        attn_output = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        attn_output = self.proj(attn_output.transpose(1, 2).flatten(2))
        states = states[:, first:] + F.dropout(attn_output, self.dropout, self.training)
        mlp_output = self.fc2(F.gelu(self.fc1(self.norm2(states))))
        return states + F.dropout(mlp_output, self.dropout, self.training)

    def _heads(self, states: torch.Tensor) -> torch.Tensor:
        """Split the heads: `[N, S, H]` -> `[N, heads, S, H / heads]`."""
        return states.unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)


class _TransformerPredictorBase(nn.Module):
    """Base of the transformer predictors: projection down, blocks, layer norm, projection up."""

    def __init__(
        self,
        hidden_size: int,
        width: int,
        num_hidden_layers: int,
        num_attention_heads: int,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.head_size = width // num_attention_heads
        self.embed = nn.Linear(hidden_size, width)
        self.layers = nn.ModuleList(
            PredictorBlock(width, num_attention_heads, mlp_ratio, dropout) for _ in range(num_hidden_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, hidden_size)


class TransformerPredictor(_TransformerPredictorBase):
    """A narrow transformer over context outputs and mask tokens (I-JEPA, section 3).

    Projection down, position embedding, one learned mask token, pre-norm blocks, layer norm,
    projection up. The last block computes the targets only.

    A 1-D predictor also has rotary attention (RoFormer, Su et al. 2021, section 3.2). With a table
    alone, adjacency must be learned for each pair of positions. The outputs of an encoder with
    rotary positions carry no absolute position, so a mask token could not locate its neighbours.

    Args:
        hidden_size: width D of the encoder.
        width: width of the predictor.
        num_hidden_layers: number of blocks.
        num_attention_heads: heads per block.
        grid: shape of the embedded positions. `(length,)` has a learned table and rotary attention,
            `(rows, columns)` a fixed 2-D sine-cosine table.
        mlp_ratio: width of the blocks' MLP over `width`, default 4.
        dropout: dropout in the blocks, default 0.
    """

    def __init__(
        self,
        hidden_size: int,
        width: int,
        num_hidden_layers: int,
        num_attention_heads: int,
        grid: tuple[int, ...],
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
    ):
        super().__init__(hidden_size, width, num_hidden_layers, num_attention_heads, mlp_ratio, dropout)
        self.grid = grid
        self.mask_token = nn.Parameter(torch.zeros(width))
        if len(grid) == 1:
            self.position_embeddings = nn.Parameter(torch.zeros(grid[0], width))
        else:
            self.register_buffer("position_embeddings", sincos_positions(grid, width), persistent=False)

    def initialize(self, std: float, unit_gain: bool) -> None:
        """Initialize the mask token and the positions, and with `unit_gain` the linear layers."""
        if unit_gain:
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    init.trunc_normal_(module.weight, std=module.in_features**-0.5)
        init.trunc_normal_(self.mask_token, std=std)
        if len(self.grid) == 1:
            init.trunc_normal_(self.position_embeddings, std=std)
        else:
            # from_pretrained builds on the meta device and leaves non-persistent buffers uninitialized.
            init.copy_(self.position_embeddings, sincos_positions(self.grid, self.position_embeddings.shape[1]))

    def forward(
        self,
        context: torch.Tensor,
        context_positions: torch.Tensor,
        context_valid: torch.Tensor,
        target_positions: torch.Tensor,
        target_valid: torch.Tensor,
        document_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Predict the targets from the visible context.

        Args:
            context: the context encoder's outputs `[N, C, D]`.
            context_positions: their positions, long `[N, C]`.
            context_valid: bool `[N, C]`, False on padding and [MASK] tokens.
            target_positions: long `[N, T]`.
            target_valid: bool `[N, T]`, False on padding.
            document_ids: document ids of packed rows, long `[N, L]`. Each document is predicted
                from itself alone, and positions count from its first token.

        Returns:
            `[N, T, D]`; undefined where `target_valid` is False.
        """
        valid = torch.cat([context_valid, target_valid], dim=1)
        positions = torch.cat([context_positions, target_positions], dim=1)
        if document_ids is None:
            attention_mask = valid[:, None, None, :]
            # A row without valid positions attends to itself, because no key at all would give NaN.
            attention_mask = attention_mask | ~attention_mask.any(dim=-1, keepdim=True)
        else:
            attention_mask = block_diagonal_mask(gather_document_ids(document_ids, positions, valid))
            positions = document_position_ids(document_ids).gather(1, positions)
        mask_tokens = self.mask_token.expand(*target_positions.shape, -1)
        # 0 × NaN would be NaN in attention.
        context = torch.where(context_valid[..., None], context, 0.0)
        states = torch.cat([self.embed(context), mask_tokens], dim=1) + self.position_embeddings[positions]
        rotation = None
        if len(self.grid) == 1:
            angles = rotary_angles(positions, self.head_size)[:, None]
            rotation = angles.cos(), angles.sin()
        for layer in self.layers[:-1]:
            states = layer(states, attention_mask=attention_mask, rotation=rotation)
        # The last block's outputs at the context are not needed.
        num_queries = target_positions.shape[1]
        last_mask = attention_mask[:, :, -num_queries:]
        states = self.layers[-1](states, attention_mask=last_mask, rotation=rotation, num_queries=num_queries)
        return self.proj(self.norm(states))


class SingleTokenPredictor(_TransformerPredictorBase):
    """A narrow transformer over a single token (the predictor of the Edifice JEPA).

    Projection down, GELU, pre-norm blocks, layer norm, projection up. With one position there is neither a position
    table nor a mask token. Softmax over one token is 1, so the blocks' queries and keys get no gradient.
    """

    def forward(
        self,
        context: torch.Tensor,
        context_positions: torch.Tensor,
        context_valid: torch.Tensor,
        target_positions: torch.Tensor,
        target_valid: torch.Tensor,
        document_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Predict the clean vector's representation from that of the masked one.

        `context` `[N, 1, D]` -> `[N, 1, D]`. The other arguments of `TransformerPredictor.forward` are not used.
        """
        states = F.gelu(self.embed(context))
        no_mask = torch.ones(states.shape[0], 1, 1, 1, dtype=torch.bool, device=states.device)
        for layer in self.layers:
            states = layer(states, attention_mask=no_mask)
        return self.proj(self.norm(states))
