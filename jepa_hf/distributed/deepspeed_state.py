"""DeepSpeed's ZeRO: what of it can be resumed, and its divided states, written and read as one process does.

So a checkpoint goes on in one process, under DDP, FSDP2 and every stage of ZeRO. DeepSpeed's own, which only DeepSpeed
reads, are not written. Which elements of a parameter this rank changes, DeepSpeed's functions know
(https://deepspeed.readthedocs.io/en/latest/zero3.html, "Debugging").

All functions but `check_config` and `whole_weights` are called by all ranks. DeepSpeed is imported where it runs,
because few have it.
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
from .fsdp_state import Keys, read_weights
from .sharding import plain_name, zero_part

_OPTIMIZERS = ("adamw_torch_fused", "adamw_torch")
# What AdamW keeps of a parameter: how many steps it was changed in, and averages of its elements.
_STEP, _MOMENTS = "step", {"exp_avg", "exp_avg_sq"}


def check_config(config: Mapping[str, Any], optim: str) -> None:
    """Refuse what a checkpoint would not hold exactly.

    Args:
        config: DeepSpeed's configuration, without "auto".
        optim: as `TrainingArguments` has it.

    Raises:
        UsageError: a stage other than 1 to 3, an optimizer or scheduler of DeepSpeed's, an optimizer other than AdamW,
            weights in half precision, states on NVMe or divided once more, or states or weights that DeepSpeed does not
            give out.
    """
    zero, autocast = config.get("zero_optimization", {}), config.get("torch_autocast", {})
    offloads = [zero.get(name) or {} for name in ("offload_optimizer", "offload_param")]
    whole_gathered = zero.get("stage3_gather_16bit_weights_on_model_save")
    half = any(config.get(name, {}).get("enabled") for name in ("fp16", "bf16"))
    half |= bool(autocast.get("enabled")) and "b" not in str(autocast.get("dtype", "bfloat16"))
    shipped = "as in configs/accelerate/zero3.json"
    refused = [
        (zero.get("stage") not in (1, 2, 3), '"stage" must be 1, 2 or 3; configs/accelerate/ddp.yaml divides nothing'),
        (
            "optimizer" in config or "scheduler" in config,
            f'"optimizer" and "scheduler" must be left out, {shipped}: --optim and --lr_scheduler_type name them',
        ),
        (
            half,
            '"fp16" and "bf16", which --fp16 and --bf16 enable, leave checkpoints weights in half precision; take '
            f'"torch_autocast" with bfloat16, {shipped}',
        ),
        (
            any(each.get("device", "none") not in ("none", "cpu") or each.get("ratio", 1) != 1 for each in offloads),
            '"offload_optimizer" and "offload_param" must have "device" "cpu" and "ratio" 1, because checkpoints would '
            "not hold states that lie elsewhere",
        ),
        (
            bool(zero.get("zenflow")) or any(each.get("super_offload") for each in offloads),
            '"zenflow" and "super_offload" must be left out, because checkpoints would not hold their states',
        ),
        (
            bool(zero.get("round_robin_gradients")),
            '"round_robin_gradients" must be left out, because DeepSpeed then gives out states of other parameters',
        ),
        (
            zero.get("stage") == 3 and whole_gathered is not True,
            f'"stage3_gather_16bit_weights_on_model_save" must be true, {shipped}, for checkpoints to hold the weights',
        ),
    ]
    for found, sentence in refused:
        if found:
            raise UsageError(f"in DeepSpeed's configuration {sentence}")
    if optim not in _OPTIMIZERS:
        raise UsageError(f"under DeepSpeed --optim must be {' or '.join(_OPTIMIZERS)}, not {optim}")


@contextmanager
def whole_weights() -> Iterator[None]:
    """Have transformers build models whole, also under DeepSpeed's ZeRO-3, which divides them once training begins.

    It would divide them at once, and neither can a target encoder be copied from a part, nor may one rank alone build a
    divided model.
    """
    configured = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = configured


class _Part(NamedTuple):
    """Parameters that follow each other in one of the optimizer's groups, and what this rank changes of them."""

    group: int
    parameters: list[nn.Parameter]
    flat: torch.Tensor


def _parts(optimizer: Any) -> list[_Part]:
    """All that is trained, in the order of one process's optimizer."""
    if _is_stage_3(optimizer):
        numbers = optimizer.sub_group_to_group_id.values()
        parts = zip(numbers, optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True)
    else:
        groups = optimizer.bit16_groups
        parts = zip(range(len(groups)), groups, optimizer.single_partition_of_fp32_groups, strict=True)
    return [_Part(*part) for part in parts]


def _is_stage_3(optimizer: Any) -> bool:
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    return isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3)


def _link(optimizer: Any) -> None:
    """Let the parameters of ZeRO-1 and 2 know where their states are; those of ZeRO-3 always do.

    DeepSpeed does so in the first step of the first group, when the others have no states yet.
    """
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    if not _is_stage_3(optimizer):
        for part in _parts(optimizer):
            lazy_init_hp_params_optimizer_state(part.parameters, part.flat, optimizer.optimizer.state)


def load_weights(model: nn.Module, optimizer: Any, folder: str | Path) -> Keys:
    """Read a model's weights from the safetensors files in `folder`, which hold them whole.

    Args:
        model: the engine's module.
        optimizer: the engine's, whose copies of the weights follow.
        folder: as `divided.load_weights` takes it.

    Returns:
        As `divided.load_weights` does.
    """
    from deepspeed.runtime.zero import GatheredParameters

    state, keys = read_weights(model, folder)
    if keys.unexpected_keys:
        return keys
    ours = {plain_name(name): value for name, value in model.state_dict(keep_vars=True).items()}
    for name, value in state.items():
        with torch.no_grad(), GatheredParameters(ours[name], modifier_rank=0):
            ours[name].copy_(value)
    optimizer.refresh_fp32_params()
    return keys


@contextmanager
def whole_trained(model: nn.Module, optimizer: Any) -> Iterator[None]:
    """Within it what is trained is whole on all ranks, which may change it; the engine's `optimizer` follows."""
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([each for each in model.parameters() if each.requires_grad], modifier_rank=0):
        yield
    optimizer.refresh_fp32_params()


def whole_optimizer_state(optimizer: Any, keep: bool) -> dict[str, Any]:
    """What one process's `AdamW.state_dict()` gives, in the CPU's memory.

    Args:
        optimizer: the engine's.
        keep: False on ranks that only contribute; their tensors are None.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    def whole(parameter: nn.Parameter, name: str) -> torch.Tensor | None:
        value = safe_get_full_optimizer_state(parameter, name)
        return value.to("cpu", copy=True) if keep else None

    _link(optimizer)
    inner = optimizer.optimizer
    kept = next(iter(inner.state.values()), {})  # all have made the same steps
    states: dict[int, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = [{**group, "params": []} for group in inner.param_groups]
    trained = [(part.group, parameter) for part in _parts(optimizer) for parameter in part.parameters]
    for number, (group, parameter) in enumerate(trained):
        groups[group]["params"].append(number)
        if kept:
            # A count for each: in one process every parameter counts its own up.
            states[number] = {_STEP: torch.tensor(float(kept[_STEP]))}
            states[number] |= {name: whole(parameter, name) for name in kept if name != _STEP}
    return {"state": states, "param_groups": groups}


def load_optimizer_state(optimizer: Any, state: dict[str, Any]) -> None:
    """Load what `whole_optimizer_state` or one process's AdamW gave, divided as the parameters are.

    Args:
        optimizer: the engine's.
        state: whole, the same on all ranks.

    Raises:
        UsageError: see `steps_of`.
    """
    inner, parts, saved = optimizer.optimizer, _parts(optimizer), state["state"]
    groups = range(len(inner.param_groups))
    steps = steps_of(state, [sum(len(part.parameters) for part in parts if part.group == each) for each in groups])
    for group, theirs in zip(inner.param_groups, state["param_groups"], strict=True):
        group.update({name: value for name, value in theirs.items() if name != "params"})
    if not saved:
        return
    names = [name for name in next(iter(saved.values())) if name != _STEP]
    for part in parts:
        # What DeepSpeed leaves to the first step. A parameter that never had a gradient keeps moments of 0.
        inner.state[part.flat] = {name: torch.zeros_like(part.flat) for name in names}
        inner.state[part.flat][_STEP] = _counted(inner, part, steps)
    _link(optimizer)
    for number, parameter in enumerate(parameter for part in parts for parameter in part.parameters):
        for name, value in saved.get(number, {}).items():
            if name != _STEP:
                _set_state(parameter, value, name)


def _set_state(parameter: nn.Parameter, value: torch.Tensor, name: str) -> None:
    """Let this rank have its elements of the whole tensor `value`."""
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    if zero_part(parameter) is None:
        safe_set_full_optimizer_state(parameter, value, name)
        return
    # Of ZeRO-3 the function above fails where a parameter's elements do not divide evenly.
    size = zero_part(parameter).numel()
    first = size * torch.distributed.get_rank(parameter.ds_process_group)
    mine = value.flatten()[first : first + size]
    safe_set_local_optimizer_state(parameter, F.pad(mine, (0, size - len(mine))), name)


def steps_of(state: dict[str, Any], sizes: list[int]) -> float:
    """In how many steps the parameters were changed that an optimizer's state belongs to; 0 where there is none yet.

    Args:
        state: as AdamW's `state_dict()` gives it.
        sizes: of the groups of parameters that it is for.

    Raises:
        UsageError: it belongs to other groups or another optimizer, or its parameters were not all changed in the same
            steps, which DeepSpeed does not count one by one.
    """
    if sizes != [len(group["params"]) for group in state["param_groups"]]:
        raise UsageError("the checkpoint to resume from holds optimizer states of other parameters: start over")
    if any(not each.keys() >= {_STEP, *_MOMENTS} for each in state["state"].values()):
        raise UsageError("the checkpoint to resume from was written with another --optim than AdamW: start over")
    steps = {float(each[_STEP]) for each in state["state"].values()} or {0.0}
    if len(steps) > 1:
        raise UsageError(
            f"the checkpoint to resume from has parameters that were changed in {min(steps):.0f} steps and others in "
            f"{max(steps):.0f}, which DeepSpeed does not tell apart: resume without it"
        )
    return steps.pop()


def _counted(inner: torch.optim.Optimizer, part: _Part, steps: float) -> torch.Tensor | int:
    """The number of steps, in the optimizer's own form."""
    if not isinstance(inner, torch.optim.AdamW):
        return int(steps)  # DeepSpeedCPUAdam, which accelerate takes where the states are offloaded
    group = inner.param_groups[part.group]
    return torch.tensor(steps, device=part.flat.device if group["fused"] or group["capturable"] else "cpu")
