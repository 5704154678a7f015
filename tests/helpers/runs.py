"""Short runs of the real trainer on tiny models, and callbacks that write down what happened in them."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from helpers.batches import rows, tiny_jepa
from helpers.tiny_models import tiny_tokenizer
from jepa_hf import (
    DataCollatorForSpanJEPA,
    EmaTargetCallback,
    JepaForRepresentationPrediction,
    JepaTrainer,
    JepaTrainingArguments,
)

torch.set_num_threads(1)

Batch = dict[str, torch.Tensor]
Weights = dict[str, torch.Tensor]


def arguments(folder: str | Path, **overrides: Any) -> JepaTrainingArguments:
    """Four steps of batch 8 at a learning rate that moves the weights, on the CPU, logged step by step."""
    settings = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return JepaTrainingArguments(**(settings | overrides))


def with_attention_mask(batch: Batch) -> Batch:
    """A copy of a training batch, with the mask of tokens that it goes without where none is padding."""
    full = {"attention_mask": torch.ones_like(batch["input_ids"])} if "input_ids" in batch else {}
    return full | {name: value.clone() for name, value in batch.items()}


class RecordingTrainer(JepaTrainer):
    """A `JepaTrainer` that keeps its batches and, for each update, the sum of its micro-batches' losses."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.batches: list[Batch] = []
        self.losses: list[float] = []
        super().__init__(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> torch.Tensor:
        self.batches.append(with_attention_mask(inputs))
        loss = super().training_step(model, inputs, num_items_in_batch)
        while len(self.losses) <= self.state.global_step:
            self.losses.append(0.0)
        self.losses[self.state.global_step] += loss.item()
        return loss


def trainer(
    folder: str | Path,
    model: JepaForRepresentationPrediction | None = None,
    data: Any = None,
    eval_data: Any = None,
    callbacks: Iterable[TrainerCallback] = (),
    mask: dict[str, Any] | None = None,
    cls: type[JepaTrainer] = RecordingTrainer,
    probe: Callable[..., dict[str, float]] | None = None,
    **overrides: Any,
) -> Any:
    """A trainer of a tiny BERT on the corpus; every part may be given."""
    model = model if model is not None else tiny_jepa()
    mask = {"masked_tokens": model.config.masked_tokens, "mean_span_length": 2.0} | (mask or {})
    collator = DataCollatorForSpanJEPA(tiny_tokenizer("bert"), **mask)
    return cls(
        model=model,
        args=arguments(folder, **overrides),
        data_collator=collator,
        train_dataset=rows("bert", 40) if data is None else data,
        eval_dataset=eval_data,
        processing_class=tiny_tokenizer("bert"),
        callbacks=list(callbacks),
        probe=probe,
    )


def weights(module: nn.Module) -> Weights:
    """A copy of the module's parameters by name."""
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def largest_difference(one: Weights, other: Weights) -> float:
    """Over all parameters, which must have the same names."""
    assert one.keys() == other.keys()
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


def end_workers(run: JepaTrainer) -> None:
    """End what persistent workers a run has: torch waits five seconds for each whose loader is left to be garbage."""
    for loader in run.accelerator._dataloaders:
        if loader.base_dataloader._iterator is not None:
            loader.base_dataloader._iterator._shutdown_workers()


class RunAtStep(TrainerCallback):
    """Calls a function with the model, at the events that are given by name.

    >>> callback = RunAtStep(on_step_end=lambda model, state: print(state.global_step))
    """

    def __init__(self, **functions: Callable[[JepaForRepresentationPrediction, Any], Any]):
        def at(function: Callable[..., Any]) -> Callable[..., None]:
            def event(args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
                function(model, state)

            return event

        for name, function in functions.items():
            setattr(self, name, at(function))


class StopAfter(TrainerCallback):
    """Interrupts a run, without changing what it believes its length to be."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def ema_of(instance: JepaTrainer) -> EmaTargetCallback:
    """The trainer's callback that moves the target."""
    return next(item for item in instance.callback_handler.callbacks if isinstance(item, EmaTargetCallback))
