"""What a trainer gives to others: the layout that they load, its card, and pushes of both to the Hub."""

import logging
import shutil
from abc import abstractmethod
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import PushInProgress

from ..distributed.deepspeed_state import whole_weights
from ..errors import UsageError
from ..hub.model_card import CardFacts, DataNames, render_card
from ..hub.push import LAST_CHECKPOINT, Destination, PushError, open_repo, push_files, push_run
from ..utils.atomic_files import whole_file

logger = logging.getLogger(__name__)

# Below the output directory: what is being pushed.
PUSH_FOLDER = "_push"


class HubTrainer(Trainer):
    """A `Trainer` whose result is not its model as it is trained, but what `write_final` makes of it.

    Subclasses say what others load (`write_final`) and what its card tells (`card_facts`). Pushes are of that, at the
    end and, by `hub_strategy`, on the way; a Hub that fails does not end a run.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        self._pushes = ThreadPoolExecutor(max_workers=1, thread_name_prefix="push")  # one after the other
        super().__init__(*args, **kwargs)

    def load_weights(self, checkpoint: str) -> nn.Module:
        """The model that a checkpoint holds, beside the one that is trained."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        with whole_weights():
            return type(model).from_pretrained(checkpoint)

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
        with whole_file(Path(self.args.output_dir) / "README.md") as new:
            render_card(facts).save(new)

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
        try:
            shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed
            self.write_final(self.load_weights(checkpoint_folder), str(aside), None)
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
