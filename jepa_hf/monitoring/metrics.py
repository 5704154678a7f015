"""What tells a healthy run from a collapsed one. The loss does not: it may fall while the representation dies."""

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from ..models.losses import batch_standardize, prediction_loss

_SMOOTH_L1_STEPS = 8


def effective_rank(vectors: torch.Tensor, eps: float = 1e-12) -> torch.Tensor:
    """exp of the entropy of the normalised singular values of the centred vectors (Roy and Vetterli 2007; RankMe).

    Args:
        vectors: `[N, D]`.

    Returns:
        A scalar between 1 and min(N − 1, D), or 0 where all vectors are the same; NaN where a value is not finite. It
        does not see the scale.
    """
    finite = vectors.isfinite().all()
    vectors = torch.where(finite, vectors, torch.zeros_like(vectors))  # eigenvalues of a NaN are never found
    # In float64, as a mean rounded to float32 would move all vectors one way, which looks like a direction.
    vectors = vectors.double()
    centred = vectors - vectors.mean(dim=0)
    # Singular values from the smaller Gram matrix: cheaper than an SVD of [N, D].
    gram = centred @ centred.T if centred.shape[0] < centred.shape[1] else centred.T @ centred
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    # Below float32's resolution a singular value is rounding, not direction.
    singular = torch.where(singular > 1e-6 * singular.max(), singular, torch.zeros_like(singular))
    total = singular.sum()
    p = singular / total.clamp_min(eps)
    entropy = -(p * torch.log(p.clamp_min(eps))).sum()
    # Nor is a cloud that is no larger than the rounding of its vectors.
    alive = centred.norm() > 1e-6 * vectors.norm()
    rank = torch.where(alive, torch.exp(entropy), torch.zeros_like(entropy))
    return torch.where(finite, rank, torch.full_like(rank, torch.nan)).float()


def mean_pairwise_cosine(vectors: torch.Tensor) -> torch.Tensor:
    """Mean cosine between different vectors: `[N, D]` -> scalar; 1 when all point the same way."""
    unit = F.normalize(vectors.float(), dim=-1)
    count = unit.shape[0]
    return (unit.sum(dim=0).pow(2).sum() - unit.pow(2).sum()) / max(count * (count - 1), 1)


def normalized_spread(vectors: torch.Tensor) -> torch.Tensor:
    """Mean over features of the standard deviation of ℓ2-normalised vectors, times √D: `[N, D]` -> scalar.

    About 1 when healthy, 0 when all vectors point the same way (Chen and He 2021, SimSiam, section 4.1).
    """
    unit = F.normalize(vectors.float(), dim=-1)
    return unit.std(dim=0, correction=0).mean() * vectors.shape[-1] ** 0.5


def sample_means(vectors: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
    """Mean of each sample's vectors: `[N, D]` and each one's sample, long `[N]` -> `[number of samples, D]`."""
    numbers, owner, counts = samples.unique(return_inverse=True, return_counts=True)
    sums = vectors.new_zeros(len(numbers), vectors.shape[-1]).index_add_(0, owner, vectors)
    return sums / counts[:, None]


def within_sample_share(vectors: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
    """Share of the vectors' variance that lies within samples, the rest being between their means.

    Args:
        vectors: `[N, D]`.
        samples: the sample of each, long `[N]`.

    Returns:
        A scalar between 0 (all positions of a sample have the same vector) and 1 (all samples have the same mean); 0
        where all vectors are the same.
    """
    vectors = vectors.double()
    owner = samples.unique(return_inverse=True)[1]
    within = (vectors - sample_means(vectors, samples)[owner]).square().sum()
    total = (vectors - vectors.mean(dim=0)).square().sum()
    return torch.where(total > 0, within / total.clamp_min(1e-30), torch.zeros_like(total)).float()


def hit_rate(predictions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Share of predictions whose own target is the nearest, by cosine, among all: `[N, D]`, `[N, D]` -> scalar.

    Chance is 1/N. Targets are centred first, so that a direction shared by all of them counts for nothing.
    """
    centre = targets.float().mean(dim=0)
    similarity = F.normalize(predictions.float() - centre, dim=-1) @ F.normalize(targets.float() - centre, dim=-1).T
    return _hits(similarity, torch.arange(targets.shape[0], device=targets.device))


def hit_rate_in_sample(
    predictions: torch.Tensor, targets: torch.Tensor, samples: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Share of predictions whose own target is the nearest, by cosine, among those of its sample; and that of chance.

    Predictions and targets are centred on their own means in the sample. Predictions that know the sample alone do not
    differ within it, so they find one target of it at most, which is chance.

    Args:
        predictions, targets: `[N, D]`.
        samples: the sample of each, long `[N]`. A target that is alone in its sample is left out.

    Returns:
        Two scalars, the second of which is the mean over the targets of 1/(number of candidates); NaN where all targets
        are alone.
    """
    owner, counts = samples.unique(return_inverse=True, return_counts=True)[1:]
    order = owner.argsort(stable=True)
    order, sizes = order[counts[owner[order]] > 1], counts[counts > 1]
    if not len(sizes):
        return targets.new_full((2,), torch.nan, dtype=torch.float32).unbind()
    guesses, candidates = (
        pad_sequence(F.normalize(_centred(vectors.float(), owner), dim=-1)[order].split(sizes.tolist()), True)
        for vectors in (predictions, targets)
    )
    place = torch.arange(guesses.shape[1], device=targets.device).expand(guesses.shape[:2])
    there = place < sizes[:, None]
    similarity = (guesses @ candidates.mT).masked_fill(~there[:, None], -torch.inf)
    return _hits(similarity[there], place[there]), len(sizes) / sizes.sum()


def sample_hit_rate(predictions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Share of views whose own sample's target is the nearest, by cosine, among those of all samples.

    Chance is 1/N. Targets are standardised over the samples first, as in the contrastive term.

    Args:
        predictions: `[N * views, D]`, a sample's views next to each other.
        targets: `[N, D]`.
    """
    similarity = F.normalize(predictions.float(), dim=-1) @ F.normalize(batch_standardize(targets.float()), dim=-1).T
    own = torch.arange(len(targets), device=targets.device).repeat_interleave(len(predictions) // len(targets))
    return _hits(similarity, own)


def _hits(similarity: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Share of rows whose `own` column is the largest: `[N, C]`, long `[N]` -> scalar; NaN where a value is NaN.

    A tie is no hit: in a collapsed batch every target is as near as the right one.
    """
    best = similarity >= similarity.max(dim=1, keepdim=True).values
    share = (best.gather(1, own[:, None])[:, 0] & (best.sum(dim=1) == 1)).float().mean()
    return torch.where(similarity.isnan().any(), torch.full_like(share, torch.nan), share)


def constant_predictor_loss(targets: torch.Tensor, kind: str, smooth_l1_beta: float = 1.0) -> torch.Tensor:
    """Mean loss of always predicting the constant that is best for that loss: `[N, D]` -> scalar.

    The constant is the mean for l2, the median for l1, the mean direction for cosine. For smooth L1 it comes from
    `_SMOOTH_L1_STEPS` steps of reweighted least squares from the mean (Huber 1964), none of which raises the loss. It
    is fitted to the targets that it is judged on: its loss is too low by a share of about 1/N.
    """
    targets = targets.float()
    if kind == "l1":
        constant = targets.contiguous().median(dim=0).values  # of an expanded tensor torch's median is not the median
    else:
        constant = (F.normalize(targets, dim=-1) if kind == "cosine" else targets).mean(dim=0)
    if kind == "smooth_l1":
        for _ in range(_SMOOTH_L1_STEPS):
            weight = (targets - constant).abs_().clamp_min_(smooth_l1_beta).reciprocal_()
            constant = (weight * targets).sum(dim=0) / weight.sum(dim=0)
    return prediction_loss(kind, constant.expand_as(targets), targets, smooth_l1_beta).mean()


def group_predictor_loss(
    targets: torch.Tensor, groups: torch.Tensor, kind: str, smooth_l1_beta: float = 1.0
) -> torch.Tensor:
    """Mean loss of predicting each target by the true mean of its group, estimated from the group's n targets.

    Deviations from a mean that was fitted to n targets are too small: their variance is that from the true mean times
    1 - 1/n. Multiplied by sqrt(n / (n - 1)) they have its variance. So the estimate is unbiased for l2, and for l1 and
    smooth L1 where deviations are Gaussian. For cosine the loss of the true mean direction is 1 - |mean unit vector|.
    The mean cosine between different targets of a group estimates that length's square without bias; the mean over all
    groups is taken before the root.

    Args:
        targets: `[N, D]`.
        groups: the group of each, long `[N]`. A target that is alone in its group is predicted by the mean of all.

    Returns:
        A scalar; at N = 1, 0.
    """
    targets = targets.float()
    unit = F.normalize(targets, dim=-1) if kind == "cosine" else targets
    owner, counts = groups.unique(return_inverse=True, return_counts=True)[1:]
    # Those that are alone become one group of all targets.
    sizes = torch.where(counts > 1, counts, len(targets))[owner, None]
    means = torch.where(counts[:, None] > 1, sample_means(unit, owner), unit.mean(dim=0))[owner]
    if kind == "cosine":
        others = (sizes * means - unit) / (sizes - 1).clamp_min(1)
        return 1.0 - (others * unit).sum(dim=-1).mean().clamp_min(0.0).sqrt()
    deviations = (targets - means) * (sizes / (sizes - 1).clamp_min(1)).sqrt()
    return prediction_loss(kind, deviations, torch.zeros_like(deviations), smooth_l1_beta).mean()


def _centred(vectors: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
    """Less the mean of their groups, whose numbers are 0, 1, ...: `[N, D]`, long `[N]` -> `[N, D]`."""
    return vectors - sample_means(vectors, owner)[owner]
