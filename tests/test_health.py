"""Claims about health: each kind of collapse is told apart, in numbers and in a run; a healthy run is left alone."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jepa_batches import rows, tiny_jepa
from jepa_runs import trainer

from jepa_hf import JepaTrainer
from jepa_hf.health import (
    MOST_CANDIDATES,
    diagnose,
    findings,
    is_measurement,
    prediction_health,
    representation_health,
)
from jepa_hf.metrics import effective_rank, sample_hit_rate, sample_means, within_sample_share


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
    torch.testing.assert_close(sample_means(vectors[order], samples[order]), expected)


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
    share = within_sample_share(vectors, owner)
    between = sample_means(vectors, owner)[owner]
    total = (vectors - vectors.mean(0)).square().sum()
    assert share.item() == pytest.approx(1 - ((between - vectors.mean(0)).square().sum() / total).item(), abs=1e-4)
    assert within_sample_share(3 * vectors + 7, owner).item() == pytest.approx(share.item(), abs=1e-4)


def test_the_share_within_samples_at_its_ends() -> None:
    vectors, samples = cloud()
    assert within_sample_share(sample_means(vectors, samples)[samples], samples) == pytest.approx(0, abs=1e-6)
    assert within_sample_share(vectors - sample_means(vectors, samples)[samples], samples) == pytest.approx(1)
    assert within_sample_share(torch.ones(6, 3), torch.tensor([0, 0, 1, 1, 2, 2])) == 0


def test_representation_health_is_of_positions_and_of_means() -> None:
    vectors, samples = cloud()
    health = representation_health(vectors, samples)
    assert health["rank"] == pytest.approx(effective_rank(vectors).item())
    assert health["pooled_rank"] == pytest.approx(effective_rank(sample_means(vectors, samples)).item())
    assert 0.4 < health["within_sample"] < 0.6


def test_a_large_batch_is_thinned_evenly() -> None:
    """9,000 positions: no more than 2,048 of them count, from the first sample to the last."""
    vectors, samples = cloud(samples=300, positions=30, width=4)
    vectors[:, 0] = 0
    vectors[-30:, 0] = 100.0  # the last sample alone has anything in this direction
    assert representation_health(vectors, samples)["rank"] == pytest.approx(effective_rank(vectors[::5]).item())


def test_the_hit_rate_keeps_its_scale() -> None:
    """As many candidates for any batch that is large enough: chance does not depend on the number of targets."""
    generator = torch.Generator().manual_seed(0)
    for count in (MOST_CANDIDATES, 4 * MOST_CANDIDATES):
        targets = torch.randn(count, 64, generator=generator)
        health = prediction_health(targets, targets, torch.arange(count) % 10, "l2")
        assert health["hit_rate_chance"] == 1 / MOST_CANDIDATES
        assert health["hit_rate"] == 1
        assert health["prediction_loss"] == 0
        assert health["constant_prediction_loss"] == pytest.approx(1, abs=0.1)
        assert health["position_prediction_loss"] == pytest.approx(1, abs=0.1)


def test_the_hit_rate_chooses_among_the_candidates_alone() -> None:
    """Every target four times: among all of them there is no nearest one, among every fourth there is."""
    targets = torch.randn(MOST_CANDIDATES, 64, generator=torch.Generator().manual_seed(0)).repeat_interleave(4, dim=0)
    assert prediction_health(targets, targets, torch.arange(len(targets)), "l2")["hit_rate"] == 1


def test_without_two_targets_at_one_position_the_position_says_nothing() -> None:
    """No number rather than NaN, which the watchdog would call a divergence."""
    targets = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    assert "position_prediction_loss" not in prediction_health(targets, targets, torch.arange(5), "l2")
    assert "position_prediction_loss" in prediction_health(targets, targets, torch.tensor([0, 1, 2, 3, 0]), "l2")


def test_each_kind_of_collapse_is_told_apart() -> None:
    """The same cloud after each of the three: one finding each, of the right name, in words with numbers."""
    vectors, samples = cloud()
    start = as_entry(vectors, samples)
    offset = torch.full((32,), 100.0)
    few = torch.zeros(32)
    few[:2] = 1.0
    for kind, changed, words in (
        ("total", offset + vectors, "all point the same way"),
        ("dimensional", few * vectors, "directions"),
        ("token", sample_means(vectors, samples)[samples] + 1e-3 * vectors, "all positions of a sample"),
    ):
        found = diagnose([start, as_entry(changed, samples)])
        assert list(found) == [kind]
        assert found[kind].startswith(f"{kind} collapse: the target encoder")
        assert words in found[kind]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), scale=st.floats(0.01, 100))
def test_neither_a_new_sample_nor_another_scale_is_a_collapse(seed: int, scale: float) -> None:
    vectors, samples = cloud(seed=seed)
    assert diagnose([as_entry(*cloud(seed=seed + 1)), as_entry(scale * vectors, samples)]) == {}


def test_guesses_that_were_good_and_are_no_longer_are_a_divergence() -> None:
    """The rates of a run on images whose learning rate was too high; a rate that never rose is none."""
    lost = [{"health_hit_rate": rate, "health_hit_rate_chance": 1 / 512} for rate in (0.002, 0.31, 0.42, 0.018)]
    assert list(diagnose(lost)) == ["divergence"]
    assert "finds 1.8 % of its targets and found 42 % before" in diagnose(lost)["divergence"]
    assert diagnose(lost[:3]) == {}
    assert diagnose([lost[0], lost[3], lost[0]]) == {}


def test_numbers_that_are_not_finite_are_a_divergence() -> None:
    vectors, samples = cloud()
    broken = vectors.clone()
    broken[7, 3] = torch.inf
    measured = [as_entry(vectors, samples), as_entry(broken, samples)]
    assert list(diagnose(measured)) == ["divergence"]
    assert "no finite numbers" in diagnose(measured)["divergence"]


def test_findings_are_the_first_of_each_kind() -> None:
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


def test_a_run_with_the_contrastive_term_tells_how_many_samples_are_found(tmp_path: Path) -> None:
    """Among all samples of the fixed batch, however many are in one of its parts; without the term, no number."""
    model = tiny_jepa("bert", contrastive_weight=1.0)
    run = watched(tmp_path, model=model, eval_data=rows("bert", 12), per_device_train_batch_size=5)
    health = run.measure_health()
    assert health["health_sample_hit_rate_chance"] == 1 / 12
    with torch.no_grad():
        output = run.model(**run.data_collator.for_evaluation()(rows("bert", 12)))
    expected = sample_hit_rate(output.sample_predictions, output.sample_targets)
    assert health["health_sample_hit_rate"] == pytest.approx(expected.item())
    assert "health_sample_hit_rate" not in watched(tmp_path / "other").measure_health()


def test_samples_without_targets_are_no_candidates(tmp_path: Path) -> None:
    """Twelve rows, and the same beside four that are too short to be masked: the same rate, and the same chance."""
    model = tiny_jepa("bert", contrastive_weight=1.0)
    short = [{"input_ids": [2, 60, 3]}] * 4
    found = []
    for data in (rows("bert", 12), [*rows("bert", 12)[:5], *short, *rows("bert", 12)[5:]]):
        health = watched(tmp_path, model=model, eval_data=data, mask={"on_short": "skip"}).measure_health()
        found.append({name: value for name, value in health.items() if "sample_hit_rate" in name})
    assert found[0]["health_sample_hit_rate_chance"] == 1 / 12
    assert found[1] == pytest.approx(found[0])


@pytest.mark.parametrize(("family", "least", "most"), [("bert", 0.0, 0.8), ("modernbert", 0.95, 1.2)])
def test_of_absolute_positions_a_random_target_is_in_part_its_place(
    family: str, least: float, most: float, tmp_path: Path
) -> None:
    """Of random words the position alone tells much where there is a position table, nothing where it is rotary."""
    model = tiny_jepa(family, strong=False, target_norm="instance")
    words = torch.randint(10, 60, (60, 12), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": [2, *row, 3]} for row in words.tolist()]
    health = watched(tmp_path, model=model, data=data, eval_data=data).measure_health()
    share = health["health_position_prediction_loss"] / health["health_constant_prediction_loss"]
    assert least <= share <= most


def test_any_callable_may_collate(tmp_path: Path) -> None:
    """One that is no collator of ours has no masks to hold still: it is used as it is."""
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
    model = tiny_jepa(strong=False, target_norm="none", target_layers=1)
    run = watched(tmp_path, model=model, max_steps=6, learning_rate=1e-5, callbacks=[break_from(2, kind)])
    with caplog.at_level(logging.WARNING, logger="jepa_hf"):
        run.train()
    said = [record.getMessage() for record in caplog.records if "collapse" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith(f"step 3: {kind} collapse: ")
    assert {found: step for found, (step, _) in findings(run.state.log_history).items()} == {kind: 3}
    assert run.state.global_step == 6


def test_on_request_a_collapse_ends_the_run(tmp_path: Path) -> None:
    model = tiny_jepa(strong=False, target_norm="none", target_layers=1)
    run = watched(tmp_path, model=model, max_steps=6, stop_on_collapse=True, callbacks=[break_from(2, "total")])
    run.train()
    assert run.state.global_step == 3


def test_a_target_that_chases_the_context_collapses_and_is_noticed(tmp_path: Path) -> None:
    """Nothing is ruined by hand: without averaging and normalisation, gradient descent finds the constant itself."""
    model = tiny_jepa(strong=False, loss="cosine", target_norm="none", target_layers=1)
    run = watched(tmp_path, model=model, max_steps=60, health_steps=20, learning_rate=1e-2, ema_decay=0.0)
    run.train()
    assert "total" in findings(run.state.log_history)


def test_a_healthy_run_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = watched(tmp_path, model=tiny_jepa(strong=False), max_steps=60, health_steps=20, ema_decay=0.9)
    with caplog.at_level(logging.WARNING, logger="jepa_hf"):
        run.train()
    assert findings(run.state.log_history) == {}
    assert not [record for record in caplog.records if "collapse" in record.getMessage()]
