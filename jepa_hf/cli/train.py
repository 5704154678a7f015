"""`run_jepa.py`, `jepa-hf train` and `jepa_hf.pretrain`: one training run, from flags to files."""

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
from ..training.signals import GracefulShutdownCallback
from ..training.trainer import JepaTrainer
from ..utils.atomic_files import atomic_write
from .arguments import ModelArguments, Parsed, RunArguments
from .console import quiet_libraries, report_error
from .encoder_loading import TrainingComponents
from .parsing import parse_command, parse_flags, peek_objective
from .prepare import prepare
from .run import (
    apply_smoke_test,
    basenames,
    check_minimum,
    check_run,
    check_start,
    describe_data,
    describe_parameters,
    execute_run,
    make_run_plan,
    print_rank0,
    push,
    resolve_defaults,
    serialize_settings,
)
from .train_llm import LLM_CLASSES, LLM_DESCRIPTION
from .train_llm import run as run_llm

_SMOKE_TEST_MODEL = {
    "model_type": "bert",
    "config_overrides": "hidden_size=64,num_hidden_layers=2,num_attention_heads=2,intermediate_size=128",
    "tokenizer_vocab_size": 2048,
}


def main(argv: Sequence[str] | None = None, command: str = "run_jepa.py") -> int:
    """Train from the command line.

    SIGTERM and Ctrl-C end the training after the current step with a checkpoint, see `GracefulShutdownCallback`.

    Returns:
        The exit code: 0; 1 if `--stop_on_collapse` ended the run, if the result could not be pushed, or after a
        `RunError`; 2 after a `UsageError`; 143 after SIGTERM and 130 after Ctrl-C.
    """
    quiet_libraries()
    interruption = GracefulShutdownCallback()
    try:
        arguments = list(sys.argv[1:] if argv is None else argv)
        trainer: JepaTrainer | LlmJepaTrainer | None
        if peek_objective(arguments) == "llm":
            trainer = run_llm(parse_command(arguments, LLM_CLASSES, LLM_DESCRIPTION), interruption)
        else:
            trainer = run(parse_command(arguments), interruption)
    except (UsageError, RunError) as error:
        return report_error(command, error)
    except KeyboardInterrupt:  # before or after the training
        print(f"\n{command}: interrupted; run the same command again to continue", file=sys.stderr)
        return 128 + signal.SIGINT
    if trainer is None:
        return 0
    code = 1 if trainer.stopped_early else 0
    if trainer.args.push_to_hub and not interruption.stopped:
        try:
            push(trainer)
        except (PushError, UsageError) as error:
            report_error(command, error)
            code = 1
    # Ranks on CPUs skip this (see `leave`): gloo's process group, freed with the trainer, can deadlock with one of its
    # own threads over the interpreter's lock.
    if trainer.args.device.type != "cpu":
        trainer.accelerator.end_training()  # closes the process group
    return interruption.exit_code if interruption.stopped else code


def pretrain(model: str | None = None, **flags: Any) -> JepaTrainer | LlmJepaTrainer | None:
    """Pretrain with JEPA in one call; the flags of `run_jepa.py` are its arguments.

    Args:
        model: directory or Hub name of the model to start from (`model_name_or_path`).
        flags: any flag of `run_jepa.py`, such as `train_file`, `output_dir`, `max_steps`; with `objective="llm"`, those
            of LLM-JEPA.

    Returns:
        The trainer after training, or None if the output directory contains the same run, finished.

    Raises:
        UsageError: bad input.
        PushError: with `push_to_hub`, the push failed; the result is in the output directory.

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


def run(parsed: Parsed, interruption: GracefulShutdownCallback | None = None) -> JepaTrainer | None:
    """Check, prepare, train, evaluate, write. Nothing on disk changes before everything has been checked.

    With `push_to_hub`, checkpoints are pushed during training; the caller pushes the result.

    Args:
        parsed: the arguments.
        interruption: ends the training on a termination signal; None leaves signals alone.
    """
    model_args, data_args, _, args = parsed
    finalize_arguments(model_args, data_args, args)
    settings = serialize_settings(parsed)
    run_plan = make_run_plan(args, settings)
    if run_plan.finished:
        return None
    # Imported late, so that bad arguments are reported without loading matplotlib.
    from ..monitoring.mask_plots import write_masks
    from ..monitoring.training_plots import plot_training

    set_seed(args.seed)
    prepared = prepare(parsed, run_plan)
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
        if args.should_save and args.do_train:  # before training, so that users can look at it
            with atomic_write(Path(args.output_dir) / "masks.png") as picture:
                write_masks(
                    prepared.model, prepared.collator, prepared.train_dataset, picture, prepared.processing_class
                )
        _print_summary(trainer, args)

    names = describe_data(data_args, args, own="Python's language reference")
    names.probe = basenames(data_args.probe_task)
    execute_run(trainer, run_plan, settings, names, interruption, begin, _usage_message(trainer), plot_training)
    return trainer


# ---- before the run


def finalize_arguments(model_args: ModelArguments, data_args: DataArguments, args: RunArguments) -> None:
    """Set arguments that follow from others, and reject contradictions."""
    resolve_defaults((model_args, data_args, args), args)
    if model_args.smoke_test:
        apply_smoke_test(model_args, data_args, args, _SMOKE_TEST_MODEL)
        data_args.max_seq_length = data_args.max_seq_length or 64
    if model_args.objective not in (None, "span", "images", "features"):
        raise UsageError(f"objective must be one of span, images, features, llm, not {model_args.objective!r}")
    has_start = any((model_args.model_name_or_path, model_args.model_type, model_args.config_name))
    if not has_start and (model_args.objective == "features" or _is_array_file(data_args.train_file)):
        model_args.model_type = FeatureEncoderConfig.model_type
    elif not has_start:
        raise UsageError(
            "name the encoder to start from with --model_name_or_path, or a random start with --model_type or "
            "--config_name; configs/quickstart.yaml needs neither a model nor data"
        )
    check_start(model_args)
    if data_args.probe_task and not args.do_eval:
        raise UsageError("probe_task is measured in evaluations; give --do_eval, or --eval_strategy steps")
    if data_args.streaming and args.do_train and args.max_steps <= 0:
        raise UsageError("streaming needs --max_steps, because the length of a stream is unknown")
    if model_args.dtype != "float32":
        raise UsageError(
            f"dtype {model_args.dtype!r}: the target's moving average needs float32 weights; keep dtype float32 and "
            "compute in bfloat16 with --bf16"
        )
    check_run(data_args, args)
    check_minimum("tokenizer_vocab_size", model_args.tokenizer_vocab_size, 1)


def _probe(source: str, prepared: TrainingComponents, args: RunArguments) -> Callable[..., dict[str, float]]:
    """Load the probe of `--probe_task` and try it once, so that bad data is reported before the run."""
    try:
        from ..evaluation.online_probe import OnlineProbe
    except ModuleNotFoundError as error:
        raise UsageError(
            f"probe_task needs {error.name}, which is not installed: pip install 'jepa_hf[evaluate]'"
        ) from None
    probe = OnlineProbe.from_source(source, prepared.processing_class, args.per_device_train_batch_size, args.seed)
    probe.validate(prepared.model)
    return probe


def _is_array_file(files: str | None) -> bool:
    """Return whether the files are arrays, and so the data features."""
    return files is not None and files.lower().endswith((".npy", ".npz"))


# ---- console messages


def _print_summary(trainer: JepaTrainer, args: RunArguments) -> None:
    """Print encoder, start and predictor of the run."""
    model = trainer.model
    start = "pretrained" if trainer.ema_callback.pretrained else "random"
    parameters = describe_parameters(model.context_encoder, model.config.lora is not None)
    print_rank0(
        args,
        f"{model.config.encoder_config.model_type} encoder, {parameters}, {start} start; "
        f"{model.config.predictor_type} predictor, masked positions "
        f"{'dropped' if model.config.masked_tokens == 'drop' else 'replaced'}",
    )


def _usage_message(trainer: JepaTrainer) -> str:
    """Return the message about the files written and how to load them."""
    folder = trainer.args.output_dir
    processing_class, loading = _USAGE_BY_MODALITY[trainer.model.encoder_adapter.modality]
    return (
        f"the encoder{processing_class}, README.md (card), metrics.json, training.png; "
        f"{folder}/jepa: the full model for further training\n\n{loading.format(folder=folder)}"
    )


# The processing class saved with the encoder, and the code that loads both.
_USAGE_BY_MODALITY = {
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
