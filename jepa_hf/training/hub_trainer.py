"""`HubTrainer`: the final directory, its model card, and pushes of both to the Hub."""

import logging
import shutil
from abc import abstractmethod
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import CommitInfo, ModelCard
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import PushInProgress

from ..distributed.deepspeed_state import zero3_init_disabled
from ..errors import UsageError
from ..hub.loading import hidden_loading_bars
from ..hub.model_card import DatasetInfo
from ..hub.push import LAST_CHECKPOINT, HubTarget, PushError, open_repo, push_files, push_run
from ..monitoring.assessment import Verdict, judge
from ..monitoring.health import UNSUCCESSFUL, is_finished
from ..utils.atomic_files import atomic_write
from .results import write_metrics
from .upstream import wait_for_pushes

logger = logging.getLogger(__name__)

# Staging directory of pushes, below the output directory.
PUSH_STAGING_DIR = "_push"


class HubTrainer(Trainer):
    """A `Trainer` whose result is the directory that `export_final_model` writes.

    Subclasses define that directory (`export_final_model`) and its model card (`render_card`). It is pushed at the end
    and, depending on `hub_strategy`, during training. A failing Hub does not end a run.
    """

    # `Trainer` leaves these untyped.
    hub_model_id: Any
    push_in_progress: Any

    def __init__(self, *args: Any, **kwargs: Any):
        self._pushes = ThreadPoolExecutor(max_workers=1, thread_name_prefix="push")  # one push at a time
        super().__init__(*args, **kwargs)

    def load_weights(self, checkpoint: str) -> nn.Module:
        """Load a checkpoint into a second model."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        with hidden_loading_bars(), zero3_init_disabled():
            return type(model).from_pretrained(checkpoint)

    @abstractmethod
    def export_final_model(self, model: nn.Module, output_dir: str, state_dict: dict[str, torch.Tensor] | None) -> None:
        """Write the directory that users load."""

    @abstractmethod
    def render_card(self, name: str, data: DatasetInfo, language: str | None, license: str | None) -> ModelCard:
        """Render the card of the model that users will load as `name`."""

    def create_model_card(  # type: ignore[override]  # the run gives the other arguments of `Trainer`'s
        self, model_name: str | None = None, data: DatasetInfo | None = None, **kwargs: Any
    ) -> None:
        """Write `README.md`.

        Args:
            model_name: Name that users pass to `from_pretrained` (default: the Hub repository, or
                the output directory).
            data: Names of the data.
            **kwargs: `language`, `license` and `dataset`, as for `Trainer.create_model_card`.
        """
        if not self.is_world_process_zero():
            return
        # The path is local: only its last part is a name for others.
        folder = self._output_dir.absolute().name
        name = self.hub_model_id or self.args.hub_model_id or model_name or folder
        data, datasets = data or DatasetInfo(), kwargs.get("dataset") or []
        data.datasets += [datasets] if isinstance(datasets, str) else datasets
        card = self.render_card(name, data, kwargs.get("language"), kwargs.get("license"))
        with atomic_write(self._output_dir / "README.md") as staging:
            card.save(staging)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Like `Trainer.save_model`; in the output directory of a run also `write_results`."""
        is_run = output_dir is None or Path(output_dir) == self._output_dir
        if is_run and not _internal_call and self.state.global_step:
            self.write_results()  # before `Trainer` pushes
        super().save_model(output_dir, _internal_call)

    def write_results(self, **kwargs: Any) -> None:
        """Write the log to `metrics.json` and `training.png`, and after training the model card."""
        if not self.args.should_save:
            return
        from ..monitoring.training_plots import plot_training  # late, because matplotlib loads slowly

        self._output_dir.mkdir(parents=True, exist_ok=True)
        write_metrics(self)
        with atomic_write(self._output_dir / "training.png") as staging:
            plot_training(self.state.log_history, staging)
        if self.state.global_step:
            self.create_model_card(**kwargs)

    @property
    def health_findings(self) -> dict[str, tuple[int, str]]:
        """Findings about the run so far by kind: first step and sentence."""
        return self._judge().findings

    @property
    def loss_weights(self) -> dict[str, float] | None:
        """Weight of each term of the loss of LLM-JEPA by its name in the log; None for a JEPA."""
        return None

    @property
    def stopped_early(self) -> bool:
        """Whether the run ended before its last step because of its health findings."""
        return False

    @property
    def succeeded(self) -> bool:
        """Whether the command exits with code 0: the run was not stopped early, and it learned something."""
        return not self.stopped_early and not UNSUCCESSFUL.intersection(self.health_findings)

    def verdict(self) -> Verdict | None:
        """Return the verdict on the run, see `assessment.judge`; None before its end, or without training."""
        has_ended = is_finished(self.state.log_history, self.state.max_steps) or self.stopped_early
        if not self.state.global_step or not has_ended:
            return None
        return self._judge()

    def _judge(self) -> Verdict:
        state, folder = self.state, str(self.args.output_dir)
        return judge(state.log_history, state.max_steps, folder, weights=self.loss_weights)

    @property
    def _output_dir(self) -> Path:
        return Path(self.args.output_dir or "")

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Like `Trainer.train`, and remove the staging directory of finished pushes."""
        output = super().train(*args, **kwargs)
        self._remove_staged_pushes()
        return output

    # ---- the Hub

    def hub_target(self) -> HubTarget:
        """Return the repository and revision that `push_to_hub` pushes to."""
        args = self.args
        name = self.hub_model_id or args.hub_model_id or self._output_dir.absolute().name
        return HubTarget(name, args.hub_private_repo, args.hub_revision, args.hub_token)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Like `Trainer`'s, but fail without write permission, and only warn if the Hub fails."""
        if not self.is_world_process_zero():
            return
        self.push_in_progress = None
        to = _override(self.hub_target(), token=token, private=private)
        self.hub_model_id = to.repo_id
        try:
            self.hub_model_id = open_repo(to).repo_id
        except PushError as error:
            if error.status in (401, 403, 404):
                raise UsageError(f"push_to_hub: {error}; or leave out --push_to_hub") from None
            logger.warning("%s; the run goes on, and each push tries again", error)

    def push_to_hub(  # type: ignore[override]  # `Trainer`'s also returns a future or None
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Write model and card to `output_dir`, and push the files that `files_to_push` selects.

        Args:
            commit_message: Message of the commit.
            blocking: Wait for the push; otherwise return a future.
            token: Overrides `args.hub_token`.
            revision: Overrides `args.hub_revision`.
            private: Overrides `args.hub_private_repo`.
            **kwargs: As for `create_model_card`.

        Returns:
            The commit, or its future; None on ranks other than 0.

        Raises:
            PushError: The Hub refused, failed or was unreachable.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.write_results(**kwargs)
        wait_for_pushes(self)
        self._remove_staged_pushes()
        to = _override(self.hub_target(), token=token, revision=revision, private=private)
        job = self._pushes.submit(push_run, self._output_dir, to, commit_message or "End of training")
        return job.result() if blocking else job

    def push_checkpoint(self, checkpoint: Path) -> None:
        """Push the final layout of a checkpoint's weights; by `hub_strategy` the checkpoint too.

        `Trainer` would push the full model and a pickle to the root, where the exported encoder belongs, and no
        folders. Files are staged first, because the run may delete the checkpoint during the push.
        """
        args, step = self.args, self.state.global_step
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        if not args.hub_always_push and self._is_pushing():
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        staging = self._output_dir / PUSH_STAGING_DIR / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        last = LAST_CHECKPOINT if args.hub_strategy == HubStrategy.CHECKPOINT else None
        try:
            shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed
            self.export_final_model(self.load_weights(str(checkpoint)), str(staging), None)
            if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
                shutil.copytree(checkpoint, staging / (last or staging.name))
        except OSError as error:
            logger.warning("step %d is not pushed (%s); the run goes on", step, error)
            shutil.rmtree(staging, ignore_errors=True)
            return
        job = self._pushes.submit(_push_staged, staging, self.hub_target(), step, last)
        if self.push_in_progress is not None and self._is_pushing():
            self.push_in_progress.jobs.append(job)
        else:
            self.push_in_progress = PushInProgress(cast(Any, [job]))

    def _is_pushing(self) -> bool:
        return self.push_in_progress is not None and not self.push_in_progress.is_done()

    def _remove_staged_pushes(self) -> None:
        if self.is_world_process_zero():
            shutil.rmtree(self._output_dir / PUSH_STAGING_DIR, ignore_errors=True)


def _override(to: HubTarget, **overrides: Any) -> HubTarget:
    """Replace those fields whose override is not None."""
    return replace(to, **{name: value for name, value in overrides.items() if value is not None})


def _push_staged(folder: Path, to: HubTarget, step: int, replaced_folder: str | None) -> None:
    """Push a staging directory, and delete it. A failing Hub does not end the run."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    message = f"Training in progress, step {step}"
    try:
        push_files(files, open_repo(to), message, replaced_folder=replaced_folder)
    except (PushError, UsageError) as error:
        logger.warning("step %d: %s; the run goes on, and later pushes try again", step, error)
    finally:
        shutil.rmtree(folder)
