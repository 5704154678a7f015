"""Claims about `jepa-hf masks`: it draws what train would hide, writes nothing else, and refuses with one sentence."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from helpers.cli import train
from helpers.tiny_models import CORPUS, write_lines
from jepa_hf import JepaTrainer
from jepa_hf.cli.main import main
from jepa_hf.cli.parsing import parse_command
from jepa_hf.cli.train import run

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("rendered_pictures")

SIZES = "hidden_size=16,num_hidden_layers=1,num_attention_heads=2"
IMAGES = ("--model_type", "ijepa", "--config_overrides", f"{SIZES},intermediate_size=32,image_size=16,patch_size=4")
FEATURES = ("--model_type", "feature_encoder", "--config_overrides", SIZES)
QUIET = ("--use_cpu", "--report_to", "none", "--disable_tqdm", "true")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with data of each kind in it."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for number in range(8):
        pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{number}.png")
    np.save("vectors.npy", rng.normal(size=(20, 6)).astype(np.float32))
    np.save("series.npy", rng.normal(size=(20, 9, 3)).astype(np.float32))
    write_lines("texts.txt", CORPUS)
    return tmp_path


CASES: dict[str, tuple[str, ...]] = {
    "text": ("--smoke_test",),
    "images": (*IMAGES, "--train_file", "pictures"),
    "vectors": (*FEATURES, "--train_file", "vectors.npy"),
    "series": (*FEATURES, "--train_file", "series.npy", "--masked_tokens", "mask_token"),
}


@pytest.mark.parametrize("flags", CASES.values(), ids=CASES)
def test_it_draws_and_touches_nothing_else(
    flags: tuple[str, ...], folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = set(folder.rglob("*"))
    assert main(["masks", *flags, *QUIET, "--output_dir", "out"]) == 0
    assert capfd.readouterr().out == "written to masks.png\n"
    assert set(folder.rglob("*")) - before == {folder / "masks.png"}
    assert (folder / "masks.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.slow
@pytest.mark.parametrize("flags", [CASES["images"], CASES["series"]], ids=["images", "series"])
def test_a_run_of_one_epoch_leaves_the_same_picture(flags: tuple[str, ...], folder: Path) -> None:
    """So the command shows the masks of the training; another seed, which gives other masks, shows others."""
    common = [*flags, *QUIET, "--do_train", "--do_eval"]
    assert main(["masks", *common, "--picture", "before.png"]) == 0
    once = ("--max_steps", "1", "--save_strategy", "no", "--output_dir", "out")
    train(*flags, "--do_train", "--do_eval", *once, pictures=True)
    picture = (folder / "out" / "masks.png").read_bytes()
    assert (folder / "before.png").read_bytes() == picture
    assert main(["masks", *common, "--seed", "7", "--picture", "seed.png"]) == 0
    assert (folder / "seed.png").read_bytes() != picture


def test_what_is_drawn_is_what_the_training_reads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hidden features in the picture are those of the batch that the first step got."""
    figures: list[Figure] = []
    savefig = Figure.savefig

    def keep(self: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(self)
        savefig(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    rows = ("--max_train_samples", "4", *QUIET)
    assert main(["masks", *CASES["vectors"], *rows]) == 0
    (shown, *_) = figures[0].axes

    batches: list[dict[str, Any]] = []
    step = JepaTrainer.training_step

    def remember(self: JepaTrainer, model: Any, inputs: Any, *args: Any) -> torch.Tensor:
        batches.append(inputs)
        return step(self, model, inputs, *args)

    monkeypatch.setattr(JepaTrainer, "training_step", remember)
    run(parse_command([*CASES["vectors"], *rows, "--max_steps", "1", "--output_dir", "out", "--save_strategy", "no"]))
    batch = batches[0]
    drawn = np.zeros((4, 6), dtype=bool)
    for patch in shown.patches:
        start = round(patch.get_x() + 0.5)
        drawn[round(patch.get_y() + 0.5), start : round(start + patch.get_width())] = True
    read = torch.zeros(4, 6, dtype=torch.bool)
    read.scatter_(1, batch["target_positions"][:, 0], batch["target_valid"][:, 0])
    assert 0 < drawn.sum() < drawn.size
    assert sorted(map(tuple, drawn.tolist())) == sorted(map(tuple, read.tolist()))  # training shuffles the rows


def test_a_config_file_and_a_place_for_the_picture(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """They go together, in any order of flags, and flags override the file."""
    (folder / "run.yaml").write_text("train_file: vectors.npy\nuse_cpu: true\nmask_ratio: 0.5\nreport_to: none\n")
    (folder / "sub").mkdir()
    assert main(["masks", "run.yaml", "--picture=sub/first.png"]) == 0
    assert capfd.readouterr().out == "written to sub/first.png\n"
    assert main(["masks", "run.yaml", "--picture", "second.png", "--mask_ratio", "0.2"]) == 0
    assert (folder / "sub" / "first.png").read_bytes() != (folder / "second.png").read_bytes()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--picture"], "--picture: expected one argument"),
        (["--picture", "masks.pdf"], "picture 'masks.pdf' does not end in .png. Name a PNG"),
        (
            ["--picture", "no/masks.png"],
            "picture 'no/masks.png' is a folder, or its folder does not exist. Name a file",
        ),
        (["--smoke_test", "--bogus", "1"], "Unknown flag --bogus"),
        (["--max_steps", "3"], "The run has no encoder. Name a pretrained one with --model_name_or_path"),
        (["--smoke_test", "--mask_ratio", "2"], "mask_ratio must lie strictly between 0 and 1, not 2.0"),
        (["missing.yaml"], "Config file 'missing.yaml' does not exist"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    flags: list[str], sentence: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = set(folder.rglob("*"))
    assert main(["masks", *flags]) == 2
    output, complaint = capfd.readouterr()
    assert output == ""
    assert complaint.startswith(f"jepa-hf masks: error: {sentence}")
    assert complaint.count("\n") == 1
    assert set(folder.rglob("*")) == before


def test_a_read_only_folder_is_refused_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.access", lambda *args: False)
    assert main(["masks", "--smoke_test", *QUIET]) == 2
    assert "is in a folder that is not writable. Name another path" in capfd.readouterr().err


def test_help_says_how_to_call_it(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["masks", "--help"]) == 0
    output = capfd.readouterr().out
    assert "--picture" in output
    assert "jepa-hf train --help" in output
    assert main(["--help"]) == 0
    assert "jepa-hf masks" in capfd.readouterr().out
