"""Arguments, models, rows and collators in the forms that users of `Trainer` pass."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import islice
from typing import Any, TypeVar, cast

import datasets
import pandas as pd
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import has_length

from ..data.splits import dataset_from_pandas
from ..data.tokenization import num_token_ids, tokenize_dataset
from ..errors import UsageError
from ..models.configuration_jepa import JepaConfig
from ..models.encoders import untrained_pooler
from ..models.modeling_jepa import JepaForRepresentationPrediction
from ..utils.counts import counted
from .training_args import BaseJepaTrainingArguments

Arguments = TypeVar("Arguments", bound=BaseJepaTrainingArguments)


def resolve_arguments(args: TrainingArguments | None, kind: type[Arguments]) -> Arguments:
    """Return arguments of the trainer's own class, `kind`.

    None stands for all defaults. Of plain `TrainingArguments` the values that differ from their defaults are taken.
    """
    if args is None:
        return kind()
    if isinstance(args, kind):
        return args
    if isinstance(args, BaseJepaTrainingArguments):
        raise UsageError(f"args must be {kind.__name__}, not {type(args).__name__}. Those are for another trainer.")
    defaults = TrainingArguments(output_dir=args.output_dir, use_cpu=args.use_cpu)
    names = [item.name for item in fields(TrainingArguments) if item.init]
    changed = {name: getattr(args, name) for name in names if getattr(args, name) != getattr(defaults, name)}
    return kind(**{"output_dir": args.output_dir, "use_cpu": args.use_cpu, **changed})


def jepa_around(model: nn.Module) -> JepaForRepresentationPrediction:
    """Return a JEPA as it is; build one around a copy of an encoder, plain or with a task head.

    Raises:
        UsageError: The model is not one of transformers, or its family has no adapter.
    """
    if isinstance(model, JepaForRepresentationPrediction):
        return model
    if not isinstance(model, PreTrainedModel):
        raise UsageError(f"model must be a transformers model or a name, not {type(model).__name__}.")
    encoder: Any = model.base_model
    config = JepaConfig.for_encoder(copy.deepcopy(encoder.config), pretrained_encoder=bool(encoder.name_or_path))
    config.name_or_path = encoder.name_or_path
    jepa = JepaForRepresentationPrediction._from_config(
        config, attn_implementation=encoder.config._attn_implementation, dtype=encoder.dtype
    )
    own = encoder.state_dict()
    has_own_pooler = any(
        name in own and not own[name].cpu().equal(value) for name, value in untrained_pooler(encoder).items()
    )
    for part in (jepa.context_encoder, jepa.target_encoder):
        missing, _ = part.load_state_dict(own, strict=False)
        if missing:
            raise UsageError(f"{type(model).__name__} lacks the weights {', '.join(missing[:3])} of its encoder.")
        if has_own_pooler:
            part.pooler = copy.deepcopy(encoder.pooler)
    jepa.config.add_pooling_layer = has_own_pooler  # exported with the encoder, as it is
    frozen = {name for name, parameter in encoder.named_parameters() if not parameter.requires_grad}
    for name, parameter in jepa.context_encoder.named_parameters():
        parameter.requires_grad_(name not in frozen)
    return jepa.eval()


def check_optimizer(optimizer: torch.optim.Optimizer | None, model: nn.Module) -> None:
    """Refuse an optimizer of other parameters than the model's, which would train nothing of it.

    Raises:
        UsageError: It holds a parameter that the model does not have.
    """
    if optimizer is None:
        return
    known = set(map(id, model.parameters()))
    unknown = [value for group in optimizer.param_groups for value in group["params"] if id(value) not in known]
    if unknown:
        raise UsageError(
            f"optimizers holds {counted(len(unknown), 'parameter')} that the trained model does not have, because a "
            "JEPA is built around a copy of an encoder. Pass a JepaForRepresentationPrediction and an optimizer of its "
            "parameters, or optimizer_cls_and_kwargs."
        )


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: JepaForRepresentationPrediction) -> None:
    """Refuse a tokenizer with more tokens than the model has embeddings."""
    tokens, embeddings = num_token_ids(tokenizer), cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    if tokens > embeddings:
        raise UsageError(
            f"The tokenizer has {tokens:,} tokens, but the model only {embeddings:,} embeddings. Use the model's "
            f"tokenizer, or call model.resize_token_embeddings({tokens})."
        )


def check_collator(collator: Any, remedy: str) -> None:
    """Refuse transformers' own collators, which make no views."""
    name = getattr(collator, "__name__", type(collator).__name__)
    if getattr(collator, "__module__", "").partition(".")[0] in ("transformers", "trl", "sentence_transformers"):
        raise UsageError(f"data_collator {name} makes no views of a row. Leave it out, or use {remedy}.")


def check_batch(batch: dict[str, Any], needed: Sequence[str]) -> None:
    """Check the entries of a collated batch."""
    missing = [name for name in needed if name not in batch]
    if missing:
        raise UsageError(
            f"The data_collator must make {', '.join(needed)}, but its batches have no {missing[0]}, only "
            f"{', '.join(batch)}. Use the trainer's default collator, or add the entry."
        )


# ---- rows


def check_single_split(dataset: Any) -> None:
    """Refuse several splits where one data set is needed."""
    if isinstance(dataset, dict):
        names = ", ".join(map(repr, dataset))
        raise UsageError(
            f"train_dataset must be one data set, not a {type(dataset).__name__} of {names}. Pass one of them, as in "
            f"train_dataset=data[{next(iter(dataset), 'train')!r}]."
        )


def without_pandas(dataset: Any) -> Any:
    """Convert a DataFrame, also one of several data sets by name, to a data set; return others unchanged."""
    if isinstance(dataset, dict):
        return {name: without_pandas(part) for name, part in dataset.items()}
    return dataset_from_pandas(dataset, "The data set") if isinstance(dataset, pd.DataFrame) else dataset


def is_packed(dataset: Any) -> bool:
    """Return whether rows may hold several documents; False for a stream without known columns."""
    if isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
        return "document_ids" in (dataset.column_names or ())
    return isinstance(dataset, Sequence) and len(dataset) > 0 and "document_ids" in dataset[0]


def tokenized(dataset: Any, tokenizer: PreTrainedTokenizerBase, max_seq_length: int, word_ids: bool) -> Any:
    """Tokenize rows of text; pass on None, names of data sets, and rows of token ids.

    Raises:
        UsageError: The data set has neither a column `input_ids` nor `text`, or a text is not a string.
    """
    if dataset is None or isinstance(dataset, str):
        return dataset
    if not isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
        first = next(iterate_rows(dataset), None)
        if first is None or (isinstance(first, Mapping) and "input_ids" in first):
            return dataset
        dataset = _as_text_dataset(dataset)
    columns = dataset.column_names
    if columns is None:
        columns = list(next(iter(dataset), ()))
    if "input_ids" in columns:
        return dataset
    if "text" not in columns:
        raise UsageError(
            f"The data set has neither a column input_ids nor text, only {', '.join(columns)}. Rename the column of "
            "texts to text."
        )
    for row in islice(dataset, 1):
        _check_text(row["text"])
    return tokenize_dataset(dataset, tokenizer, max_seq_length=max_seq_length, word_ids=word_ids)


def iterate_rows(dataset: Any) -> Iterator[Any]:
    """Iterate over a data set; a torch `Dataset` may have nothing but a length and rows by number."""
    return iter(dataset) if hasattr(dataset, "__iter__") else (dataset[index] for index in range(len(dataset)))


def _as_text_dataset(dataset: Any) -> datasets.Dataset | datasets.IterableDataset:
    """Convert a list of rows or a data set of torch; only the texts are kept."""

    def rows() -> Any:
        for row in iterate_rows(dataset):
            if isinstance(row, Mapping) and "text" not in row:
                raise UsageError(f"A row has neither input_ids nor text, only {', '.join(map(str, row))}.")
            text = row["text"] if isinstance(row, Mapping) else row
            _check_text(text)
            yield {"text": text}

    features = datasets.Features(text=datasets.Value("string"))
    if has_length(dataset):
        return datasets.Dataset.from_list(list(rows()), features=features)
    return datasets.IterableDataset.from_generator(rows, features=features)


def _check_text(text: Any) -> None:
    if text is not None and not isinstance(text, str):
        raise UsageError(
            f"A text must be a string, not {type(text).__name__} ({str(text)[:40]}). Convert the column to strings."
        )
