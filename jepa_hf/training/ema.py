"""The exponential moving average that moves the target encoder: schedule and update."""

import math
from collections.abc import Iterable, Sequence

import torch

from ..distributed.sharding import placement, plain_name, shard, whole_shape
from ..errors import UsageError

MIN_DECAY, MAX_DECAY = 0.9, 0.99999


def default_decay_range(max_steps: int, pretrained: bool) -> tuple[float, float]:
    """First and last decay of a run of `max_steps` updates, where none is given.

    The averaging horizon 1 / (1 − decay) grows from 0.05 to 0.5 of the run from a random start, and from 0.67 to 6.7
    runs from a pretrained encoder, whose target should stay close to where it began. Clipped to [0.9, 0.99999].

    >>> default_decay_range(2000, pretrained=False)
    (0.99, 0.999)
    """
    first, last = (0.67, 6.7) if pretrained else (0.05, 0.5)
    return _clip(1.0 - 1.0 / max(first * max_steps, 1.0)), _clip(1.0 - 1.0 / max(last * max_steps, 1.0))


def _clip(decay: float) -> float:
    return min(max(decay, MIN_DECAY), MAX_DECAY)


def decay_at(step: int, max_steps: int, first: float, last: float, schedule: str = "linear") -> float:
    """Decay of update number `step`, a pure function: nothing has to be saved for an exact resume.

    Args:
        step: number of the update, 1 to `max_steps`.
        max_steps: length of the run in updates.
        first: decay of the first update.
        last: decay of the last one.
        schedule: "constant" (`first` throughout), "linear" (I-JEPA) or "cosine" (BYOL).

    Raises:
        ValueError: an unknown schedule.

    >>> [decay_at(step, 3, 0.9, 1.0) for step in (1, 2, 3)]
    [0.9, 0.95, 1.0]
    """
    progress = min(max((step - 1) / max(max_steps - 1, 1), 0.0), 1.0)
    if schedule == "constant":
        return first
    if schedule == "linear":
        return first + (last - first) * progress
    if schedule == "cosine":
        return last - (last - first) * (math.cos(math.pi * progress) + 1.0) / 2.0
    raise ValueError(f"ema_schedule must be one of constant, linear, cosine, not {schedule!r}")


def start_share(max_steps: int, first: float, last: float, schedule: str = "linear") -> float:
    """How much of its start the target encoder still is after a run: the product of all decays.

    Above 1/e the averaging horizon is longer than the run.

    >>> round(start_share(1000, 0.999, 0.999), 2)
    0.37
    """
    return math.prod(decay_at(step, max_steps, first, last, schedule) for step in range(1, max_steps + 1))


def match_parameters(
    context: Iterable[tuple[str, torch.Tensor]], target: Iterable[tuple[str, torch.Tensor]]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Pair the parameters of both encoders by name.

    Args:
        context: `named_parameters()` of the context encoder.
        target: `named_parameters()` of the target encoder.

    Returns:
        Two lists of equal length and order: context parameters, target parameters.

    Raises:
        ValueError: names, shapes or shards that differ.
        UsageError: a target in less than float32, which a small 1 − decay cannot move, or parameters of which DeepSpeed
            keeps a whole copy beside the shards, which would not follow them.
    """
    ours = {plain_name(name): parameter for name, parameter in context}
    theirs = {plain_name(name): parameter for name, parameter in target}
    if ours.keys() != theirs.keys():
        odd = sorted(ours.keys() ^ theirs.keys())
        raise ValueError(f"context and target encoder do not have the same parameters: {', '.join(odd[:3])}")
    for name, parameter in theirs.items():
        if whole_shape(parameter) != whole_shape(ours[name]):
            raise ValueError(
                f"parameter {name} has shape {tuple(whole_shape(ours[name]))} in the context encoder and "
                f"{tuple(whole_shape(parameter))} in the target encoder"
            )
        if parameter.is_floating_point() and torch.finfo(parameter.dtype).bits < 32:
            raise UsageError(
                f"parameter {name} of the target encoder is kept in {parameter.dtype}, in which an average with a "
                "decay of 0.999 does not move; load the model in float32 and use --bf16 for the computation, or with "
                "DeepSpeed, whose bf16 engine changes the weights, torch_autocast as in configs/accelerate/zero3.json"
            )
        if getattr(parameter, "ds_persist", False):
            raise UsageError(
                f"DeepSpeed keeps the whole of parameter {name} on every rank, where a moving average of shards does "
                'not reach it; set "stage3_param_persistence_threshold": 0, as in configs/accelerate/zero3.json'
            )
        if placement(parameter) != placement(ours[name]):
            raise ValueError(f"parameter {name} is sharded differently in the context and in the target encoder")
    return [ours[name] for name in theirs], list(theirs.values())


@torch.no_grad()
def update_target(context: Sequence[torch.Tensor], target: Sequence[torch.Tensor], decay: float) -> None:
    """target ← decay · target + (1 − decay) · context, in place, in a few fused kernels.

    Args:
        context: parameters of the context encoder.
        target: parameters of the target encoder in the same order (see `match_parameters`).
        decay: 0 copies, 1 keeps.
    """
    # Each rank averages its own shards: an average of elements needs no communication.
    torch._foreach_lerp_([shard(each) for each in target], [shard(each) for each in context], 1.0 - decay)


@torch.no_grad()
def relative_distance(context: Sequence[torch.Tensor], target: Sequence[torch.Tensor]) -> float:
    """‖context − target‖ / ‖context‖ over all parameters; 0 where the two encoders are the same.

    Where parameters are sharded every rank sums over its own shards, and the sums are added up over the ranks.

    Args:
        context: parameters of the context encoder.
        target: parameters of the target encoder in the same order (see `match_parameters`).
    """
    ours, theirs = [shard(each) for each in context], [shard(each) for each in target]
    norms = [torch.stack(torch._foreach_norm(parts)) for parts in (torch._foreach_sub(ours, theirs), ours)]
    squares = torch.stack(norms).square().sum(dim=1)
    if placement(context[0]) is not None:
        torch.distributed.all_reduce(squares)
    return (squares[0] / squares[1]).sqrt().item()
