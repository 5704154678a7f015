"""Claims about the health metrics."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_hf.losses import prediction_loss
from jepa_hf.metrics import (
    constant_predictor_loss,
    effective_rank,
    hit_rate,
    mean_pairwise_cosine,
    normalized_spread,
    position_predictor_loss,
    sample_hit_rate,
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
    """A diverged run is told as one, where the eigenvalues themselves would end it with a traceback."""
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


def test_spread_of_healthy_and_collapsed_clouds() -> None:
    """About 1 for Gaussian vectors of any scale, 0 for one direction, in between when a shared direction dominates."""
    cloud = gaussian(5000, 64)
    assert normalized_spread(cloud).item() == pytest.approx(1.0, abs=0.02)
    assert normalized_spread(100 * cloud).item() == pytest.approx(normalized_spread(cloud).item(), rel=1e-4)
    collapsed = gaussian(1, 64) * (1 + gaussian(5000, 1).abs())
    assert normalized_spread(collapsed).item() == pytest.approx(0.0, abs=1e-4)
    assert 0.1 < normalized_spread(cloud + 3).item() < 0.5


def test_hits_of_perfect_predictions_are_all() -> None:
    """The targets themselves, at any scale around their mean, hit every time."""
    targets = gaussian(200, 32) + 5
    assert hit_rate(targets, targets).item() == 1.0
    centre = targets.mean(dim=0)
    assert hit_rate(centre + 0.1 * (targets - centre), targets).item() == 1.0


def test_hits_of_random_predictions_are_chance() -> None:
    """Unrelated predictions hit one time in N."""
    rates = [hit_rate(gaussian(50, 32, seed), gaussian(50, 32, seed + 1000)).item() for seed in range(100)]
    assert sum(rates) / len(rates) == pytest.approx(1 / 50, abs=0.006)


def test_hits_of_what_is_not_a_number_are_none_that_could_be_told() -> None:
    vectors = gaussian(8, 4)
    vectors[2, 1] = float("nan")
    assert hit_rate(vectors, gaussian(8, 4)).isnan()


def test_hits_of_a_collapsed_batch_are_none() -> None:
    """Equal targets tie, which is no hit; equal predictions can be right once at most."""
    cloud, point = gaussian(50, 32), gaussian(1, 32, 1).expand(50, 32)
    assert hit_rate(cloud, point).item() == 0.0
    assert hit_rate(point, point).item() == 0.0
    assert hit_rate(point, cloud).item() <= 1 / 50 + 1e-6
    assert hit_rate(cloud.mean(dim=0).expand(50, 32), cloud).item() <= 1 / 50 + 1e-6


def test_hits_are_no_gift_of_a_shared_direction() -> None:
    """Targets in a narrow cone: predictions of its axis alone hit at most once, of target and axis always."""
    axis = 100 * gaussian(1, 32, 3)
    targets = axis + gaussian(50, 32)
    assert hit_rate(axis.expand(50, 32), targets).item() <= 1 / 50 + 1e-6
    assert hit_rate(targets + 0.1 * gaussian(50, 32, 4), targets).item() == 1.0


def test_hits_count_each_prediction() -> None:
    """Of four predictions, two exchanged: half hit."""
    targets = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    assert hit_rate(targets[[1, 0, 2, 3]], targets).item() == 0.5


@few
@given(st.integers(1, 20), st.integers(1, 12), st.floats(0.1, 3.0), SEEDS)
def test_constant_predictor_equals_a_loop(n: int, d: int, beta: float, seed: int) -> None:
    """Each kind is the mean loss of the mean target (cosine: the mean direction), computed one vector at a time."""
    targets = gaussian(n, d, seed) + 0.3
    mean = targets.mean(dim=0)
    direction = F.normalize(targets, dim=-1).mean(dim=0)
    expected = {
        "cosine": [1 - F.cosine_similarity(direction, target, dim=0).item() for target in targets],
        "l1": [(mean - target).abs().mean().item() for target in targets],
        "l2": [((mean - target) ** 2).mean().item() for target in targets],
        "smooth_l1": [F.smooth_l1_loss(mean, target, beta=beta).item() for target in targets],
    }
    for kind, values in expected.items():
        assert constant_predictor_loss(targets, kind, beta).item() == pytest.approx(sum(values) / n, abs=1e-4)


@pytest.mark.parametrize("kind", ["cosine", "l2"])
def test_constant_predictor_is_the_best_constant(kind: str) -> None:
    """For cosine and l2 no other constant has a lower loss: the rival is as hard as it can be."""
    targets = gaussian(100, 8) + 0.5
    best = constant_predictor_loss(targets, kind).item()
    constant = F.normalize(targets, dim=-1).mean(dim=0) if kind == "cosine" else targets.mean(dim=0)
    for seed in range(20):
        other = (constant + 0.1 * gaussian(1, 8, seed)).expand_as(targets)
        assert prediction_loss(kind, other, targets).mean().item() > best


@pytest.mark.parametrize("kind", ["cosine", "smooth_l1", "l2", "l1"])
def test_constant_predictor_of_collapsed_targets_is_perfect(kind: str) -> None:
    """One repeated target is predicted without loss: a low loss proves nothing."""
    assert constant_predictor_loss(gaussian(1, 16).expand(50, 16), kind).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("metric", [effective_rank, mean_pairwise_cosine, normalized_spread])
def test_metrics_accept_bfloat16(metric) -> None:
    """Half-precision vectors are measured in float32 or better, and the answer is a finite float32 scalar."""
    value = metric(gaussian(100, 16).bfloat16())
    assert value.dtype == torch.float32
    assert value.shape == ()
    assert value.item() == pytest.approx(metric(gaussian(100, 16)).item(), abs=0.05)


@few
@given(st.integers(2, 30), st.integers(1, 6), st.sampled_from(["smooth_l1", "l2", "l1", "cosine"]), SEEDS)
def test_the_position_s_rival_is_the_mean_of_the_others_there(count: int, places: int, kind: str, seed: int) -> None:
    """Written out target by target; one that is alone at its position is left out, NaN where all are."""
    targets = gaussian(count, 5, seed)
    positions = 7 * torch.randint(places, (count,), generator=torch.Generator().manual_seed(seed))
    unit = F.normalize(targets, dim=-1) if kind == "cosine" else targets
    losses = []
    for number, position in enumerate(positions):
        others = positions == position
        others[number] = False
        if others.any():
            losses.append(prediction_loss(kind, unit[others].mean(dim=0), targets[number]))
    found = position_predictor_loss(targets, positions, kind)
    if losses:
        assert found.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4, abs=1e-5)
    else:
        assert found.isnan()


def test_targets_that_are_positions_and_targets_that_are_not() -> None:
    """Nothing is left of the first; of the second no less than what a constant leaves."""
    positions = torch.arange(8).repeat(50)
    table = gaussian(8, 16)
    assert position_predictor_loss(table[positions], positions, "l2").item() == pytest.approx(0, abs=1e-6)
    anything = gaussian(400, 16, seed=1)
    assert position_predictor_loss(anything, positions, "l2") > constant_predictor_loss(anything, "l2")


@few
@given(st.integers(2, 12), st.integers(1, 3), SEEDS)
def test_the_sample_hit_rate_is_1_for_the_targets_and_0_for_their_neighbours(n: int, views: int, seed: int) -> None:
    """Whatever all samples share; a tie, as where all predictions and targets are the same, is no hit."""
    targets = 5 * F.one_hot(torch.arange(n), 16).float() + gaussian(1, 16, seed)
    own = targets - targets.mean(dim=0)
    assert sample_hit_rate(own.repeat_interleave(views, dim=0), targets) == 1
    assert sample_hit_rate(own.roll(1, dims=0).repeat_interleave(views, dim=0), targets) == 0
    assert sample_hit_rate(torch.ones(n * views, 16), torch.ones(n, 16)) == 0


def test_one_of_three_views_that_finds_its_sample() -> None:
    targets = 5 * F.one_hot(torch.arange(4), 16).float()
    own = targets - targets.mean(dim=0)
    predictions = torch.stack([own, own.roll(1, dims=0), own.roll(2, dims=0)], dim=1).flatten(0, 1)
    assert sample_hit_rate(predictions, targets).item() == pytest.approx(1 / 3)
