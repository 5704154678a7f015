"""Claims about flags whose values are dictionaries: a flag adds to the recipe's, key by key."""

from pathlib import Path
from typing import Any

import pytest

from jepa_hf.cli.arguments import ModelArguments, RunArguments
from jepa_hf.cli.dictionary_flags import dictionary_flags
from jepa_hf.cli.parsing import parse_command, parse_flags

RECIPE = """
model_type: bert
config_overrides: hidden_size=64,num_hidden_layers=3
optim_args: eps=1e-6,foreach=true
lr_scheduler_kwargs: {num_cycles: 2, min_lr: 0.1}
accelerator_config: {split_batches: false, even_batches: true}
output_dir: out
use_cpu: true
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return str(path)


@pytest.mark.parametrize(
    ("name", "flag", "merged"),
    [
        (
            "config_overrides",
            "num_hidden_layers=2,hidden_act=relu",
            "hidden_size=64,num_hidden_layers=2,hidden_act=relu",
        ),
        ("optim_args", "eps=1e-8", "eps=1e-8,foreach=true"),
        ("lr_scheduler_kwargs", '{"num_cycles": 1}', {"num_cycles": 1, "min_lr": 0.1}),
    ],
)
@pytest.mark.parametrize("form", ["{name} {flag}", "{name}={flag}", "hyphens"])
def test_a_flag_adds_to_the_recipes_dictionary(name: str, flag: str, merged: Any, form: str, recipe: str) -> None:
    """Keys that the flag does not name keep the recipe's values, in every spelling of a flag."""
    if form == "hyphens":
        argv = [f"--{name.replace('_', '-')}", flag]
    else:
        argv = f"--{form}".format(name=name, flag="\0").split(" ")
        argv = [part.replace("\0", flag) for part in argv]
    parts = parse_command([recipe, *argv])
    (value,) = [getattr(part, name) for part in parts if hasattr(part, name)]
    assert value == merged


def test_python_merges_dictionaries_too(recipe: str) -> None:
    overrides = {"num_hidden_layers": 2}
    model, _, _, args = parse_flags(
        {"config_overrides": overrides, "accelerator_config": {"even_batches": False}}, config=recipe
    )
    assert model.config_overrides == "hidden_size=64,num_hidden_layers=2"
    assert args.accelerator_config.even_batches is False
    assert args.lr_scheduler_kwargs == {"num_cycles": 2, "min_lr": 0.1}


def test_a_pretrained_start_drops_the_recipes_overrides(recipe: str) -> None:
    assert parse_command([recipe, "--model_name_or_path", "m"])[0].config_overrides is None
    assert parse_flags({"model_name_or_path": "m"}, config=recipe)[0].config_overrides is None


def test_every_dictionary_of_the_trainer_is_known() -> None:
    """Also those that a later version of transformers adds with the type of a dictionary."""
    assert {
        *("config_overrides", "optim_args", "lr_scheduler_kwargs", "accelerator_config", "fsdp_config", "deepspeed"),
        *("gradient_checkpointing_kwargs", "liger_kernel_config"),
    } <= set(dictionary_flags([ModelArguments, RunArguments]))
