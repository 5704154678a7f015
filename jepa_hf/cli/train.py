"""`run_jepa.py`, `jepa-hf train` and `jepa_hf.pretrain`: one run, from flags to files."""

import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, set_seed
from transformers.integrations import get_reporting_integration_callbacks
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from ..backbones import backbone_for
from ..configuration_jepa import JepaConfig
from ..data import DataArguments, load_text_datasets, train_wordpiece_tokenizer
from ..data_collator import DataCollatorForSpanJEPA
from ..errors import UsageError
from ..modeling_jepa import JepaForRepresentationPrediction
from ..plots import plot_training
from ..run_directory import RunPlan, finish_run, plan_run, start_run
from ..tokenization import tokenize_dataset
from ..trainer import JepaTrainer
from .arguments import ModelArguments, Parsed, RunArguments, complain, parse_command, parse_flags, quiet_libraries

logger = logging.getLogger("jepa_hf")

# Texts that a random start's tokenizer is trained on, at most: they are held in memory.
_TOKENIZER_TEXTS = 100_000

_FAMILIES = ("bert", "distilbert", "roberta", "electra", "deberta-v2", "modernbert")

_SMOKE = {
    "model_type": "bert",
    "config_overrides": "hidden_size=64,num_hidden_layers=2,num_attention_heads=2,intermediate_size=128",
    "tokenizer_vocab_size": 2048,
}


def main(argv: Sequence[str] | None = None, command: str = "run_jepa.py") -> int:
    """Run from the command line.

    Returns:
        The exit code: 0, or 2 after a sentence about bad input.
    """
    quiet_libraries()
    try:
        trainer = run(parse_command(sys.argv[1:] if argv is None else argv))
    except UsageError as error:
        return complain(command, error)
    if trainer is not None:
        trainer.accelerator.end_training()  # closes trackers and the process group
    return 0


def pretrain(model: str | None = None, **flags: Any) -> JepaTrainer | None:
    """Pretrain with JEPA in one call; the flags of `run_jepa.py` are its arguments.

    Args:
        model: directory or Hub name of the encoder to start from (`model_name_or_path`).
        flags: any flag of `run_jepa.py`, such as `train_file`, `output_dir`, `max_steps`.

    Returns:
        The trainer after training, or None where the output directory holds this very run, finished.

    Raises:
        UsageError: bad input.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:  # doctest: +ELLIPSIS
    ...     trainer = pretrain(smoke_test=True, max_steps=1, output_dir=folder, use_cpu=True)
    bert encoder, 0.2 M parameters, random start; ...
    >>> trainer.state.global_step
    1
    """
    if model is not None:
        flags["model_name_or_path"] = model
    return run(parse_flags(flags))


def run(parsed: Parsed) -> JepaTrainer | None:
    """Check, prepare, train, evaluate, write. Nothing on disk is touched before everything is checked."""
    model_args, data_args, mask_args, args = parsed
    _complete(model_args, data_args, args)
    settings = _settings(parsed)
    plan = plan_run(args.output_dir, settings, args.overwrite_output_dir, args.resume_from_checkpoint)
    if plan.finished:
        _say(args, plan.note)
        return None
    if plan.checkpoint is not None and not args.do_train:
        raise UsageError(
            f"{plan.checkpoint} is not what --do_eval alone would evaluate: name it as --model_name_or_path and choose "
            "another output_dir"
        )

    set_seed(args.seed)
    config = _encoder_config(model_args, data_args)
    tokenizer = _tokenizer(model_args, data_args, plan)
    length = _check_length(config, tokenizer, data_args)
    if tokenizer is not None:  # what is wrong with the model or the masks is told before the data is read
        model, collator = _model_and_collator(parsed, config, tokenizer, length)
    with args.main_process_first(desc="loading data"):
        train_texts, eval_texts = load_text_datasets(data_args, seed=args.seed, need_validation=args.do_eval)
    if tokenizer is None:
        tokenizer = _trained_tokenizer(args, model_args, train_texts, length)
        model, collator = _model_and_collator(parsed, config, tokenizer, length)
    with args.main_process_first(desc="tokenising"):
        train_rows, eval_rows = (
            None if texts is None else _tokenize(texts, tokenizer, data_args, length, mask_args.whole_word)
            for texts in (train_texts, eval_texts)
        )

    trainer = JepaTrainer(
        model,
        args,
        data_collator=collator,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
    )
    # All is checked: from here on the run writes.
    if plan.note:
        _say(args, plan.note)
    if args.should_save:
        start_run(args.output_dir, settings, plan)
    _announce(trainer, args)
    metrics: dict[str, Any] = {}
    if args.do_train:
        metrics["train"] = trainer.train(resume_from_checkpoint=plan.checkpoint and str(plan.checkpoint)).metrics
    if args.do_eval:
        metrics["eval"] = _last_evaluation(trainer) or trainer.evaluate()
    if args.do_train:
        trainer.save_model()
    _write_results(trainer, metrics)
    if args.do_train and args.should_save:
        finish_run(args.output_dir, settings)
    _say_where(args, metrics.get("eval"))
    return trainer


# ---- before the run


def _complete(model_args: ModelArguments, data_args: DataArguments, args: RunArguments) -> None:
    """Fill in what follows from other arguments, and refuse what contradicts them."""
    # As in run_mlm.py, --do_eval alone only evaluates; asking for evaluations during training implies training.
    if args.eval_strategy != "no" or args.eval_on_start:
        args.do_train = args.do_eval = True
    if not args.do_eval:
        args.do_train = True
    if model_args.smoke_test:
        if model_args.model_name_or_path or model_args.config_name:
            raise UsageError("smoke_test brings its own tiny model: leave out model_name_or_path and config_name")
        for name, value in _SMOKE.items():
            setattr(model_args, name, value)
        data_args.max_seq_length = data_args.max_seq_length or 64
        data_args.train_file = data_args.dataset_name = None
        if args.max_steps < 0:
            args.max_steps = 20
    given = [name for name in ("model_name_or_path", "model_type", "config_name") if getattr(model_args, name)]
    if not given:
        raise UsageError(
            "name the encoder to start from with --model_name_or_path, or for a random start --model_type or "
            "--config_name; configs/quickstart.yaml needs neither a model nor data"
        )
    if len(given) > 1:
        raise UsageError(
            f"{given[0]} and {given[1]} exclude each other: the one is a pretrained start, or names another"
        )
    if model_args.config_overrides and model_args.model_name_or_path:
        raise UsageError("config_overrides is for a random start: with model_name_or_path the weights fix the sizes")
    if data_args.streaming and args.do_train and args.max_steps <= 0:
        raise UsageError("streaming needs --max_steps, because a stream's length is not known")
    if model_args.dtype != "float32":
        raise UsageError(
            f"dtype {model_args.dtype!r}: the target's moving average does not move in less than float32; leave dtype "
            "at float32 and compute in bfloat16 with --bf16"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > args.world_size:
        raise UsageError(
            "several processes were started, but each would run alone; for ranks on CPUs use an accelerate "
            "configuration like configs/accelerate/cpu2.yaml"
        )
    for name in ("train_file", "validation_file"):
        if getattr(data_args, name) and data_args.dataset_name:
            raise UsageError(f"{name} and dataset_name exclude each other; give one of them")
    try:
        get_reporting_integration_callbacks(args.report_to)
    except (ValueError, RuntimeError, ImportError) as error:
        raise UsageError(f"report_to {', '.join(args.report_to)}: {' '.join(str(error).split())}") from None
    for name, value, least in (
        ("per_device_train_batch_size", args.per_device_train_batch_size, 1),
        ("per_device_eval_batch_size", args.per_device_eval_batch_size, 1),
        ("gradient_accumulation_steps", args.gradient_accumulation_steps, 1),
        ("learning_rate", args.learning_rate, 0),
        ("seed", args.seed, 0),
        ("tokenizer_vocab_size", model_args.tokenizer_vocab_size, 1),
    ):
        if not value >= least:
            raise UsageError(f"{name} must be at least {least}, not {value}")


def _settings(parsed: Parsed) -> dict[str, Any]:
    """All arguments as JSON knows them; secrets left out."""
    merged: dict[str, Any] = {}
    for part in parsed:
        merged |= part.to_dict() if isinstance(part, RunArguments) else vars(part)
    secrets = ("token", "hub_token", "push_to_hub_token")
    return json.loads(json.dumps({name: value for name, value in merged.items() if name not in secrets}, default=str))


def _hub_kwargs(model_args: ModelArguments, data_args: DataArguments) -> dict[str, Any]:
    return {
        "revision": model_args.model_revision,
        "trust_remote_code": model_args.trust_remote_code,
        "token": data_args.token,
        "cache_dir": data_args.cache_dir,
    }


def _encoder_config(model_args: ModelArguments, data_args: DataArguments) -> PreTrainedConfig:
    """The encoder's configuration: the pretrained one's, or that of a random start."""
    name = model_args.model_name_or_path or model_args.config_name
    if name is None:
        try:
            config = AutoConfig.for_model(model_args.model_type)
        except ValueError:
            raise UsageError(
                f"model_type {model_args.model_type!r} is not one that transformers knows; use {', '.join(_FAMILIES)}"
            ) from None
    else:
        argument = "model_name_or_path" if model_args.model_name_or_path else "config_name"
        config = _load(argument, name, AutoConfig.from_pretrained, _hub_kwargs(model_args, data_args))
    if isinstance(config, JepaConfig):
        config = config.encoder_config
    if model_args.config_overrides:
        try:
            config.update_from_string(model_args.config_overrides)
            values = config.to_dict()
            if len(values.get("layer_types") or ()) != config.num_hidden_layers:
                values.pop("layer_types", None)  # ModernBERT's follow from the number of layers
            config = type(config).from_dict(values)
        except (ValueError, IndexError, StrictDataclassError) as error:
            raise UsageError(
                f"config_overrides {model_args.config_overrides!r} must have the form name=value,name=value with names "
                f"of the {config.model_type} configuration: {' '.join(str(error).split())}"
            ) from None
    needed = ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings")
    reads_both_ways = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.is_encoder_decoder
    if not reads_both_ways or not all(hasattr(config, name) for name in needed):
        raise UsageError(f"a {config.model_type} model is no text encoder; use {', '.join(_FAMILIES)}")
    # Refuse an impossible combination before any data is read.
    JepaConfig(config, **model_args.jepa_kwargs())
    return config


def _load(argument: str, name: str, loader: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
    """Call a `from_pretrained`, turning its long explanations into a sentence."""
    try:
        return loader(name, **kwargs)
    except UsageError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if Path(name).is_dir():
            reason = " ".join(str(error).split())[:300]
            if "ignore_mismatched_sizes" in reason:
                reason = "its weights have other sizes than the flags ask for; leave out those that change its sizes"
            raise UsageError(f"{argument} {name!r} cannot be loaded: {reason}") from None
        raise UsageError(
            f"{argument} {name!r} is neither a directory here nor a model that the Hub gave; check the name, the "
            "network, and --token for a private one"
        ) from None


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
    tokenizer = _load(argument, name, AutoTokenizer.from_pretrained, _hub_kwargs(model_args, data_args))
    if len(tokenizer) > len(tokenizer.all_special_ids):
        return tokenizer
    # What transformers makes of a directory without a tokenizer knows special tokens only.
    if argument == "config_name":
        return None
    raise UsageError(f"{argument} {name!r} holds no tokenizer; name one with --tokenizer_name")


def _check_length(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None, data_args: DataArguments) -> int:
    """The longest row, in tokens: `max_seq_length`, or what model and tokenizer allow, 512 at most."""
    possible = backbone_for(config).max_length
    if data_args.max_seq_length is None:
        return min(possible, 512, tokenizer.model_max_length if tokenizer is not None else 512)
    if data_args.max_seq_length > possible:
        raise UsageError(
            f"max_seq_length {data_args.max_seq_length} is more than the {possible} positions of the model; "
            f"use at most {possible}"
        )
    return data_args.max_seq_length


def _model_and_collator(
    parsed: Parsed, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, length: int
) -> tuple[JepaForRepresentationPrediction, DataCollatorForSpanJEPA]:
    model_args, data_args, mask_args, args = parsed
    _add_tokens(tokenizer, model_args)
    model = _model(model_args, data_args, config, tokenizer)
    collator = DataCollatorForSpanJEPA(
        tokenizer,
        mask_ratio=mask_args.mask_ratio,
        mean_span_length=mask_args.mean_span_length,
        context_mode=model.config.context_mode,
        num_masks=mask_args.num_masks,
        whole_word=mask_args.whole_word,
        on_short=mask_args.on_short,
        pad_to_multiple_of=data_args.pad_to_multiple_of,
        max_length=length if data_args.pad_to_max_length or args.torch_compile else None,
        seed=args.seed,
    )
    return model, collator


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


def _model(
    model_args: ModelArguments,
    data_args: DataArguments,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> JepaForRepresentationPrediction:
    attention = (
        {} if model_args.attn_implementation is None else {"attn_implementation": model_args.attn_implementation}
    )
    if model_args.model_name_or_path is None:
        config.vocab_size = len(tokenizer)
        for name in ("pad", "cls", "sep", "bos", "eos"):
            # Configurations differ in which of these they have; the tokenizer's are the right ones.
            if getattr(config, f"{name}_token_id", None) is not None:
                setattr(config, f"{name}_token_id", getattr(tokenizer, f"{name}_token_id"))
        try:
            jepa_config = JepaConfig(config, **model_args.jepa_kwargs())
            return JepaForRepresentationPrediction._from_config(jepa_config, **attention)
        except UsageError:
            raise
        except ValueError as error:
            raise UsageError(f"no {config.model_type} encoder can be built like that: {error}") from None
    model = _load(
        "model_name_or_path",
        model_args.model_name_or_path,
        lambda name, **kwargs: JepaForRepresentationPrediction.from_any_pretrained(
            name, encoder_kwargs=kwargs, **model_args.jepa_kwargs()
        ),
        {**_hub_kwargs(model_args, data_args), **attention},
    )
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    return model


def _tokenize(
    texts: Any, tokenizer: PreTrainedTokenizerBase, data_args: DataArguments, length: int, word_ids: bool
) -> Any:
    return tokenize_dataset(
        texts,
        tokenizer,
        max_seq_length=length,
        stride=data_args.stride,
        concat=data_args.concat,
        word_ids=word_ids,
        num_proc=data_args.preprocessing_num_workers,
        load_from_cache_file=not data_args.overwrite_cache,
    )


# ---- what is said and written


def _say(args: RunArguments, text: str) -> None:
    if args.process_index == 0:
        print(text, flush=True)


def _announce(trainer: JepaTrainer, args: RunArguments) -> None:
    model = trainer.model
    start = "pretrained" if trainer.ema.pretrained else "random"
    count = sum(parameter.numel() for parameter in model.context_encoder.parameters())
    _say(
        args,
        f"{model.config.encoder_config.model_type} encoder, {count / 1e6:.1f} M parameters, {start} start; "
        f"{model.config.predictor_type} predictor, masked positions {model.config.context_mode}",
    )


def _last_evaluation(trainer: JepaTrainer) -> dict[str, float] | None:
    """The metrics of an evaluation that was made after the last step anyway."""
    for entry in reversed(trainer.state.log_history):
        if "eval_loss" in entry and entry["step"] == trainer.state.global_step and trainer.state.global_step > 0:
            return {name: value for name, value in entry.items() if name.startswith("eval_")}
    return None


def _write_results(trainer: JepaTrainer, metrics: dict[str, Any]) -> None:
    """`metrics.json`, the picture and the card."""
    if not trainer.args.should_save:
        return
    folder = Path(trainer.args.output_dir)
    history = trainer.state.log_history
    (folder / "metrics.json").write_text(json.dumps({**metrics, "history": history}, indent=1) + "\n", encoding="utf-8")
    plot_training(history, folder / "training.png")
    if trainer.args.do_train:
        trainer.create_model_card()


def _say_where(args: RunArguments, evaluation: dict[str, float] | None) -> None:
    folder = args.output_dir
    if not args.do_train:
        _say(args, f"{json.dumps(evaluation, indent=1)}\nwritten to {folder}: metrics.json, training.png")
        return
    _say(
        args,
        f"\nwritten to {folder}: the encoder, its tokenizer, README.md (card), metrics.json, training.png; "
        f"{folder}/jepa: the full model to train on from\n\n"
        "from transformers import AutoModel, AutoTokenizer\n"
        f'encoder, tokenizer = AutoModel.from_pretrained("{folder}"), AutoTokenizer.from_pretrained("{folder}")',
    )
