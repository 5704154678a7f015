"""`--objective llm`: fine-tuning of a language model with LLM-JEPA, from flags to files."""

import math
from collections.abc import Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

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
    add_lm_lora,
    add_predictor_tokens,
)
from ..llm_jepa.answer_scoring import get_scorer
from ..llm_jepa.generation import clamp_new_tokens
from ..llm_jepa.objective import has_lora, verify_view_isolation
from ..llm_jepa.paired_data import PairedDataArguments, PairedRow, load_paired_rows, row_texts
from ..llm_jepa.trainer import warn_truncated
from ..llm_jepa.view_tokenizer import IGNORE_INDEX, MAX_PREDICTOR_TOKENS, special_ids
from ..training.run_directory import RunPlan
from ..training.signals import GracefulShutdownCallback
from .arguments import BaseModelArguments
from .encoder_loading import hub_kwargs, resolve_max_seq_length
from .language_model_loading import (
    build_language_model,
    load_language_config,
    load_lm_tokenizer,
    parse_dtype,
    read_template,
)
from .run import (
    apply_smoke_test,
    check_minimum,
    check_run,
    check_start,
    describe_data,
    describe_parameters,
    execute_run,
    make_run_plan,
    print_rank0,
    resolve_defaults,
    serialize_settings,
)

LLM_DESCRIPTION = (
    "Fine-tune a causal language model with LLM-JEPA: next-token loss, and a loss between two views of each row."
)

_SMOKE_TEST_MODEL = {
    "model_type": "llama",
    "config_overrides": "hidden_size=64,intermediate_size=128,num_hidden_layers=2,num_attention_heads=2,"
    "num_key_value_heads=2,max_position_embeddings=256",
    "tokenizer_vocab_size": 2048,
}


@dataclass
class LlmModelArguments(BaseModelArguments):
    """Language model and chat template."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Causal language model to start from: a directory or Hub name."}
    )
    model_type: str | None = field(
        default=None, metadata={"help": "For a random start: llama, gpt2, qwen3 or any other causal language model."}
    )
    chat_template_path: str | None = field(
        default=None, metadata={"help": "File with a Jinja chat template (default: the tokenizer's)."}
    )


@dataclass
class ViewArguments:
    """Division of a row into two views: the arguments of `PairedViewTokenizer`."""

    max_seq_length: int | None = field(
        default=None,
        metadata={"help": "Maximum tokens of a row and of a view (default: the model's maximum, at most 512)."},
    )
    text_turn: int = field(
        default=-2, metadata={"help": "Index of the message that is the first view; -2: the last but one."}
    )
    code_turn: int = field(
        default=-1, metadata={"help": "Index of the message that is the second view and the answer."}
    )
    num_predictor_tokens: int = field(
        default=1, metadata={"help": "Number of predictor tokens (k), 0 to 10; 0: the last token of the text predicts."}
    )
    predictor_position: str = field(
        default="end", metadata={"help": "Position of the predictor tokens in the first view: end or start."}
    )
    reverse: bool = field(default=False, metadata={"help": "The second view predicts the first."})
    pad_to_multiple_of: int | None = field(
        default=None, metadata={"help": "Pad to a multiple of this number of tokens."}
    )
    train_on_prompt: bool = field(
        default=False,
        metadata={"help": "Next-token loss on prompts too, and not on the stop token, as in the paper's script."},
    )


@dataclass
class GenerationArguments:
    """Generation at each evaluation."""

    generation_samples: int = field(
        default=0, metadata={"help": "Number of rows to answer and score at each evaluation."}
    )
    generation_metrics: list[str] = field(
        default_factory=lambda: ["exact_match", "prefix_match"],
        metadata={"help": "Scores of answers: exact_match, prefix_match, gsm8k (final number), sql (result rows)."},
    )
    max_new_tokens: int = field(default=128, metadata={"help": "Maximum tokens of an answer."})
    database: str | None = field(
        default=None, metadata={"help": "For the score sql: an SQLite file, or a folder of NAME/NAME.sqlite."}
    )


@dataclass
class LlmRunArguments(LlmJepaTrainingArguments):
    """`LlmJepaTrainingArguments` and arguments of the command line alone."""

    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Start over, deleting what an earlier run wrote to output_dir."}
    )


LlmParsed = tuple[LlmModelArguments, PairedDataArguments, ViewArguments, GenerationArguments, LlmRunArguments]
# Dataclasses whose fields are the flags.
LLM_CLASSES = (LlmModelArguments, PairedDataArguments, ViewArguments, GenerationArguments, LlmRunArguments)


def run(parsed: LlmParsed, interruption: GracefulShutdownCallback | None = None) -> LlmJepaTrainer | None:
    """Check, prepare, train, evaluate, write. Nothing on disk changes before everything has been checked.

    Args:
        parsed: the arguments.
        interruption: ends the training on a termination signal; None leaves signals alone.

    Returns:
        The trainer, or None if the output directory contains the same run, finished.

    Raises:
        UsageError: bad input.
        RunError: the run cannot continue.
    """
    _, data_args, _, _, args = parsed
    _finalize_arguments(parsed)
    settings = serialize_settings(parsed)
    run_plan = make_run_plan(args, settings)
    if run_plan.finished:
        return None
    from ..monitoring.training_plots import plot_language_model  # late, as in `train.run`

    set_seed(args.seed)
    trainer = _prepare(parsed, run_plan)

    def begin() -> None:
        _print_summary(trainer, parsed)

    names = describe_data(data_args, args, own="Python's language reference")
    execute_run(trainer, run_plan, settings, names, interruption, begin, _usage_message(trainer), plot_language_model)
    return trainer


# ---- before the run


def _finalize_arguments(parsed: LlmParsed) -> None:
    """Set arguments that follow from others, and reject contradictions."""
    model_args, data_args, view_args, answer_args, args = parsed
    resolve_defaults(parsed, args)
    if model_args.smoke_test:
        apply_smoke_test(model_args, data_args, args, _SMOKE_TEST_MODEL)
    elif not data_args.train_file and not data_args.dataset_name:
        raise UsageError("name the rows to train on with --train_file or --dataset_name")
    if not (model_args.model_name_or_path or model_args.model_type or model_args.config_name):
        raise UsageError(
            "name the language model to start from with --model_name_or_path, or a random start with --model_type or "
            "--config_name"
        )
    check_start(model_args)
    parse_dtype(model_args.dtype)
    if model_args.dtype != "float32" and args.target_gradient == "ema":
        raise UsageError(
            f"dtype {model_args.dtype!r}: the teacher's moving average needs float32 weights; keep dtype float32 and "
            "compute in bfloat16 with --bf16"
        )
    if not 0 <= view_args.num_predictor_tokens <= MAX_PREDICTOR_TOKENS:
        raise UsageError(
            f"num_predictor_tokens must be between 0 and {MAX_PREDICTOR_TOKENS}, not {view_args.num_predictor_tokens}"
        )
    check_run(data_args, args)
    if view_args.pad_to_multiple_of is not None:
        check_minimum("pad_to_multiple_of", view_args.pad_to_multiple_of, 1)
    check_minimum("tokenizer_vocab_size", model_args.tokenizer_vocab_size, 1)
    check_minimum("generation_samples", answer_args.generation_samples, 0)
    check_minimum("max_new_tokens", answer_args.max_new_tokens, 1)
    for metric in answer_args.generation_metrics:
        get_scorer(metric, answer_args.database)
    if answer_args.generation_samples and not args.do_eval:
        raise UsageError("generation_samples are answered in evaluations; give --do_eval, or --eval_strategy steps")


def _prepare(parsed: LlmParsed, plan: RunPlan) -> LlmJepaTrainer:
    """Build the trainer of a run. Errors of the model are raised before the data is read."""
    model_args, data_args, view_args, answer_args, args = parsed
    kwargs = hub_kwargs(model_args, data_args)
    config = load_language_config(model_args, kwargs)
    tokenizer = _tokenizer(model_args, kwargs, plan)
    length = _length(config, tokenizer, view_args)
    with args.main_process_first(desc="loading data"):
        train_rows, eval_rows = load_paired_rows(data_args, seed=args.seed, need_validation=args.do_eval)
    if tokenizer is None:
        tokenizer = _train_tokenizer(parsed, train_rows, length)
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
    train_dataset = _tokenize_rows(train_rows, views)
    eval_dataset = None if eval_rows is None else _tokenize_rows(eval_rows, views)
    collator = DataCollatorForPairedViews(tokenizer, args.view_passes, view_args.pad_to_multiple_of)
    if not (model_args.attn_implementation or "").startswith("flash"):  # needs a GPU
        verify_view_isolation(model, collator, train_dataset[0])
    _set_eos_token_ids(model, tokenizer, train_dataset)
    lora = model_args.lora_settings()
    if lora is not None:
        model = add_lm_lora(model, tokenizer, lora, count)
    prompts = [row.content for row in (eval_rows or ())[: answer_args.generation_samples]]
    for row in prompts:
        prompt, _ = views.prompt(row)
        clamp_new_tokens(
            config, len(tokenizer(prompt, add_special_tokens=False)["input_ids"]), answer_args.max_new_tokens
        )
    return LlmJepaTrainer(
        model,
        args,
        data_collator=collator,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        view_tokenizer=views,
        generation_examples=prompts,
        generation_metrics=answer_args.generation_metrics,
        database=answer_args.database,
        max_new_tokens=answer_args.max_new_tokens,
    )


def _tokenizer(model_args: LlmModelArguments, kwargs: dict[str, Any], plan: RunPlan) -> Tokenizer | None:
    """Load the tokenizer; None if a random start has to train one."""
    template = model_args.chat_template_path
    for argument in ("tokenizer_name", "model_name_or_path"):
        if getattr(model_args, argument) is not None:
            return load_lm_tokenizer(argument, getattr(model_args, argument), kwargs, template)
    if plan.checkpoint is not None:  # saved by this run, which may have trained it
        return load_lm_tokenizer("checkpoint", str(plan.checkpoint), {}, template)
    name = model_args.config_name
    if name is None or (Path(name).is_dir() and not (Path(name) / "tokenizer_config.json").is_file()):
        return None
    return load_lm_tokenizer("config_name", name, kwargs, template)


def _length(config: PreTrainedConfig, tokenizer: Tokenizer | None, view_args: ViewArguments) -> int:
    """Return the maximum tokens of a row and of a view: `max_seq_length`, or the model's maximum up to 512."""
    possible = getattr(config, "max_position_embeddings", None) or math.inf  # some models have no positions
    return resolve_max_seq_length(possible, tokenizer, view_args.max_seq_length)


def _train_tokenizer(parsed: LlmParsed, rows: Sequence[PairedRow], length: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer on the rows in the main process and broadcast it."""
    model_args, data_args, _, _, args = parsed
    shared: list[Tokenizer | None] = [None]
    if args.process_index == 0:
        texts = (text for row in rows for text in row_texts(row.content, data_args))
        shared = [train_bpe_tokenizer(texts, model_args.tokenizer_vocab_size, length)]
    tokenizer = broadcast_object_list(shared)[0]
    if model_args.chat_template_path is not None:
        tokenizer.chat_template = read_template(model_args.chat_template_path)
    return tokenizer


def _tokenize_rows(rows: Sequence[PairedRow], views: PairedViewTokenizer) -> list[dict[str, Any]]:
    """Tokenize the rows; errors name the file of the row."""
    tokenized = []
    for row in rows:
        try:
            tokenized.append(views(row.content, row.number))
        except UsageError as error:
            raise UsageError(f"{row.source}: {error}") from None
    warn_truncated(tokenized, views.max_length)
    return tokenized


def _set_eos_token_ids(model: PreTrainedModel, tokenizer: Tokenizer, rows: Sequence[dict[str, Any]]) -> None:
    """Add the tokenizer's and the template's stop tokens to those at which `generate` ends."""
    own = model.generation_config.eos_token_id
    stops = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id]
    complete = next((row for row in rows if not row["truncated"]), rows[0])
    last = [label for label in complete["labels"] if label != IGNORE_INDEX][-1]
    stops += [last] if last in special_ids(tokenizer) else []
    model.generation_config.eos_token_id = sorted({stop for stop in stops if stop is not None}) or None
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id


# ---- console messages


def _print_summary(trainer: LlmJepaTrainer, parsed: LlmParsed) -> None:
    """Print model, data and losses of the run."""
    model_args, _, view_args, _, args = parsed
    parameters = describe_parameters(trainer.model, model_args.use_peft)
    start = "pretrained" if model_args.model_name_or_path else "random"
    answers = "prompts and answers, no stop token" if view_args.train_on_prompt else "answers"
    train_rows, eval_rows = cast(Sized, trainer.train_dataset), cast(Sized | None, trainer.eval_dataset)
    rows = f"{len(train_rows):,} rows" + ("" if eval_rows is None else f", {len(eval_rows):,} to evaluate on")
    print_rank0(
        args,
        f"{trainer.model.config.model_type} language model, {parameters}, {start} start; "
        f"{rows}; next-token loss on {answers}, views {args.jepa_weight:g} x {args.pair_loss}, "
        f"{view_args.num_predictor_tokens} predictor tokens",
    )


def _usage_message(trainer: LlmJepaTrainer) -> str:
    """Return the message about the files written and how to load them."""
    folder = trainer.args.output_dir
    result = "adapters of the language model" if has_lora(trainer.model) else "the language model"
    return (
        f"{result}, its tokenizer, README.md (card), metrics.json, training.png\n\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f'model, tokenizer = AutoModelForCausalLM.from_pretrained("{folder}"), '
        f'AutoTokenizer.from_pretrained("{folder}")'
    )
