"""Saving and loading of full state dicts under DeepSpeed's ZeRO, and its supported settings.

A checkpoint can be resumed in one process, under DDP, FSDP2 and every stage of ZeRO. DeepSpeed's
own format is not used. DeepSpeed's functions map parameters to shards
(https://deepspeed.readthedocs.io/en/latest/zero3.html, "Debugging").

All functions except `validate_deepspeed_config` and `zero3_init_disabled` must be called on all ranks. DeepSpeed is an
optional dependency, imported in the functions.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations import deepspeed

from ..errors import UsageError
from ..utils.counts import counted
from .fsdp_state import IncompatibleKeys, read_full_state_dict
from .sharding import unwrapped_parameter_name, zero3_shard

_OPTIMIZERS = ("adamw_torch_fused", "adamw_torch")
# AdamW's state of a parameter: its number of steps and its moments.
_STEP, _MOMENTS = "step", {"exp_avg", "exp_avg_sq"}
_EXAMPLE = "as in configs/accelerate/zero3.json"


def validate_deepspeed_config(config: Mapping[str, Any], optim: str) -> None:
    """Refuse settings under which a checkpoint would not be exact: DeepSpeed's, without "auto", and `--optim`.

    Raises:
        UsageError: a stage other than 1 to 3, an optimizer or scheduler of DeepSpeed, an optimizer
            other than AdamW, weights in half precision, states on NVMe or split once more, or
            states or weights that DeepSpeed does not return.
    """
    for is_refused, rule in _rules(config):
        if is_refused:
            raise UsageError(f"In DeepSpeed's configuration {rule}.")
    if optim not in _OPTIMIZERS:
        raise UsageError(f"Under DeepSpeed --optim must be {' or '.join(_OPTIMIZERS)}, not {optim}.")


def _rules(config: Mapping[str, Any]) -> list[tuple[bool, str]]:
    """Return rules on stage, optimizer, precision and saved states, with whether each is violated."""
    zero, autocast = config.get("zero_optimization", {}), config.get("torch_autocast", {})
    half = any(config.get(name, {}).get("enabled") for name in ("fp16", "bf16"))
    half |= bool(autocast.get("enabled")) and "b" not in str(autocast.get("dtype", "bfloat16"))
    offloads = [zero.get(name) or {} for name in ("offload_optimizer", "offload_param")]
    gathers = zero.get("stage3_gather_16bit_weights_on_model_save") is True
    return [
        (zero.get("stage") not in (1, 2, 3), '"stage" must be 1, 2 or 3; use configs/accelerate/ddp.yaml without ZeRO'),
        (
            "optimizer" in config or "scheduler" in config,
            f'"optimizer" and "scheduler" must be left out, {_EXAMPLE}; use --optim and --lr_scheduler_type',
        ),
        (
            half,
            '"fp16" and "bf16", which --fp16 and --bf16 enable, would save weights in half precision; use '
            f'"torch_autocast" with bfloat16, {_EXAMPLE}',
        ),
        (
            any(part.get("device", "none") not in ("none", "cpu") or part.get("ratio", 1) != 1 for part in offloads),
            '"offload_optimizer" and "offload_param" must have "device" "cpu" and "ratio" 1, because checkpoints '
            "would not contain states on other devices",
        ),
        (
            bool(zero.get("zenflow")) or any(part.get("super_offload") for part in offloads),
            '"zenflow" and "super_offload" must be left out, because checkpoints would not contain their states',
        ),
        (
            bool(zero.get("round_robin_gradients")),
            '"round_robin_gradients" must be left out, because DeepSpeed then returns states of other parameters',
        ),
        (
            zero.get("stage") == 3 and not gathers,
            f'"stage3_gather_16bit_weights_on_model_save" must be true, {_EXAMPLE}, to save the weights',
        ),
    ]


@contextmanager
def zero3_init_disabled() -> Iterator[None]:
    """Disable transformers' ZeRO-3 partitioned initialization while building a model.

    Copying the target encoder needs full weights, and partitioned construction is a collective
    operation. DeepSpeed shards the model when training starts.
    """
    configured = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = configured


class _ParameterPartition(NamedTuple):
    """Consecutive parameters of an optimizer group, and this rank's flat shard of them."""

    group: int
    parameters: list[nn.Parameter]
    flat: torch.Tensor


def _parameter_partitions(optimizer: Any) -> list[_ParameterPartition]:
    """Return the trained parameters in the order of one process's optimizer."""
    if _is_stage_3(optimizer):
        groups = optimizer.sub_group_to_group_id.values()
        parts = zip(groups, optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True)
    else:
        bit16_groups = optimizer.bit16_groups
        parts = zip(range(len(bit16_groups)), bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True)
    return [_ParameterPartition(*part) for part in parts]


def _is_stage_3(optimizer: Any) -> bool:
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    return isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3)


def _attach_optimizer_states(optimizer: Any) -> None:
    """Attach optimizer states to the parameters of ZeRO-1 and 2; ZeRO-3 does it itself.

    DeepSpeed does so in the first step of the first group, before the other groups have states.
    """
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    if not _is_stage_3(optimizer):
        for part in _parameter_partitions(optimizer):
            lazy_init_hp_params_optimizer_state(part.parameters, part.flat, optimizer.optimizer.state)


def load_full_state_dict(model: nn.Module, optimizer: Any, folder: str | Path) -> IncompatibleKeys:
    """Load full weights from the safetensors files in `folder` into a sharded model."""
    from deepspeed.runtime.zero import GatheredParameters

    state, keys = read_full_state_dict(model, folder)
    if keys.unexpected_keys:
        return keys
    parameters = {unwrapped_parameter_name(name): value for name, value in model.state_dict(keep_vars=True).items()}
    for name, value in state.items():
        with torch.no_grad(), GatheredParameters(parameters[name], modifier_rank=0):
            parameters[name].copy_(value)
    optimizer.refresh_fp32_params()
    return keys


@contextmanager
def gathered_trainable_parameters(model: nn.Module, optimizer: Any) -> Iterator[None]:
    """Gather the trainable parameters on all ranks to change them, then update the optimizer."""
    from deepspeed.runtime.zero import GatheredParameters

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with GatheredParameters(trainable, modifier_rank=0):
        yield
    optimizer.refresh_fp32_params()


def full_optimizer_state_dict(optimizer: Any, keep: bool) -> dict[str, Any]:
    """Return the state dict of one process's AdamW, on the CPU.

    Tensors are None on ranks with `keep` False, which only take part in the collectives.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    def full_state(parameter: nn.Parameter, name: str) -> torch.Tensor | None:
        value = safe_get_full_optimizer_state(parameter, name)
        return value.to("cpu", copy=True) if keep else None

    _attach_optimizer_states(optimizer)
    inner = optimizer.optimizer
    first_state: dict[str, Any] = next(iter(inner.state.values()), {})  # all have the same number of steps
    states: dict[int, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = [{**group, "params": []} for group in inner.param_groups]
    trained = [(part.group, parameter) for part in _parameter_partitions(optimizer) for parameter in part.parameters]
    for index, (group, parameter) in enumerate(trained):
        groups[group]["params"].append(index)
        if first_state:
            # One tensor per parameter, because AdamW increments each in place.
            states[index] = {_STEP: torch.tensor(float(first_state[_STEP]))}
            states[index] |= {name: full_state(parameter, name) for name in first_state if name != _STEP}
    return {"state": states, "param_groups": groups}


def load_full_optimizer_state_dict(optimizer: Any, state: dict[str, Any]) -> None:
    """Load a full optimizer state dict; shard it like the parameters.

    Raises:
        UsageError: see `optimizer_step_count`.
    """
    inner, parts, saved = optimizer.optimizer, _parameter_partitions(optimizer), state["state"]
    groups = range(len(inner.param_groups))
    steps = optimizer_step_count(
        state, [sum(len(part.parameters) for part in parts if part.group == group) for group in groups]
    )
    for group, saved_group in zip(inner.param_groups, state["param_groups"], strict=True):
        group.update({name: value for name, value in saved_group.items() if name != "params"})
    if not saved:
        return
    names = [name for name in next(iter(saved.values())) if name != _STEP]
    for part in parts:
        # DeepSpeed does this in the first step. Moments of a parameter without gradients stay 0.
        inner.state[part.flat] = {name: torch.zeros_like(part.flat) for name in names}
        inner.state[part.flat][_STEP] = _step_value(inner, part, steps)
    _attach_optimizer_states(optimizer)
    for index, parameter in enumerate(parameter for part in parts for parameter in part.parameters):
        for name, value in saved.get(index, {}).items():
            if name != _STEP:
                _set_state(parameter, value, name)


def _set_state(parameter: nn.Parameter, value: torch.Tensor, name: str) -> None:
    """Set this rank's shard of a state from the full tensor `value`."""
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    part = zero3_shard(parameter)
    if part is None:
        safe_set_full_optimizer_state(parameter, value, name)
        return
    # Under ZeRO-3 the function above fails if the number of elements is not a multiple of the ranks.
    zero_parameter: Any = parameter
    size = part.numel()
    first = size * torch.distributed.get_rank(zero_parameter.ds_process_group)
    local_slice = value.flatten()[first : first + size]
    safe_set_local_optimizer_state(parameter, F.pad(local_slice, (0, size - len(local_slice))), name)


def optimizer_step_count(state: dict[str, Any], sizes: list[int]) -> float:
    """Return the number of steps in an optimizer's state, 0 if it is empty.

    Raises:
        UsageError: the state has other groups, is of another optimizer, or has parameters with
            different numbers of steps; DeepSpeed has one count for all.
    """
    if sizes != [len(group["params"]) for group in state["param_groups"]]:
        raise UsageError("The checkpoint to resume from has optimizer states of other parameters. Start a new run.")
    states = state["state"].values()
    if any(not parameter_state.keys() >= {_STEP, *_MOMENTS} for parameter_state in states):
        raise UsageError("The checkpoint to resume from was written with another --optim than AdamW. Start a new run.")
    steps = {float(parameter_state[_STEP]) for parameter_state in states} or {0.0}
    if len(steps) > 1:
        raise UsageError(
            f"The checkpoint to resume from has parameters with {counted(int(min(steps)), 'step')} and others with "
            f"{max(steps):.0f}, but DeepSpeed has one count for all. Resume without DeepSpeed."
        )
    return steps.pop()


def _step_value(inner: torch.optim.Optimizer, part: _ParameterPartition, steps: float) -> torch.Tensor | int:
    """Return the number of steps in the optimizer's own type."""
    if not isinstance(inner, torch.optim.AdamW):
        return int(steps)  # DeepSpeedCPUAdam, which accelerate uses with offloaded states
    group = inner.param_groups[part.group]
    return torch.tensor(steps, device=part.flat.device if group["fused"] or group["capturable"] else "cpu")
