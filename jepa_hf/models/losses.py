"""Losses and target normalisations: one equation each, on tensors whose last dimension is the representation's."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import distributed

# Random directions in a call of `sigreg`.
NUM_SLICES = 256


def without_autocast(tensor: torch.Tensor) -> torch.autocast:
    """Turn autocast off on the tensor's device, so that float32 inputs are computed with in float32.

    Autocast would run matrix products in half precision, whatever the dtype of their inputs.
    """
    return torch.autocast(tensor.device.type, enabled=False)


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
    """Give each feature zero mean and unit variance over the vectors, in float32, so that what all share says nothing.

    Args:
        vectors: `[N, D]`.
        valid: bool `[N]`, the vectors whose mean and variance count; default all.

    Returns:
        `[N, D]`, float32.
    """
    vectors = vectors.float()
    if valid is None:
        valid = torch.ones_like(vectors[:, 0], dtype=torch.bool)
    centred = vectors - masked_mean(vectors, valid[:, None], dim=0)
    return centred / (masked_mean(centred.square(), valid[:, None], dim=0).sqrt() + eps)


def variance_hinge(states: torch.Tensor, valid: torch.Tensor, eps: float = 1e-4) -> torch.Tensor:
    """Mean over D of relu(1 − std of feature d over the valid vectors) (VICReg, Bardes et al. 2022, equation 1).

    A statistic of the micro-batch: it changes with the batch size under gradient accumulation and data parallelism.
    Computed in float32.

    Args:
        states: `[..., D]`.
        valid: `[...]` bool.

    Returns:
        A scalar; 1 where all vectors are the same, 0 where every feature has a standard deviation of at least 1.
    """
    states, weight = _flat(states, valid)
    std = torch.sqrt(_centred_over_count(states, weight).square().sum(dim=0) + eps)
    return F.relu(1.0 - std).mean() * (weight.sum() > 1)


def covariance_penalty(states: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Sum of squared off-diagonal covariances over D (VICReg, equation 4).

    A statistic of the micro-batch, see `variance_hinge`. `[..., D]`, bool `[...]` -> scalar.
    """
    states, weight = _flat(states, valid)
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
    """Sliced Epps–Pulley distance to an isotropic Gaussian (LeJEPA, Balestriero and LeCun 2025, section 4).

    Vectors are projected on unit directions. The characteristic function of each projection is compared with exp(−t²/2)
    on `num_points` knots in [0, 3], weighted by exp(−t²/2). The trapezoidal rule counts twice, for the symmetric half.

    The statistic is multiplied by the number of samples, as the paper's, so that its lambda carries over. A sample may
    have several vectors: its tokens all belong to the cloud, and the sample counts once.

    The cloud and its samples are those of the micro-batches of all ranks, and so are the directions. Value and gradient
    equal those of one process with all of them, see `sum_over_ranks`. Computed in float32.

    Args:
        states: `[..., D]`.
        valid: `[...]` bool.
        num_samples: scalar, this rank's number of samples; default its number of valid vectors.
        directions: `[D, slices]` of any length, the same on every rank; default `NUM_SLICES` random ones.
        num_points: knots of the quadrature.

    Returns:
        A scalar, at least 0.
    """
    states, weight = _flat(states, valid)
    count = weight.sum()
    num_samples = count if num_samples is None else num_samples.to(count)
    with without_autocast(states):
        if directions is None:
            # A sum of Gaussian vectors points anywhere too, and it is the same on every rank.
            directions = sum_over_ranks(torch.randn(states.shape[-1], NUM_SLICES, device=states.device))
        projected = states @ F.normalize(directions, dim=0)
        step = 3.0 / (num_points - 1)
        knots = [index * step for index in range(num_points)]
        # Knot by knot, so that no tensor holds all vectors at all knots.
        sums = [(wave(t * projected) * weight).sum(dim=0) for t in knots for wave in (torch.cos, torch.sin)]
        totals = sum_over_ranks(torch.cat([*sums, count[None], num_samples[None]]))
        *_, count, num_samples = totals.unbind()
        waves = totals[:-2].view(num_points, 2, -1) / count.clamp_min(1.0)
        distance = states.new_zeros(())
        for index, (t, (real, imaginary)) in enumerate(zip(knots, waves, strict=True)):
            gaussian = math.exp(-0.5 * t * t)
            end = 0.5 if index in (0, num_points - 1) else 1.0
            distance = distance + end * step * gaussian * ((real - gaussian) ** 2 + imaginary**2).mean()
        return 2.0 * distance * num_samples


@torch.compiler.assume_constant_result  # torch.compile does not trace a generator that is made in a graph
def fixed_directions(width: int, device: torch.device) -> torch.Tensor:
    """Draw directions `[width, NUM_SLICES]` that are always the same, and leave the global generator alone."""
    return torch.randn(width, NUM_SLICES, generator=torch.Generator(device).manual_seed(0), device=device)


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Add up a tensor over all ranks; the gradient of each rank's part is the sum of all ranks' gradients.

    With one rank, or without process group, the tensor itself.
    """
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return values
    return _SumOverRanks.apply(values)


class _SumOverRanks(torch.autograd.Function):
    """An all-reduce that torch.compile traces, which that of `torch.distributed.nn.functional` is not."""

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
    """Centre the valid vectors and divide by √(N − 1): their products sum to covariances without large sums."""
    count = weight.sum().clamp_min(2.0)
    return (states - (states * weight).sum(dim=0) / count) * weight / (count - 1).sqrt()


def _flat(states: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors `[N, D]` in float32 and their weights `[N, 1]`, 0 where not valid; no boolean indexing, so no sync."""
    weight = valid.reshape(-1, 1).float()
    states = states.reshape(-1, states.shape[-1]).float()
    return torch.where(weight > 0, states, torch.zeros_like(states)), weight
