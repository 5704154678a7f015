"""The claim that the package has layers: a file imports only from its own folder or from folders below it."""

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from helpers.cli import REPOSITORY

# From the bottom to the top.
FOLDERS = (
    "utils",
    "models",
    "data",
    "distributed",
    "masking",
    "hub",
    "monitoring",
    "training",
    "evaluation",
    "report",
    "llm_jepa",
    "cli",
)
# Outside the folders: all may import them but `models/`, whose files an export copies alone.
SHARED = ("errors", "version")
# Mathematics and files, free of all libraries but torch and numpy.
PLAIN = (
    *("utils.atomic_files", "utils.markdown", "models.losses", "models.contrastive", "models.packed_sequences"),
    *("models.positions", "distributed.sharding", "masking.counter_rng", "masking.span_sampling"),
    *(
        "masking.block_sampling",
        "monitoring.metrics",
        "monitoring.health",
        "training.ema",
        "training.upstream",
        "training.deferred_max",
    ),
    *("llm_jepa.losses", "errors", "version"),
)
PACKAGE = REPOSITORY / "jepa_hf"
# Each file by its dotted name; the name of a folder is that of its `__init__.py`.
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix("."): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
# The package's own `__init__.py` offers names from all layers, and no file imports from it.
ROOT = ""


def imports(path: Path) -> list[tuple[int, str, list[str]]]:
    """Every import of a file, wherever it stands in it: the number of dots, the module, the names."""
    cycles = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            cycles += [(0, alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            cycles.append((node.level, node.module or "", [alias.name for alias in node.names]))
    return cycles


def targets(name: str) -> set[str]:
    """The files of the package that the file `name` imports from."""
    cycles = set()
    for dots, module, names in imports(FILES[name]):
        if dots:
            folders = name.split(".") if FILES[name].name == "__init__.py" else name.split(".")[:-1]
            module = ".".join(filter(None, [*folders[: len(folders) - dots + 1], module]))
        elif module.partition(".")[0] == "jepa_hf":
            module = module.partition(".")[2]
        else:
            continue
        submodules = {f"{module}.{each}".lstrip(".") for each in names} & set(FILES)
        cycles |= submodules or {module}
    return cycles


def layer(name: str) -> int:
    """The number of a file's folder, from the bottom."""
    return FOLDERS.index(name.split(".")[0])


def test_every_file_lies_in_a_folder() -> None:
    assert {name for name in FILES if name.split(".")[0] not in FOLDERS} == {ROOT, *SHARED}


@pytest.mark.parametrize("folder", FOLDERS)
def test_files_import_only_from_their_own_folder_or_below(folder: str) -> None:
    names = [name for name in FILES if name.split(".")[0] == folder]
    arrows = [(name, target) for name in names for target in targets(name) if target not in SHARED]
    assert [arrow for arrow in arrows if arrow[1] not in FILES or arrow[1] == ROOT] == []
    assert [(name, target) for name, target in arrows if layer(target) > layer(name)] == []


def test_shared_files_import_from_models_alone() -> None:
    assert {target for name in SHARED for target in targets(name)} == {"models.errors"}


def test_no_files_import_each_other_in_a_circle() -> None:
    try:
        TopologicalSorter({name: targets(name) for name in FILES}).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


@pytest.mark.parametrize("name", PLAIN)
def test_plain_files_import_torch_and_numpy_alone(name: str) -> None:
    tops = {module.split(".")[0] for dots, module, _ in imports(FILES[name]) if dots == 0}
    assert tops - set(sys.stdlib_module_names) <= {"torch", "numpy"}


@pytest.mark.parametrize("name", [name for name in FILES if name.split(".")[0] == "models"])
def test_an_export_with_custom_code_can_copy_a_model_file(name: str) -> None:
    # transformers follows `from .file import`, and nothing else.
    cycles = imports(FILES[name])
    assert {dots for dots, _, _ in cycles} <= {0, 1}
    assert [module for dots, module, _ in cycles if dots == 0 and module.startswith("jepa_hf")] == []
    assert [module for dots, module, _ in cycles if dots == 1 and (not module or "." in module)] == []


def test_the_folder_of_models_imports_nothing_by_itself() -> None:
    assert imports(FILES["models"]) == []  # `jepa_hf.errors` imports from that folder


def test_the_script_is_only_a_call_of_the_command_line() -> None:
    modules = [module for _, module, _ in imports(REPOSITORY / "run_jepa.py")]
    assert modules == ["gc", "sys", "jepa_hf.cli.main"]


def test_only_backbones_and_their_heads_know_families() -> None:
    families = {"bert", "distilbert", "roberta", "electra", "deberta-v2", "modernbert", "vit", "ijepa", "dinov2"}
    knowing = {"models.encoder_adapters", "models.mlm_head"}
    lower = [name for name in FILES if name.split(".")[0] not in (*FOLDERS[FOLDERS.index("evaluation") :], *SHARED)]
    for name in sorted({*lower} - knowing - {ROOT}):
        literals = {
            node.value
            for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8")))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert literals & families == set(), name
