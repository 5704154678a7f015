"""Cost of LLM-JEPA compared with plain fine-tuning: seconds of a step, tokens per second and memory, variants in turns.

    python benchmarks/llm/llm_jepa_overhead.py --train_file synth_train.jsonl.gz --tokenizer DIRECTORY  # small Llama
    python benchmarks/llm/llm_jepa_overhead.py --train_file synth_train.jsonl.gz --model DIRECTORY --batch_size 16

Every variant is `LlmJepaTrainer` on the same rows in the same order, from the same weights: plain fine-tuning (a loss
dropout of 1), the views in one extra pass, in passes of their own, with loss dropout, with a frozen second view and
with an EMA teacher. Collation and optimizer are in the time, on a CPU that of one core, which others disturb little.
A row's tokens count once, whatever is read again as a view; batches of plain fine-tuning hold the views too, which
nothing reads. One table goes to the standard output.
"""

import argparse
import copy
import gc
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from jepa_hf.cli.console import quiet_libraries
from jepa_hf.data.file_readers import file_format, read_rows
from jepa_hf.llm_jepa import LlmJepaTrainer, LlmJepaTrainingArguments, PairedViewTokenizer, add_predictor_tokens
from llm_jepa import RANDOM

sys.path.append(str(Path(__file__).resolve().parents[1]))
from speed.packing import now

PLAIN = "plain fine-tuning"
VARIANTS: dict[str, dict[str, Any]] = {
    PLAIN: {"loss_dropout": 1.0},
    "views in one pass (the default)": {},
    "views in passes of their own": {"view_passes": "separate"},
    "loss dropout 0.5": {"loss_dropout": 0.5},
    "loss dropout 0.75": {"loss_dropout": 0.75},
    "second view without gradient": {"target_gradient": "stop"},
    "EMA teacher": {"target_gradient": "ema"},
}
SMALL = RANDOM | {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 4}


class Clock(TrainerCallback):
    """Seconds from the end of the warm-up to the end: of the processor on a CPU, else of the clock."""

    def __init__(self, warmup: int):
        self.warmup, self.begun, self.ended = warmup, 0.0, 0.0

    def on_step_end(self, args: TrainingArguments, state: Any, *_: object, **__: Any) -> None:
        if state.global_step == self.warmup:
            self.begun = now(args.device)
        self.ended = now(args.device) if state.global_step == state.max_steps else 0.0


def measure(
    settings: dict[str, Any],
    model: PreTrainedModel,
    views: PairedViewTokenizer,
    rows: list[dict[str, Any]],
    options: argparse.Namespace,
) -> tuple[float, float, float]:
    """Seconds of a step, tokens of a step, and GiB at most (0 on a CPU)."""
    clock = Clock(options.warmup)
    with tempfile.TemporaryDirectory() as folder:
        trainer = LlmJepaTrainer(
            copy.deepcopy(model),
            LlmJepaTrainingArguments(
                output_dir=folder,
                max_steps=options.warmup + options.steps,
                per_device_train_batch_size=options.batch_size,
                include_num_input_tokens_seen="non_padding",
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=options.cpu,
                bf16=not options.cpu,
                seed=0,
                **settings,
            ),
            train_dataset=rows,
            view_tokenizer=views,
            callbacks=[clock],
        )
        if not options.cpu:
            gc.collect()  # the last variant's trainer, which refers to itself
            torch.cuda.reset_peak_memory_stats()
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    memory = 0.0 if options.cpu else torch.cuda.max_memory_allocated() / 2**30
    tokens = trainer.state.num_input_tokens_seen / (options.warmup + options.steps)
    return (clock.ended - clock.begun) / options.steps, tokens, memory


def start(options: argparse.Namespace) -> tuple[PreTrainedModel, Any]:
    """The model that every variant begins from, and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(options.model or options.tokenizer)
    set_seed(0)
    if options.model:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    else:
        sizes = SMALL | {"num_key_value_heads": SMALL["num_attention_heads"]} if options.cpu else RANDOM
        model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    add_predictor_tokens(model, tokenizer, 1)
    return model, tokenizer


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_file", required=True)
    start_from = parser.add_mutually_exclusive_group(required=True)
    start_from.add_argument("--model", help="directory of a causal language model with a chat template")
    start_from.add_argument("--tokenizer", help="of a small Llama from a random start")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20, help="of a measurement, after the warm-up")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--variants", nargs="+", choices=tuple(VARIANTS), default=list(VARIANTS), help=f"in addition to {PLAIN}"
    )
    parser.add_argument("--cpu", action=argparse.BooleanOptionalAction, default=not torch.cuda.is_available())
    options = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    model, tokenizer = start(options)
    views = PairedViewTokenizer(tokenizer, num_predictor_tokens=1, max_length=512)
    given = list(read_rows(options.train_file, file_format(options.train_file)))
    rows = [views(row) for row in given[: options.batch_size * (options.warmup + options.steps)]]
    variants = [variant for variant in VARIANTS if variant == PLAIN or variant in options.variants]
    results: dict[str, list[tuple[float, float, float]]] = {variant: [] for variant in variants}
    for repeat in range(options.repeats):
        for variant in variants if repeat % 2 == 0 else reversed(variants):
            results[variant].append(measure(VARIANTS[variant], model, views, rows, options))
    print("| | ms a step | tokens/s | times plain's step, median [least, most] | GiB |\n" + "|" + " --- |" * 5)
    for variant, measured in results.items():
        ratios = [one[0] / plain[0] for one, plain in zip(measured, results[PLAIN], strict=True)]
        step = statistics.median(seconds for seconds, _, _ in measured)
        memory = "" if options.cpu else f"{max(gib for _, _, gib in measured):.2f}"
        print(
            f"| {variant} | {1000 * step:.0f} | {measured[0][1] / step:,.0f} | "
            f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}] | {memory} |"
        )


if __name__ == "__main__":
    main()
