"""Is a run that is killed at any moment, and started again with the same command, the undisturbed run?

    python benchmarks/reliability/kill_resume.py --points 50

Runs a tiny model on the CPU once undisturbed; then again and again, each time killed with SIGKILL at random moments of
its start, its steps, its saves and its end, started again with the same command after each kill, and at last left to
finish. Prints a table of the kills, and fails unless all finished runs have the weights and the logged losses of the
undisturbed one, bit for bit, and no kill cost more steps than those since the last save.

Most processes are forked from this one, which has imported everything, and call what `run_jepa.py` calls; `--commands`
of them are that command itself.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "run_jepa.py"
SAVE_STEPS, LIMIT = 5, 2
# Files of a checkpoint.
_PARTS = 9
STEP_LINE = re.compile(r"^step \d+", re.MULTILINE)
RESUMED = re.compile(r"^resuming the unfinished run in .* from checkpoint-(\d+)$", re.MULTILINE)


def command(out: Path, steps: int) -> list[str]:
    """The run's flags: a random start, so that the tokenizer is the run's own, with dropout and the watchdog."""
    flags = f"--smoke_test --max_steps {steps} --save_steps {SAVE_STEPS} --save_total_limit {LIMIT} --logging_steps 1 "
    flags += "--max_train_samples 64 --per_device_train_batch_size 4 --learning_rate 1e-3 --health_steps 25 "
    flags += "--use_cpu --report_to none --disable_tqdm true --seed 7"
    return [*flags.split(), "--output_dir", str(out)]


class Process:
    """A run's process and what it says, in a file."""

    def __init__(self, flags: list[str], log: Path, fork: bool):
        self.log = log
        with log.open("wb") as said:
            if not fork:
                full = [sys.executable, "-u", str(SCRIPT), *flags]
                self.pid = subprocess.Popen(full, stdout=said, stderr=said).pid
                return
            self.pid = os.fork()
            if self.pid:
                return
            for stream in (1, 2):
                os.dup2(said.fileno(), stream)
        code = 99
        try:
            from jepa_hf.cli.train import main

            sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
            code = main(flags)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def ended(self) -> int | None:
        """The exit code, or None while it runs."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def resumed_at(self) -> int:
        found = RESUMED.search(self.said)
        return int(found[1]) if found else 0

    @property
    def step(self) -> int:
        """The last step that it logged."""
        return self.resumed_at + len(STEP_LINE.findall(self.said))


def written(out: Path) -> dict[str, int]:
    """Folders that are being written or deleted, and how many files each holds."""
    found = {}
    for folder in (*out.glob("_*.new"), *out.glob("_*.old")):
        try:
            found[folder.name] = len(list(folder.iterdir())) if folder.is_dir() else 1
        except FileNotFoundError:  # renamed meanwhile
            continue
    return found


def ages(out: Path) -> dict[str, int]:
    """When each of them was last changed."""
    return {name: (out / name).stat().st_mtime_ns for name in written(out)}


def parts_saved(out: Path) -> int:
    """How many files of a checkpoint are there while it is written; -1 where none is being written."""
    return next((count for name, count in written(out).items() if name.startswith("_checkpoint")), -1)


@dataclass
class Kill:
    """One kill: when it was to happen, as what the process had been started, and what it left."""

    run: int
    moment: str
    started_as: str
    step: int
    left: dict[str, int]
    resumed_at: int | None = None

    @property
    def again(self) -> int:
        """Steps that were logged before the kill and had to be done again."""
        return self.step - self.resumed_at


@dataclass
class Seconds:
    """How long parts of the undisturbed run took."""

    start: float
    step: float
    save: float
    end: float


def undisturbed(out: Path, steps: int) -> Seconds:
    begun = time.monotonic()
    process = Process(command(out, steps), out.with_suffix(".log"), fork=True)
    first = last = end = None
    saves: list[float] = []
    saving = None
    while (code := process.ended()) is None:
        now, step = time.monotonic(), process.step
        first = first or (now if step else None)
        last = last or (now if step == steps else None)
        end = end or (now if "_final.new" in written(out) else None)
        if parts_saved(out) >= 0:
            saving = saving or now
        elif saving:
            saves.append(now - saving)
            saving = None
        time.sleep(0.001)
    assert code == 0, process.said
    assert len(saves) > 2, "no saves were seen"
    saves.sort()
    return Seconds(first - begun, (last - first) / steps, saves[len(saves) // 2], time.monotonic() - end)


def moments(count: int, steps: int, seconds: Seconds, chance: random.Random) -> Iterator[tuple[str, Callable]]:
    """For each kill of a run, in the run's order: what it is called, and what waits for it."""

    def after_start(process: Process, out: Path) -> None:
        time.sleep(chance.uniform(0, 1.2 * seconds.start))

    def in_step(process: Process, out: Path, step: int) -> None:
        wait(lambda: process.step >= step, process)
        time.sleep(chance.uniform(0, SAVE_STEPS * seconds.step))

    def in_save(process: Process, out: Path, step: int) -> None:
        wait(lambda: process.step >= step, process)
        for _ in range(3):
            parts = chance.randint(0, _PARTS)
            wait(lambda parts=parts: parts_saved(out) >= parts, process)
            time.sleep(chance.uniform(0, seconds.save / _PARTS))
            os.kill(process.pid, signal.SIGSTOP)
            if parts_saved(out) >= 0:
                return
            os.kill(process.pid, signal.SIGCONT)  # too late: the next save

    def at_end(process: Process, out: Path) -> None:
        parts = chance.randint(1, _PARTS)
        wait(lambda: written(out).get("_final.new", 0) >= parts or (out / "metrics.json").exists(), process)
        time.sleep(chance.choice((0, chance.uniform(0, seconds.end))))

    yield "start", after_start
    inner = count - 3
    at = sorted(chance.sample(range(1, steps - SAVE_STEPS), inner))
    for index, step in enumerate(at):
        if index % 3 == 1:
            yield "step", lambda process, out, step=step: in_step(process, out, step)
        else:
            yield "save", lambda process, out, step=step: in_save(process, out, step)
        if index == inner // 2:
            yield "start", after_start
    yield "end", at_end


def wait(until: Callable[[], bool], process: Process) -> None:
    """Until it is so, or the process has logged all that it will."""
    deadline = time.monotonic() + 120
    while not until():
        assert time.monotonic() < deadline, process.said
        if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(0.0005)


def killed_run(
    run: int, out: Path, steps: int, count: int, seconds: Seconds, as_command: set[int], chance: random.Random
) -> list[Kill]:
    """Kill a run `count` times, starting it again each time, and let it finish."""
    kills: list[Kill] = []
    for index, (moment, until) in enumerate([*moments(count, steps, seconds, chance), ("", None)]):
        fork, before = index not in as_command, ages(out)
        process = Process(command(out, steps), out.with_name(f"{out.name}-{index}.log"), fork)
        if until is None:
            wait(lambda: False, process)
            assert process.ended() == 0, process.said
        else:
            until(process, out)
            process.kill()
        if kills:
            said = process.said
            known = RESUMED.search(said) or "from the beginning" in said or STEP_LINE.search(said)
            # A process that was killed before it said where it goes on says nothing of the kill before it.
            for kill in [kill for kill in kills if kill.resumed_at is None]:
                if known:
                    kill.resumed_at = process.resumed_at
                elif f"The run in {out} is finished" in said:
                    kill.resumed_at = kill.step
        if until is not None:
            step = max([process.step, *(kill.step for kill in kills if kill.resumed_at is None)])
            # Without what the kill before had left, which this process did not come to remove.
            left = {name: count for name, count in written(out).items() if ages(out)[name] != before.get(name)}
            kills.append(Kill(run, moment, "fork" if fork else "command", step, left))
    return kills


def history(out: Path) -> list[dict[str, float]]:
    """What was logged of each step and of health, but for times."""
    entries = json.loads((out / "metrics.json").read_text(encoding="utf-8"))["history"]
    return [entry for entry in entries if "train_runtime" not in entry]


def same(one: Path, other: Path) -> bool:
    from safetensors.torch import load_file

    for name in ("model.safetensors", "jepa/model.safetensors"):
        ours, theirs = load_file(one / name), load_file(other / name)
        if ours.keys() != theirs.keys() or not all(value.equal(theirs[key]) for key, value in ours.items()):
            return False
    return history(one) == history(other)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=50, help="kills in all")
    parser.add_argument("--per_run", type=int, default=10, help="kills of one run")
    parser.add_argument("--steps", type=int, default=63, help="steps of one run")
    parser.add_argument("--commands", type=int, default=5, help="how many processes are run_jepa.py itself")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="where the runs are kept; default a temporary one")
    options = parser.parse_args()
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        os.environ |= {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        os.environ |= {"TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
        import jepa_hf.cli.train  # noqa: F401  before the forks

        begun = time.monotonic()
        seconds = undisturbed(folder / "undisturbed", options.steps)
        print(
            "undisturbed: " + ", ".join(f"{name} {value:.3f} s" for name, value in asdict(seconds).items()), flush=True
        )
        kills: list[Kill] = []
        equal = []
        while len(kills) < options.points:
            run, left = len(equal), options.points - len(kills)
            count = left if left < options.per_run + 4 else options.per_run
            share = round(options.commands * count / options.points)
            out = folder / f"killed-{run}"
            as_command = set(chance.sample(range(count), share))
            kills += killed_run(run, out, options.steps, count, seconds, as_command, chance)
            equal.append(same(out, folder / "undisturbed"))
            print(f"run {run}: {count} kills, {'the same' if equal[-1] else 'OTHER WEIGHTS OR LOSSES'}", flush=True)
        report(kills, equal, time.monotonic() - begun)
        rows = [asdict(kill) | {"again": kill.again} for kill in kills]
        (folder / "kills.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    sys.exit(0 if all(equal) and all(kill.again <= SAVE_STEPS for kill in kills) else 1)


def report(kills: list[Kill], equal: list[bool], seconds: float) -> None:
    print(
        "\n| kill during | kills | of these `run_jepa.py` | inside a save | inside the export | most steps done again |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for moment in ("start", "step", "save", "end", "all"):
        ours = [kill for kill in kills if moment in (kill.moment, "all")]
        saves = sum(any(name.startswith("_checkpoint") for name in kill.left) for kill in ours)
        exports = sum("_final.new" in kill.left for kill in ours)
        commands = sum(kill.started_as == "command" for kill in ours)
        again = max((kill.again for kill in ours), default=0)
        print(f"| {moment} | {len(ours)} | {commands} | {saves} | {exports} | {again} |")
    print(f"\n{sum(equal)} of {len(equal)} runs ended as the undisturbed one; {seconds:.0f} s")


if __name__ == "__main__":
    main()
