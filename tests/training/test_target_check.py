"""Tests of `check_targets`: data without targets are refused before a run."""

import io

import numpy as np
import pytest
from datasets import Dataset
from transformers import ViTImageProcessorPil

from helpers.tiny_models import CORPUS, tiny_tokenizer
from jepa_hf import FeatureEncoderConfig, UsageError
from jepa_hf.data.tokenization import tokenize_dataset
from jepa_hf.masking.base_collator import MaskingCollator
from jepa_hf.masking.block_collator import DataCollatorForBlockJEPA
from jepa_hf.masking.feature_collator import DataCollatorForFeatureJEPA
from jepa_hf.masking.span_collator import DataCollatorForSpanJEPA
from jepa_hf.training.checks import check_targets


def text_rows(texts: list[str], max_seq_length: int = 32, word_ids: bool = False) -> Dataset:
    dataset = Dataset.from_dict({"text": texts})
    return tokenize_dataset(dataset, tiny_tokenizer("bert"), max_seq_length=max_seq_length, word_ids=word_ids)


def png() -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "png")
    return file.getvalue()


SPANS = DataCollatorForSpanJEPA(tiny_tokenizer("bert"), on_too_short="skip")
WORDS = DataCollatorForSpanJEPA(tiny_tokenizer("bert"), on_too_short="skip", whole_word=True)
SERIES = DataCollatorForFeatureJEPA(
    FeatureEncoderConfig(2, mode="time", max_position_embeddings=8), on_too_short="skip"
)
BLOCKS = DataCollatorForBlockJEPA(ViTImageProcessorPil(size={"height": 8, "width": 8}), (4, 4))

CASES = {
    "unknown": (SPANS, lambda: text_rows(["你好 世界 你好 世界"] * 40), lambda: text_rows([CORPUS[0]])),
    "short rows": (SPANS, lambda: text_rows(CORPUS[:20], 3), lambda: text_rows(CORPUS[:1])),
    "single words": (WORDS, lambda: text_rows(["velvet", "!"], 9, True), lambda: text_rows(["the falcon"], 9, True)),
    "single steps": (
        SERIES,
        lambda: Dataset.from_dict({"features": np.zeros((20, 1, 2)).tolist()}),
        lambda: Dataset.from_dict({"features": np.zeros((1, 2, 2)).tolist()}),
    ),
    "damaged images": (
        BLOCKS,
        lambda: Dataset.from_dict({"image": [{"bytes": b"no image", "path": None}] * 3}),
        lambda: Dataset.from_dict({"image": [{"bytes": png(), "path": None}]}),
    ),
}


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_data_without_targets(case: str, streaming: bool) -> None:
    """Of every kind are refused with the number of rows; a single row with a target anywhere among them suffices."""
    from datasets import concatenate_datasets

    collator, make_empty, make_good = CASES[case]
    empty, good = make_empty(), make_good()
    mixed = concatenate_datasets([empty, good.cast(empty.features)])
    if streaming:
        empty, mixed = empty.to_iterable_dataset(), mixed.to_iterable_dataset()
    count = len(list(empty))
    with pytest.raises(UsageError, match=f"None of {count:,} rows of the training data has a target to predict. Only "):
        check_targets(empty, collator, "training data")
    check_targets(mixed, collator, "training data")
    with pytest.raises(UsageError, match="rows of the evaluation data 'b' has"):
        check_targets({"a": mixed, "b": empty}, collator, "evaluation data")


def test_stream_without_rows() -> None:
    """Texts without tokens, of a stream, are refused, too."""
    stream = Dataset.from_dict({"text": ["\x00"] * 3}).to_iterable_dataset()
    rows = tokenize_dataset(stream, tiny_tokenizer("bert"), max_seq_length=9)
    with pytest.raises(UsageError, match="The stream of training data has no rows"):
        check_targets(rows, SPANS, "training data")


def test_few_rows_are_read() -> None:
    """Of good data one small batch, of an endless stream without targets 1024 rows."""
    read = []

    class Rows:
        def __init__(self, text: str) -> None:
            self.row = text_rows([text])[0]

        def __len__(self) -> int:
            return 10**6

        def __getitem__(self, index: int) -> dict:
            read.append(index)
            return self.row

    check_targets(Rows(CORPUS[0]), SPANS, "data")
    assert len(read) == 16
    read.clear()
    with pytest.raises(UsageError, match="None of 1,024 rows"):
        check_targets(Rows("你"), SPANS, "data")
    assert (read[0], read[-1]) == (0, 10**6 - 1)


def test_unchecked_data() -> None:
    """No data, a collator of the user's, and an iterator that can be read once are left alone."""
    check_targets(None, SPANS, "data")
    check_targets([{"input_ids": []}], lambda rows: {}, "data")
    once = iter([{"input_ids": [2, 3]}])
    check_targets(once, SPANS, "data")
    assert next(once)
    assert isinstance(SPANS, MaskingCollator)
