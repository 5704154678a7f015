"""Claims about the model card: real values everywhere, tables that hold together, metadata that parses."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import train
from huggingface_hub import ModelCard
from tiny import CORPUS, save_tiny_encoder, write_lines

from jepa_hf.model_card import CardFacts, render_card

NASTY = 'a|b <script>"x"</script> `c`\nnext'


def facts(**changes: Any) -> CardFacts:
    values: dict[str, Any] = {
        "name": "me/model",
        "modality": "text",
        "family": "bert",
        "parameters": 1_234_567,
        "version": "0.1",
        "training": {"steps": 1500, "learning rate": 2e-5, "views": "dropped"},
        "metrics": {"hit rate": (0.01, 0.5), "rank": (None, 31.25)},
    }
    return CardFacts(**{**values, **changes})


def tables(text: str) -> list[list[list[str]]]:
    """Tables as a Markdown reader cuts them: rows of cells."""
    found: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        elif found[-1]:
            found.append([])
    return [table for table in found if table]


def test_metadata_parses_and_says_what_the_hub_needs() -> None:
    card = str(render_card(facts(base_model="org/base", datasets=["org/data"], language="en", license="mit")))
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["base_model"] == "org/base"
    assert metadata["datasets"] == ["org/data"]
    assert (metadata["language"], metadata["license"]) == ("en", "mit")
    assert metadata["library_name"] == "transformers"
    assert metadata["pipeline_tag"] == "feature-extraction"
    assert {"jepa", "sentence-transformers"} <= set(metadata["tags"])


def test_what_is_not_known_is_left_out_of_the_metadata() -> None:
    metadata = yaml.safe_load(str(render_card(facts())).split("---")[1])
    assert not {"base_model", "datasets", "language", "license"} & set(metadata)


def test_tables_hold_the_values() -> None:
    training, results = tables(str(render_card(facts())))
    header = [["setting", "value"], ["---", "---"]]
    assert training == [*header, ["steps", "1,500"], ["learning rate", "2e-05"], ["views", "dropped"]]
    assert results[2:] == [["hit rate", "0.01", "0.5"], ["rank", "", "31.25"]]


def test_no_evaluation_is_said() -> None:
    card = str(render_card(facts(metrics={})))
    assert len(tables(card)) == 1
    assert "No evaluation was run." in card


def test_no_text_breaks_out_of_its_place() -> None:
    card = str(render_card(facts(name=f"me/{NASTY}", family=NASTY, training={NASTY: NASTY}, metrics={NASTY: (1, 2)})))
    training, results = tables(card)
    assert [len(row) for row in training] == [2] * 3
    assert [len(row) for row in results] == [3] * 3
    body = card.split("---", 2)[2]
    assert "<" not in body
    assert body.count("```") == 6  # three blocks of code, still closed
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "transformers"
    for code in re.findall(r"```python\n(.*?)```", body, flags=re.DOTALL):
        compile(code, "card", "exec")


@pytest.mark.parametrize("name", ["me/model", "out", "out/", "/some/where/out"])
def test_the_title_is_the_last_part_of_the_name(name: str) -> None:
    title = re.search("^# (.*)$", str(render_card(facts(name=name))), flags=re.MULTILINE)
    assert title is not None
    assert title.group(1) == name.rstrip("/").split("/")[-1]


def test_the_card_of_a_run_is_filled_with_its_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = save_tiny_encoder("bert", tmp_path / "base")
    write_lines("data.txt", CORPUS)
    flags = "--train_file data.txt --output_dir out --max_steps 3 --do_eval --eval_on_start --learning_rate 1e-3"
    train("--model_name_or_path", base, *flags.split(), "--ema_decay", "0.9", "--mlm_weight", "0.5")
    text = Path("out/README.md").read_text(encoding="utf-8")
    assert str(tmp_path) not in text  # nobody else has that directory
    card = ModelCard(text)
    assert card.data.base_model is None
    assert re.search(r"^# out$", text, flags=re.MULTILINE)
    assert re.search(r"A text encoder \(bert, \d+\.\d M parameters\)", text)
    assert re.search(r"Trained with `jepa_hf` \d+\.\d+", text)
    assert text.count('from_pretrained("out"') == 3
    expected = {
        "steps": "3",
        "tokens read": r"[\d,]{3,}",
        "samples per step": "8",
        "learning rate": r"0\.001",
        "objective": r"smooth_l1, targets: mean of the top 1 layers, layer norm, mlm_weight 0\.5",
        "views": r"masked positions dropped, mask ratio 0\.3, mean span length 5\.0",
        "predictor": "transformer",
        "EMA decay": r"0\.9 to 0\.9, linear",
        "seed": "42",
    }
    training, results = tables(text)
    found: dict[str, str] = dict(training[2:])
    assert found.keys() == expected.keys()
    assert [name for name, pattern in expected.items() if not re.fullmatch(pattern, found[name])] == [], found
    assert {"loss", "prediction loss", "constant prediction loss", "hit rate", "target rank"} <= {r[0] for r in results}
    for name, start, end in results[2:]:
        assert re.fullmatch(r"-?\d+(\.\d+)?(e-?\d+)?", start), name
        assert re.fullmatch(r"-?\d+(\.\d+)?(e-?\d+)?", end), name
    assert not re.search(r"\b(None|nan|TODO)\b|\{|\[More", text)
    assert "![loss and health over the run](training.png)" in text
    assert Path("out/training.png").is_file()


def test_the_card_tells_what_the_watchdog_said() -> None:
    """Each finding; that there was none; and nothing where nothing was measured."""
    assert "- step 40: total collapse: the targets" in str(
        render_card(facts(found=["step 40: total collapse: the targets"]))
    )
    assert "showed no collapse and no divergence" in str(render_card(facts(found=[])))
    assert "collapse and" not in str(render_card(facts(found=None)))
    assert "<script>" not in str(render_card(facts(found=["<script>"])))
