"""`RunTrainer`: checks before a run, signals during it, logged means, and its end."""

import re
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerState, TrainingArguments, set_seed

from ..errors import RunError, UsageError, one_line
from ..models.argument_owners import owner_of_argument
from ..monitoring.assessment import Verdict
from ..utils.counts import counted
from ..utils.keywords import ChecksKeywords
from . import upstream
from .callbacks import Totals, TotalsCallback, TrainBeginCallback
from .checkpoint_trainer import CheckpointTrainer
from .checkpoints import resume_hint
from .checks import check_arguments, check_best_metric, check_learned, check_run_length, check_train_rows
from .inputs import check_optimizer, check_single_split
from .metric_accumulator import MetricAccumulator
from .signals import GracefulShutdownCallback
from .stream_padding import PADDING_ROW_KEY

# The start of torch's message about a data-loader worker that was terminated from outside.
_WORKER_DIED = re.compile(r"DataLoader worker \(pid")


class RunTrainer(CheckpointTrainer, ChecksKeywords):
    """A `Trainer` that refuses a run that cannot learn, and saves when it is interrupted.

    Subclasses make models and rows ready (`prepare_model`, `tokenize_rows`), and fill
    `self._means["train"]`, which is logged with the loss.
    """

    _owner_of = staticmethod(owner_of_argument)

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        **kwargs: Any,
    ):
        check_arguments(args, kwargs)
        check_single_split(train_dataset)
        super().__init__(
            model=model,
            args=args,
            train_dataset=self.tokenize_rows(train_dataset),
            eval_dataset=self.tokenize_rows(eval_dataset),
            **kwargs,
        )
        check_optimizer(self.optimizer, model)
        self.model_init: Any = model_init
        upstream.keep_columns(self, (*getattr(self.data_collator, "extra_columns", ()), PADDING_ROW_KEY))
        self._means: dict[str, MetricAccumulator] = defaultdict(MetricAccumulator)
        # Shared-memory flag (1 = training) that workers check when they receive a termination signal.
        self._training = torch.zeros(1, dtype=torch.uint8).share_memory_()
        self._tokens_seen: torch.Tensor | None = None
        self._targets = torch.zeros((), dtype=torch.long, device=args.device)  # of this rank, not yet in `_totals`
        self.add_callback(TotalsCallback)
        self.add_callback(TrainBeginCallback(self._restore_totals))

    # ---- defined by subclasses

    @abstractmethod
    def tokenize_rows(self, dataset: Any) -> Any:
        """Tokenize rows that are not; `dataset` may also be None, or several data sets by name."""

    @abstractmethod
    def count_tokens(self, inputs: dict[str, torch.Tensor], padding: bool = False) -> torch.Tensor:
        """Count the tokens, patches or time steps of one micro-batch, a scalar tensor."""

    # ---- model

    @abstractmethod
    def prepare_model(self, model: Any) -> nn.Module:
        """Make a model, as the user passes it or as `model_init` returns it, ready to train."""

    def resolve_model(self, model: Any, model_init: Callable[..., PreTrainedModel] | None) -> Any:
        """Return the prepared model, before the constructor of `Trainer` runs."""
        if (model is None) == (model_init is None):
            raise UsageError("Pass either model or model_init to the trainer.")
        set_seed(self.args.seed)  # as `Trainer` does, but before a predictor is drawn
        if model_init is None:
            return self.prepare_model(model)
        self.model_init = model_init
        return self.call_model_init()

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Like `Trainer.call_model_init`, with a prepared model."""
        return self.prepare_model(super().call_model_init(trial))

    def hyperparameter_search(
        self, hp_space: Any = None, compute_objective: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Like `Trainer.hyperparameter_search`, which by default minimizes the sum of all metrics."""
        if compute_objective is None:
            raise UsageError(
                "hyperparameter_search needs compute_objective, because a collapsed model has the lowest loss. Pass "
                'for instance compute_objective=lambda metrics: metrics["eval_context_rank"], direction="maximize".'
            )
        return super().hyperparameter_search(hp_space, compute_objective, *args, **kwargs)

    # ---- logging

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the tracked means since the last log.

        This synchronizes with the device, and raises if the last update was not finite.
        """
        self._check_last_update()
        self._count_tokens()
        if "loss" in logs:
            logs = {**logs, **self.training_logs()}
        if "train_loss" in logs:
            logs = {**logs, "train_loss": self._mean_loss()}
        super().log(logs, start_time)

    def _mean_loss(self) -> float:
        """Return the mean loss of all steps of a run that has ended; `Trainer`'s is of those since a resume."""
        return upstream.loss_before_log(self) / max(self.state.global_step, 1)

    def training_logs(self) -> dict[str, float]:
        """Return the metrics that are logged with the training loss."""
        return self._means["train"].compute_and_reset(self.accelerator)

    # `Trainer`'s copies the number from the device in every micro-batch; no argument but "no" avoids that.
    def _track_num_input_tokens(self, inputs: dict[str, torch.Tensor]) -> None:
        counted = self.args.include_num_input_tokens_seen
        if counted == "no":
            return
        tokens = self.count_tokens(inputs, padding=counted == "all")
        self._tokens_seen = tokens if self._tokens_seen is None else self._tokens_seen + tokens

    def _count_tokens(self) -> None:
        if self._tokens_seen is not None:
            tokens = self.accelerator.reduce(self._tokens_seen, reduction="sum")
            self.state.num_input_tokens_seen += int(tokens.item())
            self._tokens_seen = None

    # ---- training

    def check_training(self) -> None:
        """Check whether training can start and learn anything; `train` calls it first.

        Raises:
            UsageError: The run has no steps or no batch, or its best-model metric is not measured.
        """
        args = self.args
        check_run_length(args)
        ranks = 1 if self.accelerator.split_batches else args.world_size
        check_train_rows(self.train_dataset, args.train_batch_size * ranks, args.dataloader_drop_last)
        names = self.evaluation_metrics()
        if isinstance(self.eval_dataset, dict):
            names = {f"{part}_{name}" for part in self.eval_dataset for name in names}
        check_best_metric(args, self.callback_handler.callbacks, names)

    def evaluation_metrics(self) -> set[str]:
        """Return the names of the metrics of an evaluation, without `eval_`; empty if unknown."""
        return set()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Like `CheckpointTrainer.train`.

        Raises:
            UsageError: As by `CheckpointTrainer.train` and `check_training`.
            RunError: A data-loader worker died, an update was not finite, the disk is full, or the
                run learned nothing: it took no step, or no row had a target.
            KeyboardInterrupt, SystemExit: After Ctrl-C or SIGTERM, with a checkpoint of the current
                step (see `GracefulShutdownCallback`).
        """
        if self.model is None:  # released between trials of a hyperparameter search
            self.model = self.call_model_init(kwargs.get("trial"))
        self.check_training()
        self._training.fill_(1)
        interruption = self._interruption()
        try:
            with _dead_workers_as_run_errors(self._output_dir), interruption.handle_signals():
                output = super().train(*args, **kwargs)
            # The next training builds a new loader.
            upstream.shut_down_workers(self.callback_handler.train_dataloader)
        finally:
            self._training.fill_(0)
        self._count_targets_seen()
        interruption.leave(self._checkpoint_path())
        if not interruption.stopped:
            check_learned(self.state.global_step, self._totals.targets)
        loss = self._mean_loss()
        return output._replace(training_loss=loss, metrics={**output.metrics, "train_loss": loss})

    @property
    def is_interrupted(self) -> bool:
        """Whether a signal has ended the training."""
        callbacks = self.callback_handler.callbacks
        return any(isinstance(callback, GracefulShutdownCallback) and callback.stopped for callback in callbacks)

    def verdict(self) -> Verdict | None:
        """Like `HubTrainer.verdict`; None for a run that a signal has interrupted."""
        return None if self.is_interrupted else super().verdict()

    def _interruption(self) -> GracefulShutdownCallback:
        """Return the callback that ends the training on a signal; one is added if there is none."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, GracefulShutdownCallback):
                return callback
        added = GracefulShutdownCallback(raises=True)
        self.add_callback(added)
        return added

    @property
    def _totals(self) -> Totals:
        return self._totals_callback.totals

    @property
    def _totals_callback(self) -> TotalsCallback:
        return next(item for item in self.callback_handler.callbacks if isinstance(item, TotalsCallback))

    def _restore_totals(self, state: TrainerState) -> None:
        """Continue the totals of the checkpoint, or start from 0.

        Raises:
            UsageError: The checkpoint is beyond the run's length.
        """
        if state.global_step > state.max_steps:
            raise UsageError(
                f"The checkpoint has {counted(state.global_step, 'step')} already, and the run's length of "
                f"{state.max_steps} leaves none to train. Set a greater max_steps, or start from another checkpoint."
            )
        self._totals_callback.restore(state)
        totals = self._totals
        self._means["train"], self._targets = MetricAccumulator(), torch.zeros_like(self._targets)
        upstream.restore_loss(self, totals.loss_before_log, totals.loss_since_log, totals.steps_since_log)
        if self.args.process_index == 0:
            self._means["train"].load_totals(totals.means_since_log, totals.counts_since_log, self.args.device)

    def _count_targets_seen(self) -> None:
        self._totals.targets += int(self.accelerator.reduce(self._targets, reduction="sum").item())
        self._targets = torch.zeros_like(self._targets)

    # As in `CheckpointTrainer`; `on_save` would come after the checkpoint.
    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Like `CheckpointTrainer`'s, after the last update has been checked."""
        self._check_last_update()
        self._count_tokens()
        self._count_targets_seen()
        totals = self._totals
        totals.loss_before_log = upstream.loss_before_log(self)
        totals.loss_since_log, totals.steps_since_log = upstream.loss_since_log(self)
        totals.means_since_log, totals.counts_since_log = self._means["train"].totals(self.accelerator)
        super()._save_checkpoint(model, trial)


@contextmanager
def _dead_workers_as_run_errors(run_dir: Path) -> Iterator[None]:
    """Turn torch's error about a dead data-loader worker into a `RunError` with a remedy."""
    try:
        yield
    except RuntimeError as error:
        if not _WORKER_DIED.match(str(error)):
            raise
        raise RunError(
            f"A data-loader worker died ({one_line(error)}). The system ends workers that take too much "
            f"memory. {resume_hint(run_dir, 'Lower --dataloader_num_workers if so, and')}"
        ) from error
