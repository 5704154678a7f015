"""What the runs of every objective share: from checked arguments to a directory with results, and what is said."""

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from ..errors import UsageError
from ..hub.model_card import DataNames
from ..hub.push import Destination, PushError, push_run
from ..training.base_trainer import RepresentationTrainer
from ..training.checkpoints import writing
from ..training.run_directory import RunPlan, finish_run, plan_run, start_run
from ..training.signals import InterruptionCallback
from ..utils.atomic_files import whole_file
from .arguments import StartArguments

# ---- before the run


def settle(parts: Sequence[Any], args: TrainingArguments) -> None:
    """Fill in whether it trains and evaluates, and refuse names that cannot be.

    Args:
        parts: all arguments of the run; `args` is one of them.
    """
    for part in parts:
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


def check_start(model_args: StartArguments) -> None:
    """Refuse a start that contradicts itself."""
    given = [name for name in ("model_name_or_path", "model_type", "config_name") if getattr(model_args, name)]
    if len(given) > 1:
        raise UsageError(
            f"{given[0]} and {given[1]} exclude each other: the one is a pretrained start, or names another"
        )
    if model_args.config_overrides and model_args.model_name_or_path:
        raise UsageError("config_overrides is for a random start: with model_name_or_path the weights fix the sizes")
    if model_args.use_peft and not model_args.model_name_or_path:
        raise UsageError("use_peft trains adapters beside pretrained weights: name them with model_name_or_path")


def check_run(data_args: Any, args: TrainingArguments) -> None:
    """Refuse what no run can be: processes that would run alone, two sources of data, numbers out of range."""
    if int(os.environ.get("WORLD_SIZE", "1")) > args.world_size:
        raise UsageError(
            "several processes were started, but each would run alone; for ranks on CPUs give --use_cpu, and an "
            "accelerate configuration like configs/accelerate/cpu2.yaml"
        )
    for name in ("train_file", "validation_file"):
        if getattr(data_args, name) and data_args.dataset_name:
            raise UsageError(f"{name} and dataset_name exclude each other; give one of them")
    try:
        get_reporting_integration_callbacks(args.report_to)
    except (ValueError, RuntimeError, ImportError) as error:
        raise UsageError(f"report_to {', '.join(args.report_to)}: {' '.join(str(error).split())}") from None
    for name, least in (
        ("per_device_train_batch_size", 1),
        ("per_device_eval_batch_size", 1),
        ("gradient_accumulation_steps", 1),
        ("learning_rate", 0),
        ("seed", 0),
    ):
        refuse_below(name, getattr(args, name), least)


def refuse_below(name: str, value: float, least: float) -> None:
    if not value >= least:
        raise UsageError(f"{name} must be at least {least}, not {value}")


def settings_of(parts: Sequence[Any]) -> dict[str, Any]:
    """All arguments as JSON knows them; secrets left out."""
    merged: dict[str, Any] = {}
    for part in parts:
        merged |= part.to_dict() if isinstance(part, TrainingArguments) else vars(part)
    secrets = ("token", "hub_token", "push_to_hub_token")
    return json.loads(json.dumps({name: value for name, value in merged.items() if name not in secrets}, default=str))


def plan(args: Any, settings: dict[str, Any]) -> RunPlan:
    """What to do in the output directory; that the run there is finished is said at once."""
    planned = plan_run(args.output_dir, settings, args.overwrite_output_dir, args.resume_from_checkpoint)
    if planned.finished:
        name = args.hub_model_id or Path(args.output_dir).absolute().name
        to = Destination(name, args.hub_private_repo, args.hub_revision)
        say(args, planned.note + (f"; push it with {to.command(args.output_dir)}" if args.push_to_hub else ""))
    elif planned.checkpoint is not None and not args.do_train:
        raise UsageError(
            f"{planned.checkpoint} is not what --do_eval alone would evaluate: name it as --model_name_or_path and "
            "choose another output_dir"
        )
    return planned


def data_names(data_args: Any, args: TrainingArguments, own: str = "") -> DataNames:
    """What a card may call the data: a data set's name on the Hub; of files and folders the last part.

    Args:
        own: what it is called where neither is given.
    """
    names = DataNames()
    if data_args.dataset_name and not Path(data_args.dataset_name).exists():
        names.datasets = [data_args.dataset_name]
        names.train = data_args.dataset_name
    elif data_args.dataset_name or data_args.train_file:
        names.train = last_parts(data_args.dataset_name or data_args.train_file)
    else:
        names.train = own
    if args.do_eval and data_args.validation_file:
        names.validation = last_parts(data_args.validation_file)
    elif args.do_eval and data_args.dataset_name:
        names.validation = names.train
    elif args.do_eval:
        names.validation = f"{names.train}, held-out rows"
    return names


def last_parts(source: str | None) -> str:
    """Of paths separated by commas the last parts.

    >>> last_parts("here/a.txt, there/b.txt")
    'a.txt, b.txt'
    """
    return ", ".join(Path(part.strip()).name for part in (source or "").split(","))


# ---- the run


def carry_out(
    trainer: RepresentationTrainer,
    plan: RunPlan,
    settings: dict[str, Any],
    names: DataNames,
    interruption: InterruptionCallback | None,
    begin: Callable[[], None],
    loading: str,
    draw: Callable[[list[dict[str, Any]], Path], None],
) -> None:
    """Train, evaluate, write. All is checked before: from here on the run writes.

    Args:
        plan: what to do in the output directory, see `plan`.
        settings: the run's settings, which its directory notes.
        names: of the data, for the card.
        interruption: what ends the training where the process is asked to go; None leaves signals alone.
        begin: called once the directory is the run's, before it trains.
        loading: what is said at the end of a training: what was written, and how to load it.
        draw: draws the log to `training.png`.
    """
    args = trainer.args
    if interruption is not None:
        trainer.add_callback(interruption)
    if plan.note:
        say(args, plan.note)
    if args.should_save:
        start_run(args.output_dir, settings, plan)
    begin()
    metrics: dict[str, Any] = {}
    if args.do_train:
        with contextlib.nullcontext() if interruption is None else interruption.listening():
            metrics["train"] = trainer.train(resume_from_checkpoint=plan.checkpoint and str(plan.checkpoint)).metrics
    if interruption is not None and interruption.stopped:
        say(args, _how_it_stopped(trainer, interruption))
        return
    if args.do_eval:
        metrics["eval"] = _last_evaluation(trainer) or trainer.evaluate()
    with writing(Path(args.output_dir), Path(args.output_dir), trainer.result_bytes):
        if args.do_train:
            trainer.save_model(_internal_call=True)  # which pushes nothing
        _write_results(trainer, metrics, names, draw)
        if args.do_train and args.should_save and not trainer.gave_up:
            finish_run(args.output_dir, settings)
    for step, sentence in trainer.found.values():
        say(args, f"\nat step {step}: {sentence}{'; the run was stopped' if trainer.gave_up else ''}")
    if args.do_train:
        say(args, f"\nwritten to {args.output_dir}: {loading}")
    else:
        evaluation = json.dumps(metrics.get("eval"), indent=1)
        say(args, f"{evaluation}\nwritten to {args.output_dir}: metrics.json, training.png")


def push(trainer: RepresentationTrainer) -> None:
    """Push what the run left. Only one process does.

    Raises:
        PushError, UsageError: it could not be; the sentence ends with the command that repeats it.
    """
    args = trainer.args
    if not trainer.is_world_process_zero():
        return
    to = trainer.destination()
    if trainer.gave_up:
        say(args, f"\nnot pushed, because the run was stopped; {to.command(args.output_dir)} does it all the same")
        return
    try:
        commit = push_run(args.output_dir, to, "End of training")
    except (PushError, UsageError) as error:
        again = f"{error}; everything is in {args.output_dir}, and this repeats the push: {to.command(args.output_dir)}"
        raise type(error)(again) from None
    say(args, f"\npushed to {commit.repo_url.repo_id}: {commit.commit_url}")


def say(args: TrainingArguments, text: str) -> None:
    if args.process_index == 0:
        print(text, flush=True)


def _how_it_stopped(trainer: RepresentationTrainer, interruption: InterruptionCallback) -> str:
    args, step = trainer.args, trainer.state.global_step
    checkpoint = Path(args.output_dir) / f"checkpoint-{step}"
    but = " without --overwrite_output_dir" if args.overwrite_output_dir else ""
    but += " with --resume_from_checkpoint true" if args.resume_from_checkpoint else ""
    signal_name = interruption.received.name
    return f"stopped by {signal_name} after step {step}: give the same command again{but} to go on from {checkpoint}"


def _last_evaluation(trainer: RepresentationTrainer) -> dict[str, float] | None:
    """The metrics of an evaluation that was made after the last step anyway."""
    for entry in reversed(trainer.state.log_history):
        if "eval_loss" in entry and entry["step"] == trainer.state.global_step and trainer.state.global_step > 0:
            return {name: value for name, value in entry.items() if name.startswith("eval_")}
    return None


def _write_results(
    trainer: RepresentationTrainer,
    metrics: dict[str, Any],
    names: DataNames,
    draw: Callable[[list[dict[str, Any]], Path], None],
) -> None:
    """`metrics.json`, the picture and the card."""
    if not trainer.args.should_save:
        return
    folder = Path(trainer.args.output_dir)
    history = trainer.state.log_history
    found = {kind: {"step": step, "sentence": sentence} for kind, (step, sentence) in trainer.found.items()}
    content = {**metrics, "found": found, "max_steps": trainer.state.max_steps, "history": history}
    with whole_file(folder / "metrics.json") as new:
        new.write_text(f"{json.dumps(content, indent=1)}\n", encoding="utf-8")
    with whole_file(folder / "training.png") as new:
        draw(history, new)
    if trainer.args.do_train:
        trainer.create_model_card(data=names)
