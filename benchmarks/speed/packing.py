"""Real tokens per second of short texts: padded, grouped by length, and packed.

    python benchmarks/speed/packing.py                 # a BERT of 4 layers, 128 wide, on a CPU: some ten minutes
    python benchmarks/speed/packing.py --hidden_size 384 --num_hidden_layers 6 --contrastive_weight 0.3

Every variant trains `JepaTrainer` for one epoch on the same texts of random tokens, whose lengths are those of
sentences, with about the same number of real tokens in an update. Collation, moving average and optimizer are in the
time, on a CPU that of one core, which other processes disturb little. Variants are interleaved and repeated. One table
goes to the standard output.
"""

import argparse
import statistics
import tempfile
import time
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset
from transformers import BertConfig, PrinterCallback, set_seed

from jepa_hf import DataCollatorForSpanJEPA, JepaConfig, JepaForRepresentationPrediction, JepaTrainer
from jepa_hf.cli.console import quiet_libraries
from jepa_hf.data.packing import pack_dataset
from jepa_hf.data.text_datasets import builtin_corpus
from jepa_hf.data.tokenizer_training import train_wordpiece_tokenizer
from jepa_hf.training.training_args import JepaTrainingArguments

VARIANTS = ("padded to max_seq_length", "padded to the longest", "grouped by length", "packed")


class Timed(JepaTrainer):
    """Counts real tokens, positions and seconds."""

    tokens = positions = 0
    begun = 0.0

    def training_step(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], *args: Any) -> torch.Tensor:
        self.begun = self.begun or now(self.args.device)
        self.tokens += int(self.count_tokens(inputs))
        self.positions += int(self.count_tokens(inputs, padding=True))
        return super().training_step(model, inputs, *args)


def now(device: torch.device) -> float:
    """Seconds: of the processor on a CPU, else of the clock."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def texts(count: int, mean: float, longest: int, vocab_size: int) -> list[dict[str, list[int]]]:
    """Rows of random tokens between [CLS] and [SEP], with log-normal lengths."""
    random = np.random.default_rng(0)
    spread = 0.6
    lengths = random.lognormal(np.log(mean) - spread**2 / 2, spread, count).round().clip(4, longest).astype(int)
    return [{"input_ids": [2, *random.integers(5, vocab_size, length - 2).tolist(), 3]} for length in lengths]


def measure(
    variant: str, rows: Dataset, tokenizer: Any, options: argparse.Namespace, max_steps: int = -1
) -> tuple[float, float]:
    """Real tokens per second over an epoch, or N steps, and the share of positions that is padding."""
    packed = variant == "packed"
    mean = sum(map(len, rows["input_ids"])) / len(rows)
    set_seed(0)
    encoder = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden_size,
        num_hidden_layers=options.num_hidden_layers,
        num_attention_heads=options.hidden_size // 32,
        intermediate_size=4 * options.hidden_size,
        max_position_embeddings=options.max_seq_length,
    )
    config = JepaConfig(encoder, contrastive_weight=options.contrastive_weight, target_norm=options.target_norm)
    fixed = options.max_seq_length if variant == VARIANTS[0] else None
    with tempfile.TemporaryDirectory() as folder:
        trainer = Timed(
            JepaForRepresentationPrediction(config),
            JepaTrainingArguments(
                output_dir=folder,
                num_train_epochs=1,
                max_steps=max_steps,
                per_device_train_batch_size=round(options.tokens / (mean if not packed else options.max_seq_length)),
                train_sampling_strategy="group_by_length" if variant == "grouped by length" else "random",
                health_steps=0,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=options.cpu,
                bf16=not options.cpu,
                dataloader_num_workers=0 if options.cpu else 4,
            ),
            data_collator=DataCollatorForSpanJEPA(tokenizer, max_length=fixed),
            train_dataset=pack_dataset(rows, options.max_seq_length) if packed else rows,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        seconds = now(trainer.args.device) - trainer.begun
    return trainer.tokens / seconds, 1 - trainer.tokens / trainer.positions


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--num_hidden_layers", type=int, default=4)
    parser.add_argument("--max_seq_length", type=int, default=128)
    parser.add_argument("--mean", type=float, default=24.0, help="mean length of the texts, in tokens")
    parser.add_argument("--tokens", type=int, default=1536, help="real tokens in an update, about")
    parser.add_argument("--contrastive_weight", type=float, default=0.0)
    parser.add_argument("--target_norm", default="layer")
    parser.add_argument("--texts", type=int, default=3200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cpu", action=argparse.BooleanOptionalAction, default=not torch.cuda.is_available())
    options = parser.parse_args()
    quiet_libraries()
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    tokenizer = train_wordpiece_tokenizer(builtin_corpus(), 4096, options.max_seq_length)
    rows = Dataset.from_list(texts(options.texts, options.mean, options.max_seq_length, len(tokenizer)))
    for variant in VARIANTS:
        measure(variant, rows, tokenizer, options, max_steps=2)  # the first steps are slower
    results: dict[str, list[tuple[float, float]]] = {variant: [] for variant in VARIANTS}
    for _ in range(options.repeats):
        for variant in VARIANTS:
            results[variant].append(measure(variant, rows, tokenizer, options))
    print(
        "| | padding | real tokens/s, median (least to most) | times padded to the longest |\n| --- | --- | --- | --- |"
    )
    middle = {variant: statistics.median(rate for rate, _ in measured) for variant, measured in results.items()}
    for variant, measured in results.items():
        rates = [rate for rate, _ in measured]
        print(
            f"| {variant} | {100 * measured[0][1]:.0f} % | {middle[variant]:,.0f} "
            f"({min(rates):,.0f} to {max(rates):,.0f}) | {middle[variant] / middle[VARIANTS[1]]:.2f} |"
        )


if __name__ == "__main__":
    main()
