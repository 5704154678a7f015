"""The package's metadata is true: lower bounds, types, licence."""

import tomllib
from importlib.resources import files

import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from helpers.cli import REPOSITORY
from jepa_hf import __version__

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# torch's oldest builds need gigabytes of CUDA libraries: CI runs with the newest CPU build only. The documentation's
# site is built with the newest packages, as are the other tools of a developer.
UNTESTED_LOWER_BOUNDS = {"torch", "mkdocs", "mkdocs-material", "mkdocstrings", "mypy", "pre-commit", "types-PyYAML"}
UNTESTED_LOWER_BOUNDS |= {"onnx", "onnxruntime", "onnxscript"}


def requirements() -> list[Requirement]:
    """Return all dependencies, of extras too, without the extras of this package that `dev` names."""
    lines = [*PROJECT["dependencies"], *(line for lines in PROJECT["optional-dependencies"].values() for line in lines)]
    return [requirement for requirement in map(Requirement, lines) if requirement.name != PROJECT["name"]]


def lower_bounds() -> dict[str, Version]:
    """Return the lower bound of each dependency that has one."""
    return {
        requirement.name: Version(specifier.version)
        for requirement in requirements()
        for specifier in requirement.specifier
        if specifier.operator in (">=", "==")
    }


def test_every_dependency_has_a_lower_bound() -> None:
    assert lower_bounds().keys() == {requirement.name for requirement in requirements()}


def test_dev_names_extras_that_exist() -> None:
    """`dev` installs the tools of the tests and of the site."""
    own = [Requirement(line) for line in PROJECT["optional-dependencies"]["dev"] if line.startswith(PROJECT["name"])]
    assert own[0].extras == {"test", "docs"} <= PROJECT["optional-dependencies"].keys()


def test_the_lower_bounds_are_those_that_ci_installs() -> None:
    """.ci/constraints-oldest.txt pins each dependency to its bound in pyproject.toml."""
    lines = (REPOSITORY / ".ci" / "constraints-oldest.txt").read_text(encoding="utf-8").splitlines()
    pinned = {}
    for line in lines:
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            pinned[name] = Version(version)
    bounds = {name: bound for name, bound in lower_bounds().items() if name not in UNTESTED_LOWER_BOUNDS}
    assert {name: pinned.get(name) for name in bounds} == bounds


def test_types_come_with_the_package() -> None:
    """PEP 561: type checkers read the hints of a package that holds this file."""
    assert files("jepa_hf").joinpath("py.typed").is_file()
    configuration = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    assert "py.typed" in configuration["tool"]["setuptools"]["package-data"]["jepa_hf"]


def test_licence_and_citation_are_the_packages() -> None:
    """The licence's text is the one that pyproject.toml names, and what to cite is this version."""
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License" in (REPOSITORY / "LICENSE").read_text(encoding="utf-8")
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["license"] == "Apache-2.0"
    assert citation["version"] == __version__
    assert "[Unreleased]" in (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
