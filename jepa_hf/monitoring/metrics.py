"""Collapse metrics: the loss may fall while representations degenerate."""

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from ..models.losses import prediction_loss, standardize_features

_SMOOTH_L1_STEPS = 8


def singular_values(vectors: torch.Tensor) -> torch.Tensor:
    """Return the singular values of the centered vectors: `[N, D]` -> float64 `[min(N, D)]`, largest first."""
    # In float64: a mean rounded to float32 would shift all vectors one way, which looks like a direction.
    vectors = vectors.double()
    centred = vectors - vectors.mean(dim=0)
    # From the smaller Gram matrix: cheaper than an SVD of [N, D].
    gram = centred @ centred.T if centred.shape[0] < centred.shape[1] else centred.T @ centred
    return torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().flip(0)


def effective_rank(vectors: torch.Tensor, eps: float = 1e-12) -> torch.Tensor:
    """Compute exp of the entropy of the normalized singular values of the centred vectors.

    Roy and Vetterli (2007), *The effective rank*, definition 1; RankMe (Garrido et al. 2023). It
    does not depend on the scale.

    Args:
        vectors: `[N, D]`.
        eps: Lower bound inside the division and the logarithm.

    Returns:
        A scalar between 1 and min(N − 1, D), or 0 if all vectors are the same; NaN if a value is not finite.
    """
    finite = vectors.isfinite().all()
    vectors = torch.where(finite, vectors, torch.zeros_like(vectors)).double()  # eigvalsh fails on NaN
    singular = singular_values(vectors)
    # A deviation no larger than the rounding of its vectors has no directions.
    has_variance = singular.norm() > 1e-6 * vectors.norm()
    # A singular value below float32's resolution is rounding, not a direction.
    singular = torch.where(singular > 1e-6 * singular.max(), singular, torch.zeros_like(singular))
    total = singular.sum()
    p = singular / total.clamp_min(eps)
    entropy = -(p * torch.log(p.clamp_min(eps))).sum()
    rank = torch.where(has_variance, torch.exp(entropy), torch.zeros_like(entropy))
    return torch.where(finite, rank, torch.full_like(rank, torch.nan)).float()


def mean_pairwise_cosine(vectors: torch.Tensor) -> torch.Tensor:
    """Compute the mean pairwise cosine: `[N, D]` -> scalar; 1 if all point the same way."""
    unit = F.normalize(vectors.float(), dim=-1)
    count = unit.shape[0]
    return (unit.sum(dim=0).pow(2).sum() - unit.pow(2).sum()) / max(count * (count - 1), 1)


def normalized_std(vectors: torch.Tensor) -> torch.Tensor:
    """Compute √D times the mean standard deviation of ℓ2-normalized vectors: `[N, D]` -> scalar.

    About 1 when healthy, 0 when all vectors point the same way (Chen and He 2021, SimSiam, section 4.1).
    """
    unit = F.normalize(vectors.float(), dim=-1)
    return unit.std(dim=0, correction=0).mean() * vectors.shape[-1] ** 0.5


def mean_pool_by_sample(vectors: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
    """Average each sample's vectors: `[N, D]`, samples long `[N]` -> `[number of samples, D]`."""
    numbers, owner, counts = samples.unique(return_inverse=True, return_counts=True)
    sums = vectors.new_zeros(len(numbers), vectors.shape[-1]).index_add_(0, owner, vectors)
    return sums / counts[:, None]


def within_sample_variance_ratio(vectors: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
    """Compute the share of variance within samples; the rest is between their means.

    Args:
        vectors: `[N, D]`.
        samples: Sample of each vector, long `[N]`.

    Returns:
        A scalar between 0 (all positions of a sample have the same vector) and 1 (all samples have
        the same mean); 0 if all vectors are the same.
    """
    vectors = vectors.double()
    owner = samples.unique(return_inverse=True)[1]
    within = (vectors - mean_pool_by_sample(vectors, samples)[owner]).square().sum()
    total = (vectors - vectors.mean(dim=0)).square().sum()
    return torch.where(total > 0, within / total.clamp_min(1e-30), torch.zeros_like(total)).float()


def top1_accuracy(predictions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Compute the top-1 accuracy by cosine among all targets: `[N, D]`, `[N, D]` -> scalar.

    Chance is 1/N. Targets are centred first, which removes the direction that all share.
    """
    centre = targets.float().mean(dim=0)
    similarity = F.normalize(predictions.float() - centre, dim=-1) @ F.normalize(targets.float() - centre, dim=-1).T
    return _top1_accuracy(similarity, torch.arange(targets.shape[0], device=targets.device))


def top1_accuracy_in_sample(
    predictions: torch.Tensor, targets: torch.Tensor, samples: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the top-1 accuracy by cosine among the targets of a sample, and its chance.

    Predictions and targets are centred on their means in the sample. Predictions that depend only on the sample do not
    differ within it, so they match at most one of its targets, which is chance.

    Args:
        predictions: `[N, D]`.
        targets: `[N, D]`.
        samples: Sample of each target, long `[N]`. A target that is the only one of its sample is left out.

    Returns:
        Two scalars, the second of which is the mean over the targets of 1/(number of candidates);
        NaN if no sample has several targets.
    """
    owner, counts = samples.unique(return_inverse=True, return_counts=True)[1:]
    order = owner.argsort(stable=True)
    order, sizes = order[counts[owner[order]] > 1], counts[counts > 1]
    if not len(sizes):
        nan = targets.new_full((), torch.nan, dtype=torch.float32)
        return nan, nan
    predicted, candidates = (
        pad_sequence(F.normalize(_centred(vectors.float(), owner), dim=-1)[order].split(sizes.tolist()), True)
        for vectors in (predictions, targets)
    )
    index = torch.arange(predicted.shape[1], device=targets.device).expand(predicted.shape[:2])
    valid = index < sizes[:, None]
    similarity = (predicted @ candidates.mT).masked_fill(~valid[:, None], -torch.inf)
    return _top1_accuracy(similarity[valid], index[valid]), len(sizes) / sizes.sum()


def sample_top1_accuracy(predictions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Compute the top-1 accuracy by cosine of each masked sample among the targets of all samples.

    Chance is 1/N. Targets are standardized over the samples first, as in the contrastive term.

    Args:
        predictions: `[N * masks, D]`, those of a sample's masks adjacent.
        targets: `[N, D]`.
    """
    similarity = F.normalize(predictions.float(), dim=-1) @ F.normalize(standardize_features(targets.float()), dim=-1).T
    labels = torch.arange(len(targets), device=targets.device).repeat_interleave(len(predictions) // len(targets))
    return _top1_accuracy(similarity, labels)


def _top1_accuracy(similarity: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Compute the share of rows whose label has the maximum: `[N, C]`, long `[N]` -> scalar.

    It is NaN if a value is NaN. A tie counts as wrong: in a collapsed batch all targets are equally near.
    """
    best = similarity >= similarity.max(dim=1, keepdim=True).values
    accuracy = (best.gather(1, labels[:, None])[:, 0] & (best.sum(dim=1) == 1)).float().mean()
    return torch.where(similarity.isnan().any(), torch.full_like(accuracy, torch.nan), accuracy)


def constant_baseline_loss(targets: torch.Tensor, loss_type: str, smooth_l1_beta: float = 1.0) -> torch.Tensor:
    """Compute the mean loss of the best constant prediction: `[N, D]` -> scalar.

    The constant is the mean for l2, the median for l1, the mean direction for cosine. For smooth L1 it comes from
    `_SMOOTH_L1_STEPS` steps of reweighted least squares from the mean (Huber 1964), none of which raises the loss. It
    is fitted to the targets that it is evaluated on, so its loss is too low by a fraction of about 1/N.

    Raises:
        ValueError: The best constant of this loss is unknown.
    """
    targets = targets.float()
    if loss_type == "l1":
        constant = targets.contiguous().median(dim=0).values  # torch's median of an expanded tensor is wrong
    elif loss_type == "l2":
        constant = targets.mean(dim=0)
    elif loss_type == "cosine":
        constant = F.normalize(targets, dim=-1).mean(dim=0)
    elif loss_type == "smooth_l1":
        constant = targets.mean(dim=0)
        for _ in range(_SMOOTH_L1_STEPS):
            weight = (targets - constant).abs_().clamp_min_(smooth_l1_beta).reciprocal_()
            constant = (weight * targets).sum(dim=0) / weight.sum(dim=0)
    else:
        raise ValueError(f"The best constant for the loss {loss_type!r} is unknown. Add it to constant_baseline_loss.")
    return prediction_loss(loss_type, constant.expand_as(targets), targets, smooth_l1_beta).mean()


def group_baseline_loss(
    targets: torch.Tensor, groups: torch.Tensor, loss_type: str, smooth_l1_beta: float = 1.0
) -> torch.Tensor:
    """Estimate the mean loss of predicting each target by the true mean of its group.

    Deviations from a mean that was fitted to n targets are too small: their variance is that from the true mean
    times 1 - 1/n. Multiplying by sqrt(n / (n - 1)) corrects it. So the estimate is unbiased for l2, and for l1 and
    smooth L1 with Gaussian deviations. For cosine the loss of the true mean direction is 1 - |mean unit vector|. The
    mean cosine between different targets of a group is an unbiased estimate of that length's square; it is averaged
    over all groups before the root.

    Args:
        targets: `[N, D]`.
        groups: Group of each target, long `[N]`. A target that is the only one of its group is
            predicted by the mean of all.
        loss_type: Loss, as `JepaConfig.loss`.
        smooth_l1_beta: As in `JepaConfig`.

    Returns:
        A scalar; 0 for N = 1.
    """
    targets = targets.float()
    unit = F.normalize(targets, dim=-1) if loss_type == "cosine" else targets
    owner, counts = groups.unique(return_inverse=True, return_counts=True)[1:]
    # Targets without others in their group form one group of all targets.
    sizes = torch.where(counts > 1, counts, len(targets))[owner, None]
    means = torch.where(counts[:, None] > 1, mean_pool_by_sample(unit, owner), unit.mean(dim=0))[owner]
    if loss_type == "cosine":
        others = (sizes * means - unit) / (sizes - 1).clamp_min(1)
        return 1.0 - (others * unit).sum(dim=-1).mean().clamp_min(0.0).sqrt()
    deviations = (targets - means) * (sizes / (sizes - 1).clamp_min(1)).sqrt()
    return prediction_loss(loss_type, deviations, torch.zeros_like(deviations), smooth_l1_beta).mean()


def _centred(vectors: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
    """Subtract the mean of each vector's group: `[N, D]`, long `[N]` from 0 -> `[N, D]`."""
    return vectors - mean_pool_by_sample(vectors, owner)[owner]
