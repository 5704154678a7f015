"""Claims about `JepaTrainingArguments`."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser, TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from helpers.runs import arguments
from jepa_hf import JepaTrainingArguments, UsageError
from jepa_hf.llm_jepa import LlmJepaTrainingArguments


@pytest.mark.parametrize("name", ["ema_decay", "ema_decay_end"])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_a_decay_outside_0_to_1_is_refused(name: str, value: float, tmp_path: Path) -> None:
    """The flag and its value are named; the ends of the range are allowed."""
    with pytest.raises(UsageError, match=rf"{name} must lie between 0 and 1, not {value}"):
        arguments(tmp_path, **{name: value})
    for end in (0.0, 1.0):
        assert getattr(arguments(tmp_path, **{name: end}), name) == end


@pytest.mark.parametrize(
    ("name", "choices"),
    [("ema_schedule", ("constant", "linear", "cosine")), ("export_encoder", ("context", "target", "both"))],
)
def test_an_unknown_choice_is_refused_with_the_known_ones(name: str, choices: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=rf"{name} must be one of {', '.join(choices)}, not 'sudden'"):
        arguments(tmp_path, **{name: "sudden"})
    for choice in choices:
        assert getattr(arguments(tmp_path, **{name: choice}), name) == choice


@pytest.mark.parametrize("metric", [None, "loss", "eval_loss"])
def test_the_best_model_is_not_judged_by_the_loss(metric: str | None, tmp_path: Path) -> None:
    """A JEPA's loss is lowest when it has collapsed: the sentence says so, and names better metrics."""
    best: dict[str, Any] = {
        "load_best_model_at_end": True,
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "eval_steps": 2,
    }
    best |= {"save_steps": 2}
    with pytest.raises(UsageError, match=r"--metric_for_best_model.*collapsed.*probe_linear .* and context_rank"):
        arguments(tmp_path, **best, metric_for_best_model=metric)
    args = arguments(tmp_path, **best, metric_for_best_model="top1_accuracy")
    assert args.greater_is_better is True


@pytest.mark.parametrize("pinned", [True, False])
def test_batches_from_pinned_memory_are_copied_without_waiting(
    pinned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the accelerator's settings are left alone; where they are given, they say."""
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    settings = {"use_cpu": False, "dataloader_pin_memory": pinned}  # use_cpu itself turns pinning off
    assert arguments(tmp_path, **settings).accelerator_config.non_blocking is pinned
    for value in (True, False):
        args = arguments(tmp_path, **settings, accelerator_config={"non_blocking": value})
        assert args.accelerator_config.non_blocking is value


@pytest.mark.parametrize("form", ["nothing", "dictionary", "object", "json", "file"])
def test_batches_are_never_dispatched_unless_asked_for(form: str, tmp_path: Path) -> None:
    """However the accelerator's settings are given: streamed batches of differing lengths cannot be dispatched."""
    given = {"even_batches": False}
    file = tmp_path / "accelerator.json"
    file.write_text(json.dumps(given), encoding="utf-8")
    settings = {
        "nothing": {},
        "dictionary": {"accelerator_config": given},
        "object": {"accelerator_config": AcceleratorConfig(**given)},
        "json": {"accelerator_config": json.dumps(given)},
        "file": {"accelerator_config": str(file)},
    }[form]
    config = arguments(tmp_path, **settings).accelerator_config
    assert config.dispatch_batches is False
    assert config.even_batches is (form == "nothing")
    asked = arguments(tmp_path, accelerator_config={"dispatch_batches": True})
    assert asked.accelerator_config.dispatch_batches is True


def test_flags_are_those_of_training_arguments_and_eight_more() -> None:
    """Nothing that `TrainingArguments` offers is lost, and all of it is parsed from a command line."""
    ours, theirs = JepaTrainingArguments.__dataclass_fields__, TrainingArguments.__dataclass_fields__
    assert set(theirs) <= set(ours)
    assert set(ours) - set(theirs) == {
        "ema_decay",
        "ema_decay_end",
        "ema_schedule",
        "decay_norms_and_biases",
        "weight_decay_end",
        "export_encoder",
        "health_steps",
        "stop_on_collapse",
    }
    command = "--output_dir o --ema_decay 0.5 --ema_decay_end 0.75 --ema_schedule cosine --decay_norms_and_biases"
    command += " --learning_rate 0.125 --bf16 --use_cpu"
    (args,) = HfArgumentParser(JepaTrainingArguments).parse_args_into_dataclasses(command.split())
    assert (args.ema_decay, args.ema_decay_end, args.ema_schedule) == (0.5, 0.75, "cosine")
    assert args.decay_norms_and_biases is True
    assert args.bf16 is True
    assert args.learning_rate == 0.125


def test_only_the_exported_encoder_has_a_default_that_depends_on_the_start() -> None:
    with pytest.raises(UsageError, match="ema_schedule must be one of constant, linear, cosine, not None"):
        JepaTrainingArguments(use_cpu=True, ema_schedule=None)
    assert JepaTrainingArguments(use_cpu=True, export_encoder=None).export_encoder is None


def test_defaults_of_a_run(tmp_path: Path) -> None:
    """What decisions 3, 4 and 8 ask for: fp32 weights, derived EMA, lean DDP, no reporting, no waiting."""
    args = JepaTrainingArguments(use_cpu=True)
    assert args.output_dir == "out"
    assert args.ema_decay is args.ema_decay_end is None
    assert args.ddp_find_unused_parameters is False
    assert args.ddp_broadcast_buffers is LlmJepaTrainingArguments(use_cpu=True).ddp_broadcast_buffers is False
    assert args.logging_nan_inf_filter is False
    assert args.average_tokens_across_devices is True
    assert args.include_num_input_tokens_seen == "non_padding"
    assert args.report_to == []
    assert json.loads(args.to_json_string())["export_encoder"] is None


@pytest.mark.parametrize("value", [-1, 1.5, float("nan")])
def test_health_steps_are_an_integer_or_a_share(value: float, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="health_steps must be an integer number of steps or a fraction"):
        arguments(tmp_path, health_steps=value)


def test_stopping_needs_measurements(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="stop_on_collapse needs measurements"):
        arguments(tmp_path, health_steps=0, stop_on_collapse=True)
    assert arguments(tmp_path, health_steps=0.5, stop_on_collapse=True).health_steps == 0.5


def test_without_an_accelerator_the_cpu_needs_no_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither for bfloat16 nor for several processes, which gloo then connects."""
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    args = arguments(tmp_path, use_cpu=False, bf16=True)
    assert (args.use_cpu, args.device.type) == (True, "cpu")
