"""Claims about suggestions for misspelt keyword arguments."""

import copy
import pickle
from typing import Any

import pytest

from helpers import llm
from helpers.tiny_models import tiny_tokenizer
from jepa_hf import DataCollatorForSpanJEPA, JepaTrainer, JepaTrainingArguments, UsageError
from jepa_hf.llm_jepa import DataCollatorForPairedViews, LlmJepaTrainer, LlmJepaTrainingArguments


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


def test_collators_are_still_copied_and_pickled() -> None:
    """Workers receive pickles, and evaluations copies."""
    collator = DataCollatorForSpanJEPA(tiny_tokenizer("bert"), mask_ratio=0.25)
    assert copy.copy(collator).mask_ratio == pickle.loads(pickle.dumps(collator)).mask_ratio == 0.25
    paired = DataCollatorForPairedViews(llm.tokenizer(), "separate")
    assert copy.copy(paired).view_passes == "separate"
