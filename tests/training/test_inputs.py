"""Claims about the forms in which users of `Trainer` pass arguments, models, rows and collators."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pandas as pd
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    PreTrainedModel,
    TrainingArguments,
    default_data_collator,
)
from transformers.hyperparameter_search import (
    ALL_HYPERPARAMETER_SEARCH_BACKENDS,
    HPSearchBackend,
    HyperParamSearchBackendBase,
)

from helpers.runs import arguments
from helpers.tiny_models import CORPUS, save_tiny_encoder, tiny_config, tiny_tokenizer
from jepa_hf import DataCollatorForSpanJEPA, FeatureEncoderConfig, JepaTrainer, JepaTrainingArguments, UsageError
from jepa_hf.llm_jepa import LlmJepaTrainingArguments

TEXT = CORPUS[20:36]


class Texts(Dataset):
    def __init__(self, as_rows: bool = True):
        self.as_rows = as_rows

    def __len__(self) -> int:
        return len(TEXT)

    def __getitem__(self, index: int) -> Any:
        return {"text": TEXT[index], "label": 1} if self.as_rows else TEXT[index]


class TextStream(IterableDataset):
    def __iter__(self) -> Iterator[dict[str, str]]:
        return ({"text": text} for text in TEXT)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_encoder("bert", tmp_path_factory.mktemp("encoder"), head="mlm")


def trainer(encoder: Any, folder: Path, **overrides: Any) -> JepaTrainer:
    args = arguments(folder, max_steps=2, health_steps=0)
    return JepaTrainer(**{"model": encoder, "args": args, "train_dataset": TEXT, **overrides})


# ---- models

MODELS: dict[str, Callable[[str], PreTrainedModel]] = {
    "encoder": AutoModel.from_pretrained,
    "with a head": AutoModelForMaskedLM.from_pretrained,
    "random": lambda name: AutoModel.from_config(tiny_config("bert")),
}


@pytest.mark.parametrize("kind", MODELS)
def test_an_encoder_of_transformers_is_wrapped_in_a_jepa(kind: str, encoder: str, tmp_path: Path) -> None:
    """Both encoders start from a copy of its weights; it has a tokenizer where it came from a directory."""
    model = MODELS[kind](encoder)
    tokenizer = tiny_tokenizer("bert") if kind == "random" else None
    run = trainer(model, tmp_path, processing_class=tokenizer)
    own = model.base_model.state_dict()
    for part in (run.model.context_encoder, run.model.target_encoder):
        assert all(value.equal(own[name]) for name, value in part.state_dict().items())
    assert run.ema_callback.pretrained == (kind != "random")
    run.train()
    assert run.state.global_step == 2
    assert model.base_model.state_dict()["embeddings.word_embeddings.weight"].equal(
        own["embeddings.word_embeddings.weight"]
    )


def test_the_pooler_of_an_encoder_is_exported(tmp_path: Path) -> None:
    """As that of a start by name: it is not trained, and the same weights are in both encoders and in the export."""
    model = AutoModel.from_config(tiny_config("bert"))
    weights = model.pooler.state_dict()
    run = trainer(model, tmp_path, processing_class=tiny_tokenizer("bert"))
    assert not any(parameter.requires_grad for parameter in run.model.context_encoder.pooler.parameters())
    run.train()
    run.save_model()
    for encoder in (run.model.target_encoder, AutoModel.from_pretrained(tmp_path)):
        assert all(value.equal(weights[name]) for name, value in encoder.pooler.state_dict().items())
    again = trainer(AutoModel.from_pretrained(tmp_path), tmp_path / "again")
    assert again.model.config.add_pooling_layer


def test_something_else_is_no_model(encoder: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="model must be a transformers model or a name, not Linear"):
        trainer(torch.nn.Linear(2, 2), tmp_path)
    with pytest.raises(UsageError, match="either model or model_init"):
        trainer(encoder, tmp_path, model_init=lambda: None)
    with pytest.raises(UsageError, match="either model or model_init"):
        trainer(None, tmp_path)


@pytest.mark.parametrize("count", [0, 1])
def test_model_init_gives_every_training_a_new_model(count: int, encoder: str, tmp_path: Path) -> None:
    """Two trainings from the same start end with the same weights."""
    trials = []

    def model_init(*trial: Any) -> PreTrainedModel:
        trials.append(trial)
        return AutoModel.from_pretrained(encoder)

    run = trainer(None, tmp_path, model_init=model_init if count else lambda: model_init())
    ends = []
    for _ in range(2):
        run.train()
        ends.append(run.model.state_dict())
    assert len(trials) == 3  # one to build the trainer with
    assert all(value.equal(ends[1][name]) for name, value in ends[0].items())
    with pytest.raises(UsageError, match="compute_objective, because a collapsed model has the lowest loss"):
        run.hyperparameter_search(n_trials=1)


def test_hyperparameter_search_starts_each_trial_anew(
    encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a backend that does what Optuna's does; the evaluation follows a trial's batch size."""

    class Backend(HyperParamSearchBackendBase):
        name = "optuna"

        @staticmethod
        def is_available() -> bool:
            return True

        def run(self, run: JepaTrainer, n_trials: int, direction: str, **kwargs: Any) -> list[float]:
            objectives = []
            for number in range(n_trials):
                run.model_wrapped = run.model = None  # released, as by the backends of transformers
                run.train(trial=SimpleNamespace(number=number, params={}))
                objectives.append(run.compute_objective(run.evaluate()))
                assert run.state.global_step == 2
                assert run.args.per_device_eval_batch_size == run.args.per_device_train_batch_size == 4
            return objectives

    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)
    monkeypatch.setitem(ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, Backend)
    run = trainer(None, tmp_path, model_init=lambda: AutoModel.from_pretrained(encoder), eval_dataset=TEXT)
    one, same, other = run.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": [1e-3, 1e-3, 1e-2][trial.number], "per_device_train_batch_size": 4},
        compute_objective=lambda metrics: metrics["eval_context_rank"],
        direction="maximize",
        backend="optuna",
        n_trials=3,
    )
    assert one == same != other


# ---- arguments


def test_plain_training_arguments_get_our_defaults(encoder: str, tmp_path: Path) -> None:
    """What is set stays; what is left at transformers' default takes ours."""
    plain = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4, use_cpu=True, lr_scheduler_type="cosine"
    )
    args = trainer(encoder, tmp_path, args=plain).args
    assert isinstance(args, JepaTrainingArguments)
    assert (args.output_dir, args.max_steps, args.use_cpu) == (str(tmp_path), 1, True)
    assert args.lr_scheduler_type == "cosine"
    assert args.per_device_eval_batch_size == 4
    assert args.include_num_input_tokens_seen == "non_padding"
    assert args.ddp_find_unused_parameters is False


def test_arguments_of_the_other_trainer_are_refused(encoder: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="must be JepaTrainingArguments, not LlmJepaTrainingArguments"):
        trainer(encoder, tmp_path, args=LlmJepaTrainingArguments(output_dir=str(tmp_path), use_cpu=True))


# ---- rows


@pytest.mark.parametrize("rows", [Texts(), Texts(as_rows=False), TextStream()], ids=["rows", "strings", "stream"])
def test_data_sets_of_torch_with_texts_are_tokenized(rows: Any, encoder: str, tmp_path: Path) -> None:
    run = trainer(encoder, tmp_path, train_dataset=rows)
    expected = tiny_tokenizer("bert")(TEXT, truncation=True, max_length=128)["input_ids"]
    assert [row["input_ids"] for row in run.train_dataset] == expected
    run.train()


@pytest.mark.parametrize("kind", ["text", "features"])
def test_a_dataframe_is_a_data_set(kind: str, encoder: str, tmp_path: Path) -> None:
    """Without its index; repeated columns are refused."""
    config = FeatureEncoderConfig(6, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=1)
    start = {"text": encoder, "features": AutoModel.from_config(config)}[kind]
    rows = {"text": TEXT, "features": [[float(row), 1.0] * 3 for row in range(16)]}[kind]
    frame = pd.DataFrame({kind: rows}, index=range(5, 5 + len(rows)))
    run = trainer(start, tmp_path, train_dataset=frame, eval_dataset={"a": frame})
    run.train()
    assert run.state.global_step == 2
    assert run.evaluate(frame)["eval_loss"] == pytest.approx(run.evaluate()["eval_a_loss"])
    with pytest.raises(UsageError, match=f"has the column '{kind}' more than once"):
        run.evaluate(pd.concat([frame, frame], axis=1))


def test_several_splits_are_refused_by_name(encoder: str, tmp_path: Path) -> None:
    part = datasets.Dataset.from_dict({"text": TEXT})
    with pytest.raises(UsageError, match=r"not a DatasetDict of 'train', 'test'\. .*data\['train'\]"):
        trainer(encoder, tmp_path, train_dataset=datasets.DatasetDict(train=part, test=part))


@pytest.mark.parametrize(
    "rows", [datasets.Dataset.from_dict({"text": [1, 2]}), [{"text": 1}, {"text": 2}]], ids=["dataset", "list"]
)
def test_texts_that_are_numbers_are_refused(rows: Any, encoder: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"A text must be a string, not int \(1\)"):
        trainer(encoder, tmp_path, train_dataset=rows)


def test_untokenized_rows_are_evaluated_and_predicted(encoder: str, tmp_path: Path) -> None:
    """In any form, with the same result; `predict` draws the masks of evaluations, whatever the epoch."""
    run = trainer(encoder, tmp_path, eval_dataset=TEXT)
    expected = run.evaluate()["eval_loss"]
    run.data_collator.epoch = 3
    assert run.evaluate(TEXT)["eval_loss"] == pytest.approx(expected)
    assert run.evaluate(Texts())["eval_loss"] == pytest.approx(expected)
    assert run.evaluate({"a": datasets.Dataset.from_dict({"text": TEXT})})["eval_a_loss"] == pytest.approx(expected)
    assert run.predict(TEXT).metrics["test_loss"] == pytest.approx(expected)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(encoder: str, tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer("bert"))
    tokenizer.add_tokens(["plums at"])
    with pytest.raises(
        UsageError, match=rf"has {len(tokenizer)} tokens, but the model only {len(tokenizer) - 1} embeddings"
    ):
        trainer(encoder, tmp_path, processing_class=tokenizer)


# ---- collators


@pytest.mark.parametrize(
    "make", [DataCollatorWithPadding, DataCollatorForLanguageModeling, lambda tokenizer: default_data_collator]
)
def test_collators_of_transformers_are_refused(make: Any, encoder: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"makes no views of a row\. Leave it out, or use DataCollatorForSpanJEPA"):
        trainer(encoder, tmp_path, data_collator=make(tiny_tokenizer("bert")))


@pytest.mark.parametrize("health_steps", [0, 1])
def test_a_collator_without_targets_is_refused_at_its_first_batch(
    health_steps: int, encoder: str, tmp_path: Path
) -> None:
    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([row["input_ids"][:4] for row in rows])}

    args = arguments(tmp_path, max_steps=1, health_steps=health_steps)
    rows = [{"input_ids": tiny_tokenizer("bert")(text)["input_ids"]} for text in TEXT]
    run = trainer(encoder, tmp_path, args=args, data_collator=collate, train_dataset=rows, eval_dataset=rows)
    for start in (run.train, run.evaluate):
        with pytest.raises(UsageError, match=r"must make target_positions, target_valid, but .* no target_positions"):
            start()


def test_a_collator_of_the_user_reads_texts_itself(encoder: str, tmp_path: Path) -> None:
    """With `remove_unused_columns=False`, also where health is measured."""
    tokenizer = tiny_tokenizer("bert")
    collate = DataCollatorForSpanJEPA(tokenizer, masked_tokens="mask_token")

    def tokenize_and_collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return collate([{"input_ids": tokenizer(row["text"])["input_ids"]} for row in rows])

    args = arguments(tmp_path, max_steps=2, health_steps=1, remove_unused_columns=False)
    rows = datasets.Dataset.from_dict({"text": TEXT})
    run = trainer(encoder, tmp_path, args=args, data_collator=tokenize_and_collate, train_dataset=rows)
    run.train()
    assert any("health_prediction_loss" in entry for entry in run.state.log_history)
