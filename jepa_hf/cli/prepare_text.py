"""Components of a span-JEPA run on text: tokenizer, rows of tokens, model, collator."""

import os
from itertools import islice
from pathlib import Path
from typing import cast

from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from ..data.arguments import DataArguments
from ..data.text_datasets import load_text_datasets
from ..data.tokenization import num_token_ids, tokenize_dataset
from ..data.tokenizer_training import train_wordpiece_tokenizer
from ..errors import UsageError
from ..masking.span_collator import DataCollatorForSpanJEPA
from ..models.configuration_jepa import JepaConfig
from ..models.encoder_adapters import encoder_adapter_for
from ..models.modeling_jepa import JepaForRepresentationPrediction
from ..models.text_adapters import TextEncoderAdapter
from ..training.run_directory import RunPlan
from .arguments import ModelArguments, Parsed
from .encoder_loading import (
    SUPPORTED,
    TrainingComponents,
    build_model,
    has_tokens,
    hub_kwargs,
    load_tokenizer,
    on_main_process,
    resolve_max_seq_length,
)

# Maximum number of texts to train a tokenizer on; they are held in memory.
_TOKENIZER_TEXTS = 100_000

_MASKS = ("mask_ratio", "mean_span_length", "whole_word", "num_masks", "on_too_short")


def prepare_text(parsed: Parsed, config: PreTrainedConfig, plan: RunPlan) -> TrainingComponents:
    """Prepare model, collator and rows of tokens. Errors of model and masks are raised before the data is read."""
    model_args, data_args, _, args = parsed
    if data_args.streaming and args.dataloader_num_workers:
        # The workers tokenize; threads that the tokenizer started before the fork would deadlock them.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _check_encoder(config)
    # Raises for an impossible combination before any data is read.
    is_pretrained = model_args.model_name_or_path is not None
    jepa_config = None if is_pretrained else JepaConfig.for_encoder(config, **model_args.jepa_kwargs())
    tokenizer = _tokenizer(model_args, data_args, plan)
    length = resolve_max_seq_length(_adapter(config).max_length, tokenizer, data_args.max_seq_length)
    if tokenizer is not None:
        model, collator = _model_and_collator(parsed, config, jepa_config, tokenizer, length)
    with args.main_process_first(desc="loading data"):
        train_texts, eval_texts = load_text_datasets(data_args, seed=args.seed, need_validation=args.do_eval)
    if tokenizer is None:
        sample = (row["text"] for row in islice(train_texts, _TOKENIZER_TEXTS))
        tokenizer = on_main_process(
            args, lambda: train_wordpiece_tokenizer(sample, model_args.tokenizer_vocab_size, length)
        )
        model, collator = _model_and_collator(parsed, config, jepa_config, tokenizer, length)
    with args.main_process_first(desc="tokenising"):
        train_rows, eval_rows = (
            None
            if texts is None
            else tokenize_dataset(
                texts,
                tokenizer,
                max_seq_length=length,
                stride=data_args.stride,
                concat=data_args.concat,
                packed=data_args.packed,
                word_ids=collator.whole_word,
                num_proc=data_args.preprocessing_num_workers,
                load_from_cache_file=not data_args.overwrite_cache,
            )
            for texts in (train_texts, eval_texts)
        )
    return TrainingComponents(model, collator, train_rows, eval_rows, tokenizer)


def _check_encoder(config: PreTrainedConfig) -> None:
    needed = ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings")
    is_bidirectional = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.is_encoder_decoder
    if not is_bidirectional or not all(hasattr(config, name) for name in needed):
        kind = "has no encoder that JEPA supports"
        if config.is_encoder_decoder:
            kind = "is an encoder-decoder, and JEPA trains an encoder alone"
        elif config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            kind = "is a causal language model, which --objective llm fine-tunes"
        raise UsageError(f"A {config.model_type} model {kind}. {SUPPORTED}")


def _tokenizer(model_args: ModelArguments, data_args: DataArguments, plan: RunPlan) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer; None if a random start has to train one."""
    name, argument = model_args.model_name_or_path, "model_name_or_path"
    if model_args.tokenizer_name is not None:
        name, argument = model_args.tokenizer_name, "tokenizer_name"
    elif name is None and plan.checkpoint is not None:
        name, argument = str(plan.checkpoint), "checkpoint"  # saved by this run, which may have trained it
    elif name is None:
        name, argument = model_args.config_name, "config_name"
    if name is None:
        return None
    tokenizer = load_tokenizer(argument, name, hub_kwargs(model_args, data_args))
    if has_tokens(tokenizer):
        return tokenizer
    if argument == "config_name":
        return None
    raise UsageError(f"{argument} {name!r} contains no tokenizer; name one with --tokenizer_name")


def _adapter(config: PreTrainedConfig) -> TextEncoderAdapter:
    """Return the adapter of a text encoder."""
    return cast(TextEncoderAdapter, encoder_adapter_for(config))


def _model_and_collator(
    parsed: Parsed,
    config: PreTrainedConfig,
    jepa_config: JepaConfig | None,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
) -> tuple[JepaForRepresentationPrediction, DataCollatorForSpanJEPA]:
    model_args, data_args, mask_args, args = parsed
    masks = {"on_too_short": "skip", **mask_args.given_for("span", _MASKS)}
    if jepa_config is None and not model_args.resize_token_embeddings:
        _check_vocabulary(tokenizer, model_args, data_args, config)
    _add_tokens(tokenizer, model_args)
    if jepa_config is not None:
        config.vocab_size = num_token_ids(tokenizer)
        _sync_token_ids(config, tokenizer)
        _sync_token_ids(jepa_config, tokenizer)
    model = build_model(model_args, data_args, jepa_config or config)
    if data_args.packed:
        _adapter(config).check_packing(model.context_encoder)
    if num_token_ids(tokenizer) > cast(nn.Embedding, model.get_input_embeddings()).num_embeddings:
        model.resize_token_embeddings(num_token_ids(tokenizer))
    collator = DataCollatorForSpanJEPA(
        tokenizer,
        masked_tokens=model.config.masked_tokens,
        pad_to_multiple_of=data_args.pad_to_multiple_of,
        max_length=length if data_args.pad_to_max_length or args.torch_compile else None,
        seed=args.seed,
        **masks,
    )
    return model, collator


def _check_vocabulary(
    tokenizer: PreTrainedTokenizerBase, model_args: ModelArguments, data_args: DataArguments, config: PreTrainedConfig
) -> None:
    """Refuse a tokenizer with other tokens than the pretrained model's, or with more than its embeddings."""
    name = model_args.model_name_or_path
    remedy = "Use the model's tokenizer, or set --resize_token_embeddings to train with this one."
    if num_token_ids(tokenizer) > config.vocab_size:
        raise UsageError(
            f"The tokenizer {tokenizer.name_or_path!r} has {num_token_ids(tokenizer)} tokens, but {name!r} has only "
            f"{config.vocab_size} embeddings. {remedy}"
        )
    if model_args.tokenizer_name is None:
        return
    try:
        own = load_tokenizer("model_name_or_path", str(name), hub_kwargs(model_args, data_args))
    except UsageError:  # the model comes without a tokenizer, so --tokenizer_name is needed
        return
    own_tokens = {number: token for token, number in own.get_vocab().items()}
    for token, number in tokenizer.get_vocab().items():
        if own_tokens.get(number, token) != token:
            raise UsageError(
                f"The tokenizer {model_args.tokenizer_name!r} is not that of {name!r}: token {number} is {token!r} "
                f"instead of {own_tokens[number]!r}. {remedy}"
            )


def _sync_token_ids(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    for name in ("pad", "cls", "sep", "bos", "eos"):
        # Set those that the configuration has; families differ in them.
        if getattr(config, f"{name}_token_id", None) is not None:
            setattr(config, f"{name}_token_id", getattr(tokenizer, f"{name}_token_id"))


def _add_tokens(tokenizer: PreTrainedTokenizerBase, model_args: ModelArguments) -> None:
    if model_args.add_tokens is None:
        return
    path = Path(model_args.add_tokens)
    if not path.is_file():
        raise UsageError(
            f"add_tokens {model_args.add_tokens!r} is not a file; name a text file with one token per line"
        )
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise UsageError(f"add_tokens {model_args.add_tokens!r} is not UTF-8; convert it to UTF-8") from None
    tokenizer.add_tokens([line.strip() for line in lines if line.strip()])
