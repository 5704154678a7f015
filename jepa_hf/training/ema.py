"""Exponential moving average of the context encoder: decay schedule and update."""

import math
from collections.abc import Iterable, Sequence

import torch

from ..distributed.sharding import global_shape, local_shard, sharding_key, unwrapped_parameter_name
from ..errors import UsageError
from . import upstream

MIN_DECAY, MAX_DECAY = 0.9, 0.99999


def default_decay_range(max_steps: int, pretrained: bool) -> tuple[float, float]:
    """Return the default first and last decay of a run, clipped to [0.9, 0.99999].

    The averaging horizon 1 / (1 − decay) grows from 0.05 to 0.5 of the run for random weights. For a pretrained
    encoder, whose target should stay close to its start, it grows from 0.67 to 6.7 runs.

    >>> default_decay_range(2000, pretrained=False)
    (0.99, 0.999)
    """
    first, last = (0.67, 6.7) if pretrained else (0.05, 0.5)
    return _clip(1.0 - 1.0 / max(first * max_steps, 1.0)), _clip(1.0 - 1.0 / max(last * max_steps, 1.0))


def _clip(decay: float) -> float:
    return min(max(decay, MIN_DECAY), MAX_DECAY)


def interpolate_schedule(step: int, max_steps: int, first: float, last: float, schedule: str = "linear") -> float:
    """Return the decay of update number `step`: an exact resume needs no saved state.

    Args:
        step: Number of the update, 1 to `max_steps`.
        max_steps: Length of the run in updates.
        first: Decay of the first update.
        last: Decay of the last update.
        schedule: "constant" (always `first`), "linear" (I-JEPA) or "cosine" (BYOL).

    Raises:
        ValueError: Unknown schedule.

    >>> [interpolate_schedule(step, 3, 0.9, 1.0) for step in (1, 2, 3)]
    [0.9, 0.95, 1.0]
    """
    progress = min(max((step - 1) / max(max_steps - 1, 1), 0.0), 1.0)
    if schedule == "constant":
        return first
    if schedule == "linear":
        return first + (last - first) * progress
    if schedule == "cosine":
        return last - (last - first) * (math.cos(math.pi * progress) + 1.0) / 2.0
    raise ValueError(f"Expected ema_schedule to be one of constant, linear, cosine, got {schedule!r}.")


def initial_weight_fraction(max_steps: int, first: float, last: float, schedule: str = "linear") -> float:
    """Return the share of initial weights in the final target: the product of all decays.

    Above 1/e the averaging horizon is longer than the run.

    >>> round(initial_weight_fraction(1000, 0.999, 0.999), 2)
    0.37
    """
    return math.prod(interpolate_schedule(step, max_steps, first, last, schedule) for step in range(1, max_steps + 1))


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
        ValueError: Names, shapes or shards differ.
        UsageError: A target in less than float32, which a small 1 − decay cannot move, or parameters of which DeepSpeed
            keeps a full copy in addition to the shards, which would not follow them.
    """
    context_params = {unwrapped_parameter_name(name): parameter for name, parameter in context}
    target_params = {unwrapped_parameter_name(name): parameter for name, parameter in target}
    mismatched = sorted(context_params.keys() ^ target_params.keys())
    if mismatched:
        raise ValueError(f"Context and target encoder do not have the same parameters: {', '.join(mismatched[:3])}.")
    for name, parameter in target_params.items():
        _check_pair(name, context_params[name], parameter)
    return [context_params[name] for name in target_params], list(target_params.values())


def _check_pair(name: str, context: torch.Tensor, target: torch.Tensor) -> None:
    """Raise if `target` cannot hold the average of `context`, see `match_parameters`."""
    if global_shape(target) != global_shape(context):
        raise ValueError(
            f"Parameter {name} has shape {tuple(global_shape(context))} in the context encoder and "
            f"{tuple(global_shape(target))} in the target encoder."
        )
    if target.is_floating_point() and torch.finfo(target.dtype).bits < 32:
        raise UsageError(
            f"Parameter {name} of the target encoder is kept in {target.dtype}, in which an average with a decay of "
            "0.999 does not move. Load the model in float32 and use --bf16 for the computation, or with DeepSpeed, "
            "whose bf16 engine changes the weights, torch_autocast as in configs/accelerate/zero3.json."
        )
    if getattr(target, "ds_persist", False):
        raise UsageError(
            f"DeepSpeed keeps a full copy of parameter {name} on every rank, which a moving average of shards does not "
            'reach. Set "stage3_param_persistence_threshold": 0, as in configs/accelerate/zero3.json.'
        )
    if sharding_key(target) != sharding_key(context):
        raise ValueError(f"Parameter {name} is sharded differently in the context and in the target encoder.")


@torch.no_grad()
def update_target(context: Sequence[torch.Tensor], target: Sequence[torch.Tensor], decay: float) -> None:
    """Set target ← decay · target + (1 − decay) · context, in place, in a few fused kernels."""
    # Each rank averages its own shards: an elementwise average needs no communication.
    upstream.lerp_([local_shard(param) for param in target], [local_shard(param) for param in context], 1.0 - decay)


@torch.no_grad()
def relative_parameter_distance(context: Sequence[torch.Tensor], target: Sequence[torch.Tensor]) -> float:
    """Return ‖context − target‖ / ‖context‖ over all parameters; 0 if both encoders are the same.

    Each rank sums over its own shards, and the sums are reduced over ranks.
    """
    context_shards, target_shards = [local_shard(param) for param in context], [local_shard(param) for param in target]
    difference = upstream.differences(context_shards, target_shards)
    squares = torch.stack([upstream.norms(difference), upstream.norms(context_shards)]).square().sum(dim=1)
    if sharding_key(context[0]) is not None:
        torch.distributed.all_reduce(squares)
    return (squares[0] / squares[1]).sqrt().item()
