"""Pair distances of LLM-JEPA and path losses of Semantic Tube Prediction (STP)."""

import torch

from ..models.losses import cosine_distance
from ..models.positions import gather_positions

PAIR_LOSSES = ("cosine", "l2", "mse", "infonce")


def pair_distance(loss_type: str, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Compute the distance of each pair in float32: `[N, D]`, `[N, D]` -> `[N]`.

    LLM-JEPA, Huang et al. 2025 (arXiv 2509.14252), section 3.1 and table 3:

    - "cosine": 1 − cos(prediction, target), the paper's choice.
    - "l2": ‖prediction − target‖.
    - "mse": mean over D of the squared differences.
    """
    prediction, target = prediction.float(), target.float()
    if loss_type == "cosine":
        return cosine_distance(prediction, target)
    if loss_type == "l2":
        return (prediction - target).norm(dim=-1)
    if loss_type == "mse":
        return (prediction - target).square().mean(dim=-1)
    raise ValueError(f"Expected a pair distance of cosine, l2 or mse, got {loss_type!r}.")


def sample_ordered_triples(first: torch.Tensor, last: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Sample positions s < r < t in each row, uniformly over all triples (STP, section 3).

    Args:
        first: long `[B]`, first position that may be drawn.
        last: long `[B]`, last position that may be drawn.
        uniform: `[B, 3]`, random numbers in [0, 1).

    Returns:
        long `[B, 3]` in ascending order. The caller must discard rows with fewer than three positions.
    """
    length = (last - first + 1).clamp_min(3)
    # Floyd's algorithm for a 3-subset of `length` items (Bentley and Floyd 1987): draw j is from
    # the first length - 3 + j items, and a repeated item is replaced by the last of these.
    samples: list[torch.Tensor] = []
    for index in range(3):
        highest = length - 3 + index
        draw = (uniform[:, index] * (highest + 1)).long().clamp_max(highest)
        is_repeated = torch.zeros_like(draw, dtype=torch.bool)
        for earlier in samples:
            is_repeated |= draw == earlier
        samples.append(torch.where(is_repeated, highest, draw))
    return torch.stack(samples, dim=1).sort(dim=1).values + first[:, None]


def stp_distance(states: torch.Tensor, triples: torch.Tensor) -> torch.Tensor:
    """Compute 1 − cos(h_t − h_r, h_r − h_s), the turn of a path (STP, arXiv 2602.22617, section 3).

    States `[B, L, D]` at the positions s, r, t, long `[B, 3]` -> `[B]`, in float32.
    """
    s, r, t = gather_positions(states, triples).float().unbind(dim=1)
    return cosine_distance(t - r, r - s)


def stp_patch_distance(states: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
    """Compute 1 − cos(h_b − h_a, (h_a − h_f) + (h_e − h_b)), the loss of STP's released code.

    It compares the change over a patch [a, b] with the change over the rest of the row [f, e]: states `[B, L, D]` at
    the positions f, a, b, e, long `[B, 4]` -> `[B]`, in float32.
    """
    f, a, b, e = gather_positions(states, patches).float().unbind(dim=1)
    return cosine_distance(b - a, (a - f) + (e - b))
