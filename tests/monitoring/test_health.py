"""Claims about health: each kind of collapse is recognized, in numbers and in a run; a healthy run has no findings."""

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.batches import rows, tiny_jepa
from helpers.runs import trainer
from jepa_hf import JepaTrainer
from jepa_hf.hub.model_card import render_card
from jepa_hf.monitoring.assessment import Severity
from jepa_hf.monitoring.health import (
    MAX_TOP1_CANDIDATES,
    best_baseline,
    diagnose,
    findings,
    first_finding,
    is_measurement,
    prediction_health,
    representation_health,
)
from jepa_hf.monitoring.metrics import (
    effective_rank,
    mean_pool_by_sample,
    sample_top1_accuracy,
    within_sample_variance_ratio,
)
from jepa_hf.report.run_report import write_report

BASELINE_KINDS = ("constant", "position", "sample")


def cloud(samples: int = 40, positions: int = 20, width: int = 32, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors that differ between samples and, as much, within them."""
    generator = torch.Generator().manual_seed(seed)
    between = torch.randn(samples, 1, width, generator=generator)
    within = torch.randn(samples, positions, width, generator=generator)
    return (between + within).flatten(0, 1), torch.arange(samples).repeat_interleave(positions)


def as_entry(vectors: torch.Tensor, samples: torch.Tensor, step: int = 0) -> dict[str, float]:
    values = representation_health(vectors, samples)
    return {"step": step} | {
        f"health_{which}_{name}": v for which in ("target", "context") for name, v in values.items()
    }


# ---- numbers


def test_means_of_samples_are_those_of_a_loop() -> None:
    vectors, samples = cloud()
    order = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(1))
    expected = torch.stack([vectors[samples == number].mean(dim=0) for number in range(40)])
    torch.testing.assert_close(mean_pool_by_sample(vectors[order], samples[order]), expected)


@settings(max_examples=30, deadline=None)
@given(samples=st.integers(2, 20), positions=st.integers(1, 8), scale=st.floats(0, 10), seed=st.integers(0, 99))
def test_the_share_within_samples_is_the_law_of_total_variance(
    samples: int, positions: int, scale: float, seed: int
) -> None:
    """Share within + share between = 1, whatever the shift and the scale."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(samples, 1, 5, generator=generator)
    vectors = (means + scale * torch.randn(samples, positions, 5, generator=generator)).flatten(0, 1)
    owner = torch.arange(samples).repeat_interleave(positions)
    share = within_sample_variance_ratio(vectors, owner)
    between = mean_pool_by_sample(vectors, owner)[owner]
    total = (vectors - vectors.mean(0)).square().sum()
    assert share.item() == pytest.approx(1 - ((between - vectors.mean(0)).square().sum() / total).item(), abs=1e-4)
    assert within_sample_variance_ratio(3 * vectors + 7, owner).item() == pytest.approx(share.item(), abs=1e-4)


def test_the_share_within_samples_at_its_ends() -> None:
    vectors, samples = cloud()
    assert within_sample_variance_ratio(mean_pool_by_sample(vectors, samples)[samples], samples) == pytest.approx(
        0, abs=1e-6
    )
    assert within_sample_variance_ratio(
        vectors - mean_pool_by_sample(vectors, samples)[samples], samples
    ) == pytest.approx(1)
    assert within_sample_variance_ratio(torch.ones(6, 3), torch.tensor([0, 0, 1, 1, 2, 2])) == 0


def test_representation_health_is_of_positions_and_of_means() -> None:
    vectors, samples = cloud()
    health = representation_health(vectors, samples)
    assert health["rank"] == pytest.approx(effective_rank(vectors).item())
    assert health["pooled_rank"] == pytest.approx(effective_rank(mean_pool_by_sample(vectors, samples)).item())
    assert 0.4 < health["within_sample"] < 0.6


def test_a_large_batch_is_thinned_evenly() -> None:
    """9,000 positions: no more than 2,048 of them count, from the first sample to the last."""
    vectors, samples = cloud(samples=300, positions=30, width=4)
    vectors[:, 0] = 0
    vectors[-30:, 0] = 100.0  # the last sample alone has anything in this direction
    assert representation_health(vectors, samples)["rank"] == pytest.approx(effective_rank(vectors[::5]).item())


def guesses_health(predictions: torch.Tensor | None, targets: torch.Tensor, size: int) -> dict[str, float]:
    """Health of predictions whose targets are `size` in a row to a sample, at positions 0, 1, ... of it."""
    index = torch.arange(len(targets))
    return prediction_health(predictions, targets, "l2", 1.0, index // size, index * 0, index % size)


def test_the_top1_accuracy_keeps_its_scale() -> None:
    """As many candidates for any batch that is large enough: chance does not depend on the number of targets."""
    generator = torch.Generator().manual_seed(0)
    for count in (MAX_TOP1_CANDIDATES, 4 * MAX_TOP1_CANDIDATES):
        targets = torch.randn(count, 64, generator=generator)
        health = guesses_health(targets, targets, 16)
        assert health["top1_accuracy_chance"] == 1 / MAX_TOP1_CANDIDATES
        assert health["top1_accuracy_in_sample_chance"] == 1 / 16
        assert health["top1_accuracy"] == health["top1_accuracy_in_sample"] == 1
        assert health["prediction_loss"] == 0
        for baseline in ("constant", "position", "sample"):
            assert health[f"{baseline}_baseline_loss"] == pytest.approx(1, abs=0.1)


def test_the_top1_accuracy_chooses_among_the_candidates_alone() -> None:
    """Every target four times: among all of them there is no nearest one, among every fourth there is."""
    targets = torch.randn(MAX_TOP1_CANDIDATES, 64, generator=torch.Generator().manual_seed(0)).repeat_interleave(
        4, dim=0
    )
    assert prediction_health(targets, targets, "l2")["top1_accuracy"] == 1


def test_without_two_targets_of_a_kind_a_baseline_says_nothing() -> None:
    """No number rather than NaN, which the watchdog would call a divergence."""
    targets = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    apart, together = torch.arange(5), torch.tensor([0, 1, 2, 3, 0])
    expected = {"prediction_loss", "constant_baseline_loss", "top1_accuracy", "top1_accuracy_chance"}
    in_sample = {"sample_baseline_loss", "top1_accuracy_in_sample", "top1_accuracy_in_sample_chance"}
    for samples, positions, more in (
        (apart, apart, set()),
        (apart, together, {"position_baseline_loss"}),
        (together, apart, in_sample),
    ):
        actual = prediction_health(targets, targets, "l2", 1.0, samples, apart * 0, positions)
        assert set(actual) == expected | more
        assert all(map(math.isfinite, actual.values()))


def test_a_predictor_that_is_not_trained_leaves_the_baselines() -> None:
    targets = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    assert set(guesses_health(None, targets, 8)) == {f"{which}_baseline_loss" for which in BASELINE_KINDS}


def test_a_position_that_two_masks_hide_counts_once() -> None:
    """Each target twice, in two masks: no hit is lost by the copy, and no baseline knows a target from its copy."""
    targets = torch.randn(400, 64, generator=torch.Generator().manual_seed(0))
    index = torch.arange(400)
    once = guesses_health(targets, targets, 10)
    places = [part.repeat(2) for part in (index // 10, index % 10)]
    masks = torch.arange(2).repeat_interleave(400)
    twice = prediction_health(targets.repeat(2, 1), targets.repeat(2, 1), "l2", 1.0, places[0], masks, places[1])
    assert twice == pytest.approx(once, rel=1e-4)


def test_guesses_that_know_the_document_alone_are_at_chance_in_it() -> None:
    """A document part of 0.2 of the variance: far above chance in the batch, chance in the sample, no better than the
    baseline that knows the sample."""
    generator = torch.Generator().manual_seed(0)
    documents = 0.2**0.5 * torch.randn(128, 1, 64, generator=generator).expand(128, 30, 64)
    targets = (documents + 0.8**0.5 * torch.randn(128, 30, 64, generator=generator)).flatten(0, 1)
    health = guesses_health(documents.flatten(0, 1), targets, 30)
    assert health["top1_accuracy"] > 20 * health["top1_accuracy_chance"]
    assert health["top1_accuracy_in_sample"] == pytest.approx(health["top1_accuracy_in_sample_chance"], abs=0.01)
    assert best_baseline(health) == ("the sample alone", health["sample_baseline_loss"])
    assert health["prediction_loss"] == pytest.approx(health["sample_baseline_loss"], rel=0.01)
    assert "predictions_at_baseline" in diagnose(
        [{f"health_{name}": value for name, value in health.items()}], finished=True
    )


def test_guesses_that_know_the_position_alone_are_no_better_than_their_baseline() -> None:
    """Half token, half place: they hit in the sample and in the batch, and the position's baseline has their loss."""
    generator = torch.Generator().manual_seed(0)
    places = torch.randn(1, 30, 64, generator=generator).expand(128, 30, 64)
    targets = (places + torch.randn(128, 30, 64, generator=generator)).flatten(0, 1)
    health = guesses_health(places.flatten(0, 1), targets, 30)
    assert health["top1_accuracy_in_sample"] > 0.9
    assert best_baseline(health)[0] == "the position alone"
    assert health["prediction_loss"] == pytest.approx(health["position_baseline_loss"], rel=0.01)
    entry = {f"health_{name}": value for name, value in health.items()}
    assert list(diagnose([entry], finished=True)) == ["predictions_at_baseline"]
    assert diagnose([entry]) == {}
    assert diagnose([entry | {"health_prediction_loss": 0.9 * entry["health_prediction_loss"]}], finished=True) == {}


def half_places(token: float) -> dict[str, float]:
    """A measurement of targets at 30 of 100 positions: a position's vector, and `token` times a token's."""
    generator = torch.Generator().manual_seed(0)
    positions = torch.rand(128, 100, generator=generator).argsort(dim=1)[:, :30].flatten()
    tokens = torch.randn(128 * 30, 64, generator=generator)
    targets = torch.randn(100, 64, generator=generator)[positions] + token * tokens
    owner = torch.arange(128).repeat_interleave(30)
    values = prediction_health(targets, targets, "l2", 1.0, owner, owner * 0, positions)
    for encoder in ("target", "context"):
        values |= {f"{encoder}_{name}": value for name, value in representation_health(targets, owner).items()}
    return {f"health_{name}": value for name, value in values.items()}


def test_representations_that_become_their_position_are_a_collapse() -> None:
    """From half token, half place to 0.04 % token: no other number sees it. A third less token is not a finding."""
    start = half_places(1.0)
    actual = diagnose([start, half_places(0.02)])
    assert list(actual) == ["position"]
    assert "the position alone leaves 0.04 % of the best constant's loss, 50 % at the start" in actual["position"]
    assert diagnose([start, half_places(0.67)]) == {}
    assert diagnose([half_places(0.02), half_places(0.02)]) == {}


def test_each_kind_of_collapse_is_recognized() -> None:
    """The same cloud after each of the three: one finding each, of the right name, in words with numbers."""
    vectors, samples = cloud()
    start = as_entry(vectors, samples)
    offset = torch.full((32,), 100.0)
    few = torch.zeros(32)
    few[:2] = 1.0
    for kind, changed, words in (
        ("total", offset + vectors, "all point the same way"),
        ("dimensional", few * vectors, "directions"),
        ("token", mean_pool_by_sample(vectors, samples)[samples] + 1e-3 * vectors, "all positions of a sample"),
    ):
        actual = diagnose([start, as_entry(changed, samples)])
        assert list(actual) == [kind]
        assert actual[kind].startswith(f"{kind} collapse: the target encoder")
        assert words in actual[kind]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), scale=st.floats(0.01, 100))
def test_neither_a_new_sample_nor_another_scale_is_a_collapse(seed: int, scale: float) -> None:
    vectors, samples = cloud(seed=seed)
    assert diagnose([as_entry(*cloud(seed=seed + 1)), as_entry(scale * vectors, samples)]) == {}


def rates(name: str, values: tuple[float, ...], chance: float) -> list[dict[str, float]]:
    return [{f"health_{name}": rate, f"health_{name}_chance": chance} for rate in values]


def test_guesses_that_were_good_and_are_no_longer_are_a_divergence() -> None:
    """The rates of a run on images whose learning rate was too high; a rate that never rose is not a finding."""
    lost = rates("top1_accuracy", (0.002, 0.31, 0.42, 0.018), 1 / 512)
    assert list(diagnose(lost)) == ["divergence"]
    assert "finds 1.8 % of its targets and found 42 % before" in diagnose(lost)["divergence"]
    assert diagnose(lost[:3]) == {}
    assert diagnose([lost[0], lost[3], lost[0]]) == {}


def test_a_divergence_is_judged_among_the_sample_s_own_targets() -> None:
    """Where documents were found by the batch's rate and no longer are, but targets of each are, nothing diverged."""
    batch = rates("top1_accuracy", (0.002, 0.28, 0.01), 1 / 512)
    for kept, kinds in ((0.5, []), (0.06, ["divergence"])):
        in_sample = rates("top1_accuracy_in_sample", (0.05, 0.5, kept), 0.05)
        measured = [one | other for one, other in zip(batch, in_sample, strict=True)]
        assert list(diagnose(measured)) == kinds


def test_numbers_that_are_not_finite_are_a_divergence() -> None:
    vectors, samples = cloud()
    broken = vectors.clone()
    broken[7, 3] = torch.inf
    measured = [as_entry(vectors, samples), as_entry(broken, samples)]
    assert list(diagnose(measured)) == ["divergence"]
    assert "not finite any more" in diagnose(measured)["divergence"]


def test_findings_hold_at_the_end_and_have_the_step_since_which() -> None:
    """A collapse that has passed does not count; its first step is known all the same."""
    vectors, samples = cloud()
    dead = torch.full((32,), 100.0) + vectors
    history = [
        {"loss": 1.0, "step": 1},
        as_entry(vectors, samples, 0),
        as_entry(vectors, samples, 10),
        as_entry(dead, samples, 20),
        as_entry(dead + 1, samples, 30),
    ]
    assert [is_measurement(entry) for entry in history] == [False, True, True, True, True]
    assert {kind: step for kind, (step, _) in findings(history).items()} == {"total": 20}
    assert findings(history[:1]) == {}
    recovered = [*history, as_entry(vectors, samples, 40)]
    assert findings(recovered) == {}
    assert first_finding(recovered) == first_finding(history) == 20
    assert first_finding(history[:3]) is None
    again = [*recovered, as_entry(dead, samples, 50)]
    assert {kind: step for kind, (step, _) in findings(again).items()} == {"total": 50}


def test_whether_anything_was_learned_is_asked_at_the_end_of_a_run_alone() -> None:
    """Not before its last step, not where its length is not known, and not where the predictor is not trained."""
    losses = {f"health_{baseline}_baseline_loss": 0.4 for baseline in BASELINE_KINDS}
    history = [{"step": step, "health_prediction_loss": 0.395 + 0.1 * (not step)} | losses for step in (0, 50, 100)]
    assert findings(history) == findings(history, max_steps=200) == {}
    (finding,) = findings(history, max_steps=100).items()
    assert (finding[0], finding[1][0]) == ("predictions_at_baseline", 100)
    assert "ends at 0.395, where the best constant gives 0.4" in findings(history, 100)["predictions_at_baseline"][1]
    # A callback may end a run before its last step, and a resumed run may have no step left to measure after.
    assert set(findings([*history, {"step": 100, "train_runtime": 1.0}], max_steps=200)) == {"predictions_at_baseline"}
    assert set(findings([*history, {"step": 110, "train_runtime": 1.0}], max_steps=110)) == {"predictions_at_baseline"}
    for entry in history:
        del entry["health_prediction_loss"]
    assert findings(history, max_steps=100) == {}


@pytest.mark.parametrize(
    ("losses", "kind"),
    [
        ([0.9, 0.9, 0.9], "nothing_learned"),  # no weight moved
        ([0.9, 0.9], "nothing_learned"),
        ([0.9, 0.8, 0.91], "nothing_learned"),
        ([0.9, 0.91], "predictions_at_baseline"),  # a run of a few steps, in which a loss may rise by chance
        ([0.9, 0.8], "predictions_at_baseline"),  # short, but on its way
        ([0.9, 0.5, 0.39], None),
    ],
)
def test_nothing_was_learned_if_no_loss_is_below_its_start(losses: list[float], kind: str | None) -> None:
    baselines = {f"health_{baseline}_baseline_loss": 0.4 for baseline in BASELINE_KINDS}
    history: list[dict[str, Any]] = [
        {"step": 50 * number, "health_prediction_loss": loss, **baselines} for number, loss in enumerate(losses)
    ]
    found = findings(history, max_steps=history[-1]["step"])
    assert set(found) == ({kind} if kind else set())
    if kind != "nothing_learned":
        return
    assert "0.9 at the start" in found[kind][1]
    if losses[0] == losses[-1]:  # what else is good was so at the start
        return
    samples = {"health_sample_top1_accuracy": 0.1, "health_sample_top1_accuracy_chance": 0.01}
    tokens = [{"step": step, "mlm_loss": 6.0 - step / 10} for step in range(1, 9)]
    for other, clause in (
        ([history[-1] | samples], "; but the context identifies 10 % of the samples (chance 1 %)"),
        ([*tokens, history[-1]], "; but the loss of masked tokens fell from 5.85 to 5.25"),
        ([*tokens, history[-1] | samples], "(chance 1 %) and the loss of masked tokens fell from 5.85 to 5.25"),
    ):
        ((name, (_, sentence)),) = findings([*history[:-1], *other], max_steps=history[-1]["step"]).items()
        assert name == "predictions_at_baseline"
        assert sentence.endswith(clause)


def test_equal_samples_are_no_collapse_and_nothing_to_learn() -> None:
    """All else that is compared with the start is rounding then: a total collapse was found at step 0."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randn(1, 30, 64, generator=generator).expand(128, 30, 64).flatten(0, 1)
    samples = torch.arange(128).repeat_interleave(30)
    guessed = {f"health_{name}": value for name, value in guesses_health(0.5 * targets, targets, 30).items()}
    history = [as_entry(targets, samples, step) | guessed for step in (0, 50)]
    assert set(findings(history, max_steps=50)) == {"identical_samples"}
    assert "all samples have the same target" in findings(history)["identical_samples"][1]


# ---- in a run


def watched(folder: Path, **kwargs: Any) -> JepaTrainer:
    return trainer(folder, **{"max_steps": 4, "health_steps": 1, "learning_rate": 1e-3} | kwargs)


def measured(run: JepaTrainer) -> list[dict[str, float]]:
    return [entry for entry in run.state.log_history if is_measurement(entry)]


def test_a_run_is_measured_before_it_every_so_often_and_after_it(tmp_path: Path) -> None:
    """And neither what is learnt nor what else is logged depends on it."""
    run = watched(tmp_path / "a", max_steps=5, health_steps=2, logging_steps=1)
    run.train()
    assert [entry["step"] for entry in measured(run)] == [0, 2, 4, 5]
    plain = watched(tmp_path / "b", max_steps=5, health_steps=0, logging_steps=1)
    plain.train()
    assert not measured(plain)
    assert run.losses == plain.losses
    for name, value in plain.model.state_dict().items():
        assert run.model.state_dict()[name].equal(value), name
    assert [e["step"] for e in run.state.log_history if "loss" in e] == [1, 2, 3, 4, 5]


def test_a_share_of_the_run_is_25_steps_at_least(tmp_path: Path) -> None:
    run = watched(tmp_path, max_steps=60, health_steps=0.05)
    run.train()
    assert [entry["step"] for entry in measured(run)] == [0, 25, 50, 60]


def test_both_encoders_begin_as_one_and_part(tmp_path: Path) -> None:
    model = tiny_jepa(strong=False)
    run = watched(tmp_path, model=model, ema_decay=0.9)
    run.train()
    distances = [entry["health_encoder_distance"] for entry in measured(run)]
    assert distances[0] == 0
    assert min(distances[1:]) > 0
    ours, theirs = (
        torch.cat([p.flatten() for p in e.parameters()]) for e in (model.context_encoder, model.target_encoder)
    )
    assert distances[-1] == pytest.approx(((ours - theirs).norm() / ours.norm()).item(), rel=1e-3)


def test_what_is_measured_is_what_the_model_gives(tmp_path: Path) -> None:
    """Recomputed from one pass over all of the batch, two masks per sample; the mode of the model stays as it was."""
    run = watched(tmp_path, eval_data=rows("bert", 12), mask={"num_masks": 2}, per_device_train_batch_size=5)
    for mode in (True, False):
        run.model.train(mode)
        health = run.measure_health()
        assert run.model.training == mode
    batch = run.data_collator.for_evaluation()(rows("bert", 12))
    with torch.no_grad():
        output = run.model(**batch, output_hidden_states=True)
    kept = output.target_valid
    assert health["health_prediction_loss"] == pytest.approx(output.prediction_loss.item(), rel=1e-5)
    assert health["health_target_rank"] == pytest.approx(effective_rank(output.targets[kept]).item(), rel=1e-3)
    views, seen = output.context_state.unflatten(0, (12, 2)), output.context_valid.unflatten(0, (12, 2))
    pooled = torch.stack([view[mask].mean(dim=0) for view, mask in zip(views, seen, strict=True)])
    assert health["health_context_pooled_rank"] == pytest.approx(effective_rank(pooled).item(), rel=1e-3)


def test_a_run_with_the_contrastive_term_logs_sample_accuracy(tmp_path: Path) -> None:
    """Among all samples of the fixed batch, however many are in one of its parts; without the term, no number."""
    model = tiny_jepa("bert", contrastive_weight=1.0)
    run = watched(tmp_path, model=model, eval_data=rows("bert", 12), per_device_train_batch_size=5)
    health = run.measure_health()
    assert health["health_sample_top1_accuracy_chance"] == 1 / 12
    with torch.no_grad():
        output = run.model(**run.data_collator.for_evaluation()(rows("bert", 12)))
    expected = sample_top1_accuracy(output.sample_predictions, output.sample_targets)
    assert health["health_sample_top1_accuracy"] == pytest.approx(expected.item())
    assert "health_sample_top1_accuracy" not in watched(tmp_path / "other").measure_health()


def test_samples_without_targets_are_no_candidates(tmp_path: Path) -> None:
    """Twelve rows, and the same with four more that are too short to be masked: the same rate, and the same chance."""
    model = tiny_jepa("bert", contrastive_weight=1.0)
    short = [{"input_ids": [2, 60, 3]}] * 4
    actual = []
    for data in (rows("bert", 12), [*rows("bert", 12)[:5], *short, *rows("bert", 12)[5:]]):
        health = watched(tmp_path, model=model, eval_data=data, mask={"on_too_short": "skip"}).measure_health()
        actual.append({name: value for name, value in health.items() if "sample_top1_accuracy" in name})
    assert actual[0]["health_sample_top1_accuracy_chance"] == 1 / 12
    assert actual[1] == pytest.approx(actual[0])


@pytest.mark.parametrize(("family", "least", "most"), [("bert", 0.0, 0.8), ("modernbert", 0.95, 1.2)])
def test_with_absolute_positions_a_random_target_is_in_part_its_position(
    family: str, least: float, most: float, tmp_path: Path
) -> None:
    """Of random words the position alone predicts much with a position table, nothing with rotary positions."""
    model = tiny_jepa(family, strong=False, target_norm="instance")
    words = torch.randint(10, 60, (60, 12), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": [2, *row, 3]} for row in words.tolist()]
    health = watched(tmp_path, model=model, data=data, eval_data=data).measure_health()
    share = health["health_position_baseline_loss"] / health["health_constant_baseline_loss"]
    assert least <= share <= most


def test_any_callable_may_collate(tmp_path: Path) -> None:
    """A foreign collator has no masks to fix: it is used unchanged."""
    run = watched(tmp_path)
    ours = run.data_collator.for_evaluation()
    run.data_collator = lambda rows: ours(rows)
    run.train()
    assert len(measured(run)) == 5


def pool_everything(_module: torch.nn.Module, _inputs: tuple, output: Any) -> Any:
    output.last_hidden_state = output.last_hidden_state.mean(dim=1, keepdim=True).expand_as(output.last_hidden_state)
    return output


def break_from(step: int, kind: str) -> Any:
    """A callback that ruins both encoders after a step, in one of the three ways."""
    from transformers import TrainerCallback

    class Ruin(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
            if state.global_step != step:
                return
            for encoder in (model.context_encoder, model.target_encoder):
                if kind == "token":
                    encoder.register_forward_hook(pool_everything)
                    continue
                norm = encoder.encoder.layer[-1].output.LayerNorm
                with torch.no_grad():
                    if kind == "total":
                        norm.weight.mul_(1e-3)
                        norm.bias.normal_()
                    else:
                        norm.weight[2:] = 0

    return Ruin()


@pytest.mark.parametrize("kind", ["total", "dimensional", "token"])
def test_a_collapse_in_a_run_is_noticed_at_once_and_once(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The encoders are ruined before step 3 of 6: one warning, naming step, kind and numbers."""
    model = tiny_jepa(strong=False, target_norm="none", average_top_k_layers=1)
    run = watched(tmp_path, model=model, max_steps=6, learning_rate=1e-5, callbacks=[break_from(2, kind)])
    with caplog.at_level(logging.WARNING, logger="jepa_hf"):
        run.train()
    messages = [record.getMessage() for record in caplog.records if "collapse" in record.getMessage()]
    assert len(messages) == 1
    assert messages[0].startswith(f"step 3: {kind} collapse: ")
    assert {actual: step for actual, (step, _) in findings(run.state.log_history).items()} == {kind: 3}
    assert run.state.global_step == 6


def test_on_request_a_collapse_ends_the_run(tmp_path: Path) -> None:
    model = tiny_jepa(strong=False, target_norm="none", average_top_k_layers=1)
    run = watched(tmp_path, model=model, max_steps=6, stop_on_collapse=True, callbacks=[break_from(2, "total")])
    run.train()
    assert run.state.global_step == 3


def test_a_target_that_chases_the_context_collapses_and_is_noticed(tmp_path: Path) -> None:
    """Nothing is ruined by hand: without averaging and normalisation, gradient descent finds the constant itself."""
    model = tiny_jepa(strong=False, loss="cosine", target_norm="none", average_top_k_layers=1)
    run = watched(tmp_path, model=model, max_steps=60, health_steps=20, learning_rate=1e-2, ema_decay=0.0)
    run.train()
    assert "total" in findings(run.state.log_history)


ONE_WORD = [{"input_ids": [2, *[5 + number % 50] * 16, 3]} for number in range(200)]


def learning(folder: Path, frozen: bool) -> JepaTrainer:
    """A run on texts of one word each. Word and place say all of a target, a context says which word, and no baseline
    knows both."""
    model = tiny_jepa(strong=False, masked_tokens="mask_token", predictor_type="mlp", target_norm="layer")
    model.predictor.requires_grad_(not frozen)
    steps = {"max_steps": 80, "health_steps": 40, "learning_rate": 1e-2, "ema_decay": 0.999}
    run = watched(folder, model=model, data=ONE_WORD, eval_data=ONE_WORD[:64], save_strategy="steps", **steps)
    run.train()
    return run


def test_a_predictor_that_learns_nothing_is_a_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Frozen at its random start: the same sentence once at the end of the console, in the report, in the card."""
    run = learning(tmp_path, frozen=True)
    (line,) = [text for text in capsys.readouterr().out.splitlines() if "nothing learned" in text]
    assert line.startswith("Not healthy. Step 80: nothing learned about single targets: the prediction loss ends at ")
    assert run.verdict().lines[0] == line
    finding = line.removeprefix("Not healthy. Step ").removesuffix(".")
    assert {kind: step for kind, (step, _) in run.health_findings.items()} == {"predictions_at_baseline": 80}
    assert not run.stopped_early
    assert f"- step {finding}\n" in str(render_card(run.model_card_info("out"))).replace("\\", "")
    assert write_report(tmp_path).severity == Severity.NOTHING_LEARNED
    page = (tmp_path / "report.html").read_text()
    top = page[: page.index("Loss and health")]
    assert f"<strong>{line}</strong>" in top


def test_a_predictor_that_learns_is_no_finding(tmp_path: Path) -> None:
    """The same run with a predictor that is trained."""
    run = learning(tmp_path, frozen=False)
    last = measured(run)[-1]
    assert last["health_prediction_loss"] < 0.9 * best_baseline({k[7:]: v for k, v in last.items()})[1]
    assert run.health_findings == {}
    assert "detected no collapse and no" in str(render_card(run.model_card_info("out")))
    assert write_report(tmp_path).severity < Severity.NOTHING_LEARNED


def test_without_a_prediction_loss_predictions_are_not_measured(tmp_path: Path) -> None:
    """A predictor that no loss trains is neither called poor nor found to have learned nothing; its targets are."""
    model = tiny_jepa(prediction_weight=0.0, contrastive_weight=1.0)
    run = watched(tmp_path, model=model, eval_data=rows("bert", 20))
    run.train()
    assert run.health_findings == {}
    last = measured(run)[-1]
    assert {f"health_{baseline}_baseline_loss" for baseline in BASELINE_KINDS} <= set(last)
    assert {"health_prediction_loss", "health_top1_accuracy", "health_top1_accuracy_in_sample"}.isdisjoint(last)
    assert "eval_top1_accuracy" not in run.evaluate()
    facts = run.model_card_info("out")
    assert "prediction_weight 0, contrastive_weight 1" in facts.training["objective"]
    assert {"prediction loss", "position baseline loss"}.isdisjoint(facts.metrics)
    assert "target rank" in facts.metrics


def test_a_run_of_one_sample_warns_that_its_health_is_not_measured(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing could be found of it, which is not the same as healthy."""
    with caplog.at_level(logging.WARNING, logger="jepa_hf"):
        watched(tmp_path, data=rows("bert", 1), max_steps=2).train()
    messages = [record.getMessage() for record in caplog.records if "health is not measured" in record.getMessage()]
    assert len(messages) == 1


def test_evaluations_are_judged_where_the_watchdog_was_off(tmp_path: Path) -> None:
    """With the same thresholds, and names that the watchdog uses."""
    history = [{"step": step, "eval_loss": 1.0, "eval_target_rank": rank} for step, rank in ((0, 200.0), (50, 10.0))]
    assert {kind: step for kind, (step, _) in findings(history).items()} == {"dimensional": 50}
    assert findings([{"step": 0, "health_target_rank": 200.0}, *history]) == {}


def test_pool_targets_are_compared_with_a_constant(tmp_path: Path) -> None:
    """A target for all of a mask has no position and is the only one of its sample."""
    health = watched(tmp_path, model=tiny_jepa(pool_targets=True), eval_data=rows("bert", 20)).measure_health()
    assert {"health_prediction_loss", "health_constant_baseline_loss", "health_top1_accuracy"} <= set(health)
    unjudged = {"position_baseline_loss", "sample_baseline_loss", "top1_accuracy_in_sample"}
    assert unjudged.isdisjoint(name.removeprefix("health_") for name in health)


def test_a_healthy_run_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = watched(tmp_path, model=tiny_jepa(strong=False), max_steps=60, health_steps=20, ema_decay=0.9)
    with caplog.at_level(logging.WARNING, logger="jepa_hf"):
        run.train()
    assert findings(run.state.log_history) == {}
    assert not [record for record in caplog.records if "collapse" in record.getMessage()]
