"""LLM-JEPA training is exact under accumulation and resume, and its result is a plain language model."""

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    TrainingArguments,
    default_data_collator,
)

from helpers.llm import conversations, model, tokenizer, trainer
from helpers.runs import StopAfter, largest_difference, weights
from jepa_hf import JepaTrainingArguments, UsageError
from jepa_hf.hub.model_card import DatasetInfo
from jepa_hf.llm_jepa import LlmJepaTrainer, LlmJepaTrainingArguments, PairedViewTokenizer
from jepa_hf.llm_jepa.decoder import get_decoder
from jepa_hf.llm_jepa.losses import pair_distance
from jepa_hf.llm_jepa.objective import _draws_of_rows
from jepa_hf.llm_jepa.row_tokenization import tokenize_dataset
from jepa_hf.llm_jepa.teacher import TEACHER_FILE
from jepa_hf.monitoring.assessment import Severity
from jepa_hf.training.metric_accumulator import MetricAccumulator

torch.set_num_threads(1)


def trained(folder: Path, **settings: Any) -> LlmJepaTrainer:
    run = trainer(folder, **settings)
    run.train()
    return run


def logged(run: LlmJepaTrainer, name: str) -> list[float]:
    return [entry[name] for entry in run.state.log_history if name in entry]


def test_batch_layouts_give_the_same_run(tmp_path: Path) -> None:
    """Packed, separate, left-padded and accumulated batches give the same updates, for answers of different lengths."""
    reference = weights(trained(tmp_path / "packed").model)
    others = {
        "separate": {"view_passes": "separate"},
        "left": {"padding_side": "left"},
        "micro": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    }
    for name, settings in others.items():
        assert largest_difference(weights(trained(tmp_path / name, **settings).model), reference) < 1e-5, name


def test_gradient_scale_under_accumulation(tmp_path: Path) -> None:
    """Without views (loss dropout 1) a run is plain fine-tuning for any number of micro-batches."""
    settings = {"loss_dropout": 1.0, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
    full = trained(tmp_path / "full", **settings)
    parts = trained(tmp_path / "parts", per_device_train_batch_size=1, gradient_accumulation_steps=4, **settings)
    assert largest_difference(weights(parts.model), weights(full.model)) < 1e-6
    assert logged(full, "pair_loss") == []
    weighted = trained(tmp_path / "weighted", **{**settings, "loss_dropout": 0.0, "jepa_weight": 0.0})
    assert largest_difference(weights(weighted.model), weights(full.model)) < 1e-6


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_gradient": "ema", "ema_decay": 0.5},
        {"loss_dropout": 0.5, "stp_weight": 0.1},
        {"stp_weight": 0.1, "stp_variant": "patch", "target_gradient": "stop"},
    ],
    ids=["default", "teacher", "loss dropout and paths", "patches"],
)
def test_resume_is_exact(settings: dict[str, Any], tmp_path: Path) -> None:
    """A resumed run equals an uninterrupted one bit for bit: model, teacher, loss dropout, paths."""
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, **settings}
    full = trained(tmp_path / "full", **settings)
    first = trainer(tmp_path / "cut", **settings)
    first.add_callback(StopAfter(2))
    first.train()
    second = trainer(tmp_path / "cut", seed=5, **settings)
    second.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    assert largest_difference(weights(second.model), weights(full.model)) == 0.0
    if full.objective.teacher is not None:
        teachers = [weights(run.objective.teacher) for run in (second, full)]
        assert largest_difference(*teachers) == 0.0


def test_tables_are_read_as_lists_of_rows_are(tmp_path: Path) -> None:
    """Rows of a DataFrame, also of several by name, and of a `DatasetDict`; in the constructor and in `evaluate`."""
    rows = conversations(6)
    frame = pd.DataFrame(rows, index=range(5, 11))
    reference = trainer(tmp_path)
    expected = list(reference.tokenize_rows(rows))
    data = datasets.Dataset.from_list(rows)
    run = LlmJepaTrainer(
        reference.model,
        reference.args,
        train_dataset=frame,
        eval_dataset=datasets.DatasetDict(first=data, second=data),
        view_tokenizer=reference.view_tokenizer,
    )
    assert list(run.train_dataset) == expected
    assert [list(part) for part in run.eval_dataset.values()] == [expected, expected]
    assert list(run.tokenize_rows({"one": frame})["one"]) == expected
    losses = [reference.evaluate(rows_of)["eval_loss"] for rows_of in (rows, frame, data)]
    assert losses[0] == losses[1] == losses[2]
    with pytest.raises(UsageError, match=r"train_dataset must be one data set, not a DatasetDict"):
        LlmJepaTrainer(reference.model, reference.args, train_dataset=datasets.DatasetDict(train=data))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.slow
def test_stream_resume_is_exact(accumulation: int, workers: int, tmp_path: Path) -> None:
    """Bit for bit, from inside a pass, its end and later ones; five batches do not fill updates of two."""
    settings = {
        "target_gradient": "ema",
        "ema_decay": 0.5,
        "loss_dropout": 0.3,
        "max_steps": 12,
        "save_strategy": "steps",
        "save_steps": 1,
        "gradient_accumulation_steps": accumulation,
        "dataloader_num_workers": workers,
    }

    def streamed(folder: Path, **changed: Any) -> LlmJepaTrainer:
        run = trainer(folder, rows=20, **settings, **changed)
        stream = datasets.Dataset.from_list(conversations(20)).to_iterable_dataset().shuffle(seed=1, buffer_size=8)
        arguments = {"processing_class": run.processing_class, "view_tokenizer": run.view_tokenizer}
        return LlmJepaTrainer(run.model, run.args, train_dataset=stream, **arguments)

    full = streamed(tmp_path / "full")
    full.train()
    for step in (3, 5, 7, 11):
        run = streamed(tmp_path / "resumed", seed=5)
        run.train(resume_from_checkpoint=str(tmp_path / "full" / f"checkpoint-{step}"))
        assert largest_difference(weights(run.model), weights(full.model)) == 0.0
        assert largest_difference(weights(run.objective.teacher), weights(full.objective.teacher)) == 0.0
        assert logged(run, "loss") == logged(full, "loss")
        assert logged(run, "epoch") == logged(full, "epoch")


def test_teacher_is_the_ema(tmp_path: Path) -> None:
    """Two steps at decay 0.5 give weights of 1/4, 1/4 and 1/2; the teacher has no gradients."""
    run = trainer(tmp_path, target_gradient="ema", ema_decay=0.5, max_steps=2)
    seen = [weights(get_decoder(run.model))]

    class Keep(StopAfter):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(weights(get_decoder(run.model)))

    run.add_callback(Keep(99))
    run.train()
    expected = {name: 0.25 * seen[0][name] + 0.25 * seen[1][name] + 0.5 * seen[2][name] for name in seen[0]}
    assert largest_difference(weights(run.objective.teacher), expected) < 1e-6
    assert all(parameter.grad is None for parameter in run.objective.teacher.parameters())


def test_two_trainers_of_one_model(tmp_path: Path) -> None:
    """Each trainer computes its own objective, in any order of use."""
    first = trainer(tmp_path / "first", jepa_weight=0.0)
    args = replace(first.args, output_dir=str(tmp_path / "second"), jepa_weight=5.0)
    rows = {"train_dataset": first.train_dataset, "eval_dataset": first.eval_dataset}
    second = LlmJepaTrainer(first.model, args, processing_class=first.processing_class, **rows)
    for run, weight in ((first, 0.0), (second, 5.0), (first, 0.0)):
        actual = run.evaluate()
        expected = actual["eval_lm_loss"] + weight * actual["eval_pair_loss"]
        assert actual["eval_loss"] == pytest.approx(expected, rel=1e-3)
        run.train()
        entry = next(entry for entry in run.state.log_history if "loss" in entry)
        assert entry["loss"] == pytest.approx(entry["lm_loss"] + weight * entry["pair_loss"], rel=1e-3)


def test_teacher_copy_has_no_objective(tmp_path: Path) -> None:
    """A second trainer's teacher has no hooks and no parameters of the first trainer."""
    first = trainer(tmp_path, target_gradient="ema")
    second = LlmJepaTrainer(first.model, first.args, processing_class=first.processing_class)
    parts = list(second.objective.teacher.modules())
    assert not [hook for part in parts for hook in (*part._forward_hooks, *part._forward_pre_hooks)]
    assert not set(second.objective.teacher.parameters()) & set(first.model.parameters())


def test_loss_dropout_rate_and_agreement(tmp_path: Path) -> None:
    """Updates skip the views at the given rate; the draw does not depend on the rank's generator."""
    run = trainer(tmp_path, loss_dropout=0.75)
    draws = []
    for step in range(400):
        run.state.global_step = step
        draws.append(run._drops_views_this_step())
    assert 0.68 < sum(draws) / len(draws) < 0.82
    torch.manual_seed(123)  # another rank's generator
    run.state.global_step = 7
    assert run._drops_views_this_step() == draws[7]


def test_all_weights_are_trained(tmp_path: Path) -> None:
    """Every weight changes, with the predictor tokens' embeddings."""
    run = trainer(tmp_path, predictors=2)
    before = weights(run.model)
    run.train()
    after = weights(run.model)
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    row = run.processing_class.convert_tokens_to_ids("<|predictor_1|>")
    name = "model.embed_tokens.weight"
    assert not torch.equal(before[name][row], after[name][row])


def test_final_model_is_plain(tmp_path: Path) -> None:
    """The output directory holds a plain causal language model and no pickles."""
    run = trained(tmp_path / "out")
    run.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    words = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert largest_difference(weights(loaded), weights(run.model)) == 0.0
    prompt = words.apply_chat_template(
        conversations(1)[0]["messages"][:2], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert loaded.generate(prompt["input_ids"], max_new_tokens=3).shape[1] > prompt["input_ids"].shape[1]
    assert not [path for path in (tmp_path / "out").rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]


def test_evaluation_metrics(tmp_path: Path) -> None:
    """An evaluation reports both losses, the view metrics and the answers."""
    run = trainer(tmp_path)
    run.generation_examples, run.max_new_tokens = conversations(3), 4
    metrics = run.evaluate()
    for name in (
        "loss",
        "lm_loss",
        "pair_loss",
        "view_cosine",
        "view_norm",
        "view_rank",
        "view_pairwise_cosine",
        "view_top1_accuracy",
        "exact_match",
        "prefix_match",
    ):
        assert f"eval_{name}" in metrics, name
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_lm_loss"] + metrics["eval_pair_loss"], rel=1e-4)


@pytest.mark.parametrize("settings", [{"pair_loss": "infonce"}, {"stp_weight": 1.0}], ids=["infonce", "paths"])
def test_evaluation_ignores_batch_size(settings: dict[str, Any], tmp_path: Path) -> None:
    """Metrics do not depend on the batches, unless the loss compares rows: then training's batch size is used."""
    actual = {}
    for size in (None, 2, 8, 20):
        metrics = trainer(tmp_path, per_device_eval_batch_size=size, **settings).evaluate()
        timing = ("runtime", "per_second", "preparation_time")
        actual[size] = {name: value for name, value in metrics.items() if not name.endswith(timing)}
    for metrics in actual.values():
        assert metrics == pytest.approx(actual[None], rel=1e-5)


@pytest.mark.parametrize("form", ["triple", "patch"])
def test_evaluation_is_repeatable(form: str, tmp_path: Path) -> None:
    """Two evaluations give the same numbers, and training continues as without them."""
    settings = {"stp_weight": 1.0, "stp_variant": form}
    plain = trained(tmp_path / "plain", **settings)
    evaluated = trained(tmp_path / "evaluated", eval_strategy="steps", eval_steps=1, **settings)
    assert largest_difference(weights(evaluated.model), weights(plain.model)) == 0.0
    state = torch.random.get_rng_state()
    one, other = (evaluated.evaluate() for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    for name in ("eval_loss", "eval_stp_loss", "eval_pair_loss", "eval_lm_loss"):
        assert one[name] == other[name], name


def test_evaluation_paths_depend_on_the_row_only() -> None:
    """The draws do not depend on batch or padding, and spread over [0, 1)."""
    ids = torch.randint(1, 50_000, (2000, 12), generator=torch.Generator().manual_seed(0))
    real = torch.ones_like(ids)
    draws = _draws_of_rows(ids, real)
    padded = [torch.cat([torch.full((2000, 3), value), part], dim=1) for value, part in ((7, ids), (0, real))]
    assert torch.equal(draws[5:9], _draws_of_rows(*padded)[5:9])
    assert draws.min() >= 0
    assert draws.max() < 1
    torch.testing.assert_close(draws.mean(dim=0), torch.full((3,), 0.5), atol=0.03, rtol=0)
    torch.testing.assert_close(torch.corrcoef(draws.T), torch.eye(3), atol=0.1, rtol=0)


def test_best_checkpoint_loads_its_teacher(tmp_path: Path) -> None:
    """Loading the best model also loads the teacher of its checkpoint."""
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "lm_loss", "greater_is_better": True}
    run = trained(tmp_path, target_gradient="ema", ema_decay=0.5, max_steps=3, learning_rate=1e-2, **settings)
    best = Path(run.state.best_model_checkpoint)
    assert best.name == "checkpoint-1"
    expected = load_file(best / TEACHER_FILE)
    assert largest_difference(weights(run.objective.teacher), expected) == 0.0
    last = load_file(tmp_path / "checkpoint-3" / TEACHER_FILE)
    assert largest_difference(last, expected) > 0.0


def test_untokenized_rows_are_accepted_everywhere(tmp_path: Path) -> None:
    """The constructor, evaluations, named evaluation sets and predictions tokenize rows."""
    run = trainer(tmp_path)
    expected = run.evaluate()["eval_loss"]
    samples = conversations(6)
    assert run.evaluate(samples)["eval_loss"] == expected
    assert run.predict(samples).metrics["test_loss"] == expected
    named = LlmJepaTrainer(
        run.model, run.args, eval_dataset={"some": samples, "all": samples}, view_tokenizer=run.view_tokenizer
    )
    assert named.evaluate()["eval_all_loss"] == expected
    assert named.evaluate("some")["eval_loss"] == expected


def test_streams_are_tokenized_during_iteration(tmp_path: Path) -> None:
    """An endless stream trains on its first rows; a finite one is evaluated on."""
    first, losses = conversations(8), []
    for name, rows in (
        ("stream", datasets.IterableDataset.from_generator(lambda: itertools.cycle(conversations(8)))),
        ("list", first),
    ):
        torch.manual_seed(0)  # the predictor token's row is random
        words = tokenizer()
        args = LlmJepaTrainingArguments(
            str(tmp_path / name),
            max_steps=3,
            per_device_train_batch_size=4,
            train_sampling_strategy="sequential",
            logging_steps=1,
            use_cpu=True,
            report_to="none",
        )
        held_out = datasets.Dataset.from_list(first).to_iterable_dataset() if name == "stream" else first
        run = LlmJepaTrainer(model(len(words)), args, train_dataset=rows, eval_dataset=held_out, processing_class=words)
        run.train()
        losses.append([*logged(run, "loss"), run.evaluate()["eval_pair_loss"]])
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"train_dataset": datasets.DatasetDict(train=datasets.Dataset.from_list(conversations(2)))}, "['train']"),
        ({"train_dataset": "rows.jsonl"}, "train_dataset is the name 'rows.jsonl'. Pass rows"),
        ({"train_dataset": ["class"] * 4}, "row 1 is a str, not a dictionary of columns"),
        ({"model": "gone/nowhere"}, "neither a local directory nor a model on the Hub"),
        ({"model": None, "model_init": model, "peft_config": object()}, "model_init does not go with peft_config"),
    ],
)
def test_unusable_arguments_are_refused(arguments: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    """Each is a usage error with its remedy."""
    run = trainer(tmp_path)
    usual = {"model": run.model, "args": run.args, "processing_class": run.processing_class}
    with pytest.raises(UsageError, match=re.escape(sentence)):
        LlmJepaTrainer(
            **(usual | {"train_dataset": conversations(2), "view_tokenizer": run.view_tokenizer} | arguments)
        )


@pytest.mark.parametrize("collator", [DataCollatorWithPadding, DataCollatorForLanguageModeling, default_data_collator])
def test_other_collators_are_refused(collator: Any, tmp_path: Path) -> None:
    """Collators of plain rows are a usage error before the first step."""
    run = trainer(tmp_path)
    if collator is not default_data_collator:
        settings = {"mlm": False} if collator is DataCollatorForLanguageModeling else {}
        collator = collator(run.processing_class, **settings)
    arguments = {"processing_class": run.processing_class, "train_dataset": run.train_dataset}
    with pytest.raises(UsageError, match="Leave it out, or use DataCollatorForPairedViews"):
        LlmJepaTrainer(run.model, run.args, collator, **arguments).train()


class TorchRows(torch.utils.data.Dataset):
    """A torch data set of conversations, without an end of its own."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict[str, Any]:
        return conversations(6)[index % 6]


def test_data_sets_of_every_kind(tmp_path: Path) -> None:
    """Lists, `datasets` and torch data sets give the same evaluation, a `DatasetDict` one for each split."""
    run = trainer(tmp_path)
    expected = run.evaluate(conversations(6))["eval_loss"]
    stored = datasets.Dataset.from_list(conversations(6))
    for rows in (stored, TorchRows()):
        assert run.evaluate(rows)["eval_loss"] == expected
        assert run.predict(rows).metrics["test_loss"] == expected
    assert run.evaluate(datasets.DatasetDict(test=stored))["eval_test_loss"] == expected


def test_rows_without_labels_are_refused(tmp_path: Path) -> None:
    """A run that would learn from nothing does not start."""
    run = trainer(tmp_path)
    for row in run.train_dataset:
        row["labels"] = [row["labels"][0], *[-100] * (len(row["labels"]) - 1)]
    with pytest.raises(UsageError, match="No training row has a label"):
        run.train()


def test_evaluation_loss_is_a_mean_over_tokens_and_rows(tmp_path: Path) -> None:
    """It is the sum over all tokens and pairs, recomputed here row by row, for answers of different lengths."""
    run = trainer(tmp_path, stp_weight=0.5, per_device_eval_batch_size=4, lm_weight=0.7, jepa_weight=2.0)
    rows = run.eval_dataset
    sums = torch.zeros(3)
    run.model.eval()
    for row in rows:
        with torch.no_grad():
            output = run.model(**run.data_collator([row]))
        sums += torch.stack([output.lm_loss * output.num_labels, output.pair_loss, output.stp_loss])
    labels = sum(label != -100 for row in rows for label in row["labels"][1:])
    expected = 0.7 * sums[0] / labels + 2.0 * sums[1] / len(rows) + 0.5 * sums[2] / len(rows)
    assert run.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_router_loss_is_logged_apart(tmp_path: Path) -> None:
    """A mixture of experts logs its router's loss next to the next-token loss; accumulation does not multiply it."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "num_local_experts": 4, "pad_token_id": 0}
    runs = []
    for size, accumulation in ((4, 1), (1, 4)):
        words = tokenizer()
        torch.manual_seed(0)
        config = MixtralConfig(
            vocab_size=len(words), output_router_logits=True, router_aux_loss_coef=10.0, eos_token_id=None, **sizes
        )
        args = plain_arguments(
            tmp_path, max_steps=1, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation
        )
        rows = conversations(4)
        run = LlmJepaTrainer(
            MixtralForCausalLM(config), args, train_dataset=rows, eval_dataset=rows, processing_class=words
        )
        metrics = run.evaluate()
        assert metrics["eval_lm_loss"] < 10 < metrics["eval_router_loss"]
        parts = sum(metrics[f"eval_{name}"] for name in ("lm_loss", "router_loss", "pair_loss"))
        assert metrics["eval_loss"] == pytest.approx(parts, rel=1e-5)
        run.train()
        runs.append(next(entry for entry in run.state.log_history if "loss" in entry))
    for name in ("loss", "lm_loss", "router_loss"):
        assert runs[0][name] == pytest.approx(runs[1][name], rel=0.05), name


def test_collapsed_views_are_reported(tmp_path: Path) -> None:
    """A finding since the step from which they stay collapsed; verdict and card advise infonce."""
    run = trainer(tmp_path, logging_steps=1)
    cosines = [0.995, 0.5, 0.991, 0.999]
    run.state.log_history = [{"step": step, "view_pairwise_cosine": c} for step, c in enumerate(cosines, 1)]
    run.state.global_step = run.state.max_steps = len(cosines)
    ((step, sentence),) = run.health_findings.values()
    assert step == 3
    assert "mean cosine of 0.9990" in sentence
    assert run.verdict().severity == Severity.COLLAPSED
    assert run.verdict().lines[1] == "Next: set --pair_loss infonce, or lower --jepa_weight."
    run.create_model_card()
    assert "**Not healthy.** Step 3: the views collapsed" in (tmp_path / "README.md").read_text()
    run.state.log_history.append({"step": 4, "eval_b_view_pairwise_cosine": 0.2})
    assert run.health_findings == {}
    run.state.log_history.pop()
    run.args.loss_dropout = 1.0  # plain fine-tuning
    assert run.health_findings == {}


def test_training_measures_its_views(tmp_path: Path) -> None:
    """Without an evaluation the training's own batches show a collapse."""
    run = trained(tmp_path)
    assert len(logged(run, "view_pairwise_cosine")) == 4


def test_streams_leave_out_overlong_rows(tmp_path: Path) -> None:
    """Those of which nothing would be left too."""
    rows = conversations(6)
    rows[1]["messages"][2]["content"] = rows[4]["messages"][1]["content"] = "name " * 80
    run = trainer(tmp_path)
    views = PairedViewTokenizer(run.processing_class, max_length=64, filter_overlong_rows=True)
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset()
    expected = tokenize_dataset([row for index, row in enumerate(rows) if index not in (1, 4)], views)
    assert [row["input_ids"] for row in tokenize_dataset(stream, views)] == [row["input_ids"] for row in expected]


def test_unusable_rows_are_refused(tmp_path: Path) -> None:
    """Untokenized rows without a tokenizer, generation rows without one, and no rows are usage errors."""
    run = trainer(tmp_path)
    arguments = {"processing_class": run.processing_class, "train_dataset": run.train_dataset}
    tokenised = LlmJepaTrainer(run.model, run.args, **arguments)
    with pytest.raises(UsageError, match="Pass view_tokenizer"):
        tokenised.evaluate(conversations(2))
    with pytest.raises(UsageError, match="generation_examples need a view_tokenizer"):
        LlmJepaTrainer(run.model, run.args, generation_examples=conversations(2), **arguments)
    for rows in (None, []):
        arguments["train_dataset"] = rows
        with pytest.raises(UsageError, match="no rows to train on"):
            LlmJepaTrainer(run.model, run.args, **arguments).train()


def test_visible_padding_is_refused_with_zero_weight(tmp_path: Path) -> None:
    """OPT sees left padding when views follow the conversation; refused even with jepa_weight 0."""
    run = trainer(tmp_path, padding_side="left")
    config = OPTConfig(
        vocab_size=len(run.processing_class), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64,
        max_position_embeddings=128, word_embed_proj_dim=32, init_std=0.3,
    )  # fmt: skip
    args = replace(run.args, jepa_weight=0.0)
    other = LlmJepaTrainer(
        OPTForCausalLM(config), args, train_dataset=run.train_dataset, processing_class=run.processing_class
    )
    for use in (other.train, lambda: other.evaluate(run.eval_dataset)):
        with pytest.raises(UsageError, match="use --view_passes separate"):
            use()


def test_view_metrics_detect_one_direction(tmp_path: Path) -> None:
    """Views in one direction keep a high rank; the pairwise cosine and the top-1 accuracy reveal them."""
    run = trainer(tmp_path)
    own = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(32, 16, generator=torch.Generator().manual_seed(1))
    metrics = {}
    for name, views in {"apart": (own, own), "one way": (100 + noise, 100 + own)}.items():
        assert pair_distance("cosine", *views).max() < 1e-3
        run._view_metrics.embeddings, means = [views], MetricAccumulator()
        run.finish_evaluation(means)
        metrics[name] = means.compute_and_reset(run.accelerator)
    assert metrics["one way"]["view_rank"] > 10
    assert metrics["apart"]["view_rank"] > 10
    assert metrics["one way"]["view_pairwise_cosine"] > 0.999 > 0.1 > abs(metrics["apart"]["view_pairwise_cosine"])
    assert metrics["one way"]["view_top1_accuracy"] < 0.2 < 1.0 == metrics["apart"]["view_top1_accuracy"]
    assert metrics["apart"]["view_top1_accuracy_chance"] == pytest.approx(1 / 32)


def test_learns_to_reverse_words(tmp_path: Path) -> None:
    """After 150 steps on 8 conversations, the greedy answers to them are correct."""
    settings = {"rows": 8, "max_steps": 150, "learning_rate": 5e-3, "logging_steps": 50}
    run = trainer(tmp_path, model={"hidden_size": 64}, **settings)
    run.generation_examples, run.max_new_tokens = conversations(8), 16
    assert run.evaluate()["eval_exact_match"] == 0.0
    run.train()
    assert run.evaluate()["eval_exact_match"] == 1.0


def test_lora_trains_predictor_embeddings(tmp_path: Path) -> None:
    """LoRA weights and predictor embeddings change; other embeddings do not."""
    from peft import LoraConfig, get_peft_model

    plain = trainer(tmp_path / "plain")
    words = plain.processing_class
    row = words.convert_tokens_to_ids("<|predictor_1|>")
    config = LoraConfig(r=4, target_modules="all-linear", trainable_token_indices={"embed_tokens": [row]})
    base = model(len(words))
    run = LlmJepaTrainer(
        get_peft_model(base, config),
        LlmJepaTrainingArguments(
            str(tmp_path / "out"), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True,
            report_to="none", disable_tqdm=True, save_strategy="no",
        ),
        train_dataset=conversations(8),
        view_tokenizer=plain.view_tokenizer,
    )  # fmt: skip
    before = run.model.get_base_model().get_input_embeddings()(torch.arange(len(words))).detach().clone()
    run.train()
    after = run.model.get_base_model().get_input_embeddings()(torch.arange(len(words))).detach()
    moved = (before != after).any(dim=1).nonzero().flatten().tolist()
    assert moved == [row]
    run.save_model()
    assert (tmp_path / "out" / "adapter_config.json").is_file()


def plain_arguments(folder: Path, **settings: Any) -> LlmJepaTrainingArguments:
    given = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_strategy": "no"}
    given |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1}
    return LlmJepaTrainingArguments(str(folder / "out"), **(given | settings))


def test_peft_config_as_in_trl(tmp_path: Path) -> None:
    """A name and a `LoraConfig` are enough: adapters and predictor embeddings are trained, saved, and loadable."""
    from peft import LoraConfig

    words = tokenizer()
    words.save_pretrained(tmp_path / "llm")
    model(len(words)).save_pretrained(tmp_path / "llm")
    config = LoraConfig(r=2, target_modules="all-linear")
    run = LlmJepaTrainer(
        str(tmp_path / "llm"), plain_arguments(tmp_path), train_dataset=conversations(8), peft_config=config
    )
    run.train()
    names = [name for name, value in run.model.named_parameters() if value.requires_grad]
    assert sum("trainable_tokens" in name for name in names) == 1
    assert all("lora_" in name or "trainable_tokens" in name for name in names)
    assert config.trainable_token_indices is None  # the user's object is as it was
    run.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == len(loaded.get_input_embeddings().weight)
    with pytest.raises(UsageError, match="has adapters already"):
        LlmJepaTrainer(run.model, run.args, processing_class=run.processing_class, peft_config=config)


def test_adapters_without_predictor_token_are_refused(tmp_path: Path) -> None:
    """Its embedding would not be trained, and `from_pretrained` would find another embedding size."""
    from peft import LoraConfig, get_peft_model

    words = tokenizer()
    adapted = get_peft_model(model(len(words)), LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(UsageError, match="call add_predictor_tokens"):
        LlmJepaTrainer(adapted, trainer(tmp_path).args, train_dataset=conversations(2), processing_class=words)


def test_frozen_model_is_refused(tmp_path: Path) -> None:
    """A model without trainable parameters is refused, for example after merging its adapters."""
    run = trainer(tmp_path)
    run.model.requires_grad_(False)
    with pytest.raises(UsageError, match="Nothing of the model is trained"):
        run.train()


def test_model_card_is_valid(tmp_path: Path) -> None:
    """The Hub's client reads the card; names of data cannot become markup."""
    run = trainer(tmp_path / "out", stp_weight=0.1)
    run.evaluate()
    run.create_model_card(data=DatasetInfo(train="<b>pairs</b> | x.jsonl"))
    text = (tmp_path / "out" / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.pipeline_tag == "text-generation"
    assert "llm-jepa" in card.data.tags
    assert "<b>" not in text
    assert "2509.14252" in text
    assert "2602.22617" in text
    assert "| next token 1.0, views 1.0 (cosine) |" in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"pair_loss": "cosin"}, "pair_loss must be one of cosine, l2, mse, infonce"),
        ({"target_gradient": "half"}, "target_gradient must be one of"),
        ({"loss_dropout": 1.5}, "loss_dropout must be between 0 and 1"),
        ({"jepa_weight": -1.0}, "jepa_weight must not be negative"),
        ({"infonce_temperature": 0.0}, "infonce_temperature must be above 0"),
        ({"use_liger_kernel": True}, "use only its other kernels"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is for a loss that Trainer computes"),
    ],
)
def test_invalid_settings_are_refused(settings: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    """Each invalid setting is a usage error."""
    with pytest.raises(UsageError, match=sentence):
        trainer(tmp_path, **settings)


@pytest.mark.parametrize("name", ["compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"])
def test_unused_functions_are_refused(name: str, tmp_path: Path) -> None:
    """Functions that the trainer would never call are usage errors."""
    run = trainer(tmp_path)
    with pytest.raises(UsageError, match=f"{name} would not be called"):
        LlmJepaTrainer(run.model, run.args, processing_class=run.processing_class, **{name: print})


def test_other_liger_kernels_are_allowed(tmp_path: Path) -> None:
    """Liger without its fused loss is accepted."""
    config = {"fused_linear_cross_entropy": False}
    assert LlmJepaTrainingArguments(str(tmp_path), use_liger_kernel=True, liger_kernel_config=config).use_liger_kernel


def test_encoder_is_refused(tmp_path: Path) -> None:
    """A model without a causal language-model head is a usage error."""
    encoder = BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64))
    with pytest.raises(UsageError, match="BertModel is not a causal language model"):
        LlmJepaTrainer(encoder, LlmJepaTrainingArguments(str(tmp_path)), processing_class=tokenizer())


@pytest.mark.slow
def test_torch_compile_has_no_graph_breaks(tmp_path: Path) -> None:
    """Head on labelled positions, views and paths are one graph."""
    counters.clear()
    trained(tmp_path, torch_compile=True, torch_compile_backend="aot_eager", stp_weight=0.1, max_steps=1)
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]


# ---- forms in which users of `Trainer` pass things


def test_a_run_from_model_init_and_plain_arguments(tmp_path: Path) -> None:
    """Each training starts from a new model of the tokenizer's size, with the objective attached."""
    words = tokenizer()
    size = len(words)
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, use_cpu=True, learning_rate=1e-3
    )
    run = LlmJepaTrainer(
        args=args, model_init=lambda: model(size), processing_class=words, train_dataset=conversations(8)
    )
    assert isinstance(run.args, LlmJepaTrainingArguments)
    assert run.args.learning_rate == 1e-3
    for _ in range(2):
        run.train()
        assert logged(run, "view_cosine") == [] or run.state.global_step == 2
        assert run.model.get_input_embeddings().num_embeddings == len(words)
    assert run.evaluate(conversations(4))["eval_loss"] > 0
    assert run.predict(conversations(4)).metrics["test_loss"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_dataset": datasets.DatasetDict(a=datasets.Dataset.from_list(conversations(2)))}, "not a DatasetDict"),
        ({"data_collator": default_data_collator}, "or use DataCollatorForPairedViews"),
        ({"args": JepaTrainingArguments(use_cpu=True)}, "args must be LlmJepaTrainingArguments"),
        ({"train_dataset": []}, "no rows to train on"),
        ({"model_init": lambda: None}, "either model or model_init"),
    ],
)
def test_what_cannot_train_is_refused(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    words = tokenizer()
    given = {"args": LlmJepaTrainingArguments(output_dir=str(tmp_path), use_cpu=True, max_steps=1)}
    given |= {"train_dataset": conversations(4), "processing_class": words}
    with pytest.raises(UsageError, match=message):
        LlmJepaTrainer(model(len(words)), **(given | arguments)).train()


@pytest.mark.parametrize("settings", [{}, {"stp_weight": 0.1}])
def test_the_metrics_that_are_checked_are_those_of_an_evaluation(settings: dict[str, float], tmp_path: Path) -> None:
    run = trainer(tmp_path, **settings)
    names = {name.removeprefix("eval_") for name in run.evaluate()}
    assert (
        names
        - {"runtime", "samples_per_second", "steps_per_second", "epoch", "num_input_tokens_seen"}
        - {"model_preparation_time"}
        == run.evaluation_metrics()
    )
    metric = {"metric_for_best_model": "exact_match", "eval_strategy": "steps", "eval_steps": 1}
    with pytest.raises(UsageError, match="'exact_match' is not measured"):
        trainer(tmp_path, **metric).train()
