"""`run_jepa.py`, `jepa-hf train` and `jepa_hf.pretrain`: one run, from flags to files."""

import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import set_seed

from ..data.arguments import DataArguments
from ..errors import RunError, UsageError
from ..hub.push import PushError
from ..llm_jepa import LlmJepaTrainer
from ..models.configuration_feature_encoder import FeatureEncoderConfig
from ..training.signals import InterruptionCallback
from ..training.trainer import JepaTrainer
from ..utils.atomic_files import whole_file
from .arguments import ModelArguments, Parsed, RunArguments
from .console import complain, quiet_libraries
from .encoder_loading import Prepared
from .parsing import objective_of, parse_command, parse_flags
from .prepare import prepare
from .run import (
    carry_out,
    check_run,
    check_start,
    data_names,
    last_parts,
    plan,
    push,
    refuse_below,
    say,
    settings_of,
    settle,
)
from .train_llm import LLM_CLASSES, LLM_DESCRIPTION
from .train_llm import run as run_llm

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
        arguments = list(sys.argv[1:] if argv is None else argv)
        if objective_of(arguments) == "llm":
            trainer = run_llm(parse_command(arguments, LLM_CLASSES, LLM_DESCRIPTION), interruption)
        else:
            trainer = run(parse_command(arguments), interruption)
    except (UsageError, RunError) as error:
        return complain(command, error)
    except KeyboardInterrupt:  # before or after the training
        print(f"\n{command}: interrupted; give the same command again to go on", file=sys.stderr)
        return 128 + signal.SIGINT
    if trainer is None:
        return 0
    code = 1 if trainer.gave_up else 0
    if trainer.args.push_to_hub and not interruption.stopped:
        try:
            push(trainer)
        except (PushError, UsageError) as error:
            complain(command, error)
            code = 1
    # Ranks on CPUs leave without (see `leave`): freed with the trainer, gloo's process group waits, holding the
    # interpreter's lock, for a thread of its own that now and then waits for that lock.
    if trainer.args.device.type != "cpu":
        trainer.accelerator.end_training()  # closes the process group
    return interruption.exit_code if interruption.stopped else code


def pretrain(model: str | None = None, **flags: Any) -> JepaTrainer | LlmJepaTrainer | None:
    """Pretrain with JEPA in one call; the flags of `run_jepa.py` are its arguments.

    Args:
        model: directory or Hub name of the model to start from (`model_name_or_path`).
        flags: any flag of `run_jepa.py`, such as `train_file`, `output_dir`, `max_steps`; with `objective="llm"`, those
            of a language model and two views.

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
    is_llm = flags.get("objective") == "llm"
    trainer = run_llm(parse_flags(flags, LLM_CLASSES)) if is_llm else run(parse_flags(flags))
    if trainer is not None and trainer.args.push_to_hub:
        push(trainer)
    return trainer


def run(parsed: Parsed, interruption: InterruptionCallback | None = None) -> JepaTrainer | None:
    """Check, prepare, train, evaluate, write. Nothing on disk is touched before everything is checked.

    With `push_to_hub`, checkpoints are pushed in between, and the result is for the caller to push.

    Args:
        interruption: what ends the training where the process is asked to go; None leaves signals alone.
    """
    model_args, data_args, _, args = parsed
    complete(model_args, data_args, args)
    settings = settings_of(parsed)
    planned = plan(args, settings)
    if planned.finished:
        return None
    # Not before: a start that ends in a sentence does without matplotlib.
    from ..monitoring.mask_plots import write_masks
    from ..monitoring.training_plots import plot_training

    set_seed(args.seed)
    prepared = prepare(parsed, planned)
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

    def begin() -> None:
        if args.should_save and args.do_train:  # now, so that one can look while it trains
            with whole_file(Path(args.output_dir) / "masks.png") as picture:
                write_masks(
                    prepared.model, prepared.collator, prepared.train_dataset, picture, prepared.processing_class
                )
        _announce(trainer, args)

    names = data_names(data_args, args, own="Python's language reference")
    names.probe = last_parts(data_args.probe_task)
    carry_out(trainer, planned, settings, names, interruption, begin, _loading(trainer), plot_training)
    return trainer


# ---- before the run


def complete(model_args: ModelArguments, data_args: DataArguments, args: RunArguments) -> None:
    """Fill in what follows from other arguments, and refuse what contradicts them."""
    settle((model_args, data_args, args), args)
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
        raise UsageError(f"objective must be one of span, images, features, llm, not {model_args.objective!r}")
    given = [name for name in ("model_name_or_path", "model_type", "config_name") if getattr(model_args, name)]
    if not given and (model_args.objective == "features" or _holds_arrays(data_args.train_file)):
        model_args.model_type = FeatureEncoderConfig.model_type
    elif not given:
        raise UsageError(
            "name the encoder to start from with --model_name_or_path, or for a random start --model_type or "
            "--config_name; configs/quickstart.yaml needs neither a model nor data"
        )
    check_start(model_args)
    if data_args.probe_task and not args.do_eval:
        raise UsageError("probe_task is looked at in evaluations: give --do_eval, or --eval_strategy steps")
    if data_args.streaming and args.do_train and args.max_steps <= 0:
        raise UsageError("streaming needs --max_steps, because a stream's length is not known")
    if model_args.dtype != "float32":
        raise UsageError(
            f"dtype {model_args.dtype!r}: the target's moving average does not move in less than float32; leave dtype "
            "at float32 and compute in bfloat16 with --bf16"
        )
    check_run(data_args, args)
    refuse_below("tokenizer_vocab_size", model_args.tokenizer_vocab_size, 1)


def _probe(source: str, prepared: Prepared, args: RunArguments) -> Callable[..., dict[str, float]]:
    """The probe of `--probe_task`, tried once so that what it cannot read is told before the run."""
    try:
        from ..evaluation.online_probe import OnlineProbe
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


# ---- what is said


def _announce(trainer: JepaTrainer, args: RunArguments) -> None:
    model = trainer.model
    start = "pretrained" if trainer.ema.pretrained else "random"
    count = sum(parameter.numel() for parameter in model.context_encoder.parameters())
    trained = sum(parameter.numel() for parameter in model.context_encoder.parameters() if parameter.requires_grad)
    adapters = "" if model.config.lora is None else f" ({trained / 1e6:.2f} M of them in adapters, which are trained)"
    say(
        args,
        f"{model.config.encoder_config.model_type} encoder, {count / 1e6:.1f} M parameters{adapters}, {start} start; "
        f"{model.config.predictor_type} predictor, masked positions {model.config.context_mode}",
    )


def _loading(trainer: JepaTrainer) -> str:
    """What a training leaves, and how to load it."""
    folder = trainer.args.output_dir
    beside, loading = _LOADING[trainer.model.backbone.modality]
    return (
        f"the encoder{beside}, README.md (card), metrics.json, training.png; "
        f"{folder}/jepa: the full model to train on from\n\n{loading.format(folder=folder)}"
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
