"""Claims about checkpoints: complete or absent, damaged ones reported, the last complete one never deleted."""

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.batches import rows
from helpers.cli import snapshot
from helpers.runs import RunAtStep, StopAfter, trainer, weights
from jepa_hf import UsageError
from jepa_hf.training.base_trainer import BaseJepaTrainer
from jepa_hf.training.checkpoints import (
    MANIFEST,
    commit_checkpoint,
    create_staging_dir,
    find_corruption,
    latest_valid_checkpoint,
    remove_incomplete,
    resume_hint,
    rotate,
    staging_path,
    validate_checkpoint,
)

FILES = {"trainer_state.json": b"{}", "model.safetensors": b"0123456789" * 100, "folder/part.bin": b"abc"}


def add(run_dir: Path, step: int) -> Path:
    """A complete checkpoint of three files."""
    checkpoint = run_dir / f"checkpoint-{step}"
    create_staging_dir(checkpoint)
    for name, content in FILES.items():
        path = staging_path(checkpoint) / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    commit_checkpoint(checkpoint)
    return checkpoint


def names(run_dir: Path) -> set[str]:
    return {path.name for path in run_dir.iterdir()}


# ---- writing


def test_nothing_of_a_checkpoint_is_there_until_all_of_it_is(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-1"
    create_staging_dir(checkpoint)
    (staging_path(checkpoint) / "trainer_state.json").write_text("{}")
    assert names(tmp_path) == {"_checkpoint-1.new"}
    assert latest_valid_checkpoint(tmp_path) == (None, [])
    commit_checkpoint(checkpoint)
    assert names(tmp_path) == {"checkpoint-1"}
    assert find_corruption(checkpoint) is None


def test_one_that_was_not_written_to_its_end_leaves_nothing_to_the_next(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-1"
    create_staging_dir(checkpoint)
    (staging_path(checkpoint) / "stale").touch()
    create_staging_dir(checkpoint)
    assert list(staging_path(checkpoint).iterdir()) == []


def test_a_checkpoint_of_the_same_number_is_replaced(tmp_path: Path) -> None:
    (add(tmp_path, 1) / "model.safetensors").write_bytes(b"torn")
    assert find_corruption(add(tmp_path, 1)) is None
    assert names(tmp_path) == {"checkpoint-1"}


def test_what_was_left_behind_is_removed_and_nothing_else(tmp_path: Path) -> None:
    kept = {"checkpoint-1", "_checkpoint-2", "_checkpoint-x.new", "_run.json"}
    for name in kept | {"_checkpoint-2.new", "_checkpoint-3.old"}:
        (tmp_path / name).mkdir()
    remove_incomplete(tmp_path)
    assert names(tmp_path) == kept


# ---- reading


@pytest.mark.parametrize("name", FILES)
def test_missing_shorter_and_changed_files_are_distinguished(name: str, tmp_path: Path) -> None:
    """A single flipped bit too, unless only the sizes are asked for."""
    checkpoint = add(tmp_path, 1)
    path = checkpoint / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert find_corruption(checkpoint) == f"its {name} was changed since it was written"
    assert find_corruption(checkpoint, contents=False) is None
    path.write_bytes(content[:-1])
    assert (
        find_corruption(checkpoint, contents=False)
        == f"its {name} has {len(content) - 1:,} bytes and not {len(content):,}"
    )
    path.unlink()
    assert f"{name}" in find_corruption(checkpoint)
    assert "missing" in find_corruption(checkpoint) or "it has no" in find_corruption(checkpoint)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.integers(0, 10_000), bit=st.integers(0, 7), truncate_file=st.booleans())
def test_no_flipped_bit_and_no_cut_passes_verification(
    where: int, bit: int, truncate_file: bool, tmp_path: Path
) -> None:
    """Anywhere in any file, the manifest included; but for its white space and spelling, which say nothing."""
    shutil.rmtree(tmp_path / "checkpoint-1", ignore_errors=True)
    checkpoint = add(tmp_path, 1)
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    path = files[where % len(files)]
    content = bytearray(path.read_bytes())
    at = where % len(content)
    noted = json.loads((checkpoint / MANIFEST).read_text())
    if truncate_file:
        path.write_bytes(content[:at])
    else:
        content[at] ^= 1 << bit
        path.write_bytes(content)
    why = find_corruption(checkpoint)
    if why is None:
        assert path.name == MANIFEST
        assert {name: each["size"] for name, each in noted["files"].items()} == {
            name: each["size"] for name, each in json.loads(path.read_text())["files"].items()
        }


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"files": 3}', '{"files": {"a": {}}}', "\ud800"])
def test_a_damaged_manifest_is_reported(content: str, tmp_path: Path) -> None:
    checkpoint = add(tmp_path, 1)
    (checkpoint / MANIFEST).write_bytes(content.encode("utf-8", "surrogatepass"))
    assert find_corruption(checkpoint) == f"its {MANIFEST} is damaged"


def test_the_newest_complete_one_is_taken_and_skipped_ones_are_named(tmp_path: Path) -> None:
    """By number, not by name or age; other folders do not count."""
    assert latest_valid_checkpoint(tmp_path) == (None, [])
    for step in (100, 9, 10, 200, 300):
        add(tmp_path, step)
    (tmp_path / "checkpoint-200" / "model.safetensors").unlink()
    (tmp_path / "checkpoint-300" / MANIFEST).unlink()
    (tmp_path / "checkpoint-1000-copy").mkdir()
    newest, passed_over = latest_valid_checkpoint(tmp_path)
    assert newest == tmp_path / "checkpoint-100"
    assert passed_over == [
        f"skipping {tmp_path}/checkpoint-300, which is incomplete: it has no {MANIFEST}, which is written last",
        f"skipping {tmp_path}/checkpoint-200, which is incomplete: its model.safetensors is missing",
    ]
    assert f"Give the same command again to go on from {newest}." == resume_hint(tmp_path)


def test_a_damaged_named_one_is_refused_and_the_newest_complete_one_named(tmp_path: Path) -> None:
    torn = add(tmp_path, 3)
    (torn / "model.safetensors").unlink()
    with pytest.raises(
        UsageError,
        match=r"is incomplete: its model\.safetensors is missing\. No other checkpoint of the run is complete",
    ):
        validate_checkpoint(torn)
    add(tmp_path, 2)
    with pytest.raises(UsageError, match="Use the newest complete one, checkpoint-2"):
        validate_checkpoint(torn)
    validate_checkpoint(tmp_path / "checkpoint-2")


# ---- deleting


def test_those_that_were_written_first_go_first_and_torn_ones_before(tmp_path: Path) -> None:
    for age, step in enumerate((30, 40, 10, 20)):  # a run that was resumed from an earlier one
        os.utime(add(tmp_path, step) / MANIFEST, (age, age))
    for step, lacking in ((50, MANIFEST), (60, "model.safetensors")):
        (add(tmp_path, step) / lacking).unlink()
    last = tmp_path / "checkpoint-20"
    rotate(tmp_path, None, [last])
    rotate(tmp_path, 0, [last])
    assert len(names(tmp_path)) == 6
    rotate(tmp_path, 4, [last])
    assert names(tmp_path) == {f"checkpoint-{step}" for step in (10, 20, 30, 40)}
    rotate(tmp_path, 2, [last])
    assert names(tmp_path) == {"checkpoint-10", "checkpoint-20"}


@pytest.mark.parametrize("limit", [1, 2])
def test_the_one_just_written_and_the_best_stay(limit: int, tmp_path: Path) -> None:
    """Also where newer folders are torn, which transformers would keep in their place."""
    for step in (10, 20, 90):
        add(tmp_path, step)
    (tmp_path / "checkpoint-90" / "model.safetensors").unlink()
    rotate(tmp_path, limit, [tmp_path / "checkpoint-20", tmp_path / "x" / ".." / "checkpoint-10"])
    assert names(tmp_path) == {"checkpoint-10", "checkpoint-20"}


# ---- real runs


def resumable(folder: Path, **overrides: Any) -> Any:
    return trainer(folder, max_steps=4, save_strategy="steps", save_steps=1, **overrides)


@pytest.fixture(scope="module")
def truncate_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that was interrupted after step 2 of 4, each of which it saved."""
    folder = tmp_path_factory.mktemp("cut") / "out"
    run = resumable(folder)
    run.add_callback(StopAfter(2))
    run.train()
    return folder


@pytest.fixture
def run_dir(truncate_file: Path, tmp_path: Path) -> Path:
    shutil.copytree(truncate_file, tmp_path / "out")
    return tmp_path / "out"


def test_true_resumes_from_the_newest_complete_one_and_warns(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    (run_dir / "checkpoint-2" / "optimizer.pt").write_bytes(b"torn")
    (run_dir / "_checkpoint-7.new").mkdir()
    run = resumable(run_dir)
    run.train(resume_from_checkpoint=True)
    assert len(run.batches) == 3
    assert any("skipping" in line and "its optimizer.pt has 4 bytes" in line for line in caplog.messages)
    assert names(run_dir) == {f"checkpoint-{step}" for step in (1, 2, 3, 4)}
    assert all(find_corruption(run_dir / f"checkpoint-{step}") is None for step in (1, 2, 3, 4))


def test_a_damaged_newer_one_does_not_cost_the_last_complete_one(run_dir: Path) -> None:
    """With save_total_limit 1, where transformers keeps the folder of the highest number."""
    for name in ("checkpoint-1", "checkpoint-2"):
        (run_dir / name).rename(run_dir / f"checkpoint-9{name[-1]}")
    add(run_dir, 1)
    shutil.rmtree(run_dir / "checkpoint-1")
    (run_dir / "checkpoint-92" / "optimizer.pt").unlink()
    run = resumable(run_dir, save_total_limit=1)
    run.add_callback(StopAfter(1))
    run.train()
    assert find_corruption(run_dir / "checkpoint-1") is None
    assert names(run_dir) == {"checkpoint-1"}


def test_no_complete_one_is_reported_before_any_step(run_dir: Path) -> None:
    for step in (1, 2):
        (run_dir / f"checkpoint-{step}" / MANIFEST).unlink()
    before = snapshot(run_dir)
    run = resumable(run_dir)
    with pytest.raises(UsageError, match="to hold a complete checkpoint, found none"):
        run.train(resume_from_checkpoint=True)
    with pytest.raises(UsageError, match=rf"checkpoint-2.* is incomplete: it has no {MANIFEST}"):
        run.train(resume_from_checkpoint=str(run_dir / "checkpoint-2"))
    assert not run.batches
    assert snapshot(run_dir) == before


def test_the_best_checkpoint_is_noted_by_the_name_it_ends_with(tmp_path: Path) -> None:
    """In the checkpoint's own state as in the run's, although it was written under another."""
    best_by = {"load_best_model_at_end": True, "metric_for_best_model": "top1_accuracy", "save_total_limit": 2}
    run = resumable(tmp_path, eval_strategy="steps", eval_steps=1, eval_data=rows("bert", 8), **best_by)
    run.train()
    best = Path(run.state.best_model_checkpoint)
    assert find_corruption(best) is None
    for checkpoint in (best, tmp_path / "checkpoint-4"):
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(best)


def test_an_interrupted_save_leaves_the_one_before(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each of its parts; what is left is removed by the next start."""
    for part in ("save_model", "_save_optimizer_and_scheduler", "_save_scaler", "_save_rng_state"):
        run = resumable(run_dir)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            inherited = getattr(BaseJepaTrainer, part)

            def torn(self: Any, *args: Any, inherited: Any = inherited, **kwargs: Any) -> None:
                inherited(self, *args, **kwargs)
                raise KeyboardInterrupt

            patch.setattr(BaseJepaTrainer, part, torn)
            run.train(resume_from_checkpoint=True)
        assert latest_valid_checkpoint(run_dir) == (run_dir / "checkpoint-2", [])


# ---- pickles


class MaliciousPickle:
    """Makes a file when it is unpickled."""

    def __init__(self, created: Path):
        self.created = created

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.created),)


@pytest.mark.parametrize(
    ("name", "description"),
    [
        ("optimizer.pt", "optimizer or scheduler"),
        ("scheduler.pt", "optimizer or scheduler"),
        ("rng_state.pth", "random state"),
        ("scaler.pt", "gradient scaler"),
        ("pytorch_model.bin", "weights"),
    ],
)
def test_a_planted_pickle_is_refused_and_not_run(name: str, description: str, run_dir: Path, tmp_path: Path) -> None:
    """The manifest shows that the file was changed; with a forged manifest nothing is executed either."""
    checkpoint, created = run_dir / "checkpoint-2", tmp_path / "made"
    known = name in json.loads((checkpoint / MANIFEST).read_text())["files"]
    torch.save({"state": MaliciousPickle(created)}, checkpoint / name)
    if known:
        with pytest.raises(UsageError, match=rf"its {name.replace('.', chr(92) + '.')} has"):
            resumable(run_dir).train(resume_from_checkpoint=str(checkpoint))
    if name == "pytorch_model.bin":
        (checkpoint / "model.safetensors").unlink()
    shutil.copytree(checkpoint, staging_path(checkpoint))
    (staging_path(checkpoint) / MANIFEST).unlink()
    commit_checkpoint(checkpoint)
    run = resumable(run_dir)
    if name == "scaler.pt":
        run.accelerator.scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(
        UsageError, match=rf"only numbers as the {description} in .*checkpoint-2, .*mkdir.*is not loaded"
    ):
        run.train(resume_from_checkpoint=str(checkpoint))
    assert not created.exists()
    assert not run.batches


def test_a_sharded_checkpoints_description_is_a_pickle_and_refused(run_dir: Path) -> None:
    """torch.distributed.checkpoint would unpickle it with all that it asks for."""
    checkpoint = run_dir / "checkpoint-2"
    (checkpoint / "pytorch_model_fsdp_0").mkdir()
    (checkpoint / "pytorch_model_fsdp_0" / ".metadata").write_bytes(pickle.dumps(MaliciousPickle(run_dir / "made")))
    with pytest.raises(UsageError, match=r"\.metadata is a pickle.*FULL_STATE_DICT"):
        resumable(run_dir).train(resume_from_checkpoint=str(checkpoint))
    assert not (run_dir / "made").exists()


def test_an_epochs_incomplete_last_update_is_known_after_a_resume(tmp_path: Path) -> None:
    """accelerate forgets its length then, and rows that fill it up on several ranks would be learnt from."""
    settings = {"data": rows("bert", 37), "max_steps": 5, "save_strategy": "steps", "save_steps": 3}
    trainer(tmp_path, callbacks=[StopAfter(3)], **settings).train()
    rest = trainer(tmp_path, **settings)
    seen: list[tuple[int, int]] = []
    accumulation = rest.accelerator.gradient_state
    rest.add_callback(
        RunAtStep(on_step_end=lambda model, state: seen.append((rest._last_update_size, accumulation.remainder)))
    )
    rest.train(resume_from_checkpoint=True)
    assert seen == [(5, -1), (5, -1)]


@pytest.mark.parametrize("engine", ["", "global_step2"])
def test_a_checkpoint_without_optimizer_states_is_refused(engine: str, tmp_path: Path) -> None:
    """Trainer would go on with fresh ones; also where there are some of DeepSpeed's own form."""
    resumable(tmp_path, callbacks=[StopAfter(2)], save_only_model=True).train()
    (tmp_path / "checkpoint-2" / engine).mkdir(exist_ok=True)
    with pytest.raises(UsageError, match=r"checkpoint-2 holds no optimizer\.pt .*Start from its weights"):
        resumable(tmp_path).train(resume_from_checkpoint=True)


def test_a_resume_from_complete_parts_is_exact(run_dir: Path, tmp_path: Path) -> None:
    """The random state of numpy and Python, which are not tensors, passes the same gate."""
    undisturbed, rest = resumable(tmp_path / "whole"), resumable(run_dir)
    undisturbed.train()
    rest.train(resume_from_checkpoint=True)
    ours, theirs = weights(rest.model), weights(undisturbed.model)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
