"""Claims about `JepaForRepresentationPrediction`: frozen target, loss, batch contract, saving and loading."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers import AutoConfig, AutoModel, AutoModelForPreTraining, PreTrainedModel

from helpers.batches import (
    ATTENTION_IMPLEMENTATIONS,
    ONE_OF_EACH_FAMILY,
    image_batch,
    image_config,
    scale_weights,
    text_batch,
    tiny_jepa,
)
from helpers.batches import rows as corpus_rows
from helpers.cli import start_process
from helpers.tiny_models import FAMILIES, save_tiny_encoder, tiny_config, tiny_tokenizer
from jepa_hf import (
    DataCollatorForSpanJEPA,
    JepaConfig,
    JepaForRepresentationPrediction,
    JepaOutput,
    JepaTrainer,
    UsageError,
)
from jepa_hf.hub.export import export_run
from jepa_hf.models.positions import sincos_positions

Batch = dict[str, torch.Tensor]
MODES = [("bert", "mask_token", "mlp"), ("bert", "mask_token", "transformer"), ("bert", "drop", "transformer")]
EVERY_WEIGHT = {"mlm_weight": 0.5, "variance_weight": 0.1, "covariance_weight": 0.1, "sigreg_weight": 0.1}
EVERY_WEIGHT |= {"contrastive_weight": 0.1}


def assert_target_is_frozen(model: JepaForRepresentationPrediction) -> None:
    assert not any(parameter.requires_grad for parameter in model.target_encoder.parameters())
    assert not any(module.training for module in model.target_encoder.modules())


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different


def assert_different_weights(one: nn.Module, other: nn.Module) -> None:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    assert all(not torch.equal(ours, theirs) for ours, theirs in pairs)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Relative to the largest entry: what is small because large terms cancel has their rounding errors."""
    assert actual.shape == expected.shape
    assert ((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-6)).item() < tolerance


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close_gradients(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (actual[name] - gradient).abs().max() < 1e-5 * largest, name


# ---- the target encoder


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", [None, "mlm"])
def test_the_target_of_a_pretrained_encoder_is_its_exact_copy(family: str, head: Any, tmp_path: Path) -> None:
    name = save_tiny_encoder(family, tmp_path, head=head, std=0.3)
    model = JepaForRepresentationPrediction.from_encoder_pretrained(name)
    encoder = AutoModel.from_pretrained(name)
    assert_same_weights(model.context_encoder, model.target_encoder)
    for parameter_name, parameter in model.target_encoder.named_parameters():
        assert torch.equal(parameter, encoder.get_parameter(parameter_name)), parameter_name
        assert parameter.data_ptr() != model.context_encoder.get_parameter(parameter_name).data_ptr()
    assert_target_is_frozen(model)
    assert model.config.name_or_path == name


@pytest.mark.parametrize("mlm_weight", [0.0, 0.5])
def test_weights_are_float32_even_from_a_bfloat16_checkpoint(mlm_weight: float, tmp_path: Path) -> None:
    name = save_tiny_encoder("bert", tmp_path / "encoder", head="mlm", std=0.3)
    state = load_file(tmp_path / "encoder" / "model.safetensors")
    halved = {key: value.bfloat16() for key, value in state.items()}
    save_file(halved, tmp_path / "encoder" / "model.safetensors", metadata={"format": "pt"})
    config = AutoConfig.from_pretrained(name)
    config.dtype = torch.bfloat16
    config.save_pretrained(name)
    assert AutoModel.from_pretrained(name).dtype == torch.bfloat16  # what would happen by default

    for load in (
        JepaForRepresentationPrediction.from_encoder_pretrained,
        JepaForRepresentationPrediction.from_any_pretrained,
    ):
        model = load(name, mlm_weight=mlm_weight)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert_same_weights(model.context_encoder, model.target_encoder)
        embeddings = halved["bert.embeddings.word_embeddings.weight"].float()
        assert torch.equal(model.get_input_embeddings().weight, embeddings)
        # And they stay so on the way through a file.
        model.save_pretrained(tmp_path / "jepa")
        loaded = JepaForRepresentationPrediction.from_pretrained(tmp_path / "jepa")
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}

    explicit = JepaForRepresentationPrediction.from_encoder_pretrained(name, encoder_kwargs={"dtype": torch.bfloat16})
    assert {parameter.dtype for parameter in explicit.parameters()} == {torch.bfloat16}


def test_without_a_head_in_the_checkpoint_it_is_random_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr("jepa_hf.models.modeling_jepa.logger.warning", warnings.append)
    for head in (None, "mlm"):
        name = save_tiny_encoder("bert", tmp_path / str(head), head=head, std=0.3)
        model = JepaForRepresentationPrediction.from_encoder_pretrained(name, mlm_weight=0.5)
        assert (model.mlm_head.bias.abs().max() == 0) == (head is None)
    assert len(warnings) == 1
    assert "no masked-language-model head" in warnings[0]


def test_a_run_goes_on_from_its_own_output(tmp_path: Path) -> None:
    run = tiny_jepa("bert", "mask_token", loss="l1", mlm_weight=0.5)
    assert_different_weights(run.context_encoder, run.target_encoder)
    export_run(run, tmp_path, tiny_tokenizer("bert"))

    # The root is an encoder: a new JEPA around it.
    fresh = JepaForRepresentationPrediction.from_any_pretrained(str(tmp_path), target_norm="instance")
    for encoder in (fresh.context_encoder, fresh.target_encoder):
        own = {name: value for name, value in encoder.state_dict().items() if not name.startswith("pooler.")}
        expected = run.context_encoder.state_dict()
        assert own.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in own.items())
    assert (fresh.config.loss, fresh.config.target_norm, fresh.config.mlm_weight) == ("smooth_l1", "instance", 0.0)

    # jepa/ is the whole: its target and its choices, of which those given here win.
    complete = JepaForRepresentationPrediction.from_any_pretrained(str(tmp_path / "jepa"), loss="cosine")
    assert_same_weights(complete, run)
    assert (complete.config.loss, complete.config.masked_tokens, complete.config.mlm_weight) == (
        "cosine",
        "mask_token",
        0.5,
    )
    unchanged = JepaForRepresentationPrediction.from_any_pretrained(str(tmp_path / "jepa"))
    assert unchanged.config.loss == "l1"
    batch = text_batch("bert", "mask_token")
    assert torch.equal(unchanged(**batch).loss, run(**batch).loss)
    assert not torch.equal(complete(**batch).loss, run(**batch).loss)
    for model in (fresh, complete):
        assert_target_is_frozen(model)


def test_a_contradiction_between_a_jepas_own_choice_and_one_given_is_refused(tmp_path: Path) -> None:
    tiny_jepa("bert").save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="--masked_tokens mask_token"):
        JepaForRepresentationPrediction.from_any_pretrained(str(tmp_path), predictor_type="mlp")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_target_is_frozen_and_in_eval_mode_always(family: str, tmp_path: Path) -> None:
    model = JepaForRepresentationPrediction(JepaConfig(tiny_config(family)))
    assert_target_is_frozen(model)
    assert_same_weights(model.context_encoder, model.target_encoder)
    for mode in (True, False, True):
        model.train(mode)
        assert_target_is_frozen(model)
        assert all(module.training == mode for module in model.context_encoder.modules())
        assert all(parameter.requires_grad for parameter in model.context_encoder.parameters())
    model.save_pretrained(tmp_path)
    loaded = JepaForRepresentationPrediction.from_pretrained(tmp_path)
    assert_target_is_frozen(loaded)
    assert all(parameter.requires_grad for parameter in loaded.context_encoder.parameters())
    assert_target_is_frozen(loaded.train())


@pytest.mark.parametrize("part", ["context_encoder.embeddings", "predictor.layers.0", "target_encoder"])
def test_train_reaches_modules_that_were_set_apart(part: str) -> None:
    """Also where the model itself is in that mode already, which is what is looked at on each micro-step."""
    model = tiny_jepa("bert").train()
    odd = model.get_submodule(part)
    odd.train(not odd.training)
    model.train()
    for name, module in model.named_modules():
        assert module.training != name.startswith("target_encoder"), name


@pytest.mark.parametrize("case", ATTENTION_IMPLEMENTATIONS, ids="-".join)
def test_every_trainable_parameter_learns_and_the_target_gets_no_gradient(case: tuple[str, str, str]) -> None:
    model = tiny_jepa(*case, strong=False, mlm_weight=0.5).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2, weight_decay=0.0)
    model(**text_batch(case[0], case[1])).loss.backward()
    optimizer.step()
    still = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert still == [f"target_encoder.{name}" for name, _ in model.target_encoder.named_parameters()]
    assert all(parameter.grad is None for parameter in model.target_encoder.parameters())


@pytest.mark.parametrize("case", ONE_OF_EACH_FAMILY, ids="-".join)
def test_there_is_no_dropout_in_the_target_while_training(case: tuple[str, str, str]) -> None:
    family = case[0]
    dropouts = {name: 0.5 for name in tiny_config(family).to_dict() if "dropout" in name}
    model = tiny_jepa(*case, encoder=dropouts).train()
    batch = text_batch(family, case[1])
    first, second = model(**batch), model(**batch)
    assert torch.equal(first.targets, second.targets)
    assert not torch.equal(first.predictions, second.predictions)


# ---- saving and loading


@pytest.mark.parametrize("missing", ["all", "one"])
def test_a_target_that_the_checkpoint_lacks_is_the_context_encoders_copy(missing: str, tmp_path: Path) -> None:
    model = tiny_jepa("bert")
    assert_different_weights(model.context_encoder, model.target_encoder)
    model.save_pretrained(tmp_path)
    assert_same_weights(JepaForRepresentationPrediction.from_pretrained(tmp_path), model)  # nothing is lacking yet

    state = load_file(tmp_path / "model.safetensors")
    lacking = [name for name in state if name.startswith("target_encoder.")]
    lacking = lacking if missing == "all" else lacking[:1]
    state = {name: value for name, value in state.items() if name not in lacking}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = JepaForRepresentationPrediction.from_pretrained(tmp_path)
    for name, parameter in loaded.target_encoder.named_parameters():
        source = loaded.context_encoder if f"target_encoder.{name}" in lacking else model.target_encoder
        assert torch.equal(parameter, source.get_parameter(name)), name
    assert_same_weights(loaded.context_encoder, model.context_encoder)
    assert_target_is_frozen(loaded)


@pytest.mark.parametrize("family", [*FAMILIES, "vit"])
def test_buffers_that_are_not_saved_are_right_after_loading(family: str, tmp_path: Path) -> None:
    config = image_config() if family == "vit" else tiny_config(family)
    model = JepaForRepresentationPrediction(JepaConfig(config))
    model.save_pretrained(tmp_path)
    # Memory is made dirty, so that uninitialised buffers do not happen to be zero.
    dirt = [torch.full((4096,), 7.0) for _ in range(64)]
    del dirt
    loaded = JepaForRepresentationPrediction.from_pretrained(tmp_path)
    expected = dict(model.named_buffers())
    assert dict(loaded.named_buffers()).keys() == expected.keys()
    for name, buffer in loaded.named_buffers():
        assert torch.equal(buffer, expected[name]), name
    if family == "vit":
        assert torch.equal(loaded.predictor.position_embeddings, sincos_positions((4, 4), 16))


FRESH = """
import sys, torch
from pathlib import Path
import jepa_hf
torch.set_num_threads(1)
for folder in sorted(Path(sys.argv[1]).iterdir()):
    model = jepa_hf.JepaForRepresentationPrediction.from_pretrained(folder)
    with torch.no_grad():
        output = model(**torch.load(folder / "batch.pt"))
    print(folder.name, output.loss.item().hex(), output.predictions.double().sum().item().hex())
"""


@pytest.mark.slow
def test_a_fresh_process_computes_the_same_bits(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = []
    try:
        for case in [*ATTENTION_IMPLEMENTATIONS, ("vit", "drop", "transformer")]:
            if case[0] == "vit":
                model = JepaForRepresentationPrediction(JepaConfig(image_config())).eval()
                scale_weights(model)
                batch = image_batch()
            else:
                model = tiny_jepa(*case, **EVERY_WEIGHT)
                batch = text_batch(case[0], case[1])
            folder = tmp_path / "-".join(case)
            model.save_pretrained(folder)
            torch.save(batch, folder / "batch.pt")
            with torch.no_grad():
                output = model(**batch)
            line = folder.name, output.loss.item().hex(), output.predictions.double().sum().item().hex()
            expected.append(" ".join(line))
    finally:
        torch.set_num_threads(threads)
    process = start_process("-c", FRESH, tmp_path, cwd=tmp_path)
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.split("\n")[:-1] == sorted(expected)


def test_the_auto_classes_know_a_jepa(tmp_path: Path) -> None:
    tiny_jepa("bert").save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is JepaConfig
    for auto_class in (AutoModel, AutoModelForPreTraining):
        assert type(auto_class.from_pretrained(tmp_path)) is JepaForRepresentationPrediction
        assert type(auto_class.from_config(JepaConfig(tiny_config("bert")))) is JepaForRepresentationPrediction


def test_both_encoders_can_be_had_and_no_third() -> None:
    model = tiny_jepa("bert")
    assert model.get_encoder() is model.get_encoder("context") is model.context_encoder
    assert model.get_encoder("target") is model.target_encoder
    with pytest.raises(ValueError, match="'context' or 'target'"):
        model.get_encoder("teacher")


# ---- the objective


def formula(kind: str, beta: float, prediction: list[float], target: list[float]) -> float:
    """The loss of one target in plain Python."""
    differences = [abs(p - t) for p, t in zip(prediction, target, strict=True)]
    if kind == "cosine":
        product = sum(p * t for p, t in zip(prediction, target, strict=True))
        return 1 - product / math.sqrt(sum(p * p for p in prediction) * sum(t * t for t in target))
    if kind == "l1":
        each = differences
    elif kind == "l2":
        each = [d * d for d in differences]
    else:
        each = [0.5 * d * d / beta if d < beta else d - 0.5 * beta for d in differences]
    return sum(each) / len(each)


@pytest.mark.parametrize("kind", ["smooth_l1", "l2", "l1", "cosine"])
@pytest.mark.parametrize("case", MODES, ids="-".join)
def test_the_loss_is_the_formulas_mean_over_the_valid_targets(kind: str, case: tuple[str, str, str]) -> None:
    model = tiny_jepa(*case, loss=kind, smooth_l1_beta=0.5, prediction_weight=3.0)
    batch = text_batch(case[0], case[1])
    assert not batch["target_valid"].all()
    output = model(**batch)
    each = [
        formula(kind, 0.5, prediction.tolist(), target.tolist())
        for prediction, target in zip(
            output.predictions[batch["target_valid"]], output.targets[batch["target_valid"]], strict=True
        )
    ]
    assert output.loss.item() == pytest.approx(3 * sum(each) / len(each), rel=1e-5)
    assert output.num_targets == len(each)
    shared = model(**batch, num_items_in_batch=torch.tensor(100))
    assert shared.loss.item() == pytest.approx(3 * sum(each) / 100, rel=1e-5)
    assert shared.prediction_loss.item() == pytest.approx(sum(each) / len(each), rel=1e-5)


def normalized(states: torch.Tensor, real: torch.Tensor, kind: str) -> torch.Tensor:
    """One sequence `[L, D]` in float64; statistics over features, or over the real positions."""
    if kind == "layer":
        return (states - states.mean(-1, keepdim=True)) / (states.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    if kind == "instance":
        own = states[real]
        return (states - own.mean(0)) / (own.var(0, unbiased=False) + 1e-5).sqrt()
    return states


@pytest.mark.parametrize("target_norm", ["layer", "instance", "none"])
@pytest.mark.parametrize("average_top_k_layers", [1, 2])
@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_targets_are_normalised_averages_of_the_target_encoders_top_layers(
    family: str, average_top_k_layers: int, target_norm: str
) -> None:
    model = tiny_jepa(family, average_top_k_layers=average_top_k_layers, target_norm=target_norm)
    batch = text_batch(family, "drop")
    output = model(**batch, output_hidden_states=True)
    states = [layer.double() for layer in output.target_hidden_states]
    # They are the target encoder's own states of the clean view.
    clean = {name: batch[name] for name in ("input_ids", "attention_mask")}
    encoded = model.target_encoder(**clean, output_hidden_states=True)
    assert len(states) == len(encoded.hidden_states) == model.config.encoder_config.num_hidden_layers + 1
    for actual, expected in zip(states, encoded.hidden_states, strict=True):
        assert torch.equal(actual, expected.double())
    assert torch.equal(states[-1], encoded.last_hidden_state.double())
    for row in range(len(batch["input_ids"])):
        real = batch["attention_mask"][row].bool()
        layers = [normalized(layer[row], real, target_norm) for layer in states[-average_top_k_layers:]]
        expected = layers[0]
        if average_top_k_layers == 2:
            expected = normalized((layers[0] + layers[1]) / 2, real, target_norm)
        valid = batch["target_valid"][row, 0]
        positions = batch["target_positions"][row, 0][valid]
        torch.testing.assert_close(output.targets[row, 0][valid].double(), expected[positions], rtol=1e-4, atol=1e-4)


def masked_lm_sum(model: JepaForRepresentationPrediction, batch: Batch) -> torch.Tensor:
    """Summed cross-entropy at the targets, with the head applied by hand."""
    output = model(**batch, output_hidden_states=True)
    total = torch.zeros(())
    for row in range(len(batch["input_ids"])):
        for column, position in enumerate(batch["target_positions"][row, 0].tolist()):
            if not batch["target_valid"][row, 0, column]:
                continue
            if model.config.masked_tokens == "mask_token":
                state = output.context_state[row, position]
            else:
                state = output.predictions[row, 0, column]
            head = model.mlm_head
            logits = head.norm(head.activation(head.dense(state))) @ model.get_input_embeddings().weight.T + head.bias
            total = total - logits.log_softmax(dim=0)[batch["input_ids"][row, position]]
    return total


@pytest.mark.parametrize("case", [*MODES, ("electra", "drop", "transformer")], ids="-".join)
def test_the_masked_lm_reads_mask_tokens_where_kept_and_guesses_where_dropped(case: tuple[str, str, str]) -> None:
    model, batch = tiny_jepa(*case, mlm_weight=0.25, prediction_weight=1.0), text_batch(case[0], case[1])
    output = model(**batch)
    expected = masked_lm_sum(model, batch) / batch["target_valid"].sum()
    assert output.mlm_loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert output.loss.item() == pytest.approx(output.prediction_loss.item() + 0.25 * expected.item(), rel=1e-5)


def test_a_misspelt_name_in_a_batch_is_refused() -> None:
    """Without `context_valid`, padding would be read as text; without `attention_mask`, as features."""
    batch = text_batch("bert", "drop")
    batch["context_valids"] = batch.pop("context_valid")
    with pytest.raises(TypeError, match="context_valids"):
        tiny_jepa("bert")(**batch)
    encoder = JepaForRepresentationPrediction(JepaConfig.for_features(4, mode="time", embed_dim=32)).get_encoder()
    with pytest.raises(TypeError, match="attention_masks"):
        encoder(features=torch.zeros(2, 3, 4), attention_masks=torch.ones(2, 3))


@pytest.mark.parametrize("case", MODES, ids="-".join)
def test_the_loss_is_the_weighted_sum_of_its_parts(case: tuple[str, str, str]) -> None:
    weights = {"mlm_weight": 0.5, "variance_weight": 0.25, "covariance_weight": 0.125, "sigreg_weight": 2.0}
    weights |= {"contrastive_weight": 0.75, "prediction_weight": 1.5}
    model, batch = tiny_jepa(*case, **weights), text_batch(case[0], case[1])
    scale_weights(model.context_encoder, std=0.1)  # or no standard deviation is below 1
    output = model(**batch)
    parts = {name: getattr(output, name.replace("weight", "loss")).item() for name in weights}
    assert min(parts.values()) > 0
    expected = sum(weights[name] * part for name, part in parts.items())
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)
    # Statistics of the micro-batch count by its share of the update's targets.
    half = model(**batch, num_items_in_batch=2 * output.num_targets)
    assert half.loss.item() == pytest.approx(expected / 2, rel=1e-5)


def test_a_batch_without_targets_is_refused_in_a_sentence() -> None:
    batch = text_batch("bert", "drop")
    del batch["target_positions"]
    with pytest.raises(ValueError, match=r"target_positions .* missing. Make the batch with the collator"):
        tiny_jepa("bert")(**batch)


@pytest.mark.parametrize("case", MODES, ids="-".join)
@pytest.mark.parametrize("mlm_weight", [0.0, 1.0])
def test_without_the_prediction_loss_exactly_the_parameters_in_use_are_trained(
    case: tuple[str, str, str], mlm_weight: float
) -> None:
    """DDP waits for the gradient of every trainable parameter."""
    model = tiny_jepa(*case, prediction_weight=0.0, mlm_weight=mlm_weight, contrastive_weight=0.5)
    output = model(**text_batch(case[0], case[1]))
    expected = 0.5 * output.contrastive_loss + (mlm_weight * output.mlm_loss if mlm_weight else 0.0)
    torch.testing.assert_close(output.loss, expected)
    assert output.prediction_loss > 0  # still measured
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    uses_predictor = case[1] == "drop" and mlm_weight > 0
    assert all(parameter.requires_grad == uses_predictor for parameter in model.predictor.parameters())


def test_the_predictor_starts_at_the_scale_that_its_encoder_asks_for() -> None:
    """Unit gain, std 1/sqrt(fan-in), where the encoder's outputs carry no positions; else the small one."""

    def scale(family: str, **kwargs: Any) -> float:
        model = tiny_jepa(family, strong=False, pred_hidden_size=32, **kwargs)
        layer = model.predictor.layers[0].fc2
        return layer.weight.std().item() * layer.in_features**0.5

    assert scale("modernbert") == pytest.approx(1.0, rel=0.05)
    assert scale("bert", pred_init="unit_gain") == pytest.approx(1.0, rel=0.05)
    assert scale("bert") == pytest.approx(0.02 * (4 * 32) ** 0.5, rel=0.05)
    assert scale("modernbert", pred_init="small") == pytest.approx(0.02 * (4 * 32) ** 0.5, rel=0.05)


@pytest.mark.parametrize("masks", [1, 3])
@pytest.mark.parametrize("case", MODES, ids="-".join)
def test_the_contrastive_term_finds_a_sample_s_own_target_mean(case: tuple[str, str, str], masks: int) -> None:
    """Written out row by row: means over real tokens only, candidates standardised, each view to find its sample."""
    model = tiny_jepa(*case, contrastive_weight=1.0, contrastive_temperature=0.2)
    batch = text_batch(case[0], case[1], count=5, masks=masks)
    output = model(**batch, output_hidden_states=True)
    real = batch["attention_mask"].bool()
    layers = output.target_hidden_states[-model.config.average_top_k_layers :]
    candidates = []
    for row, kept in enumerate(real):
        means = [F.layer_norm(layer[row][kept].mean(dim=0), layer.shape[-1:]) for layer in layers]
        candidates.append(torch.stack(means).mean(dim=0))
    candidates = torch.stack(candidates)
    candidates = (candidates - candidates.mean(dim=0)) / (candidates.std(dim=0, correction=0) + 1e-5)
    views = len(output.context_state) // len(real)
    losses = []
    for number, (states, kept) in enumerate(zip(output.context_state, output.context_valid, strict=True)):
        guess = model.pooled_predictor(states[kept].mean(dim=0))
        cosines = F.cosine_similarity(guess[None], candidates)
        losses.append(-F.log_softmax(cosines / 0.2, dim=0)[number // views])
    targets = batch["target_valid"].reshape(len(losses), -1).sum(dim=1)
    expected = (torch.stack(losses) * targets).sum() / targets.sum()
    assert output.contrastive_loss.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("case", MODES, ids="-".join)
def test_without_a_predictor_the_contrastive_term_compares_the_exported_vectors(case: tuple[str, str, str]) -> None:
    """The mean of the context encoder's last layer finds that of the target encoder, both as an export gives them."""
    model = tiny_jepa(*case, contrastive_weight=1.0, contrastive_temperature=0.2, contrastive_predictor="none")
    batch = text_batch(case[0], case[1], count=5)
    output = model(**batch, output_hidden_states=True)
    real = batch["attention_mask"].bool()
    last = output.target_hidden_states[-1]
    candidates = torch.stack([states[kept].mean(dim=0) for states, kept in zip(last, real, strict=True)])
    views = zip(output.context_state, output.context_valid, strict=True)
    means = torch.stack([states[kept].mean(dim=0) for states, kept in views])
    cosines = F.normalize(means, dim=1) @ F.normalize(candidates, dim=1).T
    losses = F.cross_entropy(cosines / 0.2, torch.arange(5), reduction="none")
    targets = batch["target_valid"].reshape(5, -1).sum(dim=1)
    assert output.contrastive_loss.item() == pytest.approx(((losses * targets).sum() / targets.sum()).item(), rel=1e-4)
    assert model.pooled_predictor is None
    torch.testing.assert_close(output.sample_predictions, means)


@pytest.mark.parametrize("case", MODES, ids="-".join)
def test_rows_without_targets_are_compared_with_nothing(case: tuple[str, str, str]) -> None:
    """Four rows, and the same ones filled up to 32 with copies that are left out: each part of the loss is the same.

    So are the gradients.
    """
    model = tiny_jepa(*case, **EVERY_WEIGHT)
    scale_weights(model.context_encoder, std=0.1)  # or no standard deviation is below 1
    batch = text_batch(case[0], case[1], masks=2)
    filled = {name: torch.cat([value, value[:1].expand(28, *value.shape[1:])]) for name, value in batch.items()}
    JepaTrainer.mask_rows(filled, torch.arange(32) < 4)
    actual = []
    for given in (batch, filled):
        model.zero_grad()
        output = model(**given)
        output.loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        actual.append(({name: value for name, value in output.items() if name.endswith("loss")}, gradients))
    (parts, gradients), (others, other_gradients) = actual
    assert {"contrastive_loss", "variance_loss", "covariance_loss", "sigreg_loss"} <= set(parts)
    for name, value in parts.items():
        torch.testing.assert_close(others[name], value, rtol=1e-5, atol=1e-6, msg=name)
    torch.testing.assert_close(other_gradients, gradients, rtol=1e-4, atol=1e-5 * gradients.abs().max().item())


def test_the_contrastive_term_teaches_the_context_encoder_and_nothing_of_the_target() -> None:
    """With it alone; and without it there is no predictor for it, so that DDP waits for no gradient."""
    model = tiny_jepa("bert", contrastive_weight=1.0).train()
    model(**text_batch("bert", "drop", count=5)).contrastive_loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.pooled_predictor.parameters())
    assert model.context_encoder.get_input_embeddings().weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.target_encoder.parameters())
    assert tiny_jepa("bert").pooled_predictor is None


def cut(batch: Batch, rows: slice) -> Batch:
    return {name: value[rows] for name, value in batch.items()}


@pytest.mark.parametrize("mlm_weight", [0.0, 0.5])
@pytest.mark.parametrize("case", MODES, ids="-".join)
def test_micro_batches_add_up_to_the_big_batch(case: tuple[str, str, str], mlm_weight: float) -> None:
    model = tiny_jepa(*case, mlm_weight=mlm_weight).train()  # without dropout
    batch = text_batch(case[0], case[1], count=5)
    big = model(**batch)
    big.loss.backward()
    expected = gradients(model)
    model.zero_grad()
    total, summed = batch["target_valid"].sum(), 0.0
    for rows in (slice(0, 1), slice(1, 5)):
        micro = model(**cut(batch, rows), num_items_in_batch=total)
        micro.loss.backward()
        summed += micro.loss.item()
    assert summed == pytest.approx(big.loss.item(), rel=1e-5)
    assert_close_gradients(gradients(model), expected)
    # The mean of their means is something else, as their numbers of targets differ.
    means = [model(**cut(batch, rows)).loss.item() for rows in (slice(0, 1), slice(1, 5))]
    assert sum(means) / 2 != pytest.approx(big.loss.item(), rel=1e-4)


@pytest.mark.parametrize("case", ATTENTION_IMPLEMENTATIONS, ids="-".join)
def test_three_masks_equal_three_calls_with_one(case: tuple[str, str, str]) -> None:
    model = tiny_jepa(*case, mlm_weight=0.5)
    batch = text_batch(case[0], case[1], masks=3)
    together = model(**batch)
    assert together.predictions.shape[:2] == (4, 3)
    weighted = 0.0
    for mask in range(3):
        one = {name: batch[name] for name in ("input_ids", "attention_mask")}
        for name in set(batch) - set(one):
            one[name] = batch[name][:, mask] if name == "context_input_ids" else batch[name][:, mask : mask + 1]
        alone = model(**one)
        valid = one["target_valid"]
        assert_close(together.predictions[:, mask : mask + 1][valid], alone.predictions[valid])
        assert torch.equal(together.targets[:, mask : mask + 1][valid], alone.targets[valid])
        weighted += alone.loss.item() * alone.num_targets.item()
    assert together.loss.item() == pytest.approx(weighted / together.num_targets.item(), rel=1e-5)
    assert not torch.equal(batch["target_positions"][:, 0], batch["target_positions"][:, 1])


def test_one_context_serves_all_masks() -> None:
    model, batch = tiny_jepa("bert"), text_batch("bert", "drop", masks=3)
    # What the first mask leaves visible, less what the other two hide, is nobody's target.
    shared = batch | {name: batch[name][:, :1].clone() for name in ("context_positions", "context_valid")}
    encoded: list[int] = []
    model.context_encoder.register_forward_pre_hook(
        lambda _module, _args, kwargs: encoded.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    once = model(**shared)
    repeated = shared | {name: shared[name].expand(-1, 3, -1) for name in ("context_positions", "context_valid")}
    thrice = model(**repeated)
    assert encoded == [4, 12]
    valid = batch["target_valid"]
    assert_close(once.predictions[valid], thrice.predictions[valid])
    assert once.loss.item() == pytest.approx(thrice.loss.item(), rel=1e-5)
    # Whose context goes with whose targets matters: each sample's own.
    swapped = shared | {name: shared[name].flip(0) for name in ("context_positions", "context_valid")}
    assert (model(**swapped).predictions - once.predictions)[valid].abs().max() > 0.1


@pytest.mark.parametrize("num_items", [None, 1, 50])
@pytest.mark.parametrize("case", MODES, ids="-".join)
def test_a_batch_without_targets_has_a_differentiable_loss_of_zero(
    case: tuple[str, str, str], num_items: int | None
) -> None:
    model = tiny_jepa(*case, **EVERY_WEIGHT).train()
    batch = text_batch(case[0], case[1])
    batch["target_valid"] = torch.zeros_like(batch["target_valid"])
    output = model(**batch, num_items_in_batch=num_items)
    assert output.loss.item() == 0
    assert output.loss.requires_grad
    assert output.num_targets == 0
    output.loss.backward()
    for name, gradient in gradients(model).items():
        assert not gradient.any(), name  # neither a gradient nor NaN
    # So do rows of nothing but padding.
    if "context_valid" in batch:
        batch["context_valid"] = torch.zeros_like(batch["context_valid"])
    batch["attention_mask"] = torch.zeros_like(batch["attention_mask"])
    assert model(**batch).loss.item() == 0


def test_a_row_without_targets_changes_nothing() -> None:
    model, batch = tiny_jepa("bert", mlm_weight=0.5), text_batch("bert", "drop")
    alone = model(**cut(batch, slice(0, 3)))
    batch["target_valid"][3] = False
    assert model(**batch).loss.item() == pytest.approx(alone.loss.item(), rel=1e-5)


@pytest.mark.parametrize("case", ATTENTION_IMPLEMENTATIONS, ids="-".join)
def test_padding_changes_no_prediction(case: tuple[str, str, str]) -> None:
    family, mode, _ = case
    model, batch = tiny_jepa(*case, mlm_weight=0.5), text_batch(family, mode)
    alone = model(**batch)
    padding = {"attention_mask": 0, "target_valid": False, "context_valid": False}
    padding |= {"input_ids": tiny_tokenizer(family).pad_token_id, "target_positions": 0, "context_positions": 0}
    padding["context_input_ids"] = padding["input_ids"]
    wider = {name: nn.functional.pad(value, (0, 5), value=padding[name]) for name, value in batch.items()}
    output = model(**wider)
    valid = batch["target_valid"]
    assert_close(output.predictions[wider["target_valid"]], alone.predictions[valid])
    assert_close(output.targets[wider["target_valid"]], alone.targets[valid])
    assert output.loss.item() == pytest.approx(alone.loss.item(), rel=1e-5)
    # Nor does company: a row alone, cut to its own length.
    shortest = int(batch["attention_mask"].sum(dim=1).argmin())
    length = int(batch["attention_mask"][shortest].sum())
    assert length < batch["input_ids"].shape[1]
    row = {name: value[shortest : shortest + 1] for name, value in batch.items()}
    row |= {name: row[name][:, :length] for name in ("input_ids", "attention_mask", "context_input_ids") if name in row}
    assert_close(model(**row).predictions[row["target_valid"]], alone.predictions[shortest][valid[shortest]])


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_come_from_the_clean_view_and_predictions_from_the_masked_one(family: str) -> None:
    model, batch = tiny_jepa(family, "mask_token"), text_batch(family, "mask_token")
    before, valid = model(**batch), batch["target_valid"]
    rows, columns = torch.arange(4), batch["target_positions"][:, 0, 0]

    masked = dict(batch, context_input_ids=batch["context_input_ids"].clone())
    masked["context_input_ids"][:, 1] = 20
    output = model(**masked)
    assert torch.equal(output.targets, before.targets)
    assert (output.predictions - before.predictions)[valid].abs().max() > 0.01

    clean = dict(batch, input_ids=batch["input_ids"].clone())
    clean["input_ids"][rows, columns] = 20  # a hidden token
    output = model(**clean)
    assert torch.equal(output.predictions, before.predictions)
    assert (output.targets - before.targets)[valid].abs().max() > 0.01


def test_hidden_tokens_are_hidden_where_positions_are_dropped() -> None:
    for family in ("bert", "distilbert", "roberta", "electra", "modernbert"):
        model, batch = tiny_jepa(family), text_batch(family, "drop")
        before = model(**batch)
        clean = dict(batch, input_ids=batch["input_ids"].clone())
        clean["input_ids"][torch.arange(4), batch["target_positions"][:, 0, 0]] = 20
        output = model(**clean)
        assert torch.equal(output.predictions, before.predictions)
        assert (output.targets - before.targets).abs().max() > 0.01


def test_the_attention_mask_may_be_left_out_where_nothing_is_padded() -> None:
    model = tiny_jepa("bert")
    batch = cut(text_batch("bert", "drop"), slice(3, 4))
    length = int(batch["attention_mask"].sum())
    batch |= {name: batch[name][:, :length] for name in ("input_ids", "attention_mask")}
    with_mask = model(**batch).loss
    del batch["attention_mask"]
    assert torch.equal(model(**batch).loss, with_mask)


@pytest.mark.parametrize(
    ("mode", "other", "missing"),
    [("mask_token", "drop", "context_input_ids"), ("drop", "mask_token", "context_positions")],
)
def test_a_batch_of_the_other_mode_is_refused_with_the_remedy(mode: str, other: str, missing: str) -> None:
    with pytest.raises(ValueError, match=rf"{missing}.*masked_tokens='{mode}'"):
        tiny_jepa("bert", mode)(**text_batch("bert", other))


def test_fields_are_none_unless_asked_for() -> None:
    batch = text_batch("bert", "drop")
    losses = {"loss", "prediction_loss", "cosine"}
    context = {"context_state", "context_valid", "context_samples"}
    always = losses | context | {"num_targets", "predictions", "targets", "target_valid", "target_samples"}
    states = {"context_hidden_states", "target_hidden_states"}
    parts = {"mlm_loss", "variance_loss", "covariance_loss", "sigreg_loss", "contrastive_loss"}

    def given(output: JepaOutput) -> set[str]:
        assert isinstance(output, JepaOutput)
        return {name for name, value in vars(output).items() if value is not None}

    model = tiny_jepa("bert")
    assert given(model(**batch)) == always
    assert given(model(**batch, output_hidden_states=True)) == always | states
    assert given(model(**batch, return_loss=False)) == always - losses
    samples = {"sample_predictions", "sample_targets"}
    assert given(tiny_jepa("bert", **EVERY_WEIGHT)(**batch)) == always | parts | samples
    # Asking changes no number.
    assert torch.equal(model(**batch).loss, model(**batch, output_hidden_states=True).loss)
    assert given(model.train()(**batch)) == always - context


# ---- resizing, checkpointing


def make_new(family: str, folder: Path) -> JepaForRepresentationPrediction:
    return tiny_jepa(family, mlm_weight=0.5)


def make_from_encoder(family: str, folder: Path) -> JepaForRepresentationPrediction:
    name = save_tiny_encoder(family, folder, head="mlm", std=0.3)
    return JepaForRepresentationPrediction.from_encoder_pretrained(name, mlm_weight=0.5)


def make_loaded(family: str, folder: Path) -> JepaForRepresentationPrediction:
    tiny_jepa(family, mlm_weight=0.5).save_pretrained(folder)
    return JepaForRepresentationPrediction.from_pretrained(folder)


# ModernBERT's special tokens are its last ones, which cannot be cut off.
RESIZED = [(family, change) for family in FAMILIES for change in (7, -7) if (family, change) != ("modernbert", -7)]


@pytest.mark.parametrize("make", [make_new, make_from_encoder, make_loaded])
@pytest.mark.parametrize(("family", "change"), RESIZED)
def test_resizing_the_vocabulary_resizes_everything_alike(
    family: str, make: Callable[[str, Path], JepaForRepresentationPrediction], change: int, tmp_path: Path
) -> None:
    model = make(family, tmp_path / "before")
    scale_weights(model.target_encoder, seed=1)  # as in the middle of a run
    old = len(tiny_tokenizer(family))
    tables = [model.get_encoder(which).get_input_embeddings().weight.clone() for which in ("context", "target")]
    bias = model.mlm_head.bias.clone()
    size, kept = old + change, min(old, old + change)
    returned = model.resize_token_embeddings(size)

    assert returned is model.get_input_embeddings()
    for which, table in zip(("context", "target"), tables, strict=True):
        weight = model.get_encoder(which).get_input_embeddings().weight
        assert weight.shape[0] == size
        assert torch.equal(weight[:kept], table[:kept])
        assert model.get_encoder(which).config.vocab_size == size
    context, target = (model.get_encoder(which).get_input_embeddings().weight for which in ("context", "target"))
    assert torch.equal(context[old:], target[old:])
    assert model.mlm_head.bias.shape == (size,)
    assert torch.equal(model.mlm_head.bias[:kept], bias[:kept])
    assert model.config.encoder_config.vocab_size == size
    assert_target_is_frozen(model)
    assert context.requires_grad
    assert model.mlm_head.bias.requires_grad

    model.save_pretrained(tmp_path / "after")
    loaded = JepaForRepresentationPrediction.from_pretrained(tmp_path / "after")
    assert_same_weights(loaded, model)
    batch = text_batch(family, model.config.masked_tokens)
    if change > 0:
        batch["input_ids"][:, 1] = size - 1
    else:
        batch = {name: value.clamp_max(size - 1) if "input_ids" in name else value for name, value in batch.items()}
    assert torch.equal(loaded(**batch).loss, model(**batch).loss)


class CountedCalls:
    """Counts the forward passes of an encoder's first layer, by those of a part of it."""

    def __init__(self, encoder: PreTrainedModel):
        self.count = 0
        layer = next(module for module in encoder.modules() if isinstance(module, nn.ModuleList))[0]
        part = next(module for module in layer.modules() if isinstance(module, nn.Linear))
        part.register_forward_pre_hook(self._add)

    def _add(self, *_args: Any) -> None:
        self.count += 1


@pytest.mark.parametrize("case", ATTENTION_IMPLEMENTATIONS, ids="-".join)
def test_activation_checkpointing_changes_neither_loss_nor_gradients(case: tuple[str, str, str]) -> None:
    model, batch = tiny_jepa(*case, mlm_weight=0.5).train(), text_batch(case[0], case[1])
    calls = {which: CountedCalls(model.get_encoder(which)) for which in ("context", "target")}
    plain = model(**batch)
    plain.loss.backward()
    expected = gradients(model)
    once = calls["context"].count
    assert calls["target"].count == once > 0
    model.zero_grad()
    model.gradient_checkpointing_enable()
    checkpointed = model.train()(**batch)
    checkpointed.loss.backward()
    assert calls["context"].count == 3 * once  # once more on the way back
    assert calls["target"].count == 2 * once
    assert torch.equal(checkpointed.loss, plain.loss)
    assert_close_gradients(gradients(model), expected)


def test_a_saved_model_can_be_moved(tmp_path: Path) -> None:
    model = tiny_jepa("bert")
    model.save_pretrained(tmp_path / "here")
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert_same_weights(JepaForRepresentationPrediction.from_pretrained(tmp_path / "there"), model)


# ---- torch.compile

ONE_LAYER = {"num_hidden_layers": 1}  # because tracing takes most of the time


@pytest.mark.parametrize(
    ("family", "masked_tokens", "predictor"),
    [case for case in dict.fromkeys([*ONE_OF_EACH_FAMILY, *MODES]) if case[0] != "modernbert"],
    ids="-".join,
)
@pytest.mark.slow
def test_a_text_model_compiles_into_one_graph(family: str, masked_tokens: str, predictor: str) -> None:
    """Each family, each mode and each predictor. ModernBERT's own forward takes a lock, which ends a graph."""
    model = tiny_jepa(family, masked_tokens, predictor, encoder=ONE_LAYER)
    assert_compiles_into_one_graph(model, text_batch(family, masked_tokens))


def test_several_target_layers_compile_into_one_graph() -> None:
    """From the first call on: transformers would install what notes the layers' outputs in it, and end the graph."""
    model = tiny_jepa("bert", "drop", average_top_k_layers=2)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)(**text_batch("bert", "drop")).loss
    torch.testing.assert_close(compiled, model(**text_batch("bert", "drop")).loss)
    torch.compiler.reset()


@pytest.mark.slow
def test_every_term_compiles_into_one_graph() -> None:
    """In evaluation, with its fixed directions of SIGReg, and in training, with random ones."""
    model, batch = tiny_jepa("bert", "drop", encoder=ONE_LAYER, **EVERY_WEIGHT), text_batch("bert", "drop")
    assert_compiles_into_one_graph(model, batch)
    torch.compile(model.train(), backend="eager", fullgraph=True)(**batch).loss.backward()
    torch.compiler.reset()


@pytest.mark.parametrize("family", ["ijepa", "vit", "dinov2"])
@pytest.mark.slow
def test_an_image_model_compiles_into_one_graph(family: str) -> None:
    settings = {"hidden_size": 32, "num_attention_heads": 2, "image_size": 8, "patch_size": 2, **ONE_LAYER}
    model = JepaForRepresentationPrediction(JepaConfig(AutoConfig.for_model(family, **settings)))
    assert_compiles_into_one_graph(model, image_batch())


@pytest.mark.parametrize("masked_tokens", ["drop", "mask_token"])
@pytest.mark.slow
def test_batches_of_static_shapes_are_compiled_once(masked_tokens: str) -> None:
    """Four training batches of rows of differing lengths, with different masks: one graph. One more, once, for batches
    in which no row is padded."""
    collator = DataCollatorForSpanJEPA(tiny_tokenizer("bert"), masked_tokens=masked_tokens, max_length=24)
    padded, full = (
        [row for row in corpus_rows("bert", 200) if (len(row["input_ids"]) < 24) is short] for short in (True, False)
    )
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(tiny_jepa("bert", masked_tokens, encoder=ONE_LAYER).train(), backend=counter)
    for kind, graphs in ((padded, 1), (full, 2)):
        for number in range(4):
            collator.epoch = number
            batch = collator.for_training()(kind[4 * number : 4 * number + 4])
            compiled(**batch, num_items_in_batch=batch["target_valid"].sum()).loss.backward()
        assert counter.frame_count == graphs
    torch.compiler.reset()


def assert_compiles_into_one_graph(model: JepaForRepresentationPrediction, batch: dict[str, torch.Tensor]) -> None:
    expected = model(**batch).loss
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(**batch).loss, expected)
    torch.compiler.reset()


@pytest.mark.parametrize("case", ONE_OF_EACH_FAMILY, ids="-".join)
@pytest.mark.parametrize("side", ["left", "right"])
def test_contents_of_padding_have_no_effect(case: tuple[str, str, str], side: str) -> None:
    """Loss and gradients do not depend on the ids under the attention mask, on either side."""
    model, batch = tiny_jepa(*case, mlm_weight=0.5, contrastive_weight=1.0), text_batch(case[0], case[1])
    if side == "left":
        for name in ("input_ids", "attention_mask", "context_input_ids"):
            if name in batch:
                value = 0 if name == "attention_mask" else tiny_tokenizer(case[0]).pad_token_id
                batch[name] = nn.functional.pad(batch[name], (2, 0), value=value)
        for name in ("target", "context"):
            if f"{name}_positions" in batch:
                batch[f"{name}_positions"] = batch[f"{name}_positions"] + 2
    results = []
    for garbage in (None, 7, -100):
        dirty = dict(batch)
        for name in ("input_ids", "context_input_ids"):
            if name in batch and garbage is not None:
                dirty[name] = batch[name].masked_fill(batch["attention_mask"] == 0, garbage)
        model.zero_grad()
        loss = model(**dirty).loss
        loss.backward()
        results.append({"loss": loss.detach(), **gradients(model)})
    for other in results[1:]:
        assert all(torch.equal(value, other[name]) for name, value in results[0].items())


@torch.no_grad()
def test_output_options_are_those_of_transformers() -> None:
    """Call and configuration decide on hidden states, attentions and tuples, as in transformers' models."""
    model, batch = tiny_jepa("bert"), text_batch("bert", "drop")
    for encoder in (model.context_encoder, model.target_encoder):
        encoder.set_attn_implementation("eager")
    expected = model(**batch, output_hidden_states=True, output_attentions=True)
    assert [weights.dim() for weights in (*expected.context_attentions, *expected.target_attentions)] == [4] * 4
    assert expected.to_tuple()[0] is expected["loss"] is expected.loss
    as_tuple = model(**batch, output_hidden_states=True, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], expected.loss)
    model.config.output_hidden_states, model.config.return_dict = True, False
    assert len(model(**batch)) == len(as_tuple)
    assert model(**batch, return_dict=True).context_attentions is None


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda batch: {k: v for k, v in batch.items() if not k.startswith("target")}, "target_positions.*collator"),
        (lambda batch: {k: v for k, v in batch.items() if k != "input_ids"}, "input_ids in the batch"),
        (lambda batch: batch | {"target_positions": batch["target_positions"][:, 0]}, "one shape.*collator"),
        (lambda batch: cut(batch, slice(0, 0)), "no rows"),
    ],
)
def test_incomplete_batch(change: Callable[[Batch], Batch], sentence: str) -> None:
    """A batch that no collator of this package made is refused in a sentence."""
    with pytest.raises(ValueError, match=sentence):
        tiny_jepa("bert")(**change(text_batch("bert", "drop")))
