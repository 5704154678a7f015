"""Claims about what is refused for DeepSpeed, shown without it; tests/distributed/test_zero.py trains with it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.cli import REPOSITORY
from jepa_hf.distributed.deepspeed_state import optimizer_step_count, validate_deepspeed_config
from jepa_hf.errors import UsageError

SHIPPED = sorted((REPOSITORY / "configs" / "accelerate").glob("zero*.json"))


def shipped(path: Path = SHIPPED[-1]) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_what_is_shipped_is_taken(path: Path, optim: str) -> None:
    """In bfloat16, in float32, and with states in the CPU's memory."""
    config = shipped(path)
    validate_deepspeed_config(config, optim)
    config["torch_autocast"]["enabled"] = False
    config["bf16"] = {"enabled": False}
    config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    validate_deepspeed_config(config, optim)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"zero_optimization": {"stage": 0}}, '"stage" must be 1, 2 or 3'),
        ({"zero_optimization": {}}, '"stage" must be 1, 2 or 3'),
        ({"optimizer": {"type": "AdamW"}}, '"optimizer" and "scheduler" must be left out'),
        ({"scheduler": {"type": "WarmupLR"}}, '"optimizer" and "scheduler" must be left out'),
        ({"bf16": {"enabled": True}}, 'use "torch_autocast" with bfloat16'),
        ({"fp16": {"enabled": True}}, 'use "torch_autocast" with bfloat16'),
        ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, 'use "torch_autocast" with bfloat16'),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}, '"device" "cpu" and "ratio" 1'),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, '"device" "cpu" and "ratio" 1'),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
            '"device" "cpu" and "ratio" 1',
        ),
        ({"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, '"zenflow" and "super_offload"'),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}}},
            '"zenflow" and "super_offload"',
        ),
        (
            {"zero_optimization": {"stage": 2, "round_robin_gradients": True}},
            '"round_robin_gradients" must be left out',
        ),
        ({"zero_optimization": {"stage": 3}}, '"stage3_gather_16bit_weights_on_model_save" must be true'),
    ],
)
def test_what_a_checkpoint_would_not_hold_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=f"In DeepSpeed's configuration .*{message}"):
        validate_deepspeed_config(shipped() | change, "adamw_torch")


def test_another_optimizer_is_refused() -> None:
    with pytest.raises(UsageError, match="--optim must be adamw_torch_fused or adamw_torch, not adafactor"):
        validate_deepspeed_config(shipped(), "adafactor")


def state_after(*gradients: bool, kind: type[torch.optim.Optimizer] = torch.optim.AdamW) -> dict[str, Any]:
    """The state of an optimizer of two parameters after steps in which the second has a gradient or not."""
    first, second = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = kind([{"params": [first]}, {"params": [second]}], lr=0.1)
    for given in gradients:
        first.grad, second.grad = torch.ones(2), torch.ones(2) if given else None
        optimizer.step()
    return optimizer.state_dict()


@pytest.mark.parametrize(("gradients", "steps"), [((), 0), ((True, True), 2), ((False, False, False), 3)])
def test_steps_are_counted_of_what_was_changed(gradients: tuple[bool, ...], steps: int) -> None:
    """A parameter that never had a gradient has no count."""
    assert optimizer_step_count(state_after(*gradients), [1, 1]) == steps


def test_a_state_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UsageError, match=r"with 1 step and others with 2, .* Resume without DeepSpeed"):
        optimizer_step_count(state_after(True, False), [1, 1])
    with pytest.raises(UsageError, match=r"of other parameters\. Start a new run"):
        optimizer_step_count(state_after(True), [1, 2])
    with pytest.raises(UsageError, match="another --optim than AdamW"):
        optimizer_step_count(state_after(True, kind=torch.optim.Adagrad), [1, 1])
