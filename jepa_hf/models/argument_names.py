"""Refusal of arguments that a configuration would store and never read."""

import difflib
from collections.abc import Iterable
from dataclasses import fields

from transformers import PreTrainedConfig

from .errors import UsageError

# Arguments of `JepaTrainingArguments` and `LlmJepaTrainingArguments` that transformers'
# `TrainingArguments` lacks, of the collators, and of `PairedViewTokenizer`. This folder does not
# import them, so a test compares the names.
_TRAINING = (
    *("ema_decay", "ema_decay_end", "ema_schedule", "weight_decay_end", "decay_norms_and_biases"),
    *("export_encoder", "health_steps", "stop_on_collapse"),
)
_LLM_TRAINING = (
    *("lm_weight", "jepa_weight", "pair_loss", "infonce_temperature", "loss_dropout", "target_gradient"),
    *("ema_decay", "stp_weight", "stp_variant", "view_passes"),
)
_COLLATORS = (
    *("tokenizer", "mask_ratio", "mean_span_length", "num_masks", "whole_word", "on_too_short"),
    *("pad_to_multiple_of", "max_length", "seed", "image_processor", "grid", "target_scale"),
    *("target_aspect_ratio", "context_scale", "keep_blocks_inside", "random_resized_crop", "random_flip"),
    *("image_column_name", "num_channels", "fill_values"),
)
_VIEWS = (
    *("text_turn", "code_turn", "text_column", "code_column", "num_predictor_tokens", "predictor_position"),
    *("reverse", "train_on_prompt", "filter_overlong_rows"),
)

# `Trainer` and transformers store these in configurations of any model.
_STORED = ("use_cache", "output_attentions")


def refuse_unread_arguments(names: Iterable[str], known: Iterable[str], config: str, strict: bool = False) -> None:
    """Refuse arguments of the class `config` that are misspelled, or those of the training or the collator.

    With `strict` only `known` ones and those of `PreTrainedConfig` pass. Not for values from a file, where
    transformers, tools and users may have stored attributes of their own.

    Raises:
        UsageError: a name belongs elsewhere, or is similar to one in `known`.
    """
    known = {*known, *(field.name for field in fields(PreTrainedConfig)), *_STORED}
    for name in names:
        if name in known:
            continue
        if owner := owner_of(name):
            raise UsageError(f"{config} has no argument {name!r}. Pass it to {owner}.")
        if meant := difflib.get_close_matches(name, known, n=1, cutoff=0.6 if strict else 0.8):
            raise UsageError(f"Expected an argument of {config}, got {name!r}. Did you mean {meant[0]!r}?")
        if strict:
            raise UsageError(
                f"{config} has no argument {name!r}. Pass arguments of the encoder's from_pretrained in encoder_kwargs."
            )


def owner_of(name: str, llm: bool = False) -> str | None:
    """Return the classes other than configurations that take an argument; None for unknown names.

    Args:
        name: the argument.
        llm: prefer the classes of LLM-JEPA, which share some names with those of encoders.
    """
    training, llm_training = "JepaTrainingArguments", "LlmJepaTrainingArguments"
    owners = [(training, _TRAINING), ("the data collator", _COLLATORS), (llm_training, _LLM_TRAINING)]
    owners.append(("PairedViewTokenizer", _VIEWS))
    if name in _training_arguments():
        return llm_training if llm else training
    return next((owner for owner, names in (reversed(owners) if llm else owners) if name in names), None)


def _training_arguments() -> set[str]:
    # Imported for unknown names only, because it imports accelerate.
    from transformers import TrainingArguments

    return {field.name for field in fields(TrainingArguments)}
