"""Claims about `jepa-hf embed`: from files to a file, which a kill does not undo; refusals in a sentence."""

import os
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.cli import REPOSITORY
from helpers.processes import start_python
from helpers.tiny_models import CORPUS, save_tiny_encoder, write_lines
from jepa_hf.cli.main import main
from jepa_hf.evaluation.embedder import Embedder
from jepa_hf.training.run_directory import RunPlan, start_run


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    save_tiny_encoder("bert", folder / "model", std=0.3)
    start_run(folder / "evaluated", {"do_train": False, "model_name_or_path": "model"}, RunPlan())
    write_lines(folder / "data.txt", CORPUS)
    write_lines(folder / "more.txt", CORPUS[:3])
    return folder


@pytest.fixture(autouse=True)
def _here(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def test_one_command_embeds_all_files(capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    assert main(["embed", "model", "data.txt", "more.txt", "--output", "two.npy", "--pooling", "cls"]) == 0
    output, err = capfd.readouterr()
    assert output == "written to two.npy: 203 embeddings of width 32\n"
    assert err == ""
    expected = Embedder.from_pretrained("model", device="cpu").embed([*CORPUS, *CORPUS[:3]], ("cls",))["cls"]
    np.testing.assert_allclose(np.load("two.npy"), expected, atol=1e-5)


@pytest.mark.slow
def test_a_killed_command_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed as soon as a part is there; the part is kept, and the end is that of a command that was left alone."""
    write_lines("long.txt", CORPUS * 60)
    command = ["embed", "model", "long.txt", "--output"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = start_python(["-m", "jepa_hf.cli", *command, "killed.parquet"], environment, Path.cwd(), "out", "err")
    part = Path("killed.parquet.parts/part-000000.parquet")
    while not part.exists():
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    assert not Path("killed.parquet").exists()
    assert main([*command, "alone.parquet"]) == 0
    embedded = []
    embed = Embedder.embed_list
    monkeypatch.setattr(
        Embedder,
        "embed_list",
        lambda self, *args, **names: embedded.append(len(args[0])) or embed(self, *args, **names),
    )
    assert main([*command, "killed.parquet"]) == 0
    assert 0 < sum(embedded) <= 12_000 - 2048
    killed, alone = (pq.read_table(f"{name}.parquet") for name in ("killed", "alone"))
    assert killed["text"].equals(alone["text"])
    vectors = [np.array(table["embedding"].to_pylist(), dtype=np.float32) for table in (killed, alone)]
    np.testing.assert_allclose(*vectors, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["evaluated", "data.txt"], "'evaluated' holds the evaluation of a model, and no model; name the model, model"),
        (["nothing", "data.txt"], "neither a local directory nor a model on the Hub"),
        (["model", "nothing.txt"], "FILES: 'nothing.txt' does not exist. Check the path"),
        (["model", "data.txt", "table.csv"], "mixes csv and text files. Provide files of one kind"),
        (["model", "empty.txt"], "'empty.txt' is empty. Give a file with rows"),
        (["model", "header.csv"], "'header.csv' has no rows"),
        (["model", "table.csv"], "No column 'text' in 'table.csv'. Set --text_column_name to the column with the text"),
        (["model", "table.csv", "--text_column_name", "c"], "No column 'c' in 'table.csv'"),
        (["model", "wrong.jsonl"], "Row 2 of 'wrong.jsonl' has int (3) in column 'text', which must hold strings"),
        (["model", "taken.parquet"], "'taken.parquet' has a column 'embedding' already. Rename it"),
        (["model", "data.txt", "--output", "x.csv"], "Expected output to end in .parquet or .npy, got 'x.csv'"),
        (["model", "data.txt", "--output", "there.npy"], "Output 'there.npy' exists. Delete it, or name another"),
        (
            ["model", "data.txt", "--output", "no/x.npy"],
            "The folder of output 'no/x.npy' does not exist or is not writable",
        ),
        (
            ["model", "data.txt", "--output", "busy.npy"],
            "The folder for parts, 'busy.npy.parts', holds other files",
        ),
        (["model", "data.txt", "--pooling", "max"], "--pooling: invalid choice: 'max'"),
        (["model", "data.txt", "--max_samples", "0"], "max_samples: must be at least 1, not 0"),
        (["model", "data.txt", "--batch_size", "0"], "batch_size: must be at least 1, not 0"),
        (["model", "data.txt", "--max_seq_length", "999"], "Expected max_seq_length from 1 to 128"),
        (["model"], "the following arguments are required: FILES"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refusals_are_one_sentence_and_write_nothing(
    arguments: list[str], sentence: str, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("empty.txt").touch()
    write_lines("header.csv", ["text"])
    write_lines("table.csv", ["a,b", "one,two", "three,four"])
    write_lines("wrong.jsonl", ['{"text": "a"}', '{"text": 3}'])
    pq.write_table(pa.table({"text": ["a"], "embedding": [1]}), "taken.parquet")
    Path("there.npy").touch()
    Path("busy.npy.parts").mkdir(exist_ok=True)
    Path("busy.npy.parts/mine").touch()
    before = sorted(map(str, Path().rglob("*")))
    if "--output" not in arguments:
        arguments = [*arguments, "--output", "new.npy"]
    capfd.readouterr()
    assert main(["embed", *arguments]) == 2
    output, err = capfd.readouterr()
    assert output == ""
    assert err.startswith("jepa-hf embed: error: ")
    assert err.count("\n") == 1
    assert sentence in err
    assert sorted(map(str, Path().rglob("*"))) == before
