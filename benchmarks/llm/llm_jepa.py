"""LLM-JEPA against plain fine-tuning: the same model, rows and steps, with and without the views.

    python benchmarks/llm/llm_jepa.py run variants.jsonl --train_file synth_train.jsonl.gz \
        --test_file synth_test.jsonl.gz --judge_on validation --output rows.jsonl
    python benchmarks/llm/llm_jepa.py table rows.jsonl --against plain

A line of `variants.jsonl` is one variant: `name`; `model`, a directory of a causal language model with a chat
template, or "random", a small Llama with the tokenizer of --tokenizer; `config`, sizes of that Llama; `args` of
`LlmJepaTrainingArguments`; `views`, arguments of `PairedViewTokenizer` (`train_on_prompt` is the official script's
loss); `seeds`, default [0]. Plain fine-tuning is a `loss_dropout` of 1. With `--judge_on validation`, rows of the
training file are held out and judged, so that learning rates and weights are chosen without the test file; with "test"
all training rows are trained on. Answers are greedy.
"""

import argparse
import json
import random
import sys
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from scipy.stats import ttest_rel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel, set_seed

from jepa_hf.cli.console import quiet_libraries
from jepa_hf.data.file_readers import file_format, read_rows
from jepa_hf.llm_jepa import LlmJepaTrainer, LlmJepaTrainingArguments, PairedViewTokenizer, add_predictor_tokens
from jepa_hf.llm_jepa.generation import evaluate_generation

sys.path.append(str(Path(__file__).resolve().parents[1]))
import gpu_queue

HELD_OUT = 500
MEASURED = ("lm_loss", "pair_loss", "view_rank", "view_pairwise_cosine", "view_top1_accuracy")
PASSED_ON = (
    "train_file", "test_file", "tokenizer", "judge_on", "max_new_tokens", "judge_batch_size", "max_test_samples",
)  # fmt: skip
RANDOM = {
    "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6,
    "num_key_value_heads": 6, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip


def split(options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows to train on and rows to judge on."""
    train = list(read_rows(options.train_file, file_format(options.train_file)))
    if options.judge_on == "test":
        test = list(read_rows(options.test_file, file_format(options.test_file)))
        return train, test[: options.max_test_samples]
    random.Random(0).shuffle(train)  # the same rows in every variant
    return train[HELD_OUT:], train[:HELD_OUT]


def start(variant: dict[str, Any], options: argparse.Namespace, seed: int) -> tuple[PreTrainedModel, Any]:
    name = variant["model"]
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer if name == "random" else name)
    set_seed(seed)
    if name == "random":
        ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        if tokenizer.pad_token_id != tokenizer.eos_token_id:  # the embedding of a padding token stays at 0
            ends["pad_token_id"] = tokenizer.pad_token_id
        config = LlamaConfig(vocab_size=len(tokenizer), **ends, **RANDOM | variant.get("config", {}))
        return AutoModelForCausalLM.from_config(config), tokenizer
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32), tokenizer


def train(options: argparse.Namespace) -> None:
    """Train one variant, let it answer, and write its row."""
    variant, folder = json.loads(options.variant), Path(options.folder)
    model, tokenizer = start(variant, options, options.seed)
    views = {"num_predictor_tokens": 1, "max_length": 512, **variant.get("views", {})}
    add_predictor_tokens(model, tokenizer, views["num_predictor_tokens"])
    view_tokenizer = PairedViewTokenizer(tokenizer, **views)
    rows, judged = split(options)
    settings = {
        "output_dir": str(folder / "out"), "per_device_train_batch_size": 32, "per_device_eval_batch_size": 64,
        "num_train_epochs": 4, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_steps": 50,
        "bf16": torch.cuda.is_available(), "dataloader_num_workers": 2, "seed": options.seed,
    }  # fmt: skip
    trainer = LlmJepaTrainer(
        model,
        LlmJepaTrainingArguments(**(settings | variant.get("args", {}))),
        train_dataset=rows,
        eval_dataset=judged,
        view_tokenizer=view_tokenizer,
    )
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    result = trainer.train()
    row: dict[str, Any] = {**variant, "seed": options.seed, "judged_on": options.judge_on}
    row |= {"steps": trainer.state.global_step, "train_s": round(result.metrics["train_runtime"], 1)}
    if torch.cuda.is_available():
        row["memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        row["device"] = torch.cuda.get_device_name()
    results = trainer.evaluate()
    row |= {name: round(results[f"eval_{name}"], 4) for name in MEASURED}
    shares, answers = evaluate_generation(
        model,
        view_tokenizer,
        judged,
        options.metrics,
        max_new_tokens=options.max_new_tokens,
        batch_size=options.judge_batch_size,
    )
    row |= {metric: round(100 * share, 2) for metric, share in shares.items()} | {"n": len(judged)}
    (folder / "answers.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    (folder / "row.json").write_text(json.dumps(row))


def run(options: argparse.Namespace) -> None:
    def command(variant: dict[str, Any], seed: int, folder: Path) -> list[str]:
        given = ["--folder", str(folder), "--variant", json.dumps(variant), "--seed", str(seed)]
        for name in PASSED_ON:
            if getattr(options, name) is not None:
                given += [f"--{name}", str(getattr(options, name))]
        return [sys.executable, "-W", "ignore", __file__, "variant", *given, "--metrics", *options.metrics]

    rows = gpu_queue.run(
        options,
        train=command,
        judge=lambda variant, seed, folder: ["cat", str(folder / "row.json")],  # judged already, where it was trained
        summary=partial(summary, metrics=options.metrics),
    )
    print(tables(rows, options))


def summary(row: dict[str, Any], metrics: list[str]) -> str:
    figures = ", ".join(f"{metric} {row[metric]:.2f}" for metric in metrics)
    return (
        f"{row['name']} seed {row['seed']}: {figures}; top-1 accuracy {row['view_top1_accuracy']}; {row['train_s']} s"
    )


def tables(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """Every variant, the best first, with the paired difference to `--against` and its p (two-sided t-test)."""
    first = options.metrics[0]
    variants: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if "failed" not in row:
            variants.setdefault(row["name"], []).append(row)
    base = {row["seed"]: row for row in variants.get(options.against, [])}
    lines = [
        f"| variant | seeds | {' | '.join(options.metrics)} | difference to {options.against} | p | next-token loss | "
        "pair loss | view rank | cosine of rows | top-1 accuracy | s | GiB |",
        "|" + " --- |" * (len(options.metrics) + 11),
    ]
    for name, mine in sorted(variants.items(), key=lambda item: -mean(row[first] for row in item[1])):
        cells = [_spread([row[metric] for row in mine]) for metric in options.metrics]
        pairs = [(row[first], base[row["seed"]][first]) for row in mine if row["seed"] in base]
        difference, p = "", ""
        if name != options.against and len(pairs) > 1:
            difference = _spread([one - other for one, other in pairs])
            p = f"{ttest_rel(*zip(*pairs, strict=True)).pvalue:.3g}"
        others = [f"{mean(row[key] for row in mine):.4g}" for key in MEASURED]
        others += [
            f"{mean(row['train_s'] for row in mine):.0f}",
            f"{mean(row.get('memory_gib', 0) for row in mine):.1f}",
        ]
        lines.append(f"| {name} | {len(mine)} | {' | '.join([*cells, difference, p, *others])} |")
    lines += [f"| {row['name']} | failed: {row['failed'][:120]} |" for row in rows if "failed" in row]
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{mean(values):.2f}" if len(values) < 2 else f"{mean(values):.2f} ± {stdev(values):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    whole, one, table = (commands.add_parser(name) for name in ("run", "variant", "table"))
    gpu_queue.add_arguments(whole, (one,), work_dir="llm")
    for command in (whole, one):
        command.add_argument("--train_file", required=True)
        command.add_argument("--test_file")
        command.add_argument("--tokenizer", help="of random starts")
        command.add_argument("--judge_on", choices=("validation", "test"), default="validation")
        command.add_argument("--max_test_samples", type=int)
        command.add_argument("--max_new_tokens", type=int, default=64)
        command.add_argument("--judge_batch_size", type=int, default=512, help="prompts that are answered together")
    table.add_argument("rows")
    for command in (whole, one, table):
        command.add_argument("--metrics", nargs="+", default=["exact_match", "prefix_match"])
    for command in (whole, table):
        command.add_argument("--against", default="plain")
    options = parser.parse_args()
    quiet_libraries()
    match options.command:
        case "run":
            run(options)
        case "variant":
            train(options)
        case "table":
            print(tables(gpu_queue.read_rows(Path(options.rows)), options))


if __name__ == "__main__":
    main()
