"""Distances between two embeddings of the same knowledge, and the turns of a path: the losses of LLM-JEPA and STP."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import distributed

from .losses import all_reduced, cosine_distance, without_autocast

PAIR_LOSSES = ("cosine", "l2", "mse", "infonce")


def pair_distance(kind: str, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The distance of each pair, computed in float32 (LLM-JEPA, Huang et al. 2025, section 3.1 and table 3).

    - "cosine": 1 − cos(prediction, target), the paper's choice.
    - "l2": ‖prediction − target‖.
    - "mse": mean over D of the squared differences.

    Args:
        kind: one of these; "infonce" is a loss of a batch, see `infonce`.
        prediction, target: `[N, D]`.

    Returns:
        `[N]`.

    Raises:
        ValueError: another `kind`.
    """
    prediction, target = prediction.float(), target.float()
    if kind == "cosine":
        return cosine_distance(prediction, target)
    if kind == "l2":
        return (prediction - target).norm(dim=-1)
    if kind == "mse":
        return (prediction - target).square().mean(dim=-1)
    raise ValueError(f"a distance of pairs is cosine, l2 or mse, not {kind!r}")


def infonce(
    prediction: torch.Tensor,
    candidates: torch.Tensor,
    own: torch.Tensor,
    temperature: float,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-entropy of finding each prediction's target among all candidates by cosine (van den Oord et al. 2018).

    Computed in float32. A statistic of the batch: it changes with the number of candidates.

    Args:
        prediction: `[N, D]`.
        candidates: `[C, D]`, the targets of all ranks.
        own: long `[N]`, which candidate is each prediction's target.
        temperature: what the cosines are divided by (official code: 0.07).
        valid: bool `[C]`, False for candidates that are only filled up; default all are.

    Returns:
        `[N]`, at least 0; of a prediction whose own target is none it means nothing.
    """
    with without_autocast(prediction):
        prediction, candidates = (F.normalize(vectors.float(), dim=-1) for vectors in (prediction, candidates))
        logits = prediction @ candidates.T / temperature
        if valid is not None:
            logits = logits.masked_fill(~valid, torch.finfo(logits.dtype).min)
        return F.cross_entropy(logits, own, reduction="none")


def candidates_of_all_ranks(vectors: torch.Tensor, same_size: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """What `infonce` compares with: the vectors of all ranks, with their gradients, and which are one's own.

    Batches that are trained on are of one size. The last one of an evaluation may not be: there the ranks tell each
    other, for which they wait for their devices. (A rank that has no row left repeats one.)

    Args:
        vectors: `[N, D]`.
        same_size: False where the ranks' N may differ in training too.

    Returns:
        `[of all ranks, D]`, long `[N]`.
    """
    own = torch.arange(len(vectors), device=vectors.device)
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return vectors, own
    ranks, rank = distributed.get_world_size(), distributed.get_rank()
    if same_size and torch.is_grad_enabled():
        return _Gathered.apply(vectors), own + rank * len(vectors)
    counts = torch.zeros(ranks, dtype=torch.long, device=vectors.device)
    counts[rank] = len(vectors)
    distributed.all_reduce(counts)
    sizes = counts.tolist()
    parts = _Gathered.apply(F.pad(vectors, (0, 0, 0, max(sizes) - len(vectors)))).chunk(ranks)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]), own + sum(sizes[:rank])


class _Gathered(torch.autograd.Function):
    """All ranks' vectors, one rank after the other; a rank's gradient is the sum of what all ranks' losses say of it.

    Not `torch.distributed.nn.functional.all_gather`, which torch.compile does not trace.
    """

    @staticmethod
    def forward(ctx: Any, vectors: torch.Tensor) -> torch.Tensor:
        gathered = vectors.new_empty(distributed.get_world_size() * len(vectors), *vectors.shape[1:])
        distributed.all_gather_into_tensor(gathered, vectors.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return all_reduced(gradient).chunk(distributed.get_world_size())[distributed.get_rank()]


def draw_triples(first: torch.Tensor, last: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Three different positions s < r < t of each row, every triple alike (STP, section 3).

    Args:
        first, last: long `[B]`, the first and the last position that may be drawn.
        uniform: `[B, 3]`, numbers in [0, 1).

    Returns:
        long `[B, 3]` in rising order; rows of fewer than three positions are to be left out by the caller.
    """
    length = (last - first + 1).clamp_min(3)
    # Floyd's way to a set of three out of `length`: the j-th draw is out of the first length - 3 + j, a repeated one
    # becomes the newest.
    chosen: list[torch.Tensor] = []
    for index in range(3):
        newest = length - 3 + index
        draw = (uniform[:, index] * (newest + 1)).long().clamp_max(newest)
        taken = torch.zeros_like(draw, dtype=torch.bool)
        for earlier in chosen:
            taken |= draw == earlier
        chosen.append(torch.where(taken, newest, draw))
    return torch.stack(chosen, dim=1).sort(dim=1).values + first[:, None]


def tube_distance(states: torch.Tensor, triples: torch.Tensor) -> torch.Tensor:
    """1 − cos(h_t − h_r, h_r − h_s): how far a path turns (Semantic Tube Prediction, arXiv 2602.22617, section 3).

    Args:
        states: `[B, L, D]`.
        triples: long `[B, 3]`, positions s, r, t.

    Returns:
        `[B]`, in float32.
    """
    s, r, t = _rows(states, triples).unbind(dim=1)
    return cosine_distance(t - r, r - s)


def patch_distance(states: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
    """1 − cos(what a patch adds, what all around it adds): the form that STP's released code minimises.

    With first position f, patch [a, b] and last position e: 1 − cos(h_b − h_a, (h_a − h_f) + (h_e − h_b)).

    Args:
        states: `[B, L, D]`.
        patches: long `[B, 4]`, positions f, a, b, e.

    Returns:
        `[B]`, in float32.
    """
    f, a, b, e = _rows(states, patches).unbind(dim=1)
    return cosine_distance(b - a, (a - f) + (e - b))


def _rows(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    index = positions[..., None].expand(-1, -1, states.shape[-1])
    return states.gather(1, index).float()
