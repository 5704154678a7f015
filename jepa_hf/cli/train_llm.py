"""`--objective llm`: LLM-JEPA, a language model fine-tuned with two views of its rows, from flags to files."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import PreTrainedConfig, PreTrainedModel, set_seed
from transformers import PreTrainedTokenizerBase as Tokenizer

from ..data.tokenizer_training import train_bpe_tokenizer
from ..errors import UsageError
from ..llm_jepa import (
    DataCollatorForPairedViews,
    LlmJepaTrainer,
    LlmJepaTrainingArguments,
    PairedViewTokenizer,
    add_adapters,
    add_predictor_tokens,
)
from ..llm_jepa.answer_scoring import scorer
from ..llm_jepa.generation import room_for
from ..llm_jepa.objective import check_model, has_adapters
from ..llm_jepa.paired_data import PairedDataArguments, PairedRow, load_paired_rows, row_texts
from ..llm_jepa.trainer import tell_of_cuts
from ..llm_jepa.view_tokenizer import IGNORED, MOST_PREDICTOR_TOKENS, special_ids
from ..training.run_directory import RunPlan
from ..training.signals import InterruptionCallback
from .arguments import StartArguments
from .encoder_loading import longest_row
from .language_model_loading import build_language_model, dtype_of, load_language_config, load_words, read_template
from .run import carry_out, check_run, check_start, data_names, plan, refuse_below, say, settings_of, settle

LLM_DESCRIPTION = "Fine-tune a causal language model with LLM-JEPA: next-token loss, and two views of each row."

_SMOKE = {
    "model_type": "llama",
    "config_overrides": "hidden_size=64,intermediate_size=128,num_hidden_layers=2,num_attention_heads=2,"
    "num_key_value_heads=2,max_position_embeddings=256",
    "tokenizer_vocab_size": 2048,
}


@dataclass
class LlmModelArguments(StartArguments):
    """Which language model, and how it writes a conversation."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Causal language model to start from: a directory or Hub name."}
    )
    model_type: str | None = field(
        default=None, metadata={"help": "For a random start: llama, gpt2, qwen3 or any other causal language model."}
    )
    chat_template_path: str | None = field(
        default=None, metadata={"help": "A file with a Jinja chat template, in the place of the tokenizer's own."}
    )


@dataclass
class ViewArguments:
    """How a row becomes two views: the arguments of `PairedViewTokenizer`."""

    max_seq_length: int | None = field(
        default=None,
        metadata={"help": "Most tokens of a row and of a view. Default: what the model takes, 512 at most."},
    )
    text_turn: int = field(
        default=-2, metadata={"help": "Which message is the first view, as Python counts; -2: the last but one."}
    )
    code_turn: int = field(default=-1, metadata={"help": "Which message is the second view, and the answer."})
    num_predictor_tokens: int = field(
        default=1, metadata={"help": "Predictor tokens (k), 0 to 10; 0: the last token of the text predicts."}
    )
    predictor_position: str = field(
        default="end", metadata={"help": "Where they stand in the first view: end, or start."}
    )
    reverse: bool = field(default=False, metadata={"help": "The second view predicts the first."})
    pad_to_multiple_of: int | None = field(default=None, metadata={"help": "Pad to a multiple of this many tokens."})
    train_on_prompt: bool = field(
        default=False,
        metadata={"help": "Next-token loss on prompts too, and on no stop token: what the paper's script does."},
    )


@dataclass
class AnswerArguments:
    """What the model answers at each evaluation."""

    generation_samples: int = field(
        default=0, metadata={"help": "At each evaluation, answer so many of its rows and count the right ones."}
    )
    generation_metrics: list[str] = field(
        default_factory=lambda: ["exact_match", "prefix_match"],
        metadata={"help": "How answers are judged: exact_match, prefix_match, gsm8k (final number), sql (by result)."},
    )
    max_new_tokens: int = field(default=128, metadata={"help": "Most tokens of an answer."})
    database: str | None = field(
        default=None, metadata={"help": "For the metric sql: an SQLite file, or a folder of NAME/NAME.sqlite."}
    )


@dataclass
class LlmRunArguments(LlmJepaTrainingArguments):
    """`LlmJepaTrainingArguments`, and what only a command has."""

    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Start over, deleting what an earlier run wrote to output_dir."}
    )


LlmParsed = tuple[LlmModelArguments, PairedDataArguments, ViewArguments, AnswerArguments, LlmRunArguments]
# Whose fields the flags are.
LLM_CLASSES = (LlmModelArguments, PairedDataArguments, ViewArguments, AnswerArguments, LlmRunArguments)


def run(parsed: LlmParsed, interruption: InterruptionCallback | None = None) -> LlmJepaTrainer | None:
    """Check, prepare, train, evaluate, write. Nothing on disk is touched before everything is checked.

    Args:
        interruption: what ends the training where the process is asked to go; None leaves signals alone.

    Returns:
        The trainer, or None where the output directory holds this very run, finished.

    Raises:
        UsageError: bad input.
        RunError: the run cannot go on.
    """
    _, data_args, _, _, args = parsed
    _complete(parsed)
    settings = settings_of(parsed)
    planned = plan(args, settings)
    if planned.finished:
        return None
    from ..monitoring.training_plots import plot_language_model  # not before, as in `train.run`

    set_seed(args.seed)
    trainer = _prepare(parsed, planned)

    def begin() -> None:
        _announce(trainer, parsed)

    names = data_names(data_args, args, own="Python's language reference")
    carry_out(trainer, planned, settings, names, interruption, begin, _loading(trainer), plot_language_model)
    return trainer


# ---- before the run


def _complete(parsed: LlmParsed) -> None:
    """Fill in what follows from other arguments, and refuse what contradicts them."""
    model_args, data_args, view_args, answer_args, args = parsed
    settle(parsed, args)
    if model_args.smoke_test:
        for name in ("model_name_or_path", "config_name", "model_type", "config_overrides", "tokenizer_name"):
            if getattr(model_args, name):
                raise UsageError(f"smoke_test brings its own tiny model: leave out {name}")
        for name, value in _SMOKE.items():
            setattr(model_args, name, value)
        data_args.train_file = data_args.dataset_name = None
        if args.max_steps < 0:
            args.max_steps = 20
    elif not data_args.train_file and not data_args.dataset_name:
        raise UsageError("name the rows to train on with --train_file or --dataset_name")
    if not (model_args.model_name_or_path or model_args.model_type or model_args.config_name):
        raise UsageError(
            "name the language model to start from with --model_name_or_path, or for a random start --model_type or "
            "--config_name"
        )
    check_start(model_args)
    dtype_of(model_args.dtype)
    if model_args.dtype != "float32" and args.target_gradient == "ema":
        raise UsageError(
            f"dtype {model_args.dtype!r}: the teacher's moving average does not move in less than float32; leave dtype "
            "at float32 and compute in bfloat16 with --bf16"
        )
    if not 0 <= view_args.num_predictor_tokens <= MOST_PREDICTOR_TOKENS:
        raise UsageError(
            f"num_predictor_tokens must lie between 0 and {MOST_PREDICTOR_TOKENS}, not {view_args.num_predictor_tokens}"
        )
    check_run(data_args, args)
    if view_args.pad_to_multiple_of is not None:
        refuse_below("pad_to_multiple_of", view_args.pad_to_multiple_of, 1)
    refuse_below("tokenizer_vocab_size", model_args.tokenizer_vocab_size, 1)
    refuse_below("generation_samples", answer_args.generation_samples, 0)
    refuse_below("max_new_tokens", answer_args.max_new_tokens, 1)
    for metric in answer_args.generation_metrics:
        scorer(metric, answer_args.database)
    if answer_args.generation_samples and not args.do_eval:
        raise UsageError("generation_samples are answered in evaluations: give --do_eval, or --eval_strategy steps")


def _prepare(parsed: LlmParsed, plan: RunPlan) -> LlmJepaTrainer:
    """The trainer of a run, with all that it reads. What is wrong with the model is told before the data is read."""
    model_args, data_args, view_args, answer_args, args = parsed
    kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": model_args.trust_remote_code,
        "token": data_args.token,
        "cache_dir": data_args.cache_dir,
    }
    config = load_language_config(model_args, kwargs)
    tokenizer = _tokenizer(model_args, kwargs, plan)
    length = _length(config, tokenizer, view_args)
    with args.main_process_first(desc="loading data"):
        train_rows, eval_rows = load_paired_rows(data_args, seed=args.seed, need_validation=args.do_eval)
    if tokenizer is None:
        tokenizer = _trained_tokenizer(parsed, train_rows, length)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = build_language_model(model_args, config, tokenizer, kwargs)
    count = view_args.num_predictor_tokens
    add_predictor_tokens(model, tokenizer, count)
    views = PairedViewTokenizer(
        tokenizer,
        max_length=length,
        text_turn=view_args.text_turn,
        code_turn=view_args.code_turn,
        **data_args.columns,
        num_predictor_tokens=count,
        predictor_position=view_args.predictor_position,
        reverse=view_args.reverse,
        train_on_prompt=view_args.train_on_prompt,
    )
    train_dataset, eval_dataset = (
        None if rows is None else _tokenized(rows, views) for rows in (train_rows, eval_rows)
    )
    collator = DataCollatorForPairedViews(tokenizer, args.view_passes, view_args.pad_to_multiple_of)
    if not (model_args.attn_implementation or "").startswith("flash"):  # which is for GPUs alone
        check_model(model, collator, train_dataset[0])
    _learn_stop(model, tokenizer, train_dataset)
    lora = model_args.lora_settings()
    if lora is not None:
        model = add_adapters(model, tokenizer, lora, count)
    asked = [row.content for row in (eval_rows or ())[: answer_args.generation_samples]]
    for row in asked:
        prompt, _ = views.prompt(row)
        room_for(config, len(tokenizer(prompt, add_special_tokens=False)["input_ids"]), answer_args.max_new_tokens)
    return LlmJepaTrainer(
        model,
        args,
        data_collator=collator,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        view_tokenizer=views,
        generation_rows=asked,
        generation_metrics=answer_args.generation_metrics,
        database=answer_args.database,
        max_new_tokens=answer_args.max_new_tokens,
    )


def _tokenizer(model_args: LlmModelArguments, kwargs: dict[str, Any], plan: RunPlan) -> Tokenizer | None:
    """The tokenizer, or None where a random start has to train one."""
    template = model_args.chat_template_path
    for argument in ("tokenizer_name", "model_name_or_path"):
        if getattr(model_args, argument) is not None:
            return load_words(argument, getattr(model_args, argument), kwargs, template)
    if plan.checkpoint is not None:  # this run's own, perhaps trained when it began
        return load_words("checkpoint", str(plan.checkpoint), {}, template)
    name = model_args.config_name
    if name is None or (Path(name).is_dir() and not (Path(name) / "tokenizer_config.json").is_file()):
        return None
    return load_words("config_name", name, kwargs, template)


def _length(config: PreTrainedConfig, tokenizer: Tokenizer | None, view_args: ViewArguments) -> int:
    """The longest row and view, in tokens: `max_seq_length`, or what model and tokenizer allow, 512 at most."""
    possible = getattr(config, "max_position_embeddings", None) or math.inf  # there are models without positions
    return longest_row(possible, tokenizer, view_args.max_seq_length)


def _trained_tokenizer(parsed: LlmParsed, rows: Sequence[PairedRow], length: int) -> Tokenizer:
    """A byte-level BPE tokenizer trained on the rows, by one process for all."""
    model_args, data_args, _, _, args = parsed
    shared: list[Tokenizer | None] = [None]
    if args.process_index == 0:
        texts = (text for row in rows for text in row_texts(row.content, data_args))
        shared = [train_bpe_tokenizer(texts, model_args.tokenizer_vocab_size, length)]
    tokenizer = broadcast_object_list(shared)[0]
    if model_args.chat_template_path is not None:
        tokenizer.chat_template = read_template(model_args.chat_template_path)
    return tokenizer


def _tokenized(rows: Sequence[PairedRow], views: PairedViewTokenizer) -> list[dict[str, Any]]:
    """Rows of token ids; an error names the file that its row is in."""
    made = []
    for row in rows:
        try:
            made.append(views(row.content, row.number))
        except UsageError as error:
            raise UsageError(f"{row.source}: {error}") from None
    tell_of_cuts(made, views.max_length)
    return made


def _learn_stop(model: PreTrainedModel, tokenizer: Tokenizer, rows: Sequence[dict[str, Any]]) -> None:
    """Have `generate` end where the answers of the rows end: at the tokenizer's, and at the template's own stop."""
    own = model.generation_config.eos_token_id
    stops = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id]
    whole = next((row for row in rows if not row["truncated"]), rows[0])
    last = [label for label in whole["labels"] if label != IGNORED][-1]
    stops += [last] if last in special_ids(tokenizer) else []
    model.generation_config.eos_token_id = sorted({stop for stop in stops if stop is not None}) or None
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id


# ---- what is said


def _announce(trainer: LlmJepaTrainer, parsed: LlmParsed) -> None:
    model_args, _, view_args, _, args = parsed
    count = sum(parameter.numel() for parameter in trainer.model.parameters())
    trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    adapters = f" ({trained / 1e6:.2f} M of them trained, in adapters)" if model_args.use_peft else ""
    start = "pretrained" if model_args.model_name_or_path else "random"
    answers = "prompts and answers, no stop token" if view_args.train_on_prompt else "answers"
    rows = f"{len(trainer.train_dataset):,} rows"
    rows += f", {len(trainer.eval_dataset):,} to evaluate on" if trainer.eval_dataset is not None else ""
    say(
        args,
        f"{trainer.model.config.model_type} language model, {count / 1e6:.1f} M parameters{adapters}, {start} start; "
        f"{rows}; next-token loss on {answers}, views {args.pair_weight:g} x {args.pair_loss}, "
        f"{view_args.num_predictor_tokens} predictor tokens",
    )


def _loading(trainer: LlmJepaTrainer) -> str:
    """What a training leaves, and how to load it."""
    folder = trainer.args.output_dir
    what = "adapters of the language model" if has_adapters(trainer.model) else "the language model"
    return (
        f"{what}, its tokenizer, README.md (card), metrics.json, training.png\n\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f'model, tokenizer = AutoModelForCausalLM.from_pretrained("{folder}"), '
        f'AutoTokenizer.from_pretrained("{folder}")'
    )
