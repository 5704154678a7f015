"""Claims about `pretrain`: arguments next to the flags, and the returned trainer."""

import logging
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TrainerCallback

import jepa_hf
from helpers import llm
from helpers.cli import assert_same_weights
from helpers.runs import RunAtStep
from helpers.tiny_models import CORPUS, save_tiny_encoder, write_lines
from jepa_hf import JepaForRepresentationPrediction, JepaTrainer, JepaTrainingArguments, UsageError, pretrain
from jepa_hf.errors import RunError
from jepa_hf.evaluation.embedder import Embedder
from jepa_hf.training.checkpoints import latest_valid_checkpoint
from jepa_hf.training.run_directory import read_run

FAST: dict[str, Any] = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "max_seq_length": 32,
    "save_strategy": "no",
    "health_steps": 0,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
}
TEXT = CORPUS[:24]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bert`, a tiny encoder, and `data.txt`, text to train on."""
    folder = tmp_path_factory.mktemp("start")
    save_tiny_encoder("bert", folder / "bert")
    write_lines(folder / "data.txt", TEXT)
    return folder


class Texts(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return len(TEXT)

    def __getitem__(self, index: int) -> dict[str, str]:
        return {"text": TEXT[index]}


DATA: dict[str, Any] = {
    "dataset": datasets.Dataset.from_dict({"text": TEXT}),
    "another column": datasets.Dataset.from_dict({"sentence": TEXT, "label": [0] * len(TEXT)}),
    "strings": TEXT,
    "rows": [{"text": text} for text in TEXT],
    "dataframe": pd.DataFrame({"text": TEXT}, index=range(7, 7 + len(TEXT))),
    "torch": Texts(),
    "stream": datasets.Dataset.from_dict({"text": TEXT}).to_iterable_dataset(),
}


@pytest.mark.parametrize(
    "form",
    [form if form in ("torch", "dataframe", "stream") else pytest.param(form, marks=pytest.mark.slow) for form in DATA],
)
def test_a_data_set_trains_as_its_file_does(form: str, folder: Path, tmp_path: Path) -> None:
    """The same weights, bit for bit; the rows of a stream are not shuffled, so there it only trains."""
    run = pretrain(folder / "bert", train_dataset=DATA[form], output_dir=tmp_path / "a", **FAST)
    assert run.state.global_step == 2
    if form != "stream":
        pretrain(folder / "bert", train_file=folder / "data.txt", output_dir=tmp_path / "b", **FAST)
        assert_same_weights(tmp_path / "a", tmp_path / "b")
    assert "data set passed from Python" in (tmp_path / "a" / "README.md").read_text()


def test_an_eval_dataset_is_evaluated(folder: Path, tmp_path: Path) -> None:
    run = pretrain(folder / "bert", train_dataset=TEXT, eval_dataset=TEXT[:8], output_dir=tmp_path, **FAST)
    assert len(run.train_dataset) == len(TEXT)
    assert len(run.eval_dataset) == 8
    assert any("eval_loss" in entry for entry in run.state.log_history)


def test_vectors_and_pairs_are_passed_too(tmp_path: Path) -> None:
    """Features as a DataFrame; conversations to LLM-JEPA."""
    features = pd.DataFrame(np.random.default_rng(0).normal(size=(24, 6)), columns=list("abcdef"))
    flags: dict[str, Any] = FAST | {"max_seq_length": None}
    overrides = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    run = pretrain(
        objective="features", train_dataset=features, config_overrides=overrides, output_dir=tmp_path / "f", **flags
    )
    assert run.model.config.encoder_config.hidden_size == 16
    assert run.model.config.encoder_config.feature_column_names == list("abcdef")
    pairs = [{"text": f"turn {word} into code", "code": f"code({word})"} for word in " ".join(TEXT).split()[:24]]
    overrides |= {"intermediate_size": 16, "num_key_value_heads": 2, "max_position_embeddings": 64}
    del flags["health_steps"]
    run = pretrain(
        objective="llm",
        model_type="llama",
        tokenizer_vocab_size=300,
        config_overrides=overrides,
        train_dataset=datasets.Dataset.from_list(pairs),
        output_dir=tmp_path / "l",
        **flags,
    )
    assert run.state.global_step == 2


def test_a_recipe_callbacks_and_lists_of_files(folder: Path, tmp_path: Path) -> None:
    """Arguments override the recipe, and add to its dictionaries."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model_type: bert\nconfig_overrides: hidden_size=32,num_hidden_layers=1,num_attention_heads=2\n"
        "learning_rate: 1e-3\nmax_steps: 100\ntokenizer_vocab_size: 300\n"
    )
    steps = []
    run = pretrain(
        config=recipe,
        train_file=[folder / "data.txt", write_lines(tmp_path / "more.txt", CORPUS[30:40])],
        config_overrides={"num_hidden_layers": 2},
        callbacks=[RunAtStep(on_step_end=lambda model, state: steps.append(state.global_step))],
        output_dir=tmp_path / "out",
        **FAST,
    )
    assert run.args.learning_rate == 1e-3
    assert len(run.train_dataset) == len(TEXT) + 10
    encoder = run.model.config.encoder_config
    assert (encoder.hidden_size, encoder.num_hidden_layers) == (32, 2)
    assert steps == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_file": DATA["dataset"]}, "train_file takes paths, not a Dataset. Pass a data set as train_dataset"),
        ({"validation_file": TEXT[0:0], "eval_dataset": TEXT}, "eval_dataset needs train_dataset"),
        ({"train_dataset": TEXT, "train_file": "a.txt"}, "train_dataset and train_file exclude each other"),
        ({"train_dataset": datasets.DatasetDict(train=DATA["dataset"])}, "one data set, not a DatasetDict of 'train'"),
        ({"train_dataset": "data.txt"}, "must be a data set or a list of rows, not a str"),
        ({"train_dataset": TEXT, "eval_dataset": {"a": TEXT}}, "eval_dataset must be one data set"),
        ({"train_dataset": datasets.Dataset.from_dict({"text": [1, 2, 3]})}, "holds int64, not strings"),
        ({"train_dataset": TEXT, "do_train": False}, "do_train is false, and nothing is to be evaluated"),
        ({"train_dataset": TEXT, "max_steps": -5}, "max_steps must be at least 1, not -5"),
        (
            {"train_dataset": TEXT[:3], "dataloader_drop_last": True},
            "The training data has 3 rows, fewer than a batch of 4",
        ),
        ({"train_dataset": TEXT, "config": "none.yaml"}, "Config file 'none.yaml' does not exist"),
    ],
)
def test_a_mistake_is_a_sentence_before_anything_is_written(
    arguments: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        pretrain(folder / "bert", output_dir=tmp_path / "out", **(FAST | arguments))
    assert list((tmp_path / "out").glob("*")) == []


def random_encoder(folder: Path) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(folder / "bert")
    config.name_or_path = ""
    return AutoModel.from_config(config)


@pytest.mark.parametrize("kind", ["encoder", "random encoder", "jepa", "llm"])
def test_a_model_object_starts_a_run_as_its_directory_does(kind: str, folder: Path, tmp_path: Path) -> None:
    """With a copy of its weights, which a repeated call finds finished; nothing names the temporary directory."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "bert")
    flags: dict[str, Any] = FAST | {"train_dataset": TEXT, "output_dir": tmp_path / "object"}
    start = folder / "bert"
    if kind == "jepa":
        start = tmp_path / "jepa"
        JepaForRepresentationPrediction.from_encoder_pretrained(str(folder / "bert")).save_pretrained(start)
        tokenizer.save_pretrained(start)
        model: Any = JepaForRepresentationPrediction.from_pretrained(start)
    elif kind == "llm":
        start, tokenizer = tmp_path / "llm", llm.tokenizer()
        tokenizer.save_pretrained(start)
        llm.model(len(tokenizer)).save_pretrained(start)
        model = AutoModelForCausalLM.from_pretrained(start)
        flags = {name: value for name, value in flags.items() if name != "health_steps"}
        flags |= {"objective": "llm", "train_dataset": [{"text": "a b", "code": "c d"}] * 8}
    else:
        model = AutoModel.from_pretrained(start) if kind == "encoder" else random_encoder(folder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = pretrain(model, processing_class=tokenizer, **flags)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    named = pretrain(start, **flags | {"output_dir": tmp_path / "name"})
    if kind == "random encoder":
        assert not trainer.ema_callback.pretrained
    else:
        assert_same_weights(tmp_path / "object", tmp_path / "name")
        assert trainer.model.config.name_or_path == named.model.config.name_or_path
    for name in ("_run.json", "README.md", "config.json"):
        assert str(Path(tempfile.gettempdir()) / "tmp") not in (tmp_path / "object" / name).read_text()
    written = (tmp_path / "object" / "metrics.json").stat().st_mtime_ns
    pretrain(model, processing_class=tokenizer, **flags)
    assert (tmp_path / "object" / "metrics.json").stat().st_mtime_ns == written


def test_a_model_object_needs_a_tokenizer_and_a_name_does_not(folder: Path) -> None:
    model = random_encoder(folder)
    with pytest.raises(UsageError, match=r"BertModel comes without a tokenizer\. Pass it as processing_class"):
        pretrain(model, train_dataset=TEXT)
    with pytest.raises(UsageError, match="not a Linear"):
        pretrain(torch.nn.Linear(2, 2), train_dataset=TEXT)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="processing_class is for a model object"):
        pretrain("bert", processing_class=AutoTokenizer.from_pretrained(folder / "bert"), train_dataset=TEXT)


@pytest.mark.parametrize("verbosity", [logging.WARNING, logging.INFO])
def test_the_bars_of_datasets_are_hidden_unless_its_verbosity_is_set(
    verbosity: int, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before, were_disabled = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(verbosity)
    datasets.enable_progress_bars()
    try:
        pretrain(folder / "bert", train_dataset=["other texts", *TEXT], output_dir=tmp_path, **FAST)
        assert not datasets.are_progress_bars_disabled()
    finally:
        datasets.logging.set_verbosity(before)
        if were_disabled:
            datasets.disable_progress_bars()
    assert ("Tokenizing: " in capfd.readouterr().err) == (verbosity == logging.INFO)


def test_the_bars_of_weights_are_hidden_and_the_setting_is_kept(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Those of `pretrain`, a trainer and an embedder; downloads keep theirs."""
    transformers.logging.enable_progress_bar()
    try:
        pretrain(folder / "bert", train_dataset=TEXT, output_dir=tmp_path / "out", **FAST)
        JepaTrainer(
            folder / "bert", JepaTrainingArguments(str(tmp_path / "other"), report_to="none"), train_dataset=TEXT
        )
        Embedder.from_pretrained(tmp_path / "out")
        Embedder.from_pretrained(tmp_path / "out" / "jepa")
        assert transformers.logging.is_progress_bar_enabled()
        assert not huggingface_hub.utils.are_progress_bars_disabled()
        assert "Loading weights" not in capfd.readouterr().err
        AutoModel.from_pretrained(tmp_path / "out")
        assert "Loading weights" in capfd.readouterr().err  # otherwise the above would prove nothing
    finally:
        transformers.logging.disable_progress_bar()


# ---- what is returned


def test_a_finished_run_is_returned_with_its_model_and_state(folder: Path, tmp_path: Path) -> None:
    """Nothing is trained or written; other rows in the same place are refused."""
    flags: dict[str, Any] = FAST | {"logging_steps": 1, "output_dir": tmp_path, "health_steps": 1}
    first = pretrain(folder / "bert", train_dataset=TEXT, **flags)
    written = (tmp_path / "metrics.json").stat().st_mtime_ns
    again = pretrain(folder / "bert", train_dataset=TEXT, **flags)
    assert (tmp_path / "metrics.json").stat().st_mtime_ns == written
    assert again.state.global_step == 2
    assert again.state.log_history == first.state.log_history
    assert again.health_findings == first.health_findings
    assert all(value.equal(again.model.state_dict()[name]) for name, value in first.model.state_dict().items())
    with pytest.raises(UsageError, match=r"training data has changed since the run was started .24 rows then, 20 rows"):
        pretrain(folder / "bert", train_dataset=TEXT[:20], **flags)


@pytest.mark.slow
def test_a_finished_language_model_is_returned_too(tmp_path: Path) -> None:
    flags: dict[str, Any] = {"objective": "llm", "smoke_test": True, "output_dir": tmp_path, "max_steps": 1}
    flags |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True}
    first, again = pretrain(**flags), pretrain(**flags)
    assert again.state.global_step == 1
    assert all(value.equal(again.model.state_dict()[name]) for name, value in first.model.state_dict().items())


def test_ctrl_c_saves_a_checkpoint_and_the_same_call_continues(folder: Path, tmp_path: Path) -> None:
    def interrupt(model: Any, state: Any) -> None:
        if state.global_step == 0:
            os.kill(os.getpid(), signal.SIGINT)

    callback: TrainerCallback = RunAtStep(on_step_begin=interrupt)
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background process ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            pretrain(folder / "bert", train_dataset=TEXT, output_dir=tmp_path, callbacks=[callback], **FAST)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert latest_valid_checkpoint(tmp_path)[0] == tmp_path / "checkpoint-1"
    assert read_run(tmp_path)["finished"] is False
    run = pretrain(folder / "bert", train_dataset=TEXT, output_dir=tmp_path, **FAST)
    assert run.resumed
    assert run.state.global_step == 2
    assert read_run(tmp_path)["finished"] is True


def test_a_run_that_learns_nothing_leaves_no_result(folder: Path, tmp_path: Path) -> None:
    """Rows of one token have no target: no card, no encoder, not finished."""
    with pytest.raises((RunError, UsageError), match="target"):
        pretrain(folder / "bert", train_dataset=["a"] * 24, output_dir=tmp_path, **FAST)
    assert not (tmp_path / "README.md").exists()
    assert not (tmp_path / "model.safetensors").exists()
    assert not (tmp_path / "_run.json").exists() or not read_run(tmp_path)["finished"]


def test_other_data_under_an_unfinished_run_is_refused(folder: Path, tmp_path: Path) -> None:
    """Whether it is resumed by the same call or by the name of its checkpoint, also from another directory."""
    data, flags = tmp_path / "data.txt", FAST | {"save_strategy": "steps", "save_steps": 1}

    def stop(model: Any, state: Any) -> None:
        raise SystemExit

    write_lines(data, TEXT)
    with pytest.raises(SystemExit):
        pretrain(
            folder / "bert",
            train_file=data,
            output_dir=tmp_path / "out",
            callbacks=[RunAtStep(on_save=stop)],
            **flags,
        )
    write_lines(data, [*TEXT, *CORPUS[30:40]])
    checkpoint = str(tmp_path / "out" / "checkpoint-1")
    for where in (
        {"output_dir": tmp_path / "out"},
        {"output_dir": tmp_path / "b", "resume_from_checkpoint": checkpoint},
    ):
        with pytest.raises(UsageError, match=r"has changed .*24 rows then, 34 rows"):
            pretrain(folder / "bert", train_file=data, **where, **flags)
    with pytest.raises(UsageError, match=r"checkpoint-1' is of a run with other settings \(mask_ratio unset -> 0\.5"):
        pretrain(folder / "bert", train_file=data, mask_ratio=0.5, **where, **flags)
    write_lines(data, TEXT)
    assert pretrain(folder / "bert", train_file=data, output_dir=tmp_path / "out", **flags).resumed


def test_the_trainer_by_hand_leaves_the_files_of_the_command(folder: Path, tmp_path: Path) -> None:
    """But for `_run.json`, which the settings of the command are in."""
    run = jepa_hf.JepaTrainer(
        str(folder / "bert"),
        jepa_hf.JepaTrainingArguments(
            output_dir=str(tmp_path / "hand"), **{name: FAST[name] for name in FAST if name != "max_seq_length"}
        ),
        train_dataset=TEXT,
    )
    run.train()
    run.save_model()
    pretrain(folder / "bert", train_dataset=TEXT, output_dir=tmp_path / "command", **FAST)
    by_hand, by_command = ({path.name for path in (tmp_path / name).iterdir()} for name in ("hand", "command"))
    assert by_command - by_hand == {"_run.json"}
    assert by_hand <= by_command
