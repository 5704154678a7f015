"""The runs that `test_distributed.py` compares: on several ranks, started by accelerate, and on one, in its process.

    accelerate launch --config_file configs/accelerate/cpu2.yaml train_ranks.py RANKS FOLDER NAME ...

Each rank writes what it ends with to FOLDER/rank-N.pt.
"""

import gc
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from helpers.batches import pack, rows, tiny_jepa
from helpers.runs import RecordingTrainer, RunAtStep, largest_difference, trainer, weights
from jepa_hf.cli.main import exit_process

SHORT = {"input_ids": [2, 60, 3]}  # nothing to mask
LONG = rows("bert", 40, longest=40)
# Each four rows in turn have one of 40 tokens, the longest.
_BY_LENGTH = sorted(LONG, key=lambda row: -len(row["input_ids"]))
FULL = [row for four in zip(*(_BY_LENGTH[n : n + 10] for n in (0, 10, 20, 30)), strict=True) for row in four]
Result = dict[str, Any]


def five_steps(processes: int) -> dict[str, Any]:
    """Settings of five steps over batches of 8 samples in all, whatever the number of processes."""
    return {
        "max_steps": 5,
        "per_device_train_batch_size": 8 // processes,
        "train_sampling_strategy": "sequential",
        "learning_rate": 3e-4,
        "adam_epsilon": 1e-6,
        "ema_decay": 0.9,
        "health_steps": 0,
    }


def train(
    folder: Path,
    processes: int,
    data: Any,
    mode: str,
    predictor: str,
    contrastive_weight: float = 0.0,
    sigreg_weight: float = 0.0,
    layers: int = 2,
    **overrides: Any,
) -> Result:
    """Five steps of AdamW over batches of 8 samples in all, from weights that only rank 0 has."""
    rank = PartialState().process_index
    weight = {"mlm_weight": 0.5, "contrastive_weight": contrastive_weight, "sigreg_weight": sigreg_weight}
    encoder = {"num_hidden_layers": layers}
    model = tiny_jepa("bert", mode, predictor, strong=False, encoder=encoder, initializer_range=0.1, **weight)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * rank)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    moved: list[torch.Tensor] = []
    run: RecordingTrainer = trainer(
        folder,
        model,
        data=data,
        mask={"on_too_short": "skip"},
        callbacks=[
            RunAtStep(on_step_end=lambda model, state: moved.append(next(model.target_encoder.parameters()).clone()))
        ],
        **(five_steps(processes) | overrides),
    )
    run.train()
    return {
        "weights": weights(run.model),
        "targets": [batch["target_valid"].sum().item() for batch in run.batches],
        "lengths": [batch["input_ids"].shape[1] for batch in run.batches],
        "rows": [tuple(row[row > 0].tolist()) for batch in run.batches for row in batch["input_ids"]],
        "documents": [batch["document_valid"].shape[1] for batch in run.batches if "document_valid" in batch],
        "logs": [entry for entry in run.state.log_history if "loss" in entry],
        "tokens": run.state.num_input_tokens_seen,
        "steps": len(moved),
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
    }


def resume(folder: Path, processes: int, shards: int) -> Result:
    """A streamed run of several passes with accumulation, and how far runs resumed from its steps end from it."""
    settings = five_steps(processes) | {"max_steps": 8, "save_steps": 1}
    settings |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-3}

    def run(name: str, checkpoint: str | None = None) -> RecordingTrainer:
        data = datasets.Dataset.from_list(LONG[:13]).to_iterable_dataset(shards).shuffle(seed=1, buffer_size=4)
        saves = {"save_strategy": "steps" if checkpoint is None else "no"}
        model = tiny_jepa(strong=False, contrastive_weight=1.0)
        training = trainer(folder / name, model, data=data, **settings, **saves)
        training.train(resume_from_checkpoint=checkpoint)
        return training

    undisturbed = run(f"{shards} whole")
    resumed = {step: run(f"{shards} resumed", f"{undisturbed.args.output_dir}/checkpoint-{step}") for step in (1, 4, 7)}
    return {
        "differences": [
            largest_difference(weights(each.model), weights(undisturbed.model)) for each in resumed.values()
        ],
        "passes": undisturbed._passes.of_ranks,
    }


def evaluate(folder: Path, processes: int, data: Any, **weights: float) -> Result:
    """The metrics over `data` in batches of 4 on each rank."""
    model = tiny_jepa(mlm_weight=0.5, **weights)
    run = trainer(folder, model, eval_data=data, mask={"on_too_short": "skip"}, per_device_train_batch_size=4)
    return {"metrics": run.evaluate()}


RUNS: dict[str, Callable[[Path, int], Result]] = {
    "drop": lambda folder, processes: train(folder, processes, LONG, "drop", "transformer", health_steps=5),
    "mask_token": lambda folder, processes: train(folder, processes, LONG, "mask_token", "mlp"),
    "contrastive": lambda folder, processes: train(folder, processes, LONG, "drop", "transformer", 2.0),
    # One shape of batches and one layer, because tracing takes most of the time.
    "compiled": lambda folder, processes: train(
        folder, processes, FULL, "drop", "transformer", 2.0, 0.5, 1, torch_compile=True, torch_compile_backend="eager"
    ),
    # The ranks' rows hold different numbers of texts.
    "packed": lambda folder, processes: train(
        folder, processes, pack(rows("bert", 180, longest=20), 64)[0][:40], "drop", "transformer", 2.0, 0.5
    ),
    "accumulated": lambda folder, processes: train(
        folder,
        processes,
        LONG,
        "drop",
        "transformer",
        per_device_train_batch_size=4 // processes,
        gradient_accumulation_steps=2,
    ),
    "streaming": lambda folder, processes: train(
        folder, processes, datasets.Dataset.from_list(LONG).to_iterable_dataset(), "drop", "transformer"
    ),
    # Of each batch of 8 the second half has no targets: of two ranks that is the last one's.
    "one rank without targets": lambda folder, processes: train(
        folder, processes, [*LONG[20:24], *[SHORT] * 4] * 5, "drop", "transformer"
    ),
    # Five rows for the last step, which the ranks fill up to eight.
    "incomplete": lambda folder, processes: train(folder, processes, LONG[:37], "drop", "transformer", 2.0, 0.5),
    "incomplete stream": lambda folder, processes: train(
        folder,
        processes,
        datasets.Dataset.from_list(LONG[:37]).to_iterable_dataset(),
        "drop",
        "transformer",
        2.0,
        0.5,
    ),
    # Each rank has shards of its own.
    "shards": lambda folder, processes: train(
        folder, processes, datasets.Dataset.from_list(LONG).to_iterable_dataset(num_shards=4), "drop", "transformer"
    ),
    # Two ranks have nine and four rows: in the third step one of them has a single one, the other starts anew.
    "uneven shards": lambda folder, processes: train(
        folder,
        processes,
        datasets.Dataset.from_list(LONG[:13]).to_iterable_dataset(num_shards=3),
        "drop",
        "transformer",
        2.0,
    ),
    # The passes of the ranks end together, and do not.
    "resumed": lambda folder, processes: resume(folder, processes, shards=1),
    "resumed shards": lambda folder, processes: resume(folder, processes, shards=3),
    # What the tests must be able to see: each rank divides by its own targets.
    "wrong": lambda folder, processes: train(
        folder, processes, LONG, "drop", "transformer", average_tokens_across_devices=False
    ),
    "evaluation": lambda folder, processes: evaluate(folder, processes, LONG[:16]),
    "uneven evaluation": lambda folder, processes: evaluate(folder, processes, LONG[20:31]),
    # The ranks fill it up: its length is unknown, and three shards would end at different times.
    "uneven streamed evaluation": lambda folder, processes: evaluate(
        folder,
        processes,
        datasets.Dataset.from_list(LONG[20:31]).to_iterable_dataset(num_shards=3),
    ),
    # Other ranks repeat the row, with which nothing is to be compared.
    "evaluation of one row": lambda folder, processes: evaluate(
        folder, processes, LONG[20:21], contrastive_weight=1.0, sigreg_weight=1.0
    ),
    "evaluation without targets on one rank": lambda folder, processes: evaluate(
        folder, processes, [*LONG[20:24], *[SHORT] * 4]
    ),
}


def run_all(folder: Path, processes: int, names: Sequence[str]) -> dict[str, Result]:
    """The runs of these names, on this rank."""
    assert PartialState(cpu=True).num_processes == processes
    return {name: RUNS[name](folder, processes) for name in names}


if __name__ == "__main__":
    gc.freeze()  # `Trainer` collects garbage after each run; skip all imported objects
    processes, output, *names = sys.argv[1:]
    output = Path(output)
    results = run_all(output, int(processes), names)
    torch.save(results, output / f"rank-{PartialState().process_index}.pt")
    PartialState().destroy_process_group()
    exit_process(0)
