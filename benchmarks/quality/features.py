"""Frozen features on two tasks that are not ours: what pretraining adds to a random encoder, and to the raw numbers.

    python benchmarks/quality/features.py vectors                  # breast cancer: 569 vectors of 30 features
    python benchmarks/quality/features.py series --wheel aeon.whl  # JapaneseVowels: 640 series of 12 features

Tables in Markdown go to stdout: accuracy of logistic regression, mean and standard error over the seeds. JapaneseVowels
(UCI, CC BY 4.0) is read from an installed aeon package or from its wheel. Nothing is fitted or chosen on test rows: the
probe's penalty is cross-validated on the training rows, and `--validation` scores settings on a quarter of those.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from datasets import Dataset
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import GridSearchCV, train_test_split
from transformers import set_seed

from jepa_hf import (
    DataCollatorForFeatureJEPA,
    FeatureEncoderModel,
    JepaConfig,
    JepaForRepresentationPrediction,
    JepaTrainer,
    JepaTrainingArguments,
)
from jepa_hf.data.feature_datasets import feature_shape, feature_statistics
from jepa_hf.evaluation.scoring import INVERSE_REGULARIZATION, linear_classifier

# Chosen with --validation; see RESULTS 7 for what else was tried.
ENCODER = {"embed_dim": 64, "encoder_depth": 3, "num_heads": 4, "dropout": 0.0}
OBJECTIVE = {"predictor_embed_dim": 32, "predictor_depth": 2, "variance_weight": 1.0, "covariance_weight": 1.0}
MASKS = {"mask_ratio": 0.5}
TRAINING = {
    "max_steps": 200,
    "per_device_train_batch_size": 64,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "weight_decay": 0.01,
    "ema_decay": 0.99,
    "ema_decay_end": 1.0,
}


@dataclass
class Split:
    """Rows to learn from and rows to score on: vectors `[F]` or series `[T, F]`, and their classes."""

    rows: list[np.ndarray]
    labels: np.ndarray
    test_rows: list[np.ndarray]
    test_labels: np.ndarray

    def validation(self, seed: int) -> "Split":
        """A quarter of the training rows in place of the test rows, which are gone."""
        return split_rows(self.rows, self.labels, 0.25, seed)


# ---- the two tasks


def split_rows(rows: Sequence[np.ndarray], labels: np.ndarray, share: float, seed: int) -> Split:
    """The same share of each class set apart."""
    train, test = train_test_split(np.arange(len(labels)), test_size=share, random_state=seed, stratify=labels)
    return Split([rows[i] for i in train], labels[train], [rows[i] for i in test], labels[test])


def breast_cancer(seed: int) -> Split:
    """Another third to test on for every seed."""
    data = load_breast_cancer()
    return split_rows(list(data.data.astype(np.float32)), data.target, 1 / 3, seed)


def japanese_vowels(wheel: str | None) -> Split:
    """The split of the archive: 270 utterances of nine speakers to train on, 370 to test on."""
    parts = []
    for name in ("TRAIN", "TEST"):
        path = f"aeon/datasets/data/JapaneseVowels/JapaneseVowels_{name}.ts"
        if wheel is not None:
            with zipfile.ZipFile(wheel) as archive:
                text = archive.read(path).decode()
        else:
            results = importlib.util.find_spec("aeon")
            if results is None or results.origin is None:
                raise SystemExit("JapaneseVowels comes with aeon: pip install aeon, or give its wheel as --wheel")
            text = (Path(results.origin).parents[1] / path).read_text()
        parts += parse_ts(text)
    return Split(*parts)


def parse_ts(text: str) -> tuple[list[np.ndarray], np.ndarray]:
    """Series `[T, F]` and labels of a .ts file: in each line the channels' values, then the label, parted by colons."""
    lines = text.split("@data", 1)[1].strip().splitlines()
    rows, labels = [], []
    for line in lines:
        *channels, label = line.strip().split(":")
        rows.append(np.array([channel.split(",") for channel in channels], dtype=np.float32).T)
        labels.append(int(label))
    return rows, np.array(labels)


# ---- encoders


def encoder_of(rows: Sequence[np.ndarray], mode: str, seed: int, steps: int) -> JepaForRepresentationPrediction:
    """A JEPA pretrained on these rows; with 0 steps its random start, standardised by the same rows."""
    set_seed(seed)
    train = Dataset.from_dict({"features": list(rows)}).with_format("numpy")
    _, width = feature_shape(train)
    config = JepaConfig.for_features(width, mode=mode, max_position_embeddings=32, **ENCODER, **OBJECTIVE)
    model = JepaForRepresentationPrediction(config)
    mean, std = feature_statistics(train)
    model.set_standardization(torch.from_numpy(mean), torch.from_numpy(std))
    if not steps:
        return model
    collator = DataCollatorForFeatureJEPA(
        config.encoder_config, masked_tokens=config.masked_tokens, fill_values=mean, seed=seed, **MASKS
    )
    with tempfile.TemporaryDirectory() as folder:
        quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
        args = JepaTrainingArguments(folder, seed=seed, **quiet, **{**TRAINING, "max_steps": steps})
        JepaTrainer(model, args, collator, train_dataset=train).train()
    return model.cpu()


def padded(rows: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
    """All rows as one batch of encoder inputs."""
    if rows[0].ndim == 1:
        return {"features": torch.from_numpy(np.stack(rows))}
    lengths = torch.tensor([len(row) for row in rows])
    features = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True)
    return {"features": features, "attention_mask": (torch.arange(features.shape[1]) < lengths[:, None]).long()}


@torch.no_grad()
def states(encoder: FeatureEncoderModel, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The last layer's output for each row, `[positions, D]`, without padding."""
    batch = padded(rows)
    output = encoder.eval()(**batch).last_hidden_state
    lengths = batch["attention_mask"].sum(dim=1) if "attention_mask" in batch else [output.shape[1]] * len(rows)
    return [state[:length].numpy() for state, length in zip(output, lengths, strict=True)]


def supervised(split: Split, mode: str, seed: int, epochs: int) -> float:
    """The same encoder and a linear layer on its mean, trained together from a random start on the labels."""
    encoder = encoder_of(split.rows, mode, seed, 0).get_encoder().train()
    classes, labels = np.unique(split.labels, return_inverse=True)
    head = torch.nn.Linear(encoder.config.hidden_size, len(classes))
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=1e-3, weight_decay=0.01)
    batch, answers = padded(split.rows), torch.from_numpy(labels)
    for _ in range(epochs):
        for part in torch.randperm(len(answers)).split(TRAINING["per_device_train_batch_size"]):
            logits = head(encoder(**{name: value[part] for name, value in batch.items()}).pooler_output)
            optimizer.zero_grad()
            F.cross_entropy(logits, answers[part]).backward()
            optimizer.step()
    with torch.no_grad():
        guesses = head(encoder.eval()(**padded(split.test_rows)).pooler_output).argmax(dim=1).numpy()
    return float((classes[guesses] == split.test_labels).mean())


# ---- the probe


def mean(rows: Sequence[np.ndarray]) -> np.ndarray:
    return np.stack([row.mean(axis=0) for row in rows])


def mean_and_deviation(rows: Sequence[np.ndarray]) -> np.ndarray:
    return np.stack([np.concatenate([row.mean(axis=0), row.std(axis=0)]) for row in rows])


def side_by_side(rows: Sequence[np.ndarray], longest: int) -> np.ndarray:
    """All positions one after the other, zeros after the last."""
    return np.stack([np.pad(row, ((0, longest - len(row)), (0, 0))).reshape(-1) for row in rows])


def poolings(split: Split, mode: str) -> dict[str, Callable[[Sequence[np.ndarray]], np.ndarray]]:
    """From `[positions, D]` of each row to one vector; the first is what `pooler_output` holds."""
    if mode == "flat":
        return {"mean": mean}
    if mode == "patches":
        return {"mean": mean, "all": lambda rows: side_by_side(rows, len(rows[0]))}
    longest = max(map(len, [*split.rows, *split.test_rows]))
    return {"mean": mean, "mean, std": mean_and_deviation, "all": lambda rows: side_by_side(rows, longest)}


def probe(train: np.ndarray, labels: np.ndarray, test: np.ndarray, answers: np.ndarray) -> float:
    """Accuracy of the linear classifier, its penalty cross-validated on the training rows."""
    grid = {"logisticregression__C": INVERSE_REGULARIZATION}
    search = GridSearchCV(linear_classifier(max_iter=2000), grid, cv=5)
    return search.fit(train, labels).score(test, answers)


def scores(split: Split, mode: str, seed: int, epochs: int, transductive: bool) -> dict[tuple[str, str], float]:
    """Accuracy by (row of the table, column of it)."""
    steps = TRAINING["max_steps"]
    encoders = {
        "random encoder": encoder_of(split.rows, mode, seed, 0).get_encoder("context"),
        "JEPA": encoder_of(split.rows, mode, seed, steps).get_encoder("context"),
    }
    if transductive:
        everything = [*split.rows, *split.test_rows]
        encoders["JEPA, test inputs too"] = encoder_of(everything, mode, seed, steps).get_encoder("context")
    results = {}
    for column, pool in poolings(split, mode).items():
        for name, encoder in encoders.items():
            train, test = pool(states(encoder, split.rows)), pool(states(encoder, split.test_rows))
            results[name, column] = probe(train, split.labels, test, split.test_labels)
        if mode == "time":
            train, test = pool(split.rows), pool(split.test_rows)
            results["raw features", column] = probe(train, split.labels, test, split.test_labels)
    if mode != "time":
        train, test = np.stack(split.rows), np.stack(split.test_rows)
        results["raw features", "all"] = probe(train, split.labels, test, split.test_labels)
    if epochs:
        results["supervised from scratch", "mean"] = supervised(split, mode, seed, epochs)
    return results


# ---- the tables


def table(title: str, seeds: Sequence[dict[tuple[str, str], float]]) -> str:
    """Markdown: accuracy in per cent, mean ± standard error over the seeds."""
    names, columns = (list(dict.fromkeys(key[part] for key in seeds[0])) for part in (0, 1))
    lines = [f"| {title} | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    for name in sorted(names, key=lambda name: (name != "raw features", name != "random encoder")):
        cells = []
        for column in columns:
            values = 100 * np.array([seed[name, column] for seed in seeds if (name, column) in seed])
            error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0
            cells.append(f"{values.mean():.1f} ± {error:.1f}" if len(values) else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run one task and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["vectors", "series"])
    parser.add_argument("--mode", choices=["patches", "flat"], help="of the vectors; default one table for each")
    parser.add_argument("--wheel", help="aeon's wheel, where the package is not installed")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--validation", action="store_true", help="score on a quarter of the training rows instead")
    parser.add_argument("--settings", default="{}", help='JSON: {"encoder": {}, "objective": {}, "masks": {}, ...}')
    parser.add_argument("--transductive", action="store_true", help="one more row: pretrained on the test inputs too")
    parser.add_argument("--supervised_epochs", type=int, default=40, help="0: without that row")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    for name, changes in json.loads(options.settings).items():
        {"encoder": ENCODER, "objective": OBJECTIVE, "masks": MASKS, "training": TRAINING}[name].update(changes)

    modes = ["time"] if options.task == "series" else [options.mode] if options.mode else ["patches", "flat"]
    for mode in modes:
        results = []
        for seed in range(options.seeds):
            split = japanese_vowels(options.wheel) if mode == "time" else breast_cancer(seed)
            if options.validation:
                split = split.validation(seed)
            results.append(scores(split, mode, seed, options.supervised_epochs, options.transductive))
            print(f"{mode}, seed {seed}: {results[-1]}", file=sys.stderr, flush=True)
        print(f"\n{table(mode, results)}", flush=True)


if __name__ == "__main__":
    main()
