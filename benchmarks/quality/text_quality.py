"""Which recipe learns text best: variants side by side, each given the same time on the same kind of GPU.

    python benchmarks/quality/text_quality.py run variants.jsonl --tasks TASK ... --output rows.jsonl \
        -- RECIPE.yaml --flag value ...
    python benchmarks/quality/text_quality.py table rows.jsonl [--against NAME] [--in_domain TASK]

A line of `variants.jsonl` is one variant: `name`; `objective`, "jepa" (default; what run_jepa.py runs) or "mlm"
(transformers' Trainer, its collator and its masked-language model around the same encoder, on the same rows); `flags`
of run_jepa.py; `seconds`, which its own steps per second, measured before, turn into `max_steps`; `seeds`, default [0];
`mlm_probability` of "mlm"; `targets`, see `replace_targets`; `"rotary": false`, see `content.without_rotary_angles`.
What follows `--` holds for all variants. Each GPU of the machine takes one variant at a time.

TASK is as `jepa-hf evaluate` takes it: a file is divided, so that settings can be chosen on training files and the
test files be read once, at the end. Probes are fitted on the CPU during the next variant's training.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from content import without_rotary_angles
from datasets import Dataset
from sentence_transformers.util import pairwise_cos_sim
from transformers import (
    AutoModelForMaskedLM,
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    set_seed,
)

from jepa_hf import JepaConfig, JepaForRepresentationPrediction, JepaTrainer
from jepa_hf.cli.arguments import Parsed
from jepa_hf.cli.console import quiet_libraries
from jepa_hf.cli.encoder_loading import TrainingComponents
from jepa_hf.cli.parsing import parse_command
from jepa_hf.cli.prepare import prepare
from jepa_hf.cli.train import finalize_arguments
from jepa_hf.evaluation.embedder import Embedder
from jepa_hf.evaluation.scoring import linear_probe, spearman
from jepa_hf.evaluation.tasks import TaskArguments, load_tasks
from jepa_hf.models import modeling_jepa, objective, targets
from jepa_hf.models.batch import JepaBatch
from jepa_hf.models.losses import layer_norm_no_affine, standardize_features
from jepa_hf.models.positions import gather_positions
from jepa_hf.monitoring.health import is_measurement
from jepa_hf.training.run_directory import RunPlan

sys.path.append(str(Path(__file__).resolve().parents[1]))
import gpu_queue

POOLING = ("mean", "layers")
# Nothing but training is to take time.
QUIET = ("--do_eval=no", "--eval_strategy=no", "--eval_on_start=no", "--save_strategy=no", "--report_to=none")
QUIET += ("--disable_tqdm=yes", "--health_steps=500", "--include_num_input_tokens_seen=no", "--logging_steps=200")
UNTIMED, TIMED = 20, 40


def replace_targets(kind: str, model: JepaForRepresentationPrediction) -> None:
    """An experiment: other targets than the averaged hidden states.

    - "feed_forward": what each layer's feed-forward part adds to the residual stream (data2vec, table 5).
    - "increments": the sum of each layer's attention and feed-forward part.
    - "minus_embedding": the residual stream without the input embedding.
    - "with_embedding": the input embedding is one of the averaged layers; "embedding": it is the only one.
    - "batch": in place of `target_norm`, each feature has mean 0 and variance 1 over all tokens of the batch.
    - "centred_by_token", "centred_by_position": the targets less their mean over the batch's tokens of the same id, or
      at the same place, normalized once more; "centred_by_token_and_plain": their mean with the targets themselves.
    - "whitened": the targets with the identity for a covariance over all tokens of the batch.
    """
    feed_forward: list[torch.Tensor] = []
    if kind == "feed_forward":
        for layer in model.target_encoder.layers:
            layer.mlp.register_forward_hook(lambda _module, _inputs, output: feed_forward.append(output))

    @torch.no_grad()
    def encode(config: JepaConfig, adapter: Any, encoder: Any, batch: JepaBatch, **flags: bool) -> targets.Targets:
        feed_forward.clear()
        encoded = targets.encode_targets(config, adapter, encoder, batch, **flags | {"output_hidden_states": True})
        layers = _layers(kind, encoded.encoded.hidden_states, config.average_top_k_layers, feed_forward)
        average = sum(_normalize(kind, config, layer.float(), batch) for layer in layers) / len(layers)
        vectors = _change(kind, config, _normalize(kind, config, average, batch), batch)
        vectors = gather_positions(vectors, batch.positions.reshape(len(batch.samples), -1))
        return encoded._replace(vectors=vectors.reshape(*batch.positions.shape, -1))

    modeling_jepa.encode_targets = encode


def _layers(
    kind: str, states: tuple[torch.Tensor, ...], count: int, feed_forward: list[torch.Tensor]
) -> Sequence[torch.Tensor]:
    """The tensors `[B, L, D]` that are averaged, of the hidden states of all layers."""
    if kind == "feed_forward":
        return feed_forward[-count:]
    if kind == "increments":
        return [after - before for before, after in pairwise(states[-count - 1 :])]
    if kind == "minus_embedding":
        return [state - states[0] for state in states[-count:]]
    if kind == "embedding":
        return states[:1]
    return (*states[-count:], states[0]) if kind == "with_embedding" else states[-count:]


def _normalize(kind: str, config: JepaConfig, states: torch.Tensor, batch: JepaBatch) -> torch.Tensor:
    if kind == "batch":
        return standardize_features(states.flatten(0, 1)).view_as(states)
    return targets._normalize(config.target_norm, states, batch)


def _change(kind: str, config: JepaConfig, vectors: torch.Tensor, batch: JepaBatch) -> torch.Tensor:
    """Center or whiten the averaged targets `[B, L, D]`."""
    if kind == "whitened":
        return _whitened(vectors.flatten(0, 1)).view_as(vectors)
    if kind == "centred_by_position":
        return layer_norm_no_affine(vectors - vectors.mean(dim=0, keepdim=True))
    if not kind.startswith("centred_by_token"):
        return vectors
    ids, vocabulary = batch.clean["input_ids"].flatten(), config.encoder_config.vocab_size
    centred = layer_norm_no_affine(_centred(vectors.flatten(0, 1), ids, vocabulary).view_as(vectors))
    return centred if kind == "centred_by_token" else (centred + vectors) / 2


def _centred(vectors: torch.Tensor, groups: torch.Tensor, count: int) -> torch.Tensor:
    """`[N, D]` less the mean of the others of the same group; 0 where a vector is alone in it."""
    sums = vectors.new_zeros(count, vectors.shape[-1]).index_add_(0, groups, vectors)
    sizes = vectors.new_zeros(count).index_add_(0, groups, torch.ones_like(vectors[:, 0]))
    others = (sizes[groups] - 1)[:, None]
    return torch.where(others > 0, vectors - (sums[groups] - vectors) / others.clamp_min(1), 0.0)


def _whitened(vectors: torch.Tensor, floor: float = 0.01, iterations: int = 20) -> torch.Tensor:
    """`[N, D]` times the inverse root of their covariance, by the Newton-Schulz iteration.

    Args:
        floor: added to each variance, as a share of their mean.
    """
    with torch.autocast(vectors.device.type, enabled=False):
        vectors = vectors.float() - vectors.float().mean(dim=0)
        covariance = vectors.T @ vectors / len(vectors)
        eye = torch.eye(len(covariance), device=vectors.device)
        covariance = covariance + floor * covariance.diagonal().mean() * eye
        scale = covariance.norm()
        root, inverse = covariance / scale, eye
        for _ in range(iterations):
            step = 1.5 * eye - 0.5 * inverse @ root
            root, inverse = root @ step, step @ inverse
        return vectors @ inverse / scale.sqrt()


def contrast_within_rows() -> None:
    """Replace the prediction loss by finding each target among those of its own row, by cosine."""

    def loss(kind: str, prediction: torch.Tensor, target: torch.Tensor, beta: float) -> torch.Tensor:
        prediction, target = (F.normalize(x.float(), dim=-1) for x in (prediction, target))
        logits = prediction @ target.transpose(1, 2) / 0.1
        return logits.logsumexp(dim=-1) - logits.diagonal(dim1=1, dim2=2)

    objective.prediction_loss = loss


# ---- one variant


def token_rows(path: str, length: int) -> Dataset:
    """Rows of token ids, `[N, L]` of one length with a special token at each end, divided into rows of `length`."""
    ids = np.load(path)
    first, last = ids[0, 0], ids[0, -1]
    inner = ids[:, 1:-1].reshape(-1)
    inner = inner[: len(inner) // (length - 2) * (length - 2)].reshape(-1, length - 2)
    ids = np.pad(inner, ((0, 0), (1, 1)))
    ids[:, 0], ids[:, -1] = first, last
    offsets = np.arange(len(ids) + 1, dtype=np.int32) * length
    column = pa.ListArray.from_arrays(offsets, ids.astype(np.int32).reshape(-1))
    return Dataset(pa.table({"input_ids": column}))


def build(
    variant: dict[str, Any], seed: int, common: Sequence[str], max_steps: int | None, rows: str | None = None
) -> tuple[Trainer, TrainingComponents]:
    """The trainer of a variant, from a fresh start."""
    flags = [
        *common,
        *QUIET,
        *(f"--{name}={value}" for name, value in variant.get("flags", {}).items()),
        f"--seed={seed}",
    ]
    if max_steps is not None:
        flags.append(f"--max_steps={max_steps}")
    parsed = parse_command(flags)
    model_args, data_args, _, args = parsed
    finalize_arguments(model_args, data_args, args)
    set_seed(seed)
    prepared = prepare(parsed, RunPlan())
    if rows is not None:
        prepared.train_dataset = token_rows(rows, data_args.max_seq_length)
    if variant.get("objective") == "mlm":
        return _mlm_trainer(variant, parsed, prepared, seed), prepared
    model = prepared.model
    if variant.get("row_infonce"):
        contrast_within_rows()
    if "targets" in variant:
        replace_targets(variant["targets"], model)
    rows, tokenizer = prepared.train_dataset, prepared.processing_class
    trainer = JepaTrainer(model, args, prepared.collator, train_dataset=rows, processing_class=tokenizer)
    return trainer, prepared


def _mlm_trainer(variant: dict[str, Any], parsed: Parsed, prepared: TrainingComponents, seed: int) -> Trainer:
    model_args, _, _, args = parsed
    set_seed(seed)
    config = prepared.model.config.encoder_config
    if config.model_type == "modernbert":
        config.sparse_prediction = True  # logits at the hidden positions alone: the faster way
    if model_args.model_name_or_path is None:
        model = AutoModelForMaskedLM.from_config(config, attn_implementation=model_args.attn_implementation)
    else:
        model = AutoModelForMaskedLM.from_pretrained(model_args.model_name_or_path, dtype=torch.float32)
    tokenizer = prepared.processing_class
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=variant.get("mlm_probability", 0.3))
    return Trainer(
        model, args, data_collator=collator, train_dataset=prepared.train_dataset, processing_class=tokenizer
    )


class Clock(TrainerCallback):
    """When a step was done, the device's work included."""

    def __init__(self, *steps: int):
        self.at = dict.fromkeys(steps, 0.0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.at:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.at[state.global_step] = time.perf_counter()


def steps_per_second(make: Callable[[int | None], tuple[Trainer, TrainingComponents]]) -> float:
    """Of a throwaway run, once it is warm."""
    clock = Clock(UNTIMED, UNTIMED + TIMED)
    trainer, _ = make(UNTIMED + TIMED)
    trainer.add_callback(clock)
    trainer.train()
    begin, end = clock.at.values()
    return TIMED / (end - begin)


def run_variant(options: argparse.Namespace, common: list[str]) -> None:
    """Train one variant and write its encoder's vectors of all tasks next to its row."""
    variant, folder = json.loads(options.variant), Path(options.folder)
    common = [*common, f"--output_dir={folder / 'out'}"]

    def make(max_steps: int | None) -> tuple[Trainer, TrainingComponents]:
        return build(variant, options.seed, common, max_steps, options.rows)

    row: dict[str, Any] = {**variant, "seed": options.seed}
    max_steps = None
    if "seconds" in variant:
        row["steps_per_s"] = round(steps_per_second(make), 3)
        max_steps = max(int(row["steps_per_s"] * variant["seconds"]), 1)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        row["device"] = torch.cuda.get_device_name()
    trainer, prepared = make(max_steps)
    result = trainer.train() if trainer.args.max_steps else None  # --max_steps 0: the start itself
    row["steps"] = trainer.state.global_step
    row["train_s"] = round(result.metrics["train_runtime"], 1) if result else 0.0
    if torch.cuda.is_available():
        row["memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    if isinstance(trainer, JepaTrainer):
        last = [entry for entry in trainer.state.log_history if is_measurement(entry)][-1:]
        row["health"] = {name: value for entry in last for name, value in entry.items()}
        row["found"] = {kind: step for kind, (step, _) in trainer.health_findings.items()}
        encoder = trainer._unwrapped.get_encoder()
    else:
        encoder = trainer.accelerator.unwrap_model(trainer.model).base_model
    row["loss"] = [round(entry["loss"], 4) for entry in trainer.state.log_history if "loss" in entry][-1:]
    if options.save:
        encoder.save_pretrained(folder / "encoder")
        prepared.processing_class.save_pretrained(folder / "encoder")
    np.savez(folder / "vectors.npz", **embed(encoder, prepared, options))
    (folder / "row.json").write_text(json.dumps(row))


def embed(encoder: PreTrainedModel, prepared: TrainingComponents, options: argparse.Namespace) -> dict[str, np.ndarray]:
    """Vectors and targets of all tasks, under `task|kind|split|side|pooling` and `task|kind|split|targets`."""
    limits = TaskArguments(max_train_samples=options.max_train_samples, max_test_samples=options.max_test_samples)
    embedder = Embedder(
        encoder, prepared.processing_class, name="variant", batch_size=256, max_seq_length=options.max_seq_length
    )
    results = {}
    for task in load_tasks(options.tasks, limits):
        for name in ("train", "test"):
            split = getattr(task, name)
            if split is None:
                continue
            results[f"{task.name}|{task.kind}|{name}|targets"] = split.targets
            for side, samples in enumerate(split.samples):
                for pooling, vectors in embedder.embed(samples, POOLING).items():
                    results[f"{task.name}|{task.kind}|{name}|{side}|{pooling}"] = vectors
    return results


def judge(options: argparse.Namespace) -> None:
    """Fit the probes on a variant's vectors, and print its row."""
    folder = Path(options.folder)
    row, vectors = json.loads((folder / "row.json").read_text()), np.load(folder / "vectors.npz")
    kinds = {task: kind for task, kind, *_ in (name.split("|") for name in vectors.files)}
    row["scores"] = {pooling: {} for pooling in POOLING}
    for task, kind in kinds.items():
        targets = vectors[f"{task}|{kind}|test|targets"]
        for pooling in POOLING:
            if kind == "labels":
                known = vectors[f"{task}|{kind}|train|0|{pooling}"], vectors[f"{task}|{kind}|train|targets"]
                predicted, _ = linear_probe(*known, vectors[f"{task}|{kind}|test|0|{pooling}"])
                score = (predicted == targets).mean()
            else:
                sides = (torch.from_numpy(vectors[f"{task}|{kind}|test|{side}|{pooling}"]) for side in (0, 1))
                score = spearman(pairwise_cos_sim(*sides).numpy()[None], targets[None])[0]
            row["scores"][pooling][task] = round(100 * float(score), 2)
    row["kinds"] = kinds
    (folder / "vectors.npz").unlink()
    print(json.dumps(row))


# ---- all variants


def run(options: argparse.Namespace, common: list[str]) -> None:
    """Work through the variants; with `--follow`, through those that are added meanwhile too."""

    def command(kind: str, variant: dict[str, Any], seed: int, folder: Path) -> list[str]:
        given = [
            "--folder",
            str(folder),
            "--variant",
            json.dumps(variant),
            "--seed",
            str(seed),
            "--tasks",
            *options.tasks,
        ]
        for name in ("max_train_samples", "max_test_samples", "max_seq_length"):
            given += [f"--{name}", str(getattr(options, name))]
        given += ["--save"] if options.save else []
        given += ["--rows", options.rows] if options.rows else []
        return [sys.executable, "-W", "ignore", __file__, kind, *given, "--", *common]

    rows = gpu_queue.run(
        options,
        train=partial(command, "variant"),
        judge=partial(command, "judge"),
        summary=partial(summary, options=options),
    )
    print(tables(rows, options))


# ---- tables


def probe_mean(row: dict[str, Any], pooling: str) -> float:
    return mean(score for task, score in row["scores"][pooling].items() if row["kinds"][task] == "labels")


def similarity(row: dict[str, Any], pooling: str) -> float:
    scores = [score for task, score in row["scores"][pooling].items() if row["kinds"][task] == "similarity"]
    return mean(scores) if scores else float("nan")


def summary(row: dict[str, Any], options: argparse.Namespace) -> str:
    """A row in a line."""
    figures = [
        f"{pooling}: probes {probe_mean(row, pooling):.2f}, {options.in_domain} "
        f"{row['scores'][pooling].get(options.in_domain, float('nan')):.2f}, similarity {similarity(row, pooling):.2f}"
        for pooling in POOLING
    ]
    return f"{row['name']} seed {row['seed']}: {'; '.join(figures)}; {row['steps']} steps, {row['train_s']} s"


def tables(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """Every variant, the best first; and, of variants with as many seeds, the paired differences to `--against`."""
    variants: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        variants.setdefault(row["name"], []).append(row)
    lines = [
        f"| variant | seeds | steps | s | probes, mean | probes, layers | {options.in_domain}, mean | layers | "
        "similarity, mean | layers | found |",
        "|" + " --- |" * 11,
    ]
    measured = {name: [row for row in rows if "failed" not in row] for name, rows in variants.items()}
    measured = {name: rows for name, rows in measured.items() if rows}
    best = sorted(measured, key=lambda name: -max(_mean(measured[name], probe_mean, p)[0] for p in POOLING))
    for name in best:
        mine = measured[name]
        cells = [
            _shown(*_mean(mine, of, pooling))
            for of in (probe_mean, _in_domain(options), similarity)
            for pooling in POOLING
        ]
        steps, seconds = mean(row["steps"] for row in mine), mean(row["train_s"] for row in mine)
        results = sorted({f"{kind} at {step}" for row in mine for kind, step in row.get("found", {}).items()})
        lines.append(
            f"| {name} | {len(mine)} | {steps:.0f} | {seconds:.0f} | {' | '.join(cells)} | {', '.join(results)} |"
        )
    lines += [
        f"| {name} | failed | | | | | | | | | {variants[name][0]['failed'][:120]} |" for name in variants.keys() - best
    ]
    if options.against in measured:
        lines += ["", f"Paired differences to {options.against}, their standard error over seeds:", ""]
        lines += [f"| variant | pairs | probes, mean | probes, layers | {options.in_domain}, mean | similarity, mean |"]
        lines += ["|" + " --- |" * 6]
        base = {row["seed"]: row for row in measured[options.against]}
        for name in best:
            pairs = [(row, base[row["seed"]]) for row in measured[name] if row["seed"] in base]
            if name == options.against or len(pairs) < 2:
                continue
            cells = []
            for of, pooling in (
                (probe_mean, "mean"),
                (probe_mean, "layers"),
                (_in_domain(options), "mean"),
                (similarity, "mean"),
            ):
                differences = [of(mine, pooling) - of(theirs, pooling) for mine, theirs in pairs]
                cells.append(f"{mean(differences):+.2f} ± {_deviation(differences) / len(differences) ** 0.5:.2f}")
            lines.append(f"| {name} | {len(pairs)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _in_domain(options: argparse.Namespace) -> Callable[[dict[str, Any], str], float]:
    return lambda row, pooling: row["scores"][pooling].get(options.in_domain, float("nan"))


def _mean(rows: list[dict[str, Any]], of: Callable[..., float], pooling: str) -> tuple[float, float]:
    values = [of(row, pooling) for row in rows]
    return mean(values), _deviation(values)


def _deviation(values: list[float]) -> float:
    """Of a sample; NaN of one value, and where there was no such task."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")


def _shown(value: float, deviation: float) -> str:
    return f"{value:.2f}" if deviation != deviation else f"{value:.2f} ± {deviation:.2f}"


def main() -> None:
    argv = sys.argv[1:]
    common = argv[argv.index("--") + 1 :] if "--" in argv else []
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    whole, one, probes, table = (commands.add_parser(name) for name in ("run", "variant", "judge", "table"))
    gpu_queue.add_arguments(whole, (one, probes), work_dir="quality")
    for command in (whole, one, probes):
        command.add_argument("--tasks", nargs="+", required=True)
        command.add_argument("--max_train_samples", type=int, default=4000)
        command.add_argument("--max_test_samples", type=int, default=2000)
        command.add_argument("--max_seq_length", type=int, default=128, help="where the tasks' texts are cut")
        command.add_argument("--save", action="store_true", help="keep the encoders")
        command.add_argument("--rows", help="a .npy file of token ids [N, L] to train on, in place of --train_file")
    table.add_argument("rows")
    for command in (whole, table):
        command.add_argument("--against", default="mlm", help="the variant that others are compared with")
        command.add_argument("--in_domain", default="imdb", help="the task whose texts are like those trained on")
    options = parser.parse_args(argv[: argv.index("--")] if "--" in argv else argv)
    quiet_libraries()
    match options.command:
        case "run":
            run(options, common)
        case "variant":
            without_rotary = json.loads(options.variant).get("rotary") is False
            with without_rotary_angles() if without_rotary else nullcontext():
                run_variant(options, common)
        case "judge":
            judge(options)
        case "table":
            print(tables(gpu_queue.read_rows(Path(options.rows)), options))


if __name__ == "__main__":
    main()
