"""Pair and path losses equal their closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from jepa_hf.llm_jepa.losses import pair_distance, sample_ordered_triples, stp_distance, stp_patch_distance
from jepa_hf.models.contrastive import infonce


def vectors(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["cosine", "l2", "mse"])
def test_distance_is_zero_and_symmetric(kind: str) -> None:
    """Each distance is 0 between equal vectors, and symmetric."""
    one, other = vectors(5, 8), vectors(5, 8, seed=1)
    assert pair_distance(kind, one, one).abs().max() < 1e-6
    torch.testing.assert_close(pair_distance(kind, one, other), pair_distance(kind, other, one))
    assert (pair_distance(kind, one, other) > 0).all()


def test_closed_forms() -> None:
    """The distances equal hand-computed values; another kind is refused."""
    one, other = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    assert pair_distance("cosine", one, other).item() == pytest.approx(1.0)
    assert pair_distance("l2", one, other).item() == pytest.approx(5.0)
    assert pair_distance("mse", one, other).item() == pytest.approx(12.5)
    with pytest.raises(ValueError, match="cosine, l2 or mse"):
        pair_distance("infonce", one, other)


def test_distance_is_float32() -> None:
    """Half-precision inputs are computed in float32."""
    one, other = vectors(4, 64), vectors(4, 64, seed=1)
    for kind in ("cosine", "l2", "mse"):
        assert pair_distance(kind, one.bfloat16(), other.bfloat16()).dtype == torch.float32


def test_infonce_is_cross_entropy() -> None:
    """InfoNCE is the cross-entropy over all candidates, other ranks' first; log C if all are equal."""
    predictions, targets, foreign = vectors(3, 8), vectors(3, 8, seed=1), vectors(2, 8, seed=2)
    candidates, own = torch.cat([foreign, targets]), torch.arange(3) + 2
    cosines = torch.stack([torch.stack([F.cosine_similarity(p, c, dim=0) for c in candidates]) for p in predictions])
    expected = -torch.stack([F.log_softmax(row / 0.07, dim=0)[at] for row, at in zip(cosines, own, strict=True)])
    torch.testing.assert_close(infonce(predictions, candidates, own, 0.07), expected)
    same = torch.ones(5, 8)
    assert infonce(same[:3], same, own, 0.07) == pytest.approx([math.log(5)] * 3)


@given(st.integers(3, 9), st.integers(0, 5), st.integers(0, 1000))
def test_triples_are_distinct_and_in_bounds(length: int, first: int, seed: int) -> None:
    """The three positions differ, ascend and lie within the bounds."""
    uniform = torch.rand(50, 3, generator=torch.Generator().manual_seed(seed))
    begin = torch.full((50,), first)
    triples = sample_ordered_triples(begin, begin + length - 1, uniform)
    assert (triples[:, 0] < triples[:, 1]).all()
    assert (triples[:, 1] < triples[:, 2]).all()
    assert triples.min() >= first
    assert triples.max() <= first + length - 1


def test_triples_are_uniform() -> None:
    """Chi-square over the 20 triples of 6 positions is below the 99.9 % quantile at 19 degrees of freedom."""
    count = 40_000
    uniform = torch.rand(count, 3, generator=torch.Generator().manual_seed(0))
    triples = sample_ordered_triples(torch.zeros(count, dtype=torch.long), torch.full((count,), 5), uniform)
    _, counts = torch.unique(triples, dim=0, return_counts=True)
    assert len(counts) == 20
    assert ((counts - count / 20) ** 2 / (count / 20)).sum() < 43.8


def test_tube_distance_of_straight_and_reversed_paths() -> None:
    """A straight path has distance 0, a reversed one 2."""
    straight = torch.arange(6.0)[None, :, None] * vectors(1, 1, 4)
    assert stp_distance(straight, torch.tensor([[0, 2, 5]])).item() == pytest.approx(0.0, abs=1e-6)
    assert stp_patch_distance(straight, torch.tensor([[0, 1, 3, 5]])).item() == pytest.approx(0.0, abs=1e-6)
    back = torch.tensor([[[0.0], [1.0], [0.0]]])
    assert stp_distance(back, torch.tensor([[0, 1, 2]])).item() == pytest.approx(2.0)


def test_patch_distance_formula() -> None:
    """The patch form compares the change over a patch with the change around it."""
    states = vectors(1, 7, 5)
    h = states[0]
    expected = 1 - F.cosine_similarity(h[4] - h[2], (h[2] - h[1]) + (h[6] - h[4]), dim=0)
    torch.testing.assert_close(stp_patch_distance(states, torch.tensor([[1, 2, 4, 6]]))[0], expected)
