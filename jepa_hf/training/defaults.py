"""Defaults of `JepaTrainer`'s arguments: processing class, collator, tokenized rows."""

from collections.abc import Sequence
from typing import Any, cast

import datasets
from transformers import AutoImageProcessor, AutoTokenizer, BaseImageProcessor, PreTrainedTokenizerBase

from ..data.tokenization import tokenize_dataset
from ..errors import UsageError
from ..masking.base_collator import MaskingCollator
from ..masking.block_collator import DataCollatorForBlockJEPA
from ..masking.feature_collator import DataCollatorForFeatureJEPA
from ..masking.span_collator import DataCollatorForSpanJEPA
from ..models.modeling_jepa import JepaForRepresentationPrediction

Processor = PreTrainedTokenizerBase | BaseImageProcessor


def load_processing_class(name: str, modality: str) -> Processor | None:
    """Load a model's tokenizer or image processor; feature vectors need none."""
    if modality == "features":
        return None
    return (AutoTokenizer if modality == "text" else AutoImageProcessor).from_pretrained(name)


def default_collator(
    model: JepaForRepresentationPrediction, processing_class: Processor | None, seed: int
) -> MaskingCollator:
    """Build the collator for the model's modality.

    Raises:
        UsageError: Texts without a tokenizer, or images without an image processor.
    """
    adapter, mode = model.encoder_adapter, model.config.masked_tokens
    config = cast(Any, adapter.config)
    if adapter.modality == "features":
        fill_values = cast(Any, model.context_encoder).feature_mean.numpy(force=True)
        return DataCollatorForFeatureJEPA(config, masked_tokens=mode, fill_values=fill_values, seed=seed)
    if processing_class is None:
        processor = "a tokenizer" if adapter.modality == "text" else "an image processor"
        raise UsageError(f"JepaTrainer needs {processor} (processing_class=...) or a data_collator.")
    if adapter.modality == "images":
        image_processor, grid = cast(BaseImageProcessor, processing_class), cast(tuple[int, int], adapter.grid)
        return DataCollatorForBlockJEPA(image_processor, grid, num_channels=config.num_channels, seed=seed)
    return DataCollatorForSpanJEPA(cast(PreTrainedTokenizerBase, processing_class), masked_tokens=mode, seed=seed)


def is_packed(dataset: Any) -> bool:
    """Return whether rows may hold several documents; False for a stream without known columns."""
    if isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
        return "document_ids" in (dataset.column_names or ())
    return isinstance(dataset, Sequence) and len(dataset) > 0 and "document_ids" in dataset[0]


def tokenized(dataset: Any, tokenizer: PreTrainedTokenizerBase, max_seq_length: int, word_ids: bool) -> Any:
    """Tokenize rows of text; pass on None, rows of token ids, and data sets of other kinds.

    Args:
        dataset: Rows, or a dictionary of data sets.
        tokenizer: The tokenizer.
        max_seq_length: Maximum number of tokens in a row; longer texts are truncated.
        word_ids: Add the column of word indices, for masking of complete words.

    Raises:
        UsageError: The data set has neither a column `input_ids` nor `text`.
    """
    if dataset is None:
        return None
    if isinstance(dataset, dict):
        return {name: tokenized(part, tokenizer, max_seq_length, word_ids) for name, part in dataset.items()}
    if isinstance(dataset, Sequence) and not isinstance(dataset, (datasets.Dataset, str)) and len(dataset):
        first = dataset[0]
        if isinstance(first, str):
            dataset = datasets.Dataset.from_dict({"text": list(dataset)})
        elif isinstance(first, dict) and "text" in first:
            dataset = datasets.Dataset.from_list(list(dataset))
    if not isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
        return dataset
    columns = dataset.column_names
    if columns is None:
        columns = list(next(iter(dataset)))
    if "input_ids" in columns:
        return dataset
    if "text" not in columns:
        raise UsageError(
            f"The data set has neither a column input_ids nor text, only {', '.join(columns)}. Rename the column of "
            "texts to text."
        )
    return tokenize_dataset(dataset, tokenizer, max_seq_length=max_seq_length, word_ids=word_ids)
