"""Steps shared by runs of every objective: checks, training, evaluation, results and console messages."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import constants, get_token
from transformers import PreTrainedModel, TrainingArguments, set_seed
from transformers.integrations import get_reporting_integration_callbacks

from ..data.fingerprint import data_fingerprint
from ..errors import UsageError, one_line
from ..hub.model_card import DatasetInfo
from ..hub.push import HubTarget, PushError, push_run
from ..training.base_trainer import BaseJepaTrainer
from ..training.checkpoints import disk_errors_as_run_error
from ..training.checks import check_run_length
from ..training.console import can_be_judged, has_last_evaluation
from ..training.results import METRICS_FILE, read_state, write_masks
from ..training.run_directory import RunPlan, check_data, finish_run, plan_run, start_run
from ..training.signals import GracefulShutdownCallback
from ..training.training_args import MAY_CHANGE
from ..utils.flags import may_change
from ..utils.formatting import format_parameters
from .arguments import BaseModelArguments, CommandArguments
from .requirements import check_packages

Trainer = TypeVar("Trainer", bound=BaseJepaTrainer)

# ---- before the run


def resolve_defaults(parts: Sequence[Any], args: TrainingArguments) -> None:
    """Resolve `do_train` and `do_eval`, and reject impossible names."""
    for part in parts:
        for name, value in vars(part).items():
            if isinstance(value, str) and "\0" in value:
                raise UsageError(f"{name} contains a NUL character, which no file name may have. Remove it.")
        check_packages(vars(part))
    args.do_eval = args.do_eval or args.eval_on_start
    if args.do_train is None:
        # As in run_mlm.py, --do_eval alone only evaluates; evaluations during training imply training.
        args.do_train = args.eval_strategy != "no" or args.eval_on_start or not args.do_eval
    if not args.do_train and not args.do_eval:
        raise UsageError(
            "do_train is false, and nothing is to be evaluated, so there is nothing to do. Leave it out to train, or "
            "give --do_eval to evaluate the model."
        )
    if args.push_to_hub and not args.do_train:
        raise UsageError("push_to_hub needs a training run, and --do_eval alone trains nothing. Use jepa-hf push.")
    if args.push_to_hub:
        HubTarget(args.hub_model_id or run_folder(args).absolute().name)  # raises for an impossible name
        if constants.HF_HUB_OFFLINE:
            raise UsageError(
                "push_to_hub needs the Hub, but HF_HUB_OFFLINE is set. Unset it, or use jepa-hf push later."
            )
        if not (args.hub_token or get_token()):
            raise UsageError("push_to_hub needs a token. Log in with hf auth login, or set HF_TOKEN.")


def check_start(model_args: BaseModelArguments) -> None:
    """Reject contradictory arguments about the model to start from."""
    starts = [name for name in ("model_name_or_path", "model_type", "config_name") if getattr(model_args, name)]
    if len(starts) > 1:
        raise UsageError(f"{starts[0]} and {starts[1]} exclude each other. Give one of them.")
    if model_args.config_overrides and model_args.model_name_or_path:
        raise UsageError(
            "config_overrides is for a random start, and the weights of model_name_or_path fix the sizes. Omit one."
        )
    if model_args.use_peft and not model_args.model_name_or_path:
        raise UsageError("use_peft trains adapters of a pretrained model. Name it with model_name_or_path.")


def check_run(data_args: Any, args: TrainingArguments) -> None:
    """Reject processes without a process group, two sources of data, and a run of no steps."""
    if int(os.environ.get("WORLD_SIZE", "1")) > args.world_size:
        raise UsageError(
            "Several processes were started, but each would train separately. For processes on CPUs, use an accelerate "
            "configuration like configs/accelerate/cpu2.yaml and --use_cpu."
        )
    for name in ("train_file", "validation_file"):
        if getattr(data_args, name) and data_args.dataset_name:
            raise UsageError(f"{name} and dataset_name exclude each other. Give one of them.")
    if args.do_train:
        check_run_length(args)
    try:
        get_reporting_integration_callbacks(args.report_to)
    except (ValueError, RuntimeError, ImportError) as error:
        raise UsageError(f"report_to {', '.join(args.report_to or ())}: {one_line(error)} Choose another.") from None
    if args.fp16 and args.device.type == "cpu":
        raise UsageError("fp16 needs a GPU. Use --bf16, which a CPU supports.")


def apply_smoke_test(model_args: Any, data_args: Any, args: TrainingArguments, model: dict[str, Any]) -> None:
    """Set the arguments of --smoke_test, in place: a tiny random model, the built-in data, 20 steps."""
    for name in ("model_name_or_path", "config_name", "model_type", "config_overrides", "tokenizer_name"):
        if getattr(model_args, name):
            raise UsageError(f"smoke_test has its own tiny model. Omit {name}, also in a recipe.")
    for name, value in model.items():
        setattr(model_args, name, value)
    data_args.train_file = data_args.dataset_name = None
    if args.max_steps == -1:
        args.max_steps = 20


def _serialize_settings(parts: Sequence[Any]) -> dict[str, Any]:
    """Return all arguments as JSON values, without secrets."""
    merged: dict[str, Any] = {}
    for part in parts:
        merged |= (
            part.to_dict()
            if isinstance(part, TrainingArguments)
            else {item.name: getattr(part, item.name) for item in fields(part)}
        )
    if parts[0].passed_model is not None:
        merged["model_name_or_path"] = "(passed from Python)"
    secrets = ("token", "hub_token", "push_to_hub_token")
    return json.loads(json.dumps({name: value for name, value in merged.items() if name not in secrets}, default=str))


def _make_run_plan(parts: Sequence[Any], args: Any, settings: dict[str, Any]) -> RunPlan:
    """Plan what to do in the output directory; prints a message if the run there is finished."""
    changeable = MAY_CHANGE.union(*(may_change(type(part)) for part in parts))
    plan = plan_run(args.output_dir, settings, args.overwrite_output_dir, args.resume_from_checkpoint, changeable)
    if plan.finished:
        push = ""
        if args.push_to_hub:  # a directory's name need not be one of the Hub
            name = args.hub_model_id or Path(args.output_dir).absolute().name
            target = HubTarget(name, args.hub_private_repo, args.hub_revision)
            push = f" Push it with {target.command(args.output_dir)}"
        print_rank0(args, plan.note + push)
    else:
        print_rank0(args, "Preparing the model and the data.")
    return plan


def _describe_data(data_args: Any, args: TrainingArguments) -> DatasetInfo:
    """Return the public names of the data for the model card: a Hub name, or the last part of a path."""
    names = DatasetInfo()
    if data_args.splits is not None:
        names.train = "a data set passed from Python"
    elif data_args.dataset_name and not Path(data_args.dataset_name).exists():
        names.datasets = [data_args.dataset_name]
        names.train = data_args.dataset_name
    elif data_args.dataset_name or data_args.train_file:
        names.train = _basenames(data_args.dataset_name or data_args.train_file)
    else:
        names.train = "Python's language reference"  # the built-in data
    if args.do_eval and data_args.validation_file:
        names.validation = _basenames(data_args.validation_file)
    elif args.do_eval and data_args.dataset_name:
        names.validation = names.train
    elif args.do_eval:
        names.validation = f"{names.train}, held-out rows"
    return names


def _basenames(source: str | None) -> str:
    """Return the last parts of paths separated by commas.

    >>> _basenames("here/a.txt, there/b.txt")
    'a.txt, b.txt'
    """
    return ", ".join(Path(part.strip()).name for part in (source or "").split(","))


# ---- the run


@contextlib.contextmanager
def _no_empty_output_dir(args: TrainingArguments) -> Iterator[None]:
    """Remove the output directory after bad input, if `Trainer` created it and nothing was written."""
    folder, existed = run_folder(args), run_folder(args).exists()
    try:
        yield
    except UsageError:
        if args.should_save and not existed and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        raise


def run_trainer(
    parsed: Sequence[Any],
    build: Callable[[RunPlan], Trainer],
    describe: Callable[[Trainer], tuple[str, str]],
    model_folder: str,
    interruption: GracefulShutdownCallback | None,
    load_finished: bool,
    probe_task: str | None = None,
) -> Trainer | None:
    """Check, prepare, train, evaluate, write. Nothing on disk changes before everything has been checked.

    With `push_to_hub`, checkpoints are pushed during training; the caller pushes the result.

    Args:
        parsed: the arguments; those of the data come second, the trainer's last.
        build: loads model and data, and returns a trainer for them.
        describe: returns a message before training, and one after it about the files and how to load them.
        model_folder: folder of the output directory with the weights that the trainer loads.
        interruption: ends the training on a termination signal; None for the one of `BaseJepaTrainer.train`.
        load_finished: if the run is finished already, load it and return its trainer instead of None.
        probe_task: data of the probe, for the card.

    Raises:
        UsageError: bad input.
        RunError: the run cannot continue.
    """
    data_args, args = parsed[1], parsed[-1]
    settings = _serialize_settings(parsed)
    plan = _make_run_plan(parsed, args, settings)
    if plan.finished and not load_finished:
        return None
    if plan.finished:
        plan = replace(plan, checkpoint=run_folder(args))  # it holds the tokenizer
    set_seed(args.seed)
    with _no_empty_output_dir(args):
        trainer = build(plan)
        data = data_fingerprint(trainer.train_dataset, data_args.train_file)
        if plan.finished:
            check_data(plan, data)
            trained = trainer.load_weights(str(run_folder(args) / model_folder))
            trainer.accelerator.unwrap_model(trainer.model).load_state_dict(trained.state_dict())
            trainer.state = read_state(run_folder(args) / METRICS_FILE)
            return trainer
        if args.do_train:
            trainer.check_training()
            check_data(plan, data)
        start_message, end_message = describe(trainer)
        if interruption is not None:
            trainer.add_callback(interruption)
        if plan.note:
            print_rank0(args, plan.note)
        if args.should_save:
            start_run(run_folder(args), settings, plan, data)
        if args.do_train:
            write_masks(trainer)  # before training, so that users can look at it
        print_rank0(args, start_message)
        if args.do_train:
            trainer.train(resume_from_checkpoint=None if plan.checkpoint is None else str(plan.checkpoint))
        if interruption is not None and interruption.stopped:
            print_rank0(args, _interruption_message(trainer, interruption))
            return trainer
        names = _describe_data(data_args, args)
        names.probe = _basenames(probe_task)
        _finish(trainer, settings, data, names, end_message)
    return trainer


def _finish(
    trainer: BaseJepaTrainer, settings: dict[str, Any], data: dict[str, Any], names: DatasetInfo, message: str
) -> None:
    """Evaluate, write the results and print the verdict."""
    args, folder = trainer.args, run_folder(trainer.args)
    is_judged = args.do_train and can_be_judged(args, trainer.state)  # and the verdict printed, by the console
    if args.do_eval and not has_last_evaluation(trainer.state):
        trainer.evaluate()
    with disk_errors_as_run_error(folder, folder, trainer.model_nbytes):
        if args.do_train:
            trainer.save_model(_internal_call=True)  # which pushes nothing
        trainer.write_results(data=names)
        if args.do_train and args.should_save:
            finish_run(folder, settings, data, stopped_early=trainer.stopped_early)
    verdict = trainer.verdict()
    if args.do_train and verdict is not None and not is_judged:
        print_rank0(args, "\n".join(verdict.lines))
    if trainer.stopped_early:
        print_rank0(args, f"Stopped at step {trainer.state.global_step} by --stop_on_collapse.")
    written = message if args.do_train else "metrics.json, training.png; nothing was trained (--do_train trains too)"
    print_rank0(args, f"\nwritten to {args.output_dir}: {written}")


def push(trainer: BaseJepaTrainer) -> None:
    """Push the result of the run from the main process; an error ends with the command that repeats the push."""
    args = trainer.args
    if not trainer.is_world_process_zero():
        return
    to = trainer.hub_target()
    if trainer.stopped_early:
        print_rank0(
            args, f"\nNot pushed, because the run was stopped. To push it anyway: {to.command(run_folder(args))}"
        )
        return
    try:
        commit = push_run(run_folder(args), to, "End of training")
    except (PushError, UsageError) as error:
        repeat = to.command(run_folder(args))
        message = (
            f"{str(error).rstrip('.')}. The result is in {args.output_dir}. This command repeats the push: {repeat}"
        )
        raise type(error)(message) from None
    print_rank0(args, f"\npushed to {commit.repo_url.repo_id}: {commit.commit_url}")


def describe_parameters(model: PreTrainedModel, has_lora: bool) -> str:
    """Return the number of parameters, with LoRA also that of the trained ones."""
    trained = format_parameters(model.num_parameters(only_trainable=True))
    return format_parameters(model.num_parameters()) + (f" ({trained} trained, in adapters)" if has_lora else "")


def run_folder(args: TrainingArguments) -> Path:
    """Return `output_dir` as a path; transformers sets it if the user does not."""
    return Path(str(args.output_dir))


def print_rank0(args: TrainingArguments, text: str) -> None:
    """Print from the main process."""
    if args.process_index == 0:
        print(text, flush=True)


def _interruption_message(trainer: BaseJepaTrainer, interruption: GracefulShutdownCallback) -> str:
    args, step = trainer.args, trainer.state.global_step
    checkpoint = run_folder(args) / f"checkpoint-{step}"
    overwrites = isinstance(args, CommandArguments) and args.overwrite_output_dir
    flags = " without --overwrite_output_dir" if overwrites else ""
    flags += " with --resume_from_checkpoint true" if args.resume_from_checkpoint else ""
    signal_name = interruption.signal_received.name if interruption.signal_received else "a signal"
    return (
        f"Stopped by {signal_name} after step {step}. Run the same command again{flags} to continue from {checkpoint}."
    )
