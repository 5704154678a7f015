"""Several documents in a row: what their numbers mean for positions, for attention and for means.

Wherever a number of a document is asked for, a row that is one document has 0 on all its tokens, and -1 stands for
padding and for what is only filled up.
"""

import torch

from .losses import masked_mean, without_autocast
from .positions import gather_positions


def positions_in_documents(sequence_ids: torch.Tensor, counted: torch.Tensor | None = None) -> torch.Tensor:
    """How many tokens of its document precede each token, long `[N, L]` -> long `[N, L]`.

    Args:
        sequence_ids: the document of each; tokens of one stand next to each other.
        counted: bool `[N, L]`, the tokens that count; default all.

    >>> positions_in_documents(torch.tensor([[0, 0, 0, 1, 1, -1]]))
    tensor([[0, 1, 2, 0, 1, 0]])
    """
    counted = torch.ones_like(sequence_ids) if counted is None else counted.long()
    preceding = counted.cumsum(dim=1) - counted
    begins = torch.ones_like(sequence_ids, dtype=torch.bool)
    begins[:, 1:] = sequence_ids[:, 1:] != sequence_ids[:, :-1]
    return preceding - torch.where(begins, preceding, 0).cummax(dim=1).values


def documents_at(documents: torch.Tensor, positions: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """The document that each of some positions is of, -1 where not valid.

    Args:
        documents: long `[B, L]`.
        positions, valid: long and bool `[B * R, K]`, R rows of them to a row of `documents`.

    Returns:
        long `[B * R, K]`.
    """
    repeated = documents.repeat_interleave(len(positions) // len(documents), dim=0)
    return repeated.gather(1, positions).masked_fill(~valid, -1)


def same_document(documents: torch.Tensor) -> torch.Tensor:
    """Who may attend to whom: long `[N, K]`, the document of each token -> bool `[N, 1, K, K]`.

    Padding attends to padding: a query without a key would give NaN.
    """
    return (documents[:, :, None] == documents[:, None, :])[:, None]


def document_means(values: torch.Tensor, documents: torch.Tensor, count: int) -> torch.Tensor:
    """Mean of the vectors of each document, 0 where it has none.

    Args:
        values: `[N, K, D]`.
        documents: the document of each, long `[N, K]`.
        count: number S of documents in a row, at most.

    Returns:
        `[N, S, D]`.
    """
    if count == 1:
        return masked_mean(values, (documents >= 0)[..., None], dim=1)[:, None]
    of_document = _membership(documents, count)
    share = of_document / of_document.sum(dim=-1, keepdim=True).clamp_min(1)
    # `where` first: 0 × NaN would be NaN. A product of matrices, because sums by index are not the same twice on a GPU.
    values = torch.where(documents[..., None] >= 0, values, torch.zeros_like(values))
    with without_autocast(values):
        return share.to(values.dtype) @ values


def instance_normalize(
    states: torch.Tensor, documents: torch.Tensor, count: int = 1, eps: float = 1e-5
) -> torch.Tensor:
    """Zero mean, unit variance of each feature over the positions of its document (data2vec 2.0's text targets).

    Args:
        states: `[B, L, D]`.
        documents: the document of each, long `[B, L]`; padding counts in no statistic.
        count: number of documents in a row, at most.

    Returns:
        `[B, L, D]`; zeros on padding.
    """
    centred = states - _of_each(document_means(states, documents, count), documents)
    variance = _of_each(document_means(centred**2, documents, count), documents)
    normal = centred * torch.rsqrt(variance + eps)
    return torch.where(documents[..., None] >= 0, normal, torch.zeros_like(normal))


def _of_each(values: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
    """What `[B, S, D]` holds for the document of each position: `[B, L, D]`, or `[B, 1, D]` of one document."""
    return values if values.shape[1] == 1 else gather_positions(values, documents.clamp_min(0))


def document_counts(documents: torch.Tensor, count: int) -> torch.Tensor:
    """Number of entries of each document: long `[N, K]` -> long `[N, count]`."""
    return _membership(documents, count).sum(dim=-1)


def _membership(documents: torch.Tensor, count: int) -> torch.Tensor:
    """Bool `[N, count, K]`."""
    return documents[:, None, :] == torch.arange(count, device=documents.device)[None, :, None]
