"""Claims about suggestions for misspelt keyword arguments."""

import copy
import pickle
from typing import Any

import pytest

from helpers import llm
from helpers.tiny_models import tiny_tokenizer
from jepa_hf import DataCollatorForSpanJEPA, JepaTrainer, JepaTrainingArguments, UsageError
from jepa_hf.llm_jepa import DataCollatorForPairedViews, LlmJepaTrainer, LlmJepaTrainingArguments, PairedViewTokenizer


@pytest.mark.parametrize(
    ("kind", "misspelt", "meant"),
    [
        (DataCollatorForSpanJEPA, "mask_ration", "mask_ratio"),
        (DataCollatorForPairedViews, "view_pass", "view_passes"),
        (JepaTrainer, "proccessing_class", "processing_class"),  # of the base's `**kwargs`
        (JepaTrainer, "optimizer_cls_and_kwarg", "optimizer_cls_and_kwargs"),  # of `Trainer`
        (LlmJepaTrainer, "view_tokeniser", "view_tokenizer"),
        (JepaTrainingArguments, "lerning_rate", "learning_rate"),
        (LlmJepaTrainingArguments, "jepa_wait", "jepa_weight"),
    ],
)
def test_a_misspelt_argument_is_refused_with_the_nearest_name(kind: Any, misspelt: str, meant: str) -> None:
    with pytest.raises(UsageError, match=rf"{kind.__name__} has no argument '{misspelt}'\. Did you mean {meant}\?"):
        kind(**{misspelt: 1})


@pytest.mark.parametrize(
    ("kind", "argument", "place"),
    [
        (JepaTrainingArguments, "contrastive_weight", "JepaConfig, from_encoder_pretrained or pretrain"),
        (JepaTrainingArguments, "mask_ratio", "the data collator"),
        (JepaTrainingArguments, "jepa_weight", "LlmJepaTrainingArguments"),
        (JepaTrainer, "learning_rate", "JepaTrainingArguments"),
        (JepaTrainer, "mlm_weight", "JepaConfig"),
        (DataCollatorForSpanJEPA, "ema_decay", "JepaTrainingArguments"),
        (LlmJepaTrainingArguments, "contrastive_weight", "JepaConfig, .*, for a JEPA of an encoder"),
        (LlmJepaTrainingArguments, "num_predictor_tokens", "PairedViewTokenizer"),
        (LlmJepaTrainingArguments, "health_steps", "JepaTrainingArguments"),
        (LlmJepaTrainer, "ema_decay", "LlmJepaTrainingArguments"),
        (LlmJepaTrainer, "learning_rate", "LlmJepaTrainingArguments"),
        (PairedViewTokenizer, "jepa_weight", "LlmJepaTrainingArguments"),
        (DataCollatorForPairedViews, "pair_loss", "LlmJepaTrainingArguments"),
    ],
)
def test_an_argument_of_another_class_is_refused_with_its_place(kind: Any, argument: str, place: str) -> None:
    with pytest.raises(UsageError, match=rf"^{kind.__name__} has no argument '{argument}'\. Pass it to {place}"):
        kind(**{argument: 1})


def test_an_argument_like_no_other_is_refused_in_a_short_message() -> None:
    """Of more than 130 training arguments none is named if none is near."""
    with pytest.raises(UsageError, match=r"no argument 'qqqq'\. Omit it\.$"):
        JepaTrainingArguments(qqqq=1)  # type: ignore[call-arg]


def test_collators_are_still_copied_and_pickled() -> None:
    """Workers receive pickles, and evaluations copies."""
    collator = DataCollatorForSpanJEPA(tiny_tokenizer("bert"), mask_ratio=0.25)
    assert copy.copy(collator).mask_ratio == pickle.loads(pickle.dumps(collator)).mask_ratio == 0.25
    paired = DataCollatorForPairedViews(llm.tokenizer(), "separate")
    assert copy.copy(paired).view_passes == "separate"
