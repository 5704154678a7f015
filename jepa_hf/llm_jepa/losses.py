"""Distances between two embeddings of the same knowledge, and the turns of a path: the losses of LLM-JEPA and STP."""

import torch

from ..models.losses import cosine_distance

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
