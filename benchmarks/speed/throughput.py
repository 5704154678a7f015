"""Training speed compared with other loops and with the floor. Cells side by side, in turns, on one machine.

    python benchmarks/speed/throughput.py run --loops jepa-dropped jepa-kept article mlm --sizes 6x384 --lengths 128 512
    python benchmarks/speed/throughput.py table rows.jsonl
    python benchmarks/speed/throughput.py profile --loops jepa-dropped --sizes bert-base --steps 5
    python benchmarks/speed/throughput.py masks

A cell is a loop at one size, length, batch size and precision. The loops:

- jepa-dropped: `JepaTrainer.train()` with its collator and data loader and the default objective.
- jepa-kept: the same with the article's objective ([MASK] tokens, an MLP predictor, the last layer, cosine).
- article: a plain loop as the span-JEPA article's script has it, in float32: masks drawn token by token in Python, a
  predictor over all positions, boolean indexing, plain AdamW, the EMA parameter by parameter, `loss.item()` each step.
  Its texts come as token ids, so that it is spared the tokeniser.
- mlm: transformers' `Trainer` and collator with `BertForMaskedLM`.

Each cell has a process of its own, which warms up once and then trains window after window, in turns with the others of
its size and length: what else happens on the machine meets all of them, and a ratio of neighbouring windows has a
spread. Clocks are read at step ends, the device synchronised at the two ends of a window and nowhere between. Matrix
rate and copy bandwidth are measured in the same turns. On a CPU that others use too the ratio of CPU seconds, of all
threads together, is the steadier one. Rows are written as JSON lines as they come, then the table.

Tokens are random, all of them real; no file and no tokenizer is needed.
"""

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import torch
import transformers
from torch.autograd import DeviceType
from training_loops import (
    LOOPS,
    MASK,
    MEAN_SPAN,
    SIZES,
    SPECIAL,
    Cell,
    RandomTokens,
    Row,
    Stopwatch,
    Windows,
    article_mask,
    article_view,
    train,
)
from transformers import BertForMaskedLM, BertModel

from jepa_hf import JepaForRepresentationPrediction
from jepa_hf.masking.counter_rng import row_keys
from jepa_hf.masking.span_sampling import sample_span_mask

ROOT = Path(__file__).resolve().parents[2]

# ---- the floor


def flops(cell: Cell) -> float:
    """Of one step's matrix products, those of attention included: 2 for a multiplication and addition, once forward
    and twice backward. Whatever a loop computes in vain (logits or guesses where nobody asks) counts as its own."""
    width, layers, _, inner, vocabulary = SIZES[cell.size]
    tokens, length = cell.batch_size * cell.length, cell.length

    def transformer(width: int, inner: int, layers: int, tokens: float, seen: float) -> float:
        return layers * tokens * (2 * (4 * width**2 + 2 * width * inner) + 4 * seen * width)

    whole = transformer(width, inner, layers, tokens, length)
    if cell.loop == "mlm":
        return 3 * (whole + tokens * 2 * (width**2 + width * max(vocabulary, 512)))
    jepa = cell.jepa
    if cell.loop == "article":
        return 4 * whole + 3 * tokens * 2 * 8 * width**2
    hidden = cell.mask_ratio * (length - 2) / length
    guessed = hidden * tokens
    if jepa.masked_tokens == "drop":
        seen = (1 - hidden) * length
        context = transformer(width, inner, layers, (1 - hidden) * tokens, seen)
    else:
        context = whole
    if jepa.predictor_type == "mlp":
        predictor = guessed * 2 * 2 * jepa.pred_mlp_ratio * width**2
    else:
        narrow = jepa.pred_hidden_size
        read = tokens if jepa.masked_tokens == "drop" else tokens + guessed
        inner, seen = round(narrow * jepa.pred_mlp_ratio), read / cell.batch_size
        predictor = transformer(narrow, inner, jepa.pred_num_hidden_layers - 1, read, seen)
        # The last layer has keys and values of all, and the rest of the targets alone.
        predictor += read * 4 * narrow**2 + guessed * (4 * narrow**2 + 4 * narrow * inner + 4 * seen * narrow)
        predictor += 2 * width * narrow * read
    return whole / cell.num_masks + 3 * (context + predictor)


def moved_bytes(cell: Cell, trained: int, averaged: int) -> float:
    """Memory traffic of a perfect program without matrix products: AdamW reads weight, gradient and both moments and
    writes all but the gradient (7 float32), and the EMA reads two weights and writes one."""
    return 4 * (7 * trained + (0 if cell.loop == "mlm" else 3 * averaged))


def parameters(cell: Cell) -> tuple[int, int]:
    """How many are trained, and how many are averaged."""
    with torch.device("meta"):
        if cell.loop == "mlm":
            return sum(each.numel() for each in BertForMaskedLM(cell.encoder).parameters()), 0
        encoder = BertModel(cell.encoder, add_pooling_layer=False)
        model = JepaForRepresentationPrediction(cell.jepa)
    size = sum(each.numel() for each in encoder.parameters())
    return size + sum(each.numel() for each in model.predictor.parameters()), size


def rates(device: torch.device, precisions: Sequence[str], seconds: float = 0.3) -> Row:
    """Floating-point operations per second of one large matrix product, in each precision, and bytes per second of a
    copy, reading and writing counted."""
    size = 8192 if device.type == "cuda" else 1024
    row: Row = {"kind": "rates"}
    for precision in precisions:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        one, other = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        row[f"{precision}_flops"] = 2 * size**3 / seconds_of(lambda a=one, b=other: a @ b, device, seconds)
    numbers = torch.zeros(2**28 if device.type == "cuda" else 2**25, device=device)
    into = torch.empty_like(numbers)
    row["copy_bytes"] = 2 * 4 * numbers.numel() / seconds_of(lambda: into.copy_(numbers), device, seconds)
    return row


def seconds_of(work: Callable[[], Any], device: torch.device, at_least: float) -> float:
    """Seconds of one call, the mean over as many as fill the time."""
    work()
    stopwatch, total, calls = Stopwatch(device), 0.0, 1
    while True:
        with stopwatch:
            for _ in range(calls):
                work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        total = stopwatch.read()
        if total >= at_least:
            return total / calls
        calls = max(2 * calls, math.ceil(1.2 * calls * at_least / max(total, 1e-6)))


# ---- profiles


def intervals(events: Sequence[Any], device: torch.device) -> list[tuple[float, float, str]]:
    """Begin, end (microseconds) and name of what occupied the device; of a CPU, of the outermost operators."""
    if device.type == "cuda":
        selected = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    else:
        selected = [event for event in events if event.cpu_parent is None and "::" in event.name]
    return sorted((event.time_range.start, event.time_range.end, event.name) for event in selected)


def gaps(busy: list[tuple[float, float, str]]) -> list[tuple[float, str]]:
    """Between what occupied the device: each gap's length and what ended it."""
    selected, end = [], busy[0][1]
    for begin, until, name in busy:
        if begin > end:
            selected.append((begin - end, name))
        end = max(end, until)
    return selected


def communication(busy: list[tuple[float, float, str]]) -> Row:
    """Seconds of communication, and those of them without computation."""
    others = [each for each in busy if "nccl" not in each[2].lower()]
    speaking = busy_seconds([each for each in busy if "nccl" in each[2].lower()])
    return {"communication_s": speaking, "exposed_s": busy_seconds(busy) - busy_seconds(others)}


def busy_seconds(busy: list[tuple[float, float, str]]) -> float:
    """Length of the union."""
    if not busy:
        return 0.0
    whole = max(end for _, end, _ in busy) - busy[0][0]
    return (whole - sum(length for length, _ in gaps(busy))) / 1e6


# The operators that make the host wait for the device, or would on a GPU.
WAITING = ("aten::_local_scalar_dense", "aten::nonzero", "cudaStreamSynchronize", "cudaDeviceSynchronize")
WAITING += ("cudaEventSynchronize", "cudaMemcpyAsync", "cudaLaunchKernel")


def show_profile(events: Sequence[Any], device: torch.device, steps: int, step_s: float) -> str:
    """Top operations, gaps, what the host does and what it waits for, per step, as tables."""
    busy = intervals(events, device)
    times: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    if device.type == "cuda":
        for begin, end, name in busy:
            times[name][0] += end - begin
            times[name][1] += 1
    else:
        for event in (event for event in events if "::" in event.name):
            times[event.name][0] += event.self_cpu_time_total
            times[event.name][1] += 1
    total = sum(spent for spent, _ in times.values())
    lines = [f"Step {1000 * step_s:.2f} ms, device busy {1000 * busy_seconds(busy) / steps:.2f} ms", ""]
    lines += ["| operation | ms per step | share | calls per step |", "|" + " --- |" * 4]
    for name, (spent, calls) in sorted(times.items(), key=lambda item: -item[1][0])[:20]:
        lines.append(
            f"| {name[:100]} | {spent / 1000 / steps:.3f} | {100 * spent / total:.1f} % | {calls / steps:.1f} |"
        )
    waits: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for length, name in gaps(busy):
        waits[name][0] += length
        waits[name][1] += 1
    lines += ["", "| gap before | ms per step | gaps per step |", "|" + " --- |" * 3]
    for name, (spent, count) in sorted(waits.items(), key=lambda item: -item[1][0])[:10]:
        lines.append(f"| {name[:100]} | {spent / 1000 / steps:.3f} | {count / steps:.1f} |")
    if device.type == "cuda":
        worked: dict[str, float] = defaultdict(float)
        for event in (event for event in events if event.device_type == DeviceType.CPU):
            worked[event.name] += event.self_cpu_time_total
        lines += ["", "| the host works on | ms per step |", "|" + " --- |" * 2]
        for name, spent in sorted(worked.items(), key=lambda item: -item[1])[:20]:
            lines.append(f"| {name[:100]} | {spent / 1000 / steps:.3f} |")
    lines += ["", "| what the host waits for or launches | calls per step |", "|" + " --- |" * 2]
    for name in WAITING:
        lines.append(f"| {name} | {sum(event.name == name for event in events) / steps:.1f} |")
    return "\n".join(lines)


def show_cell(cell: Cell, options: argparse.Namespace) -> None:
    """Train a cell here and print its profile."""
    device = torch.device(options.device)
    rows: list[Row] = []
    commands = iter([("window", options.steps), ("profile", options.steps)])
    windows = Windows(device, options.warmup, commands, rows.append, host=True)
    train(cell, device, windows, options.workers, options.seed)
    done, steps = rows[-1]["profile"]
    print(f"{cell.name}, {cell.size}, {cell.batch_size} x {cell.length}\n")
    print(show_profile(done.events(), device, steps, rows[-2]["step_s"]))


# ---- a cell's process, and the one that gives the word


def serve(cell: Cell | None, options: argparse.Namespace) -> None:
    """Do what standard input says, a JSON line each, and answer on what was standard output. Of several ranks the
    first one reads, sends the answer to the others, and returns it."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the libraries print
    device = torch.device(options.device)
    first, alone = os.environ.get("RANK", "0") == "0", os.environ.get("WORLD_SIZE", "1") == "1"

    def orders() -> Iterator[tuple[Any, ...]]:
        # Not through NCCL: who waits there keeps its GPU busy, which other cells' windows would feel.
        group = None if alone else torch.distributed.new_group(backend="gloo")
        while True:
            commands = [sys.stdin.readline() if first else ""]
            if not alone:
                torch.distributed.broadcast_object_list(commands, group=group, device=torch.device("cpu"))
            if not commands[0]:
                return
            yield tuple(json.loads(commands[0]))

    def answer(row: Row) -> None:
        if "profile" in row:
            done, steps = row.pop("profile")
            busy = intervals(done.events(), device)
            selected = {"busy_s": busy_seconds(busy), **({} if alone else communication(busy))}
            row |= {name: seconds / steps for name, seconds in selected.items()}
        if first:
            answers.write(json.dumps(row) + "\n")
            answers.flush()

    if cell is None:
        answer({"kind": "warm"})
        for _, precisions in orders():
            answer(rates(device, precisions))
            if device.type == "cuda":
                torch.cuda.empty_cache()
    else:
        train(cell, device, Windows(device, options.warmup, orders(), answer), options.workers, options.seed)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def launcher(cell: Cell | None) -> list[str]:
    """What stands between Python's name and the program's."""
    if cell is None or not cell.launch:
        return []
    config = ROOT / "configs" / "accelerate" / f"{cell.launch}.yaml"
    numbers = ["--num_processes", str(cell.processes), "--main_process_port", "0"]
    return ["-m", "accelerate.commands.launch", "--config_file", str(config), *numbers]


class Process:
    """A cell in a process of its own; without a cell, the device's rates."""

    def __init__(self, cell: Cell | None, options: argparse.Namespace):
        self.cell = cell
        program = str(Path(__file__).resolve())
        command = [sys.executable, *launcher(cell), program, "cell", "--cell", json.dumps(cell and asdict(cell))]
        for name in ("device", "warmup", "workers", "seed"):
            command += [f"--{name}", str(getattr(options, name))]
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "TRANSFORMERS_VERBOSITY": "error"}
        environment["PYTHONWARNINGS"] = "ignore"
        if options.device == "cuda":  # one process that sees several is refused
            seen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
            processes = 1 if cell is None else cell.processes
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(seen.split(",")[:processes])
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment,
            cwd=ROOT,
        )

    def read(self) -> Row | None:
        """Its next answer; None where it died. What started the ranks may have more to say."""
        return next((json.loads(line) for line in self.process.stdout if line.startswith("{")), None)

    def ask(self, *order: Any) -> Row | None:
        try:
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return None
        return self.read()

    def last_words(self) -> str:
        """The last line about an error; the launcher prints more after it."""
        self.log.seek(0)
        lines = self.log.read().strip().splitlines() or ["without a word"]
        return next((line for line in reversed(lines) if "Error" in line), lines[-1])

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def run(cells: list[Cell], options: argparse.Namespace) -> list[Row]:
    """Work through the cells, those of a place in turns."""
    output = Path(options.output)
    rows: list[Row] = []

    def write(row: Row) -> None:
        rows.append(row)
        with output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    write({"kind": "machine", **machine(options)})
    precisions = sorted({cell.precision for cell in cells})
    for place in dict.fromkeys(cell.place for cell in cells):
        floor = Process(None, options)
        floor.read()
        processes, steps = [], {}
        here, together = [cell for cell in cells if cell.place == place], options.warm_together
        for group in (here[first : first + together] for first in range(0, len(here), together)):
            begin = time.perf_counter()
            for process in [Process(cell, options) for cell in group]:
                cell = process.cell
                warm = process.read()
                if warm is None:
                    write({"kind": "failed", "cell": asdict(cell), "why": process.last_words()})
                    print(f"{cell.name} FAILED: {process.last_words()}", flush=True)
                    continue
                trial = process.ask("window", 2) or {"step_s": options.seconds}
                steps[cell.name] = max(2, round(options.seconds / trial["step_s"]))
                trained, averaged = parameters(cell)
                facts = {"flops": flops(cell), "bytes": moved_bytes(cell, trained, averaged), "parameters": trained}
                seconds = time.perf_counter() - begin
                facts |= {"place": place, "seconds": round(seconds, 1), "graphs": warm["graphs"]}
                write({"kind": "started", "cell": asdict(cell), **facts})
                print(f"{place}: {cell.name} is warm after {seconds:.0f} s", flush=True)
                processes.append(process)
        for number in range(options.repeats):
            measured = floor.ask("rates", precisions)
            write({**(measured or {"kind": "failed", "why": floor.last_words()}), "place": place, "round": number})
            for process in processes if number % 2 == 0 else processes[::-1]:
                row = process.ask("window", steps[process.cell.name])
                write(
                    {
                        **(row or {"kind": "failed", "why": process.last_words()}),
                        "cell": asdict(process.cell),
                        "round": number,
                    }
                )
        if options.device == "cuda":
            for process in processes:
                row = process.ask("profile", min(steps[process.cell.name], 5))
                if row is not None:
                    write({**row, "cell": asdict(process.cell)})
        for process in (floor, *processes):
            process.end()
    return rows


def machine(options: argparse.Namespace) -> Row:
    """What the rows were measured on, and with."""
    cuda = options.device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else f"{os.cpu_count()} CPU cores, {options.threads} threads",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "command": " ".join(["python", "benchmarks/speed/throughput.py", *sys.argv[1:]]),
        "seed": options.seed,
        "workers": options.workers,
    }


# ---- masks


def masks(options: argparse.Namespace) -> None:
    """Tokens per second of the article's masking and of ours, in turns, and their ratio."""
    print("| what | length | batch | ours, tokens/s | article's, tokens/s | ratio, median [least, most] |")
    print("|" + " --- |" * 6)
    random.seed(options.seed)
    for length in options.lengths:
        rows = RandomTokens(SIZES["bert-base"][-1], length, options.seed).ids[: options.batch_size].astype(np.int64)
        ids = torch.from_numpy(rows)
        attention, special = np.ones(rows.shape, dtype=bool), np.array(sorted(SPECIAL))
        attention_mask = torch.ones_like(ids)
        maskable = attention & ~np.isin(rows, special)

        def draw(rows: np.ndarray, attention: np.ndarray, maskable: np.ndarray, number: int) -> np.ndarray:
            keys = row_keys(rows, attention, options.seed, number)
            return sample_span_mask(maskable, keys, options.mask_ratio, MEAN_SPAN)

        def ours(number: int, rows: Any = rows, attention: Any = attention, special: Any = special) -> None:
            mask = draw(rows, attention, attention & ~np.isin(rows, special), number)
            np.where(mask, MASK, rows)

        def article(_: int, ids: torch.Tensor = ids, attention_mask: torch.Tensor = attention_mask) -> None:
            for row, real in zip(ids, attention_mask, strict=True):
                article_view(row, real, options.mask_ratio)

        def our_spans(number: int, rows: Any = rows, attention: Any = attention, maskable: Any = maskable) -> None:
            draw(rows, attention, maskable, number)

        def article_spans(_: int, length: int = length, count: int = len(rows)) -> None:
            for _ in range(count):
                article_mask(length, options.mask_ratio, MEAN_SPAN, {0, length - 1})

        for what, pair in (
            ("from ids to the masked view", (ours, article)),
            ("spans alone", (our_spans, article_spans)),
        ):
            speeds: list[list[float]] = [[], []]
            for _ in range(options.repeats):
                for side, work in enumerate(pair):
                    speeds[side].append(rows.size / mean_seconds(work, options.seconds))
            ratio = [one / other for one, other in zip(*speeds, strict=True)]
            print(
                f"| {what} | {length} | {len(rows)} | {statistics.median(speeds[0]):,.0f} | "
                f"{statistics.median(speeds[1]):,.0f} | {spread(ratio, '.1f')} |",
                flush=True,
            )


def mean_seconds(work: Callable[[int], None], at_least: float) -> float:
    """Of one call, over as many as fill the time."""
    begin, calls = time.perf_counter(), 0
    while True:
        work(calls)
        calls += 1
        seconds = time.perf_counter() - begin
        if seconds >= at_least:
            return seconds / calls


# ---- the table


def spread(values: Sequence[float], form: str) -> str:
    """Median, and the least and the most."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:{form}} [{low:{form}}, {high:{form}}]"


def table(rows: Sequence[Row]) -> str:
    """One line a cell; every ratio is of windows of the same turn."""
    cells: dict[str, dict[str, Any]] = {}
    floors: dict[tuple[Any, ...], Row] = {}
    lines = []
    for row in rows:
        if row["kind"] == "machine":
            lines.append(
                f"{row['device']}; torch {row['torch']}, transformers {row['transformers']}, accelerate "
                f"{row['accelerate']}; {row['workers']} loader workers; seed {row['seed']}; {row['date']}; "
                f"`{row['command']}`"
            )
        elif row["kind"] == "rates":
            floors[(*row["place"], row["round"])] = row
        elif row["kind"] != "failed" or "cell" in row:
            entry = cells.setdefault(json.dumps(row["cell"]), {"cell": Cell(**row["cell"]), "windows": {}})
            if row["kind"] == "window":
                entry["windows"][row["round"]] = row
            else:
                entry[row["kind"]] = row
    lines += ["", *_rates_lines(floors)]
    lines += [
        "",
        "| size | length | batch | loop | tokens/s | of the article's | the same in CPU time | of MLM's | "
        "matrix rate used | of the floor's speed | outside the device | fetching data | EMA | memory, GiB | "
        "graphs + recompiled | of one process, each | communication | not hidden |",
        "|" + " --- |" * 18,
    ]
    for entry in cells.values():
        cell, windows = entry["cell"], entry["windows"]
        head = f"| {cell.size} | {cell.length} | {cell.batch_size} | {cell.name} |"
        if "failed" in entry or not windows:
            lines.append(f"{head} failed: {entry.get('failed', {}).get('why', 'no window')[:120]} |" + " |" * 13)
            continue
        tokens = cell.batch_size * cell.length * cell.processes
        speeds = [tokens / row["step_s"] for row in windows.values()]
        used, floor = [], []
        for number, row in windows.items():
            selected = floors[(*cell.place, number)]
            rate = selected[f"{cell.precision}_flops"]
            used.append(100 * entry["started"]["flops"] / row["step_s"] / rate)
            least = entry["started"]["flops"] / rate + entry["started"]["bytes"] / selected["copy_bytes"]
            floor.append(100 * least / row["step_s"])
        step = statistics.median(row["step_s"] for row in windows.values())
        outside = "" if "profile" not in entry else f"{100 * max(0, 1 - entry['profile']['busy_s'] / step):.1f} %"
        data, ema = (
            100 * statistics.median(row[name] / row["step_s"] for row in windows.values())
            for name in ("data_s", "ema_s")
        )
        lines.append(
            f"{head} {spread(speeds, ',.0f')} | {_beside(cells, entry, 'article')} | "
            f"{_beside(cells, entry, 'article', 'cpu_s')} | {_beside(cells, entry, 'mlm')} | "
            f"{statistics.median(used):.1f} % | {statistics.median(floor):.1f} % | {outside} | "
            f"{data:.1f} % | {'' if cell.loop == 'mlm' else f'{ema:.2f} %'} | "
            f"{_last(entry)['memory_gib']:.2f} | {_graphs_of(entry) if cell.compiled else ''} | "
            f"{_beside(cells, entry, 'alone')} | {_share(entry, 'communication_s')} | {_share(entry, 'exposed_s')} |"
        )
    return "\n".join(lines)


def _last(entry: dict[str, Any]) -> Row:
    return entry["windows"][max(entry["windows"])]


def _graphs_of(entry: dict[str, Any]) -> str:
    """Graphs of the warm-up, and those made since."""
    return f"{entry['started']['graphs']} + {_last(entry)['recompiled']}"


def _share(entry: dict[str, Any], clock: str) -> str:
    """Of the profiled steps' time."""
    row = entry.get("profile", {})
    return f"{100 * row[clock] / row['step_s']:.1f} %" if clock in row else ""


def _beside(cells: dict[str, dict[str, Any]], entry: dict[str, Any], loop: str, clock: str = "step_s") -> str:
    """How many times as fast as another loop, in windows of the same turns. Another precision is compared all the same;
    MLM's is that of the same precision, compiled or not. "alone" is the same cell in one process."""
    cell, mine = entry["cell"], entry["windows"]
    for other, theirs in ((each["cell"], each["windows"]) for each in cells.values()):
        if loop == "alone":
            alike = cell.launch and other == replace(cell, launch="", processes=1)
        else:
            alike = other.loop == loop and other != cell and other.processes == cell.processes
            alike = alike and other.place == cell.place
        if loop == "mlm":
            alike = alike and (other.precision, other.compiled) == (cell.precision, cell.compiled)
        shared = [turn for turn in mine.keys() & theirs.keys() if clock in mine[turn]] if alike else []
        if shared:
            return spread([theirs[turn][clock] / mine[turn][clock] for turn in shared], ".2f")
    return ""


def _rates_lines(floors: dict[tuple[Any, ...], Row]) -> list[str]:
    selected = defaultdict(list)
    for row in floors.values():
        for name in row:
            if name.endswith(("_flops", "_bytes")):
                selected[name].append(row[name])
    named = {"copy_bytes": "copying, GB/s"}
    return [
        f"- {named.get(name, name.replace('_flops', ' matrix product, GFLOP/s'))}: "
        f"{spread([value / 1e9 for value in values], ',.0f')}"
        for name, values in selected.items()
    ]


# ---- the command line


def cells_of(options: argparse.Namespace) -> list[Cell]:
    """The product of the flags, and those given one by one."""
    selected = [
        Cell(loop, size, length, batch_size, precision, compiled == "yes", ratio)
        for size, length, batch_size, ratio, loop, precision, compiled in product(
            options.sizes,
            options.lengths,
            options.batch_sizes,
            options.mask_ratios,
            options.loops,
            options.precisions,
            options.compile,
        )
    ]
    # The article's loop is in float32 and not compiled, whatever the others are.
    selected = [
        replace(cell, precision="fp32", compiled=False) if cell.loop == "article" else cell for cell in selected
    ]
    return list({json.dumps(asdict(cell)): cell for cell in [*selected, *map(cell_from, options.cell)]}.values())


def cell_from(text: str) -> Cell:
    return Cell(**json.loads(text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    all_cells, one, profiled, drawn, shown = (
        commands.add_parser(name) for name in ("run", "cell", "profile", "masks", "table")
    )
    cuda = torch.cuda.is_available()
    for command in (all_cells, one, profiled):
        command.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
        command.add_argument("--warmup", type=int, default=10 if cuda else 2, help="steps before the first window")
        command.add_argument("--workers", type=int, default=4 if cuda else 0, help="of the Trainers' data loaders")
        command.add_argument("--seed", type=int, default=0)
    for command in (all_cells, profiled):
        command.add_argument("--loops", nargs="*", choices=LOOPS, default=LOOPS if command is all_cells else LOOPS[:1])
        command.add_argument("--sizes", nargs="*", choices=SIZES, default=["6x384"])
        command.add_argument("--lengths", nargs="*", type=int, default=[128])
        command.add_argument("--batch_sizes", nargs="*", type=int, default=[8])
        command.add_argument("--precisions", nargs="*", choices=("fp32", "bf16"), default=["fp32"])
        command.add_argument("--compile", nargs="*", choices=("no", "yes"), default=["no"])
        command.add_argument("--mask_ratios", nargs="*", type=float, default=[0.3])
        command.add_argument("--cell", action="append", default=[], help="one more cell, its fields as a JSON object")
    profiled.add_argument("--steps", type=int, default=5 if cuda else 3)
    all_cells.add_argument("--repeats", type=int, default=5, help="windows of each cell")
    all_cells.add_argument("--warm_together", type=int, default=1, help="cells that start at once, where there is room")
    all_cells.add_argument("--seconds", type=float, default=3.0, help="of a window, about; two steps at least")
    all_cells.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    all_cells.add_argument("--output", default="rows.jsonl")
    one.add_argument("--cell", required=True)
    drawn.add_argument("--lengths", nargs="*", type=int, default=[128, 512])
    drawn.add_argument("--batch_size", type=int, default=128)
    drawn.add_argument("--mask_ratio", type=float, default=0.3)
    drawn.add_argument("--repeats", type=int, default=7)
    drawn.add_argument("--seconds", type=float, default=0.5, help="of each side in each repeat")
    drawn.add_argument("--seed", type=int, default=0)
    shown.add_argument("rows", nargs="+")
    options = parser.parse_args()
    match options.command:
        case "run":
            print(table(run(cells_of(options), options)))
        case "cell":
            given = json.loads(options.cell)
            serve(None if given is None else Cell(**given), options)
        case "profile":
            for cell in cells_of(options):
                show_cell(cell, options)
        case "masks":
            masks(options)
        case "table":
            lines = [line for path in options.rows for line in Path(path).read_text(encoding="utf-8").splitlines()]
            print(table([json.loads(line) for line in lines]))


if __name__ == "__main__":
    main()
