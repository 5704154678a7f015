"""Claims about the readings: made-up histories of known diseases get the right diagnosis, in one sentence each."""

import math
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jepa_hf.monitoring.assessment import (
    Assessment,
    History,
    Severity,
    Verdict,
    assess_samples,
    judge,
    metric_series,
)
from jepa_hf.monitoring.training_plots import PANELS


def evaluated(steps: int = 300, **last: float) -> History:
    """A healthy run of three evaluations, of which `last` changes the last one."""
    start = {
        "prediction_loss": 0.41,
        "constant_baseline_loss": 0.40,
        "position_baseline_loss": 0.39,
        "sample_baseline_loss": 0.41,
        "top1_accuracy": 0.01,
        "top1_accuracy_chance": 0.01,
        "target_rank": 290.0,
        "context_rank": 285.0,
        "target_pairwise_cosine": 0.1,
        "context_pairwise_cosine": 0.3,
        "target_normalized_std": 0.99,
        "context_normalized_std": 0.9,
    }
    end = start | {"prediction_loss": 0.25, "top1_accuracy": 0.6, "target_rank": 250.0, "context_rank": 240.0} | last
    halfway = {name: (start[name] + end[name]) / 2 for name in start}
    log: History = []
    for step, values in ((0, start), (steps // 2, halfway), (steps, end)):
        log.append({"eval_loss": 1.0, "step": step} | {f"eval_{name}": value for name, value in values.items()})
    return log


def readings(history: History, width: int | None = 384) -> dict[str, Assessment]:
    """By the first word of a panel's title, for the panels that the history has curves for."""
    return {
        panel.title.split()[0]: panel.assess(history, panel.curves, width)
        for panel in PANELS
        if any(metric_series(history, name) for name, _ in panel.curves)
    }


def verdict_of(history: History) -> Verdict:
    """Of a finished run."""
    return judge(history, max_steps=max((entry.get("step", 0) for entry in history), default=0))


def test_a_healthy_run() -> None:
    assessed = readings(evaluated())
    assert {reading.severity for reading in assessed.values()} == {Severity.HEALTHY}
    assert assessed["Prediction"].sentence == (
        "The prediction loss fell from 0.41 to 0.25 and ends 36 % below that of the position alone, the best baseline "
        "that reads no context: the predictions depend on the context."
    )
    assert "fell from 290 to 250 of 384 directions" in assessed["Effective"].sentence
    assert "rose from 0.01 to 0.6, 60 times chance" in assessed["Top-1"].sentence
    assert verdict_of(evaluated()).severity == Severity.HEALTHY
    assert verdict_of(evaluated()).lines == [
        "Healthy. No collapse and no divergence. The prediction loss is 36 % below that of the position alone, the "
        "best guess without context.",
        "Next: jepa-hf evaluate out --tasks FILE, or jepa-hf report out for all curves.",
    ]


def test_total_collapse_with_a_rank_that_does_not_show_it() -> None:
    """All vectors alike: the cosine shows it, whatever the rank of the rest is, and curves and verdict agree."""
    history = evaluated(
        target_pairwise_cosine=0.9999,
        context_pairwise_cosine=0.9999,
        target_normalized_std=0.001,
        context_normalized_std=0.001,
        prediction_loss=3e-6,
        constant_baseline_loss=-0.0,
    )
    assessed = readings(history)
    assert assessed["Mean"].severity == Severity.COLLAPSED
    assert [assessed[name].severity for name in ("Prediction", "Normalized")] == [Severity.WARNING] * 2
    assert assessed["Effective"].severity == Severity.HEALTHY
    assert verdict_of(history).severity == Severity.COLLAPSED
    assert verdict_of(history).lines[0].startswith("Not healthy. Step 300: total collapse: the target encoder's")
    assert verdict_of(history).lines[1] == (
        "Next: lower --learning_rate, leave out --ema_decay, or set --target_norm instance."
    )


def test_guesses_that_know_the_position_alone() -> None:
    """Far below a constant predictor, and the top-1 accuracy is high: still a warning."""
    assessed = readings(evaluated(position_baseline_loss=0.24))["Prediction"]
    assert assessed.severity == Severity.WARNING
    assert assessed.sentence.endswith(
        "ends at 0.25, where the position alone gives 0.24 without any context: nothing is learned beyond that."
    )
    assert readings(evaluated(position_baseline_loss=0.0))["Prediction"].severity == Severity.WARNING
    assert "the sample alone gives 0.2" in readings(evaluated(sample_baseline_loss=0.2))["Prediction"].sentence
    history = [
        {name: value for name, value in entry.items() if "position" not in name and "sample" not in name}
        for entry in evaluated()
    ]
    assert "below that of the best constant" in readings(history)["Prediction"].sentence


def test_hits_in_the_batch_are_not_taken_for_hits_in_the_sample() -> None:
    """Guesses that know their document: far above chance in the batch, at chance in the sample, and a warning."""
    history = evaluated(top1_accuracy=0.26)
    for entry in history:
        entry |= {"eval_top1_accuracy_in_sample": 0.06, "eval_top1_accuracy_in_sample_chance": 0.05}
    assessed = readings(history)["Top-1"]
    assert assessed.severity == Severity.WARNING
    assert "among a sample's targets stayed at 0.06, where chance gives 0.05" in assessed.sentence
    assert "the 0.26 among the batch's targets comes from distinguishing samples" in assessed.sentence
    history[-1]["eval_top1_accuracy_in_sample"] = 0.3
    assert readings(history)["Top-1"].severity == Severity.HEALTHY


@pytest.mark.parametrize("whose", ["target", "context"])
def test_dimensional_collapse_of_either_encoder(whose: str) -> None:
    history = evaluated(**{f"{whose}_rank": 4.0})
    sentence = readings(history)["Effective"].sentence
    assert "to 4 of 384 directions: the representation has collapsed." in sentence
    assert whose in sentence
    assert verdict_of(history).severity == Severity.COLLAPSED
    milder = evaluated(**{f"{whose}_rank": 120.0})
    assert readings(milder)["Effective"].severity == Severity.WARNING
    assert verdict_of(milder).severity == Severity.HEALTHY


def test_predictions_without_skill_are_nothing_learned_and_no_collapse() -> None:
    """No better than a constant, and at chance: a collapse only if the positions of a sample become alike."""
    history = evaluated(prediction_loss=0.4, top1_accuracy=0.011)
    assessed = readings(history)
    assert assessed["Prediction"].severity == assessed["Top-1"].severity == Severity.WARNING
    assert assessed["Prediction"].sentence.endswith("beyond that, nor do the predictions match their targets.")
    assert "not nearer than any other" in assessed["Top-1"].sentence
    assert verdict_of(history).severity == Severity.NOTHING_LEARNED
    for entry in history:
        entry["eval_target_within_sample"] = 0.9
    history[-1]["eval_target_within_sample"] = 0.01
    assert verdict_of(history).severity == Severity.COLLAPSED
    assert "token collapse" in verdict_of(history).lines[0]


def test_a_loss_above_the_constant_predictor_s_is_a_warning_despite_hits() -> None:
    assert readings(evaluated(prediction_loss=0.5))["Prediction"].severity == Severity.WARNING


@pytest.mark.parametrize(("start", "severity"), [(0.995, Severity.HEALTHY), (0.3, Severity.WARNING)])
def test_only_a_cosine_that_rose_is_a_warning(start: float, severity: Severity) -> None:
    """Some encoders have a high cosine before any training."""
    history = evaluated(context_pairwise_cosine=0.96)
    history[0]["eval_context_pairwise_cosine"] = start
    assert readings(history)["Mean"].severity == severity
    assert verdict_of(history).severity == Severity.HEALTHY


def test_the_fixed_batch_speaks_before_evaluations() -> None:
    """Where both were made, the watchdog's measurements are judged; without them, evaluations."""
    history = evaluated(target_rank=4.0, context_rank=4.0)
    assert verdict_of(history).severity == Severity.COLLAPSED
    for entry in list(history):
        healthy = {f"health_{whose}_rank": 200.0 for whose in ("target", "context")}
        healthy |= {"health_prediction_loss": 0.25, "health_constant_baseline_loss": 0.41}
        history.append({"step": entry["step"]} | healthy)
    assert metric_series(history, "measured_target_rank") == [(entry["step"], 200.0) for entry in history[3:]]
    assert verdict_of(history).severity == Severity.HEALTHY


def test_a_run_whose_health_was_not_measured_is_not_called_healthy() -> None:
    """Training's own curves say nothing about the representations."""
    verdict = verdict_of([{"step": 10, "loss": 0.5, "prediction_loss": 0.5}])
    assert verdict.severity == Severity.NOT_ASSESSED
    assert verdict.lines[0] == "Not assessed. Health was not measured."
    assert verdict.lines[1].startswith("Next: jepa-hf evaluate out --tasks FILE, or start over with --overwrite_output")


def test_hits_that_the_position_alone_can_give_are_not_praised() -> None:
    """Many hits in the sample, and a loss no better than the position's: the reading does not say it is healthy."""
    learned, places = (readings(evaluated(position_baseline_loss=loss))["Top-1"] for loss in (0.4, 0.24))
    assert learned.severity == Severity.HEALTHY
    assert places.severity == Severity.NOT_ASSESSED
    assert places.sentence.endswith("which the position alone can give.")


def test_a_run_without_measurements_is_not_judged() -> None:
    history = [{"step": 10, "prediction_loss": 0.5}, {"step": 300, "prediction_loss": 0.3}]
    assessed = readings(history)
    assert assessed["Prediction"].severity == Severity.NOT_ASSESSED
    assert "fell from 0.5 to 0.3; without a measurement" in assessed["Prediction"].sentence
    assert verdict_of(history).severity == Severity.NOT_ASSESSED


@pytest.mark.parametrize("source", ["health_", "eval_"])
def test_a_prediction_loss_of_weight_0_is_not_judged(source: str) -> None:
    """Evaluations log it all the same, but no hits: of a predictor that is not trained."""
    baselines = {f"{source}{baseline}_baseline_loss": 0.4 for baseline in ("constant", "position", "sample")}
    history = [{"step": step, "prediction_loss": 0.9, "eval_prediction_loss": 0.9} | baselines for step in (10, 300)]
    assessed = readings(history)["Prediction"]
    assert assessed.severity == Severity.NOT_ASSESSED
    assert assessed.sentence.endswith("its weight is 0, so it is not compared with its baselines.")


def test_the_worst_finding_is_the_verdict_and_all_are_its_reasons() -> None:
    start = {"health_target_within_sample": 0.5, "health_top1_accuracy": 0.5, "health_top1_accuracy_chance": 0.002}
    end = {"health_target_within_sample": 0.01, "health_top1_accuracy": 0.001, "health_top1_accuracy_chance": 0.002}
    verdict = judge([{"step": 0, **start}, {"step": 40, **end}])
    assert verdict.severity == Severity.DIVERGED
    assert [reason.split(":")[:2] for reason in verdict.reasons] == [
        ["Step 40", " divergence"],
        ["Step 40", " token collapse"],
    ]
    assert verdict.lines[0] == f"Not healthy. {verdict.reasons[0]} 1 more finding."
    assert verdict.lines[1].startswith("Next: lower --learning_rate")


def test_nothing_learned_is_the_verdict_on_a_finished_run_alone() -> None:
    """It also says whether samples are recognized, which a run may learn all the same."""
    start = {f"health_{baseline}_baseline_loss": 0.4 for baseline in ("constant", "position")}
    start |= {"health_sample_top1_accuracy": 0.76, "health_sample_top1_accuracy_chance": 1 / 128}
    history = [{"step": step, "health_prediction_loss": loss, **start} for step, loss in ((0, 0.5), (300, 0.399))]
    assert judge(history, 300).severity == Severity.NOTHING_LEARNED
    assert judge(history, 300).lines[0] == (
        "Not healthy. Step 300: nothing learned about single targets: the prediction loss ends at 0.399, where the "
        "best constant gives 0.4; but the context identifies 76 % of the samples (chance 0.78 %)."
    )
    assert judge(history, 600).lines[0].startswith("Healthy so far. No collapse and no divergence.")
    assert judge(history, 600).lines[1] == "Next: the command that started the run continues it."


def test_of_several_evaluation_data_sets_the_worst_views_count() -> None:
    history = evaluated_llm(1.0, 0.5)
    history[-1] |= {"eval_other_view_top1_accuracy": 0.01, "eval_other_view_top1_accuracy_chance": 0.01}
    verdict = judge(history, 300, weights={"lm_loss": 1.0, "pair_loss": 1.0})
    assert verdict.severity == Severity.NOTHING_LEARNED


def test_a_run_that_only_evaluated_is_not_judged() -> None:
    entry = {"step": 0, "health_prediction_loss": 0.4, "health_constant_baseline_loss": 0.4}
    assert judge([entry], 0).lines == ["Not assessed. Nothing was trained.", "Next: add --do_train to train."]


def test_a_finding_that_has_passed_is_named_in_a_healthy_verdict() -> None:
    ranks = (200.0, 10.0, 150.0)
    history = [{"step": 10 * number, "health_target_rank": rank} for number, rank in enumerate(ranks)]
    assert judge(history[:2], 10).severity == Severity.COLLAPSED
    assert judge(history, 20).lines[0] == "Healthy. No collapse and no divergence any more; there was one at step 10."


def evaluated_llm(loss: float, accuracy: float, cosine: float = 0.5) -> History:
    """A run of LLM-JEPA of 300 steps, evaluated before and after it."""
    start = {"eval_lm_loss": 2.0, "eval_view_top1_accuracy": 0.01, "eval_view_top1_accuracy_chance": 0.01}
    end = start | {"eval_lm_loss": loss, "eval_view_top1_accuracy": accuracy, "eval_view_pairwise_cosine": cosine}
    return [{"step": 0, **start}, {"step": 100, "lm_loss": 2.0}, {"step": 300, "lm_loss": 9.0}, {"step": 300, **end}]


@pytest.mark.parametrize(
    ("run", "severity", "line"),
    [
        (
            (1.0, 0.5),
            Severity.HEALTHY,
            "Healthy. No collapse and no divergence. The next-token loss fell from 2 to 1. The first view finds its "
            "own second view in 50 % of the rows (chance 1 %).",
        ),
        (
            (2.0, 0.015),
            Severity.NOTHING_LEARNED,
            "Not healthy. Step 300: nothing learned: the next-token loss did not fall, but went from 2 to 2.",
        ),
        ((2.0, 0.5), Severity.NOTHING_LEARNED, "Not healthy. Step 300: nothing learned: the next-token loss did not"),
        ((2.01, 0.5), Severity.HEALTHY, "Healthy. No collapse and no divergence. The next-token loss hardly changed,"),
        ((1.0, 0.015), Severity.NOTHING_LEARNED, "Not healthy. Step 300: nothing learned about the views: the first"),
        ((1.0, 0.015, 0.999), Severity.COLLAPSED, "Not healthy. Step 300: the views collapsed: "),
        ((math.nan, 0.5), Severity.DIVERGED, "Not healthy. Step 300: divergence: the next-token loss is not finite"),
    ],
)
def test_a_run_of_llm_jepa_is_judged(run: tuple[float, ...], severity: Severity, line: str) -> None:
    """By the fall of its loss, the cosine of the views, and whether a view identifies its row; in one decision."""
    verdict = judge(evaluated_llm(*run), 300, weights={"lm_loss": 1.0, "pair_loss": 1.0})
    assert verdict.severity == severity
    assert verdict.lines[0].startswith(line)
    unfinished = judge(evaluated_llm(*run), 600, weights={"lm_loss": 1.0, "pair_loss": 1.0})
    assert unfinished.severity == (severity if severity > Severity.NOTHING_LEARNED else Severity.HEALTHY)


def test_a_run_of_llm_jepa_without_evaluations_is_judged_by_its_training() -> None:
    """Means over the first and last quarter of the log, because single batches vary; a few entries show nothing."""
    weights = {"lm_loss": 0.0, "pair_loss": 1.0}
    losses = [1.0, 0.2, 0.5, 0.5, 0.5, 0.5, 0.3, 0.9]
    history: History = [{"step": step, "lm_loss": 1.0, "pair_loss": loss} for step, loss in enumerate(losses, 1)]
    verdict = judge(history, 8, weights=weights)
    assert verdict.lines[0].endswith("between the views in training did not fall, but went from 0.6 to 0.6.")
    history[-1]["pair_loss"] = 0.5
    assert judge(history, 8, weights=weights).severity == Severity.HEALTHY
    assert judge(history[:7], 7, weights=weights).severity == Severity.NOT_ASSESSED


def test_samples_that_are_the_same_are_a_collapse() -> None:
    sentence = "Over pooled samples the context encoder has collapsed."
    verdict = judge(evaluated(), 300, samples=Assessment(sentence, Severity.COLLAPSED))
    assert verdict.severity == Severity.COLLAPSED
    assert verdict.reasons == (sentence,)
    assert judge(evaluated(), 300, samples=Assessment(sentence, Severity.WARNING)).severity == Severity.HEALTHY


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 2])
def test_a_loss_that_is_no_number_is_divergence(value: float, at: int) -> None:
    history = evaluated()
    history[at]["eval_prediction_loss"] = value
    assert f"at step {history[at]['step']}" in readings(history)["Prediction"].sentence
    assert verdict_of(history).severity == Severity.DIVERGED


@pytest.mark.parametrize("history", [[], [{"train_runtime": 3.0, "step": 5}], [{"step": 1, "loss": "?"}]])
def test_nothing_logged_is_not_judged(history: History) -> None:
    assert verdict_of(history).severity == Severity.NOT_ASSESSED


def test_whole_samples_are_compared_with_random_weights() -> None:
    def read(rank: float, cosine: float) -> Severity:
        ranks = {"context": rank, "target": rank, "random": 50.0}
        return assess_samples(ranks, {"context": cosine, "target": cosine, "random": 0.95}, 64).severity

    assert read(40.0, 0.9) == Severity.HEALTHY
    assert read(20.0, 0.9) == Severity.WARNING
    assert read(3.0, 0.9) == Severity.COLLAPSED
    assert read(40.0, 0.9999) == Severity.COLLAPSED
    assert read(40.0, 0.994) == Severity.HEALTHY  # random weights are hardly less alike


NAMES = [
    name.replace("measured_", source)
    for panel in PANELS
    for name, _ in panel.curves
    for source in (("health_", "eval_") if name.startswith("measured_") else ("",))
]
VALUES = st.one_of(st.floats(width=32), st.integers(-5, 5), st.none(), st.just("?"))


@given(
    st.lists(
        st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=8),
        max_size=6,
    )
)
@example([{"health_sample_top1_accuracy": 0.0, "health_sample_top1_accuracy_chance": 0.0}])
@example([{"health_target_pooled_rank": float("inf")}, {"health_target_pooled_rank": 0.0}])  # two findings, no skill
def test_whatever_was_logged_every_curve_gets_one_sentence(entries: list[dict[str, Any]]) -> None:
    history = [{"step": step} | entry for step, entry in enumerate(entries)]
    assessed = readings(history)
    for reading in assessed.values():
        assert reading.sentence.endswith(".")
        assert reading.sentence[0].isupper()
    assert all(line.endswith(".") for line in verdict_of(history).lines)
