"""Running the commands: in this process where that is enough, in one of their own where exit codes are at stake."""

import contextlib
import hashlib
import io
import os
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from helpers.pictures import rendered
from helpers.processes import run_python
from jepa_hf.cli.train import main

REPOSITORY = Path(__file__).resolve().parents[2]
QUIET = ("--use_cpu", "--report_to", "none", "--disable_tqdm", "true")


# Start of a script that proves something about a place without the package.
WITHOUT_JEPA_HF = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "jepa_hf":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
try:
    import jepa_hf
except ModuleNotFoundError:
    pass
else:
    sys.exit("jepa_hf is importable: this proves nothing")
"""


class SimulatedKill(BaseException):
    """Ends a run in this process as a kill would end its own: nothing catches it."""


def train(*argv: str | Path, pictures: bool = False) -> str:
    """Run `run_jepa.py ...` here, on CPU; returns what it said on stdout.

    Figures are made in any case, but rendered for `pictures` only.
    """
    output = io.StringIO()
    rendering = rendered() if pictures else contextlib.nullcontext()
    with contextlib.redirect_stdout(output), rendering:
        assert main([*map(str, argv), *QUIET]) == 0
    return output.getvalue()


def start_process(
    *command: str | Path, cwd: Path, fresh: bool = False, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a Python command in a process of its own that cannot reach the Hub.

    Args:
        fresh: It imports torch and transformers itself (5 s), for tests of imports, of their warnings, and of
            variables that are read then.
    """
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    fixed = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    variables = {**os.environ, **fixed, **environment}
    arguments = [str(argument) for argument in command]
    if not fresh:
        return subprocess.CompletedProcess(arguments, *run_python(arguments, variables, cwd))
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=240, check=False, env=variables
    )


def snapshot(folder: Path) -> dict[str, tuple[int, str]]:
    """Every file and folder below `folder`: when it was last changed, and a hash of its content."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
        )
        for path in sorted(folder.rglob("*"))
    }


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    """Bit for bit."""
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    assert [name for name, value in ours.items() if not value.equal(theirs[name])] == []
