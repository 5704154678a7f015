"""Claims about `run_jepa.py` on features: tables, series and lists become runs, exports and one-sentence complaints."""

import contextlib
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from matplotlib.image import imread
from torch import nn
from transformers import AutoConfig, AutoModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import jepa_hf
from helpers.cli import (
    QUIET,
    REPOSITORY,
    WITHOUT_JEPA_HF,
    SimulatedKill,
    assert_same_weights,
    snapshot,
    start_process,
    train,
    weights,
)
from jepa_hf import FeatureEncoderModel, JepaForRepresentationPrediction, JepaTrainer
from jepa_hf.cli.train import main
from jepa_hf.data.arguments import DataArguments
from jepa_hf.data.feature_datasets import load_feature_datasets

WIDTH, ROWS = 6, 20
SIZES = "hidden_size=16,num_hidden_layers=2,num_attention_heads=2"
MODEL = ["--model_type", "feature_encoder", "--config_overrides", SIZES, "--pred_num_hidden_layers", "1"]
FAST = ["--max_steps", "2", "--learning_rate", "1e-2", "--save_strategy", "no", "--per_device_train_batch_size", "4"]
SPLIT = ["--validation_split_percentage", "40"]
RUNS = ("data.csv", "series.npy", "series.parquet")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same kind of numbers, far from zero and of unequal spread, in all the formats."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    scale, shift = np.array([1, 10, 0.1, 5, 1, 3]), np.array([0, 100, -3, 7, 1, 0])
    vectors = rng.normal(size=(ROWS, WIDTH)) * scale + shift
    header = ",".join([*(f"column{number}" for number in range(WIDTH)), "name", "label"])
    lines = [",".join([*(str(value) for value in row), f"row{i}", str(i % 2)]) for i, row in enumerate(vectors)]
    (folder / "data.csv").write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")

    series = (rng.normal(size=(ROWS, 9, WIDTH)) * scale + shift).astype(np.float32)
    lengths = rng.integers(2, 10, size=ROWS)
    lengths[0] = 9
    np.save(folder / "series.npy", series)
    np.savez(folder / "series.npz", features=series, lengths=lengths)
    ragged = [row[:length].tolist() for row, length in zip(series, lengths, strict=True)]
    pq.write_table(pa.table({"features": vectors.tolist(), "name": ["x"] * ROWS}), folder / "vectors.parquet")
    pq.write_table(pa.table({"features": ragged}), folder / "series.parquet")

    bad = vectors.astype(str)
    bad[3, 1] = "nan"
    (folder / "nan.csv").write_text("\n".join([header, *(",".join([*row, "x", "0"]) for row in bad)]) + "\n")
    np.save(folder / "narrow.npy", series[..., :4])
    return folder


def command(folder: Path, name: str, out: Path, *flags: str | Path) -> list[str]:
    label = ["--label_column_name", "label"] if name.endswith(".csv") else []
    return list(map(str, [*MODEL, *FAST, "--train_file", folder / name, *label, "--output_dir", out, *flags]))


def raw_rows(folder: Path, name: str) -> list[np.ndarray]:
    """What is in a file, read another way than jepa_hf does."""
    if name == "data.csv":
        return list(np.genfromtxt(folder / name, delimiter=",", skip_header=1, usecols=range(WIDTH)))
    if name == "series.npy":
        return list(np.load(folder / name))
    if name == "series.npz":
        file = np.load(folder / name)
        return [row[:length] for row, length in zip(file["features"], file["lengths"], strict=True)]
    return [np.array(row) for row in pq.read_table(folder / name)["features"].to_pylist()]


def differing(one: nn.Module, other: nn.Module) -> list[str]:
    """Names of the parameters of `other` that `one` has otherwise."""
    ours = dict(one.named_parameters())
    return [name for name, parameter in other.named_parameters() if not torch.equal(ours[name], parameter)]


@pytest.fixture(scope="module")
def runs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of three runs with evaluation on two fifths of the rows, each named after its data."""
    out = tmp_path_factory.mktemp("runs")
    torch.set_num_threads(1)
    for name in RUNS:
        train(*command(folder, name, out / name, "--eval_on_start", "--logging_steps", "1", *SPLIT), pictures=True)
    return out


# ---- what a run leaves on disk


@pytest.mark.parametrize("name", RUNS)
def test_a_run_on_features_leaves_the_layout_of_every_run(name: str, runs: Path) -> None:
    """Encoder, full model, metrics, picture and card; nothing of a tokenizer."""
    out = runs / name
    files = {path.name for path in out.iterdir()}
    assert {"config.json", "model.safetensors", "jepa", "metrics.json", "training.png", "README.md"} <= files
    assert not [file for file in files if "token" in file or file in ("modules.json", "1_Pooling")]
    assert imread(out / "training.png").std() > 0.05
    history = json.loads((out / "metrics.json").read_text(encoding="utf-8"))["history"]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2]
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [0, 2]
    assert "mask ratio 0.3" in (out / "README.md").read_text(encoding="utf-8")
    encoder, full = AutoModel.from_pretrained(out), AutoModel.from_pretrained(out / "jepa")
    assert isinstance(encoder, FeatureEncoderModel)
    assert encoder.config.mode == ("time" if name.startswith("series") else "patches")
    assert isinstance(full, JepaForRepresentationPrediction)
    assert not differing(full.context_encoder, encoder)
    assert differing(full.context_encoder, full.target_encoder)  # it has trained


@pytest.mark.parametrize("name", RUNS)
def test_the_models_standardise_by_the_training_rows_only(name: str, runs: Path, folder: Path) -> None:
    """Mean and deviation over the rows and steps that are not held out, in the export and in both encoders."""
    source = DataArguments(
        train_file=str(folder / name),
        label_column_name="label" if name.endswith(".csv") else None,
        validation_split_percentage=40,
    )
    split, held_out = load_feature_datasets(source, seed=42, need_validation=True)
    assert (len(split), len(held_out)) == (12, 8)
    learnt = np.concatenate([np.reshape(row, (-1, WIDTH)) for row in split["features"]])
    everything = np.concatenate([row.reshape(-1, WIDTH) for row in raw_rows(folder, name)])
    assert np.abs(learnt.mean(axis=0) / everything.mean(axis=0) - 1).max() > 1e-3
    full = AutoModel.from_pretrained(runs / name / "jepa")
    for encoder in (AutoModel.from_pretrained(runs / name), full.context_encoder, full.target_encoder):
        np.testing.assert_allclose(encoder.feature_mean.numpy(), learnt.mean(axis=0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(encoder.feature_std.numpy(), learnt.std(axis=0), rtol=1e-4)


# ---- loading the export elsewhere

COMPUTE = """
import sys
import numpy as np
import pandas as pd
import torch
from transformers import AutoModel

torch.set_num_threads(1)
for folder in sys.argv[1:]:
    encoder = load(folder)
    with torch.no_grad():
        output = encoder(torch.from_numpy(np.load(folder + "/rows.npy")))
    print(output.pooler_output.double().sum().item().hex(), tuple(output.last_hidden_state.shape))
"""
HERE = (
    """
import jepa_hf

def load(folder):
    encoder = AutoModel.from_pretrained(folder)
    assert type(encoder).__module__ == "jepa_hf.models.modeling_feature_encoder", type(encoder)
    return encoder
"""
    + COMPUTE
)
ELSEWHERE = (
    WITHOUT_JEPA_HF
    + """

from transformers import AutoModel
try:
    AutoModel.from_pretrained(sys.argv[1], trust_remote_code=False)
except ValueError:
    pass
else:
    sys.exit("loaded without its code: this proves nothing")

def load(folder):
    encoder = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert type(encoder).__module__.startswith("transformers_modules."), type(encoder)
    return encoder
"""
    + COMPUTE
)


@pytest.mark.parametrize("where", [HERE, ELSEWHERE], ids=["with jepa_hf", "without jepa_hf"])
@pytest.mark.slow
def test_the_export_computes_the_same_in_a_process_of_its_own(
    where: str, runs: Path, folder: Path, tmp_path: Path
) -> None:
    """With `import jepa_hf` as a class of the package; without it, from the code next to the weights."""
    names, expected = ("data.csv", "series.npy"), []
    for name in names:
        rows = np.stack(raw_rows(folder, name)).astype(np.float32)
        np.save(runs / name / "rows.npy", rows)
        with torch.no_grad():
            output = AutoModel.from_pretrained(runs / name)(torch.from_numpy(rows))
        total = output.pooler_output.double().sum().item()
        expected.append(f"{total.hex()} {tuple(output.last_hidden_state.shape)}")
    command = ("-c", where, *(runs / name for name in names))
    # Where code is imported, the interpreter is a new one.
    is_fresh = where is ELSEWHERE
    process = start_process(*command, cwd=tmp_path, fresh=is_fresh, HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.splitlines() == expected


# ---- ways to run


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("data.csv", f"--config_overrides mode=flat,{SIZES}"),
        ("data.csv", f"--config_overrides patch_size=2,{SIZES} --masked_tokens mask_token --num_masks 2"),
        ("vectors.parquet", "--feature_column_names features --max_train_samples 8"),
        ("data.csv", "--feature_column_names column4,column2,column0 --mask_ratio 0.5"),
        ("series.npz", "--masked_tokens mask_token --predictor_type mlp"),
        ("series.npz", "--pad_to_max_length --num_masks 3 --mean_span_length 2 --variance_weight 1"),
    ],
)
def test_every_view_of_features_trains(name: str, flags: str, folder: Path, tmp_path: Path) -> None:
    """Whole vectors, kept and dropped positions, larger patches, chosen columns, static shapes, more masks."""
    train(*command(folder, name, tmp_path, *flags.split()))
    full = AutoModel.from_pretrained(tmp_path / "jepa")
    assert full.config.masked_tokens == ("mask_token" if "mask_token" in flags or "flat" in flags else "drop")
    assert differing(full.context_encoder, full.target_encoder)
    if "column4" in flags:  # in the order in which they were named
        chosen = np.array(raw_rows(folder, name))[:, [4, 2, 0]]
        np.testing.assert_allclose(full.context_encoder.feature_mean.numpy(), chosen.mean(axis=0), rtol=1e-5)


def test_an_array_needs_no_model_type_and_python_no_command_line(folder: Path, runs: Path, tmp_path: Path) -> None:
    """`pretrain` with an .npy file alone builds the feature encoder, with the same weights as the command."""
    jepa_hf.pretrain(
        train_file=str(folder / "series.npy"),
        config_overrides=SIZES,
        pred_num_hidden_layers=1,
        eval_on_start=True,
        validation_split_percentage=40,
        output_dir=str(tmp_path),
        max_steps=2,
        learning_rate=1e-2,
        save_strategy="no",
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    assert_same_weights(tmp_path / "jepa", runs / "series.npy" / "jepa")


@pytest.mark.parametrize("start", ["", "jepa"])
def test_a_run_goes_on_from_an_earlier_one_and_keeps_its_standardisation(
    start: str, folder: Path, runs: Path, tmp_path: Path
) -> None:
    """Other data with another mean leaves the statistics, which the weights were trained with, as they are."""
    np.save(tmp_path / "more.npy", np.array(raw_rows(folder, "data.csv")) * 2 + 1)
    flags = ["--model_name_or_path", runs / "data.csv" / start, "--train_file", tmp_path / "more.npy", *FAST]
    train(*flags, "--output_dir", tmp_path / "out")
    before, after = weights(runs / "data.csv"), weights(tmp_path / "out")
    for name in ("feature_mean", "feature_std"):
        assert before[name].equal(after[name])
    assert any(not value.equal(after[name]) for name, value in before.items())


def reorder(source: Path, target: Path, *left_out: str) -> Path:
    """Write a CSV file's columns in the reverse order, without some, with row numbers as pandas writes them."""
    frame = pd.read_csv(source)
    frame[[name for name in reversed(frame.columns) if name not in left_out]].to_csv(target)
    return target


def test_an_encoder_keeps_its_columns_and_finds_them_by_name(folder: Path, runs: Path, tmp_path: Path) -> None:
    """In its export and full model; training on from another order of columns gives the same weights."""
    names = [f"column{number}" for number in range(WIDTH)]
    for place in (runs / "data.csv", runs / "data.csv" / "jepa"):
        config = AutoConfig.from_pretrained(place)
        assert getattr(config, "encoder_config", config).feature_column_names == names
    assert AutoConfig.from_pretrained(runs / "series.npy").feature_column_names is None
    assert AutoConfig.from_pretrained(runs / "series.parquet").feature_column_names == ["features"]
    other = reorder(folder / "data.csv", tmp_path / "other.csv")
    start = ["--model_name_or_path", runs / "data.csv", *FAST]
    for name, file in (("one", folder / "data.csv"), ("two", other)):
        train(*start, "--train_file", file, "--output_dir", tmp_path / name)
    assert_same_weights(tmp_path / "one", tmp_path / "two")


def test_a_missing_column_of_the_pretrained_encoder_is_named(
    folder: Path, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = reorder(folder / "data.csv", tmp_path / "fewer.csv", "column3")
    flags = ["--model_name_or_path", runs / "data.csv", "--train_file", file, *FAST, *QUIET]
    assert main([*map(str, flags), "--output_dir", str(tmp_path / "out")]) == 2
    assert "No column 'column3' in" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_series_of_one_step_are_counted_or_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Some are left out and counted; if all are, there is nothing to learn from, which is known before the start."""
    series = np.random.default_rng(0).normal(size=(8, 4, 3))
    for name, lengths in (("some.npz", [4, 1, 3, 1, 4, 4, 4, 4]), ("all.npz", [1] * 8)):
        np.savez(tmp_path / name, features=series, lengths=lengths)
    flags = [*MODEL, *FAST, *QUIET, "--output_dir", str(tmp_path / "out"), "--train_file"]
    assert main([*map(str, flags), str(tmp_path / "all.npz")]) == 2
    assert "All training series have one step" in capsys.readouterr().err
    assert main([*map(str, flags), str(tmp_path / "some.npz"), "--on_too_short", "error"]) == 2
    assert "Row 2 of the training series has one step" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    train(*flags, tmp_path / "some.npz")
    assert "left out 2 of 8 training series: 2 with fewer than two steps" in caplog.messages


def test_the_recipe_reads_vectors_and_series(folder: Path, tmp_path: Path) -> None:
    """`configs/features.yaml` with `--train_file` and a shorter run."""
    recipe = REPOSITORY / "configs" / "features.yaml"
    for name, mode in (("data.csv", "patches"), ("series.npz", "time")):
        train(recipe, "--train_file", folder / name, "--max_steps", "1", "--output_dir", tmp_path / name)
        assert AutoModel.from_pretrained(tmp_path / name).config.mode == mode


class _Crash(TrainerCallback):
    """The process dies in the third step, with the checkpoint of the second on disk."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if state.global_step == 3:
            raise SimulatedKill
        return control


def test_a_resumed_run_has_the_weights_of_the_undisturbed_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, both encoders and the predictor, with dropout; the command is the same one given again."""
    name = "series.npz"
    flags = ["--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2", "--warmup_steps", "1"]
    train(*command(folder, name, tmp_path / "whole", *flags))

    cut = command(folder, name, tmp_path / "cut", *flags)
    build = JepaTrainer.__init__
    with monkeypatch.context() as patch:
        crash = {"callbacks": [_Crash()]}
        changed = functools.wraps(build)(lambda *args, **kwargs: build(*args, **kwargs | crash))
        patch.setattr(JepaTrainer, "__init__", changed)
        with pytest.raises(SimulatedKill), contextlib.redirect_stdout(None):
            main([*cut, *QUIET])
    assert {path.name for path in (tmp_path / "cut").glob("checkpoint-*")} == {"checkpoint-2"}
    before = weights(tmp_path / "cut" / "checkpoint-2")
    printed = train(*cut)
    assert "checkpoint-2" in printed
    assert_same_weights(tmp_path / "cut" / "jepa", tmp_path / "whole" / "jepa")
    assert_same_weights(tmp_path / "cut", tmp_path / "whole")
    after = weights(tmp_path / "whole" / "jepa")
    assert any(not value.equal(after[key]) for key, value in before.items())


# ---- bad input


@pytest.mark.parametrize(
    ("name", "flags", "expected"),
    [
        ("nan.csv", "", ["nan.csv", "Row 4", "column1", "nan"]),
        ("data.csv", "--mask_ration 0.3", ["--mask_ration", "mask_ratio"]),
        ("data.csv", "--mask_ratio 1.5", ["mask_ratio must lie strictly between 0 and 1"]),
        ("data.csv", "--whole_word", ["whole_word is not for the objective features"]),
        ("data.csv", "--streaming", ["cannot be streamed"]),
        ("data.csv", "--objective span", ["span", "feature"]),
        ("data.csv", "--feature_column_names column1,nothing", ["'nothing'"]),
        ("data.csv", "--feature_column_names column1", ["patch_size"]),
        ("data.csv", "--config_overrides mode=time", ["mode time reads series", "contains vectors"]),
        ("data.csv", "--config_overrides mode=flat --masked_tokens drop", ["drop", "mask_token"]),
        ("data.csv", "--config_overrides input_dim=7", ["7 features", "has 6", "columns"]),
        ("data.csv", "--mlm_weight 0.5", ["mlm_weight"]),
        ("series.npy", "--config_overrides max_position_embeddings=5", ["9 steps", "max_position_embeddings"]),
        ("series.npy", "--config_overrides mode=patches", ["mode patches reads vectors", "contains series"]),
        ("series.npy", "--validation_file {folder}/narrow.npy --do_eval", ["4 numbers", "6 numbers"]),
        ("missing.npy", "", ["missing.npy"]),
    ],
)
def test_bad_input_gets_one_sentence_and_leaves_the_disk_alone(
    name: str, flags: str, expected: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, one line on stderr that names the culprit, no output directory."""
    before = snapshot(folder)
    given = command(folder, name, tmp_path / "out", *flags.format(folder=folder).split())
    assert main([*given, *QUIET]) == 2
    err = capsys.readouterr().err
    sentences = [line for line in err.splitlines() if line.startswith("run_jepa.py: error: ")]
    assert len(sentences) == 1
    assert "Traceback" not in err
    for part in expected:
        assert part in sentences[0]
    assert not (tmp_path / "out").exists()
    assert snapshot(folder) == before


def test_another_width_than_the_pretrained_encoders_is_refused(
    folder: Path, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By both widths, before anything is written."""
    flags = ["--model_name_or_path", runs / "series.npy", "--train_file", folder / "narrow.npy", *FAST, *QUIET]
    assert main([*map(str, flags), "--output_dir", str(tmp_path / "out")]) == 2
    assert "the encoder reads 6 features, but the data has 4" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
