"""Bring a sentence encoder to a domain: what it gains there, and what it forgets elsewhere.

    python benchmarks/quality/adaptation.py clock variants.jsonl --model MODEL --texts NAME=FILE ... --output rates.json
    python benchmarks/quality/adaptation.py run variants.jsonl --model MODEL --texts NAME=FILE ... \
        --rates rates.json --tasks TASK ... --output rows.jsonl
    python benchmarks/quality/adaptation.py table rows.jsonl

A line of `variants.jsonl` is one variant: `name`; `domain`, a NAME of `--texts`, a JSON-lines file with a column
"text"; `objective`:

- "start": the model itself.
- "jepa": run_jepa.py with `configs/pretrained_bert.yaml` and `flags`.
- "mlm": transformers' Trainer and its collator, as in `text_quality.py`, with `flags`.
- "simcse": each text next to itself, in-batch negatives and dropout as the noise (Gao et al. 2021).
- "tsdae": a text from the vector of its words, 60 % of them deleted (Wang et al. 2021).
- "ct", "ct_in_batch": contrastive tension (Carlsson et al. 2021), with seven negatives for each pair or with in-batch
  negatives.

The last four are sentence-transformers' losses in its trainer, with `learning_rate` and `batch_size`. `texts` is
another NAME than the domain's to train on. For JEPA and MLM, parameters with a part of `freeze` in their name stay as
they are. `seconds` times the variant's rate of `rates.json` is its number of steps: `clock` times one variant after
another, each alone on the GPU, and variants with the same `clock` share a rate. So several can run next to each other
afterwards, each with the steps that it would have had alone.

Judged are the trained encoder and averages of its weights with the start's (Wortsman et al. 2022): "start 0.3" has 0.3
of the start. JEPA's EMA target encoder is judged, too. A vector is the mean of the last layer. TASK is as `jepa-hf
evaluate` takes it; the task named like the domain is the domain's probe.
"""

import argparse
import copy
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from datasets import Dataset, load_dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer import losses as peers
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from sentence_transformers.util import pairwise_cos_sim
from text_quality import TIMED, UNTIMED, Clock, build
from torch import nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, Trainer, set_seed

from jepa_hf import JepaTrainer
from jepa_hf.cli.console import quiet_libraries
from jepa_hf.evaluation.scoring import linear_probe, retrieval_metrics, spearman
from jepa_hf.evaluation.tasks import TaskArguments, load_tasks
from jepa_hf.monitoring.health import is_measurement

sys.path.append(str(Path(__file__).resolve().parents[1]))
import gpu_queue

Variant = dict[str, Any]
RECIPE = Path(__file__).resolve().parents[2] / "configs" / "pretrained_bert.yaml"
LENGTH = 128


# ---- training


def peer_trainer(options: argparse.Namespace, variant: Variant, texts: str, seed: int, max_steps: int) -> Trainer:
    """sentence-transformers' trainer of a variant."""
    set_seed(seed)
    transformer = Transformer(options.model, max_seq_length=LENGTH)
    encoder = SentenceTransformer(modules=[transformer, Pooling(transformer.get_embedding_dimension(), "mean")])
    sentences = list(load_dataset("json", data_files=texts, split="train")["text"])
    rows, loss = _peer_rows_and_loss(variant["objective"], encoder, sentences)
    args = SentenceTransformerTrainingArguments(
        output_dir=str(Path(options.folder) / "out"),
        per_device_train_batch_size=variant["batch_size"],
        learning_rate=variant["learning_rate"],
        lr_scheduler_type=variant.get("schedule", "linear"),
        warmup_steps=variant.get("warmup_steps", 0.1),
        weight_decay=variant.get("weight_decay", 0.0),
        max_steps=max_steps,
        bf16=torch.cuda.is_available(),
        dataloader_num_workers=options.dataloader_num_workers,
        dataloader_drop_last=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=200,
        seed=seed,
    )
    return SentenceTransformerTrainer(encoder, args, train_dataset=rows, loss=loss)


def _peer_rows_and_loss(objective: str, encoder: SentenceTransformer, texts: list[str]) -> tuple[Dataset, nn.Module]:
    if objective == "simcse":
        return Dataset.from_dict({"text": texts, "same": texts}), peers.MultipleNegativesRankingLoss(encoder)
    if objective == "tsdae":
        rows = Dataset.from_dict({"text": texts})
        rows.set_transform(_delete_words, columns=["text"])
        return rows, peers.DenoisingAutoEncoderLoss(encoder, tie_encoder_decoder=True)
    if objective == "ct_in_batch":
        return Dataset.from_dict({"text": texts}), peers.ContrastiveTensionLossInBatchNegatives(encoder)
    others = [text if number % 8 == 0 else random.choice(texts) for number, text in enumerate(texts)]
    return Dataset.from_dict({"text": texts, "other": others}), peers.ContrastiveTensionLoss(encoder)


def _delete_words(batch: dict[str, list[str]], deleted: float = 0.6) -> dict[str, list[str]]:
    noisy = []
    for text in batch["text"]:
        words = text.split()
        kept = [word for word in words if random.random() > deleted]
        noisy.append(" ".join(kept or words[:1]))
    return {"noisy": noisy, "text": batch["text"]}


def make_trainer(options: argparse.Namespace, variant: Variant, seed: int, max_steps: int) -> Trainer:
    """The trainer of a variant, from a fresh start."""
    texts = dict(pair.split("=", 1) for pair in options.texts)[variant.get("texts", variant["domain"])]
    if variant["objective"] not in ("jepa", "mlm"):
        return peer_trainer(options, variant, texts, seed, max_steps)
    flags = {"model_name_or_path": options.model, "train_file": texts, "output_dir": f"{options.folder}/out"}
    flags |= {"bf16": torch.cuda.is_available(), "max_seq_length": LENGTH}
    flags |= {"dataloader_num_workers": options.dataloader_num_workers}
    common = [str(RECIPE), *(f"--{name}={value}" for name, value in flags.items())]
    trainer, _ = build(variant, seed, common, max_steps)
    for name, parameter in trainer.model.named_parameters():
        if any(part in name for part in variant.get("freeze", [])):
            parameter.requires_grad_(False)
    return trainer


def clock(options: argparse.Namespace) -> None:
    """Write the steps per second of each `clock` of the variants, one after the other."""
    rates: dict[str, float] = {}
    for variant, _ in gpu_queue.read_variants(Path(options.variants), follow=False):
        kind = variant.get("clock", variant["name"])
        if variant["objective"] == "start" or kind in rates:
            continue
        times = Clock(UNTIMED, UNTIMED + TIMED)
        trainer = make_trainer(options, variant, 0, UNTIMED + TIMED)
        trainer.add_callback(times)
        trainer.train()
        begin, end = times.at.values()
        rates[kind] = round(TIMED / (end - begin), 2)
        print(f"{kind}: {rates[kind]} steps/s", flush=True)
    Path(options.output).write_text(json.dumps(rates, indent=1) + "\n")


# ---- vectors


def tokenize_tasks(options: argparse.Namespace, path: Path) -> None:
    """Write the token ids and targets of all tasks once, for all variants."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    limits = TaskArguments(max_train_samples=options.max_train_samples, max_test_samples=options.max_test_samples)
    tasks = {}
    for task in load_tasks(options.tasks, limits):
        splits = {"test": task.test} | ({} if task.train is None else {"train": task.train})
        ids = {
            name: [tokenizer(list(side), truncation=True, max_length=LENGTH)["input_ids"] for side in split.samples]
            for name, split in splits.items()
        }
        tasks[task.name] = {"kind": task.kind, "ids": ids, "splits": splits}
    torch.save({"pad": tokenizer.pad_token_id, "tasks": tasks}, path)


@torch.no_grad()
def mean_vectors(encoder: PreTrainedModel, ids: list[list[int]], pad: int, batch_size: int = 512) -> np.ndarray:
    """The mean of the last layer of each text, float32 `[N, D]`, computed in float16 on a GPU."""
    vectors = np.zeros((len(ids), encoder.config.hidden_size), dtype=np.float32)
    order = np.argsort([len(row) for row in ids])
    for begin in range(0, len(ids), batch_size):
        rows = order[begin : begin + batch_size]
        length = len(ids[rows[-1]])
        padded = torch.tensor([ids[row] + [pad] * (length - len(ids[row])) for row in rows], device=encoder.device)
        mask = torch.arange(length, device=padded.device) < torch.tensor([[len(ids[r])] for r in rows]).to(padded)
        with torch.autocast("cuda", torch.float16, enabled=padded.is_cuda):
            states = encoder(input_ids=padded, attention_mask=mask.long()).last_hidden_state
        weights = mask[..., None].float()
        vectors[rows] = ((states.float() * weights).sum(1) / weights.sum(1)).cpu().numpy()
    return vectors


def encoders(
    trainer: Trainer, start: PreTrainedModel, shares: Sequence[float]
) -> Iterator[tuple[str, PreTrainedModel]]:
    """The trained encoder, JEPA's target encoder, and averages with the start, by name."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if isinstance(trainer, JepaTrainer):
        trained = model.merged_encoder("context").to(model.device)
        yield "target", model.merged_encoder("target").to(model.device)
    else:
        trained = model.transformers_model if isinstance(model, SentenceTransformer) else model.base_model
    weights = {name: value for name, value in trained.named_parameters() if not name.startswith("pooler.")}
    yield "trained", trained
    for share in shares:
        averaged = copy.deepcopy(start).to(trained.device)
        with torch.no_grad():
            for name, value in averaged.named_parameters():
                if name in weights:
                    value.lerp_(weights[name].float(), 1 - share)
        yield f"start {share}", averaged


def run_variant(options: argparse.Namespace) -> None:
    """Train one variant, and write the vectors of its encoders."""
    variant, folder = json.loads(options.variant), Path(options.folder)
    row: Variant = {**variant, "seed": options.seed}
    start = AutoModel.from_pretrained(options.model).eval()
    if variant["objective"] == "start":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        found: Any = [("trained", start.to(device))]
    else:
        steps = variant.get("max_steps")
        if steps is None:
            rates = json.loads(Path(options.rates).read_text())
            steps = max(round(rates[variant.get("clock", variant["name"])] * variant["seconds"]), 1)
        trainer = make_trainer(options, variant, options.seed, steps)
        result = trainer.train()
        row |= {"steps": steps, "train_s": round(result.metrics["train_runtime"], 1)}
        if isinstance(trainer, JepaTrainer):
            measured = [entry for entry in trainer.state.log_history if is_measurement(entry)]
            row["health"] = measured[-1] if measured else None
        found = encoders(trainer, start, options.shares)
    row["loss"] = None if variant["objective"] == "start" else round(result.training_loss, 4)
    stored = torch.load(Path(options.tokens), weights_only=False)
    vectors = {}
    for name, encoder in found:
        encoder.eval()
        for task, entry in stored["tasks"].items():
            if entry["kind"] == "labels" and task != variant["domain"] and variant["objective"] != "start":
                continue
            for split, sides in entry["ids"].items():
                for side, ids in enumerate(sides):
                    vectors[f"{name}|{task}|{split}|{side}"] = mean_vectors(encoder, ids, stored["pad"])
    np.savez(folder / "vectors.npz", **vectors)
    (folder / "row.json").write_text(json.dumps(row))


def judge(options: argparse.Namespace) -> None:
    """Print a variant's row with the scores of its encoders, in percent."""
    folder = Path(options.folder)
    row, vectors = json.loads((folder / "row.json").read_text()), np.load(folder / "vectors.npz")
    tasks = torch.load(Path(options.tokens), weights_only=False)["tasks"]
    row["scores"] = {}
    for key in vectors.files:
        name, task, split, side = key.split("|")
        if (split, side) != ("test", "0"):
            continue
        kind, splits = tasks[task]["kind"], tasks[task]["splits"]
        scores = row["scores"].setdefault(name, {})
        first = vectors[key]
        if kind == "labels":
            train = vectors[f"{name}|{task}|train|0"], splits["train"].targets
            predicted, _ = linear_probe(*train, first)
            scores[task] = (predicted == splits["test"].targets).mean()
        else:
            second = vectors[f"{name}|{task}|test|1"]
            if kind == "similarity":
                cosines = pairwise_cos_sim(torch.from_numpy(first), torch.from_numpy(second)).numpy()
                scores[task] = spearman(cosines[None], splits["test"].targets[None])[0]
            else:
                values = retrieval_metrics(splits["test"], first, second)
                scores |= {task: values["ndcg@10"].mean(), f"{task} recall@1": values["recall@1"].mean()}
        row["scores"][name] = scores
    row["scores"] = {
        name: {task: round(100 * float(v), 2) for task, v in scores.items()} for name, scores in row["scores"].items()
    }
    row["kinds"] = {name: entry["kind"] for name, entry in tasks.items()}
    (folder / "vectors.npz").unlink()
    print(json.dumps(row))


# ---- all variants


def run(options: argparse.Namespace) -> None:
    """Work through the variants, and print their table."""
    tokens = Path(options.work_dir) / "tasks.pt"
    tokens.parent.mkdir(parents=True, exist_ok=True)
    tokenize_tasks(options, tokens)

    def command(kind: str, variant: Variant, seed: int, folder: Path) -> list[str]:
        given = ["--folder", folder, "--variant", json.dumps(variant), "--seed", seed, "--model", options.model]
        given += ["--texts", *options.texts, "--rates", options.rates, "--tokens", tokens]
        given += ["--dataloader_num_workers", options.dataloader_num_workers, "--shares", *options.shares]
        return [sys.executable, "-W", "ignore", __file__, kind, *map(str, given)]

    rows = gpu_queue.run(
        options,
        train=partial(command, "variant"),
        judge=partial(command, "judge"),
        summary=summary,
    )
    print(table(rows))


def general(row: Variant, name: str) -> tuple[float, float]:
    """Mean similarity and mean retrieval of one of a row's encoders."""
    scores, kinds = row["scores"][name], row["kinds"]
    values = {
        kind: [v for task, v in scores.items() if kinds.get(task) == kind] for kind in ("similarity", "retrieval")
    }
    similarity, retrieval = (mean(v) if v else float("nan") for v in values.values())
    return similarity, retrieval


def summary(row: Variant) -> str:
    """A row in a line."""
    cells = []
    for name, scores in row["scores"].items():
        similarity, retrieval = general(row, name)
        probe = scores.get(row["domain"], float("nan"))
        cells.append(f"{name} {probe:.2f}/{similarity:.2f}/{retrieval:.2f}")
    begin = f"{row['domain']} {row['name']} seed {row['seed']}"
    return f"{begin}: {'; '.join(cells)}; {row.get('steps', 0)} steps, {row.get('train_s', 0)} s"


def table(rows: list[Variant]) -> str:
    """Every encoder of every variant: the domain's probe, similarity and each retrieval task, over seeds."""
    groups: dict[tuple[str, str, str], list[dict[str, float]]] = {}
    retrieval: list[str] = []
    for row in rows:
        if "failed" in row:
            continue
        retrieval = retrieval or [task for task, kind in row["kinds"].items() if kind == "retrieval"]
        for name, scores in row["scores"].items():
            for domain in (
                [row["domain"]]
                if row["objective"] != "start"
                else [task for task, kind in row["kinds"].items() if kind == "labels"]
            ):
                similarity, mean_retrieval = general(row, name)
                cells = {"probe": scores[domain], "similarity": similarity, "retrieval": mean_retrieval}
                cells |= {task: scores[task] for task in retrieval}
                groups.setdefault((domain, row["name"], name), []).append(cells)
    head = ["domain", "variant", "encoder", "seeds", "probe", "similarity", "retrieval", *retrieval]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for (domain, variant, name), found in sorted(groups.items(), key=lambda item: (item[0][0], item[0][1])):
        cells = [_shown([cell[column] for cell in found]) for column in head[4:]]
        lines.append(f"| {domain} | {variant} | {name} | {len(found)} | {' | '.join(cells)} |")
    failed = [f"{row['name']} seed {row['seed']}: {row['failed']}" for row in rows if "failed" in row]
    return "\n".join([*lines, *failed])


def _shown(values: list[float]) -> str:
    return f"{mean(values):.2f}" if len(values) < 2 else f"{mean(values):.2f} ± {stdev(values):.2f}"


def main() -> None:
    """Dispatch to a command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    timing, whole, one, probes, printed = (
        commands.add_parser(name) for name in ("clock", "run", "variant", "judge", "table")
    )
    timing.add_argument("variants")
    timing.add_argument("--output", default="rates.json")
    timing.add_argument("--folder", default="clock")
    gpu_queue.add_arguments(whole, (one, probes), work_dir="adaptation")
    whole.add_argument("--tasks", nargs="+", required=True)
    whole.add_argument("--max_train_samples", type=int, default=4000)
    whole.add_argument("--max_test_samples", type=int, default=2000)
    for command in (timing, whole, one, probes):
        command.add_argument("--model", required=True)
        command.add_argument("--texts", nargs="+", required=True, help="NAME=FILE of each domain")
        command.add_argument("--dataloader_num_workers", type=int, default=2)
    for command in (whole, one, probes):
        command.add_argument("--rates", default="rates.json")
        command.add_argument("--shares", type=float, nargs="*", default=[0.3, 0.5], help="of the start, in averages")
    for command in (one, probes):
        command.add_argument("--tokens", required=True)
    printed.add_argument("rows")
    options = parser.parse_args()
    quiet_libraries()
    torch.backends.cuda.matmul.allow_tf32 = True
    actions: dict[str, Callable[[argparse.Namespace], None]] = {
        "clock": clock,
        "run": run,
        "variant": run_variant,
        "judge": judge,
        "table": lambda given: print(table(gpu_queue.read_rows(Path(given.rows)))),
    }
    actions[options.command](options)


if __name__ == "__main__":
    main()
