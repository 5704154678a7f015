"""Is a run on several ranks the run of one process? Real commands, side by side.

    python benchmarks/reliability/multi_gpu_parity.py --launches ddp fsdp2 zero3 --processes 2 --output ranks
    python benchmarks/reliability/multi_gpu_parity.py --launches ddp --device cpu --steps 6 --output ranks \\
        --config_overrides hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64
    python benchmarks/reliability/multi_gpu_parity.py --big --bf16 --launches ddp fsdp2 zero3 --output big

Each run is `accelerate launch --config_file configs/accelerate/LAUNCH.yaml run_jepa.py configs/quickstart.yaml`, with
dropout 0, no evaluation, whole batches only, and --batch_size rows in each, whatever the number of ranks. What one
process does is the measure: the losses of all steps, the weights at the end. Then each launch

- is resumed, in a new directory that holds what a run killed after the checkpoint of the middle leaves, and compared
  with the run that nothing disturbed;
- is loaded by `AutoModel.from_pretrained` in this process, and compared with the encoder in its full model.

It also prints the target encoder's movement from the middle to the end as a share of the context encoder's movement.

With --bf16 one process, DDP and FSDP2 get the flag, and DeepSpeed the configuration as it is shipped, which asks for
bfloat16 itself; without it DeepSpeed gets a copy that does not. Flags that are not listed here go to run_jepa.py.

--big trains a model whose weights, gradients and moments one GPU does not hold, for a few steps, without writing it
(see `multi_gpu_parity_worker.py`); that DDP runs out of memory there is the expected row.

On a CPU accelerate knows DDP only: another launch becomes DDP without a word, and its row says so.

A line a launch goes to OUTPUT/ranks.jsonl, the logs are next to it, and a table is printed in the end.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModel
from transformers.utils import logging

ROOT = Path(__file__).resolve().parents[2]
CONFIGURATIONS = ROOT / "configs" / "accelerate"
LAUNCHES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
BOUND = 1e-3  # of losses, in nats or whatever a loss is counted in
PARTS = ("context", "target")
SMALL = "hidden_size=384,num_hidden_layers=6,num_attention_heads=12,intermediate_size=1536"
LARGE = "hidden_size=4096,num_hidden_layers=24,num_attention_heads=32,intermediate_size=16384"
NO_DROPOUT = "hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0"

Row = dict[str, Any]
Weights = dict[str, torch.Tensor]


class Failed(Exception):
    """A command ended with another code than 0, or had to be ended; the message is what its log says of it."""


# ---- what is compared


def loss_gap(ours: dict[int, float], theirs: dict[int, float], bound: float = BOUND) -> tuple[float, int | None]:
    """The largest difference of two histories of losses by step, and the first step where it is above `bound`.

    Raises:
        ValueError: they do not have the same steps.

    >>> loss_gap({1: 2.0, 2: 1.5}, {1: 2.0, 2: 1.25})
    (0.25, 2)
    """
    if not ours or ours.keys() != theirs.keys():
        raise ValueError(f"losses of steps {sorted(ours)}, but those of {sorted(theirs)}")
    gaps = {step: abs(ours[step] - theirs[step]) for step in sorted(ours)}
    # A NaN is above every bound, and max would pass it over.
    above = [step for step, gap in gaps.items() if not gap <= bound]
    largest = float("nan") if any(gap != gap for gap in gaps.values()) else max(gaps.values())
    return largest, above[0] if above else None


def weight_gap(ours: Weights, theirs: Weights) -> float:
    """The largest difference of two models' weights.

    Raises:
        ValueError: they do not have the same names and shapes.
    """
    if {name: each.shape for name, each in ours.items()} != {name: each.shape for name, each in theirs.items()}:
        raise ValueError(f"{len(ours)} weights, but {len(theirs)} of other names or shapes")
    return torch.stack([(ours[name] - theirs[name]).abs().max() for name in ours]).max().item()


def distance(ours: Weights, theirs: Weights) -> float:
    """‖ours − theirs‖ over all weights."""
    return torch.stack([(ours[name] - theirs[name]).norm() for name in ours]).norm().item()


def encoder(model: Weights, which: str) -> Weights:
    """The weights of the context or the target encoder, by their names in a plain encoder."""
    prefix = f"{which}_encoder."
    return {name.removeprefix(prefix): each for name, each in model.items() if name.startswith(prefix)}


def error_of(log: str) -> str:
    """The last line of a log that names an error, other than what launchers say of their children; else the last line.

    >>> error_of("step 1\\nRuntimeError: no room\\ntorch.distributed.elastic...ChildFailedError: \\n=====")
    'RuntimeError: no room'
    """
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    named = [line for line in lines if re.search(r"(Error|[Ee]rror:)", line) and not re.search(_LAUNCHERS, line)]
    # What a rank says before its end carries its name under torchrun's --tee: [rank0]: ...
    return re.sub(r"^\[rank\d+\]:\s*", "", (named or lines or ["an empty log"])[-1])


_LAUNCHERS = r"ChildFailedError|CalledProcessError|error_file|raise |^\S*\s*exitcode|torch.distributed.elastic"


# ---- what is run


def last_losses(folder: Path) -> dict[int, float]:
    """A finished run's training losses by step."""
    history = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def final_model(folder: Path) -> Weights:
    return load_file(folder / "jepa" / "model.safetensors")


def loads(folder: Path, held: Weights) -> bool:
    """Whether what is exported loads in this process, bit for bit with the weights that the full model holds.

    A pooler that a class of transformers adds, and that no JEPA has, is left out.
    """
    loaded = AutoModel.from_pretrained(folder).state_dict()
    named = {name for name in loaded if not name.startswith("pooler.")}
    return named == held.keys() and all(torch.equal(loaded[name], held[name]) for name in held)


def ran_on(checkpoint: Path) -> int:
    """How many ranks a checkpoint is of: a launch that accelerate does not know becomes one process without a word."""
    return len(list(checkpoint.glob("rng_state_*.pth"))) or 1


def configuration(launch: str, options: argparse.Namespace) -> Path:
    """The shipped configuration, or where the device or the precision asks for another one, a changed copy of it."""
    shipped = CONFIGURATIONS / f"{launch}.yaml"
    content = yaml.safe_load(shipped.read_text(encoding="utf-8"))
    changed = options.device == "cpu"
    if changed:
        content.pop("gpu_ids", None)
        content["use_cpu"] = True
    if launch.startswith("zero") and not options.bf16:
        asked = json.loads((CONFIGURATIONS / f"{launch}.json").read_text(encoding="utf-8"))
        asked["torch_autocast"]["enabled"] = False
        engine = options.output / f"{launch}.json"
        engine.write_text(json.dumps(asked, indent=2), encoding="utf-8")
        content["deepspeed_config"]["deepspeed_config_file"] = str(engine)
        changed = True
    if not changed:
        return shipped
    copy = options.output / f"{launch}.yaml"
    copy.write_text(yaml.safe_dump(content), encoding="utf-8")
    return copy


def start(launch: str, name: str, command: Sequence[str], options: argparse.Namespace) -> float:
    """Run a command on the ranks of a launch, its words into OUTPUT/NAME.log; returns its seconds.

    Raises:
        Failed: it did not end well, or not in time.
    """
    processes = 1 if launch == "single" else options.processes
    # Not the script: it need not be on the PATH.
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    launcher += ["--config_file", str(configuration(launch, options))]
    launcher += ["--num_processes", str(processes), "--main_process_port", "0"]
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    if options.device == "cpu":
        environment.setdefault("OMP_NUM_THREADS", "1")
    elif processes == 1:
        environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    words = options.output / f"{name}.log"
    begun = time.perf_counter()
    with words.open("w", encoding="utf-8") as log:
        # From the root, which the configurations name their files from.
        child = psutil.Popen([*launcher, *command], cwd=ROOT, env=environment, stdout=log, stderr=log)
        try:
            code = child.wait(options.timeout)
        except psutil.TimeoutExpired:
            raise Failed(f"still running after {options.timeout:g} s") from None
        finally:
            end(child)
    if code != 0:
        raise Failed(error_of(words.read_text(encoding="utf-8", errors="replace")))
    return time.perf_counter() - begun


def end(child: psutil.Popen) -> None:
    """Kill a command, if it runs, and all that it started: torchrun puts each rank into a session of its own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in (child, *child.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    child.wait()


def train(launch: str, name: str, options: argparse.Namespace) -> float:
    """Run run_jepa.py on the ranks of a launch, into OUTPUT/NAME; returns the seconds of the whole command."""
    processes = 1 if launch == "single" else options.processes
    flags = {
        "config_overrides": f"max_position_embeddings=128,{options.config_overrides},{NO_DROPOUT}",
        "per_device_train_batch_size": options.batch_size // processes,
        "max_steps": options.steps,
        "save_steps": options.steps // 2,
        "save_total_limit": 3,
        "logging_steps": 1,
        "seed": options.seed,
        "ema_decay": options.ema_decay,
        "report_to": "none",
        "output_dir": options.output.resolve() / name,
    }
    command = ["run_jepa.py", "configs/quickstart.yaml", *(word for flag in flags.items() for word in named(*flag))]
    command += ["--do_eval", "false", "--eval_on_start", "false", "--eval_strategy", "no"]
    # An epoch's last batch is smaller; ranks would fill theirs up with rows that they have read.
    command += ["--dataloader_drop_last", "true"]
    if options.bf16 and not launch.startswith("zero"):
        command.append("--bf16")
    if options.device == "cpu":
        command.append("--use_cpu")
    return start(launch, name, [*command, *options.flags], options)


def named(flag: str, value: Any) -> tuple[str, str]:
    return f"--{flag}", str(value)


def killed(finished: Path, step: int, into: Path) -> None:
    """Make of a finished run's checkpoint what the same run leaves that is killed after it."""
    checkpoint = f"checkpoint-{step}"
    shutil.copytree(finished / checkpoint, into / checkpoint)
    run = json.loads((finished / "_run.json").read_text(encoding="utf-8"))
    (into / "_run.json").write_text(json.dumps({**run, "finished": False}), encoding="utf-8")


def measure(launch: str, options: argparse.Namespace, row: Row) -> None:
    """Train, compare, load, resume; what is found goes into the row at once, so that a later failure leaves it.

    Raises:
        Failed: a command did not end well.
    """
    folder, one = options.output / launch, options.output / "single"
    row["seconds"] = train(launch, launch, options)
    losses, model = last_losses(folder), final_model(folder)
    row["steps"] = len(losses)
    others = {"single": one, "ddp": options.output / "ddp"}
    for other, place in others.items():
        if place == folder or not (place / "metrics.json").exists():
            continue
        theirs = final_model(place)
        row[f"loss_{other}"], row[f"above_{other}"] = loss_gap(losses, last_losses(place))
        pairs = {part: (encoder(model, part), encoder(theirs, part)) for part in PARTS}
        row[f"weights_{other}"] = {part: weight_gap(*pair) for part, pair in pairs.items()}
    checkpoint = folder / f"checkpoint-{options.steps // 2}"
    row["ran_on"] = ran_on(checkpoint)
    middle = load_file(checkpoint / "model.safetensors")
    moved = {part: distance(encoder(model, part), encoder(middle, part)) for part in PARTS}
    row["target_moved"] = moved["target"] / moved["context"]
    row["export"] = loads(folder, encoder(model, "context"))
    if not options.skip_resume:
        resumed = options.output / f"{launch}-resumed"
        killed(folder, options.steps // 2, resumed)
        try:
            row["resume_seconds"] = train(launch, resumed.name, options)
        except Failed as failure:
            row["resume_failed"] = str(failure)
            return
        row["resume_loss"], _ = loss_gap(last_losses(resumed), losses)
        row["resume_weights"] = weight_gap(final_model(resumed), model)


def measure_big(launch: str, options: argparse.Namespace, row: Row) -> None:
    """Train a few steps without writing anything.

    Raises:
        Failed: the command did not end well.
    """
    results = options.output.resolve() / f"{launch}.json"
    flags = {
        "config_overrides": f"{options.config_overrides},{NO_DROPOUT}",
        "steps": options.steps,
        "batch_size": options.batch_size // options.processes,
        "output": results,
        "seed": options.seed,
    }
    command = [
        "benchmarks/reliability/multi_gpu_parity_worker.py",
        *(word for flag in flags.items() for word in named(*flag)),
    ]
    if options.bf16 and not launch.startswith("zero"):
        command.append("--bf16")
    if options.device == "cpu":
        command.append("--use_cpu")
    row["seconds"] = start(launch, launch, command, options)
    row |= json.loads(results.read_text(encoding="utf-8"))


# ---- what is said


def number(value: float | None) -> str:
    """
    >>> number(0.0), number(0.000123), number(None)
    ('0', '1.2e-04', '')
    """
    return "" if value is None else "0" if value == 0 else f"{value:.1e}"


def loss_cell(row: Row, other: str) -> str:
    """How far a launch's losses are from another's, and since when too far; empty without another."""
    above = row.get(f"above_{other}")
    return number(row.get(f"loss_{other}")) + ("" if above is None else f", above {BOUND:g} from step {above}")


def table(rows: Sequence[Row]) -> str:
    """The rows of `ranks.jsonl` as Markdown."""
    lines = [
        "| launch | processes | loss, to one process | loss, to DDP | weights, to one process (context, target) | "
        "target moved | resumed (loss, weights) | export | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        head = f"| {row['launch']} | {row['processes']} |"
        if "failed" in row:
            lines.append(f"{head} failed: {row['failed'].replace('|', '/')} | | | | | | |")
            continue
        if row["ran_on"] != row["processes"]:
            head = f"| {row['launch']}, which ran on {row['ran_on']} | {row['processes']} |"
        losses = [loss_cell(row, other) for other in ("single", "ddp")]
        weights = ", ".join(number(row["weights_single"][part]) for part in PARTS)
        if "resume_loss" in row:
            exact = row["resume_loss"] == row["resume_weights"] == 0
            resumed = "bit for bit" if exact else f"{number(row['resume_loss'])}, {number(row['resume_weights'])}"
        else:
            resumed = f"failed: {row['resume_failed'].replace('|', '/')}" if "resume_failed" in row else "not tried"
        lines.append(
            f"{head} {' | '.join(losses)} | {weights} | "
            f"{row['target_moved']:.4f} | {resumed} | {'bit for bit' if row['export'] else 'differs'} | "
            f"{row['seconds']:.0f} |"
        )
    return "\n".join(lines)


def big_table(rows: Sequence[Row]) -> str:
    """The rows of `ranks.jsonl` of --big as Markdown."""
    lines = [
        "| launch | processes | parameters of an encoder | states of one replica, GiB | most on a rank, GiB | "
        "losses | seconds a step, the first left out | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        head = f"| {row['launch']} | {row['processes']} |"
        if "failed" in row:
            lines.append(f"{head} failed: {row['failed'].replace('|', '/')} | | | | | |")
            continue
        losses = ", ".join(f"{loss:.4f}" for loss in row["losses"])
        lines.append(
            f"{head} {row['parameters'] / 1e9:.2f} billion | {row['states_gib']:.1f} | "
            f"{max(row['peak_gib']):.1f} | {losses} | {row['step_s']:.2f} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--launches", nargs="+", choices=LAUNCHES, default=["ddp", "fsdp2", "zero3"])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, help="default 50, with --big 3")
    parser.add_argument("--batch_size", type=int, help="of all ranks together, default 32, with --big 8 for each rank")
    parser.add_argument("--config_overrides", help=f"the encoder, default {SMALL}, with --big {LARGE}")
    parser.add_argument("--ema_decay", type=float, default=0.999)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--skip_resume", action="store_true")
    parser.add_argument("--big", action="store_true")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds that one command may take, default 300")
    parser.add_argument("--output", type=Path, required=True, help="a new directory")
    options, options.flags = parser.parse_known_args()
    options.steps = options.steps or (3 if options.big else 50)
    options.batch_size = options.batch_size or (8 * options.processes if options.big else 32)
    options.config_overrides = options.config_overrides or (LARGE if options.big else SMALL)
    if options.batch_size % options.processes:
        parser.error(f"batch_size {options.batch_size} cannot be divided among {options.processes} processes")
    if options.steps < 2:
        parser.error(f"steps must be at least 2, not {options.steps}")
    if options.device == "cpu" and "fsdp2" in options.launches:
        parser.error("accelerate divides parameters on GPUs alone, and would run DDP on a CPU: leave fsdp2 out")
    if options.steps % 2 and not options.big:
        parser.error(f"steps must be an even number, for the checkpoint of the middle, not {options.steps}")
    if options.big and options.flags:
        parser.error(f"unknown flag {options.flags[0]}")
    if options.output.exists() and any(options.output.iterdir()):
        parser.error(f"output {str(options.output)!r} is not empty; name a new directory")
    options.launches.sort(key=lambda launch: launch != "ddp")  # which the others are compared with
    return options


def main() -> None:
    """Run, compare, print."""
    options = parse()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options.output.mkdir(parents=True, exist_ok=True)
    if not options.big:
        try:
            print(f"one process: {train('single', 'single', options):.0f} s", flush=True)
        except Failed as failure:
            sys.exit(f"one process, which all are compared with, failed: {failure}")
    rows = []
    for launch in options.launches:
        row: Row = {"launch": launch, "processes": options.processes, "device": options.device, "bf16": options.bf16}
        try:
            (measure_big if options.big else measure)(launch, options, row)
        except (Failed, ValueError, OSError) as failure:  # the last two: a run that left less than it should have
            row["failed"] = str(failure)
        rows.append(row)
        with (options.output / "ranks.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
    print((big_table if options.big else table)(rows))


if __name__ == "__main__":
    main()
