"""Does a predictor learn content? What a guess says of a hidden position beyond the position and its row.

    python benchmarks/quality/content.py pairs   # rows of pairs (a, f(a)): a hidden token follows from its neighbour
    python benchmarks/quality/content.py text    # docstrings and language reference of the running Python
    python benchmarks/quality/content.py series  # an autoregression of four features

Variants: the transformer predictor "before" 2026-11-29 (no rotary angles, small weights, prediction weight 1) and
"after", "kept" [MASK] tokens with an MLP, and "mlm", a masked-language model alone. Each seed draws data, weights and
masks.

A Markdown table of means over the seeds goes to stdout, the row of each run to stderr as JSON. Everything is measured
on held-out rows:

- loss, next to those of the best constant and of the mean target of the same position;
- R² in row: of the guesses, the row's mean taken away from guesses and targets;
- R² of content: the mean of the same position taken away before, as some encoders put absolute positions into targets;
- own target: how often the nearest among the targets of the guess's row is its own, and chance;
- accuracy: how often the nearest class mean of targets is that of the hidden token (mlm: the largest logit is its own).
  The class means are of training rows.

CPU, one thread, no network.
"""

import argparse
import ast
import json
import sys
import sysconfig
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from transformers import BertConfig, ModernBertConfig, PreTrainedConfig, TrainerCallback, set_seed

from jepa_hf import (
    DataCollatorForFeatureJEPA,
    DataCollatorForSpanJEPA,
    JepaConfig,
    JepaForRepresentationPrediction,
    JepaTrainer,
    JepaTrainingArguments,
)
from jepa_hf.data.text_datasets import builtin_corpus
from jepa_hf.data.tokenization import tokenize_dataset
from jepa_hf.data.tokenizer_training import train_wordpiece_tokenizer
from jepa_hf.masking.base_collator import MaskingCollator
from jepa_hf.models.positions import gather_positions
from jepa_hf.monitoring.health import prediction_health
from jepa_hf.monitoring.metrics import mean_pool_by_sample, top1_accuracy

VARIANTS: dict[str, dict[str, Any]] = {
    "before": {"pred_init": "small", "prediction_weight": 1.0},
    "after": {},
    "kept": {"masked_tokens": "mask_token", "predictor_type": "mlp"},
    "mlm": {"masked_tokens": "mask_token", "predictor_type": "mlp", "prediction_weight": 0.0, "mlm_weight": 1.0},
}
BATCH = 32
TOKENS = 64  # of the pairs
# Steps between two looks at the accuracy on pairs, and rows that are looked at.
LOOK, LOOKED_AT = 100, 128

Row = dict[str, Any]


@dataclass
class Task:
    """Rows to learn from and to judge by, the encoder that reads them, and how they are masked."""

    encoder: PreTrainedConfig
    collator: Callable[[str], MaskingCollator]  # from the context mode
    train: Sequence[Row]
    held_out: list[Row]
    learning_rate: float
    looked_at: int = 0  # held-out rows to note on when the accuracy passes a half


# ---- the tasks


def encoder_of(family: str, width: int, vocab_size: int, length: int) -> PreTrainedConfig:
    """Three layers without dropout."""
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": length,
        "pad_token_id": 0,
    }
    if family == "bert":
        plain = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return BertConfig(**sizes, **plain, intermediate_size=4 * width)
    special = dict.fromkeys(("bos_token_id", "cls_token_id", "eos_token_id", "sep_token_id"))
    return ModernBertConfig(**sizes, **special, intermediate_size=2 * width)


def pairs(family: str, seed: int, steps: int) -> Task:
    """Rows of 16 pairs (a, f(a)), f a permutation of 64 tokens; ten of the 32 tokens are hidden."""
    rng = np.random.default_rng(seed)
    tokenizer = train_wordpiece_tokenizer([" ".join(chr(0x4E00 + token) for token in range(TOKENS))])
    first = len(tokenizer) - TOKENS
    image = rng.permutation(TOKENS)
    drawn = rng.integers(TOKENS, size=(BATCH * steps + 512, 16))
    rows = first + np.stack([drawn, image[drawn]], axis=2).reshape(len(drawn), -1)
    rows = [{"input_ids": row} for row in rows]
    return Task(
        encoder=encoder_of(family, 64, len(tokenizer), 32),
        collator=lambda mode: DataCollatorForSpanJEPA(
            tokenizer, mask_ratio=10 / 32, mean_span_length=1, masked_tokens=mode, seed=seed
        ),
        train=rows[512:],
        held_out=rows[:512],
        learning_rate=1e-3,
        looked_at=LOOKED_AT,
    )


def text(family: str, seed: int, steps: int) -> Task:
    """Rows of 64 tokens, a fiftieth of them held out; 0.3 of each row's tokens are hidden."""
    texts = docstrings() + builtin_corpus()
    tokenizer = train_wordpiece_tokenizer(texts, vocab_size=2048, model_max_length=64)
    rows = tokenize_dataset(datasets.Dataset.from_dict({"text": texts}), tokenizer, max_seq_length=64, concat=True)
    rows = [row for row in rows.with_format("numpy") if len(row["input_ids"]) == 64]
    order = np.random.default_rng(seed).permutation(len(rows))
    held_out, train = np.split(order, [len(rows) // 50])
    return Task(
        encoder=encoder_of(family, 96, len(tokenizer), 64),
        collator=lambda mode: DataCollatorForSpanJEPA(
            tokenizer, mask_ratio=0.3, mean_span_length=1, masked_tokens=mode, seed=seed
        ),
        train=[rows[index] for index in train],
        held_out=[rows[index] for index in held_out],
        learning_rate=2e-3,
    )


def docstrings() -> list[str]:
    """The different docstrings of the standard library, of eight words and more."""
    library = Path(sysconfig.get_path("stdlib"))
    results: dict[str, None] = {}
    for path in sorted(library.rglob("*.py")):
        if {"test", "tests", "idle_test", "site-packages", "lib2to3"}.isdisjoint(path.relative_to(library).parts):
            for node in ast.walk(ast.parse(path.read_bytes())):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                    results[" ".join((ast.get_docstring(node) or "").split())] = None
    return [docstring for docstring in results if len(docstring.split()) >= 8]


def series(family: str, seed: int, steps: int) -> Task:
    """48 steps of x(t) = A x(t - 1) + noise, A 0.95 times a rotation of four features; 0.3 of the steps are hidden."""
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(rng.standard_normal((4, 4)))[0]
    noise = rng.standard_normal((48, BATCH * steps + 512, 4)) * (1 - 0.95**2) ** 0.5
    states = [rng.standard_normal(noise.shape[1:])]
    for step in noise[1:]:
        states.append(0.95 * states[-1] @ rotation + step)
    rows = [{"features": row} for row in np.stack(states, axis=1).astype(np.float32)]
    encoder = JepaConfig.for_features(
        4, mode="time", embed_dim=64, encoder_depth=3, num_heads=4, dropout=0.0, max_position_embeddings=48
    ).encoder_config
    return Task(
        encoder=encoder,
        collator=lambda mode: DataCollatorForFeatureJEPA(
            encoder, mask_ratio=0.3, mean_span_length=1, masked_tokens=mode, seed=seed
        ),
        train=rows[512:],
        held_out=rows[:512],
        learning_rate=1e-3,
    )


# ---- a run


@contextmanager
def without_rotary_angles() -> Iterator[None]:
    """Turn no query and no key of a predictor."""

    def zeros(positions: torch.Tensor, head_size: int) -> torch.Tensor:
        return torch.zeros(*positions.shape, head_size // 2, device=positions.device)

    with mock.patch("jepa_hf.models.predictors.rotary_angles", zeros):
        yield


@torch.no_grad()
def read(
    model: JepaForRepresentationPrediction, collator: MaskingCollator, rows: Sequence[Row]
) -> dict[str, torch.Tensor]:
    """Read rows with the masks of evaluation: guesses `[N, D]`, targets and more of all N hidden positions."""
    collator, training = collator.for_evaluation(), model.training
    parts: dict[str, list[torch.Tensor]] = defaultdict(list)
    model.eval()
    for begin in range(0, len(rows), BATCH):
        batch = collator(rows[begin : begin + BATCH])
        output = model(**batch, output_hidden_states=True, return_loss=False)
        positions, valid = batch["target_positions"][:, 0], batch["target_valid"][:, 0]
        parts["guesses"].append(output.predictions[:, 0][valid])
        parts["targets"].append(output.targets[:, 0][valid])
        parts["positions"].append(positions[valid])
        parts["rows"].append(begin + valid.nonzero()[:, 0])
        if "input_ids" in batch:
            parts["tokens"].append(batch["input_ids"].gather(1, positions)[valid])
        if model.mlm_head is not None:
            states = gather_positions(output.context_state, positions)
            parts["logits"].append(model.mlm_head(states, model.get_input_embeddings().weight)[valid])
    model.train(training)
    return {name: torch.cat(chunks) for name, chunks in parts.items()}


def accuracy(seen: dict[str, torch.Tensor], learned_from: dict[str, torch.Tensor]) -> float:
    """Share of hidden tokens that the guess names: by logits, else by the nearest class mean of `learned_from`."""
    if "logits" in seen:
        return (seen["logits"].argmax(dim=1) == seen["tokens"]).float().mean().item()
    tokens = learned_from["tokens"].unique()
    nearest = torch.cdist(seen["guesses"], mean_pool_by_sample(learned_from["targets"], learned_from["tokens"])).argmin(
        dim=1
    )
    return (tokens[nearest] == seen["tokens"]).float().mean().item()


def explained(error: torch.Tensor, targets: torch.Tensor, rows: torch.Tensor) -> float:
    """Share of the variance within rows that is not left in the error: `[N, D]`, `[N, D]`, and rows, long `[N]`."""
    left, total = ((x - mean_pool_by_sample(x, rows)[rows]).square().sum() for x in (error, targets))
    return 1 - (left / total).item()


def measure(model: JepaForRepresentationPrediction, task: Task) -> Row:
    """Measure a trained model on the held-out rows."""
    collator = task.collator(model.config.masked_tokens)
    seen = read(model, collator, task.held_out)
    results: Row = {}
    if "logits" in seen:
        results["cross-entropy"] = F.cross_entropy(seen["logits"], seen["tokens"]).item()
    else:
        targets, rows = seen["targets"], seen["rows"]
        masks = torch.zeros_like(rows)  # one of each row
        health = prediction_health(
            seen["guesses"], targets, model.config.loss, samples=rows, masks=masks, positions=seen["positions"]
        )
        names = {"": "prediction", "constant_": "constant_baseline", "position_": "position_baseline"}
        results |= {name: health[f"{key}_loss"] for name, key in names.items()}
        results = {f"{name}loss": value for name, value in results.items()}
        error = targets - seen["guesses"]
        results["R² in row"] = explained(error, targets, rows)
        positions = seen["positions"].unique(return_inverse=True)[1]
        without_positions = (x - mean_pool_by_sample(x, positions)[positions] for x in (error, targets))
        results["R² of content"] = explained(*without_positions, rows)
        each = [top1_accuracy(seen["guesses"][rows == row], targets[rows == row]) for row in rows.unique()]
        results["own target"] = torch.stack(each).mean().item()
        results["chance"] = len(each) / len(rows)
    if "tokens" in seen:
        results["accuracy"] = accuracy(seen, read(model, collator, task.train[:2048]))
    return results


class AccuracyCallback(TrainerCallback):
    """Notes the first step, of every hundredth, at which the accuracy on some held-out rows is above a half."""

    def __init__(self, task: Task, collator: MaskingCollator):
        self.task, self.collator = task, collator
        self.reached: int | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.reached is None and state.global_step % LOOK == 0:
            seen = read(kwargs["model"], self.collator, self.task.held_out[: self.task.looked_at])
            if accuracy(seen, seen) > 0.5:
                self.reached = state.global_step


def train(variant: str, task: Task, seed: int, steps: int, settings: Row) -> Row:
    """Train a variant and measure it."""
    set_seed(seed)
    config = JepaConfig(
        task.encoder,
        **{
            "pred_num_hidden_layers": 1,
            "target_norm": "instance",
            "contrastive_weight": 0.0,
            **VARIANTS[variant],
            **settings,
        },
    )
    model = JepaForRepresentationPrediction(config)
    collator = task.collator(config.masked_tokens)
    callbacks = [AccuracyCallback(task, collator)] if task.looked_at else []
    begin = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        args = JepaTrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=task.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            seed=seed,
            use_cpu=True,
            health_steps=0,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        JepaTrainer(model, args, collator, train_dataset=task.train, callbacks=callbacks).train()
    results = measure(model, task)
    for callback in callbacks:
        results["half at"] = callback.reached
    return results | {"CPU seconds": time.process_time() - begin}


# ---- the table


def table(task: str, results: dict[str, list[Row]]) -> str:
    """Format the means over the seeds as Markdown; the shares, which are the claim, of each seed too."""
    columns = list(dict.fromkeys(name for rows in results.values() for row in rows for name in row))
    lines = [f"| {task} | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    for variant, rows in results.items():
        lines.append(f"| {variant} | {' | '.join(cell(name, [row.get(name) for row in rows]) for name in columns)} |")
    return "\n".join(lines)


def cell(name: str, values: list[float | None]) -> str:
    if name == "half at":
        return ", ".join("never" if value is None else str(value) for value in values)
    numbers = [value for value in values if value is not None]
    if not numbers:
        return ""
    if name == "CPU seconds":
        return f"{np.mean(numbers):.0f}"
    mean = f"{np.mean(numbers):.3f}"
    if name in ("R² in row", "R² of content", "own target", "accuracy") and len(numbers) > 1:
        mean += f" ({', '.join(f'{number:.3f}' for number in numbers)})"
    return mean


def main() -> None:
    """Run the variants of one task and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["pairs", "text", "series"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="default all that apply")
    parser.add_argument("--encoder", choices=["modernbert", "bert"], default="modernbert", help="of pairs and text")
    parser.add_argument("--steps", type=int, help="default 1500 (pairs), 1000 (text), 1200 (series)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--settings", default="{}", help="JSON: arguments of JepaConfig that all variants get")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    make = {"pairs": pairs, "text": text, "series": series}[options.task]
    steps = options.steps or {"pairs": 1500, "text": 1000, "series": 1200}[options.task]
    variants = options.variants or [variant for variant in VARIANTS if variant != "mlm" or options.task != "series"]
    results: dict[str, list[Row]] = {variant: [] for variant in variants}
    for seed in options.seeds:
        task = make(options.encoder, seed, steps)
        for variant in variants:
            with without_rotary_angles() if variant == "before" else nullcontext():
                results[variant].append(train(variant, task, seed, steps, json.loads(options.settings)))
            print(json.dumps({"variant": variant, "seed": seed, **results[variant][-1]}), file=sys.stderr, flush=True)
    print(table(options.task, results), flush=True)


if __name__ == "__main__":
    main()
