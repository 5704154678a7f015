"""The claims that nothing is let in: no pickle in what is shared, no code unasked, no file outside of the output."""

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.cli import snapshot, train
from helpers.tiny_models import CORPUS, save_tiny_encoder, write_lines
from jepa_hf.cli.main import main
from jepa_hf.cli.train import main as train_main

MALICIOUS_CODE = "../../evil"
QUIET = ["--use_cpu", "--report_to", "none", "--disable_tqdm", "true"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and data."""
    folder = tmp_path_factory.mktemp("work")
    save_tiny_encoder("bert", folder / "bert", head="mlm")
    write_lines(folder / "data.txt", CORPUS)
    np.savez(folder / "vectors.npz", features=np.random.default_rng(0).normal(size=(40, 6)))
    return folder


# ---- pickles


def is_pickle(path: Path) -> bool:
    """Whether a file is a pickle, bare or in the archive that torch.save writes."""
    begin = path.read_bytes()[:2]
    return (begin[:1] == b"\x80" and begin[1:] <= b"\x05") or zipfile.is_zipfile(path)


def test_a_pickle_is_known_when_it_is_seen(tmp_path: Path) -> None:
    torch.save({"a": 1}, tmp_path / "new")
    torch.save({"a": 1}, tmp_path / "old", _use_new_zipfile_serialization=False)
    assert all(map(is_pickle, tmp_path.iterdir()))


@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize(
    "flags",
    [
        "--model_name_or_path bert --train_file data.txt --mlm_weight 0.5 --export_encoder both",
        "--train_file vectors.npz --config_overrides hidden_size=16,num_hidden_layers=2,num_attention_heads=2",
    ],
    ids=["text", "features"],
)
def test_a_run_shares_no_pickle(flags: str, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside of its checkpoints, which are for resuming it, a run writes nothing that could run code when loaded."""
    monkeypatch.chdir(work)
    train(*flags.split(), "--max_steps", "2", "--save_steps", "1", "--output_dir", tmp_path / "out")
    out = tmp_path / "out"
    assert main(["report", str(out), "--max_samples", "20"]) == 0
    files = [path for path in out.rglob("*") if path.is_file()]
    shared = [path for path in files if not path.relative_to(out).parts[0].startswith("checkpoint-")]
    assert {"model.safetensors", "config.json", "report.html"} <= {path.name for path in shared}
    assert [path.name for path in shared if is_pickle(path)] == []
    assert [path.name for path in shared if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")] == []
    assert [path.name for path in files if is_pickle(path)] != []  # the checkpoints hold some, so the test can see


# ---- code


CODE = """
from pathlib import Path
from transformers import BertConfig, BertModel, BertTokenizer
Path(r"{marker}").touch()
class EvilConfig(BertConfig):
    model_type = "evil"
class EvilModel(BertModel):
    config_class = EvilConfig
class EvilTokenizer(BertTokenizer):
    pass
"""


@pytest.fixture
def marker(tmp_path: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that appears where a model's code, or a tokenizer's, is run; they lie in `model` and `tokenizer`."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    marker = tmp_path / "code-was-run"
    for name, file, settings in (
        ("model", "config.json", {"model_type": "evil"}),
        ("tokenizer", "tokenizer_config.json", {"tokenizer_class": "EvilTokenizer"}),
    ):
        shutil.copytree(work / "bert", tmp_path / name)
        (tmp_path / name / "evil.py").write_text(CODE.format(marker=marker))
        content = json.loads((tmp_path / name / file).read_text()) | settings
        classes = {"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.EvilModel"}
        content["auto_map"] = classes if name == "model" else {"AutoTokenizer": [None, "evil.EvilTokenizer"]}
        (tmp_path / name / file).write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "data.txt", CORPUS)
    write_lines(
        tmp_path / "task.csv", ["text,label", *(f"{line.replace(',', '')},{len(line) > 60}" for line in CORPUS)]
    )
    return marker


@pytest.mark.parametrize(
    "command",
    [
        "train --model_name_or_path model --train_file data.txt --max_steps 1 --output_dir out",
        "train --config_name model --train_file data.txt --max_steps 1 --output_dir out",
        "masks --model_name_or_path model --train_file data.txt --output_dir out",
        "evaluate model --tasks task.csv --output_dir evaluation",
    ],
)
def test_code_that_a_model_brings_is_not_run_unasked(
    command: str, marker: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The refusal names the flag; with the flag the code is run, so it could have been."""
    capfd.readouterr()
    before = snapshot(marker.parent)
    assert main(command.split()) == 2
    output = capfd.readouterr().err
    assert "custom code" in output
    assert "--trust_remote_code" in output
    assert snapshot(marker.parent) == before
    main([*command.split(), "--trust_remote_code"])
    assert marker.exists()


@pytest.mark.slow
def test_code_that_a_tokenizer_brings_is_not_run_unasked(marker: Path) -> None:
    """The tokenizer of the model's family takes its place."""
    command = "masks --model_type bert --tokenizer_name tokenizer --train_file data.txt --output_dir out"
    assert main(command.split()) == 0
    assert not marker.exists()
    main([*command.split(), "--trust_remote_code"])
    assert marker.exists()


# ---- paths


def created(folder: Path, before: set[Path]) -> set[str]:
    """What lies in a folder now and did not before, by its first part."""
    return {path.relative_to(folder).parts[0] for path in set(folder.rglob("*")) - before}


@pytest.mark.slow
def test_names_that_look_like_paths_write_nowhere_else(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names of runs, repositories, columns, classes, tasks and chat templates may be paths; they open no file."""
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    shutil.copytree(work / "bert", "model")
    config = Path("model/tokenizer_config.json")
    templates = [
        {"name": name, "template": "{{ messages }}"} for name in ("default", MALICIOUS_CODE, f"{tmp_path}/evil")
    ]
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": templates}))
    lines = [
        f"{MALICIOUS_CODE}/{index % 2},{tmp_path}/evil {line.replace(',', '')}" for index, line in enumerate(CORPUS)
    ]
    write_lines("task.csv", [f"{MALICIOUS_CODE},{tmp_path}/evil", *lines])
    before = set(tmp_path.rglob("*"))
    names = ["--run_name", MALICIOUS_CODE, "--hub_model_id", MALICIOUS_CODE, "--text_column_name", f"{tmp_path}/evil"]
    flags = ["--model_name_or_path", "model", "--train_file", "task.csv", "--max_steps", "2", "--save_steps", "1"]
    assert train_main([*flags, *names, "--output_dir", "out", *QUIET]) == 0
    assert main(["report", "out"]) == 0
    columns = ["--text_column_name", f"{tmp_path}/evil", "--label_column_name", MALICIOUS_CODE]
    assert main(["evaluate", "out", "--tasks", "../b/task.csv", "--output_dir", "out/evaluation", *columns]) == 0
    assert main(["export", "out/checkpoint-1", "exported"]) == 0
    assert created(inner, before) == {"out", "exported"}
    assert created(tmp_path, before) == {"a"}
    assert list(tmp_path.rglob("*evil*")) == []


@pytest.mark.parametrize("name", ["output_dir", "train_file", "model_name_or_path", "run_name", "cache_dir"])
def test_a_nul_in_a_recipe_gets_a_sentence(
    name: str, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """No file's name holds NUL, which only a recipe can spell; the system's own refusal would come after training."""
    monkeypatch.chdir(work)
    recipe = {"model_name_or_path": "bert", "train_file": "data.txt", "output_dir": str(tmp_path / "out")}
    (tmp_path / "recipe.yaml").write_text(json.dumps({**recipe, name: "a\0b"}))
    before = snapshot(work)
    assert train_main([str(tmp_path / "recipe.yaml"), "--max_steps", "1", *QUIET]) == 2
    assert f"{name} contains a NUL character" in capfd.readouterr().err
    assert snapshot(work) == before
