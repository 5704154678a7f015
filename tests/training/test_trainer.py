"""Claims about `JepaTrainer`: data, logs, evaluation, optimizer, precision, and what it pushes."""

import gc
import multiprocessing
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel

from helpers.batches import ONE_OF_EACH_FAMILY, pack, rows, tiny_jepa
from helpers.fake_hub import Hub
from helpers.runs import (
    Batch,
    RecordingTrainer,
    RunAtStep,
    arguments,
    ema_of,
    end_workers,
    largest_difference,
    trainer,
    weights,
)
from helpers.tiny_models import CORPUS, save_tiny_encoder, tiny_tokenizer
from jepa_hf import (
    DataCollatorForSpanJEPA,
    EmaTargetCallback,
    JepaForRepresentationPrediction,
    JepaTrainer,
    JepaTrainingArguments,
    UsageError,
)
from jepa_hf.errors import RunError

FROZEN_RUN = {"learning_rate": 0.0, "weight_decay": 0.0, "ema_decay": 1.0}  # a run in which no weight moves
UNMASKABLE_ROW = {"input_ids": [2, 60, 3]}  # one token between [CLS] and [SEP]: nothing to mask


def step_logs(run: JepaTrainer) -> list[dict[str, float]]:
    return [entry for entry in run.state.log_history if "loss" in entry]


def valid_pairs(model: JepaForRepresentationPrediction, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Predictions and targets of a batch, `[N, D]` each."""
    with torch.no_grad():
        out = model(**batch)
    return out.predictions[out.target_valid].numpy(), out.targets[out.target_valid].numpy()


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def hits(predictions: np.ndarray, targets: np.ndarray) -> float:
    """How often the own target is the nearest, after the targets' mean is taken away: one by one."""
    centre = targets.mean(axis=0)
    nearest = [np.argmax(unit(targets - centre) @ unit(guess - centre)) for guess in predictions]
    return float(np.mean(np.array(nearest) == np.arange(len(targets))))


def rank(vectors: np.ndarray) -> float:
    singular = np.linalg.svd(vectors - vectors.mean(axis=0), compute_uv=False)
    p = singular[singular > 1e-6 * singular.max()] / singular.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


# ---- logs


@pytest.mark.parametrize("mode", ["mask_token", "drop"])
def test_what_is_logged_is_what_the_batches_say(mode: str, tmp_path: Path) -> None:
    """Two updates of two micro-batches between two logs, recomputed from the batches by hand."""
    model = tiny_jepa("bert", mode, loss="l2", prediction_weight=1.0)
    run = trainer(
        tmp_path,
        model,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
        logging_steps=2,
        **(FROZEN_RUN | {"ema_decay": 0.75}),
    )
    # At a learning rate of 0 the target would go to the context: hold both, but keep the decay that is logged.
    model.target_encoder.load_state_dict(model.context_encoder.state_dict())
    run.train()
    logs, batches = step_logs(run), run.batches
    assert len(logs) == 2
    assert len(batches) == 8
    tokens = np.cumsum([batch["attention_mask"].sum().item() for batch in batches])
    for number, log in enumerate(logs):
        window = batches[4 * number : 4 * number + 4]
        pairs = [valid_pairs(model, batch) for batch in window]
        counts = np.array([len(targets) for _, targets in pairs])
        errors = [np.mean((guess - target) ** 2, axis=-1).sum() for guess, target in pairs]
        updates = [sum(errors[i : i + 2]) / counts[i : i + 2].sum() for i in (0, 2)]
        cosines = [(unit(guess) * unit(target)).sum() for guess, target in pairs]
        assert log["loss"] == pytest.approx(np.mean(updates), rel=1e-5)
        assert log["prediction_loss"] == pytest.approx(sum(errors) / counts.sum(), rel=1e-5)
        assert log["cosine"] == pytest.approx(sum(cosines) / counts.sum(), abs=1e-5)
        read = sum(batch["attention_mask"].sum().item() for batch in window)
        assert log["masked_fraction"] == pytest.approx(counts.sum() / read, rel=1e-6)
        assert log["num_input_tokens_seen"] == tokens[4 * number + 3]
        assert log["ema_decay"] == 0.75
        assert log["rows_without_targets"] == 0
    assert run.state.num_input_tokens_seen == tokens[-1]
    assert {"grad_norm", "learning_rate", "epoch"} <= logs[0].keys()


def test_each_part_of_the_loss_is_logged_only_where_it_counts(tmp_path: Path) -> None:
    """The loss is the weighted sum of its parts; parts of weight 0 are not named."""
    parts = {"mlm_weight": 0.5, "variance_weight": 0.25, "covariance_weight": 0.125, "sigreg_weight": 0.0625}
    run = trainer(tmp_path, tiny_jepa(prediction_weight=3.0, **parts), max_steps=1)
    run.train()
    (log,) = step_logs(run)
    names = {name: name.replace("weight", "loss") for name in parts}
    total = 3 * log["prediction_loss"] + sum(weight * log[names[name]] for name, weight in parts.items())
    assert log["loss"] == pytest.approx(total, rel=1e-5)
    assert min(log[name] for name in names.values()) > 0
    plain = trainer(tmp_path, max_steps=1)
    plain.train()
    assert not set(names.values()) & step_logs(plain)[0].keys()


@pytest.mark.parametrize("counted", ["no", "all", "non_padding"])
def test_tokens_are_counted_as_asked(counted: str, tmp_path: Path) -> None:
    """All, all but padding, or not at all."""
    run = trainer(tmp_path, max_steps=2, include_num_input_tokens_seen=counted)
    run.train()
    everything = sum(batch["input_ids"].numel() for batch in run.batches)
    real = sum(batch["attention_mask"].sum().item() for batch in run.batches)
    assert real < everything
    assert run.state.num_input_tokens_seen == {"no": 0, "all": everything, "non_padding": real}[counted]


# ---- what a step waits for


class HostReads(TorchDispatchMode):
    """Names the operators for which the host would wait for a GPU: a value or a shape is read back."""

    def __init__(self) -> None:
        super().__init__()
        self.health_findings: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        reads = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten._unique2)
        by_mask = func.overloadpacket in (aten.index, aten.index_put, aten.index_put_) and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if func.overloadpacket in reads or by_mask:
            self.health_findings.append(str(func))
        return func(*args, **(kwargs or {}))


class SyncCountingTrainer(JepaTrainer):
    """A trainer whose later steps are watched, from the first look at the batch to the EMA and without the log."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.watch = HostReads()
        self.watching = ExitStack()

    def get_batch_samples(self, epoch_iterator: Any, *args: Any, **kwargs: Any) -> Any:
        batches = [next(epoch_iterator)]
        if self.state.global_step:  # the first step builds the optimizer's state
            self.watching.enter_context(self.watch)
        return super().get_batch_samples(iter(batches), *args, **kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self.watching.close()
        super()._maybe_log_save_evaluate(*args, **kwargs)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize(
    ("mode", "settings"),
    [
        ("drop", {}),
        ("drop", {"mlm_weight": 0.5, "contrastive_weight": 1.0, "variance_weight": 1.0, "covariance_weight": 1.0}),
        ("mask_token", {"predictor_type": "mlp", "loss": "cosine", "target_norm": "instance"}),
    ],
)
def test_a_step_between_logs_reads_nothing_back(
    mode: str, settings: dict[str, Any], padded: bool, tmp_path: Path
) -> None:
    """From batch to EMA no value and no shape comes back from the device: on a GPU the host never waits for it."""
    data = rows("bert", 40)
    data = data if padded else [row for row in data if len(row["input_ids"]) == 24] * 4
    run = trainer(
        tmp_path,
        tiny_jepa("bert", mode, **settings),
        data,
        cls=SyncCountingTrainer,
        logging_steps=4,
        health_steps=0,
        max_steps=4,
    )
    run.train()
    assert run.watch.health_findings == []


# ---- floating-point operations


@pytest.mark.parametrize(
    ("mode", "predictor"), [("mask_token", "mlp"), ("mask_token", "transformer"), ("drop", "transformer")]
)
def test_floating_point_operations_by_hand(mode: str, predictor: str, tmp_path: Path) -> None:
    """2 per weight and position forward and 4 backward; the target encoder only forward; tables are look-ups."""
    norm, layer = 2 * 32, 4 * (32 * 32 + 32) + (32 * 64 + 64) + (64 * 32 + 32) + 2 * (2 * 32)
    encoder = norm + 2 * layer
    mlp = (32 * 128 + 128) + (128 * 32 + 32)
    of_all = 2 * 16 + (16 * 32 + 32)  # the first norm, keys and values
    of_queries = (16 * 16 + 16) + (16 * 16 + 16) + 2 * 16 + (16 * 64 + 64) + (64 * 16 + 16)
    # The last block has queries of the targets alone.
    transformer = (32 * 16 + 16) + 2 * of_all + of_queries + 2 * 16 + (16 * 32 + 32)
    samples, length, targets, visible = 3, 10, 4, 7
    batch = {
        "input_ids": torch.zeros(samples, length, dtype=torch.long),
        "attention_mask": torch.ones(samples, length, dtype=torch.long),
        "target_positions": torch.zeros(samples, 1, targets, dtype=torch.long),
        "context_positions": torch.zeros(samples, 1, visible, dtype=torch.long),
    }
    context = visible if mode == "drop" else length
    read = targets if predictor == "mlp" else context + targets
    expected = 2 * encoder * samples * length + 6 * encoder * samples * context
    expected += 6 * (mlp if predictor == "mlp" else transformer) * samples * read
    expected += 0 if predictor == "mlp" else 6 * of_queries * samples * targets
    run = trainer(tmp_path, tiny_jepa("bert", mode, predictor), max_steps=1)
    assert run.floating_point_ops(batch) == expected
    run.train()
    assert run.state.total_flos == sum(run.floating_point_ops(batch) for batch in run.batches) > 0


# ---- evaluation


@pytest.mark.parametrize("weights_of_parts", [{}, {"mlm_weight": 0.5}], ids=["jepa", "mlm"])
def test_eval_loss_is_the_mean_over_targets_however_batches_are_cut(
    weights_of_parts: dict[str, float], tmp_path: Path
) -> None:
    """13 rows of very different lengths, in batches of 4 (the last of 1) and in one: the same; not the batch mean."""
    model = tiny_jepa(**weights_of_parts)
    data = rows("bert", 13, longest=60)
    run = trainer(tmp_path, model, eval_data=data, per_device_train_batch_size=4)
    collator = run.data_collator.for_evaluation()
    with torch.no_grad():
        expected = model(**collator(data)).loss.item()
        parts = [model(**collator(data[i : i + 4])).loss.item() for i in range(0, 13, 4)]
    assert run.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    undisturbed = trainer(tmp_path, model, eval_data=data, per_device_train_batch_size=13)
    assert undisturbed.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert np.mean(parts) != pytest.approx(expected, rel=1e-3)


def test_an_evaluation_does_not_depend_on_its_batch_size(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Terms compare the rows of a batch: it compares as many as training does, and says once that it does."""
    every_term = {"variance_weight": 0.1, "covariance_weight": 0.1, "sigreg_weight": 0.1, "contrastive_weight": 1.0}
    model, actual = tiny_jepa(**every_term), {}
    for size in (None, 2, 8, 20):
        caplog.clear()
        run = trainer(tmp_path, model, eval_data=rows("bert", 20), per_device_eval_batch_size=size)
        messages = [
            record.message for record in caplog.records if "evaluation uses batches of 8 rows" in record.message
        ]
        assert len(messages) == (size in (2, 20))
        assert len(run.get_eval_dataloader()) == 3
        metrics = run.evaluate()
        timing = ("runtime", "per_second", "preparation_time")
        actual[size] = {name: value for name, value in metrics.items() if not name.endswith(timing)}
    assert {"eval_loss", "eval_contrastive_loss", "eval_sigreg_loss", "eval_top1_accuracy"} <= actual[None].keys()
    assert all(metrics == actual[None] for metrics in actual.values())


@pytest.mark.parametrize("loss", ["cosine", "l2", "l1", "smooth_l1"])
def test_the_constant_predictor_and_chance_by_hand(loss: str, tmp_path: Path) -> None:
    """The loss of the best constant (smooth L1's is near the mean), and one over the number of targets."""
    model = tiny_jepa(loss=loss, smooth_l1_beta=0.5)
    data = rows("bert", 13)
    run = trainer(tmp_path, model, eval_data=data, per_device_train_batch_size=13)
    metrics = run.evaluate()
    predictions, targets = valid_pairs(model, run.data_collator.for_evaluation()(data))
    difference = np.abs(targets - (np.median(targets, axis=0) if loss == "l1" else targets.mean(axis=0)))
    expected = {
        "cosine": 1 - unit(targets) @ unit(unit(targets).mean(axis=0)),
        "l2": difference**2,
        "l1": difference,
        "smooth_l1": np.where(difference < 0.5, difference**2, difference - 0.25),
    }[loss].mean()
    near = 0.02 if loss == "smooth_l1" else 1e-4
    assert metrics["eval_constant_baseline_loss"] == pytest.approx(expected, rel=near)
    assert metrics["eval_top1_accuracy_chance"] == pytest.approx(1 / len(targets))
    assert metrics["eval_top1_accuracy"] == pytest.approx(hits(predictions, targets), abs=1e-6)
    assert metrics["eval_target_rank"] == pytest.approx(rank(targets), rel=1e-3)
    assert metrics["eval_cosine"] == pytest.approx((unit(predictions) * unit(targets)).sum(-1).mean(), abs=1e-5)


@pytest.mark.usefixtures("full_health_batch")
@pytest.mark.parametrize("packed", [False, True])
def test_an_evaluation_s_measures_do_not_depend_on_how_batches_are_cut(
    packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 rows, two masks, in batches of 3 and of 40: the same numbers; so where the targets are bounded to a part.

    They are those of `measure_health` on the same rows.
    """
    model = tiny_jepa(contrastive_weight=1.0)
    data = pack(rows("bert", 60))[0] if packed else rows("bert", 40)

    def run(**settings: Any) -> RecordingTrainer:
        return trainer(tmp_path, model, eval_data=data, mask={"num_masks": 2}, **settings)

    health = run().measure_health()
    del health["health_encoder_distance"]
    assert {"health_top1_accuracy_in_sample", "health_position_baseline_loss"} <= set(health)

    def evaluated(size: int) -> dict[str, float]:
        metrics = run(per_device_eval_batch_size=size).evaluate()
        return {name: metrics[name.replace("health_", "eval_")] for name in health}

    near = {"rel": 1e-3, "abs": 1e-4}
    assert evaluated(3) == pytest.approx(health, **near)
    assert evaluated(len(data)) == pytest.approx(health, **near)
    monkeypatch.setattr("jepa_hf.training.trainer._EVALUATED_TARGETS", 40)
    part = evaluated(3)
    assert part == pytest.approx(evaluated(len(data)), **near)
    assert part["health_top1_accuracy_chance"] > health["health_top1_accuracy_chance"]
    assert part["health_prediction_loss"] == pytest.approx(health["health_prediction_loss"])  # of all targets


def test_evaluation_is_deterministic_and_does_not_see_the_epoch(tmp_path: Path) -> None:
    """Before, after each of three epochs of other training masks, and twice in a row: the same numbers exactly."""
    run = trainer(
        tmp_path,
        tiny_jepa(encoder={"hidden_dropout_prob": 0.1}, sigreg_weight=0.1),
        data=rows("bert", 16),
        eval_data=rows("bert", 11),
        max_steps=-1,
        num_train_epochs=3,
        eval_strategy="epoch",
        eval_on_start=True,
        **FROZEN_RUN,
    )
    run.train()
    run.evaluate()
    run.evaluate()
    timing = ("runtime", "per_second", "epoch", "step", "tokens_seen", "preparation_time")
    evaluations = [
        {name: value for name, value in entry.items() if not name.endswith(timing)}
        for entry in run.state.log_history
        if "eval_loss" in entry
    ]
    assert len(evaluations) == 6
    assert "eval_context_rank" in evaluations[0]
    assert all(evaluation == evaluations[0] for evaluation in evaluations)
    assert run.data_collator.epoch == 2
    masks = run.data_collator(rows("bert", 11))["target_positions"]
    fixed = run.data_collator.for_evaluation()(rows("bert", 11))["target_positions"]
    assert masks.shape != fixed.shape or not torch.equal(masks, fixed)


@pytest.mark.parametrize("mode", ["mask_token", "drop"])
def test_evaluation_keeps_no_layers_but_the_last(mode: str, tmp_path: Path) -> None:
    """In the predictor and when outputs are tracked, as many tensors are alive with six layers as with two."""

    def alive(layers: int) -> list[int]:
        model = tiny_jepa("bert", mode, encoder={"num_hidden_layers": layers}, average_top_k_layers=1)
        own = {id(value) for value in (*model.parameters(), *model.buffers())}
        counts: list[int] = []

        def count() -> None:
            objects = [each for each in gc.get_objects() if type(each) is torch.Tensor and each.dim() == 3]
            counts.append(sum(each.is_floating_point() and id(each) not in own for each in objects))

        class Counting(RecordingTrainer):
            def update_metrics(self, outputs: Any, inputs: Batch, means: Any) -> None:
                count()
                assert outputs.context_hidden_states is outputs.target_hidden_states is None
                super().update_metrics(outputs, inputs, means)

        model.predictor.register_forward_pre_hook(lambda *_: count())
        trainer(tmp_path, model, eval_data=rows("bert", 8), cls=Counting).evaluate()
        return counts

    few, many = alive(2), alive(6)
    assert len(few) == 2
    assert few == many


def test_several_evaluation_sets_each_have_their_metrics(tmp_path: Path) -> None:
    run = trainer(tmp_path, eval_data={"a": rows("bert", 8), "b": rows("bert", 20)[12:]})
    metrics = run.evaluate()
    assert metrics["eval_a_loss"] != metrics["eval_b_loss"]
    assert {"eval_a_top1_accuracy", "eval_b_top1_accuracy", "eval_a_context_rank"} <= metrics.keys()


def test_the_best_model_by_top1_accuracy_is_loaded_at_the_end(tmp_path: Path) -> None:
    """The weights at the end are those of the checkpoint whose evaluation had the highest top-1 accuracy."""
    run = trainer(
        tmp_path,
        eval_data=rows("bert", 24),
        max_steps=6,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        learning_rate=0.03,
        load_best_model_at_end=True,
        metric_for_best_model="top1_accuracy",
    )
    run.train()
    rates = {
        entry["step"]: entry["eval_top1_accuracy"] for entry in run.state.log_history if "eval_top1_accuracy" in entry
    }
    best = max(rates, key=lambda step: (rates[step], -step))
    assert len(set(rates.values())) > 1
    assert run.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    saved = JepaForRepresentationPrediction.from_pretrained(tmp_path / f"checkpoint-{best}")
    assert largest_difference(weights(run.model), weights(saved)) == 0


# ---- data


@pytest.fixture(scope="module")
def encoder_directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_encoder("bert", tmp_path_factory.mktemp("encoder"))


TEXT = CORPUS[20:36]
FORMS = {
    "list of dict": [{"text": text} for text in TEXT],
    "list of str": TEXT,
    "dataset": datasets.Dataset.from_dict({"text": TEXT}),
    "dataset with another column": datasets.Dataset.from_dict({"text": TEXT, "label": [0] * len(TEXT)}),
    "stream": datasets.Dataset.from_dict({"text": TEXT}).to_iterable_dataset(),
    "generator": datasets.IterableDataset.from_generator(lambda: iter([{"text": text} for text in TEXT])),
}


@pytest.mark.parametrize("with_tokenizer", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_text_in_any_form_is_tokenised(form: str, with_tokenizer: bool, encoder_directory: str, tmp_path: Path) -> None:
    """A directory and texts are enough: the rows are tokenized, and two steps are trained on them."""
    run = RecordingTrainer(
        model=encoder_directory,
        args=arguments(tmp_path, max_steps=2, train_sampling_strategy="sequential"),
        train_dataset=FORMS[form],
        eval_dataset=FORMS[form],
        processing_class=tiny_tokenizer("bert") if with_tokenizer else None,
    )
    expected = tiny_tokenizer("bert")(TEXT, truncation=True, max_length=128)["input_ids"]
    assert [row["input_ids"] for row in run.train_dataset] == expected
    assert isinstance(run.data_collator, DataCollatorForSpanJEPA)
    assert run.data_collator.masked_tokens == run.model.config.masked_tokens
    run.train()
    read = [
        ids[mask.bool()].tolist()
        for batch in run.batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert read == expected
    assert run.evaluate()["eval_loss"] > 0


def test_rows_are_cut_where_asked_and_where_model_or_tokenizer_end(encoder_directory: str, tmp_path: Path) -> None:
    long = [" ".join(CORPUS)]
    for asked, expected in ((20, 20), (None, 128), (4000, 128)):
        run = JepaTrainer(encoder_directory, arguments(tmp_path), train_dataset=long, max_seq_length=asked)
        assert [len(row["input_ids"]) for row in run.train_dataset] == [expected]


def test_a_stream_of_tokens_trains(tmp_path: Path) -> None:
    """Rows of ids from an IterableDataset, with dynamic padding, as many steps as asked for."""
    stream = datasets.Dataset.from_list(rows("bert", 20, longest=40)).to_iterable_dataset()
    run = trainer(tmp_path, data=stream, max_steps=5)
    run.train()
    assert run.state.global_step == 5
    assert len({batch["input_ids"].shape[1] for batch in run.batches}) > 1


def test_persistent_workers_end_with_their_training(tmp_path: Path) -> None:
    """Not those of evaluations, whom the next evaluation asks again; and there may be another training."""
    before = set(multiprocessing.active_children())
    settings = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    data = rows("bert", 16)
    run = trainer(
        tmp_path,
        data=data,
        eval_data=data,
        dataloader_num_workers=1,
        dataloader_persistent_workers=True,
        **settings,
        callbacks=[RunAtStep(on_step_end=lambda *_: during.append(set(multiprocessing.active_children()) - before))],
    )
    evaluation = None
    for _ in range(2):
        during: list[set[Any]] = []
        run.train()
        assert [len(workers) for workers in during] == ([1, 2] if evaluation is None else [2, 2])
        evaluation = evaluation or during[1] - during[0]
        assert set(multiprocessing.active_children()) - before == evaluation
    assert len(run.batches) == 4
    end_workers(run)


def test_every_part_by_hand(tmp_path: Path) -> None:
    """Config, model, collator, EMA and optimizer of one's own: nothing is replaced."""
    model = tiny_jepa()
    collator = DataCollatorForSpanJEPA(tiny_tokenizer("bert"), masked_tokens="drop", mask_ratio=0.5)
    ema = EmaTargetCallback(0.25, schedule="constant")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    run = RecordingTrainer(
        model=model,
        args=arguments(tmp_path, max_steps=2, ema_decay=0.99),
        data_collator=collator,
        train_dataset=rows("bert", 16),
        callbacks=[ema],
        optimizers=(optimizer, scheduler),
    )
    assert run.data_collator is collator
    assert ema_of(run) is ema
    run.train()
    assert isinstance(run.optimizer.optimizer, torch.optim.SGD)
    assert ema.decay == 0.25
    assert step_logs(run)[-1]["ema_decay"] == 0.25
    assert step_logs(run)[-1]["masked_fraction"] > 0.4


def test_the_card_has_each_of_several_evaluation_data_sets(tmp_path: Path) -> None:
    """Their metrics are logged under their names; also those of a run that a callback has ended."""
    data = {"near": rows("bert", 8), "far_off": rows("bert", 8)}
    run = trainer(tmp_path, data=rows("bert", 16), eval_data=data, eval_strategy="steps", eval_steps=1, max_steps=9)
    run.add_callback(
        RunAtStep(on_step_end=lambda _, state: setattr(run.control, "should_training_stop", state.global_step == 2))
    )
    run.train()
    run.save_model()
    card = (tmp_path / "README.md").read_text()
    for name in ("near", "far off"):
        assert f"| {name} prediction loss |" in card
    assert run.verdict() is not None
    # Judged by a measurement at its end, not by that before its first step.
    measured = [entry["step"] for entry in run.state.log_history if "health_target_rank" in entry]
    assert measured == [0, 2]


class TestEncoderGivenAsAnObject:
    """A JEPA is built around a copy of the encoder that a user passes."""

    def test_an_optimizer_of_its_parameters_is_refused(self, encoder_directory: str, tmp_path: Path) -> None:
        """It would move the encoder outside the JEPA, and nothing of what is saved."""
        encoder = AutoModel.from_pretrained(encoder_directory)
        optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
        with pytest.raises(UsageError, match=r"optimizers holds .* the trained model does not have"):
            JepaTrainer(encoder, arguments(tmp_path), train_dataset=TEXT, optimizers=(optimizer, None))

    def test_frozen_parameters_stay_frozen(self, encoder_directory: str, tmp_path: Path) -> None:
        encoder = AutoModel.from_pretrained(encoder_directory)
        encoder.embeddings.requires_grad_(False)
        run = JepaTrainer(encoder, arguments(tmp_path, max_steps=1, learning_rate=0.1), train_dataset=TEXT)
        run.train()
        frozen = run.model.context_encoder.embeddings.state_dict()
        assert largest_difference(frozen, encoder.embeddings.state_dict()) == 0
        assert largest_difference(weights(run.model.context_encoder.encoder), weights(encoder.encoder)) > 0

    def test_the_seed_draws_the_predictor(self, encoder_directory: str, tmp_path: Path) -> None:
        """Whatever was drawn in the process before."""
        predictors = []
        for seed in (1, 1, 2):
            torch.rand(seed + len(predictors))
            run = JepaTrainer(encoder_directory, arguments(tmp_path, seed=seed), train_dataset=TEXT)
            predictors.append(weights(run.model.predictor))
        assert largest_difference(predictors[0], predictors[1]) == 0
        assert largest_difference(predictors[0], predictors[2]) > 0


def test_arguments_may_be_left_out(encoder_directory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`JepaTrainer(model=..., train_dataset=...)` is enough."""
    monkeypatch.chdir(tmp_path)
    run = JepaTrainer(encoder_directory, train_dataset=TEXT)
    assert isinstance(run.args, JepaTrainingArguments)
    assert run.args.output_dir == "out"
    assert len(run.train_dataset) == len(TEXT)


def test_data_without_text_or_ids_and_a_model_without_tokenizer_are_refused(
    encoder_directory: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="neither a column input_ids nor text, only body, label"):
        JepaTrainer(
            encoder_directory,
            arguments(tmp_path),
            train_dataset=datasets.Dataset.from_dict({"body": TEXT, "label": [0] * len(TEXT)}),
        )
    with pytest.raises(UsageError, match=r"a tokenizer \(processing_class=...\) or a data_collator"):
        JepaTrainer(tiny_jepa(), arguments(tmp_path), train_dataset=rows("bert", 8))


def test_a_collator_takes_over_the_models_masked_tokens(encoder_directory: str, tmp_path: Path) -> None:
    """One that has another is refused before the start; the user's own object stays as it is."""
    collator = DataCollatorForSpanJEPA(tiny_tokenizer("bert"))
    for mode in ("mask_token", "drop"):
        model = JepaForRepresentationPrediction.from_encoder_pretrained(encoder_directory, masked_tokens=mode)
        run = JepaTrainer(model, arguments(tmp_path), collator, train_dataset=rows("bert", 8))
        assert run.data_collator.masked_tokens == mode
        assert collator.masked_tokens is None
    wrong = DataCollatorForSpanJEPA(tiny_tokenizer("bert"), masked_tokens="mask_token")
    with pytest.raises(UsageError, match="collator has masked_tokens 'mask_token', but the model 'drop'"):
        JepaTrainer(model, arguments(tmp_path), wrong, train_dataset=rows("bert", 8))


@pytest.mark.parametrize("source", ["tokens", "text"])
def test_word_ids_reach_the_collator(source: str, encoder_directory: str, tmp_path: Path) -> None:
    """Trainer removes what the model does not read; whole words are hidden all the same, and only whole ones."""
    tokenizer = tiny_tokenizer("bert")
    data = datasets.Dataset.from_dict({"text": TEXT, "label": [1] * len(TEXT)})
    if source == "tokens":
        encoded = [tokenizer(text) for text in TEXT]
        words = [[-1 if word is None else word for word in row.word_ids()] for row in encoded]
        data = datasets.Dataset.from_dict(
            {"input_ids": [row["input_ids"] for row in encoded], "word_ids": words, "label": [1] * len(TEXT)}
        )
    run = RecordingTrainer(
        model=encoder_directory,
        args=arguments(tmp_path, max_steps=2, train_sampling_strategy="sequential"),
        data_collator=DataCollatorForSpanJEPA(tokenizer, whole_word=True, mean_span_length=1),
        train_dataset=data,
    )
    run.train()
    several = 0
    hidden = [
        set(positions[valid].tolist())
        for batch in run.batches
        for positions, valid in zip(batch["target_positions"], batch["target_valid"], strict=True)
    ]
    for text, positions in zip(TEXT, hidden, strict=True):
        words = tokenizer(text).word_ids()
        touched = {words[position] for position in positions}
        undisturbed = {position for position, word in enumerate(words) if word is not None and word in touched}
        assert positions == undisturbed
        several += len(undisturbed) > len(touched)
    assert several > 4


# ---- one EMA


def test_a_second_ema_is_refused_and_not_kept(tmp_path: Path) -> None:
    """In the constructor and added later, as an object or a class; one's own takes the default's place."""
    for second in (EmaTargetCallback(0.5), EmaTargetCallback):
        with pytest.raises(UsageError, match="already an EmaTargetCallback"):
            trainer(tmp_path, callbacks=[EmaTargetCallback(0.9), second])
        run = trainer(tmp_path)
        with pytest.raises(UsageError, match="already an EmaTargetCallback"):
            run.add_callback(second)
        assert sum(isinstance(item, EmaTargetCallback) for item in run.callback_handler.callbacks) == 1
    alone = trainer(tmp_path, callbacks=[EmaTargetCallback])
    assert sum(isinstance(item, EmaTargetCallback) for item in alone.callback_handler.callbacks) == 1


def test_a_contrastive_term_over_batches_of_one_is_refused(tmp_path: Path) -> None:
    """One sample cannot be compared with others; two are enough."""
    model = tiny_jepa("bert", contrastive_weight=1.0)
    with pytest.raises(UsageError, match=r"a batch here has one.*--per_device_train_batch_size"):
        trainer(tmp_path, model, per_device_train_batch_size=1)
    trainer(tmp_path, model, per_device_train_batch_size=2)


def test_a_last_batch_of_one_sample_has_no_contrastive_loss(tmp_path: Path) -> None:
    """It would pull the mean down; the loss is the weighted sum of the means."""
    run = trainer(tmp_path, tiny_jepa("bert", contrastive_weight=2.0, prediction_weight=3.0), eval_data=rows("bert", 9))
    full, with_one_more = run.evaluate(rows("bert", 9)[:8]), run.evaluate()
    assert with_one_more["eval_contrastive_loss"] == pytest.approx(full["eval_contrastive_loss"], rel=1e-5)
    for metrics in (full, with_one_more):
        total = 3 * metrics["eval_prediction_loss"] + 2 * metrics["eval_contrastive_loss"]
        assert metrics["eval_loss"] == pytest.approx(total, rel=1e-5)


def test_an_evaluation_follows_a_batch_size_that_was_found(tmp_path: Path) -> None:
    """`auto_find_batch_size` and trials change that of training after the constructor."""
    run = trainer(tmp_path, eval_data=rows("bert", 12), auto_find_batch_size=True)
    run._train_batch_size = 4  # as Trainer does
    assert run.get_eval_dataloader().total_batch_size == 4


def test_ones_own_ema_replaces_the_default(tmp_path: Path) -> None:
    class Frozen(EmaTargetCallback):
        """A target that never moves."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            pass

    own = Frozen()
    run = trainer(tmp_path, callbacks=[own], ema_decay=0.5)
    before = weights(run.model.target_encoder)
    run.train()
    assert run.ema_callback is own
    assert largest_difference(weights(run.model.target_encoder), before) == 0
    assert "ema_decay" not in step_logs(run)[0]


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_target_moves_once_per_update(accumulation: int, tmp_path: Path) -> None:
    """With a still context, N updates bring the target to context + d^N (start − context), accumulation or not."""
    run = trainer(
        tmp_path,
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        **(FROZEN_RUN | {"ema_decay": 0.5}),
    )
    start, context = weights(run.model.target_encoder), weights(run.model.context_encoder)
    run.train()
    expected = {name: context[name] + 0.5**3 * (start[name] - context[name]) for name in start}
    assert largest_difference(weights(run.model.target_encoder), expected) < 1e-6


# ---- rows without targets


def test_rows_that_are_too_short_are_counted_and_a_batch_of_them_does_no_harm(tmp_path: Path) -> None:
    """Batches of 8 with 2, 8 and 0 such rows: the log says so, the loss of the empty one is 0, no weight is NaN."""
    long = rows("bert", 40)[10:]
    data = long[:3] + [UNMASKABLE_ROW] + long[3:6] + [UNMASKABLE_ROW] + [UNMASKABLE_ROW] * 8 + long[6:14]
    run = trainer(tmp_path, data=data, mask={"on_too_short": "skip"}, max_steps=3, train_sampling_strategy="sequential")
    before = weights(run.model.context_encoder)
    run.train()
    logs = step_logs(run)
    assert [log["rows_without_targets"] for log in logs] == [2, 8, 0]
    assert logs[1]["loss"] == 0
    assert logs[0]["loss"] > 0
    assert logs[2]["loss"] > 0
    assert logs[1]["masked_fraction"] == 0
    assert all(np.isfinite(value) for log in logs for value in log.values())
    assert all(value.isfinite().all() for value in weights(run.model).values())
    assert largest_difference(weights(run.model.context_encoder), before) > 0
    metrics = run.evaluate(data)
    assert metrics["eval_rows_without_targets"] == 10


@pytest.mark.parametrize("mode", ["mask_token", "drop"])
def test_a_batch_without_targets_has_zero_gradients(mode: str, tmp_path: Path) -> None:
    """Not NaN, and not None either, which DDP would wait for."""
    model = tiny_jepa("bert", mode, mlm_weight=0.5)
    sizes: list[float] = []

    def look(model: Any, state: Any) -> None:
        sizes.extend(p.grad.abs().max().item() for p in model.parameters() if p.requires_grad)

    run = trainer(
        tmp_path,
        model,
        data=[UNMASKABLE_ROW] * 16 + rows("bert", 1),
        train_sampling_strategy="sequential",
        mask={"on_too_short": "skip"},
        callbacks=[RunAtStep(on_pre_optimizer_step=look)],
        max_steps=1,
    )
    with pytest.raises(RunError, match="No row had a target in 1 step"):
        run.train()
    assert len(sizes) == sum(p.requires_grad for p in model.parameters())
    assert max(sizes) == 0


# ---- precision, memory, speed


def final(tmp_path: Path, **overrides: Any) -> RecordingTrainer:
    """Three steps. A key bias has no gradient but rounding, which AdamW's default would blow up to a step."""
    run = trainer(tmp_path, max_steps=3, ema_decay=0.5, adam_epsilon=1e-6, **overrides)
    run.train()
    return run


def test_activation_checkpointing_changes_nothing(tmp_path: Path) -> None:
    """Same weights, same moved target; and something was indeed recomputed."""
    plain = final(tmp_path)
    start = weights(tiny_jepa().target_encoder)
    calls = {"context": 0, "target": 0}
    model = tiny_jepa()
    for which in calls:
        part = model.get_encoder(which).encoder.layer[0].intermediate
        part.register_forward_hook(lambda *_, which=which: calls.update({which: calls[which] + 1}))
    run = final(tmp_path, model=model, gradient_checkpointing=True, health_steps=0)
    assert calls == {"context": 6, "target": 3}
    assert largest_difference(weights(run.model), weights(plain.model)) < 1e-6
    assert largest_difference(weights(run.model.target_encoder), start) > 1e-2


def test_bf16_computes_in_bfloat16_and_averages_in_float32(tmp_path: Path) -> None:
    """Autocast on the CPU: the weights stay in float32, and even a decay of 0.999 moves the target."""
    model = tiny_jepa()
    seen: set[torch.dtype] = set()
    layer = model.context_encoder.encoder.layer[0].intermediate.dense
    layer.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    start = weights(model.target_encoder)
    run = trainer(tmp_path, model, max_steps=3, ema_decay=0.999, bf16=True)
    run.train()
    assert seen == {torch.bfloat16}
    assert {value.dtype for value in weights(model).values()} == {torch.float32}
    moved = [name for name, value in weights(model.target_encoder).items() if not torch.equal(value, start[name])]
    assert moved == list(start)
    plain = trainer(tmp_path, max_steps=3, ema_decay=0.999)
    plain.train()
    assert run.losses == pytest.approx(plain.losses, rel=0.05)


@pytest.mark.slow
def test_torch_compile_moves_the_same_target_and_saves_the_same_names(tmp_path: Path) -> None:
    """The compiled model's losses and weights are the plain one's; its prefixes are nowhere in what is saved."""
    torch.compiler.reset()  # what an earlier test compiled makes shapes dynamic, and this four times as long
    compiled = final(
        tmp_path / "compiled",
        torch_compile=True,
        torch_compile_backend="aot_eager",
        save_strategy="steps",
        save_steps=3,
    )
    assert isinstance(compiled.model_wrapped, torch._dynamo.OptimizedModule)
    plain = final(tmp_path / "plain")
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-4)
    assert largest_difference(weights(compiled.model), weights(plain.model)) < 1e-4
    saved = JepaForRepresentationPrediction.from_pretrained(tmp_path / "compiled" / "checkpoint-3")
    assert largest_difference(weights(saved), weights(compiled.model)) == 0
    assert {"prediction_loss", "cosine"} <= step_logs(compiled)[0].keys()
    compiled.save_model()
    assert (
        largest_difference(
            weights(AutoModel.from_pretrained(tmp_path / "compiled", add_pooling_layer=False)),
            weights(plain.model.context_encoder),
        )
        < 1e-4
    )


def test_dataparallel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process that sees several GPUs: a sentence that names accelerate launch."""
    monkeypatch.setattr(JepaTrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(UsageError, match=r"DataParallel.*2 GPUs.*accelerate launch"):
        trainer(tmp_path)


def test_ddp_keeps_gradients_in_its_buckets(tmp_path: Path) -> None:
    """Or each would be copied there and back."""
    assert trainer(tmp_path).accelerator.ddp_handler.to_kwargs()["gradient_as_bucket_view"] is True


def test_ranks_with_batches_of_different_sizes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their samples are compared by a collective that wants as many of each; in one process there is none."""
    trainer(tmp_path, tiny_jepa(), train_sampling_strategy="batch_rebalance")
    monkeypatch.setattr(JepaTrainingArguments, "world_size", property(lambda self: 2))
    with pytest.raises(UsageError, match=r"batch_rebalance.*Use group_by_length"):
        trainer(tmp_path, tiny_jepa(), train_sampling_strategy="batch_rebalance")


# ---- optimizer


def test_a_group_without_parameters_is_left_out(tmp_path: Path) -> None:
    """Such as that of biases where only adapters are trained; DeepSpeed, which drops it, writes the same checkpoint."""
    run = trainer(tmp_path)
    for name, parameter in run.model.named_parameters():
        parameter.requires_grad_(name.endswith("query.weight") and parameter.requires_grad)
    (group,) = run.create_optimizer().param_groups
    assert group["params"] == [each for each in run.model.parameters() if each.requires_grad] != []


@pytest.mark.parametrize("everything", [False, True])
def test_weight_decay_is_for_matrices_unless_all_is_asked_for(everything: bool, tmp_path: Path) -> None:
    """Not for biases, norms, the predictor's mask token and position table; with decay_norms_and_biases for all."""
    run = trainer(
        tmp_path, tiny_jepa(mlm_weight=0.5), weight_decay=0.125, decay_norms_and_biases=everything, max_steps=1
    )
    run.create_optimizer()
    names = {id(parameter): name for name, parameter in run.model.named_parameters()}
    decayed, others = set(), set()
    for group in run.optimizer.param_groups:
        kind = decayed if group["weight_decay"] == 0.125 else others
        kind.update(names[id(parameter)] for parameter in group["params"])
        assert group["weight_decay"] in (0.125, 0.0)
    trainable = {name for name, parameter in run.model.named_parameters() if parameter.requires_grad}
    assert decayed | others == trainable
    if everything:
        assert decayed == trainable
        return
    matrices = {
        name
        for name, parameter in run.model.named_parameters()
        if parameter.requires_grad and parameter.ndim == 2 and name != "predictor.position_embeddings"
    }
    assert decayed == matrices
    assert {"predictor.mask_token", "predictor.position_embeddings", "mlm_head.bias"} <= others


# ---- the Hub


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub, hub.use_in_process():
        yield hub


@pytest.mark.parametrize(
    ("strategy", "checkpoints"),
    [
        ("end", [[]]),
        ("every_save", [[], [], []]),
        ("checkpoint", [["last-checkpoint"]] * 3),
        ("all_checkpoints", [["checkpoint-1"], ["checkpoint-1", "checkpoint-2"], ["checkpoint-1", "checkpoint-2"]]),
    ],
)
def test_what_is_pushed_has_the_plain_encoder_at_its_root(
    strategy: str, checkpoints: list[list[str]], hub: Hub, tmp_path: Path
) -> None:
    """In the middle of training as at the end; the full model under jepa/; no pickle but in a checkpoint."""
    after: list[dict[str, torch.Tensor]] = []
    run = trainer(
        tmp_path / "out",
        max_steps=2,
        save_strategy="steps",
        save_steps=1,
        push_to_hub=True,
        hub_strategy=strategy,
        hub_always_push=True,
        hub_model_id="me/tiny",
        hub_token=hub.token,
        ema_decay=0.5,
        callbacks=[RunAtStep(on_step_end=lambda model, state: after.append(weights(model)))],
    )
    run.train()
    run.push_to_hub()
    pushed = [commit.files for commit in hub.repos["me/tiny"].commits.values() if commit.parent is not None]
    states = ([] if strategy == "end" else after) + [after[-1]]
    for number, (files, state, there) in enumerate(zip(pushed, states, checkpoints, strict=True)):
        folder = tmp_path / f"pushed-{number}"
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        encoder = AutoModel.from_pretrained(folder, add_pooling_layer=False)
        assert encoder.config.model_type == "bert"
        prefix = "context_encoder."
        context = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        assert largest_difference(weights(encoder), context) == 0
        full = JepaForRepresentationPrediction.from_pretrained(folder / "jepa")
        assert largest_difference(weights(full), state) == 0
        assert (folder / "tokenizer.json").is_file()
        assert (folder / "modules.json").is_file()
        assert sorted(path.name for path in folder.glob("*checkpoint*")) == there
        for name in there:
            JepaForRepresentationPrediction.from_pretrained(folder / name)
            assert (folder / name / "trainer_state.json").is_file()
        pickles = {path.parent.name for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")}
        assert pickles == set(there)
        assert not list(folder.rglob("*.bin"))
    assert 'from_pretrained("me/tiny")' in (folder / "README.md").read_text(encoding="utf-8")


def test_a_push_in_the_middle_leaves_the_run_as_it_was(hub: Hub, tmp_path: Path) -> None:
    """Dropout after a push is the dropout of a run without one."""
    results = []
    for push in (True, False):
        run = trainer(
            tmp_path / str(push),
            tiny_jepa(encoder={"hidden_dropout_prob": 0.1}),
            max_steps=3,
            save_strategy="steps",
            save_steps=1,
            push_to_hub=push,
            hub_model_id="me/tiny" if push else None,
        )
        run.train()
        results.append(weights(run.model))
    assert hub.repos["me/tiny"].history() != []
    assert largest_difference(*results) == 0


@pytest.mark.parametrize("case", ONE_OF_EACH_FAMILY, ids="-".join)
def test_debug_underflow_overflow(case: tuple[str, str, str], tmp_path: Path) -> None:
    """`--debug underflow_overflow` checks the activations, and the losses stay those of a plain run."""
    losses = []
    for debug in ("", "underflow_overflow"):
        model = tiny_jepa(*case, strong=False)
        data = rows(case[0], 16)
        collator = DataCollatorForSpanJEPA(tiny_tokenizer(case[0]), masked_tokens=case[1], seed=0)
        args = arguments(tmp_path / f"out{debug}", debug=debug, max_steps=2, health_steps=0)
        run = JepaTrainer(model, args, data_collator=collator, train_dataset=data)
        run.train()
        losses.append([log["loss"] for log in step_logs(run)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
