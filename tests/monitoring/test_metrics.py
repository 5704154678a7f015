"""Claims about the health metrics."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_hf.models.losses import prediction_loss
from jepa_hf.monitoring.metrics import (
    constant_baseline_loss,
    effective_rank,
    group_baseline_loss,
    mean_pairwise_cosine,
    normalized_std,
    sample_top1_accuracy,
    top1_accuracy,
    top1_accuracy_in_sample,
)

few = settings(max_examples=40, deadline=None)
SEEDS = st.integers(0, 2**31)


def gaussian(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def rotation(d: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(gaussian(d, d, seed))[0]


@pytest.mark.parametrize("k", [1, 2, 7, 16])
def test_rank_of_k_equal_orthogonal_directions_is_k(k: int) -> None:
    """Vectors ±e_1 … ±e_k, in any basis, have effective rank k."""
    axes = torch.eye(16)[:k]
    vectors = torch.cat([axes, -axes]) @ rotation(16)
    assert effective_rank(vectors).item() == pytest.approx(k, rel=1e-4)


def test_rank_of_unequal_directions_is_the_exponential_of_the_entropy() -> None:
    """Singular values 3 and 1 give exp(−¾ ln ¾ − ¼ ln ¼), between 1 and 2."""
    vectors = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    expected = math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert effective_rank(vectors).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("n", "d"), [(1, 8), (64, 32), (32, 64), (4000, 64)])
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0])
def test_rank_of_identical_vectors_is_zero(n: int, d: int, scale: float) -> None:
    """One point has no directions, however many vectors stand on it and whatever its rounded mean."""
    assert effective_rank(scale * gaussian(1, d).expand(n, d)).item() == 0.0


def test_rank_of_vectors_that_differ_by_rounding_is_zero() -> None:
    """The same point, up to float32's last bits, is not a cloud of full rank."""
    point = gaussian(1, 256)
    assert effective_rank(point * (1 + 6e-8 * gaussian(1000, 256, 1))).item() == 0.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rank_of_vectors_with_a_value_that_is_not_finite_is_nan(value: float) -> None:
    """A diverged run gives NaN; the eigenvalues alone would raise."""
    vectors = gaussian(40, 8)
    vectors[3, 3] = value
    assert effective_rank(vectors).isnan()


def test_rank_of_many_isotropic_vectors_is_near_their_dimension() -> None:
    """10,000 Gaussian vectors of 32 numbers: close to 32, and never above."""
    assert 31.5 < effective_rank(gaussian(10_000, 32)).item() <= 32.0


@few
@given(st.integers(2, 40), st.integers(1, 40), SEEDS)
def test_rank_is_that_of_the_singular_values(n: int, d: int, seed: int) -> None:
    """It equals the formula on an SVD, whichever of N and D is larger, and lies between 1 and min(N − 1, D)."""
    vectors = gaussian(n, d, seed)
    rank = effective_rank(vectors).item()
    p = torch.linalg.svdvals(vectors.double() - vectors.double().mean(dim=0))
    p = p[: min(n - 1, d)] / p.sum()
    assert rank == pytest.approx(math.exp(-(p * p.log()).sum().item()), rel=1e-3)
    assert 1 - 1e-4 <= rank <= min(n - 1, d) + 1e-4


@few
@given(st.integers(3, 60), st.integers(2, 40), st.floats(1e-3, 1e3), SEEDS)
def test_rank_does_not_see_scale_rotation_or_shift(n: int, d: int, scale: float, seed: int) -> None:
    """Scaled, rotated and moved by ten standard deviations, a cloud keeps its rank."""
    cloud = gaussian(n, d, seed)
    moved = scale * (cloud @ rotation(d, seed) + 10 * gaussian(1, d, seed + 1))
    assert effective_rank(moved).item() == pytest.approx(effective_rank(cloud).item(), rel=1e-3)


@few
@given(st.integers(2, 30), st.integers(1, 30), SEEDS)
def test_pairwise_cosine_equals_all_pairs(n: int, d: int, seed: int) -> None:
    """The closed form is the mean over every pair of different vectors."""
    vectors = gaussian(n, d, seed) + 0.5
    pairs = [F.cosine_similarity(vectors[i], vectors[j], dim=0).item() for i in range(n) for j in range(n) if i != j]
    assert mean_pairwise_cosine(vectors).item() == pytest.approx(sum(pairs) / len(pairs), abs=1e-4)


def test_pairwise_cosine_of_known_clouds() -> None:
    """1 for one direction at any length, −1 for two opposite ones, 0 for a right angle."""
    assert mean_pairwise_cosine(torch.tensor([[1.0, 2.0], [3.0, 6.0], [0.1, 0.2]])).item() == pytest.approx(1.0)
    assert mean_pairwise_cosine(torch.tensor([[1.0, 2.0], [-2.0, -4.0]])).item() == pytest.approx(-1.0)
    assert mean_pairwise_cosine(torch.tensor([[1.0, 0.0], [0.0, 2.0]])).item() == pytest.approx(0.0, abs=1e-6)


def test_normalized_std_of_healthy_and_collapsed_clouds() -> None:
    """About 1 for Gaussian vectors of any scale, 0 for one direction, in between when a shared direction dominates."""
    cloud = gaussian(5000, 64)
    assert normalized_std(cloud).item() == pytest.approx(1.0, abs=0.02)
    assert normalized_std(100 * cloud).item() == pytest.approx(normalized_std(cloud).item(), rel=1e-4)
    collapsed = gaussian(1, 64) * (1 + gaussian(5000, 1).abs())
    assert normalized_std(collapsed).item() == pytest.approx(0.0, abs=1e-4)
    assert 0.1 < normalized_std(cloud + 3).item() < 0.5


def test_hits_of_perfect_predictions_are_all() -> None:
    """The targets themselves, at any scale around their mean, hit every time."""
    targets = gaussian(200, 32) + 5
    assert top1_accuracy(targets, targets).item() == 1.0
    centre = targets.mean(dim=0)
    assert top1_accuracy(centre + 0.1 * (targets - centre), targets).item() == 1.0


def test_hits_of_random_predictions_are_chance() -> None:
    """Unrelated predictions hit one time in N."""
    rates = [top1_accuracy(gaussian(50, 32, seed), gaussian(50, 32, seed + 1000)).item() for seed in range(100)]
    assert sum(rates) / len(rates) == pytest.approx(1 / 50, abs=0.006)


def test_top1_accuracy_of_nan_is_nan() -> None:
    vectors = gaussian(8, 4)
    vectors[2, 1] = float("nan")
    assert top1_accuracy(vectors, gaussian(8, 4)).isnan()


def test_hits_of_a_collapsed_batch_are_none() -> None:
    """Equal targets tie, which is not a hit; equal predictions can be right once at most."""
    cloud, point = gaussian(50, 32), gaussian(1, 32, 1).expand(50, 32)
    assert top1_accuracy(cloud, point).item() == 0.0
    assert top1_accuracy(point, point).item() == 0.0
    assert top1_accuracy(point, cloud).item() <= 1 / 50 + 1e-6
    assert top1_accuracy(cloud.mean(dim=0).expand(50, 32), cloud).item() <= 1 / 50 + 1e-6


def test_hits_are_no_gift_of_a_shared_direction() -> None:
    """Targets in a narrow cone: predictions of its axis alone hit at most once, of target and axis always."""
    axis = 100 * gaussian(1, 32, 3)
    targets = axis + gaussian(50, 32)
    assert top1_accuracy(axis.expand(50, 32), targets).item() <= 1 / 50 + 1e-6
    assert top1_accuracy(targets + 0.1 * gaussian(50, 32, 4), targets).item() == 1.0


def test_hits_count_each_prediction() -> None:
    """Of four predictions, two exchanged: half hit."""
    targets = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    assert top1_accuracy(targets[[1, 0, 2, 3]], targets).item() == 0.5


@few
@given(st.integers(1, 20), st.integers(1, 12), SEEDS)
def test_constant_predictor_equals_a_loop(n: int, d: int, seed: int) -> None:
    """Mean loss of the mean for l2, the median for l1, the mean direction for cosine, one vector at a time."""
    targets = gaussian(n, d, seed) + 0.3
    constants = {"l2": targets.mean(dim=0), "l1": targets.median(dim=0).values}
    constants["cosine"] = F.normalize(targets, dim=-1).mean(dim=0)
    for kind, constant in constants.items():
        losses = [prediction_loss(kind, constant, target).item() for target in targets]
        assert constant_baseline_loss(targets, kind).item() == pytest.approx(sum(losses) / n, abs=1e-4)


@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("kind", ["cosine", "l2", "l1", "smooth_l1"])
def test_constant_predictor_is_the_best_constant(kind: str, beta: float, skewed: bool) -> None:
    """Gradient descent finds no constant whose loss is lower by 0.3 %: the baseline is a hard one."""
    targets = gaussian(200, 8) + 0.5
    if skewed:
        targets = targets.exp()
    constant = targets.mean(dim=0).requires_grad_()
    optimizer = torch.optim.Adam([constant], lr=0.02)
    lowest = math.inf
    for _ in range(500):
        loss = prediction_loss(kind, constant.expand_as(targets), targets, beta).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        lowest = min(lowest, loss.item())
    assert constant_baseline_loss(targets, kind, beta).item() <= lowest * 1.003


@pytest.mark.parametrize("kind", ["cosine", "smooth_l1", "l2", "l1"])
def test_constant_predictor_of_collapsed_targets_is_perfect(kind: str) -> None:
    """One repeated target is predicted without loss: a low loss proves nothing."""
    assert constant_baseline_loss(gaussian(1, 16).expand(50, 16), kind).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("metric", [effective_rank, mean_pairwise_cosine, normalized_std])
def test_metrics_accept_bfloat16(metric) -> None:
    """Half-precision vectors are measured in float32 or better, and the answer is a finite float32 scalar."""
    value = metric(gaussian(100, 16).bfloat16())
    assert value.dtype == torch.float32
    assert value.shape == ()
    assert value.item() == pytest.approx(metric(gaussian(100, 16)).item(), abs=0.05)


@pytest.mark.parametrize("kind", ["l2", "l1", "smooth_l1", "cosine"])
@pytest.mark.parametrize("n", [2, 3, 5, 10, 50])
def test_the_baseline_of_a_group_has_the_loss_of_the_true_mean(n: int, kind: str) -> None:
    """Of n targets a group, for n from 2 to 50, within 2 % of the loss of the group's true mean (cosine: direction).

    Fitted to the targets it would be too low by 1/n, and without each target itself too high by 1/(n - 1).
    """
    groups = torch.arange(2000 // n + 200)
    true = gaussian(len(groups), 32)
    targets = true.repeat_interleave(n, dim=0) + 0.8 * gaussian(len(groups) * n, 32, 1)
    owner = groups.repeat_interleave(n)
    expected = prediction_loss(kind, true[owner], targets).mean().item()
    assert group_baseline_loss(targets, owner, kind).item() == pytest.approx(expected, rel=0.02)


@few
@given(st.integers(2, 8), st.floats(0.1, 10), SEEDS)
def test_the_baseline_of_a_group_is_exact_for_l2(n: int, scale: float, seed: int) -> None:
    """It is the unbiased variance, which numpy has as ddof=1, averaged over groups of one size."""
    targets = scale * gaussian(5 * n, 6, seed)
    actual = group_baseline_loss(targets, torch.arange(5).repeat_interleave(n), "l2")
    assert actual.item() == pytest.approx(targets.numpy().reshape(5, n, 6).var(axis=1, ddof=1).mean(), rel=1e-4)


@pytest.mark.parametrize("kind", ["l2", "l1", "smooth_l1", "cosine"])
def test_groups_that_say_everything_and_groups_that_say_nothing(kind: str) -> None:
    """Nothing is left of the first; of the second the residual of a constant, also where most targets are alone."""
    groups = torch.arange(8).repeat(50)
    assert group_baseline_loss(gaussian(8, 16)[groups], groups, kind).item() == pytest.approx(0, abs=1e-3)
    anything = gaussian(400, 64, seed=1)
    constant = constant_baseline_loss(anything, kind).item()
    for unrelated in (groups, torch.arange(400) % 390):
        assert group_baseline_loss(anything, unrelated, kind).item() == pytest.approx(constant, rel=0.08)


def documents(share: float, samples: int = 128, size: int = 30, width: int = 64) -> tuple[torch.Tensor, ...]:
    """Targets of which the document makes a share of the variance, the documents' means, and each one's document."""
    owner = torch.arange(samples).repeat_interleave(size)
    means = share**0.5 * gaussian(samples, width)[owner]
    return means + (1 - share) ** 0.5 * gaussian(len(owner), width, 1), means, owner


@pytest.mark.parametrize("noise", [0.0, 1e-3, 1.0])
def test_predictions_that_know_the_document_alone_hit_by_chance_in_it(noise: float) -> None:
    """Also where they differ within it, but not as its targets do; the batch's accuracy is far above chance."""
    targets, means, owner = documents(0.2)
    predictions = means + noise * 0.1 * gaussian(*targets.shape, 2)
    rate, chance = top1_accuracy_in_sample(predictions, targets, owner)
    assert chance.item() == pytest.approx(1 / 30)
    assert rate.item() == pytest.approx(1 / 30, abs=0.01)
    assert top1_accuracy(predictions[::8], targets[::8]).item() > 20 / len(targets[::8])


def test_predictions_that_know_their_targets_hit_in_their_document() -> None:
    """Perfect ones always; and wrong about the document, but right about what is its own in each target, too."""
    targets, means, owner = documents(0.2)
    assert top1_accuracy_in_sample(targets, targets, owner)[0] == 1
    assert top1_accuracy_in_sample(targets - means.roll(30, dims=0), targets, owner)[0] > 0.99
    assert top1_accuracy_in_sample(targets.flip(0), targets, owner)[0] < 0.1


@few
@given(st.lists(st.integers(0, 5), min_size=2, max_size=30), SEEDS)
def test_hits_in_a_sample_equal_a_loop(numbers: list[int], seed: int) -> None:
    """Sample by sample, whatever their sizes and order; those of one target are left out, NaN where all are."""
    samples = torch.tensor(numbers)
    targets = gaussian(len(numbers), 6, seed)
    predictions = targets + gaussian(len(numbers), 6, seed + 1)
    rates, chances = [], []
    for number in samples.unique():
        of = samples == number
        if of.sum() > 1:
            own = predictions[of] - predictions[of].mean(dim=0)
            rates += [top1_accuracy(own + targets[of].mean(dim=0), targets[of]).item()] * int(of.sum())
            chances += [1 / of.sum().item()] * int(of.sum())
    rate, chance = top1_accuracy_in_sample(predictions, targets, samples)
    if not rates:
        assert rate.isnan()
        assert chance.isnan()
        return
    assert rate.item() == pytest.approx(sum(rates) / len(rates), abs=1e-5)
    assert chance.item() == pytest.approx(sum(chances) / len(chances), abs=1e-5)


def test_equal_targets_of_a_sample_are_no_hits() -> None:
    targets = gaussian(1, 8).repeat(6, 1)
    assert top1_accuracy_in_sample(gaussian(6, 8, 1), targets, torch.zeros(6, dtype=torch.long))[0] == 0


@few
@given(st.integers(2, 12), st.integers(1, 3), SEEDS)
def test_the_sample_top1_accuracy_is_1_for_the_targets_and_0_for_their_neighbours(
    n: int, views: int, seed: int
) -> None:
    """Whatever all samples share; a tie, as where all predictions and targets are the same, is not a hit."""
    targets = 5 * F.one_hot(torch.arange(n), 16).float() + gaussian(1, 16, seed)
    own = targets - targets.mean(dim=0)
    assert sample_top1_accuracy(own.repeat_interleave(views, dim=0), targets) == 1
    assert sample_top1_accuracy(own.roll(1, dims=0).repeat_interleave(views, dim=0), targets) == 0
    assert sample_top1_accuracy(torch.ones(n * views, 16), torch.ones(n, 16)) == 0


def test_one_of_three_views_that_finds_its_sample() -> None:
    targets = 5 * F.one_hot(torch.arange(4), 16).float()
    own = targets - targets.mean(dim=0)
    predictions = torch.stack([own, own.roll(1, dims=0), own.roll(2, dims=0)], dim=1).flatten(0, 1)
    assert sample_top1_accuracy(predictions, targets).item() == pytest.approx(1 / 3)


def test_the_best_constant_of_an_unknown_loss_is_refused() -> None:
    """The mean would be wrong without a word."""
    with pytest.raises(ValueError, match=r"loss 'huber' is unknown\. Add it to constant_baseline_loss"):
        constant_baseline_loss(torch.ones(4, 2), "huber")
