"""Claims about `run_jepa.py`: what a run leaves on disk, which flags reach where, that its doors lead to one run."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, pipeline

import jepa_hf
from helpers.cli import QUIET, REPOSITORY, assert_same_weights, start_process, train, weights
from helpers.processes import forked_python
from helpers.tiny_models import CORPUS, FAMILIES, save_tiny_encoder, write_lines
from jepa_hf import JepaForRepresentationPrediction
from jepa_hf.cli.main import main as jepa_hf_main
from jepa_hf.cli.train import main
from jepa_hf.data.tokenizer_training import train_wordpiece_tokenizer

FAST = ["--max_steps", "2", "--learning_rate", "1e-3", "--save_strategy", "no", "--per_device_train_batch_size", "4"]
# Sizes for a random start, in the words of each family's configuration.
SIZES = {
    **dict.fromkeys(FAMILIES, "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64"),
    "distilbert": "dim=32,n_layers=2,n_heads=2,hidden_dim=64",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bert`, a tiny encoder, and `data.txt`, text to train on."""
    folder = tmp_path_factory.mktemp("start")
    save_tiny_encoder("bert", folder / "bert")
    write_lines(folder / "data.txt", CORPUS)
    return folder


@pytest.fixture(scope="module")
def start(folder: Path) -> list[str]:
    return ["--model_name_or_path", str(folder / "bert"), "--train_file", str(folder / "data.txt"), *FAST]


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> tuple[Path, str]:
    """A run with evaluation and a checkpoint, started where its files are, and what it said."""
    flags = "--train_file data.txt --output_dir whole --max_steps 4 --save_steps 2 --do_eval --eval_on_start"
    here = Path.cwd()
    os.chdir(folder)
    try:
        flags += " --logging_steps 1 --learning_rate 1e-3"
        output = train("--model_name_or_path", "bert", *flags.split(), pictures=True)
    finally:
        os.chdir(here)
    return folder / "whole", output


def metrics(out: Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads((out / "metrics.json").read_text(encoding="utf-8"), parse_constant=refuse)


def moved(out: Path) -> bool:
    """Whether the context encoder left the target encoder behind: a sign of training."""
    full = weights(out / "jepa")
    pairs = [(value, full[f"target{name[7:]}"]) for name, value in full.items() if name.startswith("context_encoder")]
    return any(not one.equal(other) for one, other in pairs)


# ---- what a run leaves on disk


def test_a_run_leaves_the_layout_of_the_architecture_page(undisturbed: tuple[Path, str]) -> None:
    out, _ = undisturbed
    files = {path.name for path in out.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "modules.json", "1_Pooling"} <= files
    assert {"README.md", "metrics.json", "training.png", "jepa", "checkpoint-2", "checkpoint-4", "_run.json"} <= files
    for name in ("optimizer.pt", "trainer_state.json", "model.safetensors", "config.json"):
        assert (out / "checkpoint-4" / name).is_file()
    assert not list(out.rglob("training_args.bin"))
    assert (out / "training.png").read_bytes().startswith(b"\x89PNG")
    assert imread(out / "training.png").std() > 0.05
    assert metrics(out)["train"]["train_loss"] > 0
    assert metrics(out)["eval"]["eval_loss"] > 0
    assert [entry["step"] for entry in metrics(out)["history"] if "loss" in entry] == [1, 2, 3, 4]
    assert moved(out)


def test_the_encoder_loads_in_four_ways(undisturbed: tuple[Path, str]) -> None:
    out, _ = undisturbed
    tokens = AutoTokenizer.from_pretrained(out)(CORPUS[3], return_tensors="pt")
    encoder, info = AutoModel.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        states = encoder.eval()(**tokens).last_hidden_state[0]
    classifier = AutoModelForSequenceClassification.from_pretrained(out, num_labels=3)
    assert classifier(**tokens).logits.shape == (1, 3)
    features = pipeline("feature-extraction", model=str(out), device="cpu")(CORPUS[3])
    torch.testing.assert_close(torch.tensor(features[0]), states, rtol=1e-4, atol=1e-5)
    from sentence_transformers import SentenceTransformer  # takes seconds

    embedding = torch.tensor(SentenceTransformer(str(out), device="cpu").encode(CORPUS[3]))
    torch.testing.assert_close(embedding, states.mean(dim=0), rtol=1e-4, atol=1e-5)


def test_the_full_model_is_saved_too(undisturbed: tuple[Path, str]) -> None:
    out, _ = undisturbed
    model = AutoModel.from_pretrained(out / "jepa")
    assert isinstance(model, JepaForRepresentationPrediction)
    exported = dict(AutoModel.from_pretrained(out).named_parameters())
    assert all(value.equal(exported[name]) for name, value in model.get_encoder("target").named_parameters())


def test_a_run_ends_by_saying_where_all_is_and_how_to_load_it(
    undisturbed: tuple[Path, str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, output = undisturbed
    assert re.search(r"bert encoder, \d+ K parameters, pretrained start; mlp predictor", output)
    for name in ("README.md", "metrics.json", "training.png", "whole/jepa"):
        assert name in output
    # The last two lines are Python that works as it stands.
    monkeypatch.chdir(folder)
    scope: dict[str, Any] = {}
    exec("\n".join(output.strip().splitlines()[-2:]), scope)
    assert scope["encoder"].config.model_type == "bert"
    assert scope["tokenizer"].mask_token == "[MASK]"


@pytest.mark.parametrize("which", [None, "context", "both"])
def test_the_exported_encoder(which: str | None, start: list[str], tmp_path: Path) -> None:
    """By default the target encoder, because the start is pretrained; the card says which."""
    train(*start, "--output_dir", tmp_path, *(["--export_encoder", which] if which else []))
    full = weights(tmp_path / "jepa")
    for name, value in weights(tmp_path).items():
        assert value.equal(full[f"{'context' if which else 'target'}_encoder.{name}"])
    if which == "both":
        for name, value in weights(tmp_path / "target_encoder").items():
            assert value.equal(full[f"target_encoder.{name}"])
    card = (tmp_path / "README.md").read_text()
    assert f"| exported encoder | {which or 'target (EMA: '}" in card
    assert moved(tmp_path)


def test_a_directory_may_have_a_name_that_no_repository_has(start: list[str], tmp_path: Path) -> None:
    """The same command twice: the second one finds the finished run."""
    command = [*start, "--output_dir", tmp_path / "my run ü"]
    train(*command)
    assert "finished" in train(*command)


# ---- one run through several doors


@pytest.mark.slow
def test_file_flags_and_python_give_the_same_run(start: list[str], tmp_path: Path) -> None:
    given = {name.removeprefix("--"): value for name, value in zip(start[::2], start[1::2], strict=True)}
    flags = {"mask_ratio": 0.4, "predictor_type": "mlp", "masked_tokens": "mask_token", "mlm_weight": 0.5}
    as_flags = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    train(*start, *as_flags, "--output_dir", tmp_path / "flags")

    lines = [f"{name}: {value}" for name, value in {**given, **flags, "mask_ratio": 0.9}.items()]
    recipe = write_lines(tmp_path / "recipe.yaml", lines)
    train(recipe, "--mask_ratio", "0.4", "--output_dir", tmp_path / "yaml")

    numbers = {"max_steps": 2, "learning_rate": 1e-3, "per_device_train_batch_size": 4}
    del given["model_name_or_path"]
    trainer = jepa_hf.pretrain(
        start[1],
        **{**given, **numbers, **flags},
        output_dir=str(tmp_path / "python"),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    assert trainer.state.global_step == 2
    for other in ("yaml", "python"):
        assert_same_weights(tmp_path / "flags" / "jepa", tmp_path / other / "jepa")
    assert moved(tmp_path / "flags")


@pytest.mark.slow
def test_the_script_and_the_console_command_give_the_same_run(start: list[str], tmp_path: Path) -> None:
    command = (REPOSITORY / "run_jepa.py", *start, *QUIET, "--output_dir", "script")
    result = start_process(*command, cwd=tmp_path, fresh=True)  # imports warn of nothing either
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert "Warning" not in result.stderr
    assert jepa_hf_main(["train", *start, *QUIET, "--output_dir", str(tmp_path / "command")]) == 0
    assert_same_weights(tmp_path / "script" / "jepa", tmp_path / "command" / "jepa")


def test_python_gets_the_command_s_finished_run_and_an_error_for_bad_input(start: list[str], tmp_path: Path) -> None:
    train(*start, "--output_dir", tmp_path)
    flags = {"train_file": start[3], "max_steps": 2, "learning_rate": 1e-3, "save_strategy": "no"}
    flags |= {"per_device_train_batch_size": 4, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    assert jepa_hf.pretrain(start[1], output_dir=str(tmp_path), **flags).state.global_step == 2
    with pytest.raises(jepa_hf.UsageError, match="mask_ratio"):
        jepa_hf.pretrain(start[1], output_dir=str(tmp_path / "new"), mask_ratio=2.0, **flags)
    assert not (tmp_path / "new").exists()


ACCELERATE = REPOSITORY / "configs" / "accelerate" / "cpu2.yaml"


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.skipif(not ACCELERATE.exists(), reason="configs/accelerate/cpu2.yaml is not there")
def test_an_accelerate_config_starts_two_ranks_which_complain_once(
    start: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY), prepend=os.pathsep)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    command = ["train", "--accelerate_config", str(ACCELERATE), *start, *QUIET, "--output_dir", str(tmp_path / "out")]
    capfd.readouterr()
    with forked_python():
        code, output = jepa_hf_main(command), capfd.readouterr()
    assert code == 0, output.err
    # Four samples on each of two ranks.
    assert "| samples per step | 8 |" in (tmp_path / "out" / "README.md").read_text()
    assert output.out.count("bert encoder") == 1
    with forked_python():
        code, output = jepa_hf_main([*command, "--mask_ratio", "2", "--overwrite_output_dir"]), capfd.readouterr()
    assert code != 0
    assert (output.out + output.err).count("mask_ratio must lie strictly between 0 and 1") == 1


# ---- starts


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_starts_at_random_with_a_tokenizer_trained_on_the_spot(
    family: str, folder: Path, tmp_path: Path
) -> None:
    output = train(
        *("--model_type", family, "--config_overrides", SIZES[family], "--tokenizer_vocab_size", "400"),
        *("--train_file", folder / "data.txt", "--output_dir", tmp_path, "--max_seq_length", "32"),
        *("--mlm_weight", "0.1", *FAST),
    )
    assert f"{family} encoder" in output
    assert "random start" in output
    assert f"masked positions {'replaced' if family == 'deberta-v2' else 'dropped'}" in output
    encoder, tokenizer = AutoModel.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert encoder.config.vocab_size == len(tokenizer) <= 400
    assert (encoder.config.hidden_size, encoder.config.num_hidden_layers) == (32, 2)
    for name in ("pad", "cls", "sep", "bos", "eos"):
        number = getattr(encoder.config, f"{name}_token_id", None)
        assert number is None or number == getattr(tokenizer, f"{name}_token_id"), name
    # A padding id of the tokenizer's own, or else the row of a word would stay at zero.
    assert encoder.get_input_embeddings().padding_idx in (None, tokenizer.pad_token_id)
    assert encoder(**tokenizer(CORPUS[:3], padding=True, return_tensors="pt")).last_hidden_state.isfinite().all()
    assert moved(tmp_path)


def test_overrides_change_the_random_start(folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.mkdir()
    shutil.copy(folder / "bert" / "config.json", config)
    flags = ["--config_name", config, "--config_overrides", "num_hidden_layers=3", "--tokenizer_vocab_size", "300"]
    train(*flags, "--train_file", folder / "data.txt", "--output_dir", tmp_path / "out", *FAST)
    config = AutoModel.from_pretrained(tmp_path / "out").config
    assert (config.num_hidden_layers, config.hidden_size) == (3, 32)


@pytest.mark.parametrize("begin", ["", "jepa", "checkpoint-2"])
def test_what_a_run_leaves_is_a_start(
    begin: str, undisturbed: tuple[Path, str], start: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that learned nothing, with exit code 1."""
    source = undisturbed[0] / begin
    flags = ["--model_name_or_path", str(source), *start[2:], "--learning_rate", "0", "--ema_decay", "1"]
    assert main([*flags, "--output_dir", str(tmp_path), *QUIET]) == 1
    output = capsys.readouterr().out
    assert "pretrained start" in output
    assert "Not healthy. Step 2: nothing learned: the prediction loss ends at" in output
    # At a learning rate of 0 the weights at the end are those of the start.
    full, before = weights(tmp_path / "jepa"), weights(source)
    if begin:
        assert [name for name, value in before.items() if not value.equal(full[name])] == []
    else:
        for name, value in before.items():
            assert value.equal(full[f"context_encoder.{name}"])
            assert value.equal(full[f"target_encoder.{name}"])


def test_another_size_than_the_jepas_own_is_refused(
    undisturbed: tuple[Path, str], start: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model_name_or_path", str(undisturbed[0] / "jepa"), *start[2:], "--pred_mlp_ratio", "8", *QUIET]
    assert jepa_hf_main(["train", *flags, "--output_dir", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "cannot be loaded: its weights do not have the shapes that the flags request" in err
    assert err.count("\n") == 1
    assert jepa_hf_main(["train", *flags, "--pred_hidden_size", "8", "--output_dir", str(tmp_path)]) == 2
    assert "pred_hidden_size is for a transformer predictor, but that of this JEPA is an mlp" in capsys.readouterr().err


def test_added_tokens_grow_both_encoders(folder: Path, start: list[str], tmp_path: Path) -> None:
    words = ["jepa", "zyxgloss", "amberfalcon"]
    tokens = write_lines(tmp_path / "tokens.txt", [*words, "", "  "])
    before = len(AutoTokenizer.from_pretrained(folder / "bert"))
    train(*start, "--add_tokens", tokens, "--output_dir", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(tokenizer) == before + 3
    assert tokenizer.tokenize("a zyxgloss") == ["a", "zyxgloss"]
    model = JepaForRepresentationPrediction.from_pretrained(tmp_path / "out" / "jepa")
    for which in ("context", "target"):
        assert model.get_encoder(which).get_input_embeddings().num_embeddings == before + 3
    assert AutoModel.from_pretrained(tmp_path / "out").config.vocab_size == before + 3


def test_a_larger_tokenizer_grows_the_embeddings_and_a_smaller_one_leaves_them(
    folder: Path, start: list[str], tmp_path: Path
) -> None:
    larger = AutoTokenizer.from_pretrained(folder / "bert")
    own = len(larger)
    larger.add_tokens(["zyxgloss", "amberfalcon"])
    larger.save_pretrained(tmp_path / "larger")
    larger_tokenizer = ("--tokenizer_name", tmp_path / "larger", "--resize_token_embeddings")
    train(*start, *larger_tokenizer, "--output_dir", tmp_path / "grown")
    assert AutoModel.from_pretrained(tmp_path / "grown").config.vocab_size == own + 2
    train(
        *start, "--model_name_or_path", tmp_path / "grown", "--tokenizer_name", start[1], "--output_dir", tmp_path / "o"
    )
    assert AutoModel.from_pretrained(tmp_path / "o").config.vocab_size == own + 2
    assert len(AutoTokenizer.from_pretrained(tmp_path / "o")) == own


@pytest.mark.parametrize("kind", ["more tokens", "other tokens", "own tokenizer"])
def test_another_tokenizer_is_refused(
    folder: Path, start: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """With a pretrained model, a tokenizer of other or more tokens needs --resize_token_embeddings."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "bert")
    flags = ["--tokenizer_name", str(tmp_path / "tokenizer")]
    if kind == "other tokens":
        tokenizer = train_wordpiece_tokenizer(["some other texts"], len(tokenizer))
        message = r"is not that of '.*bert': token \d+ is '.*' instead of '.*'\. Use the model's tokenizer, or set"
    else:
        tokenizer.add_tokens(["zyxgloss"])
        message = r"has \d+ tokens, but '.*' has only \d+ embeddings\. .* --resize_token_embeddings"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    if kind == "own tokenizer":
        shutil.copytree(folder / "bert", tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        flags = ["--model_name_or_path", str(tmp_path / "model")]
    assert jepa_hf_main(["train", *map(str, start), *flags, *QUIET, "--output_dir", str(tmp_path / "out")]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


# ---- flags that change how rows are made


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        "--whole_word --masked_tokens mask_token",
        "--num_masks 2",
        "--num_masks 2 --masked_tokens mask_token --predictor_type mlp",
        "--stride 4 --max_seq_length 16",
        "--concat --max_seq_length 24",
        "--packed --max_seq_length 96 --do_train --do_eval",
        "--packed --max_seq_length 96 --masked_tokens mask_token --predictor_type mlp --mlm_weight 0.5",
        "--packed --max_seq_length 96 --pad_to_max_length --contrastive_weight 0.3 --whole_word",
        "--packed --max_seq_length 96 --streaming --validation_file {data} --do_train --do_eval",
        "--pad_to_max_length --max_seq_length 24",
        "--pad_to_multiple_of 8",
        "--streaming --validation_file {data} --do_train --do_eval",
        "--streaming --whole_word --concat --max_seq_length 24",
        "--line_by_line --max_seq_length 24 --dataloader_num_workers 1",
        "--gradient_accumulation_steps 2 --gradient_checkpointing",
        "--bf16",
    ],
)
def test_every_way_to_make_rows_trains(flags: str, folder: Path, start: list[str], tmp_path: Path) -> None:
    train(*start, *flags.format(data=folder / "data.txt").split(), "--output_dir", tmp_path, "--logging_steps", "1")
    assert moved(tmp_path)
    logged = [entry for entry in metrics(tmp_path)["history"] if "loss" in entry]
    assert len(logged) == 2
    for entry in logged:
        assert 0.2 < entry["masked_fraction"] < 0.4
        assert entry["rows_without_targets"] == 0


def test_sample_limits_count_texts(folder: Path, start: list[str], tmp_path: Path) -> None:
    flags = ["--max_train_samples", "6", "--max_eval_samples", "3", "--validation_file", folder / "data.txt"]
    one_epoch = ["--num_train_epochs", "1", "--max_steps", "-1", "--per_device_train_batch_size", "2"]
    train(*start, *flags, *one_epoch, "--output_dir", tmp_path, "--do_train", "--do_eval")
    actual = metrics(tmp_path)
    assert actual["history"][-1]["step"] == 3
    seconds = actual["eval"]["eval_runtime"]
    assert round(actual["eval"]["eval_samples_per_second"] * seconds, 1) == pytest.approx(3, abs=0.1)


# ---- evaluation


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--max_steps 0", "max_steps must be at least 1, not 0"),
        ("--max_steps=-5", "max_steps must be at least 1, not -5"),
        ("--max_steps=-1 --num_train_epochs 0", "num_train_epochs must be above 0"),
        ("--do_train false", "nothing is to be evaluated"),
        ("--dataloader_drop_last --max_train_samples 3", "The training data has 3 rows, fewer than a batch of 4"),
        ("--eval_strategy steps --eval_steps 1 --metric_for_best_model probe_linear", "needs --probe_task"),
        ("--max_train_samples 1", "train_dataset has one"),
    ],
)
def test_a_run_that_cannot_learn_is_refused_before_it_starts(
    flags: str, message: str, start: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*start, *flags.split(), *QUIET, "--output_dir", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_do_train_false_only_evaluates(start: list[str], tmp_path: Path) -> None:
    """Also where the strategy of evaluations implies training."""
    train(*start, "--output_dir", tmp_path, "--do_train", "false", "--eval_strategy", "epoch")
    assert metrics(tmp_path).keys() >= {"eval"}
    assert not (tmp_path / "model.safetensors").exists()


def test_evaluation_alone_trains_nothing_and_prints_its_metrics(folder: Path, start: list[str], tmp_path: Path) -> None:
    output = train(*start, "--do_eval", "--output_dir", tmp_path)
    assert "train" not in metrics(tmp_path)
    assert "evaluation at step 0 · loss " in output
    assert "AutoModel" not in output  # there is nothing to load
    assert {path.name for path in tmp_path.iterdir()} == {"_run.json", "metrics.json", "training.png"}
    # The context encoder is still the target encoder's equal: a start evaluates as the first step of training does.
    train(*start, "--eval_on_start", "--output_dir", tmp_path / "trained")
    first = next(entry for entry in metrics(tmp_path / "trained")["history"] if "eval_loss" in entry)
    assert first["step"] == 0
    assert metrics(tmp_path)["eval"]["eval_loss"] == first["eval_loss"]


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        ("--eval_strategy steps --eval_steps 1", [1, 2]),
        ("--eval_strategy epoch --num_train_epochs 2 --max_steps -1 --max_train_samples 8", [2, 4]),
        ("--eval_on_start", [0, 2]),
        ("--do_train --do_eval", [2]),
        ("--do_train", []),
        ("", []),
    ],
)
def test_evaluations_are_made_when_asked_for_and_once_at_the_end(
    flags: str, steps: list[int], folder: Path, start: list[str], tmp_path: Path
) -> None:
    apart = ["--validation_file", folder / "data.txt", "--max_eval_samples", "20"]
    train(*start, *apart, *flags.split(), "--output_dir", tmp_path)
    actual = metrics(tmp_path)
    assert [entry["step"] for entry in actual["history"] if "eval_loss" in entry] == steps
    assert ("eval" in actual) == bool(steps)
    if steps:
        assert actual["eval"]["eval_loss"] == actual["history"][-1].get("eval_loss", actual["eval"]["eval_loss"])


def test_the_best_model_by_a_metric_that_a_collapse_does_not_flatter(start: list[str], tmp_path: Path) -> None:
    flags = (
        "--load_best_model_at_end --metric_for_best_model top1_accuracy --greater_is_better true --eval_strategy steps"
    )
    train(
        *start,
        *flags.split(),
        "--eval_steps",
        "1",
        "--save_strategy",
        "steps",
        "--save_steps",
        "1",
        "--output_dir",
        tmp_path,
    )
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    best = weights(Path(state["best_model_checkpoint"]))
    assert [name for name, value in weights(tmp_path / "jepa").items() if not value.equal(best[name])] == []


# ---- secrets


def test_secrets_are_written_nowhere(start: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    secrets = ["hf_SecretOfTheData", "hf_SecretOfTheHub"]
    output = train(
        *start, "--token", secrets[0], "--hub_token", secrets[1], "--output_dir", tmp_path, "--save_strategy", "steps"
    )
    captured = capfd.readouterr()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert "_run.json" in {path.name for path in files}
    assert [path for path in files if any(secret.encode() in path.read_bytes() for secret in secrets)] == []
    assert not any(secret in text for secret in secrets for text in (output, captured.out, captured.err))


@pytest.mark.parametrize(
    ("column", "rate", "sentence"),
    [
        ("{0}", "1e-12", "nothing learned: the prediction loss ends at"),
        ("1", "1e-3", "Step 0: nothing to learn: all samples have the same target"),
    ],
)
def test_a_run_that_learned_nothing_has_no_success(
    column: str, rate: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1 for a frozen model and for equal rows; a short run that has begun to learn succeeds."""
    table = [",".join([column.format(row % 7), "2", "3", str(row) if "{" in column else "4"]) for row in range(40)]
    write_lines(tmp_path / "rows.csv", ["a,b,c,d", *table])
    command = ["--train_file", str(tmp_path / "rows.csv"), "--objective", "features", "--max_steps", "2", *QUIET]
    assert main([*command, "--output_dir", str(tmp_path / "out"), "--learning_rate", rate]) == 1
    assert sentence in capsys.readouterr().out
    if rate == "1e-12":
        train(*command, "--output_dir", tmp_path / "short")


def test_a_collapse_ends_the_run_on_request_with_a_message(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A target that follows at once, without normalisation: exit code 1, the sentence last, the metrics show it."""
    out = tmp_path / "out"
    flags = "--smoke_test --loss cosine --target_norm none --ema_decay 0 --learning_rate 5e-3 --health_steps 15"
    flags += " --max_steps 60 --stop_on_collapse --use_cpu --report_to none --disable_tqdm --save_strategy no"
    flags += " --contrastive_weight 0"
    assert main([*flags.split(), "--output_dir", str(out)]) == 1
    said = capfd.readouterr().out
    step = int(re.search(r"^Not healthy\. Step (\d+): total collapse: ", said, re.MULTILINE)[1])
    assert f"Stopped at step {step} by --stop_on_collapse." in said
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["health_findings"]["total"]["step"] == step < 60
    assert max(entry["step"] for entry in metrics["history"]) == step
    record = json.loads((out / "_run.json").read_text())
    assert (record["finished"], record["stopped_early"]) == (False, True)
