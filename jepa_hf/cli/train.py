"""`run_jepa.py`, `jepa-hf train` and `jepa_hf.pretrain`: one training run, from flags to files."""

import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerCallback

from ..data.arguments import DataArguments
from ..data.feature_readers import is_array_file
from ..errors import RunError, UsageError
from ..hub.export import JEPA_FOLDER
from ..hub.loading import hidden_loading_bars
from ..hub.push import PushError
from ..llm_jepa import LlmJepaTrainer
from ..models.configuration_feature_encoder import FeatureEncoderConfig
from ..training.run_directory import RunPlan
from ..training.signals import GracefulShutdownCallback
from ..training.trainer import JepaTrainer
from ..utils.types import ProcessingClass
from .arguments import ModelArguments, Parsed, RunArguments
from .console import quiet_libraries, report_error
from .encoder_loading import TrainingComponents
from .llm_arguments import LLM_CLASSES
from .parsing import parse_command, parse_flags
from .passed_objects import model_directory, quiet_datasets, set_datasets
from .prepare import prepare
from .quick_checks import peek_objective
from .run import (
    apply_smoke_test,
    check_run,
    check_start,
    describe_parameters,
    push,
    resolve_defaults,
    run_trainer,
)
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
        The exit code: 0; 1 if `--stop_on_collapse` ended the run, if the run learned nothing, if the result could not
        be pushed, or after a `RunError`; 2 after a `UsageError`; 143 after SIGTERM and 130 after Ctrl-C.
    """
    quiet_libraries()
    interruption = GracefulShutdownCallback()
    try:
        arguments = list(sys.argv[1:] if argv is None else argv)
        is_llm = peek_objective(arguments) == "llm"
        trainer: JepaTrainer | LlmJepaTrainer | None
        if is_llm:
            trainer = run_llm(parse_command(arguments, LLM_CLASSES), interruption)
        else:
            trainer = run(parse_command(arguments), interruption)
    except (UsageError, RunError) as error:
        return report_error(command, error)
    except KeyboardInterrupt:  # before or after the training
        print(f"\n{command}: Interrupted. Run the same command again to continue.", file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception as error:
        code = _report_interrupted_step(command, error, interruption)
        if code is None:
            raise
        return code
    if trainer is None:
        return 0
    code = 0 if trainer.succeeded else 1
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


def _report_interrupted_step(command: str, error: Exception, interruption: GracefulShutdownCallback) -> int | None:
    """Report an error that follows from a signal, or from an earlier one during a compilation.

    Returns:
        The exit code; None for any other error.
    """
    if interruption.signal_received is not None:  # it also ended a compiler, or another process of the run
        name = interruption.signal_received.name
        message = f"Stopped by {name} in an unfinished step. Run the same command again to continue."
        print(f"\n{command}: {message}", file=sys.stderr)
        return interruption.exit_code
    if not type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
        return None
    reason = str(error).strip().partition("\n")[0]
    message = (
        f"torch.compile failed: {reason} An interrupted compilation may have left broken files in its cache. Set "
        "TORCHINDUCTOR_CACHE_DIR to a new folder, or leave out --torch_compile."
    )
    return report_error(command, RunError(message))


def pretrain(
    model: str | Path | PreTrainedModel | None = None,
    *,
    processing_class: ProcessingClass | None = None,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    config: str | Path | None = None,
    callbacks: Sequence[TrainerCallback] | None = None,
    **flags: Any,
) -> JepaTrainer | LlmJepaTrainer:
    """Pretrain with JEPA in one call; the flags of `run_jepa.py` are its arguments.

    Ctrl-C and SIGTERM save a checkpoint, see `BaseJepaTrainer.train`; the same call then continues.

    Args:
        model: directory or Hub name of the model to start from (`model_name_or_path`), or a model of transformers: an
            encoder, a JEPA, or with `objective="llm"` a language model. A copy of it is trained.
        processing_class: the tokenizer or image processor of a model that is passed as an object. Default: that of the
            directory or Hub name from which it was loaded.
        train_dataset: instead of `train_file` or `dataset_name`: a `Dataset`, an `IterableDataset`, a data set of
            torch, or a list of rows.
        eval_dataset: the same to evaluate on; it implies `do_eval`.
        config: YAML recipe; the other arguments override its values, and add to its dictionaries.
        callbacks: additional callbacks of the trainer.
        flags: any flag of `run_jepa.py`, such as `train_file`, `output_dir`, `max_steps`; with `objective="llm"`, those
            of LLM-JEPA. Files may be paths or lists of paths, and `config_overrides` a dictionary.

    Returns:
        The trainer after training. If the output directory contains the same run, finished, nothing is trained, and
        the trainer has the model and the state of that run.

    Raises:
        UsageError: bad input.
        RunError: the run cannot continue, or has learned nothing.
        PushError: with `push_to_hub`, the push failed; the result is in the output directory.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:  # doctest: +ELLIPSIS
    ...     trainer = pretrain(smoke_test=True, max_steps=1, output_dir=folder, use_cpu=True)
    Preparing the model and the data.
    bert encoder, 0.2 M parameters, random start; ...
    >>> trainer.state.global_step
    1
    """
    if eval_dataset is not None:
        flags = {"do_eval": True, "do_train": True, **flags}
    recipe = None if config is None else str(config)
    objective = flags["objective"] if "objective" in flags else peek_objective([] if recipe is None else [recipe])
    classes = {"classes": LLM_CLASSES} if objective == "llm" else {}
    with hidden_loading_bars(), quiet_datasets(), model_directory(model, processing_class) as (name, passed_model):
        if name is not None:
            flags["model_name_or_path"] = name
        parsed = parse_flags(flags, config=recipe, **classes)
        parsed[0].passed_model = passed_model
        if train_dataset is not None:
            set_datasets(parsed[1], train_dataset, eval_dataset)
        elif eval_dataset is not None:
            raise UsageError("eval_dataset needs train_dataset; name files to evaluate on with validation_file")
        execute = run_llm if objective == "llm" else run
        trainer = execute(parsed, callbacks=callbacks, load_finished=True)
    assert trainer is not None  # nosec B101  # None stands for a finished run that is not loaded
    if trainer.args.push_to_hub:
        push(trainer)
    return trainer


def run(
    parsed: Parsed,
    interruption: GracefulShutdownCallback | None = None,
    callbacks: Sequence[TrainerCallback] | None = None,
    load_finished: bool = False,
) -> JepaTrainer | None:
    """Run JEPA on an encoder, see `run_trainer`."""
    model_args, data_args, _, args = parsed
    finalize_arguments(model_args, data_args, args)

    def build(plan: RunPlan) -> JepaTrainer:
        prepared = prepare(parsed, plan)
        return JepaTrainer(
            prepared.model,
            args,
            data_collator=prepared.collator,
            train_dataset=prepared.train_dataset,
            eval_dataset=prepared.eval_dataset,
            processing_class=prepared.processing_class,
            probe=None if data_args.probe_task is None else _probe(data_args.probe_task, prepared, args),
            callbacks=callbacks,
        )

    return run_trainer(parsed, build, _describe, JEPA_FOLDER, interruption, load_finished, data_args.probe_task)


# ---- before the run


def finalize_arguments(model_args: ModelArguments, data_args: DataArguments, args: RunArguments) -> None:
    """Set arguments that follow from others, and reject contradictions."""
    resolve_defaults((model_args, data_args, args), args)
    if model_args.smoke_test:
        apply_smoke_test(model_args, data_args, args, _SMOKE_TEST_MODEL)
        data_args.max_seq_length = data_args.max_seq_length or 64
    if model_args.objective not in (None, "span", "images", "features"):
        raise UsageError(f"objective must be one of span, images, features, llm, not {model_args.objective!r}.")
    has_start = any((model_args.model_name_or_path, model_args.model_type, model_args.config_name))
    if not has_start and (model_args.objective == "features" or is_array_file(data_args.train_file or "")):
        model_args.model_type = FeatureEncoderConfig.model_type
    elif not has_start:
        raise UsageError(
            "The run has no encoder. Name a pretrained one with --model_name_or_path, or a random start with "
            "--model_type or --config_name. Rows of numbers need only --objective features, and "
            "configs/quickstart.yaml needs neither a model nor data."
        )
    check_start(model_args)
    if data_args.probe_task and not args.do_eval:
        raise UsageError("probe_task is measured in evaluations. Set --do_eval, or --eval_strategy steps.")
    if data_args.streaming and args.do_train and args.max_steps <= 0:
        raise UsageError("The length of a stream is unknown. With streaming, set --max_steps.")
    if model_args.dtype != "float32":
        raise UsageError(
            f"dtype {model_args.dtype!r} is too coarse for the target's moving average. Keep dtype float32, and "
            "compute in bfloat16 with --bf16."
        )
    check_run(data_args, args)


def _probe(source: str, prepared: TrainingComponents, args: RunArguments) -> Callable[..., dict[str, float]]:
    """Load the probe of `--probe_task` and try it once, so that bad data is reported before the run."""
    from ..evaluation.online_probe import OnlineProbe  # needs scikit-learn

    config = prepared.model.config.encoder_config
    names = config.feature_column_names if isinstance(config, FeatureEncoderConfig) else None
    probe = OnlineProbe.from_source(
        source, prepared.processing_class, args.per_device_train_batch_size, args.seed, names
    )
    probe.validate(prepared.model)
    return probe


# ---- console messages


def _describe(trainer: JepaTrainer) -> tuple[str, str]:
    """Return messages about encoder, start and predictor, and about the files written and how to load them."""
    model, folder = trainer.model, trainer.args.output_dir
    start = "pretrained" if trainer.ema_callback.pretrained else "random"
    parameters = describe_parameters(model.context_encoder, model.config.lora is not None)
    summary = (
        f"{model.config.encoder_config.model_type} encoder, {parameters}, {start} start; "
        f"{model.config.predictor_type} predictor, masked positions "
        f"{'dropped' if model.config.masked_tokens == 'drop' else 'replaced'}"
    )
    processing_class, loading = _USAGE_BY_MODALITY[model.encoder_adapter.modality]
    usage = (
        f"the encoder{processing_class}, README.md (card), metrics.json, training.png; "
        f"{folder}/jepa: the full model for further training\n\n{loading.format(folder=folder)}"
    )
    return summary, usage


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
