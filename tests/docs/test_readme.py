"""What the README says is true."""

import re
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from helpers.llm import model, tokenizer
from helpers.tiny_models import CORPUS, save_tiny_encoder, write_lines
from jepa_hf.cli.embed import _parser as embed_parser
from jepa_hf.cli.evaluate import _parser as evaluate_parser
from jepa_hf.cli.generate import _parser as generate_parser
from jepa_hf.cli.parsing import _CLASSES, _names, _Parser
from jepa_hf.cli.push import _parser as push_parser
from jepa_hf.cli.train_llm import LLM_CLASSES

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def test_two_commands_do_all_the_set_up() -> None:
    """There are exactly two commands, of one line each: install and run, install and test."""
    first, second = blocks("bash")
    assert first.count("\n") == second.count("\n") == 1
    assert first.startswith("pip install -e . && python run_jepa.py configs/quickstart.yaml")
    assert second.startswith('pip install -e ".[test]" && pytest')


def test_python_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The examples train from the reader's own model and text, by one call and by hand, and load the result."""
    monkeypatch.chdir(tmp_path)
    save_tiny_encoder("bert", "my-bert", head="mlm")
    words = tokenizer()
    words.save_pretrained("my-llm")
    model(len(words)).save_pretrained("my-llm")
    write_lines("data.txt", CORPUS)
    python = [block.replace("max_steps=1000", "max_steps=2") for block in blocks("python")]
    one_call, by_hand, paired_views, loading = python
    scope: dict[str, object] = {}
    exec(one_call, scope)
    assert scope["trainer"].state.global_step == 2
    Path("my-encoder").rename("one-call")
    # Ten statements and their imports; a line that goes on counts once.
    assert len([line for line in by_hand.splitlines() if line and not line.startswith(("from", "import"))]) <= 10
    exec(by_hand, scope)
    assert scope["trainer"].state.global_step == 2
    exec(paired_views, scope)
    assert scope["trainer"].state.global_step == 2
    assert AutoModelForCausalLM.from_pretrained("my-regex-model").can_generate()
    exec(loading, scope)
    assert scope["sentences"].shape == (2, 32)
    assert len(scope["features"]("A text.")[0][0]) == 32


def test_every_flag_exists() -> None:
    """Each `--flag` of the README is one of run_jepa.py, jepa-hf, accelerate, or the article's script."""
    known = {f"--{name}" for name in (*_names(_Parser(_CLASSES)), *_names(_Parser(LLM_CLASSES)))}
    known |= {"--help", "--accelerate_config", "--config_file", "--encoder", "--head", "--custom_code", "--picture"}
    for parser in (evaluate_parser(), embed_parser(), push_parser(), generate_parser()):
        known |= {flag for action in parser._actions for flag in action.option_strings}
    table = README.split("## From the article's script")[1].split("## Results")[0]
    script = {flag for line in table.splitlines() if line.startswith("| `") for flag in flags(line.split("|")[1])}
    assert flags(README) - known <= script


def flags(text: str) -> set[str]:
    return set(re.findall(r"--[a-z0-9_]+", text))


def test_every_file_it_names_is_there() -> None:
    """Paths into the repository exist."""
    for path in re.findall(r"(?:configs|benchmarks|docs|tests|\.ci)/[\w./-]+\.(?:yaml|md|png|sh|txt)", README):
        assert (Path(__file__).parents[2] / path).is_file(), path
