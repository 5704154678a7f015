"""Packed rows: position ids, attention masks and means of the documents in a row.

Document ids count from 0 within a row; -1 marks padding. A row that is not packed has id 0 on all of its tokens.
"""

import torch

from .losses import masked_mean, without_autocast
from .positions import gather_positions


def document_position_ids(document_ids: torch.Tensor, counts_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Count the preceding tokens of the same document.

    Args:
        document_ids: document ids, long `[N, L]`; the tokens of a document are contiguous.
        counts_mask: bool `[N, L]`, the tokens to count; default all.

    Returns:
        Long `[N, L]`.

    >>> document_position_ids(torch.tensor([[0, 0, 0, 1, 1, -1]]))
    tensor([[0, 1, 2, 0, 1, 0]])
    """
    counts_mask = torch.ones_like(document_ids) if counts_mask is None else counts_mask.long()
    preceding = counts_mask.cumsum(dim=1) - counts_mask
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return preceding - torch.where(begins, preceding, 0).cummax(dim=1).values


def gather_document_ids(documents: torch.Tensor, positions: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Gather document ids at positions.

    Args:
        documents: document ids, long `[B, L]`.
        positions: long `[B * R, K]`, R rows for each row of `documents`.
        valid: bool `[B * R, K]`; None if all are.

    Returns:
        Long `[B * R, K]`, -1 where not valid.
    """
    repeated = documents.repeat_interleave(len(positions) // len(documents), dim=0)
    gathered = repeated.gather(1, positions)
    return gathered if valid is None else gathered.masked_fill(~valid, -1)


def block_diagonal_mask(documents: torch.Tensor) -> torch.Tensor:
    """Build a block-diagonal attention mask: document ids, long `[N, K]` -> bool `[N, 1, K, K]`.

    Padding attends to padding: a query without a key would give NaN.
    """
    return (documents[:, :, None] == documents[:, None, :])[:, None]


def mean_pool_by_document(values: torch.Tensor, documents: torch.Tensor, count: int) -> torch.Tensor:
    """Average the vectors of each document.

    Args:
        values: `[N, K, D]`.
        documents: document ids, long `[N, K]`.
        count: maximum number S of documents in a row.

    Returns:
        `[N, S, D]`, 0 for a document without vectors.
    """
    if count == 1:
        return masked_mean(values, (documents >= 0)[..., None], dim=1)[:, None]
    membership = _one_hot_documents(documents, count)
    weights = membership / membership.sum(dim=-1, keepdim=True).clamp_min(1)
    # `where` first: 0 × NaN would be NaN. A matrix product, because index_add is not deterministic on a GPU.
    values = torch.where(documents[..., None] >= 0, values, torch.zeros_like(values))
    with without_autocast(values):
        return weights.to(values.dtype) @ values


def instance_normalize(
    states: torch.Tensor, documents: torch.Tensor, count: int = 1, eps: float = 1e-5
) -> torch.Tensor:
    """Standardize each feature over the positions of its document (data2vec 2.0's text targets).

    Args:
        states: `[B, L, D]`.
        documents: document ids, long `[B, L]`; padding is excluded.
        count: maximum number of documents in a row.
        eps: added to the variance.

    Returns:
        `[B, L, D]`; zeros on padding.
    """
    states = torch.where(documents[..., None] >= 0, states, 0.0)
    centred = states - _broadcast_to_positions(mean_pool_by_document(states, documents, count), documents)
    variance = _broadcast_to_positions(mean_pool_by_document(centred**2, documents, count), documents)
    normal = centred * torch.rsqrt(variance + eps)
    return torch.where(documents[..., None] >= 0, normal, torch.zeros_like(normal))


def _broadcast_to_positions(values: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
    """Broadcast `[B, S, D]` to each document's positions: `[B, L, D]`, `[B, 1, D]` if S is 1."""
    return values if values.shape[1] == 1 else gather_positions(values, documents.clamp_min(0))


def document_counts(documents: torch.Tensor, count: int) -> torch.Tensor:
    """Count the positions of each document: long `[N, K]` -> long `[N, count]`."""
    return _one_hot_documents(documents, count).sum(dim=-1)


def _one_hot_documents(documents: torch.Tensor, count: int) -> torch.Tensor:
    """One-hot encode document ids: long `[N, K]` -> bool `[N, count, K]`."""
    return documents[:, None, :] == torch.arange(count, device=documents.device)[None, :, None]
