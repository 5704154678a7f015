"""The claims behind all others: pretraining makes representations that a linear classifier reads better than before,
and a predictor learns what stands at a hidden position."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import set_seed

from helpers.tiny_models import tiny_config, tiny_tokenizer
from jepa_hf import (
    DataCollatorForFeatureJEPA,
    DataCollatorForSpanJEPA,
    FeatureEncoderModel,
    JepaConfig,
    JepaForRepresentationPrediction,
    JepaTrainer,
    JepaTrainingArguments,
)
from jepa_hf.monitoring.metrics import mean_pool_by_sample

DIGITS = load_digits()
# 64 grey values; a row of the image is a patch of eight.
PIXELS, LABELS = DIGITS.data.astype(np.float32), DIGITS.target
TRAIN, TEST = train_test_split(np.arange(len(LABELS)), test_size=1 / 3, random_state=0, stratify=LABELS)
# Six seeds went from 79.1 to 85.7 % with ten labels a class, from 92.1 to 94.9 % with all; least gains asserted:
FEW_LABELS_GAIN, ALL_LABELS_GAIN = 0.03, 0.01


@torch.no_grad()
def pooled(encoder: FeatureEncoderModel) -> np.ndarray:
    """The frozen, mean-pooled representation of every digit."""
    return encoder.eval()(torch.from_numpy(PIXELS)).pooler_output.numpy()


def accuracy(vectors: np.ndarray, labelled: np.ndarray) -> float:
    """Of logistic regression on standardised vectors: fitted on the labelled rows, scored on the test rows."""
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return classifier.fit(vectors[labelled], LABELS[labelled]).score(vectors[TEST], LABELS[TEST])


def accuracies(encoder: FeatureEncoderModel) -> tuple[float, float]:
    """With ten labels a class, mean of five draws, and with all labels of the training rows."""
    vectors = pooled(encoder)
    draws = [train_test_split(TRAIN, train_size=100, random_state=n, stratify=LABELS[TRAIN])[0] for n in range(5)]
    return float(np.mean([accuracy(vectors, labelled) for labelled in draws])), accuracy(vectors, TRAIN)


def before_and_after(folder: Path, seed: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """Accuracies of the context encoder at its random start, and after pretraining on the training images."""
    set_seed(seed)
    config = JepaConfig.for_features(
        input_dim=64,
        patch_size=8,
        embed_dim=32,
        encoder_depth=3,
        num_heads=4,
        predictor_embed_dim=32,
        predictor_depth=2,
        dropout=0.0,
        variance_weight=4.0,
        covariance_weight=1.0,
    )
    model = JepaForRepresentationPrediction(config)
    mean, std = PIXELS[TRAIN].mean(axis=0), PIXELS[TRAIN].std(axis=0)
    model.set_standardization(torch.from_numpy(mean), torch.from_numpy(np.where(std == 0, 1, std)))
    before = accuracies(model.get_encoder("context"))
    arguments = JepaTrainingArguments(
        str(folder),
        max_steps=300,
        per_device_train_batch_size=64,
        learning_rate=2e-3,
        warmup_steps=0.1,
        lr_scheduler_type="cosine",
        weight_decay=0.05,
        ema_decay=0.95,
        ema_decay_end=1.0,
        health_steps=0,
        seed=seed,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
    )
    collator = DataCollatorForFeatureJEPA(config.encoder_config, mask_ratio=0.5, seed=seed)
    rows = [{"features": PIXELS[index]} for index in TRAIN]
    JepaTrainer(model, arguments, collator, train_dataset=rows).train()
    return before, accuracies(model.get_encoder("context"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_pretraining_on_digits_beats_the_same_network_at_its_random_start(tmp_path: Path) -> None:
    """On test images that nothing was fitted to, mean of two seeds: by 3 points with ten labels a class, by one
    with all labels. (Three seeds gained 5.8, 4.5 and 4.8, and 4.0, 1.5 and 2.3.)"""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        runs = [before_and_after(tmp_path, seed) for seed in range(2)]
    finally:
        torch.set_num_threads(threads)
    (few_before, all_before), (few_after, all_after) = np.mean(runs, axis=0)
    assert few_before > 0.6, "a random start that reads nothing would be no opponent"
    assert few_after > few_before + FEW_LABELS_GAIN, runs
    assert all_after > all_before + ALL_LABELS_GAIN, runs


def accuracy_on_pairs(folder: Path) -> float:
    """Train on rows of eight pairs (a, f(a)), f a permutation of twelve tokens, and name hidden tokens of other rows.

    Returns:
        how often the class mean of targets that is nearest to a prediction is that of the hidden token.
    """
    steps, batch, tokens = 600, 32, 12
    rng = np.random.default_rng(0)
    image = rng.permutation(tokens)
    drawn = rng.integers(tokens, size=(256 + steps * batch, 8))
    # Tokens 100 to 111 of the tokenizer, none of them special.
    pairs = 100 + np.stack([drawn, image[drawn]], axis=2).reshape(len(drawn), 16)
    rows = [{"input_ids": row} for row in pairs]
    set_seed(0)
    encoder = tiny_config("modernbert", num_hidden_layers=2, max_position_embeddings=16)
    config = JepaConfig(encoder, pred_num_hidden_layers=1, target_norm="instance", contrastive_weight=0.0)
    model = JepaForRepresentationPrediction(config)
    # Two or three tokens of a row are hidden, so most of their partners are visible.
    collator = DataCollatorForSpanJEPA(tiny_tokenizer("modernbert"), mask_ratio=0.15, mean_span_length=1)
    arguments = JepaTrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=5e-3,
        warmup_steps=0.05,
        lr_scheduler_type="cosine",
        health_steps=0,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
    )
    JepaTrainer(model, arguments, collator, train_dataset=rows[256:]).train()
    held_out = collator.for_evaluation()(rows[:256])
    with torch.no_grad():
        output = model.eval()(**held_out, return_loss=False)
    valid = output.target_valid
    hidden = held_out["input_ids"].gather(1, held_out["target_positions"][:, 0])[valid[:, 0]] - 100
    class_means = mean_pool_by_sample(output.targets[valid], hidden)
    assert len(class_means) == tokens
    nearest = torch.cdist(output.predictions[valid], class_means).argmin(dim=1)
    return (nearest == hidden).float().mean().item()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_predictor_learns_that_a_hidden_token_is_a_function_of_its_neighbour(tmp_path: Path) -> None:
    """More than half of the hidden tokens are named: 0.74 of them, by chance 0.08.

    Without rotary angles and with `pred_init="small"` it was 0.16: the content of a row without its order.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        accuracy = accuracy_on_pairs(tmp_path)
    finally:
        torch.set_num_threads(threads)
    assert accuracy > 0.5, accuracy
