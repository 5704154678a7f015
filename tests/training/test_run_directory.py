"""Claims about output directories: whose they are, when a run in one goes on, and what may be deleted."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from helpers.cli import QUIET, SimulatedKill, assert_same_weights, snapshot, train
from helpers.tiny_models import CORPUS, save_tiny_encoder, write_lines
from jepa_hf import JepaTrainer, UsageError, pretrain
from jepa_hf.cli import train as train_module
from jepa_hf.cli.train import main
from jepa_hf.training import run_directory
from jepa_hf.training.checkpoints import commit_checkpoint, create_staging_dir, staging_path
from jepa_hf.training.run_directory import (
    RUN_FILE,
    RunPlan,
    finish_run,
    plan_run,
    read_run,
    start_run,
    versions,
)
from jepa_hf.utils.atomic_files import remove_path

SETTINGS: dict[str, Any] = {"mask_ratio": 0.3, "max_steps": 20, "num_train_epochs": 3.0, "logging_steps": 10}


def add_checkpoint(folder: Path, step: int, without: str = "") -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    create_staging_dir(checkpoint)
    for name in ("config.json", "trainer_state.json", "model.safetensors"):
        (staging_path(checkpoint) / name).write_text(json.dumps({"global_step": step, "epoch": step / 4}))
    commit_checkpoint(checkpoint)
    if without:
        (checkpoint / without).unlink()
    return checkpoint


@pytest.fixture
def unfinished(tmp_path: Path) -> Path:
    """The directory of a run that was killed after step 10."""
    folder = tmp_path / "out"
    start_run(folder, SETTINGS, RunPlan())
    add_checkpoint(folder, 5)
    add_checkpoint(folder, 10)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`out`, a finished run of one step with its checkpoint, and `bert` and `data.txt`, which it started from."""
    folder = tmp_path_factory.mktemp("trained")
    command = ["--model_name_or_path", save_tiny_encoder("bert", folder / "bert"), "--max_steps", "1"]
    command += ["--train_file", write_lines(folder / "data.txt", CORPUS), "--output_dir", folder / "out"]
    train(*command, "--save_steps", "1")
    return folder


# ---- plans


@pytest.mark.parametrize("exists", [False, True])
def test_a_new_or_empty_directory_is_a_fresh_start(tmp_path: Path, exists: bool) -> None:
    folder = tmp_path / "a" / "b"
    if exists:
        folder.mkdir(parents=True)
    assert plan_run(folder, SETTINGS) == RunPlan()
    assert plan_run(folder, SETTINGS, overwrite=True) == RunPlan()
    assert folder.exists() == exists


def test_the_same_settings_resume_from_the_last_checkpoint_and_log_it(unfinished: Path) -> None:
    before = snapshot(unfinished)
    plan = plan_run(unfinished, SETTINGS)
    assert plan == RunPlan(
        checkpoint=unfinished / "checkpoint-10", note=f"resuming the unfinished run in {unfinished} from checkpoint-10"
    )
    assert snapshot(unfinished) == before


def test_a_torn_checkpoint_is_passed_over_with_a_sentence(unfinished: Path) -> None:
    """The newest whole one is resumed from; without any, the run starts from the beginning, and says so."""
    torn = add_checkpoint(unfinished, 20, without="model.safetensors")
    plan = plan_run(unfinished, SETTINGS)
    assert plan.checkpoint == unfinished / "checkpoint-10"
    first, second = plan.note.splitlines()
    assert first == f"skipping {torn}, which is incomplete: its model.safetensors is missing"
    assert second == f"resuming the unfinished run in {unfinished} from checkpoint-10"
    for step in (5, 10):
        (unfinished / f"checkpoint-{step}" / "manifest.json").unlink()
    plan = plan_run(unfinished, SETTINGS)
    assert plan.checkpoint is None
    assert len(plan.note.splitlines()) == 4
    assert "saved no complete checkpoint: starting it from the beginning" in plan.note


def test_true_means_the_newest_complete_checkpoint(unfinished: Path, tmp_path: Path) -> None:
    """As the same command without the flag, but there must be one."""
    assert plan_run(unfinished, SETTINGS, checkpoint="true") == plan_run(unfinished, SETTINGS)
    with pytest.raises(UsageError, match=r"holds no run to resume\. Leave out resume_from_checkpoint to start"):
        plan_run(tmp_path / "new", SETTINGS, checkpoint="true")
    for step in (5, 10):
        (unfinished / f"checkpoint-{step}" / "config.json").unlink()
    with pytest.raises(UsageError, match=r"no complete checkpoint; skipping .*checkpoint-10.*config\.json is missing"):
        plan_run(unfinished, SETTINGS, checkpoint="true")


def test_a_finished_run_is_left_alone(unfinished: Path) -> None:
    finish_run(unfinished, SETTINGS)
    plan = plan_run(unfinished, SETTINGS)
    assert plan.finished
    assert plan.checkpoint is None
    assert "finished" in plan.note
    assert "--overwrite_output_dir" in plan.note


def test_a_run_killed_before_its_first_checkpoint_starts_from_the_beginning(tmp_path: Path) -> None:
    start_run(tmp_path, SETTINGS, RunPlan())
    plan = plan_run(tmp_path, SETTINGS)
    assert not plan.finished
    assert plan.checkpoint is None
    assert plan.delete == ()
    assert "saved no checkpoint: starting it from the beginning" in plan.note


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask_ratio": 0.5}, "mask_ratio 0.3 -> 0.5"),
        ({"do_eval": True}, "do_eval unset -> True"),  # holds out texts that were trained on
        ({"dataloader_drop_last": True}, "dataloader_drop_last unset -> True"),
    ],
    ids=["ratio", "evaluation", "last batch"],
)
def test_other_settings_are_refused_by_name_with_both_values(
    unfinished: Path, change: dict[str, Any], message: str, finished: bool
) -> None:
    if finished:
        finish_run(unfinished, SETTINGS)
    with pytest.raises(UsageError, match=message) as caught:
        plan_run(unfinished, SETTINGS | change)
    assert "--overwrite_output_dir" in str(caught.value)


def test_a_setting_that_is_gone_is_another_setting(unfinished: Path) -> None:
    with pytest.raises(UsageError, match=r"mask_ratio 0\.3 -> unset"):
        plan_run(unfinished, {name: value for name, value in SETTINGS.items() if name != "mask_ratio"})


@pytest.mark.parametrize(
    "name", ["logging_steps", "save_total_limit", "eval_steps", "dataloader_num_workers", "report_to", "hub_model_id"]
)
def test_settings_that_change_nothing_learnt_may_differ(unfinished: Path, name: str) -> None:
    assert plan_run(unfinished, SETTINGS | {name: 7}).checkpoint == unfinished / "checkpoint-10"


@pytest.mark.parametrize("finished", [False, True])
def test_another_length_goes_on_with_a_warning(unfinished: Path, finished: bool) -> None:
    if finished:
        finish_run(unfinished, SETTINGS)
    plan = plan_run(unfinished, SETTINGS | {"max_steps": 40})
    assert plan.checkpoint == unfinished / "checkpoint-10"
    assert "max_steps 20 -> 40" in plan.note
    assert "differs from that of a run of this length" in plan.note


@pytest.mark.parametrize(
    ("length", "message"),
    [
        ({"max_steps": 9}, "has 10 steps already, and max_steps 9 leaves none to train"),
        ({"max_steps": -1, "num_train_epochs": 2.0}, "has 2.5 epochs already, and num_train_epochs 2 leaves none"),
    ],
)
def test_a_length_that_the_checkpoint_is_beyond_is_refused(
    unfinished: Path, length: dict[str, Any], message: str
) -> None:
    """The result would be that of the longer run, under the name of a shorter one."""
    with pytest.raises(UsageError, match=message):
        plan_run(unfinished, SETTINGS | length)


def test_another_length_of_a_finished_run_without_checkpoints_is_refused(tmp_path: Path) -> None:
    # It could only start over, and delete a result that nobody asked to overwrite.
    finish_run(tmp_path, SETTINGS)
    with pytest.raises(UsageError, match=r"finished run of another length \(max_steps 20 -> 40\)"):
        plan_run(tmp_path, SETTINGS | {"max_steps": 40})


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["notes.txt", "README.md", "checkpoint-best", ".hidden"])
def test_a_directory_of_something_else_is_refused(tmp_path: Path, name: str, overwrite: bool) -> None:
    (tmp_path / name).write_text("precious")
    with pytest.raises(UsageError, match=f"something else .{name}.*another directory"):
        plan_run(tmp_path, SETTINGS, overwrite=overwrite)


@pytest.mark.parametrize("place", ["file", "file/below", "file/far/below"])
def test_a_file_is_no_directory(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"is a file, or lies under one\. Name a directory"):
        plan_run(tmp_path / place, SETTINGS)


def test_starting_over_deletes_only_what_a_run_writes(unfinished: Path) -> None:
    ours = ("model.safetensors", "model-00001-of-00002.safetensors", "metrics.json", "README.md", "tokenizer.json")
    theirs = ("notes.txt", "checkpoint-notes.md", "my.safetensors", "tokenizer_notes.json", ".gitignore", "README.txt")
    for name in ours + theirs:
        (unfinished / name).write_text(name)
    (unfinished / "jepa").mkdir()
    (unfinished / "jepa" / "config.json").touch()
    outside = unfinished.parent / "runs"
    outside.mkdir()
    (outside / "kept").touch()
    (unfinished / "runs").symlink_to(outside)

    plan = plan_run(unfinished, SETTINGS | {"mask_ratio": 0.5}, overwrite=True)
    assert "starting over" in plan.note
    assert (unfinished / "checkpoint-10").exists()  # a plan is only a plan
    start_run(unfinished, SETTINGS | {"mask_ratio": 0.5}, plan)
    assert {path.name for path in unfinished.iterdir()} == {RUN_FILE, *theirs}
    assert (outside / "kept").exists()  # a link is deleted, not what it leads to
    assert json.loads((unfinished / RUN_FILE).read_text())["settings"]["mask_ratio"] == 0.5


def test_what_a_killed_start_left_counts_as_nothing(tmp_path: Path) -> None:
    """A process that died while it wrote its first file did not make the directory somebody's."""
    (tmp_path / f"_{Path(RUN_FILE).stem}.new.json").write_text("{")
    assert plan_run(tmp_path, SETTINGS) == RunPlan()
    start_run(tmp_path, SETTINGS, RunPlan())
    assert {path.name for path in tmp_path.iterdir()} == {RUN_FILE}


@pytest.mark.parametrize("deleted", range(5))
def test_starting_over_may_be_killed_too(unfinished: Path, deleted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """After any deletion: no run goes on in what is left, and starting over starts over."""
    for name in ("_final.new", "jepa"):
        (unfinished / name).mkdir()
    other = SETTINGS | {"mask_ratio": 0.5}
    plan = plan_run(unfinished, other, overwrite=True)
    assert {entry.name for entry in plan.delete} == {RUN_FILE, "checkpoint-5", "checkpoint-10", "_final.new", "jepa"}
    left = iter(range(deleted))

    def remove_until_killed(path: Path) -> None:
        if next(left, None) is None:
            raise SimulatedKill
        remove_path(path)

    with monkeypatch.context() as patch:
        patch.setattr(run_directory, "remove_path", remove_until_killed)
        if deleted < 4:
            with pytest.raises(SimulatedKill):
                start_run(unfinished, other, plan)
            for settings in (SETTINGS, other):
                with pytest.raises(UsageError, match="--overwrite_output_dir"):
                    plan_run(unfinished, settings)
    start_run(unfinished, other, plan_run(unfinished, other, overwrite=True))
    assert {path.name for path in unfinished.iterdir()} == {RUN_FILE}


def test_a_named_checkpoint_is_resumed_from(unfinished: Path, tmp_path: Path) -> None:
    named = unfinished / "checkpoint-5"
    for folder in (unfinished, tmp_path / "elsewhere"):
        plan = plan_run(folder, SETTINGS, checkpoint=str(named))
        assert plan == RunPlan(checkpoint=named, note=f"resuming from {named}")


def test_a_named_checkpoint_makes_a_directory_without_run_file_ours(tmp_path: Path) -> None:
    # As a run composed in Python leaves it, or one copied without files that begin with an underscore.
    named = add_checkpoint(tmp_path, 5)
    assert plan_run(tmp_path, SETTINGS, checkpoint=str(named)).checkpoint == named
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UsageError, match=r"something else .notes\.txt"):
        plan_run(tmp_path, SETTINGS, checkpoint=str(named))


@pytest.mark.parametrize("missing", ["config.json", "trainer_state.json"])
def test_what_is_no_checkpoint_is_not_resumed_from(tmp_path: Path, missing: str) -> None:
    named = add_checkpoint(tmp_path, 5, without=missing)
    add_checkpoint(tmp_path, 3)
    with pytest.raises(UsageError, match=rf"{missing}.*Use the newest complete one, checkpoint-3"):
        plan_run(tmp_path / "out", SETTINGS, checkpoint=str(named))


def test_resuming_and_starting_over_exclude_each_other(unfinished: Path) -> None:
    with pytest.raises(UsageError, match="exclude each other"):
        plan_run(unfinished, SETTINGS, overwrite=True, checkpoint=str(unfinished / "checkpoint-5"))


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"settings": 3, "finished": true}', '{"settings": {}}'])
def test_a_damaged_run_file_is_reported_and_can_be_overwritten(unfinished: Path, content: str) -> None:
    (unfinished / RUN_FILE).write_text(content)
    with pytest.raises(UsageError, match=r"_run\.json is damaged.*--overwrite_output_dir"):
        plan_run(unfinished, SETTINGS)
    assert unfinished / RUN_FILE in plan_run(unfinished, SETTINGS, overwrite=True).delete


def test_a_run_file_is_replaced_atomically(tmp_path: Path) -> None:
    data = {"rows": 3, "fingerprint": "0123"}
    start_run(tmp_path, SETTINGS, RunPlan(), data)
    expected = {"finished": False, "stopped_early": False, "settings": SETTINGS, "versions": versions(), "data": data}
    assert read_run(tmp_path) == expected
    finish_run(tmp_path, SETTINGS, data)
    assert read_run(tmp_path) == expected | {"finished": True}
    assert [path.name for path in tmp_path.iterdir()] == [RUN_FILE]


# ---- real runs


class Stop(TrainerCallback):
    """Ends the process, as far as a test can, after a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == self.step:
            raise SimulatedKill


@pytest.mark.parametrize("killed_at", [1, 5])
@pytest.mark.parametrize("start", ["pretrained", "random"])
@pytest.mark.slow
def test_the_same_command_after_a_kill_ends_as_if_undisturbed(
    start: str, killed_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_lines(tmp_path / "data.txt", CORPUS)
    if start == "pretrained":
        model = ["--model_name_or_path", save_tiny_encoder("bert", tmp_path / "bert")]
    else:  # its tokenizer, trained when the run began, is part of the run
        sizes = "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64"
        model = ["--model_type", "bert", "--config_overrides", sizes, "--tokenizer_vocab_size", "300"]
    command = [*model, "--train_file", data, "--max_steps", "6", "--save_steps", "2", "--learning_rate", "1e-3"]
    command += ["--per_device_train_batch_size", "2", "--logging_steps", "1", "--max_seq_length", "32"]
    train(*command, "--output_dir", tmp_path / "undisturbed")

    def stopped(*args: Any, **kwargs: Any) -> JepaTrainer:
        return JepaTrainer(*args, **kwargs | {"callbacks": [Stop(killed_at)]})

    killed = tmp_path / "killed"
    with monkeypatch.context() as patch, pytest.raises(SimulatedKill):
        patch.setattr(train_module, "JepaTrainer", stopped)
        train(*command, "--output_dir", killed)
    assert not (killed / "jepa").exists()
    output = train(*command, "--output_dir", killed)
    if killed_at == 1:
        assert "starting it from the beginning" in output
    else:
        assert f"resuming the unfinished run in {killed} from checkpoint-4" in output
    assert_same_weights(killed / "jepa", tmp_path / "undisturbed" / "jepa")
    assert_same_weights(killed, tmp_path / "undisturbed")

    before = snapshot(killed)
    output = train(*command, "--output_dir", killed)
    assert output == f"The run in {killed} is finished. Start over with --overwrite_output_dir.\n"
    assert snapshot(killed) == before


def test_the_life_of_a_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = write_lines(tmp_path / "data.txt", CORPUS), tmp_path / "out"
    command = ["--model_name_or_path", save_tiny_encoder("bert", tmp_path / "bert"), "--train_file", data]
    command += ["--output_dir", out, "--learning_rate", "1e-3", "--save_steps", "2"]
    train(*command, "--max_steps", "2")
    (out / "notes.txt").write_text("precious")

    output = train(*command, "--max_steps", "4")
    assert "from checkpoint-2 with another length (max_steps 2 -> 4)" in output
    assert json.loads((out / "metrics.json").read_text())["history"][-1]["step"] == 4

    before = snapshot(out)
    assert main([*map(str, command), "--max_steps", "3"]) == 2
    assert "has 4 steps already, and max_steps 3 leaves none to train" in capsys.readouterr().err
    assert main([*map(str, command), "--max_steps", "4", "--mask_ratio", "0.5"]) == 2
    assert "mask_ratio unset -> 0.5" in capsys.readouterr().err
    assert snapshot(out) == before

    output = train(*command, "--max_steps", "2", "--mask_ratio", "0.5", "--overwrite_output_dir")
    assert f"starting over in {out}" in output
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-2"}
    assert (out / "notes.txt").read_text() == "precious"

    elsewhere = tmp_path / "elsewhere"
    given = out / "checkpoint-2"
    output = train(
        *[elsewhere if part == out else part for part in command],
        *("--max_steps", "3", "--mask_ratio", "0.5", "--resume_from_checkpoint", given),
    )
    assert f"resuming from {given}" in output
    assert json.loads((elsewhere / "metrics.json").read_text())["history"][-1]["step"] == 3


def test_an_evaluation_does_not_pass_off_an_unfinished_runs_start_as_its_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["--model_name_or_path", save_tiny_encoder("bert", tmp_path / "bert"), "--use_cpu"]
    command += ["--train_file", str(write_lines(tmp_path / "data.txt", CORPUS)), "--output_dir", str(out)]
    train(*command, "--do_train", "--do_eval", "--max_steps", "2", "--save_steps", "1")
    run = json.loads((out / RUN_FILE).read_text())
    (out / RUN_FILE).write_text(json.dumps({**run, "finished": False}))
    before = snapshot(out)
    assert main([*command, "--do_eval", "--max_steps", "2"]) == 2
    assert "Name it as --model_name_or_path" in capsys.readouterr().err
    assert snapshot(out) == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("left", ["jepa", "checkpoint-1"])
def test_an_evaluation_leaves_a_trained_result_alone(
    trained: Path, tmp_path: Path, left: str, overwrite: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--do_eval` alone deleted it with --overwrite_output_dir, and else replaced the record of a stopped run."""
    out = tmp_path / "out"
    out.mkdir()
    shutil.copytree(trained / "out" / left, out / left)
    finish_run(out, SETTINGS, stopped_early=True)
    before = snapshot(out)
    command = ["--model_name_or_path", str(trained / "bert"), "--train_file", str(trained / "data.txt"), "--do_eval"]
    flags = ["--overwrite_output_dir"] if overwrite else []
    assert main([*command, "--output_dir", str(out), *flags, *QUIET]) == 2
    assert f"--do_eval alone does not evaluate {out / left}. Name it as" in capsys.readouterr().err
    files = {"train_file": trained / "data.txt", "output_dir": out}
    with pytest.raises(UsageError, match="does not evaluate"):
        pretrain(trained / "bert", **files, do_eval=True, overwrite_output_dir=overwrite, use_cpu=True)
    assert snapshot(out) == before


def test_an_evaluation_may_be_repeated(trained: Path, tmp_path: Path) -> None:
    """In its own directory, which holds nothing trained; --overwrite_output_dir replaces its files."""
    command = ["--model_name_or_path", trained / "out", "--train_file", trained / "data.txt", "--do_eval"]
    for flags in ([], [], ["--overwrite_output_dir"]):
        assert "nothing was trained" in train(*command, "--output_dir", tmp_path / "evaluated", *flags)


def test_a_resume_says_that_the_watchdog_stopped_the_run(unfinished: Path) -> None:
    """The same settings lead to the same collapse, so the message names the way out."""
    finish_run(unfinished, SETTINGS, stopped_early=True)
    assert read_run(unfinished) | {"versions": {}} == {
        "settings": SETTINGS, "finished": False, "stopped_early": True, "versions": {}, "data": None,
    }  # fmt: skip
    plan = plan_run(unfinished, SETTINGS)
    assert plan.checkpoint == unfinished / "checkpoint-10"
    assert "Its watchdog stopped it (--stop_on_collapse)" in plan.note
    assert "--overwrite_output_dir" in plan.note
    start_run(unfinished, SETTINGS, plan)
    assert "watchdog" not in plan_run(unfinished, SETTINGS).note
