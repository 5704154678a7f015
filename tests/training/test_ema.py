"""Claims about the exponential moving average."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from jepa_hf.distributed.sharding import unwrapped_parameter_name
from jepa_hf.errors import UsageError
from jepa_hf.training.ema import (
    default_decay_range,
    initial_weight_fraction,
    interpolate_schedule,
    match_parameters,
    relative_parameter_distance,
    update_target,
)

few = settings(max_examples=60, deadline=None)


def tensors(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in ((3, 4), (5,), ())]


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
def test_target_follows_the_closed_form(decay: float) -> None:
    """After N updates towards a constant c the target is d^N t + (1 − d^N) c, and c has not moved."""
    context, start, target = tensors(0), tensors(1), tensors(1)
    for _ in range(50):
        update_target(context, target, decay)
    for c, t, moved in zip(context, start, target, strict=True):
        torch.testing.assert_close(moved, decay**50 * t + (1 - decay**50) * c, rtol=1e-5, atol=1e-6)
    for c, original in zip(context, tensors(0), strict=True):
        assert torch.equal(c, original)


def test_decay_zero_copies_and_one_keeps() -> None:
    """The ends of the range are exact."""
    context, target = tensors(0), tensors(1)
    update_target(context, target, 1.0)
    assert all(torch.equal(t, before) for t, before in zip(target, tensors(1), strict=True))
    update_target(context, target, 0.0)
    assert all(torch.equal(t, c) for t, c in zip(target, context, strict=True))


@pytest.mark.parametrize("frozen", [True, False])
def test_update_is_in_place_and_leaves_no_graph(frozen: bool) -> None:
    """Trainable context, frozen target or not (as after `from_pretrained`): the same storage moves, without a graph."""
    context, target = nn.Linear(3, 3), nn.Linear(3, 3).requires_grad_(not frozen)
    places = [parameter.data_ptr() for parameter in target.parameters()]
    update_target(list(context.parameters()), list(target.parameters()), 0.5)
    assert [parameter.data_ptr() for parameter in target.parameters()] == places
    for parameter in target.parameters():
        assert parameter.requires_grad is not frozen
        assert parameter.grad_fn is None


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_decay_starts_at_the_first_value_and_rises_to_the_last(schedule: str) -> None:
    """Update 1 has the first decay, update `max_steps` the last (constant: the first), and it never falls between."""
    values = [interpolate_schedule(step, 101, 0.99, 0.9999, schedule) for step in range(1, 102)]
    assert values[0] == pytest.approx(0.99, abs=1e-12)
    assert values[-1] == pytest.approx(0.99 if schedule == "constant" else 0.9999, abs=1e-12)
    assert values == sorted(values)
    if schedule != "constant":
        assert len(set(values)) == len(values)
        assert values[50] == pytest.approx((0.99 + 0.9999) / 2, abs=1e-12)  # both are half-way at half time


def test_cosine_is_slow_at_both_ends_and_linear_is_not() -> None:
    """At a quarter of the run linear has covered 1/4 of the way and cosine (1 − cos(π/4)) / 2."""
    assert interpolate_schedule(26, 101, 0.0, 1.0, "linear") == pytest.approx(0.25)
    assert interpolate_schedule(26, 101, 0.0, 1.0, "cosine") == pytest.approx((1 - math.cos(math.pi / 4)) / 2)
    assert interpolate_schedule(76, 101, 0.0, 1.0, "cosine") == pytest.approx((1 + math.cos(math.pi / 4)) / 2)


@few
@given(st.integers(-10, 10**7), st.integers(0, 10**6), st.sampled_from(("constant", "linear", "cosine")))
def test_steps_outside_the_run_are_clamped(step: int, max_steps: int, schedule: str) -> None:
    """Any step gives a decay between first and last; before the run it is the first, after it the last."""
    value = interpolate_schedule(step, max_steps, 0.9, 0.999, schedule)
    assert 0.9 - 1e-12 <= value <= 0.999 + 1e-12
    if step <= 1 or schedule == "constant":
        assert value == pytest.approx(0.9)
    elif step >= max_steps > 1:
        assert value == pytest.approx(0.999)


def test_an_unknown_schedule_is_refused() -> None:
    """ValueError that lists the known ones."""
    with pytest.raises(ValueError, match=r"constant, linear, cosine, got 'exponential'"):
        interpolate_schedule(1, 10, 0.9, 0.99, "exponential")


def test_default_range_of_the_measured_run() -> None:
    """2,000 steps from a random start, which trained well from 0.99 to 0.999, get just that."""
    assert default_decay_range(2000, False) == pytest.approx((0.99, 0.999), abs=1e-12)


@few
@given(st.integers(1, 10**7))
def test_default_range_is_bounded_ordered_and_slower_when_pretrained(max_steps: int) -> None:
    """0.9 ≤ first ≤ last ≤ 0.99999 for every length, and a pretrained target moves no faster than a random one."""
    random, pretrained = default_decay_range(max_steps, False), default_decay_range(max_steps, True)
    for first, last in (random, pretrained):
        assert 0.9 <= first <= last <= 0.99999
    assert pretrained[0] >= random[0]
    assert pretrained[1] >= random[1]
    if 300 <= max_steps <= 10_000:
        assert pretrained[0] > random[0]
        assert pretrained[1] > random[1]


@few
@given(st.integers(300, 14_000))
def test_default_horizons_are_shares_of_the_run(max_steps: int) -> None:
    """Where nothing is clipped, 1 / (1 − decay) is 0.05 and 0.5 of the run, 0.67 and 6.7 of it when pretrained."""
    first, last = default_decay_range(max_steps, False)
    assert 1 / (1 - first) == pytest.approx(0.05 * max_steps)
    assert 1 / (1 - last) == pytest.approx(0.5 * max_steps)
    first, last = default_decay_range(max_steps, True)
    assert 1 / (1 - first) == pytest.approx(0.67 * max_steps)
    assert 1 / (1 - last) == pytest.approx(6.7 * max_steps)


@pytest.mark.parametrize(
    ("wrapped", "plain"),
    [
        ("layer.weight", "layer.weight"),
        ("_orig_mod.layer.weight", "layer.weight"),
        ("module._orig_mod.layer.weight", "layer.weight"),
        ("encoder._fsdp_wrapped_module.layer.0._checkpoint_wrapped_module.weight", "encoder.layer.0.weight"),
        ("submodule.weight", "submodule.weight"),
        ("modules.0.weight", "modules.0.weight"),
    ],
)
def test_plain_name_removes_wrappers_and_nothing_else(wrapped: str, plain: str) -> None:
    """Whole components that a wrapper adds are taken out; names that merely end like one are left."""
    assert unwrapped_parameter_name(wrapped) == plain


def test_parameters_are_paired_by_name_through_wrappers() -> None:
    """A compiled, wrapped context encoder matches a bare target, whatever the order."""
    target = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    wrapped = [(f"module._orig_mod.{name}", parameter + 1) for name, parameter in target.named_parameters()]
    ours, theirs = match_parameters(reversed(wrapped), target.named_parameters())
    assert len(ours) == len(theirs) == 4
    for context, parameter, own in zip(ours, theirs, target.parameters(), strict=True):
        assert parameter is own
        assert torch.equal(context, own + 1)


def test_different_names_are_refused_by_name() -> None:
    """A parameter that only one encoder has is named, on whichever side it is."""
    weight = ("layer.weight", torch.ones(2))
    bias = ("layer.bias", torch.ones(2))
    for context, target in (([weight, bias], [weight]), ([weight], [weight, bias])):
        with pytest.raises(ValueError, match=r"layer\.bias"):
            match_parameters(context, target)


def test_different_shapes_are_refused_by_name() -> None:
    """The parameter and both shapes are named."""
    with pytest.raises(ValueError, match=r"layer\.weight .*\(2,\).*\(3,\)"):
        match_parameters([("layer.weight", torch.ones(2))], [("layer.weight", torch.ones(3))])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_target_in_half_precision_is_refused(dtype: torch.dtype) -> None:
    """The parameter and its dtype are named; float32 and float64 are accepted."""
    with pytest.raises(ValueError, match=rf"layer\.weight.*{dtype}.*--bf16"):
        match_parameters([("layer.weight", torch.ones(2))], [("layer.weight", torch.ones(2, dtype=dtype))])
    for accepted in (torch.float32, torch.float64):
        match_parameters([("w", torch.ones(2))], [("w", torch.ones(2, dtype=accepted))])


def test_a_full_copy_next_to_shards_is_refused() -> None:
    """DeepSpeed keeps small parameters whole on every rank (`ds_persist`): the sentence names one and the remedy."""
    kept = torch.ones(2)
    kept.ds_persist = True
    with pytest.raises(UsageError, match=r"layer\.weight.*stage3_param_persistence_threshold"):
        match_parameters([("layer.weight", torch.ones(2))], [("layer.weight", kept)])


def test_a_bfloat16_target_does_not_move_at_a_decay_of_0_999() -> None:
    """Why half precision is refused: 100 updates towards 1.5 leave 1.0 where it is in bfloat16, not in float32."""
    moved = {}
    for dtype in (torch.bfloat16, torch.float32):
        target = [torch.ones(4, dtype=dtype)]
        for _ in range(100):
            update_target([torch.full((4,), 1.5, dtype=dtype)], target, 0.999)
        moved[dtype] = target[0][0].item() - 1.0
    assert moved[torch.bfloat16] == 0.0
    assert moved[torch.float32] == pytest.approx(0.5 * (1 - 0.999**100), rel=1e-4)


# ---- how far apart the encoders are


@settings(max_examples=30, deadline=None)
@given(steps=st.integers(1, 40), first=st.floats(0.5, 1), last=st.floats(0.5, 1))
def test_the_share_of_the_start_is_what_repeated_updates_leave(steps: int, first: float, last: float) -> None:
    """A target of ones that averages zeros."""
    target, zeros = [torch.ones(1, dtype=torch.float64)], [torch.zeros(1, dtype=torch.float64)]
    for step in range(1, steps + 1):
        update_target(zeros, target, interpolate_schedule(step, steps, first, last))
    assert initial_weight_fraction(steps, first, last) == pytest.approx(target[0].item(), rel=1e-6)


def test_the_relative_distance_is_0_1_and_in_between() -> None:
    one = [torch.randn(3, 4), torch.randn(5)]
    assert relative_parameter_distance(one, one) == 0
    assert relative_parameter_distance(one, [torch.zeros(3, 4), torch.zeros(5)]) == pytest.approx(1)
    assert relative_parameter_distance(one, [1.25 * each for each in one]) == pytest.approx(0.25)
