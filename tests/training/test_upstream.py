"""Contracts of the private names of transformers, accelerate and torch that `jepa_hf.training` uses or overrides."""

import inspect
import re
from typing import Any

import datasets
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard
from torch import nn
from torch.utils.data import DataLoader, SequentialSampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.utils import PushInProgress

from helpers.cli import REPOSITORY
from jepa_hf import JepaTrainer
from jepa_hf.llm_jepa import LlmJepaTrainer
from jepa_hf.training import upstream

# Private methods of `Trainer` that are overridden, with the parameters that the overrides rely on.
OVERRIDDEN = {
    "_clip_grad_norm": ["model"],
    "_get_grad_norm": ["model", "grad_norm"],
    "_init_training_state": [
        *("max_steps", "num_update_steps_per_epoch", "num_train_epochs", "resume_from_checkpoint", "trial"),
    ],
    "_load_best_model": [],
    "_load_from_checkpoint": ["resume_from_checkpoint", "model"],
    "_prepare_for_training": ["max_steps", "train_dataloader", "resume_from_checkpoint"],
    "_save": ["output_dir", "state_dict"],
    "_save_checkpoint": ["model", "trial"],
    "_track_num_input_tokens": ["inputs"],
}

# Private methods of `Trainer` that `upstream` calls.
CALLED = {
    "_finish_current_push": [],
    "_get_output_dir": ["trial"],
    "_load_scaler": ["checkpoint"],
    "_prepare_inputs": ["inputs"],
    "_save_optimizer_and_scheduler": ["output_dir"],
    "_save_rng_state": ["output_dir"],
    "_save_scaler": ["output_dir"],
    "_set_signature_columns_if_needed": [],
}


def own_classes(trainer_class: type[Trainer]) -> list[type]:
    return [cls for cls in trainer_class.__mro__ if cls.__module__.startswith("jepa_hf.")]


@pytest.mark.parametrize(("name", "parameters"), (OVERRIDDEN | CALLED).items())
def test_a_private_method_of_trainer_has_its_parameters(name: str, parameters: list[str]) -> None:
    assert hasattr(Trainer, name), f"Trainer.{name} is gone"
    assert list(inspect.signature(getattr(Trainer, name)).parameters)[1:] == parameters, f"Trainer.{name} has changed"


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_an_overridden_private_method_is_still_called_by_trainer(name: str) -> None:
    assert re.search(rf"self\.{name}\(", inspect.getsource(Trainer)), f"Trainer calls {name} no longer"


@pytest.mark.parametrize("trainer_class", [JepaTrainer, LlmJepaTrainer])
def test_no_other_private_method_is_overridden(trainer_class: type[Trainer]) -> None:
    names = {name for cls in own_classes(trainer_class) for name in vars(cls) if re.match("_[a-z]", name)}
    assert {name for name in names if hasattr(Trainer, name)} <= OVERRIDDEN.keys()


@pytest.mark.parametrize("trainer_class", [JepaTrainer, LlmJepaTrainer])
def test_every_method_without_a_caller_here_is_one_of_trainers(trainer_class: type[Trainer]) -> None:
    """`Trainer` would silently stop calling an override of a renamed method; `super()` calls existing methods only."""
    source = "".join(path.read_text(encoding="utf-8") for path in (REPOSITORY / "jepa_hf").rglob("*.py"))
    classes = own_classes(trainer_class)
    names = {name for cls in classes for name, value in vars(cls).items() if inspect.isfunction(value)}
    assert {"_get_grad_norm", "_clip_grad_norm", "update_metrics"} <= names
    uncalled = {name for name in names if not re.search(rf"(?<!super\(\))\.{name}\b", source)}
    assert {name for name in uncalled if not hasattr(Trainer, name)} == set()
    for cls in classes:
        inherited = set(re.findall(r"super\(\)\.(\w+)", inspect.getsource(cls)))
        assert {name for name in inherited if not hasattr(cls.__base__, name)} == set()


@pytest.mark.parametrize(
    "name",
    [
        *("_signature_columns", "_train_batch_size", "push_in_progress", "hub_model_id"),
        *("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged"),
    ],
)
def test_trainer_sets_the_attribute(name: str) -> None:
    assert re.search(rf"self\.{name}\b.* = ", inspect.getsource(Trainer)), f"Trainer.{name} is gone"


def test_stateful_callbacks_and_pushes_are_where_they_are_imported_from() -> None:
    class Counter(TrainerCallback, ExportableState):
        def state(self) -> dict[str, Any]:
            return {"args": {}, "attributes": {}}

    assert Counter.from_state(Counter().state()).state() == {"args": {}, "attributes": {}}
    assert PushInProgress([]).jobs == []


# ---- accelerate


def test_a_prepared_loader_holds_torchs_loader_and_its_samplers() -> None:
    loader = DataLoader(datasets.Dataset.from_dict({"row": [1, 2]}), batch_size=1)
    prepared = DataLoaderShard(loader.dataset, batch_sampler=BatchSamplerShard(loader.batch_sampler, 2, 0))
    assert isinstance(upstream.torch_loader(prepared), DataLoader), "DataLoaderShard.base_dataloader is gone"
    assert upstream.torch_loader(prepared) is not prepared
    assert upstream.torch_loader(loader) is loader
    assert isinstance(upstream.row_sampler(prepared), SequentialSampler), "BatchSamplerShard.batch_sampler is gone"


# ---- torch


def test_persistent_workers_are_shut_down() -> None:
    loader = DataLoader(torch.arange(2), num_workers=1, persistent_workers=True)
    list(loader)
    (worker,) = loader._iterator._workers
    upstream.shut_down_workers(loader)
    assert not worker.is_alive()
    assert len(list(loader)) == 2
    upstream.shut_down_workers(loader)


def test_a_fused_optimizer_skips_a_step_by_found_inf() -> None:
    parameter = nn.Parameter(torch.ones(1))
    parameter.grad = torch.ones(1)
    optimizer = torch.optim.AdamW([parameter], fused=True)
    assert upstream.supports_found_inf(optimizer), "Optimizer._step_supports_amp_scaling is gone"
    upstream.set_found_inf(optimizer, torch.ones(()))
    optimizer.step()
    assert parameter.item() == 1.0, "Optimizer.found_inf is not read"
    assert not upstream.supports_found_inf(torch.optim.SGD([parameter]))


def test_the_module_inside_torch_compile_is_unwrapped() -> None:
    module = nn.Linear(1, 1)
    assert upstream.inner_module(torch.compile(module)) is module


def test_foreach_kernels_do_the_same_as_single_ones() -> None:
    first, second = [torch.tensor([3.0, 4.0]), torch.tensor([1.0])], [torch.tensor([0.0, 0.0]), torch.tensor([2.0])]
    assert upstream.norms(first).tolist() == [5.0, 1.0]
    assert [part.tolist() for part in upstream.differences(first, second)] == [[3.0, 4.0], [-1.0]]
    upstream.lerp_(second, first, 0.5)
    assert [part.tolist() for part in second] == [[1.5, 2.0], [1.5]]
