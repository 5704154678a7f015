"""The predictors: from the context encoder's outputs to guesses at the target positions."""

import torch
import torch.nn.functional as F
from torch import nn

from .packed_sequences import documents_at, positions_in_documents, same_document
from .positions import gather_positions, rotary_angles, rotate, sincos_positions


class MLPPredictor(nn.Module):
    """Linear, GELU, dropout, linear, at the target positions alone (data2vec's regression head)."""

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
        sequence_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Guess each target from the context encoder's output at its own [MASK] position.

        Args:
            context: `[N, L, D]`, all positions.
            context_positions, context_valid, target_valid, sequence_ids: not read.
            target_positions: long `[N, T]`.

        Returns:
            `[N, T, D]`.
        """
        states = gather_positions(context, target_positions)
        return self.fc2(self.dropout(F.gelu(self.fc1(states))))


class PooledPredictor(nn.Module):
    """Linear, GELU, linear: from the mean of a sample's context to a guess at the mean of its targets."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, 2 * hidden_size)
        self.fc2 = nn.Linear(2 * hidden_size, hidden_size)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """`[N, D]` -> `[N, D]`."""
        return self.fc2(F.gelu(self.fc1(states)))


class PredictorBlock(nn.Module):
    """A pre-norm transformer block; dropout after attention and after the feed-forward part, none inside attention."""

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
        """Mix the positions, then transform each of them.

        Args:
            states: `[N, S, H]`.
            attention_mask: bool `[N, 1, 1 or Q, S]`, True where a query may attend to a key.
            rotation: cosines and sines of the positions' rotary angles, `[N, 1, S, H / heads // 2]` each; default no
                rotary attention.
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
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        mixed = self.proj(mixed.transpose(1, 2).flatten(2))
        states = states[:, first:] + F.dropout(mixed, self.dropout, self.training)
        fed = self.fc2(F.gelu(self.fc1(self.norm2(states))))
        return states + F.dropout(fed, self.dropout, self.training)

    def _heads(self, states: torch.Tensor) -> torch.Tensor:
        """`[N, S, H]` -> `[N, heads, S, H / heads]`."""
        return states.unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)


class _NarrowTransformer(nn.Module):
    """What both transformer predictors are made of: projection down, pre-norm blocks, layer norm, projection up."""

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
        self.embed = nn.Linear(hidden_size, width)
        self.layers = nn.ModuleList(
            PredictorBlock(width, num_attention_heads, mlp_ratio, dropout) for _ in range(num_hidden_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, hidden_size)


class TransformerPredictor(_NarrowTransformer):
    """A narrow transformer over context outputs and mask tokens (I-JEPA, section 3).

    Projection down, position embedding, one learned mask token, pre-norm blocks, layer norm, projection up. The last
    block computes the targets only.

    Over a line of positions the attention is also rotary (Su et al. 2021, "RoFormer", section 3.2). The table alone
    makes "next to" a relation that has to be learned for each pair of positions. An encoder with rotary positions puts
    no position into its outputs, and then a mask token does not find its neighbours.

    Args:
        hidden_size: width D of the encoder.
        width: width of the predictor.
        grid: positions it embeds: `(length,)` gets a learned table and rotary attention, `(rows, columns)` fixed 2-D
            sine and cosine.
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

    def forward(
        self,
        context: torch.Tensor,
        context_positions: torch.Tensor,
        context_valid: torch.Tensor,
        target_positions: torch.Tensor,
        target_valid: torch.Tensor,
        sequence_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Guess the targets from the visible context.

        Args:
            context: the context encoder's outputs `[N, C, D]`.
            context_positions: where they stand, long `[N, C]`.
            context_valid: bool `[N, C]`; False on padding and on [MASK] tokens, which are no context.
            target_positions: long `[N, T]`.
            target_valid: bool `[N, T]`, False where positions are only filled up.
            sequence_ids: the document of each position of the row, long `[N, L]`, where rows are packed: what is
                guessed of a document is then guessed from that document, and places are counted in it.

        Returns:
            `[N, T, D]`; what stands where `target_valid` is False means nothing.
        """
        valid = torch.cat([context_valid, target_valid], dim=1)
        positions = torch.cat([context_positions, target_positions], dim=1)
        if sequence_ids is None:
            attention_mask = valid[:, None, None, :]
            # A row without a single valid position would attend to nothing and give NaN: let it attend to itself.
            attention_mask = attention_mask | ~attention_mask.any(dim=-1, keepdim=True)
        else:
            attention_mask = same_document(documents_at(sequence_ids, positions, valid))
            positions = positions_in_documents(sequence_ids).gather(1, positions)
        masked = self.mask_token.expand(*target_positions.shape, -1)
        states = torch.cat([self.embed(context), masked], dim=1) + self.position_embeddings[positions]
        rotation = None
        if len(self.grid) == 1:
            angles = rotary_angles(positions, states.shape[-1] // self.layers[0].num_attention_heads)[:, None]
            rotation = angles.cos(), angles.sin()
        for layer in self.layers[:-1]:
            states = layer(states, attention_mask, rotation)
        # Queries of the context in the last block would only be thrown away.
        num_queries = target_positions.shape[1]
        states = self.layers[-1](states, attention_mask[:, :, -num_queries:], rotation, num_queries)
        return self.proj(self.norm(states))


class TokenPredictor(_NarrowTransformer):
    """A narrow transformer over a single token: from the context's representation to the target's.

    Projection down, GELU, pre-norm blocks, layer norm, projection up (the predictor of the Edifice JEPA). There are no
    positions to tell apart, so there is neither a position table nor a mask token. Softmax over one token is 1, so the
    blocks' queries and keys get no gradient.
    """

    def forward(
        self,
        context: torch.Tensor,
        context_positions: torch.Tensor,
        context_valid: torch.Tensor,
        target_positions: torch.Tensor,
        target_valid: torch.Tensor,
        sequence_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Guess the clean vector's representation from that of the view in which features are hidden.

        Args:
            context: `[N, 1, D]`.
            context_positions, context_valid, target_positions, target_valid, sequence_ids: not read.

        Returns:
            `[N, 1, D]`.
        """
        states = F.gelu(self.embed(context))
        everything = torch.ones(states.shape[0], 1, 1, 1, dtype=torch.bool, device=states.device)
        for layer in self.layers:
            states = layer(states, everything)
        return self.proj(self.norm(states))
