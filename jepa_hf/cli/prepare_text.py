"""Span-JEPA on text: tokenizer, rows of tokens, model and collator of a run."""

import os
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from ..data.arguments import DataArguments
from ..data.text_datasets import load_text_datasets
from ..data.tokenization import tokenize_dataset
from ..data.tokenizer_training import train_wordpiece_tokenizer
from ..errors import UsageError
from ..masking.span_collator import DataCollatorForSpanJEPA
from ..models.backbones import backbone_for
from ..models.configuration_jepa import JepaConfig
from ..models.modeling_jepa import JepaForRepresentationPrediction
from ..training.run_directory import RunPlan
from .arguments import ModelArguments, Parsed, RunArguments
from .encoder_loading import FAMILIES, VISION_FAMILIES, Prepared, build_model, hub_kwargs, load_tokenizer, longest_row

# Texts that a random start's tokenizer is trained on, at most: they are held in memory.
_TOKENIZER_TEXTS = 100_000

_MASKS = ("mask_ratio", "mean_span_length", "whole_word", "num_masks", "on_short")


def prepare_text(parsed: Parsed, config: PreTrainedConfig, plan: RunPlan) -> Prepared:
    """Model, collator and rows of tokens. What is wrong with the model or the masks is told before the data is read."""
    model_args, data_args, _, args = parsed
    if data_args.streaming and args.dataloader_num_workers:
        # The workers tokenise; threads that the tokenizer started before the fork would leave them waiting for ever.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _check_encoder(config, model_args)
    tokenizer = _tokenizer(model_args, data_args, plan)
    length = _check_length(config, tokenizer, data_args)
    if tokenizer is not None:
        model, collator = _model_and_collator(parsed, config, tokenizer, length)
    with args.main_process_first(desc="loading data"):
        train_texts, eval_texts = load_text_datasets(data_args, seed=args.seed, need_validation=args.do_eval)
    if tokenizer is None:
        tokenizer = _trained_tokenizer(args, model_args, train_texts, length)
        model, collator = _model_and_collator(parsed, config, tokenizer, length)
    with args.main_process_first(desc="tokenising"):
        train_rows, eval_rows = (
            None if texts is None else _tokenize(texts, tokenizer, data_args, length, collator.whole_word)
            for texts in (train_texts, eval_texts)
        )
    return Prepared(model, collator, train_rows, eval_rows, tokenizer)


def _check_encoder(config: PreTrainedConfig, model_args: ModelArguments) -> None:
    needed = ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings")
    reads_both_ways = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.is_encoder_decoder
    if not reads_both_ways or not all(hasattr(config, name) for name in needed):
        raise UsageError(
            f"a {config.model_type} model is no text encoder; use {', '.join(FAMILIES)}, or for images "
            f"{', '.join(VISION_FAMILIES)}"
        )
    # Refuse an impossible combination before any data is read.
    JepaConfig.for_encoder(config, **model_args.jepa_kwargs())


def _tokenizer(model_args: ModelArguments, data_args: DataArguments, plan: RunPlan) -> PreTrainedTokenizerBase | None:
    """The tokenizer, or None where a random start has to train one."""
    name, argument = model_args.model_name_or_path, "model_name_or_path"
    if model_args.tokenizer_name is not None:
        name, argument = model_args.tokenizer_name, "tokenizer_name"
    elif name is None and plan.checkpoint is not None:
        name, argument = str(plan.checkpoint), "checkpoint"  # this run's own, perhaps trained when it began
    elif name is None:
        name, argument = model_args.config_name, "config_name"
    if name is None:
        return None
    tokenizer = load_tokenizer(argument, name, hub_kwargs(model_args, data_args))
    if len(tokenizer) > len(tokenizer.all_special_ids):
        return tokenizer
    # What transformers makes of a directory without a tokenizer knows special tokens only.
    if argument == "config_name":
        return None
    raise UsageError(f"{argument} {name!r} holds no tokenizer; name one with --tokenizer_name")


def _check_length(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None, data_args: DataArguments) -> int:
    """The longest row, in tokens: `max_seq_length`, or what model and tokenizer allow, 512 at most."""
    return longest_row(backbone_for(config).max_length, tokenizer, data_args.max_seq_length)


def _model_and_collator(
    parsed: Parsed, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, length: int
) -> tuple[JepaForRepresentationPrediction, DataCollatorForSpanJEPA]:
    model_args, data_args, mask_args, args = parsed
    masks = {"on_short": "skip", **mask_args.chosen("span", _MASKS)}
    _add_tokens(tokenizer, model_args)
    if model_args.model_name_or_path is None:
        _fit_vocabulary(config, tokenizer)
    model = build_model(model_args, data_args, config)
    if data_args.packed:
        model.backbone.check_packing(model.context_encoder)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    collator = DataCollatorForSpanJEPA(
        tokenizer,
        context_mode=model.config.context_mode,
        pad_to_multiple_of=data_args.pad_to_multiple_of,
        max_length=length if data_args.pad_to_max_length or args.torch_compile else None,
        seed=args.seed,
        **masks,
    )
    return model, collator


def _fit_vocabulary(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    config.vocab_size = len(tokenizer)
    for name in ("pad", "cls", "sep", "bos", "eos"):
        # Configurations differ in which of these they have; the tokenizer's are the right ones.
        if getattr(config, f"{name}_token_id", None) is not None:
            setattr(config, f"{name}_token_id", getattr(tokenizer, f"{name}_token_id"))


def _trained_tokenizer(
    args: RunArguments, model_args: ModelArguments, texts: Any, length: int
) -> PreTrainedTokenizerBase:
    """A WordPiece tokenizer trained on the texts, by one process for all."""
    shared: list[PreTrainedTokenizerBase | None] = [None]
    if args.process_index == 0:
        some = (row["text"] for row in islice(texts, _TOKENIZER_TEXTS))
        shared = [train_wordpiece_tokenizer(some, model_args.tokenizer_vocab_size, length)]
    return broadcast_object_list(shared)[0]


def _add_tokens(tokenizer: PreTrainedTokenizerBase, model_args: ModelArguments) -> None:
    if model_args.add_tokens is None:
        return
    path = Path(model_args.add_tokens)
    if not path.is_file():
        raise UsageError(f"add_tokens {model_args.add_tokens!r} is no file; name a text file with one token a line")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise UsageError(f"add_tokens {model_args.add_tokens!r} is not UTF-8; convert it to UTF-8") from None
    tokenizer.add_tokens([line.strip() for line in lines if line.strip()])


def _tokenize(
    texts: Any, tokenizer: PreTrainedTokenizerBase, data_args: DataArguments, length: int, word_ids: bool
) -> Any:
    return tokenize_dataset(
        texts,
        tokenizer,
        max_seq_length=length,
        stride=data_args.stride,
        concat=data_args.concat,
        packed=data_args.packed,
        word_ids=word_ids,
        num_proc=data_args.preprocessing_num_workers,
        load_from_cache_file=not data_args.overwrite_cache,
    )
