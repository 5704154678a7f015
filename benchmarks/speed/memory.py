"""Memory over the number of rows: `python benchmarks/speed/memory.py --rows 10000 1000000`.

Writes text files with the given numbers of lines. Trains a tiny encoder on each by run_jepa.py for --steps steps, from
the file that datasets maps into memory and with `--streaming`, each with a fresh cache, without and with a loader's
worker, and watches the process and its children. Prints the table of RESULTS 11: the peak of their anonymous memory
(what they hold: it must not grow with the rows) and of their whole resident memory, to which the mapped pages of files
count (the system takes those back when it needs them).
"""

import argparse
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parents[2]
EVERY = 0.05  # seconds between two looks
FLAGS = (
    "--model_type bert --config_overrides hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64"
    " --max_seq_length 32 --per_device_train_batch_size 32 --health_steps 25 --report_to none "
    "--use_cpu --disable_tqdm true --save_strategy no"
)


def main() -> None:
    """Run all combinations and print their table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1], help="data-loader workers")
    parser.add_argument("--steps", type=int, default=50, help="of a run")
    options = parser.parse_args()
    print("| rows | file, MB | reading | workers | peak anonymous, MB | peak resident, MB | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for rows in options.rows:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "texts.txt"
            write_texts(file, rows)
            size = file.stat().st_size / 1e6
            for reading in ("mapped", "streamed"):
                for workers in options.workers:
                    flags = ["--train_file", str(file), "--dataloader_num_workers", str(workers)]
                    flags += ["--max_steps", str(options.steps)]
                    flags += ["--streaming"] if reading == "streamed" else []
                    anonymous, resident, seconds = watch(flags)
                    print(
                        f"| {rows:,} | {size:.1f} | {reading} | {workers} | {anonymous / 1e6:,.0f} | "
                        f"{resident / 1e6:,.0f} | {seconds:.0f} |",
                        flush=True,
                    )


def write_texts(path: Path, rows: int) -> None:
    """Different lines of 8 to 20 words out of 5,000."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(5000)]
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            file.write(" ".join(draw.choices(words, k=draw.randint(8, 20))) + "\n")


def watch(flags: list[str]) -> tuple[int, int, float]:
    """Train, and return the peaks of anonymous and of resident memory in bytes, and the seconds."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"HF_HOME": f"{folder}/hf", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        command = [
            sys.executable,
            str(REPOSITORY / "run_jepa.py"),
            *FLAGS.split(),
            *flags,
            "--output_dir",
            f"{folder}/out",
        ]
        start = time.perf_counter()
        with (Path(folder) / "said").open("w+") as output:
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
            anonymous = resident = 0
            while process.poll() is None:
                statuses = [status_of(child) for child in family(process.pid)]
                anonymous = max(anonymous, sum(status["RssAnon"] for status in statuses))
                resident = max(resident, sum(status["VmRSS"] for status in statuses))
                time.sleep(EVERY)
            if process.returncode:
                output.seek(0)
                raise SystemExit(f"{' '.join(command)} failed:\n{output.read()}")
        return anonymous, resident, time.perf_counter() - start


def family(number: int) -> list[int]:
    """The process and all below it."""
    try:
        return [number, *(child.pid for child in psutil.Process(number).children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def status_of(number: int) -> dict[str, int]:
    """What Linux says of a process's memory, in bytes; zeros of one that has just ended."""
    try:
        text = Path(f"/proc/{number}/status").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        text = ""
    results = {name: 1024 * int(size) for name, size in re.findall(r"^(\w+):\s+(\d+) kB$", text, flags=re.MULTILINE)}
    return {name: results.get(name, 0) for name in ("RssAnon", "VmRSS")}


if __name__ == "__main__":
    main()
