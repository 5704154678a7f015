"""Claims about a run's arithmetic: the EMA, the gradients, accumulation, and the article's recipe."""

import copy
import dataclasses
import inspect
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn
from transformers import get_scheduler

from helpers.batches import REPOSITORY, rows, tiny_jepa
from helpers.runs import Batch, RecordingTrainer, RunAtStep, StopAfter, Weights, largest_difference, trainer, weights
from jepa_hf import DataCollatorForSpanJEPA, JepaConfig, JepaTrainingArguments

CASES = [("mask_token", "mlp"), ("mask_token", "transformer"), ("drop", "transformer")]

# ---- EMA


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_target_after_a_run_is_the_closed_form_of_what_the_context_was(
    schedule: str, accumulation: int, tmp_path: Path
) -> None:
    """target_N = Π d_k · target_0 + Σ_k (1 − d_k) Π_{j>k} d_j · context_k, with context_k after optimizer step k.

    One update per optimizer step, also where a step has two micro-batches.
    """
    steps, first, last = 6, 0.5, 0.9
    seen: list[Weights] = []
    run = trainer(
        tmp_path,
        callbacks=[RunAtStep(on_optimizer_step=lambda model, state: seen.append(weights(model.context_encoder)))],
        max_steps=steps,
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=4,
        ema_decay=first,
        ema_decay_end=last,
        ema_schedule=schedule,
    )
    start = weights(run.model.target_encoder)
    assert largest_difference(start, weights(run.model.context_encoder)) > 0.1
    run.train()

    shares = [k / (steps - 1) for k in range(steps)]
    if schedule == "cosine":
        shares = [(1 - math.cos(math.pi * share)) / 2 for share in shares]
    decays = [first if schedule == "constant" else first + (last - first) * share for share in shares]
    expected = {name: math.prod(decays) * value.double() for name, value in start.items()}
    assert len(seen) == steps
    for k, context in enumerate(seen):
        weight = (1 - decays[k]) * math.prod(decays[k + 1 :])
        for name in expected:
            expected[name] += weight * context[name].double()
    assert largest_difference(weights(run.model.target_encoder), expected) < 1e-6


def test_only_the_callback_moves_the_target(tmp_path: Path) -> None:
    """Between the ends of two steps the target is bit for bit what it was; at a step's end it has moved."""
    history: list[tuple[str, Weights]] = []
    events = ("on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end")
    watch = {
        event: lambda model, state, event=event: history.append((event, weights(model.target_encoder)))
        for event in events
    }
    trainer(tmp_path, callbacks=[RunAtStep(**watch)], ema_decay=0.9, max_steps=3, weight_decay=0.1).train()
    assert [event for event, _ in history] == list(events) * 3
    for (_, before), (event, after) in pairwise(history):
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved == (set(before) if event == "on_step_end" else set())


# ---- gradients


@pytest.mark.parametrize("mlm_weight", [0.0, 0.5])
@pytest.mark.parametrize(("mode", "predictor"), CASES)
def test_every_trainable_parameter_changes_in_one_step_and_no_target_parameter_has_a_gradient(
    mode: str, predictor: str, mlm_weight: float, tmp_path: Path
) -> None:
    """Without weight decay, which would move a parameter that the loss does not reach; the EMA is held still.

    And the target encoder has no dropout, though `Trainer` puts the model into training mode on each micro-step.
    """
    model = tiny_jepa("bert", mode, predictor, mlm_weight=mlm_weight)
    gradients: list[bool] = []

    def look(model: Any, state: Any) -> None:
        gradients.extend(parameter.grad is not None for parameter in model.target_encoder.parameters())
        assert model.context_encoder.training
        assert not any(module.training for module in model.target_encoder.modules())

    run = trainer(
        tmp_path, model, callbacks=[RunAtStep(on_pre_optimizer_step=look)], max_steps=1, weight_decay=0.0, ema_decay=1.0
    )
    before = weights(model)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    run.train()
    changed = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert changed == trainable
    assert {name for name in before if not name.startswith("target_encoder.")} == trainable
    assert len(gradients) == len(list(model.target_encoder.parameters()))
    assert not any(gradients)


# ---- accumulation


class MeanOfMeans(RecordingTrainer):
    """The mistake that the next test must see: each micro-batch divides by its own number of targets."""

    def _count_update(self, batches: list, device: torch.device) -> None:
        super()._count_update(batches, device)


@pytest.mark.parametrize(
    ("mode", "predictor", "mlm_weight"), [(*case, 0.5) for case in CASES] + [("drop", "transformer", 0.0)]
)
def test_accumulation_is_exact(mode: str, predictor: str, mlm_weight: float, tmp_path: Path) -> None:
    """Batch 8 x accumulation 1 equals batch 2 x accumulation 4 on all weights after 5 AdamW steps, targets uneven."""

    def run(batch: int, cls: type[RecordingTrainer] = RecordingTrainer) -> RecordingTrainer:
        finished = trainer(
            tmp_path,
            tiny_jepa("bert", mode, predictor, mlm_weight=mlm_weight, strong=False, initializer_range=0.1),
            data=rows("bert", 40, longest=40),
            cls=cls,
            max_steps=5,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=8 // batch,
            train_sampling_strategy="sequential",
            ema_decay=0.9,
            learning_rate=1e-4,
            # A key bias has no gradient but rounding, which AdamW's default would blow up to a step.
            adam_epsilon=1e-6,
        )
        finished.train()
        return finished

    undisturbed, split = run(8), run(2)
    counts = [batch["target_valid"].sum().item() for batch in split.batches]
    assert len(counts) == 20
    assert max(counts[:4]) > 1.5 * min(counts[:4])
    assert sum(counts) == sum(batch["target_valid"].sum().item() for batch in undisturbed.batches)
    assert largest_difference(weights(undisturbed.model), weights(split.model)) < 1e-6
    assert split.losses == pytest.approx(undisturbed.losses, abs=1e-6)
    if predictor == "mlp":
        wrong = run(2, MeanOfMeans)
        assert largest_difference(weights(undisturbed.model), weights(wrong.model)) > 1e-5


# ---- the article's recipe


class ArticleLoop:
    """The article's loop, written anew in plain torch: two copies of an encoder, an MLP, AdamW and an EMA."""

    def __init__(self, encoder: nn.Module, fc1: nn.Linear, fc2: nn.Linear, recipe: dict[str, Any]):
        self.context, self.target = copy.deepcopy(encoder).train(), copy.deepcopy(encoder).train()
        self.predictor = copy.deepcopy(nn.Sequential(fc1, nn.GELU(), fc2))
        self.recipe = recipe
        self.target.requires_grad_(False)
        self.parts = nn.ModuleList([self.context, self.target, self.predictor])
        self.optimizer = torch.optim.AdamW(
            self.parts.parameters(), lr=recipe["learning_rate"], weight_decay=recipe["weight_decay"]
        )
        self.number = 0

    def learning_rate(self, step: int) -> float:
        """Linear warm-up whose first step is not 0, then half a cosine."""
        warmup, steps = self.recipe["warmup_steps"], self.recipe["max_steps"]
        if step < warmup:
            scale = (step + 1) / warmup
        else:
            scale = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
        return self.recipe["learning_rate"] * scale

    def step(self, batch: Batch) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.number)
        self.number += 1
        hidden = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
        for row, (positions, valid) in enumerate(zip(batch["target_positions"], batch["target_valid"], strict=True)):
            hidden[row, positions[valid]] = True
        mask = batch["attention_mask"]
        guess = self.predictor(self.context(batch["context_input_ids"], attention_mask=mask).last_hidden_state)
        with torch.no_grad():
            truth = self.target(batch["input_ids"], attention_mask=mask).last_hidden_state
        cosine = (F.normalize(guess[hidden], dim=-1) * F.normalize(truth[hidden], dim=-1)).sum(dim=-1)
        loss = (1 - cosine).mean()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parts.parameters(), self.recipe["max_grad_norm"])
        self.optimizer.step()
        decay = self.recipe["ema_decay"]
        with torch.no_grad():
            for slow, fast in zip(self.target.parameters(), self.context.parameters(), strict=True):
                slow.mul_(decay).add_(fast, alpha=1 - decay)
        return loss.item()


RECIPE = yaml.safe_load((REPOSITORY / "configs" / "span_jepa_article.yaml").read_text(encoding="utf-8"))
ARTICLE = {
    "learning_rate": 2e-5,
    "weight_decay": 0.01,
    "warmup_steps": 50,
    "max_steps": 500,
    "max_grad_norm": 1.0,
    "ema_decay": 0.99,
    "per_device_train_batch_size": 8,
    "mask_ratio": 0.3,
    "mean_span_length": 5,
    "pred_mlp_ratio": 4,
    "pred_dropout": 0.0,
    "max_seq_length": 128,
    "max_train_samples": 50000,
    "seed": 42,
}


def of(parameters: Any) -> dict[str, Any]:
    """The recipe's values that go to one function or class."""
    return {name: RECIPE[name] for name in parameters if name in RECIPE}


def test_the_recipe_has_the_numbers_of_the_articles_flags() -> None:
    """configs/span_jepa_article.yaml says what the script's defaults say."""
    assert {name: RECIPE[name] for name in ARTICLE} == ARTICLE


@pytest.mark.slow
@pytest.mark.parametrize("learning_rate", [2e-5, 1e-3])
@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_the_articles_recipe_gives_the_articles_losses(family: str, learning_rate: float, tmp_path: Path) -> None:
    """Step by step over 20 steps, to 1e-5, the same masks given; also at a rate that moves the losses by far more."""
    model = tiny_jepa(
        family,
        strong=False,
        encoder={"initializer_range": 0.3},
        **of(inspect.signature(JepaConfig).parameters),
    )
    settings = of(field.name for field in dataclasses.fields(JepaTrainingArguments))
    settings |= {"learning_rate": learning_rate, "logging_steps": 1, "save_strategy": "no"}
    article = ArticleLoop(
        model.context_encoder, model.predictor.fc1, model.predictor.fc2, ARTICLE | {"learning_rate": learning_rate}
    )
    run = trainer(
        tmp_path,
        model,
        data=rows(family, 100, longest=RECIPE["max_seq_length"]),
        callbacks=[StopAfter(20)],
        mask=of(inspect.signature(DataCollatorForSpanJEPA).parameters),
        **settings,
    )
    run.train()
    assert run.state.global_step == len(run.batches) == 20
    assert run.state.max_steps == 500
    expected = [article.step(batch) for batch in run.batches]
    assert run.losses == pytest.approx(expected, abs=1e-5)
    logged = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert logged == pytest.approx(expected, abs=1e-5)
    if learning_rate == 1e-3:
        assert max(expected) - min(expected) > 0.1
        for ours, theirs in ((model.context_encoder, article.context), (model.target_encoder, article.target)):
            pair = weights(ours), weights(theirs)
            for one in pair:
                # A key bias has no gradient but rounding, which AdamW blows up to a step.
                for name in [name for name in one if name.endswith(("key.bias", "k_lin.bias"))]:
                    del one[name]
            assert largest_difference(*pair) < 1e-4


def test_the_articles_learning_rate_is_exact_in_the_warmup_and_one_step_ahead_after_it() -> None:
    """The recipe's scheduler over all 500 steps compared with the article's formula."""
    article = ArticleLoop(nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1), ARTICLE)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=ARTICLE["learning_rate"])
    scheduler = get_scheduler(
        RECIPE["lr_scheduler_type"],
        optimizer,
        num_warmup_steps=RECIPE["warmup_steps"],
        num_training_steps=RECIPE["max_steps"],
        scheduler_specific_kwargs=RECIPE["lr_scheduler_kwargs"],
    )
    rates = []
    for _ in range(500):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[:50] == pytest.approx([article.learning_rate(step) for step in range(50)], rel=1e-9)
    assert rates[50:] == pytest.approx([article.learning_rate(step + 1) for step in range(50, 500)], abs=1e-12)
