"""Claims about losses and target normalisations."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_hf.models.contrastive import infonce
from jepa_hf.models.losses import (
    cosine_distance,
    covariance_loss,
    fixed_directions,
    l1,
    l2,
    layer_norm_no_affine,
    masked_mean,
    prediction_loss,
    sigreg,
    smooth_l1,
    standardize_features,
    variance_loss,
)

few = settings(max_examples=40, deadline=None)
SEEDS = st.integers(0, 2**31)

PREDICTION = torch.tensor([[1.0, 2.0, 2.0], [0.0, 3.0, 4.0]])
TARGET = torch.tensor([[1.0, 2.5, 0.0], [0.0, 0.0, 5.0]])
# Differences: (0, −0.5, 2) and (0, 3, −1).


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some_valid(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random validity with at least two valid entries."""
    valid = torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.6
    valid.view(-1)[:2] = True
    return valid


@pytest.mark.parametrize(
    ("kind", "beta", "expected"),
    [
        ("l1", 1.0, [2.5 / 3, 4 / 3]),
        ("l2", 1.0, [4.25 / 3, 10 / 3]),
        ("smooth_l1", 1.0, [(0.125 + 1.5) / 3, (2.5 + 0.5) / 3]),
        ("smooth_l1", 2.0, [(0.0625 + 1.0) / 3, (2.0 + 0.25) / 3]),
        ("smooth_l1", 0.25, [(0.375 + 1.875) / 3, (2.875 + 0.875) / 3]),
        ("cosine", 1.0, [1 - 6 / (3 * math.sqrt(7.25)), 1 - 4 / 5]),
    ],
)
def test_each_loss_equals_numbers_made_by_hand(kind: str, beta: float, expected: list[float]) -> None:
    """Per-target values, the mean over D of each element's term, with smooth_l1's threshold at beta."""
    torch.testing.assert_close(prediction_loss(kind, PREDICTION, TARGET, beta), torch.tensor(expected))


def test_the_named_functions_are_the_kinds() -> None:
    """`prediction_loss` by name and the function itself agree, on any leading dimensions."""
    prediction, target = gaussian(2, 3, 4, 8), gaussian(2, 3, 4, 8, seed=1)
    for kind, function in (("cosine", cosine_distance), ("smooth_l1", smooth_l1), ("l2", l2), ("l1", l1)):
        value = prediction_loss(kind, prediction, target)
        assert value.shape == (2, 3, 4)
        assert torch.equal(value, function(prediction, target))


def test_cosine_is_zero_for_parallel_one_for_orthogonal_and_two_for_opposite() -> None:
    """Only the angle counts, not the length."""
    x = gaussian(5, 16)
    torch.testing.assert_close(cosine_distance(x, 7 * x), torch.zeros(5), atol=1e-6, rtol=0)
    torch.testing.assert_close(cosine_distance(x, -0.01 * x), torch.full((5,), 2.0))
    assert cosine_distance(torch.tensor([3.0, 0.0]), torch.tensor([0.0, 2.0])).item() == 1.0


@pytest.mark.parametrize("kind", ["cosine", "smooth_l1", "l2", "l1"])
def test_prediction_loss_is_computed_in_float32(kind: str) -> None:
    """bfloat16 inputs give float32 values, equal to those of the same numbers widened first."""
    prediction, target = gaussian(50, 64).bfloat16(), gaussian(50, 64, seed=1).bfloat16()
    value = prediction_loss(kind, prediction, target)
    assert value.dtype == torch.float32
    assert torch.equal(value, prediction_loss(kind, prediction.float(), target.float()))


@pytest.mark.parametrize("kind", ["cosine", "smooth_l1", "l2", "l1"])
def test_a_gradient_step_lowers_the_loss(kind: str) -> None:
    """Gradients flow to the prediction and point uphill."""
    prediction, target = gaussian(10, 8).requires_grad_(), gaussian(10, 8, seed=1)
    before = prediction_loss(kind, prediction, target).sum()
    before.backward()
    assert prediction.grad.abs().sum() > 0
    with torch.no_grad():
        after = prediction_loss(kind, prediction - 0.01 * prediction.grad, target).sum()
    assert after < before


def test_an_unknown_kind_is_refused() -> None:
    """ValueError that lists the known ones."""
    with pytest.raises(ValueError, match=r"cosine, smooth_l1, l2, l1, not 'huber'"):
        prediction_loss("huber", PREDICTION, TARGET)


def test_masked_mean_reads_valid_values_only() -> None:
    """Mean of what is valid, 0 where nothing is, whatever stands elsewhere."""
    values = torch.tensor([[1.0, 3.0, float("nan")], [float("inf"), 5.0, 7.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    valid = torch.tensor([[True, True, False], [False, True, True], [False, False, True], [False, False, False]])
    assert masked_mean(values, valid, dim=1).tolist() == [2.0, 6.0, 3.0, 0.0]


def test_masked_mean_broadcasts_validity() -> None:
    """Validity `[B, L, 1]` serves every feature of `[B, L, D]`."""
    values, valid = gaussian(3, 6, 4), some_valid(3, 6)
    valid[:, 0] = True
    expected = torch.stack([row[keep].mean(dim=0) for row, keep in zip(values, valid, strict=True)])
    torch.testing.assert_close(masked_mean(values, valid.unsqueeze(-1), dim=1), expected)


def test_layer_normalize_gives_zero_mean_and_unit_variance_per_vector() -> None:
    """Over D, biased variance, without affine part: scale and shift of a vector disappear."""
    states = 3 * gaussian(2, 5, 64) + 7
    normal = layer_norm_no_affine(states)
    torch.testing.assert_close(normal.mean(dim=-1), torch.zeros(2, 5), atol=1e-5, rtol=0)
    torch.testing.assert_close(normal.var(dim=-1, correction=0), torch.ones(2, 5), atol=1e-4, rtol=0)
    torch.testing.assert_close(layer_norm_no_affine(10 * states + 100), normal, atol=1e-3, rtol=1e-3)
    centred = states - states.mean(dim=-1, keepdim=True)
    torch.testing.assert_close(normal, centred / centred.square().mean(dim=-1, keepdim=True).add(1e-5).sqrt())


@few
@given(st.integers(2, 40), st.integers(1, 12), SEEDS)
def test_variance_hinge_equals_the_formula_on_valid_vectors(n: int, d: int, seed: int) -> None:
    """Mean over features of relu(1 − √(var + 1e-4)) with torch's unbiased variance; invalid vectors count nowhere."""
    states, valid = gaussian(n, d, seed=seed) * torch.linspace(0.1, 2, d), some_valid(n, seed=seed)
    states[~valid] = float("nan")
    expected = F.relu(1 - (states[valid].var(dim=0) + 1e-4).sqrt()).mean()
    torch.testing.assert_close(variance_loss(states, valid), expected, atol=1e-5, rtol=1e-4)


def test_variance_hinge_of_collapsed_and_spread_vectors() -> None:
    """About 1 where all vectors are the same, 0 where features spread by more than 1, 0 for fewer than two vectors."""
    valid = torch.ones(100, dtype=torch.bool)
    assert variance_loss(gaussian(1, 16).expand(100, 16), valid).item() == pytest.approx(0.99, abs=1e-4)
    assert variance_loss(2 * gaussian(100, 16), valid).item() == 0.0
    for count in (0, 1):
        assert variance_loss(gaussian(100, 16), torch.arange(100) < count).item() == 0.0


def test_variance_hinge_pushes_collapsed_vectors_apart() -> None:
    """Its gradient is finite at a near-collapsed cloud, and a step along it spreads the cloud."""
    states = (gaussian(1, 8) + 0.01 * gaussian(30, 8, seed=1)).requires_grad_()
    valid = torch.ones(30, dtype=torch.bool)
    variance_loss(states, valid).backward()
    assert states.grad.isfinite().all()
    moved = (states - states.grad).detach()
    assert moved.std(dim=0).mean() > states.std(dim=0).mean()


@few
@given(st.integers(2, 40), st.integers(1, 12), SEEDS)
def test_covariance_penalty_equals_the_formula_on_valid_vectors(n: int, d: int, seed: int) -> None:
    """Sum of squared off-diagonal entries of torch.cov over D; invalid vectors count nowhere."""
    states, valid = gaussian(n, d, seed=seed) @ gaussian(d, d, seed=seed + 1), some_valid(n, seed=seed)
    covariance = torch.cov(states[valid].double().T).reshape(d, d)
    expected = (covariance - torch.diag(covariance.diagonal())).square().sum() / d
    states[~valid] = float("nan")
    torch.testing.assert_close(covariance_loss(states, valid).double(), expected, atol=1e-3, rtol=1e-3)


def test_covariance_penalty_of_copied_and_independent_features() -> None:
    """Two equal features of unit variance cost 1; independent ones cost nothing; the gradient flows."""
    valid = torch.ones(4, dtype=torch.bool)
    x = torch.tensor([1.0, -1.0, 1.0, -1.0]) * math.sqrt(3 / 4)
    y = torch.tensor([1.0, 1.0, -1.0, -1.0]) * math.sqrt(3 / 4)
    assert covariance_loss(torch.stack([x, x], dim=1), valid).item() == pytest.approx(1.0, rel=1e-5)
    assert covariance_loss(torch.stack([x, y], dim=1), valid).item() == pytest.approx(0.0, abs=1e-6)
    states = gaussian(10, 4).requires_grad_()
    covariance_loss(states, torch.ones(10, dtype=torch.bool)).backward()
    assert states.grad.abs().sum() > 0


@pytest.mark.parametrize("statistic", [variance_loss, covariance_loss, sigreg])
def test_batch_statistics_read_any_leading_dimensions(statistic) -> None:
    """`[B, M, T, D]` with `[B, M, T]` validity is the flat list of its vectors; without a valid one it is 0."""
    states, valid = gaussian(2, 3, 5, 4).bfloat16(), some_valid(2, 3, 5)
    torch.manual_seed(0)
    nested = statistic(states, valid)
    torch.manual_seed(0)
    flat = statistic(states.reshape(30, 4)[valid.reshape(30)].float(), torch.ones(int(valid.sum()), dtype=torch.bool))
    assert nested.dtype == torch.float32
    torch.testing.assert_close(nested, flat)
    leaf = states.float().requires_grad_()
    nothing = statistic(leaf, torch.zeros_like(valid))
    assert nothing.item() == 0.0
    nothing.backward()
    assert (leaf.grad == 0).all()


def every(states: torch.Tensor) -> torch.Tensor:
    return torch.ones(states.shape[:-1], dtype=torch.bool)


# Sums over these vectors, or their products, exceed float16's largest number.
LARGE = {"std 5": 5 * gaussian(4096, 16), "many": 3 * gaussian(8_192, 8), "one feature of std 4": gaussian(5760, 16)}
LARGE["one feature of std 4"][:, 3] *= 4


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cloud", LARGE)
@pytest.mark.parametrize("statistic", [variance_loss, covariance_loss, sigreg])
def test_batch_statistics_of_half_precision_are_those_of_float32(
    statistic: Callable[..., torch.Tensor], cloud: str, half: torch.dtype
) -> None:
    """Value and gradient of the same numbers, widened first, without autocast; they are finite."""
    actual = []
    for dtype in (half, torch.float32):
        states = LARGE[cloud].to(half).to(dtype).requires_grad_()
        torch.manual_seed(0)
        with torch.autocast("cpu", half, enabled=dtype == half):
            value = statistic(states, every(states))
        value.backward()
        actual.append((value.detach(), states.grad.float()))
    (value, gradient), (expected, expected_gradient) = actual
    assert value.isfinite()
    assert gradient.isfinite().all()
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, expected_gradient.to(half).float(), rtol=1e-2, atol=1e-7)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_autocast_changes_no_loss_of_a_batch(half: torch.dtype) -> None:
    """Values and gradients to 1e-6 of the largest: InfoNCE, covariance, variance, SIGReg and standardisation."""
    own = torch.arange(40)
    losses: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "infonce": lambda x: infonce(x[:40], x[40:], own, 0.05).mean(),
        "covariance": lambda x: covariance_loss(x, every(x)),
        "variance": lambda x: variance_loss(0.5 * x, every(x)),
        "sigreg": lambda x: sigreg(x, every(x), directions=gaussian(16, 8)),
        "standardised": lambda x: standardize_features(x).abs().mean(),
        **{kind: lambda x, kind=kind: prediction_loss(kind, x[:40], x[40:]).mean() for kind in ("cosine", "smooth_l1")},
    }
    for name, loss in losses.items():
        actual = []
        for enabled in (True, False):
            x = gaussian(80, 16).requires_grad_()
            with torch.autocast("cpu", half, enabled=enabled):
                value = loss(x)
            value.backward()
            actual.append((value.detach(), x.grad))
        (value, gradient), (expected, expected_gradient) = actual
        assert value.dtype == torch.float32, name
        assert (value - expected).abs() <= 1e-6 * expected.abs(), name
        assert (gradient - expected_gradient).abs().max() <= 1e-6 * expected_gradient.abs().max(), name


def test_vectors_of_half_precision_are_standardised_in_float32() -> None:
    """The sum of 20,000 numbers around 5 exceeds float16."""
    vectors = (5 + gaussian(20_000, 3)).half()
    actual = standardize_features(vectors)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, standardize_features(vectors.float()))


def dense_sigreg(states: torch.Tensor, directions: torch.Tensor, num_points: int) -> torch.Tensor:
    """The whole integral over [−3, 3] at once, with complex exponentials and torch's trapezoidal rule."""
    directions = directions.double() / directions.double().norm(dim=0)
    t = torch.linspace(-3, 3, 2 * num_points - 1, dtype=torch.float64)
    projected = states.double() @ directions
    empirical = torch.exp(1j * projected[:, :, None] * t).mean(dim=0)
    gaussian_weight = torch.exp(-0.5 * t**2)
    error = (empirical - gaussian_weight).abs() ** 2 * gaussian_weight
    return len(states) * torch.trapezoid(error, t, dim=-1).mean()


@few
@given(st.integers(1, 40), st.integers(1, 10), st.integers(1, 16), st.integers(2, 20), SEEDS)
def test_sigreg_equals_a_dense_implementation(n: int, d: int, slices: int, points: int, seed: int) -> None:
    """With the same directions it is N times the trapezoidal integral of the weighted squared distance over [−3, 3]."""
    states, valid = 1.5 * gaussian(n, d, seed=seed) + 0.2, some_valid(max(n, 2), seed=seed)[:n]
    spoiled = torch.where(valid.unsqueeze(-1), states, torch.tensor(float("nan")))
    value = sigreg(spoiled, valid, directions=gaussian(d, slices, seed=seed), num_points=points)
    directions = gaussian(d, slices, seed=seed)
    expected = dense_sigreg(states[valid], directions, points)
    torch.testing.assert_close(value.double(), expected, atol=1e-4, rtol=1e-4)


def test_sigreg_separates_a_gaussian_from_other_distributions() -> None:
    """Small for N(0, I); many times larger for a scaled, moved, flat or collapsed cloud of the same size."""
    cloud = gaussian(500, 16)

    def value(states: torch.Tensor) -> float:
        return sigreg(states, every(states), directions=gaussian(16, 32, seed=1)).item()

    healthy = value(cloud)
    assert 0 < healthy < 2
    flat = cloud.clone()
    flat[:, 8:] = 0
    for sick in (2 * cloud, 0.5 * cloud, cloud + 0.5, flat, cloud[:1].expand_as(cloud), torch.zeros_like(cloud)):
        assert value(sick) > 10 * healthy


def test_sigreg_gradient_leads_towards_the_gaussian() -> None:
    """Gradient descent on a collapsed, shifted cloud brings its mean to 0 and its standard deviation to 1."""
    states = (0.3 * gaussian(100, 4) + 0.5).requires_grad_()
    optimizer = torch.optim.Adam([states], lr=0.05)
    for step in range(60):
        optimizer.zero_grad()
        sigreg(states, every(states), directions=gaussian(4, 8, seed=step)).backward()
        optimizer.step()
    assert states.mean(dim=0).abs().max() < 0.15
    assert (states.std(dim=0) - 1).abs().max() < 0.2


def test_sigreg_counts_samples_and_not_tokens() -> None:
    """The paper's N · (integral) for N samples of one vector each, and for the same samples with four tokens each."""
    states, directions = 1.5 * gaussian(30, 6) + 0.2, gaussian(6, 12, seed=1)
    expected = dense_sigreg(states, directions, 17)
    assert expected > 1
    tokens = states[:, None].expand(30, 4, 6)
    for cloud, samples in ((states, None), (states, torch.tensor(30)), (tokens, torch.tensor(30))):
        value = sigreg(cloud, every(cloud), samples, directions)
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)


def test_sigreg_grows_with_the_samples() -> None:
    """A hundred times the samples of the same cloud give about a hundred times the value; not so of a Gaussian one."""
    directions = gaussian(8, 64, seed=1)
    small, large = (
        sigreg(cloud, every(cloud), directions=directions) for cloud in (2 * gaussian(50, 8), 2 * gaussian(5000, 8))
    )
    assert 80 < large / small < 120
    small, large = (
        sigreg(cloud, every(cloud), directions=directions) for cloud in (gaussian(50, 8), gaussian(5000, 8))
    )
    assert 0.5 < large / small < 2


def test_sigreg_draws_new_directions_in_each_call() -> None:
    """Unless they are given: `fixed_directions` are the same ones, and take nothing from the global generator."""
    states = 2 * gaussian(30, 6)
    one, other = (sigreg(states, every(states)).item() for _ in range(2))
    assert one != other
    state = torch.random.get_rng_state()
    one, other = (sigreg(states, every(states), directions=fixed_directions(6, states.device)).item() for _ in range(2))
    assert one == other
    assert torch.equal(torch.random.get_rng_state(), state)


def test_batch_standardised_features_have_mean_0_and_deviation_1() -> None:
    """And a feature that is the same everywhere says nothing."""
    vectors = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 7) + 3
    vectors[:, 2] = 7.0
    actual = standardize_features(vectors)
    assert actual.mean(dim=0).abs().max() < 1e-5
    expected = torch.ones(6).index_fill(0, torch.tensor(2), 0.0)
    torch.testing.assert_close(actual.std(dim=0, correction=0), expected, atol=1e-4, rtol=0)
