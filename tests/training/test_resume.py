"""A run that was interrupted goes on exactly: bit for bit what it would have been."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from helpers.batches import pack, rows, tiny_jepa
from helpers.runs import Batch, RecordingTrainer, StopAfter, ema_of, end_workers, largest_difference, trainer, weights
from helpers.tiny_models import CORPUS, tiny_tokenizer, write_lines
from jepa_hf import JepaForRepresentationPrediction, UsageError
from jepa_hf.data.arguments import DataArguments
from jepa_hf.data.packing import pack_dataset
from jepa_hf.data.text_datasets import load_text_datasets
from jepa_hf.data.tokenization import tokenize_dataset

ROWS = 52  # 13 batches of 4, so 7 updates an epoch, the last of a single micro-batch: step 10 is the third of epoch 2


def fresh(seed: int) -> JepaForRepresentationPrediction:
    """As in a new process: other random weights, other random states. With dropout everywhere."""
    random.seed(seed)
    np.random.seed(seed)
    model = tiny_jepa(
        encoder={"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}, pred_dropout=0.1, strong=False
    )
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def start(folder: Path, seed: int, data: Any = None, **overrides: Any) -> RecordingTrainer:
    settings = {
        "max_steps": 20,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 10,
        "warmup_steps": 3,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.01,
    }
    data = rows("bert", ROWS) if data is None else data
    return trainer(folder, fresh(seed), data=data, eval_data=rows("bert", 8), **(settings | overrides))


def same(one: Any, other: Any) -> bool:
    """Bit for bit, through dictionaries and lists."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def losses(run: RecordingTrainer) -> list[dict[str, float]]:
    """What was logged of each step, but for times."""
    return [
        {name: value for name, value in entry.items() if not name.startswith("train_")}
        for entry in run.state.log_history
        if "loss" in entry
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "persistent"), [(2, False), (2, True), (0, False)])
def test_a_run_interrupted_at_10_of_15_is_the_uninterrupted_one(workers: int, persistent: bool, tmp_path: Path) -> None:
    """Context, target, predictor, optimizer, masks, log and counters, in the middle of epoch 2, with accumulation."""
    loader = {"dataloader_num_workers": workers, "dataloader_persistent_workers": persistent}
    # An evaluation leaves no trace either.
    loader |= {"eval_strategy": "steps", "eval_steps": 6, "max_steps": 15}
    full_run = start(tmp_path / "whole", 1, **loader)
    full_run.train()

    first = start(tmp_path / "cut", 1, **loader)
    first.add_callback(StopAfter(10))
    first.train()
    assert first.state.global_step == 10
    assert first.state.epoch == pytest.approx(1 + 6 / 13)

    second = start(tmp_path / "cut", 2, **loader)
    assert not same(weights(second.model), weights(first.model))
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 15

    assert len(first.batches) == 19  # 13 in epoch 1, 6 in epoch 2
    assert same(first.batches + second.batches, full_run.batches)
    assert same(weights(second.model.context_encoder), weights(full_run.model.context_encoder))
    assert same(weights(second.model.target_encoder), weights(full_run.model.target_encoder))
    assert same(weights(second.model.predictor), weights(full_run.model.predictor))
    assert same(second.optimizer.state_dict(), full_run.optimizer.state_dict())
    assert same(losses(second), losses(full_run))
    assert second.state.num_input_tokens_seen == full_run.state.num_input_tokens_seen
    assert second.state.total_flos == full_run.state.total_flos
    assert not same(weights(full_run.model), weights(first.model))
    for run in (full_run, first, second):
        end_workers(run)


def packed_stream(count: int) -> datasets.IterableDataset:
    """Rows that are packed while they are read."""
    return pack_dataset(datasets.Dataset.from_list(rows("bert", 200) * (count // 200 + 1)).to_iterable_dataset(), 48)


@pytest.mark.parametrize(
    ("stop", "data"),
    [
        pytest.param(7, lambda: rows("bert", ROWS), id="between two epochs"),
        pytest.param(5, lambda: datasets.Dataset.from_list(rows("bert", 160)).to_iterable_dataset(), id="streaming"),
        pytest.param(7, lambda: pack(rows("bert", 100), 48)[0], id="packed"),
        pytest.param(5, lambda: packed_stream(500), id="a packed stream"),
    ],
)
def test_masks_and_weights_go_on_where_they_stopped(stop: int, data: Callable[[], Any], tmp_path: Path) -> None:
    """Exactly at the end of an epoch, and inside a stream; with several texts in a row too."""
    settings: dict[str, Any] = {"max_steps": stop + 3, "save_steps": stop}
    full_run = start(tmp_path / "whole", 1, data(), **settings | {"save_strategy": "no"})
    full_run.train()
    first = start(tmp_path / "cut", 1, data(), **settings)
    first.add_callback(StopAfter(stop))
    first.train()
    second = start(tmp_path / "cut", 2, data(), **settings)
    second.train(resume_from_checkpoint=True)
    assert second.batches
    assert same(first.batches + second.batches, full_run.batches)
    assert same(weights(second.model), weights(full_run.model))


# ---- streams of several passes


def shuffled_stream(count: int = 40) -> datasets.IterableDataset:
    """Rows in another order in each pass, in two shards; 40 are five batches of eight."""
    return datasets.Dataset.from_list(rows("bert", count)).to_iterable_dataset(2).shuffle(seed=3, buffer_size=16)


def streamed(folder: Path, seed: int, data: Any = None, **overrides: Any) -> RecordingTrainer:
    """Twelve steps over a stream of five batches a pass, with a checkpoint of each step."""
    settings = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_steps": 12, "save_steps": 1}
    return start(folder, seed, shuffled_stream() if data is None else data, **(settings | overrides))


LOADERS = {
    "no workers": {},
    "workers": {"dataloader_num_workers": 2},
    "persistent workers": {"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
    "accumulation": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3},
}


@pytest.fixture(scope="module", params=LOADERS)
def undisturbed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RecordingTrainer, dict]:
    """A streamed run with its checkpoints, and its settings. With accumulation the last update of a pass is short."""
    settings = LOADERS[request.param]
    run = streamed(tmp_path_factory.mktemp("whole"), 1, **settings)
    run.train()
    return run, settings


@pytest.mark.slow
@pytest.mark.parametrize("step", [4, 5, 11])
def test_a_streamed_run_resumes_exactly_in_any_pass(
    step: int, undisturbed: tuple[RecordingTrainer, dict], tmp_path: Path
) -> None:
    """Weights, optimizer, masks, log and epochs, also at the end of a pass, and after a second resume."""
    full_run, settings = undisturbed
    source = Path(full_run.args.output_dir) / f"checkpoint-{step}"
    for again in (step + 1, 12):
        run = streamed(tmp_path, 2, **settings, save_steps=again)
        run.add_callback(StopAfter(again))
        run.train(resume_from_checkpoint=str(source))
        source = tmp_path / f"checkpoint-{again}"
        end_workers(run)
    assert same(run.batches, full_run.batches[len(full_run.batches) - len(run.batches) :])
    assert same(weights(run.model), weights(full_run.model))
    assert same(run.optimizer.state_dict(), full_run.optimizer.state_dict())
    assert same(losses(run), losses(full_run))
    assert run.state.num_input_tokens_seen == full_run.state.num_input_tokens_seen


@pytest.mark.parametrize(("step", "rows"), [(7, 16), (5, 40)])
def test_a_resumed_stream_says_how_many_rows_it_reads_again(
    step: int, rows: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of its current pass, which has five batches of 8, and once."""
    streamed(tmp_path, 1, max_steps=8).train()
    with caplog.at_level("INFO", "jepa_hf"):
        streamed(tmp_path, 2, max_steps=8).train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    (said,) = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert f"from the start of its pass: {rows} rows are skipped" in said


def test_a_streams_epoch_is_its_passes_and_a_share_of_the_run(undisturbed: tuple[RecordingTrainer, dict]) -> None:
    """The passes that have ended, plus the updates of the current one over max_steps."""
    full_run, settings = undisturbed
    # Ten batches in updates of three; two workers with three batches each; five batches.
    updates = 4 if "gradient_accumulation_steps" in settings else 6 if settings else 5
    epochs = [entry["epoch"] for entry in losses(full_run)]
    assert epochs == pytest.approx([step // updates + (step % updates + 1) / 12 for step in range(12)])


@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.slow), 2, 3])
def test_a_stream_and_a_list_of_its_rows_are_one_run(accumulation: int, tmp_path: Path) -> None:
    """Also where a pass ends within an update, which is then smaller: five batches of eight rows a pass."""
    settings = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": accumulation, "max_steps": 7}
    runs = []
    for data in (rows("bert", 40), datasets.Dataset.from_list(rows("bert", 40)).to_iterable_dataset()):
        run = trainer(tmp_path, tiny_jepa(strong=False), data=data, train_sampling_strategy="sequential", **settings)
        run.train()
        runs.append(run)
    listed, stream = ([entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in runs)
    assert len(listed) == 7
    assert stream == pytest.approx(listed, abs=1e-7)
    assert largest_difference(*(weights(run.model) for run in runs)) < 1e-7


def test_a_checkpoint_of_the_end_of_a_pass_starts_the_next_one(tmp_path: Path) -> None:
    """With save_strategy and eval_strategy "epoch": what was done at the end of the pass is not done again."""
    settings = {"save_strategy": "epoch", "eval_strategy": "epoch"}
    full_run = streamed(tmp_path / "whole", 1, **settings)
    full_run.train()
    run = streamed(tmp_path / "resumed", 2, **settings)
    run.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert same(weights(run.model), weights(full_run.model))
    assert [entry["step"] for entry in run.state.log_history if "eval_loss" in entry] == [5, 10, 12]


FILES = {
    "txt": {},
    "jsonl": {"concat": True},
    "csv": {"packed": True},
    "parquet": {"stride": 2},
}


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("suffix", FILES)
def test_streamed_files_resume_exactly(suffix: str, workers: int, tmp_path: Path) -> None:
    """In the third pass over two files of every format and every way to make rows, shuffled and with accumulation."""
    if suffix == "txt":
        write_lines(tmp_path / "1.txt", CORPUS[:14])
        write_lines(tmp_path / "2.txt", ["", *CORPUS[20:31]])
    else:
        for number, texts in enumerate((CORPUS[:14], [None, *CORPUS[20:31]]), 1):
            table = datasets.Dataset.from_dict({"label": range(len(texts)), "text": texts})
            writer = {"jsonl": table.to_json, "csv": table.to_csv, "parquet": table.to_parquet}[suffix]
            writer(str(tmp_path / f"{number}.{suffix}"))

    def data() -> datasets.IterableDataset:
        args = DataArguments(train_file=str(tmp_path / f"*.{suffix}"), streaming=True)
        texts, _ = load_text_datasets(args, seed=0, need_validation=False)
        tokenizer = tiny_tokenizer("bert")
        return tokenize_dataset(texts, tokenizer, max_seq_length=24, **FILES[suffix]).shuffle(seed=3, buffer_size=7)

    settings = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 16,
        "save_steps": 13,
        "dataloader_num_workers": workers,
    }
    whole = streamed(tmp_path / "whole", 1, data(), **settings)
    whole.train()
    passes = whole.state.stateful_callbacks["PassCallback"]["attributes"]["of_ranks"]
    assert passes[0][0] >= 1
    run = streamed(tmp_path / "resumed", 2, data(), **settings)
    run.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-13"))
    assert run.batches
    assert same(run.batches, whole.batches[len(whole.batches) - len(run.batches) :])
    assert same(weights(run.model), weights(whole.model))
    for one in (whole, run):
        end_workers(one)


def test_ignore_data_skip_starts_the_pass_of_the_checkpoint_again(tmp_path: Path) -> None:
    """In the order and with the masks of that pass; a later resume counts from there."""
    full_run = streamed(tmp_path, 1)
    full_run.train()
    run = streamed(tmp_path / "again", 1, ignore_data_skip=True)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert same(run.batches, full_run.batches[5:10])
    exact = streamed(tmp_path / "exact", 1)
    exact.train(resume_from_checkpoint=str(tmp_path / "again" / "checkpoint-10"))
    assert same(exact.batches, full_run.batches[8:10])
    assert same(weights(exact.model), weights(run.model))


def test_a_longer_run_may_go_on_from_a_shorter_one(tmp_path: Path) -> None:
    """Another max_steps is allowed; the EMA's schedule is then that of the new length."""
    start(tmp_path, 1, max_steps=10, ema_decay=0.5, ema_decay_end=0.9).train()
    longer = start(tmp_path, 2, max_steps=14, ema_decay=0.5, ema_decay_end=0.9)
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 14
    assert len(longer.losses) == 14
    assert ema_of(longer).decay == pytest.approx(0.9)
    decays = [entry["ema_decay"] for entry in longer.state.log_history if "ema_decay" in entry]
    assert decays[10:] == pytest.approx([0.5 + 0.4 * step / 13 for step in (10, 11, 12, 13)])


def test_a_checkpoint_holds_the_full_model_and_no_pickled_arguments(tmp_path: Path) -> None:
    """At its root: what `from_pretrained` gives is the model at that step, both encoders and predictor."""
    run = start(tmp_path, 1, max_steps=10)
    run.train()
    folder = tmp_path / "checkpoint-10"
    saved = JepaForRepresentationPrediction.from_pretrained(folder)
    assert same(weights(saved), weights(run.model))
    assert not list(folder.glob("*.bin"))
    assert {"optimizer.pt", "trainer_state.json", "tokenizer.json"} <= {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("content", ["nothing", "weights only"])
def test_a_directory_that_is_no_checkpoint_is_refused(content: str, tmp_path: Path) -> None:
    """One sentence, with the directory and what it lacks, before any step is done."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    if content == "weights only":
        fresh(1).save_pretrained(folder)
    run = start(tmp_path / "out", 1)
    with pytest.raises(
        UsageError, match=r"to be a checkpoint of a run, got .*elsewhere.*: it has no trainer_state.json"
    ):
        run.train(resume_from_checkpoint=str(folder))
    assert not run.batches


def test_batches_are_compared_bit_for_bit() -> None:
    """The comparison above sees a single changed token."""
    batch: Batch = {"input_ids": torch.arange(6).view(2, 3)}
    other = {"input_ids": batch["input_ids"].clone()}
    assert same([batch], [other])
    other["input_ids"][1, 2] = 0
    assert not same([batch], [other])


def test_a_log_after_a_resume_covers_the_steps_since_the_last_log(tmp_path: Path) -> None:
    """Saved after step 4 and logged every 3 steps: entry 6 has the steps 4 to 6, in every mean and count."""
    data = [{"input_ids": [2, 60, 3]}, *rows("bert", ROWS)]
    settings: dict[str, Any] = {"max_steps": 6, "save_steps": 4, "logging_steps": 3, "health_steps": 0}
    settings |= {"data": data, "mask": {"on_too_short": "skip"}}
    whole = start(tmp_path / "whole", 0, **settings)
    whole.train()
    resumed = start(tmp_path / "resumed", 1, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert [entry["step"] for entry in losses(resumed)] == [3, 6]
    for ours, theirs in zip(losses(resumed), losses(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)  # means are added up in another order
    # The mean over all steps, bit for bit; also of a run that is resumed after its last one.
    finished = start(tmp_path / "finished", 1, **settings)
    finished.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    ends = [run.state.log_history[-1]["train_loss"] for run in (whole, resumed, finished)]
    assert ends[0] == pytest.approx(np.mean(whole.losses), rel=1e-5)
    assert ends == [ends[0]] * 3
