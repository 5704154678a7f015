"""Updates that are not finite are skipped and reported with parameter, step and samples; the weights are kept."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from helpers.batches import rows
from helpers.runs import RunAtStep, Weights, trainer, weights
from jepa_hf.errors import RunError
from jepa_hf.training.checkpoints import find_corruption
from jepa_hf.training.nonfinite_guard import NonFiniteGuard, NonFiniteUpdate

BAD = (float("nan"), float("inf"), -float("inf"))
ROWS = rows("bert", 40)


def linear(fused: bool) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)


def update(model: nn.Module, spoil: tuple[str, float] | None = None) -> torch.Tensor:
    """Gradients of one update; one entry of one of them spoilt."""
    model.zero_grad()
    loss = model(torch.ones(2, 3)).square().mean()
    loss.backward()
    if spoil is not None:
        model.get_parameter(spoil[0]).grad.view(-1)[0] = spoil[1]
    return loss.detach()


# ---- the guard alone


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("name", ["0.weight", "1.bias"])
def test_a_fused_optimizer_leaves_the_update_out_and_the_host_learns_it_one_later(name: str, value: float) -> None:
    """Weights and moments stay bit for bit, also in the update that follows before anybody knows."""
    model, optimizer = linear(fused=True)
    guard = NonFiniteGuard(optimizer, list(model.named_parameters()))
    guard.add_loss(update(model))
    assert guard.inspect_gradients(1) is None
    optimizer.step()
    kept = {key: value.clone() for key, value in model.state_dict().items()}
    moments = [{key: value.clone() for key, value in each.items()} for each in optimizer.state.values()]

    update(model, (name, value))
    assert guard.inspect_gradients(2) is None
    optimizer.step()
    update(model)
    assert guard.inspect_gradients(3) == NonFiniteUpdate(2, name, 1)
    optimizer.step()
    assert all(torch.equal(value, kept[key]) for key, value in model.state_dict().items())
    for before, after in zip(moments, optimizer.state.values(), strict=True):
        assert all(torch.equal(value, before[key]) for key, value in after.items())
    assert guard.poll() is None  # reported once


def test_without_fused_kernels_the_host_learns_it_before_the_step() -> None:
    model, optimizer = linear(fused=False)
    guard = NonFiniteGuard(optimizer, list(model.named_parameters()))
    update(model)
    assert guard.inspect_gradients(1) is None
    update(model, ("1.weight", BAD[0]))
    assert guard.inspect_gradients(2) == NonFiniteUpdate(2, "1.weight", 1)


def test_the_first_of_several_parameters_is_named_and_those_without_a_gradient_are_passed_by() -> None:
    model, optimizer = linear(fused=True)
    guard = NonFiniteGuard(optimizer, list(model.named_parameters()))
    update(model)
    model[0].weight.grad = None
    for name in ("0.bias", "1.bias"):
        model.get_parameter(name).grad.fill_(BAD[0])
    guard.inspect_gradients(7)
    assert guard.poll() == NonFiniteUpdate(7, "0.bias", 2)


def test_an_update_without_any_gradient_is_no_failure() -> None:
    model, optimizer = linear(fused=True)
    guard = NonFiniteGuard(optimizer, list(model.named_parameters()))
    guard.inspect_gradients(1)
    assert guard.poll() is None


@pytest.mark.parametrize("value", BAD)
def test_a_loss_that_is_not_finite_is_enough(value: float) -> None:
    """Of any of the update's micro-batches."""
    model, optimizer = linear(fused=True)
    guard = NonFiniteGuard(optimizer, list(model.named_parameters()))
    before = model[0].weight.clone()
    for loss in (value, 1.0):
        update(model)
        guard.add_loss(torch.tensor(loss))
    guard.inspect_gradients(1)
    optimizer.step()
    assert torch.equal(model[0].weight, before)
    assert guard.poll() == NonFiniteUpdate(1, None, 0)


def test_a_guarded_step_is_bit_for_bit_an_unguarded_one() -> None:
    results = []
    for guarded in (True, False):
        model, optimizer = linear(fused=True)
        guard = NonFiniteGuard(optimizer, list(model.named_parameters()))
        for step in range(5):
            loss = update(model)
            if guarded:
                guard.add_loss(loss)
                guard.inspect_gradients(step + 1)
            optimizer.step()
        results.append(model.state_dict())
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


@pytest.mark.parametrize("max_norm", [0.01, 100.0, float("inf")])
def test_clipping_by_the_guards_norms_is_bit_for_bit_torchs(max_norm: float) -> None:
    """Gradients and the logged norm; a parameter without a gradient is skipped."""
    message, gradients = [], []
    for guarded in (True, False):
        model, optimizer = linear(fused=True)
        guard = NonFiniteGuard(optimizer, list(model.named_parameters()))
        update(model)
        model[0].bias.grad = None
        guard.inspect_gradients(1)
        message.append(
            guard.clip(max_norm) if guarded else nn.utils.clip_grad_norm_(list(model.parameters()), max_norm)
        )
        gradients.append([each.grad for each in model.parameters() if each.grad is not None])
    assert guard.has_full_gradients
    assert torch.equal(*message)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*gradients, strict=True))


# ---- real runs


class InjectNonFinite:
    """Spoils the gradient of a parameter in one step; keeps the weights that each step began with."""

    def __init__(self, step: int, name: str = "predictor.embed.bias", value: float = BAD[0]):
        self.step, self.name, self.value = step, name, value
        self.before: list[Weights] = []

    def __call__(self, model: nn.Module, state: Any) -> None:
        self.before.append(weights(model))
        parameter = model.get_parameter(self.name)
        if state.global_step + 1 == self.step:
            self.hook = parameter.register_hook(lambda gradient: gradient * self.value)
        elif state.global_step == self.step:
            self.hook.remove()


def run_until_it_fails(folder: Path, poison: InjectNonFinite, **overrides: Any) -> tuple[Any, str]:
    settings = {"max_steps": 6, "logging_steps": 100, "health_steps": 0} | overrides
    run = trainer(folder, data=ROWS, callbacks=[RunAtStep(on_step_begin=poison)], **settings)
    with pytest.raises(RunError) as message:
        run.train()
    return run, str(message.value)


def trained(state: Weights) -> Weights:
    return {name: value for name, value in state.items() if not name.startswith("target_encoder.")}


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch"])
@pytest.mark.parametrize("when", ["logged", "saved", "neither", "last step"])
def test_a_run_ends_with_the_weights_before(optim: str, when: str, tmp_path: Path) -> None:
    """The message has parameter, step and samples; nothing that is not finite is logged or saved."""
    poison = InjectNonFinite(step=6 if when == "last step" else 3)
    overrides = {"logged": {"logging_steps": 1}, "saved": {"save_strategy": "steps", "save_steps": 3}}.get(when, {})
    run, message = run_until_it_fails(tmp_path, poison, optim=optim, **overrides)
    step = poison.step
    assert f"The gradient of predictor.embed.bias is not finite in step {step} (batch " in message
    assert "The step was skipped" in message
    kept = poison.before[step - 1]
    now = weights(run.model)
    assert all(torch.equal(value, kept[name]) for name, value in trained(now).items())
    assert all(value.isfinite().all() for value in now.values())
    checkpoint = tmp_path / f"checkpoint-{run.state.global_step}"
    assert str(checkpoint) in message
    assert find_corruption(checkpoint) is None
    assert {path.name for path in tmp_path.iterdir()} == {checkpoint.name}
    assert all(entry["loss"] == entry["loss"] for entry in run.state.log_history if "loss" in entry)
    if optim == "adamw_torch":  # known before the step, which is not counted
        assert run.state.global_step == step - 1
        assert all(torch.equal(value, kept[name]) for name, value in now.items())


def test_the_samples_that_are_named_are_those_that_were_read(tmp_path: Path) -> None:
    """With accumulation, in the second epoch."""
    poison = InjectNonFinite(step=4)
    run, message = run_until_it_fails(
        tmp_path, poison, per_device_train_batch_size=4, gradient_accumulation_steps=4, max_steps=8
    )
    assert "batches 1 to 4 of epoch 2, training rows " in message
    named = [int(row) for row in message.split("training rows ")[1].split(" counted")[0].split(", ")]
    read = [batch["input_ids"] for batch in run.batches[10:14]]
    ids = [row[row != 0].tolist() for batch in read for row in batch]
    assert [ROWS[row]["input_ids"] for row in named] == ids


def test_older_checkpoints_stay(tmp_path: Path) -> None:
    """Weights that were about to diverge may be bad themselves: the save at the end deletes nothing."""
    run_until_it_fails(tmp_path, InjectNonFinite(step=5), save_strategy="steps", save_steps=2, save_total_limit=1)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-4", "checkpoint-5"}


def test_a_gradient_scaler_goes_on_by_itself(tmp_path: Path) -> None:
    """fp16 leaves such updates out as a matter of course."""
    poison = InjectNonFinite(step=2)
    run = trainer(tmp_path, data=ROWS, callbacks=[RunAtStep(on_step_begin=poison)], max_steps=4)
    run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    run.train()
    assert run.state.global_step == 4
    assert all(torch.equal(poison.before[1][name], value) for name, value in trained(poison.before[2]).items())
    assert all(value.isfinite().all() for value in weights(run.model).values())
