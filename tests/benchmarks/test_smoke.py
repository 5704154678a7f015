"""The claim that every benchmark runs: the smallest real invocation of each, on a CPU.

`kill_resume.py`, `throughput.py` and `multi_gpu_parity.py` are run by the tests of their own files.
"""

import io
import json
import runpy
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from helpers.cli import REPOSITORY, train
from helpers.llm import conversations, tokenizer
from helpers.processes import forked_scripts
from helpers.tiny_models import CORPUS, save_tiny_encoder, write_lines
from jepa_hf.models import modeling_jepa, objective
from jepa_hf.models import targets as targets_module

pytestmark = pytest.mark.slow

BENCHMARKS = REPOSITORY / "benchmarks"
TINY = "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64"

Benchmark = Callable[..., str]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Benchmark:
    """Run a script of benchmarks/ in this process and its children in forked ones; return its standard output."""

    def run(script: str, *argv: str | Path) -> str:
        path = BENCHMARKS / script
        monkeypatch.setattr(sys, "path", [str(path.parent), *sys.path])
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, argv)])
        capsys.readouterr()
        with forked_scripts(monkeypatch):
            runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out

    threads = torch.get_num_threads()
    monkeypatch.chdir(tmp_path)
    # Experiments replace these for their process.
    monkeypatch.setattr(modeling_jepa, "encode_targets", modeling_jepa.encode_targets)
    monkeypatch.setattr(objective, "prediction_loss", objective.prediction_loss)
    monkeypatch.setattr(targets_module, "_target_vectors", targets_module._target_vectors)
    yield run
    torch.set_num_threads(threads)


def rows_of(output: str) -> list[list[str]]:
    """The cells of a Markdown table's rows, without its two head lines."""
    lines = [line for line in output.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def write_images(path: Path, count: int, side: int = 8) -> Path:
    """A parquet file of random images with labels 0 to 9 in turns, as the Hub's CIFAR-10 has them."""
    random, images = np.random.default_rng(0), []
    for _ in range(count):
        file = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(file, "PNG")
        images.append({"bytes": file.getvalue(), "path": None})
    pq.write_table(pa.table({"img": images, "label": [number % 10 for number in range(count)]}), path)
    return path


@pytest.fixture
def conversation_files(tmp_path: Path) -> list[str | Path]:
    """Flags: files of conversations to train and to judge on, and a tokenizer's directory."""
    for name, count in (("train", 8), ("test", 2)):
        write_lines(tmp_path / f"{name}.jsonl", map(json.dumps, conversations(count)))
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    return ["--train_file", tmp_path / "train.jsonl", "--tokenizer", tmp_path / "tokenizer"]


def test_text_rows(benchmark: Benchmark, tmp_path: Path) -> None:
    """Every row is [CLS], tokens and [SEP]; no token of the joined texts is lost but those of the last, shorter row."""
    write_lines(tmp_path / "texts.jsonl", (json.dumps({"text": text}) for text in CORPUS))
    benchmark("quality/text_rows.py", "texts.jsonl", "--output_dir", "rows", "--vocab_size", "200", "--length", "16")
    tokenizer = AutoTokenizer.from_pretrained("rows/tokenizer")
    rows = np.load("rows/rows.npy")
    assert set(rows[:, 0]) == {tokenizer.cls_token_id}
    assert set(rows[:, -1]) == {tokenizer.sep_token_id}
    tokens = sum(len(ids) for ids in tokenizer(list(CORPUS), add_special_tokens=False)["input_ids"])
    assert rows.shape == (tokens // 14, 16)


@pytest.mark.parametrize("task", ["pairs", "series"])
def test_content(task: str, benchmark: Benchmark) -> None:
    output = benchmark("quality/content.py", task, "--steps", "1", "--seeds", "0")
    names = ["before", "after", "kept", "mlm"]
    assert [row[0] for row in rows_of(output)] == (names if task == "pairs" else names[:-1])


@pytest.mark.parametrize("targets", ["increments", "batch", "centred_by_token", "whitened"])
def test_text_quality_trains_and_judges_a_variant(targets: str, benchmark: Benchmark, tmp_path: Path) -> None:
    """The two commands that `run` starts, of the experiments with targets, which override the model's methods."""
    texts = write_lines(tmp_path / "texts.txt", CORPUS[:80])
    write_lines(tmp_path / "topics.csv", ["text,label", *(f'"{text}",{n % 2}' for n, text in enumerate(CORPUS[:40]))])
    variant = json.dumps({"name": targets, "targets": targets, "flags": {"max_steps": 1}})
    flags = ["--folder", tmp_path, "--variant", variant, "--seed", "0", "--tasks", tmp_path / "topics.csv"]
    flags += ["--max_seq_length", "32"]
    recipe = ["--model_type", "modernbert", "--config_overrides", TINY, "--train_file", texts, "--use_cpu"]
    recipe += ["--max_seq_length", "32", "--per_device_train_batch_size", "4"]
    benchmark("quality/text_quality.py", "variant", *flags, "--", *recipe)
    row = json.loads(benchmark("quality/text_quality.py", "judge", *flags))
    assert row["steps"] == 1
    assert 0 <= row["scores"]["mean"]["topics"] <= 100


def test_text_quality_makes_a_table(benchmark: Benchmark, tmp_path: Path) -> None:
    """`run` starts a process for each step of each variant, and compares the variants."""
    texts = write_lines(tmp_path / "texts.txt", CORPUS[:80])
    write_lines(tmp_path / "topics.csv", ["text,label", *(f'"{text}",{n % 2}' for n, text in enumerate(CORPUS[:40]))])
    variants = [{"name": "jepa", "flags": {"max_steps": 1}}, {"name": "mlm", "objective": "mlm"}]
    write_lines(tmp_path / "variants.jsonl", map(json.dumps, variants))
    recipe = ["--model_type", "modernbert", "--config_overrides", TINY, "--train_file", texts, "--use_cpu"]
    recipe += ["--max_seq_length", "32", "--per_device_train_batch_size", "4", "--max_steps", "1"]
    flags = ["variants.jsonl", "--tasks", tmp_path / "topics.csv", "--in_domain", "topics", "--max_seq_length", "32"]
    output = benchmark("quality/text_quality.py", "run", *flags, "--", *recipe)
    assert "FAILED" not in output
    table = rows_of(output)
    assert {row[0] for row in table[:2]} == {"jepa", "mlm"}
    assert [row[2] for row in table[:2]] == ["1", "1"]


def test_adaptation_compares_jepa_with_its_peers(benchmark: Benchmark, tmp_path: Path) -> None:
    """Objectives train a step; the encoders of each are judged on the domain, similarity and retrieval.

    Of the peers' losses two: other ones take the same way through their trainer. MLM is another benchmark's, too.
    """
    start = save_tiny_encoder("bert", tmp_path / "start", head="mlm")
    write_lines(tmp_path / "texts.jsonl", [json.dumps({"text": text}) for text in CORPUS[:40]])
    write_lines(tmp_path / "topics.csv", ["text,label", *(f'"{text}",{n % 2}' for n, text in enumerate(CORPUS[:40]))])
    pairs = [f'"{text[:9]}","{text[9:]}"' for text in CORPUS[:8]]
    write_lines(tmp_path / "answers.csv", ["query,document", *pairs])
    write_lines(tmp_path / "sts.csv", ["sentence1,sentence2,score", *(f"{pair},{n}" for n, pair in enumerate(pairs))])
    peer = {"learning_rate": 1e-4, "batch_size": 4, "max_steps": 1}
    variants = [
        {"name": "start", "objective": "start"},
        {"name": "jepa", "objective": "jepa", "flags": {"per_device_train_batch_size": 4}, "seconds": 0.1},
        *({"name": name, "objective": name, **peer} for name in ("tsdae", "ct")),
    ]
    write_lines(tmp_path / "variants.jsonl", [json.dumps({**variant, "domain": "topics"}) for variant in variants])
    write_lines(tmp_path / "rates.json", ['{"jepa": 10}'])
    tasks = [tmp_path / name for name in ("topics.csv", "answers.csv", "sts.csv")]
    flags = ["--model", start, "--texts", f"topics={tmp_path / 'texts.jsonl'}", "--tasks", *tasks]
    flags += ["--dataloader_num_workers", "0"]
    output = benchmark("quality/adaptation.py", "run", "variants.jsonl", *flags)
    assert "FAILED" not in output
    table = rows_of(output)
    assert {row[1] for row in table} == {variant["name"] for variant in variants}
    assert [row[2] for row in table if row[1] == "jepa"] == ["target", "trained", "start 0.3", "start 0.5"]
    assert all(0 <= float(cell) <= 100 for row in table for cell in (row[4], row[6], row[7]))


def test_features_of_vectors(benchmark: Benchmark) -> None:
    settings = '{"training": {"max_steps": 1}}'
    output = benchmark(
        "quality/features.py", "vectors", "--mode", "flat", "--seeds", "1", "--supervised_epochs", "1",
        "--settings", settings,
    )  # fmt: skip
    assert [row[0] for row in rows_of(output)] == ["raw features", "random encoder", "JEPA", "supervised from scratch"]


def test_features_of_series(benchmark: Benchmark, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    lines = [
        ":".join(",".join(f"{x:.2f}" for x in random.normal(size=7 + n)) for _ in range(1)) + f":{n % 2}"
        for n in range(12)
    ]
    with zipfile.ZipFile(tmp_path / "aeon.whl", "w") as wheel:
        for part in ("TRAIN", "TEST"):
            name = f"aeon/datasets/data/JapaneseVowels/JapaneseVowels_{part}.ts"
            wheel.writestr(name, "@data\n" + "\n".join(lines) + "\n")
    flags = ["--wheel", tmp_path / "aeon.whl", "--seeds", "1", "--supervised_epochs", "0", "--transductive"]
    output = benchmark("quality/features.py", "series", *flags, "--settings", '{"training": {"max_steps": 1}}')
    assert [len(row) for row in rows_of(output)] == [4] * 4


def test_quickstart_sweep(benchmark: Benchmark, monkeypatch: pytest.MonkeyPatch) -> None:
    """One variant, whose run is a process."""
    monkeypatch.syspath_prepend(str(BENCHMARKS / "quality"))
    import quickstart_sweep

    small = {"max_steps": 2, "warmup_steps": 1, "eval_steps": 1, "use_cpu": True, "max_train_samples": 40}
    monkeypatch.setattr(quickstart_sweep, "COMMON", {**quickstart_sweep.COMMON, **small})
    with forked_scripts(monkeypatch):
        row = quickstart_sweep.run({"variance_weight": 1})
    assert row["variant"] == {"variance_weight": 1}
    assert row["prediction_loss"] > 0


@pytest.mark.parametrize("variant", [{"jitter": 0.4, "pooled": {"variance": 1.0}}, {"views": True, "center": "batch"}])
def test_cifar10_hparam_search(
    variant: dict, benchmark: Benchmark, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With the targets of the model, and with the search's own."""
    monkeypatch.setenv("LIMIT", "40")
    small = {"epochs": 1, "batch": 12, "hidden_size": 32, "layers": 2, "heads": 2, "patch": 2}
    small["jepa"] = {"pred_num_hidden_layers": 1}
    (tmp_path / "variants.json").write_text(json.dumps([small | variant]))
    file = write_images(tmp_path / "train.parquet", 40)
    output = benchmark(
        "images/cifar10_hparam_search.py", "--train_file", file, "--variants", tmp_path / "variants.json"
    )  # fmt: skip
    row = json.loads(output)
    assert "error" not in row
    assert row["loss"] > 0
    assert 0 <= row["context_last_linear"] <= 100


def test_image_checkpoint_probe(benchmark: Benchmark, tmp_path: Path) -> None:
    """Of the start and of a checkpoint; and the same network with labels."""
    files = [write_images(tmp_path / f"{name}.parquet", 40) for name in ("train", "test")]
    run = tmp_path / "run"
    train(
        "--model_type", "ijepa", "--config_overrides", f"{TINY},image_size=8,patch_size=2", "--train_file", files[0],
        "--output_dir", run, "--max_steps", "1", "--save_steps", "1", "--per_device_train_batch_size", "4",
    )  # fmt: skip
    flags = [run, "--train_file", files[0], "--test_file", files[1], "--workers", "0"]
    output = benchmark("images/image_checkpoint_probe.py", "probe", *flags)
    assert [row[0] for row in rows_of(output)] == ["0", "1"]
    output = benchmark("images/image_checkpoint_probe.py", "supervised", *flags, "--num_train_epochs", "1")
    assert "% of the test images" in output


def test_llm_jepa(benchmark: Benchmark, conversation_files: list[str | Path], tmp_path: Path) -> None:
    """A variant with views and one without; each is a process."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    start = {"model": "random", "config": {**sizes, "num_key_value_heads": 2}}
    args = {"max_steps": 1, "use_cpu": True, "dataloader_num_workers": 0}
    variants = [
        {"name": "plain", **start, "args": {**args, "loss_dropout": 1.0}},
        {"name": "jepa", **start, "args": args},
    ]
    write_lines(tmp_path / "variants.jsonl", map(json.dumps, variants))
    flags = ["--judge_on", "test", "--test_file", tmp_path / "test.jsonl", "--max_new_tokens", "2"]
    output = benchmark("llm/llm_jepa.py", "run", tmp_path / "variants.jsonl", *conversation_files, *flags)
    assert "FAILED" not in output
    assert {row[0] for row in rows_of(output)} == {"plain", "jepa"}


def test_llm_jepa_overhead(benchmark: Benchmark, conversation_files: list[str | Path]) -> None:
    names = ["views in one pass (the default)", "EMA teacher"]
    flags = ["--steps", "1", "--warmup", "1", "--repeats", "1", "--batch_size", "2", "--cpu", "--variants", *names]
    output = benchmark("llm/llm_jepa_overhead.py", *conversation_files, *flags)
    assert [row[0] for row in rows_of(output)] == ["plain fine-tuning", *names]


def test_packing(benchmark: Benchmark) -> None:
    flags = ["--hidden_size", "32", "--num_hidden_layers", "1", "--max_seq_length", "32", "--mean", "8", "--cpu"]
    output = benchmark("speed/packing.py", *flags, "--tokens", "64", "--texts", "16", "--repeats", "1")
    assert [row[0] for row in rows_of(output)][-1] == "packed"
    assert rows_of(output)[-1][1] < rows_of(output)[0][1]


def test_memory(benchmark: Benchmark) -> None:
    """Mapped and streamed, each a process."""
    output = benchmark("speed/memory.py", "--rows", "100", "--steps", "1", "--workers", "0")
    assert [row[2] for row in rows_of(output)] == ["mapped", "streamed"]
    assert all(100 < int(row[4]) < 4000 for row in rows_of(output))


def test_watchdog_false_positives(benchmark: Benchmark) -> None:
    recipe = REPOSITORY / "configs" / "quickstart.yaml"
    flags = ["--max_steps", "1", "--config_overrides", TINY, "--max_train_samples", "40", "--use_cpu"]
    output = benchmark("reliability/watchdog_false_positives.py", recipe, "--seeds", "1", *flags)
    (row,) = rows_of(output)
    assert row[:2] == ["quickstart", "0"]


def test_pinned_runs(benchmark: Benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One system, recorded: resumed it has the hashes of the straight run."""
    monkeypatch.syspath_prepend(str(BENCHMARKS / "reliability"))
    import pinned_runs

    pinned_runs.write_data(tmp_path)
    with forked_scripts(monkeypatch):
        ways = pinned_runs.measure(tmp_path, "features")
    assert ways["straight"] == ways["resumed"]
