"""Variants of a benchmark, each in a process of its own, one at a time on each GPU of the machine."""

import argparse
import json
import os
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
# From a variant, a seed and a folder of its own to a command line.
Command = Callable[[Row, int, Path], list[str]]


def run(options: argparse.Namespace, train: Command, judge: Command, summary: Callable[[Row], str]) -> list[Row]:
    """Work through a file with a variant in each line, a JSON object whose `seeds` (default [0]) are run one by one.

    Args:
        options: those of `add_arguments`. A row is added to `output` as soon as it is there; a failed variant's has its
            last words as `failed`. With `follow` go on with lines that are added to `variants` meanwhile, until one
            says "end".
        train: the command that needs the GPU.
        judge: the one that follows and does not, while the GPU does the next variant; it prints the row as JSON.
        summary: a row in a line.

    Returns:
        All rows of `output`.
    """
    variants, output, work_dir = Path(options.variants), Path(options.output), Path(options.work_dir)
    count = max(torch.cuda.device_count(), 1)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    gpus: queue.Queue[str] = queue.Queue()
    for gpu in visible:
        gpus.put(gpu)
    lock, judges, threads = threading.Lock(), threading.Semaphore(max((os.cpu_count() or 4) // 3, 1)), []

    def work(variant: Row, seed: int, folder: Path, gpu: str) -> None:
        begin, environment = time.perf_counter(), {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
        with open(folder / "train.log", "w", encoding="utf-8") as log:
            command = train(variant, seed, folder)
            failed = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode
        gpus.put(gpu)
        row = {**variant, "seed": seed}
        if failed:
            row["failed"] = _last_line((folder / "train.log").read_text())
        else:
            with judges:
                environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
                judged = subprocess.run(judge(variant, seed, folder), env=environment, capture_output=True, text=True)
            row = json.loads(judged.stdout) if judged.returncode == 0 else {**row, "failed": _last_line(judged.stderr)}
        row["whole_s"] = round(time.perf_counter() - begin)
        with lock, open(output, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            print(f"{row['name']} seed {seed}: FAILED {row['failed']}" if "failed" in row else summary(row), flush=True)

    for number, (variant, seed) in enumerate(read_variants(variants, options.follow)):
        gpu = gpus.get()
        folder = work_dir / f"{number:03}"
        folder.mkdir(parents=True, exist_ok=True)
        threads.append(threading.Thread(target=work, args=(variant, seed, folder, gpu)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    return read_rows(output)


def add_arguments(whole: argparse.ArgumentParser, steps: Sequence[argparse.ArgumentParser], work_dir: str) -> None:
    """Those of the command that runs all variants, and of the commands that it runs."""
    whole.add_argument("variants", help="a file with a JSON object in each line")
    whole.add_argument("--follow", action="store_true", help='go on with lines that are added, until one says "end"')
    whole.add_argument("--output", default="rows.jsonl")
    whole.add_argument("--work_dir", default=work_dir)
    for step in steps:
        step.add_argument("--folder", required=True)
        step.add_argument("--variant", required=True)
        step.add_argument("--seed", type=int, required=True)


def read_rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_variants(path: Path, follow: bool) -> Iterator[tuple[Row, int]]:
    judged = 0
    while True:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        for line in lines[judged:]:
            if line.strip() == '"end"':
                return
            variant = json.loads(line)
            yield from ((variant, seed) for seed in variant.get("seeds", [0]))
        judged = len(lines)
        if not follow:
            return
        time.sleep(1)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["without a word"])[-1]
