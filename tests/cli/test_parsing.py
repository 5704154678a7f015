"""Claims about flags and YAML files: their names, what overrides what, and that a recipe cannot hold a dead key."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import TrainingArguments
from transformers.trainer_utils import SaveStrategy

from helpers.cli import REPOSITORY, start_process
from jepa_hf import JepaConfig, UsageError
from jepa_hf.cli.arguments import ModelArguments
from jepa_hf.cli.console import report_error
from jepa_hf.cli.llm_arguments import LLM_CLASSES
from jepa_hf.cli.main import main as jepa_hf_main
from jepa_hf.cli.parsing import parse_command, parse_flags
from jepa_hf.cli.quick_checks import peek_objective
from jepa_hf.version import __version__

RECIPES = sorted(REPOSITORY.glob("configs/*.yaml"))

# The names that issue and README promise, those of run_mlm.py wherever it has one.
PROMISED = re.findall(
    r"\w+",
    """
model_name_or_path model_type config_name config_overrides tokenizer_name cache_dir model_revision token
trust_remote_code dtype attn_implementation add_tokens smoke_test
train_file validation_file dataset_name dataset_config_name dataset_train_split streaming text_column_name
max_seq_length stride line_by_line concat packed pad_to_max_length pad_to_multiple_of max_train_samples
max_eval_samples preprocessing_num_workers overwrite_cache validation_split_percentage
do_train do_eval resume_from_checkpoint output_dir overwrite_output_dir
mask_ratio mean_span_length whole_word num_masks masked_tokens predictor_type loss average_top_k_layers target_norm
mlm_weight
variance_weight covariance_weight sigreg_weight contrastive_weight contrastive_temperature
ema_decay ema_decay_end ema_schedule export_encoder
""",
)


def values(*argv: str) -> dict[str, Any]:
    """What a command parses to."""
    parsed = parse_command(argv, LLM_CLASSES) if peek_objective(argv) == "llm" else parse_command(argv)
    return {name: value for part in parsed for name, value in vars(part).items()}


def recipe(folder: Path, **keys: Any) -> str:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(keys), encoding="utf-8")
    return str(path)


def test_every_promised_flag_exists() -> None:
    assert set(PROMISED) - set(values()) == set()


def test_everything_training_arguments_offers_is_a_flag() -> None:
    for actual in (values(), values("--objective", "llm")):
        assert {item.name for item in fields(TrainingArguments) if item.init} - set(actual) == set()


def test_every_argument_of_the_configuration_that_is_no_detail_is_a_flag() -> None:
    given = {"masked_tokens": "mask_token", "predictor_type": "mlp", "loss": "l1", "target_norm": "none"}
    parsed, *_ = parse_command([part for name, value in given.items() for part in (f"--{name}", value)])
    assert parsed.jepa_kwargs() == given
    names = {item.name for item in fields(ModelArguments)}
    config = JepaConfig({"model_type": "bert"}).to_dict()
    ours = {name for name in config if name.startswith(("pred_", "target_")) or name.endswith("_weight")}
    assert ours - names == set()


def test_what_is_not_given_is_left_to_the_configuration() -> None:
    assert parse_command([])[0].jepa_kwargs() == {}


def test_a_flag_overrides_the_file_which_overrides_the_default(tmp_path: Path) -> None:
    path = recipe(tmp_path, mask_ratio=0.2, mean_span_length=3, max_steps=7, streaming=True, learning_rate=1e-3)
    actual = values(path, "--max_steps", "9", "--streaming", "false")
    assert (actual["mask_ratio"], actual["mean_span_length"], actual["learning_rate"]) == (0.2, 3.0, 1e-3)
    assert (actual["max_steps"], actual["streaming"]) == (9, False)
    assert actual["num_masks"] is None  # left to the collator


@pytest.mark.parametrize(
    ("key", "given", "expected"),
    [
        ("learning_rate", "5e-4", 5e-4),  # which YAML reads as text
        ("learning_rate", 1, 1.0),
        ("do_eval", True, True),
        ("do_eval", "yes", True),
        ("streaming", False, False),
        ("save_strategy", False, SaveStrategy.NO),  # as YAML reads `save_strategy: no`
        ("train_file", "a b.txt", "a b.txt"),
        ("train_file", "-odd.txt", "-odd.txt"),
        ("train_file", "", ""),
        ("ema_decay", 0, 0.0),
        ("ema_decay", None, None),
        ("stride", None, None),
        ("report_to", ["none"], []),
        ("lr_scheduler_kwargs", {"min_lr": 1e-6}, {"min_lr": 1e-6}),
        ("label_names", ["a", "b"], ["a", "b"]),
    ],
)
def test_yaml_values_become_what_the_flag_would(key: str, given: Any, expected: Any, tmp_path: Path) -> None:
    actual = values(recipe(tmp_path, **{key: given}))[key]
    assert actual == expected
    assert type(actual) is type(expected)


@pytest.mark.parametrize("name", ["line_by_line", "concat", "streaming", "whole_word", "disable_tqdm", "do_eval"])
def test_a_yes_or_no_flag_stands_alone(name: str) -> None:
    assert values(f"--{name}", "--mask_ratio", "0.2")[name] is True


def test_an_empty_file_is_no_flag(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert values(str(tmp_path / "empty.yaml"))["mask_ratio"] is None


def test_python_takes_the_same_names() -> None:
    given = {"mask_ratio": 0.2, "max_steps": 7, "train_file": "data.txt", "loss": "l1", "report_to": "none"}
    command = parse_command([part for name, value in given.items() for part in (f"--{name}", str(value))])
    differing = {"logging_dir": None, "distributed_state": None}
    for ours, theirs in zip(parse_flags(given), command, strict=True):
        # A directory for logs has the date in its name, and accelerate's state no equality.
        assert {**vars(ours), **differing} == {**vars(theirs), **differing}
    with pytest.raises(UsageError, match=r"Unknown argument mask_ration\. Did you mean mask_ratio\?"):
        parse_flags({"mask_ration": 0.2})


def test_recipes_exist() -> None:
    assert {"quickstart.yaml", "llm_jepa.yaml", "llm_jepa_paper.yaml"} <= {path.name for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_key_of_every_recipe_is_valid(path: Path) -> None:
    actual = values(str(path))
    for key, value in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        if isinstance(value, (int, float, bool)):
            assert actual[key] == value, key


@pytest.mark.slow
def test_help_is_readable_and_exits_with_0(tmp_path: Path) -> None:
    result = start_process(REPOSITORY / "run_jepa.py", "--help_all", cwd=tmp_path, COLUMNS="100")
    assert result.returncode == 0
    assert result.stderr == ""
    assert result.stdout.startswith("usage: run_jepa.py")
    for name in PROMISED:
        assert f"--{name}" in result.stdout
    # Every flag of ours says what it is for.
    for help_text in ("Fraction of tokens, time steps or feature patches", "Files to train on", "Start over, deleting"):
        assert help_text in " ".join(result.stdout.split())
    assert "%%" not in result.stdout


def test_the_console_command_helps_too(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["--help"], ["-h"]):
        assert jepa_hf_main(argv) == (0 if argv else 2)
        output = capsys.readouterr()
        assert "export" in (output.out if argv else output.err)
        assert (output.err if argv else output.out) == ""
    assert jepa_hf_main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__
    assert jepa_hf_main(["train", "--help"]) == 0
    assert "--mask_ratio" in capsys.readouterr().out


def test_a_pretrained_start_takes_the_place_of_a_recipes_random_one(tmp_path: Path) -> None:
    path = recipe(tmp_path, model_type="ijepa", config_overrides="hidden_size=8", seed=3)
    actual = values(path, "--model_name_or_path", "mine")
    assert (actual["model_name_or_path"], actual["model_type"], actual["config_overrides"]) == ("mine", None, None)
    assert actual["seed"] == 3
    assert values(path)["model_type"] == "ijepa"


def test_a_range_takes_two_numbers(tmp_path: Path) -> None:
    assert values("--target_scale", "0.1", "0.2")["target_scale"] == [0.1, 0.2]
    assert values(recipe(tmp_path, target_scale=[0.1, 0.2]))["target_scale"] == [0.1, 0.2]
    with pytest.raises(UsageError, match="target_scale takes two numbers"):
        parse_flags({"target_scale": 0.1})


def test_a_message_from_a_loader_worker_is_extracted(capsys: pytest.CaptureFixture[str]) -> None:
    """A worker sends its whole traceback as the message."""
    message = "Caught UsageError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  ...\n"
    assert report_error("run_jepa.py", UsageError(f"{message}jepa_hf.errors.UsageError: row 3 is too short\n")) == 2
    assert capsys.readouterr().err == "run_jepa.py: error: row 3 is too short\n"
