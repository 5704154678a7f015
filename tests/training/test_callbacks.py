"""Claims about the callbacks: epochs of the masks, and the schedule that the target follows."""

import logging
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from helpers.batches import rows, tiny_jepa
from helpers.runs import Batch, RecordingTrainer, RunAtStep, StopAfter, Weights, ema_of, trainer, weights
from helpers.tiny_models import save_tiny_encoder
from jepa_hf import EmaTargetCallback, JepaForRepresentationPrediction, JepaTrainer
from jepa_hf.training.callbacks import unwrap_jepa
from jepa_hf.training.ema import default_decay_range, interpolate_schedule


def by_row(batches: list[Batch]) -> dict[tuple[int, ...], list[tuple[int, ...]]]:
    """For each row of tokens, the targets that it had each time, in the order of time."""
    seen: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for batch in batches:
        for row in range(len(batch["input_ids"])):
            ids = batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist()
            positions = batch["target_positions"][row][batch["target_valid"][row]].tolist()
            seen.setdefault(tuple(ids), []).append(tuple(positions))
    return seen


def unlike_rows(count: int) -> list[dict[str, list[int]]]:
    """Rows of 12 or more tokens, no two the same: their masks of two epochs are hardly ever equal."""
    long = {tuple(row["input_ids"]): row for row in rows("bert", 120) if len(row["input_ids"]) >= 12}
    return list(long.values())[:count]


# ---- epochs


def epochs_of(run: JepaTrainer) -> list[int]:
    seen: list[int] = []
    run.add_callback(RunAtStep(on_step_begin=lambda model, state: seen.append(run.data_collator.epoch)))
    return seen


def test_epochs_are_0_1_2_in_order(tmp_path: Path) -> None:
    """Three epochs of two steps; a second call of train() starts again at 0."""
    run = trainer(tmp_path, data=unlike_rows(16), max_steps=-1, num_train_epochs=3)
    seen = epochs_of(run)
    run.train()
    assert seen == [0, 0, 1, 1, 2, 2]
    seen.clear()
    run.train()
    assert seen == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("stop", [3, 4])
def test_a_resumed_run_goes_on_with_its_epoch(stop: int, tmp_path: Path) -> None:
    """Interrupted in the middle of epoch 1 (step 3) and at its end (step 4)."""
    settings = {"data": unlike_rows(16), "max_steps": 6, "save_strategy": "steps", "save_steps": stop}
    trainer(tmp_path, callbacks=[StopAfter(stop)], **settings).train()
    run = trainer(tmp_path, **settings)
    seen = epochs_of(run)
    run.train(resume_from_checkpoint=True)
    assert seen == [0, 0, 1, 1, 2, 2][stop:]


def test_epochs_are_counted_while_streaming(tmp_path: Path) -> None:
    """A stream of 16 rows that is read three times has three epochs, though its length is unknown."""
    data = datasets.Dataset.from_list(unlike_rows(16)).to_iterable_dataset()
    run = trainer(tmp_path, data=data, max_steps=6)
    seen = epochs_of(run)
    run.train()
    assert seen == [0, 0, 1, 1, 2, 2]
    assert (
        run.model_card_info("out").data_statistics["complete passes"] == 2
    )  # whether the third is one, only the next row would say


def test_masks_are_new_every_epoch_and_the_same_with_any_workers(tmp_path: Path) -> None:
    """Every row has three different masks in three epochs: the same three with 0, 2 and 2 persistent workers."""
    runs = []
    for workers, persistent in ((0, False), (2, False), (2, True)):
        run = trainer(
            tmp_path,
            data=unlike_rows(16),
            max_steps=6,
            dataloader_num_workers=workers,
            dataloader_persistent_workers=persistent,
        )
        run.train()
        runs.append(by_row(run.batches))
    assert len(runs[0]) == 16
    assert all(len(set(masks)) == len(masks) == 3 for masks in runs[0].values())
    assert runs[1] == runs[0]
    assert runs[2] == runs[0]


# ---- the schedule


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_decay_that_is_used_and_logged_is_the_schedules(schedule: str, tmp_path: Path) -> None:
    """Update k of 5 has interpolate_schedule(k, 5, ...), and the log of step k says so."""
    run = trainer(tmp_path, max_steps=5, ema_decay=0.5, ema_decay_end=0.9, ema_schedule=schedule)
    run.train()
    logged = [entry["ema_decay"] for entry in run.state.log_history if "ema_decay" in entry]
    assert logged == [interpolate_schedule(step, 5, 0.5, 0.9, schedule) for step in range(1, 6)]


@pytest.mark.parametrize(
    ("first", "last", "expected"), [(0.9, 0.99, (0.9, 0.99)), (0.9, None, (0.9, 0.9)), (None, 0.995, (None, 0.995))]
)
def test_a_decay_that_is_given_wins_over_the_derived_one(
    first: float | None, last: float | None, expected: tuple[float | None, float]
) -> None:
    """Only the first: constant. Only the last: from the derived first one."""
    derived = default_decay_range(2000, False)[0]
    assert EmaTargetCallback(first, last).decay_range(2000) == (expected[0] or derived, expected[1])


def test_the_default_is_slower_from_a_pretrained_encoder(tmp_path: Path) -> None:
    """The trainer knows what its model started from: a directory, or random weights."""
    directory = save_tiny_encoder("bert", tmp_path / "encoder")
    pretrained = JepaForRepresentationPrediction.from_encoder_pretrained(directory)
    for model, expected in ((tiny_jepa(), False), (pretrained, True)):
        run = trainer(tmp_path / "out", model)
        assert ema_of(run).decay_range(1000) == default_decay_range(1000, expected)
    assert default_decay_range(1000, True)[0] > default_decay_range(1000, False)[0]


# ---- real steps only


def test_a_skipped_optimizer_step_moves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where fp16 overflowed at step 2 of 3, the target stays bit for bit, though the context differs from it."""
    skipping = [False]
    monkeypatch.setattr(AcceleratedOptimizer, "step_was_skipped", property(lambda self: skipping[0]))

    def choose(model: Any, state: Any) -> None:
        skipping[0] = state.global_step == 1

    history: list[Weights] = []
    watch = RunAtStep(
        on_step_begin=choose,
        on_train_begin=lambda model, state: history.append(weights(model.target_encoder)),
        on_step_end=lambda model, state: history.append(weights(model.target_encoder)),
    )
    trainer(tmp_path, callbacks=[watch], max_steps=3, ema_decay=0.9).train()
    moved = [any(not torch.equal(before[name], after[name]) for name in before) for before, after in pairwise(history)]
    assert moved == [True, False, True]


def test_the_target_moves_before_it_is_saved_and_evaluated(tmp_path: Path) -> None:
    """The checkpoint of step N holds the target after N updates."""
    run = trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1, ema_decay=0.5)
    after: list[Weights] = []
    run.add_callback(RunAtStep(on_step_end=lambda model, state: after.append(weights(model.target_encoder))))
    run.train()
    for step in (1, 2):
        saved = JepaForRepresentationPrediction.from_pretrained(tmp_path / f"checkpoint-{step}")
        for name, value in weights(saved.target_encoder).items():
            assert torch.equal(value, after[step - 1][name])


@pytest.mark.parametrize(
    ("decay", "pretrained", "warned"), [(0.999, False, True), (0.5, False, False), (0.999, True, False)]
)
def test_a_target_that_would_stay_at_its_random_start_is_reported(
    decay: float, pretrained: bool, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A horizon of 1,000 updates in a run of four; from a pretrained encoder that is what one wants."""
    model = tiny_jepa()
    model.config.name_or_path = "some/encoder" if pretrained else ""
    with caplog.at_level(logging.WARNING, logger="jepa_hf"):
        trainer(tmp_path, model, ema_decay=decay).train()
    messages = [record.getMessage() for record in caplog.records if "EMA" in record.getMessage()]
    assert bool(messages) == warned
    assert not warned or "still 100 % its random start" in messages[0]


def test_unwrapped_finds_the_jepa_in_any_wrapper() -> None:
    """torch.compile around DDP-like wrappers, in any order."""

    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module):
            super().__init__()
            self.module = module

    model = tiny_jepa()
    assert unwrap_jepa(model) is model
    assert unwrap_jepa(torch.compile(model)) is model
    assert unwrap_jepa(Wrapper(torch.compile(Wrapper(model)))) is model


def test_recorded_is_the_trainer_under_test() -> None:
    """The runs above go through `JepaTrainer` itself."""
    assert RecordingTrainer.__mro__[1] is JepaTrainer
