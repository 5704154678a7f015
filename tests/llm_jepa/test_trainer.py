"""LLM-JEPA through the real trainer: exact under accumulation and resume, a plain language model at its end."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel, OPTConfig, OPTForCausalLM

from helpers.llm import conversations, model, tokenizer, trainer
from helpers.runs import StopAfter, largest_difference, weights
from jepa_hf import UsageError
from jepa_hf.hub.model_card import DataNames
from jepa_hf.llm_jepa import LlmJepaTrainer, LlmJepaTrainingArguments
from jepa_hf.llm_jepa.losses import pair_distance
from jepa_hf.llm_jepa.objective import _draws_of_rows, decoder_of
from jepa_hf.llm_jepa.trainer import TEACHER_FILE
from jepa_hf.training.metric_accumulator import RunningMeans

torch.set_num_threads(1)


def trained(folder: Path, **settings: Any) -> LlmJepaTrainer:
    made = trainer(folder, **settings)
    made.train()
    return made


def logged(made: LlmJepaTrainer, name: str) -> list[float]:
    return [entry[name] for entry in made.state.log_history if name in entry]


def test_packed_separate_left_and_in_micro_batches_it_is_the_same_run(tmp_path: Path) -> None:
    """Four ways to make the same update; the rows' answers differ in length."""
    reference = weights(trained(tmp_path / "packed").model)
    others = {
        "separate": {"view_passes": "separate"},
        "left": {"padding_side": "left"},
        "micro": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    }
    for name, settings in others.items():
        assert largest_difference(weights(trained(tmp_path / name, **settings).model), reference) < 1e-5, name


def test_both_arms_have_the_same_gradient_scale_under_accumulation(tmp_path: Path) -> None:
    """Without the views (a loss dropout of 1) it is plain fine-tuning, whatever the micro-batches."""
    settings = {"loss_dropout": 1.0, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
    whole = trained(tmp_path / "whole", **settings)
    parts = trained(tmp_path / "parts", per_device_train_batch_size=1, gradient_accumulation_steps=4, **settings)
    assert largest_difference(weights(parts.model), weights(whole.model)) < 1e-6
    assert logged(whole, "pair_loss") == []
    weighted = trained(tmp_path / "weighted", **{**settings, "loss_dropout": 0.0, "pair_weight": 0.0})
    assert largest_difference(weights(weighted.model), weights(whole.model)) < 1e-6


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_gradient": "ema", "ema_decay": 0.5},
        {"loss_dropout": 0.5, "tube_weight": 0.1},
        {"tube_weight": 0.1, "tube_form": "patch", "target_gradient": "stop"},
    ],
    ids=["default", "teacher", "loss dropout and paths", "patches"],
)
def test_an_interrupted_run_goes_on_exactly(settings: dict[str, Any], tmp_path: Path) -> None:
    """Bit for bit: model, teacher, the draws of loss dropout and of paths."""
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, **settings}
    whole = trained(tmp_path / "whole", **settings)
    first = trainer(tmp_path / "cut", **settings)
    first.add_callback(StopAfter(2))
    first.train()
    second = trainer(tmp_path / "cut", seed=5, **settings)
    second.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    assert largest_difference(weights(second.model), weights(whole.model)) == 0.0
    if whole.objective.teacher is not None:
        teachers = [weights(run.objective.teacher) for run in (second, whole)]
        assert largest_difference(*teachers) == 0.0


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_streamed_run_resumes_exactly_in_any_pass(accumulation: int, workers: int, tmp_path: Path) -> None:
    """Bit for bit from inside a pass, its end, and later ones; a pass of five batches ends within an update of two."""
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
        made = trainer(folder, rows=20, **settings, **changed)
        stream = datasets.Dataset.from_list(conversations(20)).to_iterable_dataset().shuffle(seed=1, buffer_size=8)
        given = {"processing_class": made.processing_class, "view_tokenizer": made.view_tokenizer}
        return LlmJepaTrainer(made.model, made.args, train_dataset=stream, **given)

    whole = streamed(tmp_path / "whole")
    whole.train()
    for step in (3, 5, 7, 11):
        run = streamed(tmp_path / "resumed", seed=5)
        run.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert largest_difference(weights(run.model), weights(whole.model)) == 0.0
        assert largest_difference(weights(run.objective.teacher), weights(whole.objective.teacher)) == 0.0
        assert logged(run, "loss") == logged(whole, "loss")
        assert logged(run, "epoch") == logged(whole, "epoch")


def test_the_teacher_is_the_average_of_what_is_trained(tmp_path: Path) -> None:
    """Two steps at 0.5: a quarter start, a quarter first step, a half second; and no gradient reaches it."""
    made = trainer(tmp_path, target_gradient="ema", ema_decay=0.5, max_steps=2)
    seen = [weights(decoder_of(made.model))]

    class Keep(StopAfter):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(weights(decoder_of(made.model)))

    made.add_callback(Keep(99))
    made.train()
    expected = {name: 0.25 * seen[0][name] + 0.25 * seen[1][name] + 0.5 * seen[2][name] for name in seen[0]}
    assert largest_difference(weights(made.objective.teacher), expected) < 1e-6
    assert all(parameter.grad is None for parameter in made.objective.teacher.parameters())


def test_of_two_trainers_of_a_model_each_computes_its_own_objective(tmp_path: Path) -> None:
    """In whatever order they are used."""
    first = trainer(tmp_path / "first", pair_weight=0.0)
    args = replace(first.args, output_dir=str(tmp_path / "second"), pair_weight=5.0)
    rows = {"train_dataset": first.train_dataset, "eval_dataset": first.eval_dataset}
    second = LlmJepaTrainer(first.model, args, processing_class=first.processing_class, **rows)
    for made, weight in ((first, 0.0), (second, 5.0), (first, 0.0)):
        found = made.evaluate()
        expected = found["eval_lm_loss"] + weight * found["eval_pair_loss"]
        assert found["eval_loss"] == pytest.approx(expected, rel=1e-3)
        made.train()
        entry = next(entry for entry in made.state.log_history if "loss" in entry)
        assert entry["loss"] == pytest.approx(entry["lm_loss"] + weight * entry["pair_loss"], rel=1e-3)


def test_a_teacher_of_a_model_that_had_one_is_a_decoder_alone(tmp_path: Path) -> None:
    """Without the first trainer's objective, its teacher and a copy of the whole model."""
    first = trainer(tmp_path, target_gradient="ema")
    second = LlmJepaTrainer(first.model, first.args, processing_class=first.processing_class)
    parts = list(second.objective.teacher.modules())
    assert not [hook for part in parts for hook in (*part._forward_hooks, *part._forward_pre_hooks)]
    assert not set(second.objective.teacher.parameters()) & set(first.model.parameters())


def test_loss_dropout_leaves_views_out_at_its_rate_and_alike_on_every_rank(tmp_path: Path) -> None:
    made = trainer(tmp_path, loss_dropout=0.75)
    draws = []
    for step in range(400):
        made.state.global_step = step
        draws.append(made._leaves_views_out())
    assert 0.68 < sum(draws) / len(draws) < 0.82
    torch.manual_seed(123)  # another rank's generator
    made.state.global_step = 7
    assert made._leaves_views_out() == draws[7]


def test_every_trained_weight_moves_and_the_predictor_rows_too(tmp_path: Path) -> None:
    made = trainer(tmp_path, predictors=2)
    before = weights(made.model)
    made.train()
    after = weights(made.model)
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    row = made.processing_class.convert_tokens_to_ids("<|predictor_1|>")
    name = "model.embed_tokens.weight"
    assert not torch.equal(before[name][row], after[name][row])


def test_its_end_is_a_plain_language_model(tmp_path: Path) -> None:
    made = trained(tmp_path / "out")
    made.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    words = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert largest_difference(weights(loaded), weights(made.model)) == 0.0
    prompt = words.apply_chat_template(
        conversations(1)[0]["messages"][:2], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert loaded.generate(prompt["input_ids"], max_new_tokens=3).shape[1] > prompt["input_ids"].shape[1]
    assert not [path for path in (tmp_path / "out").rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]


def test_an_evaluation_tells_of_both_losses_the_rank_of_the_views_and_the_answers(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    made.generation_rows, made.max_new_tokens = conversations(3), 4
    metrics = made.evaluate()
    for name in (
        "loss",
        "lm_loss",
        "pair_loss",
        "view_cosine",
        "view_norm",
        "view_rank",
        "view_pairwise_cosine",
        "view_hit_rate",
        "exact_match",
        "prefix_match",
    ):
        assert f"eval_{name}" in metrics, name
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_lm_loss"] + metrics["eval_pair_loss"], rel=1e-4)


@pytest.mark.parametrize("settings", [{"pair_loss": "infonce"}, {"tube_weight": 1.0}], ids=["infonce", "paths"])
def test_an_evaluation_does_not_depend_on_its_batch_size(settings: dict[str, Any], tmp_path: Path) -> None:
    """Nor on which rows share a batch, unless they are compared, as many as in training."""
    found = {}
    for size in (None, 2, 8, 20):
        metrics = trainer(tmp_path, per_device_eval_batch_size=size, **settings).evaluate()
        timing = ("runtime", "per_second", "preparation_time")
        found[size] = {name: value for name, value in metrics.items() if not name.endswith(timing)}
    for metrics in found.values():
        assert metrics == pytest.approx(found[None], rel=1e-5)


@pytest.mark.parametrize("form", ["triple", "patch"])
def test_an_evaluation_changes_nothing_and_repeats_itself(form: str, tmp_path: Path) -> None:
    """Paths of an evaluation are its rows' own: twice the same numbers, and training goes on as without it."""
    settings = {"tube_weight": 1.0, "tube_form": form}
    plain = trained(tmp_path / "plain", **settings)
    evaluated = trained(tmp_path / "evaluated", eval_strategy="steps", eval_steps=1, **settings)
    assert largest_difference(weights(evaluated.model), weights(plain.model)) == 0.0
    state = torch.random.get_rng_state()
    one, other = (evaluated.evaluate() for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    for name in ("eval_loss", "eval_tube_loss", "eval_pair_loss", "eval_lm_loss"):
        assert one[name] == other[name], name


def test_rows_of_an_evaluation_draw_paths_of_their_own() -> None:
    """Whatever batch they are in, and however they are padded; from anywhere between 0 and 1."""
    ids = torch.randint(1, 50_000, (2000, 12), generator=torch.Generator().manual_seed(0))
    real = torch.ones_like(ids)
    draws = _draws_of_rows(ids, real)
    padded = [torch.cat([torch.full((2000, 3), value), part], dim=1) for value, part in ((7, ids), (0, real))]
    assert torch.equal(draws[5:9], _draws_of_rows(*padded)[5:9])
    assert draws.min() >= 0
    assert draws.max() < 1
    torch.testing.assert_close(draws.mean(dim=0), torch.full((3,), 0.5), atol=0.03, rtol=0)
    torch.testing.assert_close(torch.corrcoef(draws.T), torch.eye(3), atol=0.1, rtol=0)


def test_the_best_checkpoint_brings_its_teacher_along(tmp_path: Path) -> None:
    """Not the teacher of the last step beside the model of the best one."""
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "lm_loss", "greater_is_better": True}
    made = trained(tmp_path, target_gradient="ema", ema_decay=0.5, max_steps=3, learning_rate=1e-2, **settings)
    best = Path(made.state.best_model_checkpoint)
    assert best.name == "checkpoint-1"
    expected = load_file(best / TEACHER_FILE)
    assert largest_difference(weights(made.objective.teacher), expected) == 0.0
    last = load_file(tmp_path / "checkpoint-3" / TEACHER_FILE)
    assert largest_difference(last, expected) > 0.0


def test_rows_are_read_wherever_they_are_given(tmp_path: Path) -> None:
    """To evaluations, under names and to predictions as well as to the constructor."""
    made = trainer(tmp_path)
    expected = made.evaluate()["eval_loss"]
    given = conversations(6)
    assert made.evaluate(given)["eval_loss"] == expected
    assert made.predict(given).metrics["test_loss"] == expected
    named = LlmJepaTrainer(
        made.model, made.args, eval_dataset={"some": given, "all": given}, view_tokenizer=made.view_tokenizer
    )
    assert named.evaluate()["eval_all_loss"] == expected
    assert named.evaluate("some")["eval_loss"] == expected


def test_a_stream_is_read_on_the_way(tmp_path: Path) -> None:
    """One without end: what is learnt is what its first rows teach; a finite one is evaluated on."""
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


def test_rows_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    given = {"processing_class": made.processing_class, "train_dataset": made.train_dataset}
    tokenised = LlmJepaTrainer(made.model, made.args, **given)
    with pytest.raises(UsageError, match="say how they are read"):
        tokenised.evaluate(conversations(2))
    with pytest.raises(UsageError, match="generation_rows need to know"):
        LlmJepaTrainer(made.model, made.args, generation_rows=conversations(2), **given)
    for rows in (None, []):
        given["train_dataset"] = rows
        with pytest.raises(UsageError, match="no rows to train on"):
            LlmJepaTrainer(made.model, made.args, **given).train()


def test_padding_is_told_apart_or_refused_without_a_weight_too(tmp_path: Path) -> None:
    """OPT sees the padding on the left of a conversation that has views behind it."""
    made = trainer(tmp_path, padding_side="left")
    config = OPTConfig(
        vocab_size=len(made.processing_class), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64,
        max_position_embeddings=128, word_embed_proj_dim=32, init_std=0.3,
    )  # fmt: skip
    args = replace(made.args, pair_weight=0.0)
    other = LlmJepaTrainer(
        OPTForCausalLM(config), args, train_dataset=made.train_dataset, processing_class=made.processing_class
    )
    for use in (other.train, lambda: other.evaluate(made.eval_dataset)):
        with pytest.raises(UsageError, match="use --view_passes separate"):
            use()


def test_views_that_all_point_one_way_are_told_though_their_distance_is_0(tmp_path: Path) -> None:
    """The rank of what is left without their mean stays high; the cosine of rows and the hit rate do not look away."""
    made = trainer(tmp_path)
    own = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(32, 16, generator=torch.Generator().manual_seed(1))
    told = {}
    for name, views in {"apart": (own, own), "one way": (100 + noise, 100 + own)}.items():
        assert pair_distance("cosine", *views).max() < 1e-3
        made._embeddings, means = [views], RunningMeans()
        made.finish_evaluation(means)
        told[name] = means.flush(made.accelerator)
    assert told["one way"]["view_rank"] > 10
    assert told["apart"]["view_rank"] > 10
    assert told["one way"]["view_pairwise_cosine"] > 0.999 > 0.1 > abs(told["apart"]["view_pairwise_cosine"])
    assert told["one way"]["view_hit_rate"] < 0.2 < 1.0 == told["apart"]["view_hit_rate"]
    assert told["apart"]["view_hit_rate_chance"] == pytest.approx(1 / 32)


def test_it_learns_to_turn_words_around(tmp_path: Path) -> None:
    """The whole path: after 150 steps on 8 conversations the greedy answers to them are right."""
    settings = {"rows": 8, "max_steps": 150, "learning_rate": 5e-3, "logging_steps": 50}
    made = trainer(tmp_path, model={"hidden_size": 64}, **settings)
    made.generation_rows, made.max_new_tokens = conversations(8), 16
    assert made.evaluate()["eval_exact_match"] == 0.0
    made.train()
    assert made.evaluate()["eval_exact_match"] == 1.0


def test_lora_trains_adapters_and_the_predictors_rows(tmp_path: Path) -> None:
    """Through peft's own `get_peft_model`; the embedding's other rows stay."""
    from peft import LoraConfig, get_peft_model

    plain = trainer(tmp_path / "plain")
    words = plain.processing_class
    row = words.convert_tokens_to_ids("<|predictor_1|>")
    config = LoraConfig(r=4, target_modules="all-linear", trainable_token_indices={"embed_tokens": [row]})
    base = model(len(words))
    made = LlmJepaTrainer(
        get_peft_model(base, config),
        LlmJepaTrainingArguments(
            str(tmp_path / "out"), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True,
            report_to="none", disable_tqdm=True, save_strategy="no",
        ),
        train_dataset=conversations(8),
        view_tokenizer=plain.view_tokenizer,
    )  # fmt: skip
    before = made.model.get_base_model().get_input_embeddings()(torch.arange(len(words))).detach().clone()
    made.train()
    after = made.model.get_base_model().get_input_embeddings()(torch.arange(len(words))).detach()
    moved = (before != after).any(dim=1).nonzero().flatten().tolist()
    assert moved == [row]
    made.save_model()
    assert (tmp_path / "out" / "adapter_config.json").is_file()


def test_adapters_without_the_predictors_token_are_refused(tmp_path: Path) -> None:
    """Its row would stay as it is, and `from_pretrained` would find an embedding of another size."""
    from peft import LoraConfig, get_peft_model

    words = tokenizer()
    adapted = get_peft_model(model(len(words)), LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(UsageError, match="call add_predictor_tokens"):
        LlmJepaTrainer(adapted, trainer(tmp_path).args, train_dataset=conversations(2), processing_class=words)


def test_a_model_of_which_nothing_is_trained_is_refused(tmp_path: Path) -> None:
    """Such as one whose adapters were merged."""
    made = trainer(tmp_path)
    made.model.requires_grad_(False)
    with pytest.raises(UsageError, match="nothing of the model is trained"):
        made.train()


def test_its_card_tells_what_happened_and_is_valid(tmp_path: Path) -> None:
    """Read back as the Hub reads it; names of data cannot become markup."""
    made = trainer(tmp_path / "out", tube_weight=0.1)
    made.evaluate()
    made.create_model_card(data=DataNames(train="<b>pairs</b> | x.jsonl"))
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
        ({"loss_dropout": 1.5}, "loss_dropout must lie between 0 and 1"),
        ({"pair_weight": -1.0}, "pair_weight must not be negative"),
        ({"infonce_temperature": 0.0}, "infonce_temperature must be above 0"),
        ({"use_liger_kernel": True}, "take its other kernels alone"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is for a loss that Trainer computes"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=sentence):
        trainer(tmp_path, **settings)


@pytest.mark.parametrize("name", ["compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"])
def test_functions_that_would_not_be_called_are_refused(name: str, tmp_path: Path) -> None:
    made = trainer(tmp_path)
    with pytest.raises(UsageError, match=f"{name} would not be called"):
        LlmJepaTrainer(made.model, made.args, processing_class=made.processing_class, **{name: print})


def test_other_kernels_of_ligers_may_be_used(tmp_path: Path) -> None:
    config = {"fused_linear_cross_entropy": False}
    assert LlmJepaTrainingArguments(str(tmp_path), use_liger_kernel=True, liger_kernel_config=config).use_liger_kernel


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    encoder = BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64))
    with pytest.raises(UsageError, match="BertModel is no causal language model"):
        LlmJepaTrainer(encoder, LlmJepaTrainingArguments(str(tmp_path)), processing_class=tokenizer())


def test_torch_compile_breaks_nowhere(tmp_path: Path) -> None:
    """Head on some tokens, views and paths are traced as one: a break would cost more than compiling gains."""
    counters.clear()
    trained(tmp_path, torch_compile=True, torch_compile_backend="aot_eager", tube_weight=0.1, max_steps=1)
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]
