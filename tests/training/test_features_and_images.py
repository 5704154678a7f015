"""Claims about the model and the trainer that hold for feature vectors, series and images alike, or set them apart."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, IJepaConfig, ViTImageProcessorPil

from helpers.batches import image_batch, scale_weights
from helpers.runs import Batch, RecordingTrainer, StopAfter, arguments, largest_difference, weights
from jepa_hf import (
    DataCollatorForBlockJEPA,
    DataCollatorForFeatureJEPA,
    JepaConfig,
    JepaForRepresentationPrediction,
    JepaTrainer,
    UsageError,
)
from jepa_hf.training.ema import interpolate_schedule

TINY = {"embed_dim": 32, "predictor_embed_dim": 16, "encoder_depth": 2, "predictor_depth": 2, "num_heads": 4}
MODALITIES = ("patches", "flat", "time", "images")


def config(kind: str, **kwargs: Any) -> JepaConfig:
    if kind == "images":
        encoder = IJepaConfig(
            image_size=8, patch_size=2, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
        )
        return JepaConfig.for_images(encoder, **{"pred_num_hidden_layers": 2, **kwargs})
    return JepaConfig.for_features(10, mode=kind, max_position_embeddings=16, **{**TINY, "dropout": 0.0, **kwargs})


def jepa(kind: str, strong: bool = False, **kwargs: Any) -> JepaForRepresentationPrediction:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = JepaForRepresentationPrediction(config(kind, **kwargs))
    if strong:
        scale_weights(model)
    return model


def samples(kind: str, count: int = 24) -> list[dict[str, Any]]:
    draw = np.random.default_rng(0)
    if kind == "images":
        return [{"image": Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8))} for _ in range(count)]
    if kind == "time":
        return [{"features": draw.normal(size=(4 + n % 9, 10)).astype(np.float32)} for n in range(count)]
    return [{"features": draw.normal(size=10).astype(np.float32)} for _ in range(count)]


def processor() -> ViTImageProcessorPil:
    return ViTImageProcessorPil(size={"height": 8, "width": 8})


def trainer(
    kind: str, folder: Path, data: Any = None, cls: type[JepaTrainer] = RecordingTrainer, **overrides: Any
) -> Any:
    """A trainer that makes its own collator."""
    return cls(
        jepa(kind),
        arguments(folder, **overrides),
        train_dataset=samples(kind) if data is None else data,
        processing_class=processor() if kind == "images" else None,
    )


# ---- defaults


def test_each_objective_has_its_defaults_and_text_keeps_its_own() -> None:
    images, features = JepaConfig.for_images(), JepaConfig.for_features(10)
    assert (images.average_top_k_layers, images.target_norm, images.loss) == (1, "layer", "smooth_l1")
    assert (images.pred_num_hidden_layers, images.masked_tokens) == (6, "drop")
    assert images.ema_decay_range == (0.996, 1.0)
    assert (features.average_top_k_layers, features.pred_dropout, features.masked_tokens) == (1, 0.1, "drop")
    text = JepaConfig.for_encoder({"model_type": "bert"})
    assert text.to_dict() == JepaConfig({"model_type": "bert"}).to_dict()
    assert text.ema_decay_range is None


def test_explicit_values_win_over_an_objective_s_defaults() -> None:
    images = JepaConfig.for_images(average_top_k_layers=5, pred_num_hidden_layers=2)
    assert (images.average_top_k_layers, images.pred_num_hidden_layers) == (5, 2)


@pytest.mark.parametrize(("kind", "expected"), [("images", [0.996, 0.998, 1.0]), ("patches", [0.996] * 3)])
def test_the_ema_defaults_to_that_of_the_objective_s_authors(kind: str, expected: list[float], tmp_path: Path) -> None:
    run = trainer(kind, tmp_path, max_steps=3)
    run.train()
    assert [entry["ema_decay"] for entry in run.state.log_history if "ema_decay" in entry] == pytest.approx(expected)
    run = trainer(kind, tmp_path, max_steps=2, ema_decay=0.9)
    run.train()
    assert [entry["ema_decay"] for entry in run.state.log_history if "ema_decay" in entry] == [0.9, 0.9]


@pytest.mark.parametrize(
    ("kind", "changes", "sentence"),
    [
        ("images", {"masked_tokens": "mask_token"}, "which have no \\[MASK\\] token"),
        ("flat", {"masked_tokens": "drop"}, "has one position only"),
        ("columns", {}, "mode must be one of"),
    ],
)
def test_what_an_encoder_cannot_do_is_refused(kind: str, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        config(kind, **changes)


# ---- the model


def batch_of(kind: str, model: JepaForRepresentationPrediction, count: int = 6, **kwargs: Any) -> Batch:
    if kind == "images":
        return image_batch(count)
    collator = DataCollatorForFeatureJEPA(
        model.config.encoder_config, masked_tokens=model.config.masked_tokens, mask_ratio=0.4, **kwargs
    )
    return collator(samples(kind, count))


@pytest.mark.parametrize("kind", MODALITIES)
def test_every_trainable_parameter_gets_a_gradient(kind: str) -> None:
    """DDP waits for each of them. (With a single token, attention is the identity: query and key get zeros.)"""
    model = jepa(kind, strong=True).train()
    model(**batch_of(kind, model)).loss.backward()
    missing = [name for name, value in model.named_parameters() if value.requires_grad and value.grad is None]
    assert missing == []


@pytest.mark.parametrize("kind", MODALITIES)
def test_the_loss_is_the_mean_over_valid_targets(kind: str) -> None:
    model = jepa(kind, strong=True).eval()
    output = model(**batch_of(kind, model))
    valid = output.target_valid
    expected = torch.nn.functional.smooth_l1_loss(output.predictions[valid], output.targets[valid])
    torch.testing.assert_close(output.loss, expected)
    assert output.num_targets == valid.sum()


@pytest.mark.parametrize("kind", ["patches", "time", "images"])
def test_pool_targets_are_the_mean_of_each_mask_s_targets(kind: str) -> None:
    """One guess and one target per mask; the loss is the mean over masks."""
    each, pooled = jepa(kind, strong=True).eval(), jepa(kind, strong=True, pool_targets=True).eval()
    batch = batch_of(kind, each)
    single, several = pooled(**batch), each(**batch)
    weight = several.target_valid[..., None].float()
    for one, many in ((single.targets, several.targets), (single.predictions, several.predictions)):
        assert one.shape[2] == 1
        torch.testing.assert_close(one[:, :, 0], (many * weight).sum(2) / weight.sum(2).clamp_min(1))
    assert single.num_targets == several.target_valid.any(-1).sum()


@pytest.mark.parametrize("kind", ["patches", "time"])
def test_dropping_is_kept_with_hidden_positions_left_out(kind: str) -> None:
    """The context encoder's states at visible positions do not depend on what the hidden ones hold."""
    model = jepa(kind, strong=True).eval()
    batch = batch_of(kind, model, 5)
    changed = batch["features"].clone()
    hidden = torch.zeros(len(changed), changed.shape[1] if kind == "time" else 10, dtype=torch.bool)
    hidden.scatter_(1, batch["target_positions"][:, 0], batch["target_valid"][:, 0])
    changed[hidden] = 100.0
    states = [
        model(**{**batch, "features": features}, output_hidden_states=True).context_state
        for features in (batch["features"], changed)
    ]
    seen = batch["context_valid"][:, 0]
    torch.testing.assert_close(states[0][seen], states[1][seen])
    assert not changed.equal(batch["features"])


@pytest.mark.parametrize("kind", ["patches", "time", "flat"])
def test_standardisation_is_part_of_the_model_and_is_saved(kind: str, tmp_path: Path) -> None:
    model = jepa(kind, strong=True).eval()
    mean, std = torch.randn(10), torch.rand(10) + 0.5
    plain = batch_of(kind, model)
    raw = {name: value * std + mean if name.endswith("features") else value for name, value in plain.items()}
    before = model(**plain).loss
    model.set_standardization(mean, std)
    torch.testing.assert_close(model(**raw).loss, before, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = JepaForRepresentationPrediction.from_pretrained(tmp_path)
    torch.testing.assert_close(again(**raw).loss, before, rtol=1e-4, atol=1e-5)
    for encoder in (again.context_encoder, again.target_encoder):
        assert encoder.feature_mean.equal(mean)


@pytest.mark.parametrize("kind", MODALITIES)
def test_saving_and_loading_changes_nothing(kind: str, tmp_path: Path) -> None:
    model = jepa(kind, strong=True).eval()
    batch = batch_of(kind, model)
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert isinstance(again, JepaForRepresentationPrediction)
    assert largest_difference(weights(model), weights(again)) == 0
    assert again(**batch).loss.equal(model(**batch).loss)


# ---- the trainer


@pytest.mark.parametrize("kind", MODALITIES)
def test_the_trainer_makes_the_collator_that_the_model_needs(kind: str, tmp_path: Path) -> None:
    run = trainer(kind, tmp_path, max_steps=2)
    expected = DataCollatorForBlockJEPA if kind == "images" else DataCollatorForFeatureJEPA
    assert type(run.data_collator) is expected
    before = weights(run.model)
    run.train()
    after = weights(run.model)
    assert any(not before[name].equal(after[name]) for name in before if name.startswith("context_encoder"))


def test_an_image_model_without_processor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs an image processor"):
        JepaTrainer(jepa("images"), arguments(tmp_path), train_dataset=samples("images"))


@pytest.mark.parametrize("kind", MODALITIES)
def test_a_resumed_run_ends_with_the_same_weights(kind: str, tmp_path: Path) -> None:
    """Over two epochs, with a weight decay that moves."""
    settings = {"save_strategy": "steps", "save_steps": 2, "weight_decay": 0.04, "weight_decay_end": 0.4}
    undisturbed = trainer(kind, tmp_path / "whole", max_steps=5, **settings)
    undisturbed.train()
    run = trainer(kind, tmp_path / "cut", max_steps=5, **settings)
    run.add_callback(StopAfter(2))
    run.train()
    again = trainer(kind, tmp_path / "cut", max_steps=5, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "cut/checkpoint-2"))
    assert largest_difference(weights(again.model), weights(undisturbed.model)) == 0


def test_a_checkpoint_of_another_model_is_not_resumed_from(tmp_path: Path) -> None:
    """Trainer alone would warn and train on with random weights."""
    run = trainer("patches", tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    run.train()
    other = trainer("flat", tmp_path, max_steps=2)
    with pytest.raises(UsageError, match="holds another model"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_weight_decay_moves_along_a_cosine_for_matrices_only(tmp_path: Path) -> None:
    run = trainer("images", tmp_path, max_steps=4, weight_decay=0.04, weight_decay_end=0.4)
    seen: list[list[float]] = []

    class Look(StopAfter):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append([group["weight_decay"] for group in kwargs["optimizer"].param_groups])

    run.add_callback(Look(99))
    run.train()
    assert [decay for decay, _ in seen] == pytest.approx(
        [interpolate_schedule(n, 4, 0.04, 0.4, "cosine") for n in (1, 2, 3, 4)]
    )
    assert [rest for _, rest in seen] == [0.0] * 4
    assert seen[0][0] == pytest.approx(0.04)
    assert seen[-1][0] == pytest.approx(0.4)


@pytest.mark.parametrize(("kind", "expected"), [("images", 8 * 16), ("patches", 8 * 10), ("flat", 8)])
def test_positions_are_counted_as_tokens_read(kind: str, expected: int, tmp_path: Path) -> None:
    run = trainer(kind, tmp_path, max_steps=2)
    run.train()
    assert run.state.num_input_tokens_seen == 2 * expected


def test_steps_of_series_are_counted_without_padding(tmp_path: Path) -> None:
    run = trainer("time", tmp_path, max_steps=3)
    run.train()
    assert run.state.num_input_tokens_seen == sum(len(row["features"]) for row in samples("time"))


def test_accumulation_changes_nothing_with_pool_targets(tmp_path: Path) -> None:
    """The loss is divided by the number of masks, not of positions."""
    losses = []
    for size, accumulation in ((8, 1), (2, 4)):
        run = RecordingTrainer(
            jepa("time", pool_targets=True),
            arguments(
                tmp_path, max_steps=2, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation
            ),
            train_dataset=samples("time"),
        )
        run.train()
        losses.append(run.losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# ---- what does not go together


def test_pool_targets_and_a_loss_over_tokens_are_refused_together() -> None:
    with pytest.raises(UsageError, match="pool_targets has one target per mask"):
        JepaConfig({"model_type": "bert"}, pool_targets=True, mlm_weight=0.5)


def test_normalising_over_a_single_position_is_refused() -> None:
    """Every target would be zero."""
    with pytest.raises(UsageError, match="this encoder has one only"):
        config("flat", target_norm="instance")


def test_images_of_another_size_are_refused() -> None:
    """DINOv2 would stretch its positions and read other patches than the collator counted."""
    model = jepa("images")
    batch = image_batch()
    batch["pixel_values"] = torch.zeros(2, 3, 16, 16)
    with pytest.raises(UsageError, match=r"8 x 8 pixels.* got 16 x 16"):
        model(**batch)
