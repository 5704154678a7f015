"""Steps shared by runs of every objective: checks, training, evaluation, results and console messages."""

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from ..errors import UsageError
from ..hub.model_card import DatasetInfo
from ..hub.push import HubTarget, PushError, push_run
from ..training.base_trainer import BaseJepaTrainer
from ..training.checkpoints import disk_errors_as_run_error
from ..training.run_directory import RunPlan, finish_run, plan_run, start_run
from ..training.signals import GracefulShutdownCallback
from ..utils.atomic_files import atomic_write
from .arguments import BaseModelArguments

# ---- before the run


def resolve_defaults(parts: Sequence[Any], args: TrainingArguments) -> None:
    """Resolve `do_train` and `do_eval`, and reject impossible names.

    Args:
        parts: all argument classes of the run.
        args: the one of them that is the Trainer's.
    """
    for part in parts:
        for name, value in vars(part).items():
            if isinstance(value, str) and "\0" in value:
                raise UsageError(f"{name} contains a NUL character, which no file name may have; remove it")
    # As in run_mlm.py, --do_eval alone only evaluates; evaluations during training imply training.
    if args.eval_strategy != "no" or args.eval_on_start:
        args.do_train = args.do_eval = True
    if not args.do_eval:
        args.do_train = True
    if args.push_to_hub and not args.do_train:
        raise UsageError("push_to_hub needs a training run, and --do_eval alone trains nothing; use jepa-hf push")
    if args.push_to_hub:
        HubTarget(args.hub_model_id or run_folder(args).absolute().name)  # raises for an impossible name


def check_start(model_args: BaseModelArguments) -> None:
    """Reject contradictory arguments about the model to start from."""
    starts = [name for name in ("model_name_or_path", "model_type", "config_name") if getattr(model_args, name)]
    if len(starts) > 1:
        raise UsageError(f"{starts[0]} and {starts[1]} exclude each other; give one of them")
    if model_args.config_overrides and model_args.model_name_or_path:
        raise UsageError("config_overrides is for a random start; with model_name_or_path the weights fix the sizes")
    if model_args.use_peft and not model_args.model_name_or_path:
        raise UsageError("use_peft trains adapters of a pretrained model; name it with model_name_or_path")


def check_run(data_args: Any, args: TrainingArguments) -> None:
    """Reject processes without a process group, two sources of data, and numbers out of range."""
    if int(os.environ.get("WORLD_SIZE", "1")) > args.world_size:
        raise UsageError(
            "several processes were started, but each would train separately; for ranks on CPUs give --use_cpu and an "
            "accelerate configuration like configs/accelerate/cpu2.yaml"
        )
    for name in ("train_file", "validation_file"):
        if getattr(data_args, name) and data_args.dataset_name:
            raise UsageError(f"{name} and dataset_name exclude each other; give one of them")
    try:
        get_reporting_integration_callbacks(args.report_to)
    except (ValueError, RuntimeError, ImportError) as error:
        raise UsageError(f"report_to {', '.join(args.report_to or ())}: {' '.join(str(error).split())}") from None
    for name, minimum in (
        ("per_device_train_batch_size", 1),
        ("per_device_eval_batch_size", 1),
        ("gradient_accumulation_steps", 1),
        ("learning_rate", 0),
        ("seed", 0),
    ):
        check_minimum(name, getattr(args, name), minimum)


def check_minimum(name: str, value: float, minimum: float) -> None:
    """Raise a `UsageError` if the value is below the minimum or not a number."""
    if not value >= minimum:
        raise UsageError(f"{name} must be at least {minimum}, not {value}")


def apply_smoke_test(model_args: Any, data_args: Any, args: TrainingArguments, model: dict[str, Any]) -> None:
    """Set the arguments of --smoke_test: a tiny random model, the built-in data, 20 steps.

    Args:
        model_args: changed in place, as the next two.
        data_args: those of the data.
        args: those of the Trainer.
        model: the tiny model's arguments; they and other names of a model exclude --smoke_test.
    """
    for name in ("model_name_or_path", "config_name", "model_type", "config_overrides", "tokenizer_name"):
        if getattr(model_args, name):
            raise UsageError(f"smoke_test has its own tiny model; omit {name}")
    for name, value in model.items():
        setattr(model_args, name, value)
    data_args.train_file = data_args.dataset_name = None
    if args.max_steps < 0:
        args.max_steps = 20


def serialize_settings(parts: Sequence[Any]) -> dict[str, Any]:
    """Return all arguments as JSON values, without secrets."""
    merged: dict[str, Any] = {}
    for part in parts:
        merged |= part.to_dict() if isinstance(part, TrainingArguments) else vars(part)
    secrets = ("token", "hub_token", "push_to_hub_token")
    return json.loads(json.dumps({name: value for name, value in merged.items() if name not in secrets}, default=str))


def make_run_plan(args: Any, settings: dict[str, Any]) -> RunPlan:
    """Plan what to do in the output directory; prints a message if the run there is finished."""
    plan = plan_run(args.output_dir, settings, args.overwrite_output_dir, args.resume_from_checkpoint)
    if plan.finished:
        name = args.hub_model_id or Path(args.output_dir).absolute().name
        to = HubTarget(name, args.hub_private_repo, args.hub_revision)
        print_rank0(args, plan.note + (f"; push it with {to.command(args.output_dir)}" if args.push_to_hub else ""))
    elif plan.checkpoint is not None and not args.do_train:
        raise UsageError(
            f"--do_eval alone does not evaluate {plan.checkpoint}; name it as --model_name_or_path and choose another "
            "output_dir"
        )
    return plan


def describe_data(data_args: Any, args: TrainingArguments, own: str = "") -> DatasetInfo:
    """Return the public names of the data for the model card: a Hub name, or the last part of a path.

    Args:
        data_args: the arguments of the data.
        args: the Trainer's arguments.
        own: name of the built-in data, if no other is given.
    """
    names = DatasetInfo()
    if data_args.dataset_name and not Path(data_args.dataset_name).exists():
        names.datasets = [data_args.dataset_name]
        names.train = data_args.dataset_name
    elif data_args.dataset_name or data_args.train_file:
        names.train = basenames(data_args.dataset_name or data_args.train_file)
    else:
        names.train = own
    if args.do_eval and data_args.validation_file:
        names.validation = basenames(data_args.validation_file)
    elif args.do_eval and data_args.dataset_name:
        names.validation = names.train
    elif args.do_eval:
        names.validation = f"{names.train}, held-out rows"
    return names


def basenames(source: str | None) -> str:
    """Return the last parts of paths separated by commas.

    >>> basenames("here/a.txt, there/b.txt")
    'a.txt, b.txt'
    """
    return ", ".join(Path(part.strip()).name for part in (source or "").split(","))


# ---- the run


def execute_run(
    trainer: BaseJepaTrainer,
    plan: RunPlan,
    settings: dict[str, Any],
    names: DatasetInfo,
    interruption: GracefulShutdownCallback | None,
    on_start: Callable[[], None],
    usage_message: str,
    plot_fn: Callable[[list[dict[str, Any]], Path], None],
) -> None:
    """Train, evaluate and write the results. Everything has been checked before; from here on files are written.

    Args:
        trainer: ready to train.
        plan: what to do in the output directory, see `make_run_plan`.
        settings: the run's settings, saved in its directory.
        names: public names of the data, for the card.
        interruption: ends the training on a termination signal; None leaves signals alone.
        on_start: called after the directory has been claimed and before training.
        usage_message: message after training: the files written and how to load them.
        plot_fn: draws the log to `training.png`.
    """
    args, folder = trainer.args, run_folder(trainer.args)
    if interruption is not None:
        trainer.add_callback(interruption)
    if plan.note:
        print_rank0(args, plan.note)
    if args.should_save:
        start_run(folder, settings, plan)
    on_start()
    metrics: dict[str, Any] = {}
    checkpoint = None if plan.checkpoint is None else str(plan.checkpoint)
    if args.do_train:
        with contextlib.nullcontext() if interruption is None else interruption.handle_signals():
            metrics["train"] = trainer.train(resume_from_checkpoint=checkpoint).metrics
    if interruption is not None and interruption.stopped:
        print_rank0(args, _interruption_message(trainer, interruption))
        return
    if args.do_eval:
        metrics["eval"] = _last_evaluation(trainer) or trainer.evaluate()
    with disk_errors_as_run_error(folder, folder, trainer.model_nbytes):
        if args.do_train:
            trainer.save_model(_internal_call=True)  # which pushes nothing
        _write_results(trainer, metrics, names, plot_fn)
        if args.do_train and args.should_save and not trainer.stopped_early:
            finish_run(folder, settings)
    for step, sentence in trainer.health_findings.values():
        print_rank0(args, f"\nat step {step}: {sentence}{'; the run was stopped' if trainer.stopped_early else ''}")
    if args.do_train:
        print_rank0(args, f"\nwritten to {args.output_dir}: {usage_message}")
    else:
        evaluation = json.dumps(metrics.get("eval"), indent=1)
        print_rank0(args, f"{evaluation}\nwritten to {args.output_dir}: metrics.json, training.png")


def push(trainer: BaseJepaTrainer) -> None:
    """Push the result of the run from the main process.

    Raises:
        PushError: the Hub failed or refused; the message ends with the command that repeats the push.
        UsageError: the same for a wrong name or token.
    """
    args = trainer.args
    if not trainer.is_world_process_zero():
        return
    to = trainer.hub_target()
    if trainer.stopped_early:
        print_rank0(
            args, f"\nnot pushed, because the run was stopped; to push it anyway: {to.command(run_folder(args))}"
        )
        return
    try:
        commit = push_run(run_folder(args), to, "End of training")
    except (PushError, UsageError) as error:
        repeat = to.command(run_folder(args))
        message = f"{error}; the result is in {args.output_dir}, and this command repeats the push: {repeat}"
        raise type(error)(message) from None
    print_rank0(args, f"\npushed to {commit.repo_url.repo_id}: {commit.commit_url}")


def describe_parameters(model: nn.Module, has_lora: bool) -> str:
    """Return the number of parameters in millions, with LoRA also that of the trained ones."""
    count = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return f"{count / 1e6:.1f} M parameters" + (
        f" ({trained / 1e6:.2f} M of them trained, in adapters)" if has_lora else ""
    )


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
    flags = " without --overwrite_output_dir" if getattr(args, "overwrite_output_dir", False) else ""
    flags += " with --resume_from_checkpoint true" if args.resume_from_checkpoint else ""
    signal_name = interruption.signal_received.name if interruption.signal_received else "a signal"
    return (
        f"stopped by {signal_name} after step {step}; run the same command again{flags} to continue from {checkpoint}"
    )


def _last_evaluation(trainer: BaseJepaTrainer) -> dict[str, float] | None:
    """Return the metrics of an evaluation made after the last step, if there was one."""
    for entry in reversed(trainer.state.log_history):
        if "eval_loss" in entry and entry["step"] == trainer.state.global_step and trainer.state.global_step > 0:
            return {name: value for name, value in entry.items() if name.startswith("eval_")}
    return None


def _write_results(
    trainer: BaseJepaTrainer,
    metrics: dict[str, Any],
    names: DatasetInfo,
    plot_fn: Callable[[list[dict[str, Any]], Path], None],
) -> None:
    """Write `metrics.json`, the picture and the card."""
    if not trainer.args.should_save:
        return
    folder = run_folder(trainer.args)
    history = trainer.state.log_history
    findings = {
        kind: {"step": step, "sentence": sentence} for kind, (step, sentence) in trainer.health_findings.items()
    }
    content = {**metrics, "health_findings": findings, "max_steps": trainer.state.max_steps, "history": history}
    with atomic_write(folder / "metrics.json") as new:
        new.write_text(f"{json.dumps(content, indent=1)}\n", encoding="utf-8")
    with atomic_write(folder / "training.png") as new:
        plot_fn(history, new)
    if trainer.args.do_train:
        trainer.create_model_card(data=names)
