"""`run_jepa.py`, `jepa-hf train` and `jepa_hf.pretrain`: one run, from flags to files."""

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import set_seed
from transformers.integrations import get_reporting_integration_callbacks

from ..checkpoints import writing
from ..configuration_feature_encoder import FeatureEncoderConfig
from ..data import DataArguments
from ..errors import RunError, UsageError
from ..files import whole_file
from ..interruption import InterruptionCallback
from ..mask_plots import write_masks
from ..model_card import DataNames
from ..plots import plot_training
from ..run_directory import finish_run, plan_run, start_run
from ..sharing import Destination, PushError, push_run
from ..trainer import JepaTrainer
from .arguments import ModelArguments, Parsed, RunArguments, complain, parse_command, parse_flags, quiet_libraries
from .prepare import prepare
from .prepared import Prepared

_SMOKE = {
    "model_type": "bert",
    "config_overrides": "hidden_size=64,num_hidden_layers=2,num_attention_heads=2,intermediate_size=128",
    "tokenizer_vocab_size": 2048,
}


def main(argv: Sequence[str] | None = None, command: str = "run_jepa.py") -> int:
    """Run from the command line.

    SIGTERM and Ctrl-C end the training after the step at hand with a checkpoint, see `InterruptionCallback`.

    Returns:
        The exit code: 0; 1 where `--stop_on_collapse` ended the run, where the result could not be pushed, or after a
        sentence about why the run cannot go on; 2 after a sentence about bad input; 143 after SIGTERM and 130 after
        Ctrl-C.
    """
    quiet_libraries()
    interruption = InterruptionCallback()
    try:
        parsed = parse_command(sys.argv[1:] if argv is None else argv)
        trainer = run(parsed, interruption)
    except (UsageError, RunError) as error:
        return complain(command, error)
    except KeyboardInterrupt:  # before or after the training
        print(f"\n{command}: interrupted; give the same command again to go on", file=sys.stderr)
        return 128 + signal.SIGINT
    if trainer is None:
        return 0
    code = 1 if _stopped(trainer) else 0
    if trainer.args.push_to_hub and not interruption.stopped:
        try:
            _push(trainer)
        except (PushError, UsageError) as error:
            complain(command, error)
            code = 1
    trainer.accelerator.end_training()  # closes trackers and the process group
    return interruption.exit_code if interruption.stopped else code


def pretrain(model: str | None = None, **flags: Any) -> JepaTrainer | None:
    """Pretrain with JEPA in one call; the flags of `run_jepa.py` are its arguments.

    Args:
        model: directory or Hub name of the encoder to start from (`model_name_or_path`).
        flags: any flag of `run_jepa.py`, such as `train_file`, `output_dir`, `max_steps`.

    Returns:
        The trainer after training, or None where the output directory holds this very run, finished.

    Raises:
        UsageError: bad input.
        PushError: with `push_to_hub`, the result could not be pushed; it is in the output directory, whole.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:  # doctest: +ELLIPSIS
    ...     trainer = pretrain(smoke_test=True, max_steps=1, output_dir=folder, use_cpu=True)
    bert encoder, 0.2 M parameters, random start; ...
    >>> trainer.state.global_step
    1
    """
    if model is not None:
        flags["model_name_or_path"] = model
    trainer = run(parse_flags(flags))
    if trainer is not None and trainer.args.push_to_hub:
        _push(trainer)
    return trainer


def run(parsed: Parsed, interruption: InterruptionCallback | None = None) -> JepaTrainer | None:
    """Check, prepare, train, evaluate, write. Nothing on disk is touched before everything is checked.

    With `push_to_hub`, checkpoints are pushed in between, and the result is for the caller to push.

    Args:
        interruption: what ends the training where the process is asked to go; None leaves signals alone.
    """
    model_args, data_args, _, args = parsed
    complete(model_args, data_args, args)
    settings = _settings(parsed)
    plan = plan_run(args.output_dir, settings, args.overwrite_output_dir, args.resume_from_checkpoint)
    if plan.finished:
        name = args.hub_model_id or Path(args.output_dir).absolute().name
        to = Destination(name, args.hub_private_repo, args.hub_revision)
        _say(args, plan.note + (f"; push it with {to.command(args.output_dir)}" if args.push_to_hub else ""))
        return None
    if plan.checkpoint is not None and not args.do_train:
        raise UsageError(
            f"{plan.checkpoint} is not what --do_eval alone would evaluate: name it as --model_name_or_path and choose "
            "another output_dir"
        )

    set_seed(args.seed)
    prepared = prepare(parsed, plan)
    probe = None if data_args.probe_task is None else _probe(data_args.probe_task, prepared, args)
    trainer = JepaTrainer(
        prepared.model,
        args,
        data_collator=prepared.collator,
        train_dataset=prepared.train_dataset,
        eval_dataset=prepared.eval_dataset,
        processing_class=prepared.processing_class,
        probe=probe,
    )
    if interruption is not None:
        trainer.add_callback(interruption)
    # All is checked: from here on the run writes.
    if plan.note:
        _say(args, plan.note)
    if args.should_save:
        start_run(args.output_dir, settings, plan)
        if args.do_train:  # now, so that one can look while it trains
            with whole_file(Path(args.output_dir) / "masks.png") as picture:
                write_masks(
                    prepared.model, prepared.collator, prepared.train_dataset, picture, prepared.processing_class
                )
    _announce(trainer, args)
    metrics: dict[str, Any] = {}
    if args.do_train:
        with contextlib.nullcontext() if interruption is None else interruption.listening():
            metrics["train"] = trainer.train(resume_from_checkpoint=plan.checkpoint and str(plan.checkpoint)).metrics
    if interruption is not None and interruption.stopped:
        _say(args, _how_it_stopped(trainer, interruption))
        return trainer
    if args.do_eval:
        metrics["eval"] = _last_evaluation(trainer) or trainer.evaluate()
    with writing(Path(args.output_dir), Path(args.output_dir), trainer.result_bytes):
        if args.do_train:
            trainer.save_model(_internal_call=True)  # which pushes nothing
        _write_results(trainer, metrics, _data_names(data_args, args))
        if args.do_train and args.should_save and not _stopped(trainer):
            finish_run(args.output_dir, settings)
    _say_where(trainer, metrics.get("eval"))
    for step, sentence in trainer.found.values():
        _say(args, f"\nat step {step}: {sentence}{'; the run was stopped' if _stopped(trainer) else ''}")
    return trainer


def _stopped(trainer: JepaTrainer) -> bool:
    """Whether the watchdog ended the run."""
    unfinished = trainer.state.global_step < trainer.state.max_steps
    return trainer.args.stop_on_collapse and unfinished and bool(trainer.found)


def _how_it_stopped(trainer: JepaTrainer, interruption: InterruptionCallback) -> str:
    args, step = trainer.args, trainer.state.global_step
    checkpoint = Path(args.output_dir) / f"checkpoint-{step}"
    but = " without --overwrite_output_dir" if args.overwrite_output_dir else ""
    but += " with --resume_from_checkpoint true" if args.resume_from_checkpoint else ""
    signal_name = interruption.received.name
    return f"stopped by {signal_name} after step {step}: give the same command again{but} to go on from {checkpoint}"


def _push(trainer: JepaTrainer) -> None:
    """Push what the run left. Only one process does.

    Raises:
        PushError, UsageError: it could not be; the sentence ends with the command that repeats it.
    """
    args = trainer.args
    if not trainer.is_world_process_zero():
        return
    to = trainer.destination()
    if _stopped(trainer):
        _say(args, f"\nnot pushed, because the run was stopped; {to.command(args.output_dir)} does it all the same")
        return
    try:
        commit = push_run(args.output_dir, to, "End of training")
    except (PushError, UsageError) as error:
        again = f"{error}; everything is in {args.output_dir}, and this repeats the push: {to.command(args.output_dir)}"
        raise type(error)(again) from None
    _say(args, f"\npushed to {commit.repo_url.repo_id}: {commit.commit_url}")


# ---- before the run


def complete(model_args: ModelArguments, data_args: DataArguments, args: RunArguments) -> None:
    """Fill in what follows from other arguments, and refuse what contradicts them."""
    for part in (model_args, data_args, args):
        for name, value in vars(part).items():
            if isinstance(value, str) and "\0" in value:
                raise UsageError(f"{name} holds a NUL character, which no name of a file has; leave it out")
    # As in run_mlm.py, --do_eval alone only evaluates; asking for evaluations during training implies training.
    if args.eval_strategy != "no" or args.eval_on_start:
        args.do_train = args.do_eval = True
    if not args.do_eval:
        args.do_train = True
    if args.push_to_hub and not args.do_train:
        raise UsageError("push_to_hub pushes what a run trains, and --do_eval alone trains nothing: use jepa-hf push")
    if args.push_to_hub:
        Destination(args.hub_model_id or Path(args.output_dir).absolute().name)  # refuses an impossible name
    if model_args.smoke_test:
        for name in ("model_name_or_path", "config_name", "model_type", "config_overrides"):
            if getattr(model_args, name):
                raise UsageError(f"smoke_test brings its own tiny model: leave out {name}")
        for name, value in _SMOKE.items():
            setattr(model_args, name, value)
        data_args.max_seq_length = data_args.max_seq_length or 64
        data_args.train_file = data_args.dataset_name = None
        if args.max_steps < 0:
            args.max_steps = 20
    if model_args.objective not in (None, "span", "images", "features"):
        raise UsageError(f"objective must be one of span, images, features, not {model_args.objective!r}")
    given = [name for name in ("model_name_or_path", "model_type", "config_name") if getattr(model_args, name)]
    if not given and (model_args.objective == "features" or _holds_arrays(data_args.train_file)):
        model_args.model_type = FeatureEncoderConfig.model_type
    elif not given:
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
    if model_args.use_peft and not model_args.model_name_or_path:
        raise UsageError("use_peft trains adapters beside pretrained weights: name them with model_name_or_path")
    if data_args.probe_task and not args.do_eval:
        raise UsageError("probe_task is looked at in evaluations: give --do_eval, or --eval_strategy steps")
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


def _probe(source: str, prepared: Prepared, args: RunArguments) -> Callable[..., dict[str, float]]:
    """The probe of `--probe_task`, tried once so that what it cannot read is told before the run."""
    try:
        from ..online_probe import OnlineProbe
    except ModuleNotFoundError as error:
        raise UsageError(
            f"probe_task needs {error.name}, which is not installed: pip install 'jepa_hf[evaluate]'"
        ) from None
    probe = OnlineProbe.from_source(source, prepared.processing_class, args.per_device_train_batch_size, args.seed)
    probe.check(prepared.model)
    return probe


def _holds_arrays(files: str | None) -> bool:
    """Whether the data can only be features."""
    return files is not None and files.lower().endswith((".npy", ".npz"))


def _settings(parsed: Parsed) -> dict[str, Any]:
    """All arguments as JSON knows them; secrets left out."""
    merged: dict[str, Any] = {}
    for part in parsed:
        merged |= part.to_dict() if isinstance(part, RunArguments) else vars(part)
    secrets = ("token", "hub_token", "push_to_hub_token")
    return json.loads(json.dumps({name: value for name, value in merged.items() if name not in secrets}, default=str))


# ---- what is said and written


def _say(args: RunArguments, text: str) -> None:
    if args.process_index == 0:
        print(text, flush=True)


def _announce(trainer: JepaTrainer, args: RunArguments) -> None:
    model = trainer.model
    start = "pretrained" if trainer.ema.pretrained else "random"
    count = sum(parameter.numel() for parameter in model.context_encoder.parameters())
    trained = sum(parameter.numel() for parameter in model.context_encoder.parameters() if parameter.requires_grad)
    adapters = "" if model.config.lora is None else f" ({trained / 1e6:.2f} M of them in adapters, which are trained)"
    _say(
        args,
        f"{model.config.encoder_config.model_type} encoder, {count / 1e6:.1f} M parameters{adapters}, {start} start; "
        f"{model.config.predictor_type} predictor, masked positions {model.config.context_mode}",
    )


def _last_evaluation(trainer: JepaTrainer) -> dict[str, float] | None:
    """The metrics of an evaluation that was made after the last step anyway."""
    for entry in reversed(trainer.state.log_history):
        if "eval_loss" in entry and entry["step"] == trainer.state.global_step and trainer.state.global_step > 0:
            return {name: value for name, value in entry.items() if name.startswith("eval_")}
    return None


def _data_names(data_args: DataArguments, args: RunArguments) -> DataNames:
    """What a card may call the data: a data set's name on the Hub; of files and folders the last part."""
    names = DataNames()

    def called(source: str | None) -> str:
        return ", ".join(Path(part.strip()).name for part in (source or "").split(","))

    if data_args.dataset_name and not Path(data_args.dataset_name).exists():
        names.datasets = [data_args.dataset_name]
        names.train = data_args.dataset_name
    elif data_args.dataset_name or data_args.train_file:
        names.train = called(data_args.dataset_name or data_args.train_file)
    else:
        names.train = "Python's language reference"
    if args.do_eval and data_args.validation_file:
        names.validation = called(data_args.validation_file)
    elif args.do_eval and data_args.dataset_name:
        names.validation = names.train
    elif args.do_eval:
        names.validation = f"{names.train}, held-out rows"
    names.probe = called(data_args.probe_task)
    return names


def _write_results(trainer: JepaTrainer, metrics: dict[str, Any], names: DataNames) -> None:
    """`metrics.json`, the pictures and the card."""
    if not trainer.args.should_save:
        return
    folder = Path(trainer.args.output_dir)
    history = trainer.state.log_history
    found = {kind: {"step": step, "sentence": sentence} for kind, (step, sentence) in trainer.found.items()}
    content = json.dumps({**metrics, "found": found, "history": history}, indent=1)
    with whole_file(folder / "metrics.json") as new:
        new.write_text(f"{content}\n", encoding="utf-8")
    with whole_file(folder / "training.png") as new:
        plot_training(history, new)
    if trainer.args.do_train:
        trainer.create_model_card(data=names)


def _say_where(trainer: JepaTrainer, evaluation: dict[str, float] | None) -> None:
    args, folder = trainer.args, trainer.args.output_dir
    if not args.do_train:
        _say(args, f"{json.dumps(evaluation, indent=1)}\nwritten to {folder}: metrics.json, training.png")
        return
    beside, loading = _LOADING[trainer.model.backbone.modality]
    _say(
        args,
        f"\nwritten to {folder}: the encoder{beside}, README.md (card), metrics.json, training.png; "
        f"{folder}/jepa: the full model to train on from\n\n{loading.format(folder=folder)}",
    )


# What lies beside the encoder, and how both are loaded.
_LOADING = {
    "text": (
        ", its tokenizer",
        "from transformers import AutoModel, AutoTokenizer\n"
        'encoder, tokenizer = AutoModel.from_pretrained("{folder}"), AutoTokenizer.from_pretrained("{folder}")',
    ),
    "images": (
        ", its image processor",
        "from transformers import AutoImageProcessor, AutoModel\n"
        'encoder, processor = AutoModel.from_pretrained("{folder}"), AutoImageProcessor.from_pretrained("{folder}")',
    ),
    "features": (
        "",
        "import jepa_hf\nfrom transformers import AutoModel\n"
        'encoder = AutoModel.from_pretrained("{folder}")  # takes raw features',
    ),
}
