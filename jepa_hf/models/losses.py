"""Losses and target normalizations, one equation each, over the last dimension D."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import distributed

# Random directions in a call of `sigreg`.
NUM_SLICES = 256


def without_autocast(tensor: torch.Tensor) -> torch.autocast:
    """Disable autocast on the tensor's device.

    Autocast would run matrix products in half precision, whatever the dtype of their inputs.
    """
    return torch.autocast(tensor.device.type, enabled=False)


def cosine_distance(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Compute 1 − cos(prediction, target): `[..., D]`, `[..., D]` -> `[...]`, between 0 and 2."""
    return 1.0 - (F.normalize(prediction, dim=-1) * F.normalize(target, dim=-1)).sum(dim=-1)


def smooth_l1(prediction: torch.Tensor, target: torch.Tensor, beta: float = 1.0) -> torch.Tensor:
    """Average 0.5·d²/beta where |d| < beta, |d| − 0.5·beta elsewhere, over D.

    Girshick 2015; I-JEPA's code uses beta 1. `[..., D]`, `[..., D]` -> `[...]`.
    """
    return F.smooth_l1_loss(prediction, target, reduction="none", beta=beta).mean(dim=-1)


def l2(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Average squared differences over D (I-JEPA, eq. 1): `[..., D]`, `[..., D]` -> `[...]`."""
    return F.mse_loss(prediction, target, reduction="none").mean(dim=-1)


def l1(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Average absolute differences over D (V-JEPA, eq. 1): `[..., D]`, `[..., D]` -> `[...]`."""
    return F.l1_loss(prediction, target, reduction="none").mean(dim=-1)


def prediction_loss(
    loss_type: str, prediction: torch.Tensor, target: torch.Tensor, smooth_l1_beta: float = 1.0
) -> torch.Tensor:
    """Compute the per-target loss named `loss_type` in float32.

    Args:
        loss_type: "cosine", "smooth_l1", "l2" or "l1".
        prediction: `[..., D]`.
        target: `[..., D]`.
        smooth_l1_beta: transition point of smooth L1, default 1.

    Returns:
        `[...]`.

    Raises:
        ValueError: another `loss_type`.
    """
    prediction, target = prediction.float(), target.float()
    if loss_type == "cosine":
        return cosine_distance(prediction, target)
    if loss_type == "smooth_l1":
        return smooth_l1(prediction, target, smooth_l1_beta)
    if loss_type == "l2":
        return l2(prediction, target)
    if loss_type == "l1":
        return l1(prediction, target)
    raise ValueError(f"Expected loss to be one of cosine, smooth_l1, l2, l1, not {loss_type!r}.")


def masked_sum(values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Sum the values where `valid` is True; others may be NaN. `[...]`, bool `[...]` -> scalar."""
    return torch.where(valid, values, torch.zeros_like(values)).sum()


def masked_mean(values: torch.Tensor, valid: torch.Tensor, dim: int) -> torch.Tensor:
    """Average `values` over `dim` where `valid` (broadcastable) is True; 0 without valid values."""
    weight = valid.to(values.dtype)
    # `where` first: 0 × NaN would be NaN.
    total = torch.where(valid, values, torch.zeros_like(values)).sum(dim=dim)
    return total / weight.expand_as(values).sum(dim=dim).clamp_min(1.0)


def layer_norm_no_affine(states: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """Normalize to zero mean and unit variance over D, without affine part (I-JEPA's targets).

    `[..., D]` -> `[..., D]`.
    """
    return F.layer_norm(states, states.shape[-1:], eps=eps)


def standardize_features(vectors: torch.Tensor, valid: torch.Tensor | None = None, eps: float = 1e-5) -> torch.Tensor:
    """Standardize each feature over the vectors, which removes the component shared by all vectors.

    Args:
        vectors: `[N, D]`.
        valid: bool `[N]`, vectors included in mean and variance; default all.
        eps: added to the standard deviation.

    Returns:
        `[N, D]`, float32.
    """
    vectors = vectors.float()
    if valid is None:
        valid = torch.ones_like(vectors[:, 0], dtype=torch.bool)
    vectors = torch.where(valid[:, None], vectors, 0.0)
    centred = vectors - masked_mean(vectors, valid[:, None], dim=0)
    return centred / (masked_mean(centred.square(), valid[:, None], dim=0).sqrt() + eps)


def variance_loss(states: torch.Tensor, valid: torch.Tensor, eps: float = 1e-4) -> torch.Tensor:
    """Average relu(1 − std of feature d over the valid vectors) over D, in float32.

    VICReg (Bardes et al. 2022), equation 1. A statistic of the micro-batch: it changes with the
    batch size under gradient accumulation and data parallelism.

    Args:
        states: `[..., D]`.
        valid: bool `[...]`.
        eps: added to the variance.

    Returns:
        Scalar: 1 for identical vectors, 0 if every feature's standard deviation is at least 1.
    """
    states, weight = _flatten_valid(states, valid)
    std = torch.sqrt(_centred_over_count(states, weight).square().sum(dim=0) + eps)
    return F.relu(1.0 - std).mean() * (weight.sum() > 1)


def covariance_loss(states: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Sum the squared off-diagonal covariances and divide by D (VICReg, equation 4).

    A statistic of the micro-batch, see `variance_loss`. `[..., D]`, bool `[...]` -> scalar.
    """
    states, weight = _flatten_valid(states, valid)
    with without_autocast(states):
        centred = _centred_over_count(states, weight)
        covariance = centred.T @ centred
        off_diagonal = (covariance**2).sum() - (covariance.diagonal() ** 2).sum()
        return off_diagonal / states.shape[-1]


def sigreg(
    states: torch.Tensor,
    valid: torch.Tensor,
    num_samples: torch.Tensor | None = None,
    directions: torch.Tensor | None = None,
    num_points: int = 17,
) -> torch.Tensor:
    """Measure the sliced Epps–Pulley distance to an isotropic Gaussian, in float32.

    LeJEPA (Balestriero and LeCun 2025), section 4. Vectors are projected on unit directions. The
    characteristic function of each projection is compared with exp(−t²/2) on `num_points` knots in
    [0, 3], weighted by exp(−t²/2). The trapezoidal sum is doubled for the symmetric half.

    As in the paper, the statistic is multiplied by the number of samples, so its lambda carries
    over. A sample may have several vectors and counts once.

    Vectors and samples are those of all ranks' micro-batches. Value and gradient equal those of one
    process with the same vectors, see `sum_over_ranks`.

    Args:
        states: `[..., D]`.
        valid: bool `[...]`.
        num_samples: scalar, number of samples on this rank; default the number of valid vectors.
        directions: `[D, slices]` of any norm, equal on all ranks; default `NUM_SLICES` random ones.
        num_points: knots of the quadrature.

    Returns:
        Scalar, at least 0.
    """
    states, weight = _flatten_valid(states, valid)
    count = weight.sum()
    num_samples = count if num_samples is None else num_samples.to(count)
    with without_autocast(states):
        if directions is None:
            # The sum over ranks is Gaussian too, and it is equal on all ranks.
            directions = sum_over_ranks(torch.randn(states.shape[-1], NUM_SLICES, device=states.device))
        projected = states @ F.normalize(directions, dim=0)
        step = 3.0 / (num_points - 1)
        knots = [index * step for index in range(num_points)]
        # One knot at a time: all knots at once would need `num_points` times the memory.
        sums = [(wave(t * projected) * weight).sum(dim=0) for t in knots for wave in (torch.cos, torch.sin)]
        totals = sum_over_ranks(torch.cat([*sums, count[None], num_samples[None]]))
        *_, count, num_samples = totals.unbind()
        waves = totals[:-2].view(num_points, 2, -1) / count.clamp_min(1.0)
        distance = states.new_zeros(())
        for index, (t, (real, imaginary)) in enumerate(zip(knots, waves, strict=True)):
            gaussian = math.exp(-0.5 * t * t)
            trapezoid = 0.5 if index in (0, num_points - 1) else 1.0
            distance = distance + trapezoid * step * gaussian * ((real - gaussian) ** 2 + imaginary**2).mean()
        return 2.0 * distance * num_samples


@torch.compiler.assume_constant_result  # torch.compile cannot trace the creation of a generator
def fixed_directions(dim: int, device: torch.device) -> torch.Tensor:
    """Return fixed random directions `[width, NUM_SLICES]`, from a separate generator."""
    return torch.randn(dim, NUM_SLICES, generator=torch.Generator(device).manual_seed(0), device=device)


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """All-reduce a tensor; the gradient is the all-reduced gradient.

    With one rank, or without process group, return the tensor itself.
    """
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return values
    return _SumOverRanks.apply(values)


class _SumOverRanks(torch.autograd.Function):
    """All-reduce with gradient, which torch.compile traces, unlike `distributed.nn.functional`."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        return all_reduced(values)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return all_reduced(gradient)


def all_reduced(values: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor over all ranks, without gradient."""
    values = values.contiguous().clone()
    distributed.all_reduce(values)
    return values


def _centred_over_count(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Centre the valid vectors and divide by √(N − 1), so that products sum to covariances."""
    count = weight.sum().clamp_min(2.0)
    return (states - (states * weight).sum(dim=0) / count) * weight / (count - 1).sqrt()


def _flatten_valid(states: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float32 vectors `[N, D]` and weights `[N, 1]`, 0 where not valid.

    Boolean indexing would synchronize with the device.
    """
    weight = valid.reshape(-1, 1).float()
    states = states.reshape(-1, states.shape[-1]).float()
    return torch.where(weight > 0, states, torch.zeros_like(states)), weight
