"""How good are an image run's frozen features: linear probe and kNN at its start, at its checkpoints and at its end.

    python run_jepa.py configs/ijepa_cifar10.yaml --train_file train.parquet --output_dir out
    python benchmarks/images/image_checkpoint_probe.py probe out --train_file train.parquet --test_file test.parquet
    python benchmarks/images/image_checkpoint_probe.py supervised out --train_file train.parquet \
        --test_file test.parquet --num_train_epochs 50

`probe` reads features of both encoders, mean-pooled: the output, and the upper half of the layers side by side. The
encoder, the features and the probe's penalty are chosen with probes fitted on the first 20,000 training images and
judged on the last 5,000; the test images are read with that choice alone, by a probe fitted on all training images.
`supervised` trains the same network with labels.
"""

import argparse
import io
import json
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.preprocessing import StandardScaler
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from jepa_hf import DataCollatorForBlockJEPA, JepaForRepresentationPrediction
from jepa_hf.evaluation.scoring import knn_predict, linear_classifier

FITTED, HELD_OUT = 20_000, 5000
INVERSE_REGULARIZATION = (0.001, 0.01, 0.1)
PROBE_STEPS = 1000
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class EpochCallback(TrainerCallback):
    """Set the collator's epoch, so that each epoch has other crops."""

    def __init__(self, collator: DataCollatorForBlockJEPA):
        self.collator = collator

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.collator.epoch = int(state.epoch or 0)


def load(path: str, limit: int | None) -> datasets.Dataset:
    """Rows of undecoded images and labels, under the names `image` and `label`."""
    rows = datasets.load_dataset("parquet", data_files=path, split="train")
    rows = rows.rename_columns({name: "image" for name in ("img",) if name in rows.column_names})
    rows = rows.cast_column("image", datasets.Image(decode=False))
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def pixels(rows: datasets.Dataset, processor: BaseImageProcessor) -> torch.Tensor:
    images = [Image.open(io.BytesIO(image["bytes"])).convert("RGB") for image in rows["image"]]
    parts = (images[begin : begin + 2000] for begin in range(0, len(images), 2000))
    return torch.cat([processor(images=part, return_tensors="pt")["pixel_values"] for part in parts])


@torch.no_grad()
def features(encoder: PreTrainedModel, images: torch.Tensor) -> dict[str, np.ndarray]:
    """Mean-pooled: the output `[N, D]`, and the upper half of the layers, each normalised, `[N, D * layers / 2]`."""
    encoder = encoder.to(DEVICE).eval()
    upper = -(-encoder.config.num_hidden_layers // 2)
    results: dict[str, list[torch.Tensor]] = {"output": [], "upper half": []}
    for part in images.split(1000):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            output = encoder(pixel_values=part.to(DEVICE), output_hidden_states=True)
        results["output"].append(output.last_hidden_state.float().mean(1))
        states = [F.layer_norm(state.float(), state.shape[-1:]).mean(1) for state in output.hidden_states[-upper:]]
        results["upper half"].append(torch.cat(states, 1))
    return {name: torch.cat(parts).cpu().numpy() for name, parts in results.items()}


def score(model: JepaForRepresentationPrediction, train: Any, test: Any) -> dict[str, Any]:
    """Choose encoder, features and penalty on held-out training images; then fit on all and read the test images."""
    (train_pixels, train_labels), (test_pixels, test_labels) = train, test
    held_out = min(HELD_OUT, len(train_labels) // 5)
    known, asked = slice(min(FITTED, len(train_labels) - held_out)), slice(-held_out, None)
    best: tuple[float, Any] = (-1.0, None)
    for which in ("context", "target"):
        for kind, vectors in features(model.get_encoder(which), train_pixels).items():
            for penalty in INVERSE_REGULARIZATION:
                probe = linear_classifier(penalty, PROBE_STEPS).fit(vectors[known], train_labels[known])
                accuracy = probe.score(vectors[asked], train_labels[asked])
                if accuracy > best[0]:
                    best = accuracy, (which, kind, penalty, vectors)
    validation, (which, kind, penalty, vectors) = best
    test_vectors = features(model.get_encoder(which), test_pixels)[kind]
    scaler = StandardScaler().fit(vectors)
    nearest = knn_predict(scaler.transform(vectors), train_labels, scaler.transform(test_vectors), 20)
    linear = linear_classifier(penalty, PROBE_STEPS).fit(vectors, train_labels)
    return {
        "encoder": which,
        "features": kind,
        "C": penalty,
        "linear, held out": round(100 * validation, 1),
        "linear, test": round(100 * linear.score(test_vectors, test_labels), 1),
        "kNN (20), test": round(100 * (nearest == test_labels).mean(), 1),
    }


def probe(options: argparse.Namespace) -> None:
    run = Path(options.run_dir)
    processor = AutoImageProcessor.from_pretrained(run)
    train, test = (
        (pixels(rows, processor), np.array(rows["label"]))
        for rows in (load(options.train_file, options.limit), load(options.test_file, options.limit))
    )
    config = JepaForRepresentationPrediction.config_class.from_pretrained(run / "jepa")
    set_seed(options.seed)
    stages = {0: JepaForRepresentationPrediction(config)}
    numbers = sorted(int(path.name.split("-")[1]) for path in run.glob("checkpoint-*"))
    stages |= {number: run / f"checkpoint-{number}" for number in numbers}
    if options.steps:
        stages = {number: stages[number] for number in options.steps}
    elif not numbers:
        stages[json.loads((run / "metrics.json").read_text())["history"][-1]["step"]] = run / "jepa"
    names = ("linear, test", "kNN (20), test", "linear, held out", "encoder", "features", "C")
    print(f"| step | {' | '.join(names)} |\n|{' --- |' * (len(names) + 1)}")
    for step, place in stages.items():
        model = place if step == 0 else JepaForRepresentationPrediction.from_pretrained(place)
        results = score(model, train, test)
        print(f"| {step} | " + " | ".join(str(results[name]) for name in names) + " |", flush=True)


def supervised(options: argparse.Namespace) -> None:
    run = Path(options.run_dir)
    processor = AutoImageProcessor.from_pretrained(run)
    train, test = load(options.train_file, options.limit), load(options.test_file, options.limit)
    set_seed(options.seed)
    model = AutoModelForImageClassification.from_pretrained(run, num_labels=10)
    config = JepaForRepresentationPrediction.config_class.from_pretrained(run / "jepa")
    start = JepaForRepresentationPrediction(config)
    model.base_model.load_state_dict(start.context_encoder.state_dict())
    grid = start.encoder_adapter.grid
    views = DataCollatorForBlockJEPA(
        processor, grid, random_resized_crop=(0.4, 1.0), random_flip=True, seed=options.seed
    )
    plain = views.for_evaluation()

    class LabelledTrainer(Trainer):
        """One collator augments, the other does not; both look up the labels."""

        def get_train_dataloader(self) -> Any:
            self.data_collator = lambda rows: labelled(views, rows)
            return super().get_train_dataloader()

        def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
            self.data_collator = lambda rows: labelled(plain, rows)
            return super().get_eval_dataloader(eval_dataset)

    def labelled(collator: DataCollatorForBlockJEPA, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {
            "pixel_values": collator(rows)["pixel_values"],
            "labels": torch.tensor([row["label"] for row in rows]),
        }

    trainer = LabelledTrainer(
        model,
        TrainingArguments(
            output_dir=str(run / "supervised"),
            num_train_epochs=options.num_train_epochs,
            learning_rate=options.learning_rate,
            weight_decay=0.05,
            warmup_steps=0.1,
            lr_scheduler_type="cosine",
            per_device_train_batch_size=256,
            per_device_eval_batch_size=1000,
            save_strategy="no",
            bf16=DEVICE == "cuda",
            report_to="none",
            remove_unused_columns=False,
            dataloader_num_workers=options.workers,
            logging_steps=500,
            seed=options.seed,
        ),
        train_dataset=train,
        eval_dataset=test,
        callbacks=[EpochCallback(views)],
        compute_metrics=lambda results: {
            "accuracy": float((results.predictions.argmax(-1) == results.label_ids).mean())
        },
    )
    begin = time.time()
    trainer.train()
    seconds = time.time() - begin
    accuracy = 100 * trainer.evaluate()["eval_accuracy"]
    print(f"with labels, {options.num_train_epochs} epochs, {seconds:.0f} s: {accuracy:.1f} % of the test images")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("probe", "supervised"))
    parser.add_argument("run_dir", help="what run_jepa.py wrote")
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--test_file", required=True)
    parser.add_argument("--steps", type=int, nargs="+", help="probe these checkpoints only; 0 is the random start")
    parser.add_argument("--num_train_epochs", type=float, default=50)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--limit", type=int, help="use only the first N images")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    {"probe": probe, "supervised": supervised}[options.command](options)


if __name__ == "__main__":
    main()
