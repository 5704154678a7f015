"""Claims about pushing from the command line: the round trip through a Hub in fresh processes, and its mishaps."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import snapshot_download

from helpers.cli import QUIET, REPOSITORY, assert_same_weights, start_process, train, weights
from helpers.fake_hub import Fault, Hub
from helpers.tiny_models import CORPUS, write_lines
from jepa_hf.cli.main import main
from jepa_hf.cli.train import main as run_jepa

torch.set_num_threads(1)  # as the fresh processes, whose weights are compared

# All of it needs a run that a process of its own has pushed.
pytestmark = pytest.mark.slow

RUN = ("--smoke_test", "--max_steps", "6", "--save_steps", "2")
SCRIPT = REPOSITORY / "run_jepa.py"
COMMIT = "POST /api/models/.*/commit/"


class Place:
    """A folder with a Hub, and the fresh processes there."""

    def __init__(self, folder: Path, hub: Hub):
        self.folder, self.hub = folder, hub
        self.said: list[str] = []

    def run(self, *command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        hub = {**self.hub.environment(self.folder / "home"), "HF_MODULES_CACHE": str(self.folder / "modules")}
        result = start_process(*command, cwd=self.folder, fresh=True, **{**hub, **environment})
        self.said += [result.stdout, result.stderr]
        assert result.returncode == 0, result.stderr
        return result

    def python(self, code: str) -> list[str]:
        return self.run("-W", "ignore", "-c", code).stdout.split()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A private run, pushed with its last checkpoint by a token on the command line; it keeps one checkpoint."""
    with Hub() as hub:
        place = Place(tmp_path_factory.mktemp("place"), hub)
        flags = "--output_dir out --push_to_hub --hub_private_repo --hub_strategy checkpoint --hub_always_push true"
        limit = ("--save_total_limit", "1", "--hub_token", hub.token)
        place.run(SCRIPT, *RUN, *QUIET, *flags.split(), *limit, HF_TOKEN="")
        yield place


@pytest.fixture
def here(place: Place, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """This process is in that folder, at that Hub."""
    monkeypatch.chdir(place.folder)
    with place.hub.use_in_process():
        yield place.hub
    place.hub.faults = []


def test_a_run_pushes_checkpoints_on_its_way_and_the_result_at_its_end(place: Place) -> None:
    repo = place.hub.repos["me/out"]
    steps = [f"Training in progress, step {step}" for step in (2, 4, 6)]
    assert repo.history() == [*steps, "End of training"]
    assert repo.private
    files = repo.files()
    assert {"config.json", "modules.json", "1_Pooling/config.json", "tokenizer.json", "metrics.json"} <= set(files)
    assert files["training.png"].startswith(b"\x89PNG")
    assert files["README.md"].decode().count('("me/out"') == 4
    assert json.loads(files["jepa/config.json"])["model_type"] == "jepa"
    assert files["model.safetensors"] == (place.folder / "out/model.safetensors").read_bytes()
    # The first push held a whole model already: its folders went along.
    first = next(commit for commit in repo.commits.values() if commit.message == steps[0])
    assert {"config.json", "1_Pooling/config.json", "jepa/model.safetensors", "last-checkpoint/optimizer.pt"} <= {
        *first.files
    }
    assert not (place.folder / "out/_push").exists()


def test_no_pickle_but_a_checkpoint_s_state_is_shared(place: Place) -> None:
    files = place.hub.repos["me/out"].files()
    others = [name for name in files if not name.endswith((".safetensors", ".json", ".md", ".png"))]
    assert sorted(others) == [
        ".gitattributes",
        *(f"last-checkpoint/{name}" for name in ("optimizer.pt", "rng_state.pth", "scheduler.pt")),
    ]


def test_the_token_is_written_nowhere(place: Place, here: Hub) -> None:
    """Neither in what was said, nor in a file of the run, its report's too, nor in what was pushed."""
    assert main(["report", "out"]) == 0
    token = here.token.encode()
    written = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    assert {Path("out/report.html"), Path("out/_run.json"), Path("out/metrics.json")} <= set(written)
    assert [path for path, content in written.items() if token in content] == []
    assert [name for name, content in here.repos["me/out"].files().items() if token in content] == []
    assert not any(here.token in output for output in place.said)


def test_what_was_pushed_loads_by_name(place: Place) -> None:
    """As others load it: the encoder, the sentence encoder and the full model are those that the run left."""
    code = """
from transformers import AutoModel, AutoTokenizer
from sentence_transformers import SentenceTransformer
texts = ["A sentence.", "Another one, a little longer."]
for name in ("me/out", "out"):
    encoder, tokenizer = AutoModel.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    print(encoder.eval()(**tokens).last_hidden_state.double().sum().item())
    print(float(SentenceTransformer(name, device="cpu").encode(texts).sum()))
from jepa_hf import JepaForRepresentationPrediction as Jepa
for model in (Jepa.from_pretrained("me/out", subfolder="jepa"), Jepa.from_pretrained("out/jepa")):
    print(sum(value.double().sum().item() for value in model.state_dict().values()))
"""
    hidden, sentences, hidden_here, sentences_here, full, full_here = place.python(code)
    assert (hidden, sentences, full) == (hidden_here, sentences_here, full_here)


def test_who_has_no_token_sees_nothing_of_it(place: Place) -> None:
    code = "from huggingface_hub import HfApi; print(HfApi().repo_exists('me/out'))"
    assert place.run("-c", code, HF_TOKEN="").stdout.split() == ["False"]


def test_training_goes_on_from_a_pushed_model(place: Place, here: Hub) -> None:
    """Its card names the model it came from."""
    flags = "--model_name_or_path me/out --output_dir on --max_steps 1 --learning_rate 1e-2"
    train(*flags.split(), "--cache_dir", "cache")
    assert "base_model: me/out" in (place.folder / "on/README.md").read_text(encoding="utf-8")
    before, after = weights(place.folder / "out"), weights(place.folder / "on")
    assert before.keys() == after.keys()
    assert not all(value.equal(after[name]) for name, value in before.items())


def test_a_run_goes_on_from_a_pushed_checkpoint_bit_for_bit(place: Place, here: Hub) -> None:
    """The folder is called last-checkpoint, and lies where the run writes."""
    at_four = next(sha for sha, commit in here.repos["me/out"].commits.items() if commit.message.endswith("step 4"))
    snapshot_download("me/out", revision=at_four, local_dir="pulled")
    flags = ("--resume_from_checkpoint", "pulled/last-checkpoint", "--output_dir", "pulled")
    assert "resuming from pulled/last-checkpoint" in train(*RUN, *flags)
    assert_same_weights(place.folder / "pulled", place.folder / "out")
    assert_same_weights(place.folder / "pulled/jepa", place.folder / "out/jepa")


def test_all_checkpoints_can_be_pushed_to_a_branch(here: Hub) -> None:
    flags = "--output_dir all --push_to_hub --hub_strategy all_checkpoints --hub_always_push true --hub_revision trial"
    train(*RUN, *flags.split())
    assert {f"checkpoint-{step}/trainer_state.json" for step in (2, 4, 6)} <= set(here.repos["me/all"].files("trial"))
    assert here.repos["me/all"].history() == []


def test_features_load_by_name_with_their_code_where_it_is_trusted(place: Place, here: Hub) -> None:
    rows = "".join(f"{number % 7},{number % 5},{number % 3}\n" for number in range(40))
    Path("table.csv").write_text(f"a,b,c\n{rows}", encoding="utf-8")
    flags = "--train_file table.csv --objective features --output_dir table --max_steps 1 --push_to_hub"
    train(*flags.split(), "--config_overrides", "hidden_size=16,num_hidden_layers=1,num_attention_heads=2")
    code = """
import sys
sys.modules["jepa_hf"] = None  # importing it is an error
import torch
from transformers import AutoModel
try:
    AutoModel.from_pretrained("me/table")
except ValueError as error:
    print("refused" if "trust_remote_code" in str(error) else error)
model = AutoModel.from_pretrained("me/table", trust_remote_code=True)
print(tuple(model(features=torch.ones(2, 3)).pooler_output.shape))
"""
    assert place.python(code)[-3:] == ["refused", "(2,", "16)"]


def test_images_load_by_name(here: Hub) -> None:
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModel, ViTImageProcessor

    from helpers.batches import image_config

    AutoModel.from_config(image_config()).save_pretrained("vit")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained("vit")
    Path("pictures").mkdir()
    for number in range(8):
        Image.new("RGB", (8, 8), (number * 30, 0, 0)).save(f"pictures/{number}.png")
    train(
        *[
            "--model_name_or_path",
            "vit",
            "--train_file",
            "pictures",
            "--output_dir",
            "seen",
            "--max_steps",
            "1",
            "--push_to_hub",
        ]
    )
    assert AutoModel.from_pretrained("me/seen", cache_dir="cache").config.image_size == 8
    assert AutoImageProcessor.from_pretrained("me/seen", cache_dir="cache").size["height"] == 8


def test_nothing_that_is_shared_names_a_path(place: Place, here: Hub) -> None:
    """Not that of the model it started from, nor of the data, nor of the run."""
    data = write_lines(place.folder / "data.txt", CORPUS[:50])
    flags = ("--max_steps", "1", "--save_steps", "1", "--hub_strategy", "checkpoint", "--do_train", "--do_eval")
    start = ("--model_name_or_path", place.folder / "out", "--train_file", data)
    train(*start, *flags, "--output_dir", place.folder / "own", "--push_to_hub")
    files = here.repos["me/own"].files()
    assert "last-checkpoint/trainer_state.json" in files
    assert [name for name, content in files.items() if str(place.folder).encode() in content] == []


def test_a_hub_that_fails_in_the_middle_stops_no_run(
    here: Hub, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """All pushes fail: the run ends as it would have, says so with the command that repeats it, and returns 1."""
    here.faults = [Fault(COMMIT)]
    capfd.readouterr()
    assert run_jepa([*RUN, *QUIET, "--output_dir", "lost", "--push_to_hub", "--hub_always_push", "true"]) == 1
    output = capfd.readouterr().err
    assert_same_weights(Path("lost"), Path("out"))
    assert json.loads(Path("lost/_run.json").read_text(encoding="utf-8"))["finished"]
    sentence = "pushing to me/lost failed: the Hub answered 500, the Hub is unwell; the run goes on"
    assert [step for step in (2, 4, 6) if f"step {step}: {sentence}" not in caplog.text] == []
    assert output.splitlines()[-1] == (
        "run_jepa.py: error: pushing to me/lost failed: the Hub answered 500, the Hub is unwell. The result is in "
        "lost. This command repeats the push: jepa-hf push lost me/lost"
    )
    assert "Traceback" not in output
    here.faults = []
    assert main(["push", "lost", "me/lost"]) == 0
    assert here.repos["me/lost"].files()["model.safetensors"] == Path("lost/model.safetensors").read_bytes()


def test_a_hub_that_is_down_at_the_start_does_not_prevent_a_run(here: Hub, caplog: pytest.LogCaptureFixture) -> None:
    here.faults = [Fault("POST /api/repos/create", times=1)]
    train("--smoke_test", "--max_steps", "1", "--output_dir", "late", "--push_to_hub", "--hub_strategy", "end")
    assert "creating late failed: the Hub answered 500, the Hub is unwell; the run goes on" in caplog.text
    assert here.repos["me/late"].history() == ["End of training"]


def test_missing_permission_to_push_is_reported_before_the_run(here: Hub, capfd: pytest.CaptureFixture[str]) -> None:
    for name, sentence in (
        ("you/x", "the Hub answered 403, You don't have the rights"),
        ("a/b/c", "is not a valid name of a Hub repository"),
    ):
        capfd.readouterr()
        assert run_jepa([*RUN, *QUIET, "--output_dir", "never", "--push_to_hub", "--hub_model_id", name]) == 2
        output = capfd.readouterr().err
        assert output.count("run_jepa.py: error: ") == 1
        assert output.splitlines()[-1].startswith("run_jepa.py: error: ")
        assert sentence in output.splitlines()[-1]
        assert "Traceback" not in output
    assert not Path("never").exists()


def test_the_same_command_on_a_finished_run_names_the_push(here: Hub) -> None:
    output = train(*RUN, "--output_dir", "out", "--push_to_hub", "--hub_private_repo")
    assert output.strip().endswith("--overwrite_output_dir. Push it with jepa-hf push out out --private")


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["nothing", "me/x"], 2, "'nothing' is not a directory. Name the output_dir of a run"),
        (["out/1_Pooling", "me/x"], 2, "'out/1_Pooling' holds no trained encoder (config.json and"),
        (["out/checkpoint-6", "me/x"], 2, "'out/checkpoint-6' is a checkpoint or a full model"),
        (["out", "a/b/c"], 2, "'a/b/c' is not a valid name of a Hub repository; give user/name"),
        (["out", "me/x", "--commit_message", ""], 2, "commit_message is empty"),
        (["out", "me/x", "--priv"], 2, "unrecognized arguments: --priv"),
        (["out"], 2, "the following arguments are required: REPO"),
        (
            ["out", "you/x"],
            1,
            "The local files are unchanged. This command repeats the push: jepa-hf push out you/x",
        ),
        (["out", "me/x", "--token", "hf_wrongToken"], 1, "the Hub answered 401, Invalid credentials"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refusals_of_push_are_one_sentence(
    arguments: list[str], code: int, sentence: str, here: Hub, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    assert main(["push", *arguments]) == code
    output = capfd.readouterr().err
    assert output.startswith("jepa-hf push: error: ")
    assert output.count("\n") == 1
    assert sentence in output
    assert "hf_wrongToken" not in output
    assert "me/x" not in here.repos


def test_a_token_given_to_accelerate_s_launcher_is_in_no_command_line(place: Place) -> None:
    """Every process of this command reports its own token: only the first process holds it."""
    (place.folder / "spy").mkdir()
    spy = "import sys; print(open('/proc/self/cmdline').read().split(chr(0)), file=sys.stderr)"
    (place.folder / "spy/sitecustomize.py").write_text(spy, encoding="utf-8")
    token, config = place.hub.token, REPOSITORY / "configs/accelerate/cpu2.yaml"
    flags = ["--smoke_test", "--max_steps", "1", "--output_dir", "two", "--push_to_hub", "--hub_strategy", "end"]
    command = ["-m", "jepa_hf.cli", "train", "--accelerate_config", config, *flags, *QUIET, "--hub_token", token]
    path = os.pathsep.join((str(place.folder / "spy"), str(REPOSITORY)))
    output = place.run(*command, "--token", token, HF_TOKEN="", PYTHONPATH=path).stderr
    processes = [line for line in output.splitlines() if line.startswith("[") and "--push_to_hub" in line]
    assert len(processes) >= 3  # this command, which is the launcher, and two ranks
    assert [token in line for line in processes] == [True] + [False] * (len(processes) - 1)
    assert place.hub.repos["me/two"].history() == ["End of training"]


def test_two_tokens_do_not_fit_into_one_variable(capfd: pytest.CaptureFixture[str]) -> None:
    config = str(REPOSITORY / "configs/accelerate/cpu2.yaml")
    assert main(["train", "--accelerate_config", config, "--token", "hf_a", "--hub_token=hf_b"]) == 2
    output = capfd.readouterr().err
    assert "token and hub_token differ. With accelerate_config, give one for both." in output
    assert output.count("\n") == 1
