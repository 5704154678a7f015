"""The claim that the documentation is true: its code runs, prints what it shows, and names only what there is."""

import functools
import io
import re
import shutil
from contextlib import chdir, redirect_stdout, suppress
from pathlib import Path

import numpy as np
import pytest
from accelerate.commands.launch import launch_command_parser
from PIL import Image
from torch.distributed.run import get_args_parser

import jepa_hf
from helpers.cli import REPOSITORY
from helpers.llm import model, tokenizer
from helpers.processes import forked_python
from helpers.scripts import load_script
from helpers.tiny_models import CORPUS, save_tiny_encoder, write_lines
from jepa_hf.cli.llm_arguments import LLM_CLASSES
from jepa_hf.cli.main import main
from jepa_hf.cli.parsing import _CLASSES, _field_names, _Parser

DOCS = REPOSITORY / "docs"
PAGES = sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))


RUNNER = load_script(DOCS / "run_tutorial.py")


def text(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory that is the working one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def reader_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the short examples use."""
    place = tmp_path_factory.mktemp("reader")
    with chdir(place):
        save_tiny_encoder("bert", "my-bert", head="mlm")
        words = tokenizer()
        words.save_pretrained("my-llm")
        model(len(words)).save_pretrained("my-llm")
        write_lines("data.txt", CORPUS)
        rows = [f'"{sentence}",{number % 2}' for number, sentence in enumerate(CORPUS[:80])]
        write_lines("topics.csv", ["text,label", *rows])
        write_lines("pairs.csv", ["query,document", *(f'"{text[:12]}","{text[12:]}"' for text in CORPUS[:20])])
        random = np.random.default_rng(0)
        Path("my-images").mkdir()
        for number in range(12):
            Image.fromarray(random.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(f"my-images/{number}.png")
        vectors = [",".join(f"{value:.3f}" for value in row) for row in random.normal(size=(60, 16))]
        write_lines("table.csv", [",".join([*(f"f{n}" for n in range(16)), "label"]), *(f"{row},0" for row in vectors)])
        jepa_hf.pretrain(model="my-bert", train_file="data.txt", output_dir="my-encoder", max_steps=1, use_cpu=True)
    return place


def assert_prints_what_it_shows(page: str, folder: Path) -> None:
    """Every block that is shown with an output prints it."""
    printed = RUNNER.run_page(page, folder)
    shown = [(block.output, message) for block, message in zip(RUNNER.blocks(page), printed, strict=True)]
    wrong = [pair for output, message in shown if output is not None for pair in RUNNER.differences(output, message)]
    assert wrong == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_tutorial_runs_from_top_to_bottom(folder: Path) -> None:
    """In an empty directory, without a network, all its blocks run in order and print the page's outputs."""
    with forked_python():
        assert_prints_what_it_shows(text("tutorial.md"), folder)


@pytest.mark.parametrize("page", [page for page in PAGES if page != "tutorial.md" and "```python\n" in text(page)])
@pytest.mark.slow
def test_short_examples_run(page: str, folder: Path, reader_files: Path) -> None:
    """The examples of a page run in order, with fewer steps, in a directory with a reader's files."""
    shutil.copytree(reader_files, folder, dirs_exist_ok=True)
    if 'output_dir="my-encoder"' in text(page):
        Path("my-encoder").rename("before")
    assert_prints_what_it_shows(text(page).replace("max_steps=1000", "max_steps=2"), folder)


@pytest.mark.parametrize("page", PAGES)
def test_only_what_exists_is_named(page: str) -> None:
    """Flags are a command's, and paths into the repository lead to files."""
    shown = re.sub(r"^#SBATCH .*|scancel --signal", "", text(page), flags=re.MULTILINE)
    named = set(re.findall(r"--[a-z][a-z0-9_]+", shown))
    if page == "reference/span-jepa-article.md":
        named -= set(re.findall(r"--[a-z0-9_]+", "".join(re.findall(r"^\| (`--[^|]+)\|", text(page), re.MULTILINE))))
    assert named - known_flags() == set()
    for path in re.findall(r"(?:configs|benchmarks|docs|tests)/[\w./-]+\.(?:yaml|md|png|svg|py)", text(page)):
        assert (REPOSITORY / path).is_file(), path


@functools.cache
def known_flags() -> set[str]:
    """Return the flags of training, of the other commands, of docs/ scripts and of tools that the pages name."""
    known = {f"--{name}" for name in (*_field_names(_Parser(_CLASSES)), *_field_names(_Parser(LLM_CLASSES)))}
    known |= set(re.findall(r"--[a-z_]+", helps()))
    known |= {"--write", "--runs"}  # of the scripts in docs/
    for launcher in (launch_command_parser(), get_args_parser()):  # `accelerate launch` and torchrun
        known |= {flag for action in launcher._actions for flag in action.option_strings}
    known |= {"--strict", "--repository"}  # of mkdocs and twine
    return known


@functools.cache
def helps() -> str:
    """What `jepa-hf --help` and each command's `--help` say, but train's, whose flags are known by name."""
    message = io.StringIO()
    with redirect_stdout(message):
        main(["--help"])
        for command in re.findall(r"^  (\w+) ", message.getvalue(), re.MULTILINE):
            if command != "train":
                with suppress(SystemExit):
                    main([command, "--help"])
    return message.getvalue()


def test_training_by_hand_is_short() -> None:
    """The example with each part in view has at most ten statements and their imports."""
    (by_hand,) = [block.code for block in RUNNER.blocks(text("how-to/text.md")) if "JepaTrainer(" in block.code]
    assert len([line for line in by_hand.splitlines() if line and not line.startswith(("from", "import"))]) <= 10


@pytest.mark.slow
def test_a_short_run_logs_the_documented_keys(folder: Path) -> None:
    """Every key of a run on text, with all terms of the loss, is on the page, and the page's keys are logged."""
    weights = ("mlm", "variance", "covariance", "sigreg", "contrastive")
    trainer = jepa_hf.pretrain(
        smoke_test=True,
        max_steps=2,
        logging_steps=1,
        do_eval=True,
        eval_strategy="steps",
        eval_steps=2,
        output_dir="out",
        use_cpu=True,
        report_to="none",
        **{f"{name}_weight": 0.1 for name in weights},
    )
    logged = {key for entry in trainer.state.log_history for key in entry if not key.startswith(("eval_", "train_"))}
    tables = text("reference/log-keys.md").split("## Evaluation")[0]
    documented = {
        key for row in re.findall(r"^\| (`[^|]+)\|", tables, re.MULTILINE) for key in re.findall(r"`(\w+)`", row)
    }
    assert logged - {"total_flos"} == documented


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    """Every link and picture of a page is a file of the repository, and every heading it names is there."""
    place = (DOCS / page).parent
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", text(page)):
        file = (place / target) if target else DOCS / page
        assert file.is_file(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings]
            assert anchor in slugs, anchor


def test_every_public_name_is_in_the_reference() -> None:
    """What the package exports has an entry."""
    entries = {name for page in PAGES for name in re.findall(r"^::: jepa_hf\.(\w+)$", text(page), re.MULTILINE)}
    assert set(jepa_hf.__all__) - {"__version__"} <= entries


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("12 rows of 0.51", "12 rows of 0.55", True),
        ("12 rows of 0.51", "12 rows of 0.91", False),
        ("12 rows", "13 rows", False),
        ("5,771 texts", "5,800 texts", True),
        ("5,771 texts", "6,800 texts", False),
        ("torch.Size([2, 8, 96])", "torch.Size([2, 8, 64])", False),
        ("one line", "one line\nand another", False),
    ],
)
def test_the_comparison_fails_for_other_outputs(shown: str, printed: str, same: bool) -> None:
    """What counts as another output, and what as another processor."""
    assert (list(RUNNER.differences(shown, printed)) == []) == same


def test_a_failing_block_raises(folder: Path) -> None:
    """An exception in Python, and any failing command in bash, ends the run."""
    with pytest.raises(ZeroDivisionError):
        RUNNER.run_page("```python\n1 / 0\n```\n", folder)
    with pytest.raises(RUNNER.subprocess.CalledProcessError):
        RUNNER.run_page("```bash\nfalse\ntrue\n```\n", folder)


def test_a_block_may_be_left_out_with_a_reason() -> None:
    """And only with one."""
    assert RUNNER.blocks("<!-- not run: it needs the Hub -->\n```python\n1 / 0\n```\n") == []
    assert len(RUNNER.blocks("<!-- not run -->\n```python\n1 / 0\n```\n")) == 1
    left_out = sum(len(re.findall("<!-- not run", text(page))) for page in PAGES)
    assert left_out <= 3
