"""The claim that the house has floors: a file imports only from its own floor or from those below it."""

import ast
import sys
from pathlib import Path

import pytest
from commands import REPOSITORY

FLOORS: dict[str, int] = {
    **dict.fromkeys(("masking", "block_masking", "positions", "losses", "ema", "metrics", "health", "packing"), 0),
    **dict.fromkeys(("errors", "files", "late", "markdown", "pair_losses", "version"), 0),
    **dict.fromkeys(("configuration_jepa", "modeling_jepa", "backbones", "predictors", "export", "adapters"), 1),
    **dict.fromkeys(("attention", "pretrained"), 1),
    **dict.fromkeys(("configuration_feature_encoder", "modeling_feature_encoder"), 1),
    **dict.fromkeys(("model_card", "sharing", "tokenization", "data_collator", "training_args", "callbacks"), 2),
    **dict.fromkeys(("image_collator", "feature_collator", "base_trainer", "trainer", "checkpoints"), 2),
    **dict.fromkeys(("divided", "zero", "update_guard", "interruption", "whole_batches"), 2),
    **dict.fromkeys(("base_training_args", "hub_trainer", "running_means", "health_sample"), 2),
    **dict.fromkeys(("llm_jepa", "llm_jepa.views", "llm_jepa.data_collator", "llm_jepa.objective"), 2),
    "llm_jepa.adapters": 2,
    **dict.fromkeys(("llm_jepa.trainer", "llm_jepa.training_args", "llm_jepa.generation", "llm_jepa.model_card"), 2),
    **dict.fromkeys(("data", "feature_data", "image_data", "plots", "mask_plots", "run_directory"), 3),
    "paired_data": 3,
    **dict.fromkeys(("embedding", "embedding_files", "online_probe", "evaluation", "evaluation_plots"), 3),
    **dict.fromkeys(("evaluation_report", "evaluation_tasks"), 3),
    **dict.fromkeys(("readings", "report_plots", "run_samples", "report"), 3),
    **dict.fromkeys(("cli", "cli.arguments", "cli.export", "cli.main", "cli.train", "cli.__main__"), 4),
    **dict.fromkeys(
        (
            "cli.loading",
            "cli.prepare",
            "cli.prepared",
            "cli.text",
            "cli.images",
            "cli.features",
            "cli.masks",
            "cli.evaluate",
            "cli.report",
            "cli.embed",
            "cli.push",
            "cli.running",
            "cli.llm",
            "cli.generate",
            "cli.language_models",
        ),
        4,
    ),
}
PACKAGE = REPOSITORY / "jepa_hf"
# The door: it offers what lies on all floors, and nothing in the house goes through it.
DOOR = "__init__"
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imports(path: Path) -> list[tuple[int, str]]:
    """Every import of a file, wherever it stands in it: how many dots it begins with, and the module."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.level, node.module)] if node.module else [(node.level, alias.name) for alias in node.names]
    return found


def resolved(name: str, dots: int, module: str) -> str | None:
    """The file of the package that an import in the file `name` means, if it means one."""
    if dots == 0:
        top, _, rest = module.partition(".")
        return (rest or DOOR) if top == "jepa_hf" else None
    folders = name.split(".")[:-1] if FILES[name].name != "__init__.py" else name.split(".")
    return ".".join([*folders[: len(folders) - dots + 1], module])


def test_every_file_has_a_floor() -> None:
    assert set(FILES) - {DOOR} == set(FLOORS)


@pytest.mark.parametrize("name", FLOORS)
def test_a_file_imports_from_its_own_floor_or_below(name: str) -> None:
    meant = [resolved(name, *found) for found in imports(FILES[name])]
    own = [target for target in meant if target is not None]
    assert [target for target in own if target not in FLOORS] == []
    assert [target for target in own if FLOORS[target] > FLOORS[name]] == []


def test_the_script_is_only_a_call_of_the_command_line() -> None:
    modules = [module for _, module in imports(REPOSITORY / "run_jepa.py")]
    assert modules == ["gc", "jepa_hf.cli.main", "jepa_hf.cli.train"]


@pytest.mark.parametrize("name", [name for name, floor in FLOORS.items() if floor == 0])
def test_the_ground_floor_knows_tensors_only(name: str) -> None:
    tops = {module.split(".")[0] for dots, module in imports(FILES[name]) if dots == 0}
    assert tops - set(sys.stdlib_module_names) <= {"torch", "numpy"}


@pytest.mark.parametrize("name", [name for name, floor in FLOORS.items() if floor <= 1])
def test_an_export_with_custom_code_can_copy_the_lower_floors(name: str) -> None:
    # transformers follows `from .file import`, and nothing else.
    assert {dots for dots, _ in imports(FILES[name])} <= {0, 1}
    assert not [module for dots, module in imports(FILES[name]) if dots == 0 and module.startswith("jepa_hf")]
    assert not [module for dots, module in imports(FILES[name]) if dots == 1 and "." in module]


def test_only_backbones_know_families() -> None:
    families = {"bert", "distilbert", "roberta", "electra", "deberta-v2", "modernbert", "vit", "ijepa", "dinov2"}
    for name in (name for name, floor in FLOORS.items() if floor <= 2 and name != "backbones"):
        literals = {
            node.value
            for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8")))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert literals & families == set(), name
