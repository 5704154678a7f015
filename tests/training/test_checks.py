"""Claims about runs that cannot learn: they are refused before the start, or end with an error."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import EarlyStoppingCallback

from helpers.batches import rows, tiny_jepa
from helpers.runs import StopAfter, trainer
from jepa_hf import UsageError
from jepa_hf.errors import RunError
from jepa_hf.training import trainer as training_trainer
from jepa_hf.training.checkpoints import latest_valid_checkpoint

UNMASKABLE_ROW = {"input_ids": [2, 60, 3]}  # one token between [CLS] and [SEP]: nothing to mask
EVALUATIONS: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2}


@pytest.mark.parametrize(
    ("settings", "size", "message"),
    [
        ({"max_steps": 0}, 8, "max_steps must be at least 1, not 0"),
        ({"max_steps": -5}, 8, "max_steps must be at least 1, not -5"),
        ({"max_steps": -1, "num_train_epochs": 0}, 8, "num_train_epochs must be above 0, not 0"),
        ({}, 0, "no rows to train on"),
        ({"dataloader_drop_last": True}, 7, "The training data has 7 rows, fewer than a batch of 8"),
    ],
)
def test_a_run_without_a_step_is_refused(settings: dict[str, Any], size: int, message: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, data=rows("bert", 8)[:size], **settings)
    with pytest.raises(UsageError, match=message):
        run.train()
    assert list(tmp_path.iterdir()) == []


def test_a_full_batch_is_enough_to_drop_the_rest(tmp_path: Path) -> None:
    run = trainer(tmp_path, data=rows("bert", 8), dataloader_drop_last=True, max_steps=1)
    run.train()
    assert run.state.global_step == 1


@pytest.fixture
def unchecked_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the check of the data before a run, which reads the first rows only."""
    monkeypatch.setattr(training_trainer, "check_targets", lambda *_: None)


@pytest.mark.usefixtures("unchecked_targets")
def test_a_stream_without_a_batch_ends_with_an_error(tmp_path: Path) -> None:
    """Its length is unknown before."""
    stream = datasets.Dataset.from_list(rows("bert", 4)).to_iterable_dataset().filter(lambda row: False)
    run = trainer(tmp_path, data=stream, max_steps=2, health_steps=0)
    with pytest.raises(RunError, match="took no step"):
        run.train()


@pytest.mark.usefixtures("unchecked_targets")
@pytest.mark.parametrize("resumed", [False, True])
def test_a_run_without_any_target_ends_with_an_error(resumed: bool, tmp_path: Path) -> None:
    """Also if it is resumed from a checkpoint of its last step."""
    settings: dict[str, Any] = {"mask": {"on_too_short": "skip"}, "max_steps": 2, "save_strategy": "steps"}
    settings |= {"save_steps": 1, "health_steps": 0}
    run = trainer(tmp_path, data=[UNMASKABLE_ROW] * 8, **settings)
    with pytest.raises(RunError, match="No row had a target in 2 steps"):
        run.train()
    if resumed:
        again = trainer(tmp_path, data=[UNMASKABLE_ROW] * 8, **settings)
        with pytest.raises(RunError, match="No row had a target in 2 steps"):
            again.train(resume_from_checkpoint=True)


def test_targets_before_a_resume_count(tmp_path: Path) -> None:
    """A last part without targets does not spoil a run that has learned."""
    data = rows("bert", 8) + [UNMASKABLE_ROW] * 8
    settings: dict[str, Any] = {
        "data": data,
        "mask": {"on_too_short": "skip"},
        "max_steps": 2,
        "save_strategy": "steps",
    }
    settings |= {"save_steps": 1, "train_sampling_strategy": "sequential"}
    stopped = trainer(tmp_path, callbacks=[StopAfter(1)], **settings)
    stopped.train()
    resumed = trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert latest_valid_checkpoint(tmp_path)[0] == tmp_path / "checkpoint-2"


def test_one_sample_has_no_contrastive_term(tmp_path: Path) -> None:
    """It would be compared with itself only, in training and in evaluation."""
    model = tiny_jepa("bert", contrastive_weight=1.0)
    with pytest.raises(UsageError, match="train_dataset has one"):
        trainer(tmp_path, model, data=rows("bert", 1)).train()
    with pytest.raises(UsageError, match="eval_dataset has one"):
        trainer(tmp_path, model, eval_data=rows("bert", 1)).train()


# ---- the metric of the best model


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("probe_linear", "It needs --probe_task"),
        ("eval_contxt_rank", "'eval_contxt_rank' is not measured"),
        ("sample_top1_accuracy", "is not measured"),  # without a contrastive term
    ],
)
def test_a_metric_that_is_not_measured_is_refused(metric: str, message: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, eval_data=rows("bert", 8), metric_for_best_model=metric, **EVALUATIONS)
    with pytest.raises(UsageError, match=message):
        run.train()


def test_metrics_of_several_evaluation_sets_have_their_names(tmp_path: Path) -> None:
    sets = {"news": rows("bert", 8)}
    run = trainer(tmp_path, eval_data=sets, metric_for_best_model="context_rank", **EVALUATIONS)
    with pytest.raises(UsageError, match=r"Take one of: .*news_context_rank"):
        run.train()
    trainer(tmp_path, eval_data=sets, metric_for_best_model="news_context_rank", **EVALUATIONS).train()


def test_early_stopping_needs_a_metric_of_evaluations(tmp_path: Path) -> None:
    for settings in ({"metric_for_best_model": "context_rank"}, EVALUATIONS):
        run = trainer(tmp_path, eval_data=rows("bert", 8), callbacks=[EarlyStoppingCallback()], **settings)
        with pytest.raises(UsageError, match="EarlyStoppingCallback needs a metric of repeated evaluations"):
            run.train()


@pytest.mark.parametrize("metric", ["mlm_loss", "context_pairwise_cosine"])
def test_lower_is_better_for_losses_and_cosines(metric: str, tmp_path: Path) -> None:
    model = tiny_jepa("bert", mlm_weight=0.5)
    settings = {"eval_data": rows("bert", 8), "metric_for_best_model": metric, **EVALUATIONS}
    run = trainer(tmp_path, model, **settings)
    assert run.args.greater_is_better is False
    run.train()


@pytest.mark.parametrize("weights", [{}, {"contrastive_weight": 1.0, "mlm_weight": 0.5, "sigreg_weight": 0.1}])
def test_the_names_that_are_checked_are_those_of_an_evaluation(weights: dict[str, float], tmp_path: Path) -> None:
    run = trainer(tmp_path, tiny_jepa("bert", **weights), eval_data=rows("bert", 16), probe=Probe())
    names = {name.removeprefix("eval_") for name in run.evaluate()}
    assert (
        names
        - {"runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "epoch"}
        - {"num_input_tokens_seen"}
        == run.evaluation_metrics()
    )


class Probe:
    metric_names = ("probe_linear",)

    def __call__(self, model: torch.nn.Module) -> dict[str, float]:
        return {"probe_linear": 0.5}
