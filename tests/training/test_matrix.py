"""Every family with each context mode and predictor, with and without MLM head: trains, saves, loads; or is refused.

In bfloat16 with the head, whose passes include those without it.
"""

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, pipeline

from helpers.batches import ATTENTION_IMPLEMENTATIONS, rows
from helpers.tiny_models import FAMILIES, tiny_config, tiny_tokenizer
from jepa_hf import (
    DataCollatorForSpanJEPA,
    JepaConfig,
    JepaForRepresentationPrediction,
    JepaTrainer,
    JepaTrainingArguments,
    UsageError,
)

EVERYTHING = [
    (family, mode, predictor)
    for family in FAMILIES
    for mode in ("mask_token", "drop")
    for predictor in ("mlp", "transformer")
]


@pytest.mark.parametrize("case", [case for case in EVERYTHING if case not in ATTENTION_IMPLEMENTATIONS], ids="-".join)
@pytest.mark.parametrize("mlm_weight", [0.0, 0.5])
def test_what_cannot_work_is_refused_before_anything_is_built(case: tuple[str, str, str], mlm_weight: float) -> None:
    family, mode, predictor = case
    assert mode == "drop"
    with pytest.raises(UsageError, match="--masked_tokens mask_token"):
        JepaConfig(tiny_config(family), masked_tokens=mode, predictor_type=predictor, mlm_weight=mlm_weight)


@pytest.mark.parametrize(
    ("mlm_weight", "bf16"),
    [
        pytest.param(0.0, False, id="0.0-fp32", marks=pytest.mark.slow),
        pytest.param(0.5, False, id="0.5-fp32"),
        pytest.param(0.5, True, id="0.5-bf16", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id="-".join(case), marks=[pytest.mark.slow] if case[2] == "mlp" else [])
        for case in ATTENTION_IMPLEMENTATIONS
    ],
)
def test_it_trains_saves_and_loads(case: tuple[str, str, str], mlm_weight: float, bf16: bool, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer  # takes seconds

    family, mode, predictor = case
    torch.manual_seed(0)
    config = JepaConfig(
        tiny_config(family),
        masked_tokens=mode,
        predictor_type=predictor,
        pred_num_hidden_layers=1,
        mlm_weight=mlm_weight,
    )
    model = JepaForRepresentationPrediction(config)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = JepaTrainer(
        model,
        JepaTrainingArguments(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            bf16=bf16,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            logging_steps=1,
            save_strategy="no",
        ),
        train_dataset=rows(family, 8),
        processing_class=tiny_tokenizer(family),
    )
    trainer.train()
    trainer.save_model()

    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    losses = [entry["loss"] for entry in logs]
    assert len(losses) == 2
    assert all(torch.tensor(losses).isfinite())
    assert ("mlm_loss" in logs[0]) == (mlm_weight > 0)
    # Both encoders have moved, and weights are float32 whatever the precision of the arithmetic.
    for encoder in ("context_encoder", "target_encoder"):
        moved = [n for n, p in model.named_parameters() if n.startswith(encoder) and not torch.equal(p, before[n])]
        assert moved
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}

    loaded = JepaForRepresentationPrediction.from_pretrained(tmp_path / "jepa")
    batch = DataCollatorForSpanJEPA(tiny_tokenizer(family), masked_tokens=mode)(rows(family, 4))
    with torch.no_grad():
        autocast, theirs = model.eval()(**batch), loaded(**batch)
        ours = trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)(**batch)
    for name in ("predictions", "targets", "loss"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))
    # The proof that bfloat16 was really used, and only where it was asked for.
    assert torch.equal(autocast.predictions, ours.predictions) == (not bf16)

    text = "The amber lantern drifts."
    tokens = tiny_tokenizer(family)(text, return_tensors="pt")
    inputs = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    folder = str(tmp_path)
    extract = pipeline("feature-extraction", model=folder, device="cpu")
    with torch.no_grad():
        expected = model.context_encoder(**inputs).last_hidden_state[0]
        assert torch.equal(AutoModel.from_pretrained(folder)(**inputs).last_hidden_state[0], expected)
        classifier = AutoModelForSequenceClassification.from_pretrained(folder)
        assert torch.equal(classifier.base_model(**inputs).last_hidden_state[0], expected)
    torch.testing.assert_close(torch.tensor(extract(text)[0]), expected, rtol=1e-4, atol=1e-4)
    embedding = torch.tensor(SentenceTransformer(folder, device="cpu").encode(text))
    torch.testing.assert_close(embedding, expected.mean(dim=0), rtol=1e-4, atol=1e-4)
