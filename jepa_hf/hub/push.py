"""What of a run goes to the Hub, and how: in one commit, so that a repository never holds half of it."""

import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    validate_repo_id,
)

from ..errors import UsageError
from ..models.configuration_jepa import JepaConfig
from .export import JEPA_FOLDER, TARGET_FOLDER
from .model_card import rename_card

# What makes a directory loadable: weights, configuration, tokenizer or image processor, code of our own encoder.
MODEL_FILES = (
    "config.json", "generation_config.json", "model.safetensors", "model-?????-of-?????.safetensors",
    "model.safetensors.index.json", "adapter_config.json", "adapter_model.safetensors", "modules.json",
    "1_Pooling/config.json", "sentence_bert_config.json",
    "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt", "spm.model", "sentencepiece.bpe.model",
    "chat_template.jinja", "configuration_feature_encoder.py", "modeling_feature_encoder.py", "errors.py",
    "positions.py",
)  # fmt: skip
# What tells about the run. Not masks.png and report.html, which show samples of the data.
RUN_FILES = ("README.md", "metrics.json", "training.png", "evaluation/*.png")
LAST_CHECKPOINT = "last-checkpoint"
_CARD = "README.md"


class PushError(RuntimeError):
    """What the Hub did not take. Its message is one sentence; nothing local is lost, and it can be repeated.

    Args:
        status: of the Hub's answer; None where there was none.
    """

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Destination:
    """Where to push to.

    Args:
        repo_id: "user/name", or "name" alone for the token's own user.
        private: make the repository private when it is created; one that is public is then refused.
        revision: a branch, made where there is none; default "main".
        token: default what `HF_TOKEN` or `hf auth login` gives.

    Raises:
        UsageError: a name that the Hub does not allow.
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
                f"{self.repo_id!r} is no name of a repository on the Hub; give user/name, of letters, digits, '-', '_' "
                "and '.'"
            ) from None

    def command(self, run_dir: str | Path) -> str:
        """What pushes a run there by hand; the token is left out."""
        words = ["jepa-hf", "push", str(run_dir), self.repo_id]
        words += ["--private"] if self.private else []
        words += ["--revision", self.revision] if self.revision else []
        return shlex.join(words)


def files_to_push(run_dir: str | Path) -> dict[str, Path]:
    """The files of a run's directory that are shared, by their place in the repository.

    They are the encoder, language model or adapters, the full model under `jepa/`, tokenizer or image processor, card,
    metrics and pictures. By
    name, so that nothing else that lies there goes along: no checkpoint, no pickle, no settings with paths
    (`_run.json`), no samples of the data (`masks.png`, `report.html`).

    Raises:
        UsageError: there is no plain encoder, language model or adapter at its root.
    """
    folder = Path(run_dir)
    found = {
        path.relative_to(folder).as_posix(): path
        for below in ("", JEPA_FOLDER, TARGET_FOLDER)
        for pattern in (MODEL_FILES if below else (*MODEL_FILES, *RUN_FILES))
        for path in sorted((folder / below).glob(pattern))
        if path.is_file()
    }
    adapters = "adapter_config.json" in found and "adapter_model.safetensors" in found
    plain = "config.json" in found and any(re.fullmatch(r"model.*\.safetensors", name) for name in found)
    if not plain and not adapters:
        raise UsageError(
            f"{str(run_dir)!r} holds no trained encoder (config.json and model.safetensors); give the output_dir of a "
            "finished run, or what `jepa-hf export` made of a checkpoint"
        )
    if plain and JepaConfig.get_config_dict(folder)[0].get("model_type") == JepaConfig.model_type:
        raise UsageError(
            f"{str(run_dir)!r} is a checkpoint or a full model, which AutoModel would not load as an encoder; give the "
            "output_dir of a finished run, or what `jepa-hf export` made of it"
        )
    return found


def push_run(
    run_dir: str | Path, to: Destination, commit_message: str, tag: str | None = None, show_progress: bool = False
) -> CommitInfo:
    """Push what `files_to_push` names. Nothing here is changed; the card names the repository instead of a directory.

    Args:
        tag: a name for the new state; one that exists already is refused before anything is pushed.

    Raises:
        UsageError: no encoder to push, a tag that exists.
        PushError: the Hub refused, failed or could not be reached. Nothing is lost, and it can be repeated: what was
            uploaded is not uploaded again.
    """
    files: dict[str, Path | bytes] = dict(files_to_push(run_dir))
    to = open_repo(to)
    if _CARD in files:
        files[_CARD] = rename_card(Path(run_dir, _CARD).read_text(encoding="utf-8"), to.repo_id).encode()
    return push_files(files, to, commit_message, tag=tag, show_progress=show_progress)


def push_files(
    files: Mapping[str, Path | bytes],
    to: Destination,
    commit_message: str,
    *,
    replaced_folder: str | None = None,
    tag: str | None = None,
    show_progress: bool = False,
) -> CommitInfo:
    """Make one commit of files; all others in the repository stay.

    Args:
        to: as `open_repo` returned it.
        files: contents, or where they lie, by their place in the repository.
        replaced_folder: a folder of the repository of which nothing older stays.
        tag: see `push_run`.

    Raises:
        UsageError, PushError: see `push_run`.
    """
    api = HfApi(token=to.token)
    repo_id, revision = to.repo_id, to.revision or "main"
    with _saying(f"pushing to {repo_id}", to), _progress_bars(show_progress):
        if tag is not None and tag in {found.name for found in api.list_repo_refs(repo_id).tags}:
            raise UsageError(f"{repo_id} has a tag {tag!r} already; name another")
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in files.items()]
        if replaced_folder is not None:
            begin = f"{replaced_folder}/"
            there = api.list_repo_files(repo_id, revision=revision)
            operations += [
                CommitOperationDelete(path_in_repo=name, is_folder=False)
                for name in there
                if name.startswith(begin) and name not in files
            ]
        commit = api.create_commit(repo_id, operations, commit_message=commit_message, revision=revision)
        if tag is not None:
            api.create_tag(repo_id, tag=tag, revision=commit.oid)
    return commit


def open_repo(to: Destination) -> Destination:
    """Make sure that the repository and the branch are there.

    Returns:
        The destination with the repository's whole name.

    Raises:
        UsageError: it was to be private, and is public.
        PushError: the Hub refused, failed or could not be reached.
    """
    api = HfApi(token=to.token)
    with _saying(f"creating {to.repo_id}", to):
        repo_id = api.create_repo(to.repo_id, private=to.private, exist_ok=True).repo_id
        if to.private and not api.model_info(repo_id).private:
            raise UsageError(
                f"{repo_id} is to be private, but it exists and is public: make it private in its settings on the "
                "Hub, or name another"
            )
        if to.revision not in (None, "main"):
            api.create_branch(repo_id, branch=to.revision, exist_ok=True)
    return replace(to, repo_id=repo_id)


@contextmanager
def _saying(doing: str, to: Destination) -> Iterator[None]:
    """Make whatever the Hub or the way to it does wrong a `PushError` of one sentence, without the token."""
    try:
        yield
    except UsageError:
        raise
    # HTTPError is the HTTP client's; the Hub's client wraps failures of uploads in RuntimeError, of answers in
    # ValueError.
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        cause: BaseException = error
        while isinstance(cause, RuntimeError) and cause.__cause__ is not None:
            cause = cause.__cause__
        reason = _reason(cause)
        if to.token:
            reason = reason.replace(to.token, "<token>")
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
        raise PushError(f"{doing} failed: {reason}", status) from None


# What helps where the Hub knows who asks, and where it does not.
_REMEDIES = {
    401: "; log in with `hf auth login`, or set HF_TOKEN",
    403: "; check the name, or log in with a token that may write there",
    404: "; check the name, and that the token may see it",
}


def _reason(error: BaseException) -> str:
    """What went wrong, in one line: what the Hub said, or else the error itself."""
    if isinstance(error, HfHubHTTPError):
        said = error.server_message or error.response.reason_phrase
        status = error.response.status_code
        return f"the Hub answered {status}, {' '.join(said.split()).rstrip('.')[:200]}{_REMEDIES.get(status, '')}"
    text = " ".join(str(error).split()).rstrip(".")[:200]
    return f"{type(error).__name__}, {text}" if text else type(error).__name__


@contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    """Show the Hub client's bars, or not: in training they would tear its own."""
    before = are_progress_bars_disabled()
    if not shown:
        disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()
