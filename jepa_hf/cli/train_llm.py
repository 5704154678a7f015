"""`--objective llm`: fine-tuning of a language model with LLM-JEPA, from flags to files."""

import math
from collections.abc import Sequence, Sized
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedConfig, TrainerCallback
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
from ..llm_jepa.row_tokenization import tokenize_rows
from ..llm_jepa.view_isolation import verify_view_isolation
from ..training.run_directory import RunPlan
from ..training.signals import GracefulShutdownCallback
from ..utils.counts import counted
from .encoder_loading import hub_kwargs, on_main_process, resolve_max_seq_length
from .language_model_loading import (
    build_language_model,
    load_language_config,
    load_lm_tokenizer,
    parse_dtype,
    read_template,
)
from .llm_arguments import GenerationArguments, LlmModelArguments, LlmParsed
from .run import (
    apply_smoke_test,
    check_run,
    check_start,
    describe_parameters,
    resolve_defaults,
    run_trainer,
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
    """Run LLM-JEPA, see `run_trainer`."""
    _finalize_arguments(parsed)
    build = partial(_prepare, parsed, callbacks)
    return run_trainer(parsed, build, partial(_describe, parsed), "", interruption, load_finished)


# ---- before the run


def _finalize_arguments(parsed: LlmParsed) -> None:
    """Set arguments that follow from others, and reject contradictions."""
    model_args, data_args, _, answer_args, args = parsed
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
    check_run(data_args, args)
    for metric in answer_args.generation_metrics:
        get_scorer(metric, answer_args.database)
    if answer_args.generation_samples and not args.do_eval:
        raise UsageError("generation_samples are answered in evaluations; give --do_eval, or --eval_strategy steps")


def _prepare(parsed: LlmParsed, callbacks: Sequence[TrainerCallback] | None, plan: RunPlan) -> LlmJepaTrainer:
    """Build the trainer of a run. Errors of the model are raised before the data is read."""
    model_args, data_args, view_args, answer_args, args = parsed
    kwargs = hub_kwargs(model_args, data_args)
    config = load_language_config(model_args, kwargs)
    tokenizer = _tokenizer(model_args, kwargs, plan)
    possible = getattr(config, "max_position_embeddings", None) or math.inf  # some models have no positions
    length = resolve_max_seq_length(possible, tokenizer, view_args.max_seq_length)
    with args.main_process_first(desc="loading data"):
        train_rows, eval_rows = load_paired_rows(data_args, seed=args.seed, need_validation=args.do_eval)
    if tokenizer is None:
        texts = [text for row in train_rows for text in row_texts(row, data_args)]  # on all ranks, for the same errors
        tokenizer = on_main_process(args, lambda: train_bpe_tokenizer(texts, model_args.tokenizer_vocab_size, length))
        if model_args.chat_template_path is not None:
            tokenizer.chat_template = read_template(model_args.chat_template_path)
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
    return LlmJepaTrainer(
        model,
        args,
        data_collator=collator,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        view_tokenizer=views,
        generation_examples=_prompts(views, eval_rows or (), answer_args, config),
        generation_metrics=answer_args.generation_metrics,
        database=answer_args.database,
        max_new_tokens=answer_args.max_new_tokens,
        callbacks=callbacks,
    )


def _prompts(
    views: PairedViewTokenizer, rows: Sequence[PairedRow], answer_args: GenerationArguments, config: PreTrainedConfig
) -> list[dict[str, Any]]:
    """Return the first rows to answer at each evaluation, whose prompts and answers the model has positions for."""
    answerable = (
        row.content for row in rows if not (views.filter_overlong_rows and views.is_overlong(row.content, row.number))
    )
    prompts = list(islice(answerable, answer_args.generation_samples))
    for row in prompts:
        prompt, _ = views.prompt(row)
        length = len(views.tokenizer(prompt, add_special_tokens=False)["input_ids"])
        clamp_new_tokens(config, length, answer_args.max_new_tokens)
    return prompts


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


# ---- console messages


def _describe(parsed: LlmParsed, trainer: LlmJepaTrainer) -> tuple[str, str]:
    """Return messages about model, data and losses, and about the files written and how to load them."""
    model_args, _, view_args, _, args = parsed
    parameters = describe_parameters(trainer.model, model_args.use_peft)
    is_pretrained = model_args.model_name_or_path is not None and model_args.passed_model != ""
    answers = "prompts and answers, no stop token" if view_args.train_on_prompt else "answers"
    train_rows, eval_rows = cast(Sized, trainer.train_dataset), cast(Sized | None, trainer.eval_dataset)
    rows = counted(len(train_rows), "row") + ("" if eval_rows is None else f", {len(eval_rows):,} to evaluate on")
    summary = (
        f"{trainer.model.config.model_type} language model, {parameters}, "
        f"{'pretrained' if is_pretrained else 'random'} start; {rows}; next-token loss on {answers}, "
        f"views {args.jepa_weight:g} x {args.pair_loss}, {counted(view_args.num_predictor_tokens, 'predictor token')}"
    )
    result = "adapters of the language model" if has_lora(trainer.model) else "the language model"
    usage = (
        f"{result}, its tokenizer, README.md (card), metrics.json, training.png\n\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f'model, tokenizer = AutoModelForCausalLM.from_pretrained("{args.output_dir}"), '
        f'AutoTokenizer.from_pretrained("{args.output_dir}")'
    )
    return summary, usage
