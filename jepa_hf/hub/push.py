"""Pushes of a run to the Hub, in one commit each, so that a repository is never incomplete."""

import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    validate_repo_id,
)

from ..errors import UsageError, one_line
from ..models.configuration_jepa import JepaConfig
from .export import JEPA_FOLDER, TARGET_FOLDER
from .model_card import rename_card

# Files needed for loading: weights, configuration, tokenizer or image processor, code of the feature encoder.
MODEL_FILES = (
    "config.json", "generation_config.json", "model.safetensors", "model-?????-of-?????.safetensors",
    "model.safetensors.index.json", "adapter_config.json", "adapter_model.safetensors", "modules.json",
    "1_Pooling/config.json", "sentence_bert_config.json",
    "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt", "spm.model", "sentencepiece.bpe.model",
    "chat_template.jinja", "configuration_feature_encoder.py", "modeling_feature_encoder.py", "argument_names.py",
    "errors.py", "positions.py", "upstream.py",
)  # fmt: skip
# Files that document the run, without masks.png and report.html, which show samples of the data.
RUN_FILES = ("README.md", "metrics.json", "training.png", "evaluation/*.png")
LAST_CHECKPOINT = "last-checkpoint"
_CARD = "README.md"


class PushError(RuntimeError):
    """A failed push, with a one-line message. Local files are unchanged, and the push can be repeated.

    `status` is the HTTP status of the Hub's response; None without a response.
    """

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class HubTarget:
    """Destination of a push.

    Args:
        repo_id: "user/name", or "name" for a repository of the token's user.
        private: create the repository as private, and refuse an existing public one.
        revision: a branch, created if missing; default "main".
        token: access token; default `HF_TOKEN`, or the one of `hf auth login`.

    Raises:
        UsageError: the Hub does not allow this name.
    """

    repo_id: str
    private: bool | None = None
    revision: str | None = None
    token: str | None = None

    def __post_init__(self) -> None:
        try:
            validate_repo_id(self.repo_id)
        except HFValidationError:
            raise UsageError(
                f"{self.repo_id!r} is not a valid name of a Hub repository; give user/name, with letters, digits, "
                "'-', '_' and '.'"
            ) from None

    def command(self, run_dir: str | Path) -> str:
        """Return the command that pushes a run there, without the token."""
        words = ["jepa-hf", "push", str(run_dir), self.repo_id]
        words += ["--private"] if self.private else []
        words += ["--revision", self.revision] if self.revision else []
        return shlex.join(words)


def files_to_push(run_dir: str | Path) -> dict[str, Path]:
    """Return the files of a run's directory that are pushed, by their path in the repository.

    They are the encoder, language model or adapters, the full model under `jepa/`, tokenizer or image processor, card,
    metrics and pictures. A list of names excludes everything else: checkpoints, pickles, settings with paths
    (`_run.json`), samples of the data (`masks.png`, `report.html`).

    Raises:
        UsageError: there is no plain encoder, language model or adapter at the root.
    """
    folder = Path(run_dir)
    files = {
        path.relative_to(folder).as_posix(): path
        for below in ("", JEPA_FOLDER, TARGET_FOLDER)
        for pattern in (MODEL_FILES if below else (*MODEL_FILES, *RUN_FILES))
        for path in sorted((folder / below).glob(pattern))
        if path.is_file()
    }
    has_lora = "adapter_config.json" in files and "adapter_model.safetensors" in files
    has_model = "config.json" in files and any(re.fullmatch(r"model.*\.safetensors", name) for name in files)
    if not has_model and not has_lora:
        raise UsageError(
            f"{str(run_dir)!r} holds no trained encoder (config.json and model.safetensors); give the output_dir of a "
            "finished run, or the output of `jepa-hf export`"
        )
    if has_model and JepaConfig.get_config_dict(folder)[0].get("model_type") == JepaConfig.model_type:
        raise UsageError(
            f"{str(run_dir)!r} is a checkpoint or a full model, which AutoModel cannot load as an encoder; give the "
            "output_dir of a finished run, or the output of `jepa-hf export`"
        )
    return files


def push_run(
    run_dir: str | Path, to: HubTarget, commit_message: str, tag: str | None = None, show_progress: bool = False
) -> CommitInfo:
    """Push the files of `files_to_push`, with the repository's name in the card.

    Args:
        run_dir: the output directory of a run; it is not changed.
        to: the destination.
        commit_message: message of the commit.
        tag: tag for the commit; an existing one is refused before anything is pushed.
        show_progress: whether to show the Hub client's progress bars.

    Returns:
        The commit.

    Raises:
        UsageError: there is no encoder to push, or the tag exists.
        PushError: the Hub failed, refused the push or could not be reached. The push can be
            repeated; uploaded files are not uploaded again.
    """
    files: dict[str, Path | bytes] = dict(files_to_push(run_dir))
    to = open_repo(to)
    if _CARD in files:
        files[_CARD] = rename_card(Path(run_dir, _CARD).read_text(encoding="utf-8"), to.repo_id).encode()
    return push_files(files, to, commit_message, tag=tag, show_progress=show_progress)


def push_files(
    files: Mapping[str, Path | bytes],
    to: HubTarget,
    commit_message: str,
    *,
    replaced_folder: str | None = None,
    tag: str | None = None,
    show_progress: bool = False,
) -> CommitInfo:
    """Push files in one commit to the destination that `open_repo` returned; `tag` and bars as in `push_run`.

    `files` are contents or local paths, by path in the repository. Its other files are kept, except those in
    `replaced_folder`.
    """
    api = HfApi(token=to.token)
    repo_id, revision = to.repo_id, to.revision or "main"
    with _as_push_error(f"pushing to {repo_id}", to), _progress_bars(show_progress):
        if tag is not None and tag in {ref.name for ref in api.list_repo_refs(repo_id).tags}:
            raise UsageError(f"{repo_id} already has a tag {tag!r}; choose another")
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in files.items()
        ]
        if replaced_folder is not None:
            begin = f"{replaced_folder}/"
            operations += [
                CommitOperationDelete(path_in_repo=name, is_folder=False)
                for name in api.list_repo_files(repo_id, revision=revision)
                if name.startswith(begin) and name not in files
            ]
        commit = api.create_commit(repo_id, operations, commit_message=commit_message, revision=revision)
        if tag is not None:
            api.create_tag(repo_id, tag=tag, revision=commit.oid)
    return commit


def open_repo(to: HubTarget) -> HubTarget:
    """Create the repository and the branch if they do not exist; returns the destination with its full name."""
    api = HfApi(token=to.token)
    with _as_push_error(f"creating {to.repo_id}", to):
        repo_id = api.create_repo(to.repo_id, private=to.private, exist_ok=True).repo_id
        if to.private and not api.model_info(repo_id).private:
            raise UsageError(
                f"Expected {repo_id} to be private, but it exists and is public; make it private in its settings on "
                "the Hub, or choose another name"
            )
        if to.revision not in (None, "main"):
            api.create_branch(repo_id, branch=to.revision, exist_ok=True)
    return replace(to, repo_id=repo_id)


@contextmanager
def _as_push_error(action: str, to: HubTarget) -> Iterator[None]:
    """Turn errors of Hub and connection into one-line `PushError`s without the token."""
    try:
        yield
    except UsageError:
        raise
    # HTTPError comes from the HTTP client. The Hub's client raises RuntimeError for failed uploads
    # and ValueError for malformed responses.
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        cause: BaseException = error
        while isinstance(cause, RuntimeError) and cause.__cause__ is not None:
            cause = cause.__cause__
        reason = _reason(cause)
        if to.token:
            reason = reason.replace(to.token, "<token>")
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
        raise PushError(f"{action} failed: {reason}", status) from None


# Remedies by HTTP status.
_REMEDIES = {
    401: "; log in with `hf auth login`, or set HF_TOKEN",
    403: "; check the name, or log in with a token that may write there",
    404: "; check the name, and that the token has access",
}


def _reason(error: BaseException) -> str:
    """Describe an error in one line: the Hub's message, or the error itself."""
    if isinstance(error, HfHubHTTPError):
        message = error.server_message or error.response.reason_phrase
        status = error.response.status_code
        return f"the Hub answered {status}, {one_line(message).rstrip('.')[:200]}{_REMEDIES.get(status, '')}"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so the Hub is not contacted; unset it"
    text = one_line(error).rstrip(".")[:200]
    if isinstance(error, (HTTPError, ConnectionError, TimeoutError)):
        return f"the Hub cannot be reached{f' ({text})' if text else ''}; check the network"
    return text or "the Hub's client gave no reason"


@contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    """Show or hide the Hub client's progress bars, which would break those of training."""
    were_disabled = are_progress_bars_disabled()
    if not shown:
        disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            enable_progress_bars()
