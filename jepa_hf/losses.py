"""Losses and target normalisations: one equation each, on tensors whose last dimension is the representation's."""

import math

import torch
import torch.nn.functional as F


def cosine_distance(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """1 − cos(prediction, target): `[..., D]`, `[..., D]` -> `[...]`, between 0 and 2."""
    return 1.0 - (F.normalize(prediction, dim=-1) * F.normalize(target, dim=-1)).sum(dim=-1)


def smooth_l1(prediction: torch.Tensor, target: torch.Tensor, beta: float = 1.0) -> torch.Tensor:
    """Mean over D of 0.5·d²/beta where |d| < beta, |d| − 0.5·beta elsewhere (Girshick 2015; I-JEPA's code, beta 1).

    `[..., D]`, `[..., D]` -> `[...]`.
    """
    return F.smooth_l1_loss(prediction, target, reduction="none", beta=beta).mean(dim=-1)


def l2(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean over D of squared differences (I-JEPA's paper, equation 1): `[..., D]`, `[..., D]` -> `[...]`."""
    return F.mse_loss(prediction, target, reduction="none").mean(dim=-1)


def l1(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean over D of absolute differences (V-JEPA, equation 1): `[..., D]`, `[..., D]` -> `[...]`."""
    return F.l1_loss(prediction, target, reduction="none").mean(dim=-1)


def prediction_loss(
    kind: str, prediction: torch.Tensor, target: torch.Tensor, smooth_l1_beta: float = 1.0
) -> torch.Tensor:
    """The per-target loss named `kind`, computed in float32: `[..., D]`, `[..., D]` -> `[...]`.

    Raises:
        ValueError: a `kind` other than "cosine", "smooth_l1", "l2" and "l1".
    """
    prediction, target = prediction.float(), target.float()
    if kind == "cosine":
        return cosine_distance(prediction, target)
    if kind == "smooth_l1":
        return smooth_l1(prediction, target, smooth_l1_beta)
    if kind == "l2":
        return l2(prediction, target)
    if kind == "l1":
        return l1(prediction, target)
    raise ValueError(f"loss must be one of cosine, smooth_l1, l2, l1, not {kind!r}")


def masked_mean(values: torch.Tensor, valid: torch.Tensor, dim: int) -> torch.Tensor:
    """Mean of `values` over `dim` where `valid` (broadcastable) is True; 0 where nothing is valid."""
    weight = valid.to(values.dtype)
    # `where` first: 0 × NaN would be NaN.
    total = torch.where(valid, values, torch.zeros_like(values)).sum(dim=dim)
    return total / weight.expand_as(values).sum(dim=dim).clamp_min(1.0)


def layer_normalize(states: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """Zero mean, unit variance over D, no affine part (I-JEPA's targets): `[..., D]` -> `[..., D]`."""
    return F.layer_norm(states, states.shape[-1:], eps=eps)


def batch_standardize(vectors: torch.Tensor, valid: torch.Tensor | None = None, eps: float = 1e-5) -> torch.Tensor:
    """Zero mean, unit variance of each feature over the vectors, so that what all share says nothing: `[N, D]`.

    Args:
        valid: bool `[N]`, the vectors that count; default all.
    """
    if valid is None:
        valid = torch.ones_like(vectors[:, 0], dtype=torch.bool)
    centred = vectors - masked_mean(vectors, valid[:, None], dim=0)
    return centred / (masked_mean(centred.square(), valid[:, None], dim=0).sqrt() + eps)


def variance_hinge(states: torch.Tensor, valid: torch.Tensor, eps: float = 1e-4) -> torch.Tensor:
    """Mean over D of relu(1 − std of feature d over the valid vectors) (VICReg, Bardes et al. 2022, equation 1).

    A statistic of the micro-batch: it changes with the batch size under gradient accumulation and data parallelism.

    Args:
        states: `[..., D]`.
        valid: `[...]` bool.

    Returns:
        A scalar; 1 where all vectors are the same, 0 where every feature has a standard deviation of at least 1.
    """
    states, weight = _flat(states, valid)
    count = weight.sum().clamp_min(2.0)
    centred = (states - (states * weight).sum(dim=0) / count) * weight
    std = torch.sqrt((centred**2).sum(dim=0) / (count - 1) + eps)
    return F.relu(1.0 - std).mean() * (weight.sum() > 1)


def covariance_penalty(states: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Sum of squared off-diagonal covariances over D (VICReg, equation 4).

    A statistic of the micro-batch, see `variance_hinge`. `[..., D]`, bool `[...]` -> scalar.
    """
    states, weight = _flat(states, valid)
    count = weight.sum().clamp_min(2.0)
    centred = (states - (states * weight).sum(dim=0) / count) * weight
    covariance = centred.T @ centred / (count - 1)
    off_diagonal = (covariance**2).sum() - (covariance.diagonal() ** 2).sum()
    return off_diagonal / states.shape[-1]


def sigreg(
    states: torch.Tensor,
    valid: torch.Tensor,
    num_slices: int = 256,
    num_points: int = 17,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Sliced Epps–Pulley distance to an isotropic Gaussian (LeJEPA, Balestriero and LeCun 2025, section 4).

    For random unit directions the characteristic function of the projected vectors is compared with exp(−t²/2) on
    `num_points` knots in [0, 3], weighted by exp(−t²/2), with the trapezoidal rule (twice, for the symmetric half), and
    multiplied by the number of vectors.

    A statistic of the micro-batch, see `variance_hinge`.

    Args:
        states: `[..., D]`.
        valid: `[...]` bool.
        num_slices: random directions per call.
        num_points: knots of the quadrature.
        generator: source of the directions (on the device of `states`); the global one when left out.

    Returns:
        A scalar, at least 0.
    """
    states, weight = _flat(states, valid)
    count = weight.sum().clamp_min(1.0)
    directions = torch.randn(
        states.shape[-1], num_slices, device=states.device, dtype=states.dtype, generator=generator
    )
    projected = states @ F.normalize(directions, dim=0)
    step = 3.0 / (num_points - 1)
    distance = states.new_zeros(())
    for index in range(num_points):
        t = index * step
        gaussian = math.exp(-0.5 * t * t)
        real = (torch.cos(t * projected) * weight).sum(dim=0) / count
        imaginary = (torch.sin(t * projected) * weight).sum(dim=0) / count
        end = 0.5 if index in (0, num_points - 1) else 1.0
        distance = distance + end * step * gaussian * ((real - gaussian) ** 2 + imaginary**2).mean()
    return 2.0 * distance * weight.sum()


def _flat(states: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors `[N, D]` in float32 and their weights `[N, 1]`, 0 where not valid; no boolean indexing, so no sync."""
    weight = valid.reshape(-1, 1).float()
    states = states.reshape(-1, states.shape[-1]).float()
    return torch.where(weight > 0, states, torch.zeros_like(states)), weight
