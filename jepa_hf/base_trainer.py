"""What every trainer here shares: counting targets, logging loss parts, whole checkpoints, export and card."""

import logging
import os
import shutil
from abc import abstractmethod
from collections import defaultdict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from huggingface_hub import CommitInfo
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import PushInProgress

from .errors import UsageError
from .model_card import CardFacts, DataNames, render_card
from .sharing import LAST_CHECKPOINT, Destination, PushError, open_repo, push_files, push_run

logger = logging.getLogger(__name__)

# What a checkpoint must hold at least to be resumed from.
CHECKPOINT_FILES = ("trainer_state.json", "config.json")
# Below the output directory: what is being pushed.
PUSH_FOLDER = "_push"


def check_checkpoint(folder: str | Path) -> None:
    """Refuse to resume from a folder that is no checkpoint.

    Raises:
        UsageError: a file that every checkpoint has is not there.
    """
    for name in CHECKPOINT_FILES:
        if not (Path(folder) / name).is_file():
            raise UsageError(
                f"resume_from_checkpoint {str(folder)!r} is no checkpoint of a run (it has no {name}); give a folder "
                "named checkpoint-N"
            )


class RunningMeans:
    """Weighted means, and counts, that stay on the device until they are read, so that no step waits for it."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._weights: dict[str, torch.Tensor] = {}
        self._counts: dict[str, torch.Tensor] = {}

    def add(self, name: str, value: torch.Tensor, weight: torch.Tensor) -> None:
        """Count the scalar `value` with the scalar `weight`."""
        value, weight = value.detach().float(), weight.detach().float()
        # A weight of 0 stands for "no such thing in this batch": its value may be anything.
        product = torch.where(weight > 0, value * weight, torch.zeros_like(value))
        self._sums[name] = self._sums.get(name, 0.0) + product
        self._weights[name] = self._weights.get(name, 0.0) + weight

    def count(self, name: str, number: torch.Tensor) -> None:
        """Add the scalar `number` to a count."""
        self._counts[name] = self._counts.get(name, 0) + number.detach()

    def flush(self, accelerator: Accelerator) -> dict[str, float]:
        """The means and counts over all ranks, and start anew. A name that one rank never added counts there as 0."""
        known = gather_object([(sorted(self._sums), sorted(self._counts))])
        means, counts = (sorted(set().union(*names)) for names in zip(*known, strict=True))
        if not means and not counts:
            return {}
        none = torch.zeros(2, device=accelerator.device)
        rows = [torch.stack([self._sums[name], self._weights[name]]) if name in self._sums else none for name in means]
        for name in counts:
            number = self._counts[name].float() if name in self._counts else none[0]
            rows.append(torch.stack([number, none[0]]))
        totals = accelerator.reduce(torch.stack(rows), reduction="sum").tolist()
        self._sums, self._weights, self._counts = {}, {}, {}
        values = {name: total / max(weight, 1e-12) for name, (total, weight) in zip(means, totals, strict=False)}
        return values | {name: total for name, (total, _) in zip(counts, totals[len(means) :], strict=True)}


class RepresentationTrainer(Trainer):
    """Base of the trainers: a `Trainer` whose loss is a sum over targets divided by the targets of the whole update.

    Subclasses say what a target is (`count_targets`) and what is logged (`track`).
    """

    def __init__(self, model: nn.Module, args: TrainingArguments, **kwargs: Any):
        if args.n_gpu > 1:
            raise UsageError(
                f"one process sees {args.n_gpu} GPUs and would fall into DataParallel: start it with "
                "`accelerate launch run_jepa.py ...`, or show it one GPU with CUDA_VISIBLE_DEVICES=0"
            )
        self.resumed = False
        self._pushes = ThreadPoolExecutor(max_workers=1, thread_name_prefix="push")  # one after the other
        super().__init__(model=model, args=args, **kwargs)
        # There is a loss without labels: otherwise evaluation would report none.
        self.can_return_loss = True
        self._means: dict[str, RunningMeans] = defaultdict(RunningMeans)
        self._tokens_seen: torch.Tensor | None = None

    # ---- what a subclass says

    @abstractmethod
    def count_targets(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Number of targets of one micro-batch, a scalar tensor."""

    @abstractmethod
    def count_tokens(self, inputs: dict[str, torch.Tensor], padding: bool = False) -> torch.Tensor:
        """Number of tokens, patches or time steps of one micro-batch, with or without padding, a scalar tensor."""

    @abstractmethod
    def track(self, outputs: Any, inputs: dict[str, torch.Tensor], means: RunningMeans) -> None:
        """Add what is logged about one micro-batch to `means`."""

    # ---- data

    def get_train_dataloader(self) -> DataLoader:
        """As `Trainer`'s, but starting it draws nothing from the generator that dropout draws from."""
        return self._with_own_generator(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As `Trainer`'s, but starting it draws nothing from the generator that dropout draws from."""
        return self._with_own_generator(super().get_eval_dataloader(eval_dataset))

    def _with_own_generator(self, loader: DataLoader) -> DataLoader:
        # A loader draws a seed for its workers whenever it starts them. Persistent ones start once in a whole run, but
        # once more after a resume: from the common generator, that would change the dropout of all later steps.
        inner = getattr(loader, "base_dataloader", loader)  # accelerate wraps it
        inner.generator = torch.Generator().manual_seed(self.args.seed)
        return loader

    # ---- one update

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | None:
        if not batch_samples:
            return None
        count = sum(self.count_targets(batch) for batch in batch_samples).to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()
        # An update without any target has a loss of 0, not of 0 / 0.
        return count.clamp_min(1)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Run the model; with `num_items_in_batch` its loss is this micro-batch's share of the update's.

        DDP averages gradients over ranks, so a share of the global sum is multiplied by their number.
        """
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        loss = outputs.loss
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes
        if model.training:
            self.track(outputs, inputs, self._means["train"])
        return (loss, outputs) if return_outputs else loss

    # ---- evaluation

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        """One evaluation batch. Its loss is per target; its tensors, of differing shapes, are not gathered."""
        inputs = self._prepare_inputs(inputs)
        rows = self._rows_of_its_own(len(next(iter(inputs.values()))))
        # A rank without any runs the model all the same, because the others may wait for it inside (FSDP).
        inputs = {name: value[: max(rows, 1)] for name, value in inputs.items()}
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs, output_hidden_states=True)
        if rows:
            self.track(outputs, inputs, self._means["eval"])
        return outputs.loss.detach(), None, None

    def _rows_of_its_own(self, batch_size: int) -> int:
        """How many rows of this rank's batch are no repetitions, which fill the last batches up to the same size."""
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return batch_size
        return min(max(state.remainder - self.accelerator.process_index * batch_size, 0), batch_size)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Adds the tracked means, over targets and not over batches, to the metrics."""
        self._means["eval"] = RunningMeans()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        self.finish_evaluation(self._means["eval"])
        for name, value in self._means["eval"].flush(self.accelerator).items():
            output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output

    def finish_evaluation(self, means: RunningMeans) -> None:
        """Add to `means` what is computed once, at the end of an evaluation."""

    # ---- logging

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the tracked means since the last log."""
        self._count_tokens()
        if "loss" in logs:
            logs = {**logs, **self.training_logs()}
        super().log(logs, start_time)

    def training_logs(self) -> dict[str, float]:
        """What is logged beside the training loss."""
        return self._means["train"].flush(self.accelerator)

    def _track_num_input_tokens(self, inputs: dict[str, torch.Tensor]) -> None:
        # The inherited method reads the number back from the device on every micro-batch.
        counted = self.args.include_num_input_tokens_seen
        if counted == "no":
            return
        tokens = self.count_tokens(inputs, padding=counted == "all")
        self._tokens_seen = tokens if self._tokens_seen is None else self._tokens_seen + tokens

    def _count_tokens(self) -> None:
        if self._tokens_seen is not None:
            self.state.num_input_tokens_seen += int(self.accelerator.reduce(self._tokens_seen, reduction="sum").item())
            self._tokens_seen = None

    # ---- checkpoints and the final directory

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._count_tokens()
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        check_checkpoint(resume_from_checkpoint)
        self.resumed = True
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # The inherited method warns, and trains on with what is missing at random.
        tied = set(self.accelerator.unwrap_model(self.model, keep_torch_compile=False).all_tied_weights_keys)
        lost = [name for name in load_result.missing_keys if name not in tied] + load_result.unexpected_keys
        if lost:
            raise UsageError(
                f"the checkpoint to resume from holds another model: {', '.join(lost[:3])} differ; start over, or name "
                "it as --model_name_or_path"
            )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Write a checkpoint (the full model at its root), or the final directory (see `write_final`).

        `training_args.bin` is not written: it is a pickle, and nothing reads it.
        """
        if not self.args.should_save:
            return
        output_dir = output_dir if output_dir is not None else self.args.output_dir
        os.makedirs(output_dir, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        folder = Path(output_dir)
        if folder.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-") and folder != Path(self.args.output_dir):
            model.save_pretrained(output_dir, state_dict=state_dict)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(output_dir)
        else:
            self.write_final(model, output_dir, state_dict)

    @abstractmethod
    def write_final(self, model: nn.Module, output_dir: str, state_dict: dict[str, torch.Tensor] | None) -> None:
        """Write what others load.

        Args:
            model: the model without wrappers.
            state_dict: its weights, where they are sharded and `model` does not hold them.
        """

    @abstractmethod
    def card_facts(self, name: str) -> CardFacts:
        """Real values for the model card of the model that users will load as `name`."""

    def create_model_card(self, model_name: str | None = None, data: DataNames | None = None, **kwargs: Any) -> None:
        """Write `README.md`.

        Args:
            model_name: what users pass to `from_pretrained`; default the Hub repository, or the output directory.
            data: names of the data, which the trainer does not know.
            kwargs: `language`, `license` and `dataset` as `Trainer.create_model_card` takes them.
        """
        if not self.is_world_process_zero():
            return
        # Nobody else has the directory: its last part is a name, its whole path is none.
        folder = Path(self.args.output_dir).absolute().name
        facts = self.card_facts(self.hub_model_id or self.args.hub_model_id or model_name or folder)
        facts.language, facts.license = kwargs.get("language"), kwargs.get("license")
        given = kwargs.get("dataset") or []
        facts.data = data or DataNames()
        facts.data.datasets += [given] if isinstance(given, str) else given
        render_card(facts).save(Path(self.args.output_dir) / "README.md")

    # ---- the Hub

    def destination(self) -> Destination:
        """Where `push_to_hub` pushes to."""
        args = self.args
        name = self.hub_model_id or args.hub_model_id or Path(args.output_dir).absolute().name
        return Destination(name, args.hub_private_repo, args.hub_revision, args.hub_token)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As `Trainer`'s, but who may not push is told before the run, and a Hub that is unwell does not prevent it."""
        if not self.is_world_process_zero():
            return
        self.push_in_progress = None
        to = self.destination()
        given = {"token": token, "private": private}
        to = replace(to, **{name: value for name, value in given.items() if value is not None})
        self.hub_model_id = to.repo_id
        try:
            self.hub_model_id = open_repo(to).repo_id
        except PushError as error:
            if error.status in (401, 403, 404):
                raise UsageError(f"push_to_hub: {error}; or leave out --push_to_hub") from None
            logger.warning("%s; the run goes on, and each push tries again", error)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Write model and card to `output_dir`, and push what `files_to_push` names of it.

        Args:
            blocking: wait for it; otherwise a future is returned.
            token, revision, private: in place of `hub_token`, `hub_revision`, `hub_private_repo`.
            kwargs: see `create_model_card`.

        Returns:
            The commit, or its future; None on ranks other than 0.

        Raises:
            PushError: the Hub refused, failed or could not be reached.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        self._finish_current_push()
        given = {"token": token, "revision": revision, "private": private}
        to = replace(self.destination(), **{name: value for name, value in given.items() if value is not None})
        job = self._pushes.submit(push_run, self.args.output_dir, to, commit_message or "End of training")
        return job.result() if blocking else job

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push the final layout of the checkpoint's weights; with `hub_strategy` "checkpoint" the checkpoint too.

        The inherited method would put the full model and a pickle at the root, where the plain encoder belongs, and
        drop the folders below it. What is pushed is set aside first: meanwhile the run may delete the checkpoint.
        """
        args, step = self.args, self.state.global_step
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        if not args.hub_always_push and self.push_in_progress is not None and not self.push_in_progress.is_done():
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        aside = Path(args.output_dir, PUSH_FOLDER, f"{PREFIX_CHECKPOINT_DIR}-{step}")
        last = LAST_CHECKPOINT if args.hub_strategy == HubStrategy.CHECKPOINT else None
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        try:
            shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed
            self.write_final(type(model).from_pretrained(checkpoint_folder), str(aside), None)
            if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
                shutil.copytree(checkpoint_folder, aside / (last or aside.name))
        except OSError as error:
            logger.warning("step %d is not pushed (%s); the run goes on", step, error)
            shutil.rmtree(aside, ignore_errors=True)
            return
        job = self._pushes.submit(_push_aside, aside, self.destination(), step, last)
        if self.push_in_progress is None or self.push_in_progress.is_done():
            self.push_in_progress = PushInProgress([job])
        else:
            self.push_in_progress.jobs.append(job)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        if self.is_world_process_zero():
            shutil.rmtree(Path(self.args.output_dir, PUSH_FOLDER), ignore_errors=True)


def _push_aside(folder: Path, to: Destination, step: int, replaced_folder: str | None) -> None:
    """Push all of a folder that was set aside, and delete it. A Hub that fails does not stop the run."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    message = f"Training in progress, step {step}"
    try:
        push_files(files, open_repo(to), message, replaced_folder=replaced_folder)
    except (PushError, UsageError) as error:
        logger.warning("step %d: %s; the run goes on, and later pushes try again", step, error)
    finally:
        shutil.rmtree(folder)
