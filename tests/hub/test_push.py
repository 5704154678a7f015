"""A push uploads listed files in one commit, changes nothing locally, and can be repeated."""

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import OfflineModeIsEnabled

from helpers.cli import snapshot, train
from helpers.fake_hub import Fault, Hub
from jepa_hf import JepaConfig, JepaForRepresentationPrediction, UsageError
from jepa_hf.hub.export import export_run
from jepa_hf.hub.push import HubTarget, PushError, files_to_push, open_repo, push_files, push_run

LFS = r"PUT /_lfs/"
COMMIT = "POST /api/models/.*/commit/"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub, hub.use_in_process():
        yield hub


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint, and with files that must not be pushed."""
    folder = tmp_path_factory.mktemp("run") / "out"
    train("--smoke_test", "--max_steps", "1", "--save_steps", "1", "--export_encoder", "both", "--output_dir", folder)
    for name in ("training_args.bin", "report.html", "notes.txt", "evaluation/evaluation.json", "evaluation/map.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


SHARED = {
    *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "modules.json"),
    *("sentence_bert_config.json", "1_Pooling/config.json", "README.md", "metrics.json", "training.png"),
    *(f"jepa/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")),
    *(f"target_encoder/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json", "modules.json")),
    *(f"target_encoder/{name}" for name in ("tokenizer_config.json", "1_Pooling/config.json")),
    *("target_encoder/sentence_bert_config.json", "evaluation/map.png"),
}


def test_files_to_push(out: Path) -> None:
    """No pickle, checkpoint, settings, data samples or unrelated files are pushed."""
    assert set(files_to_push(out)) == SHARED
    assert {"_run.json", "masks.png", "checkpoint-1", "notes.txt"} <= {path.name for path in out.iterdir()}


def test_feature_encoder_is_pushed_with_its_code(tmp_path: Path) -> None:
    """All files that its export writes are pushed, so that it loads without jepa_hf."""
    sizes = {"embed_dim": 16, "predictor_embed_dim": 8, "encoder_depth": 1, "predictor_depth": 1, "num_heads": 2}
    export_run(JepaForRepresentationPrediction(JepaConfig.for_features(8, **sizes)), tmp_path)
    written = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert set(files_to_push(tmp_path)) == written


def test_repository_holds_the_files(out: Path, hub: Hub) -> None:
    """One tagged commit has the files unchanged."""
    before = snapshot(out)
    commit = push_run(out, HubTarget("x"), "Mine", tag="v1")
    repo = hub.repos["me/x"]
    assert repo.history() == ["Mine"]
    assert repo.tags == {"v1": commit.oid}
    files = repo.files("v1")
    assert set(files) == SHARED | {".gitattributes"}
    assert [name for name in SHARED - {"README.md"} if files[name] != (out / name).read_bytes()] == []
    assert snapshot(out) == before


def test_pushed_card_names_the_repository(out: Path, hub: Hub) -> None:
    """The pushed card loads from the repository."""
    push_run(out, HubTarget("me/x"), "Mine")
    card = hub.repos["me/x"].files()["README.md"].decode()
    assert card.count('("me/x"') == 4
    assert "\n# x\n" in card
    assert 'from_pretrained("out"' not in card


@pytest.mark.parametrize("part_size", [None, 100_000])
def test_large_files_are_uploaded(part_size: int | None, out: Path) -> None:
    """A large file arrives unchanged, uploaded as one file or in parts."""
    with Hub(part_size=part_size) as hub, hub.use_in_process():
        push_run(out, HubTarget("me/x"), "Mine")
        assert (len(hub.asked(LFS + ".*/2$")) > 0) == (part_size is not None)
        assert hub.repos["me/x"].files()["model.safetensors"] == (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (Fault("POST /api/repos/create"), "creating me/x failed: the Hub answered 500, the Hub is unwell"),
        (Fault("POST /api/repos/create", 403), "creating me/x failed: the Hub answered 403, .* a token that may write"),
        (Fault("POST /api/models/.*/preupload/"), "pushing to me/x failed: the Hub answered 500"),
        (Fault(LFS, skip=1), "pushing to me/x failed: the Hub answered 500"),
        (Fault(LFS, None, skip=1), r"pushing to me/x failed: the Hub cannot be reached \(.*\); check the network"),
        (Fault("POST .*/verify"), "pushing to me/x failed: the Hub answered 500"),
        (Fault(COMMIT), "pushing to me/x failed: the Hub answered 500"),
        (Fault(COMMIT, 403), "pushing to me/x failed: the Hub answered 403"),
        (Fault(COMMIT, None), r"pushing to me/x failed: the Hub cannot be reached \(.*\); check the network"),
    ],
    ids=lambda value: f"{value.request} {value.status}" if isinstance(value, Fault) else "",
)
def test_failed_push_can_be_repeated(fault: Fault, sentence: str, out: Path, hub: Hub) -> None:
    """Neither side has changed; uploaded files are not uploaded again."""
    before = snapshot(out)
    hub.faults = [fault]
    with pytest.raises(PushError, match=sentence) as refusal:
        push_run(out, HubTarget("me/x", token=hub.token), "Mine")
    assert "\n" not in str(refusal.value)
    assert hub.token not in str(refusal.value)
    assert refusal.value.status == fault.status
    assert snapshot(out) == before
    assert "me/x" not in hub.repos or set(hub.repos["me/x"].files()) == {".gitattributes"}
    hub.faults, uploaded, hub.requests = [], set(hub.objects), []
    push_run(out, HubTarget("me/x"), "Again")
    assert hub.repos["me/x"].history() == ["Again"]
    assert set(hub.repos["me/x"].files()) == SHARED | {".gitattributes"}
    assert not {request.rpartition("/")[2] for request in hub.asked(LFS)} & uploaded


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OfflineModeIsEnabled("offline mode"), "HF_HUB_OFFLINE is set, so the Hub is not contacted; unset it"),
        (TimeoutError(), "the Hub cannot be reached; check the network"),
        (ConnectionError("no route"), r"the Hub cannot be reached \(no route\); check the network"),
        (ValueError("odd answer."), "odd answer"),
        (RuntimeError(), "the Hub's client gave no reason"),
    ],
)
def test_an_unreachable_hub_is_described_without_names_of_classes(
    error: Exception, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", fail)
    with pytest.raises(PushError, match=f"^creating badname failed: {sentence}$"):
        open_repo(HubTarget("badname"))


def test_transient_fault_is_retried(out: Path, hub: Hub) -> None:
    """A transient fault does not fail a push."""
    hub.faults = [Fault(LFS, times=2)]
    push_run(out, HubTarget("me/x"), "Mine")
    assert hub.repos["me/x"].history() == ["Mine"]


def test_unreachable_hub_is_a_one_line_error(out: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unreachable Hub is a one-line `PushError`."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(PushError, match="creating me/x failed: the Hub cannot be reached") as refusal:
        push_run(out, HubTarget("me/x"), "Mine")
    assert refusal.value.status is None


def test_private_repository(out: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the owner can read a private repository."""
    push_run(out, HubTarget("me/x", private=True), "Mine")
    api = huggingface_hub.HfApi()
    assert api.model_info("me/x").private
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(huggingface_hub.errors.RepositoryNotFoundError):
        api.model_info("me/x", token=False)


def test_private_push_refuses_public_repository(out: Path, hub: Hub) -> None:
    """A private push to an existing public repository is refused."""
    open_repo(HubTarget("me/x"))
    with pytest.raises(UsageError, match="Expected me/x to be private, but it exists and is public"):
        push_run(out, HubTarget("me/x", private=True), "Mine")
    assert hub.repos["me/x"].history() == []


def test_branch_leaves_main_unchanged(out: Path, hub: Hub) -> None:
    """A push to a branch creates it and does not change main."""
    for message in ("One", "Nothing new"):
        push_run(out, HubTarget("me/x", revision="trial/1"), message)
    assert hub.repos["me/x"].history() == []
    assert hub.repos["me/x"].history("trial/1") == ["One"]


def test_existing_tag_is_refused(out: Path, hub: Hub, tmp_path: Path) -> None:
    """An existing tag is refused before anything is pushed."""
    push_run(out, HubTarget("me/x"), "One", tag="v1")
    with pytest.raises(UsageError, match="me/x already has a tag 'v1'; choose another"):
        push_files({"new.txt": b"new"}, HubTarget("me/x"), "Two", tag="v1")
    assert hub.repos["me/x"].history() == ["One"]


def test_replaced_folder(hub: Hub) -> None:
    """Older files of a replaced folder are deleted."""
    to = open_repo(HubTarget("me/x"))
    push_files({"last/a": b"1", "last/b": b"1", "lastly": b"1"}, to, "One", replaced_folder="last")
    push_files({"last/b": b"2"}, to, "Two", replaced_folder="last")
    files = hub.repos["me/x"].files()
    assert {name: content for name, content in files.items() if name != ".gitattributes"} == {
        "last/b": b"2",
        "lastly": b"1",
    }


@pytest.mark.parametrize("name", ["", "a b", "a/b/c", "../x", "me/x--y", "-x", "me/<b>"])
def test_invalid_repository_name_is_refused(name: str) -> None:
    """Names that the Hub does not allow are usage errors."""
    with pytest.raises(UsageError, match="is not a valid name of a Hub repository; give user/name"):
        HubTarget(name)


def test_folder_without_encoder_is_refused(out: Path, tmp_path: Path) -> None:
    """A folder without a plain encoder is a usage error."""
    for folder in (tmp_path, out / "jepa" / "nothing"):
        with pytest.raises(UsageError, match=r"holds no trained encoder .* give the output_dir of a finished run"):
            files_to_push(folder)


def test_push_command_has_no_token() -> None:
    """The command repeats the push without the token."""
    to = HubTarget("me/x", private=True, revision="trial", token="hf_secret")
    assert to.command("my runs/out") == "jepa-hf push 'my runs/out' me/x --private --revision trial"
