"""`--objective llm`: fine-tuning of a language model with LLM-JEPA, from flags to files."""

import math
from collections.abc import Sequence, Sized
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

from accelerate.utils import broadcast_object_list
from transformers import PreTrainedConfig, TrainerCallback, set_seed
from transformers import PreTrainedTokenizerBase as Tokenizer

from ..data.tokenizer_training import train_bpe_tokenizer
from ..errors import UsageError
from ..llm_jepa import (
    DataCollatorForPairedViews,
    LlmJepaTrainer,
    PairedViewTokenizer,
    add_lm_lora,
    add_predictor_tokens,
)
from ..llm_jepa.answer_scoring import get_scorer
from ..llm_jepa.decoder import has_lora
from ..llm_jepa.generation import clamp_new_tokens
from ..llm_jepa.model_setup import set_padding_token
from ..llm_jepa.paired_data import PairedRow, load_paired_rows, row_texts
from ..llm_jepa.predictor_tokens import predictor_tokens
from ..llm_jepa.row_tokenization import tokenize_rows
from ..llm_jepa.view_isolation import verify_view_isolation
from ..training.run_directory import RunPlan
from ..training.signals import GracefulShutdownCallback
from ..utils.counts import counted
from .encoder_loading import hub_kwargs, resolve_max_seq_length
from .language_model_loading import (
    build_language_model,
    load_language_config,
    load_lm_tokenizer,
    parse_dtype,
    read_template,
)
from .llm_arguments import LlmModelArguments, LlmParsed, ViewArguments
from .run import (
    apply_smoke_test,
    check_minimum,
    check_run,
    check_start,
    describe_data,
    describe_parameters,
    execute_run,
    load_finished_run,
    make_run_plan,
    no_empty_output_dir,
    print_rank0,
    resolve_defaults,
    serialize_settings,
)

_SMOKE_TEST_MODEL = {
    "model_type": "llama",
    "config_overrides": "hidden_size=64,intermediate_size=128,num_hidden_layers=2,num_attention_heads=2,"
    "num_key_value_heads=2,max_position_embeddings=256",
    "tokenizer_vocab_size": 2048,
}


def run(
    parsed: LlmParsed,
    interruption: GracefulShutdownCallback | None = None,
    callbacks: Sequence[TrainerCallback] | None = None,
    load_finished: bool = False,
) -> LlmJepaTrainer | None:
    """Check, prepare, train, evaluate, write. Nothing on disk changes before everything has been checked.

    Args:
        parsed: the arguments.
        interruption: see `execute_run`.
        callbacks: additional callbacks of the trainer.
        load_finished: see `train.run`.

    Returns:
        The trainer, or None if the output directory contains the same run, finished.

    Raises:
        UsageError: bad input.
        RunError: the run cannot continue.
    """
    _, data_args, _, _, args = parsed
    _finalize_arguments(parsed)
    settings = serialize_settings(parsed)
    run_plan = make_run_plan(parsed, args, settings)
    if run_plan.finished:
        if not load_finished:
            return None
        run_plan = replace(run_plan, checkpoint=Path(str(args.output_dir)))  # it holds the tokenizer
    set_seed(args.seed)
    with no_empty_output_dir(args):
        trainer = _prepare(parsed, run_plan, callbacks)
        if run_plan.finished:
            load_finished_run(trainer, run_plan, Path(str(args.output_dir)), data_args.train_file)
            return trainer

        def begin() -> None:
            _print_summary(trainer, parsed)

        names = describe_data(data_args, args, own="Python's language reference")
        execute_run(
            trainer, run_plan, settings, names, interruption, begin, _usage_message(trainer), data_args.train_file
        )
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
    predictor_tokens(view_args.num_predictor_tokens)  # raises for a count out of range
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


def _prepare(parsed: LlmParsed, plan: RunPlan, callbacks: Sequence[TrainerCallback] | None) -> LlmJepaTrainer:
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
    set_padding_token(tokenizer)
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
        filter_overlong_rows=view_args.filter_overlong_rows,
    )
    train_dataset = tokenize_rows(train_rows, views)
    eval_dataset = None if eval_rows is None else tokenize_rows(eval_rows, views)
    collator = DataCollatorForPairedViews(tokenizer, args.view_passes, view_args.pad_to_multiple_of)
    if not (model_args.attn_implementation or "").startswith("flash"):  # needs a GPU
        verify_view_isolation(model, collator, train_dataset[0])
    lora = model_args.lora_settings()
    if lora is not None:
        model = add_lm_lora(model, tokenizer, lora, count)
    answerable = (
        row.content
        for row in eval_rows or ()
        if not (views.filter_overlong_rows and views.is_overlong(row.content, row.number))
    )
    prompts = list(islice(answerable, answer_args.generation_samples))
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
        callbacks=callbacks,
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
    texts = [text for row in rows for text in row_texts(row, data_args)]  # on all ranks, for the same errors
    if args.process_index == 0:
        shared = [train_bpe_tokenizer(texts, model_args.tokenizer_vocab_size, length)]
    tokenizer = broadcast_object_list(shared)[0]
    if model_args.chat_template_path is not None:
        tokenizer.chat_template = read_template(model_args.chat_template_path)
    return tokenizer


# ---- console messages


def _print_summary(trainer: LlmJepaTrainer, parsed: LlmParsed) -> None:
    """Print model, data and losses of the run."""
    model_args, _, view_args, _, args = parsed
    parameters = describe_parameters(trainer.model, model_args.use_peft)
    start = "pretrained" if model_args.model_name_or_path else "random"
    answers = "prompts and answers, no stop token" if view_args.train_on_prompt else "answers"
    train_rows, eval_rows = cast(Sized, trainer.train_dataset), cast(Sized | None, trainer.eval_dataset)
    rows = counted(len(train_rows), "row") + ("" if eval_rows is None else f", {len(eval_rows):,} to evaluate on")
    print_rank0(
        args,
        f"{trainer.model.config.model_type} language model, {parameters}, {start} start; "
        f"{rows}; next-token loss on {answers}, views {args.jepa_weight:g} x {args.pair_loss}, "
        + counted(view_args.num_predictor_tokens, "predictor token"),
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
