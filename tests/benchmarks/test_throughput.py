"""Claims about `benchmarks/speed/throughput.py`, the measure of speed."""

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from helpers.cli import REPOSITORY
from helpers.processes import forked_python

SCRIPT = REPOSITORY / "benchmarks" / "speed" / "throughput.py"


@pytest.fixture(scope="module")
def throughput() -> Iterator[ModuleType]:
    sys.path.insert(0, str(SCRIPT.parent))
    yield importlib.import_module("throughput")
    sys.path.remove(str(SCRIPT.parent))


@pytest.fixture
def command(
    throughput: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """What `throughput.py` prints, called with flags in this process; the cells have processes of their own."""

    def run(*argv: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, argv)])
        throughput.main()
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize(
    ("loop", "num_masks"), [("jepa-dropped", 1), ("jepa-dropped", 2), ("jepa-kept", 1), ("article", 1), ("mlm", 1)]
)
def test_a_step_is_counted_as_torch_counts_it(loop: str, num_masks: int, throughput: ModuleType) -> None:
    """The floating-point operations of a cell are those of its loop's matrix products, forward and backward."""
    cell = throughput.Cell(loop, "tiny", length=32, batch_size=4, num_masks=num_masks)
    counter = FlopCounterMode(display=False)
    counted = []

    class Counting:
        """In the place of `Windows`: counts the second step."""

        ema = throughput.Stopwatch(torch.device("cpu"))

        def step_begin(self) -> None:
            if not counted:
                counter.__enter__()

        def step_end(self) -> bool:
            counter.__exit__(None, None, None)
            counted.append(counter.get_total_flops())
            return True

    with sdpa_kernel(SDPBackend.MATH):  # whose products are seen one by one
        throughput.train(cell, torch.device("cpu"), Counting(), workers=0, seed=0)
    assert counted == [pytest.approx(throughput.flops(cell), rel=1e-3)]


@pytest.mark.slow
def test_one_command_gives_rows_and_the_table(command: Callable[..., str], tmp_path: Path) -> None:
    """Two loops in turns: the requested number of windows each, compared with each other and with the floor."""
    output = tmp_path / "rows.jsonl"
    flags = ["--sizes", "tiny", "--lengths", "16", "--batch_sizes", "2", "--repeats", "2", "--seconds", "0"]
    flags += ["--loops", "jepa-dropped", "article", "--warmup", "1", "--threads", "1", "--device", "cpu"]
    with forked_python():
        printed = command("run", *flags, "--output", output)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    windows = [(row["cell"]["loop"], row["round"]) for row in rows if row["kind"] == "window"]
    assert windows == [("jepa-dropped", 0), ("article", 0), ("article", 1), ("jepa-dropped", 1)]
    assert [row["kind"] for row in rows].count("rates") == 2
    for row in rows:
        if row["kind"] == "window":
            assert 0 < row["ema_s"] + row["data_s"] < row["step_s"]
            assert 0.1 < row["memory_gib"] < 10
    ours, theirs = (
        {row["round"]: row["step_s"] for row in rows if row["kind"] == "window" and row["cell"]["loop"] == loop}
        for loop in ("jepa-dropped", "article")
    )
    ratios = sorted(theirs[number] / ours[number] for number in (0, 1))
    line = next(line for line in printed.splitlines() if "| jepa-dropped fp32 |" in line)
    assert f"| {sum(ratios) / 2:.2f} [{ratios[0]:.2f}, {ratios[1]:.2f}] |" in line
    table = command("table", output)
    assert line in table
    assert table in printed


def test_masks_are_compared(command: Callable[..., str]) -> None:
    """Both ways of masking, at each length, with a ratio; ours is the faster even in a hundredth of a second."""
    flags = ["--lengths", "128", "--repeats", "2", "--seconds", "0.01"]
    lines = [line.split(" | ") for line in command("masks", *flags).splitlines()[2:]]
    assert [line[0].strip("| ") for line in lines] == ["from ids to the masked view", "spans alone"]
    for line in lines:
        assert float(line[5].split(" ")[0]) > 3


def test_communication_during_computation_is_not_exposed(throughput: ModuleType) -> None:
    """Of two ranks' words, one under a product and one half beyond it, the half is exposed."""
    busy = [(0.0, 10.0, "gemm"), (2.0, 6.0, "ncclDevKernel_AllReduce"), (8.0, 12.0, "ncclDevKernel_AllReduce")]
    assert throughput.communication(busy) == {
        "communication_s": pytest.approx(8e-6),
        "exposed_s": pytest.approx(2e-6),
    }
    assert throughput.communication(busy[:1]) == {"communication_s": 0.0, "exposed_s": 0.0}


def test_ranks_are_compared_with_one_process(throughput: ModuleType) -> None:
    """All tokens of all ranks count, and the efficiency is that of the same cell in one process, in the same turns."""
    alone = {"loop": "jepa-dropped", "size": "tiny", "length": 16, "batch_size": 2}
    two = alone | {"launch": "ddp", "processes": 2}
    rows = []
    for cell, step_s in ((alone, 1.0), (two, 1.25)):
        rows.append({"kind": "started", "cell": cell, "flops": 1.0, "bytes": 1.0, "graphs": 0})
        window = {"kind": "window", "cell": cell, "round": 0, "step_s": step_s, "data_s": 0.0, "ema_s": 0.0}
        rows.append(window | {"memory_gib": 1.0, "recompiled": 0})
    spoken = {"busy_s": 1.0, "communication_s": 0.25, "exposed_s": 0.125, "step_s": 1.25}
    rows.append({"kind": "profile", "cell": two, **spoken})
    rows.append({"kind": "rates", "place": ["tiny", 16, 2], "round": 0, "fp32_flops": 1.0, "copy_bytes": 1.0})
    *_, one, other = throughput.table(rows).splitlines()
    assert " 32 [32, 32] " in one
    assert " 51 [51, 51] " in other
    assert other.endswith("| 0.80 [0.80, 0.80] | 20.0 % | 10.0 % |")
