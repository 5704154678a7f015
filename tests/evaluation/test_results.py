"""Tests of the results: complete JSON, bold for the clearly best, cards keep other content."""

import json
import tempfile
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.evaluation import fake_evaluation
from jepa_hf import UsageError
from jepa_hf.evaluation.results import EVALUATION_END, EVALUATION_START, read_card, to_json, to_markdown, update_card
from jepa_hf.evaluation.scoring import Evaluation

CARD = """\
---
license: apache-2.0
tags:
- jepa
model-index:
- name: mine
  results:
  - task:
      type: text-classification
    dataset:
      type: glue
      name: GLUE
    metrics:
    - type: accuracy
      value: 0.5
      name: by someone else
---

# My model

Text with | pipes and <!-- a comment -->.
"""


def updated_card(content: str, found: Evaluation, model: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "README.md"
        path.write_bytes(content.encode())
        card = read_card(path)
    update_card(card, found, model)
    return str(card)


def rows(table: str) -> list[list[str]]:
    """The cells of the first Markdown table."""
    lines = table[table.index("| model") :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_json_has_every_score_with_its_settings_and_sizes() -> None:
    found = fake_evaluation(pooling=("mean", "cls"))
    content = json.loads(json.dumps(to_json(found, {"seed": 3}), allow_nan=False))
    assert content["settings"] == {"seed": 3}
    assert content["models"] == ["runs/a", "runs/b"]
    assert content["tasks"][0] == {
        "name": "topics",
        "source": "topics.csv",
        "kind": "labels",
        "modality": "text",
        "n_train": 60,
        "n_test": 60,
        "classes": 3,
    }
    assert len(content["scores"]) == len(found.scores) == 2 * 2 * (2 + 1 + 5)
    for entry, score in zip(content["scores"], found.scores, strict=True):
        assert (entry["model"], entry["pooling"], entry["task"], entry["metric"]) == (
            score.model,
            score.pooling,
            score.task,
            score.metric,
        )
        assert (entry["value"], entry["confidence_interval"]) == (
            score.score.value,
            [score.score.low, score.score.high],
        )
        assert ("difference_to_first_model" in entry) == (score.model == "runs/b")
        assert entry["n"] == 60
        assert ("C" in entry) == (score.metric == "linear_probe")
    assert len(content["health"]) == 12


def test_the_table_has_a_row_for_each_model_and_pooling() -> None:
    header, _, *lines = rows(to_markdown(fake_evaluation(pooling=("mean", "cls"))))
    assert header[:4] == ["model", "pooling", "topics, linear probe (n = 60)", "topics, kNN (n = 60)"]
    assert [line[:2] for line in lines] == [["a", "mean"], ["a", "cls"], ["b", "mean"], ["b", "cls"]]
    assert lines[0][2] == "30.0 [25.0, 35.0]"
    assert {len(line) for line in lines} == {len(header)}


@pytest.mark.parametrize(("gap", "bold"), [(0.2, True), (0.06, True), (0.04, False), (0.0, False)])
def test_bold_is_what_is_clearly_best(gap: float, bold: bool) -> None:
    """The best value's interval, 0.05 to either side, contains no other value."""
    _, _, first, second = rows(to_markdown(fake_evaluation(gap=gap)))
    assert all(cell.startswith("**") == bold for cell in second[2:])
    assert not any("**" in cell for cell in first)


def test_one_model_alone_is_neither_best_nor_compared() -> None:
    text = to_markdown(fake_evaluation(models=("runs/a",)))
    assert "**" not in text
    assert "Difference" not in text
    assert "Difference to a on the same samples" in to_markdown(fake_evaluation())
    assert "**+20.0** [+18.0, +22.0]" in to_markdown(fake_evaluation())


def test_a_card_gets_section_and_metadata_and_keeps_the_rest() -> None:
    found = fake_evaluation()
    content = updated_card(CARD, found, "runs/b")
    card = ModelCard(content)
    assert card.text.startswith(CARD.split("---\n", 2)[2].rstrip("\n"))
    assert to_markdown(found) in card.text
    metadata = yaml.safe_load(content.split("---\n", 2)[1])
    before = yaml.safe_load(CARD.split("---\n", 2)[1])
    assert {name: metadata[name] for name in before if name != "model-index"} == {
        "license": "apache-2.0",
        "tags": ["jepa"],
    }
    assert card.data.model_name == "mine"
    others = [result for result in card.data.eval_results if result.metric_name == "by someone else"]
    ours = [result for result in card.data.eval_results if result.metric_name != "by someone else"]
    assert len(others) == 1
    assert others[0].metric_value == 0.5
    assert {(r.dataset_name, r.metric_type, r.metric_value) for r in ours} == {
        ("topics", "accuracy", 0.5),
        ("pairs", "spearmanr", 0.5),
        *(
            ("answers", f"{metric}", 0.5)
            for metric in ("recall_at_1", "recall_at_5", "recall_at_10", "ndcg_at_10", "mrr_at_10")
        ),
    }
    assert len(ours) == 8


def test_a_later_evaluation_replaces_an_earlier_one() -> None:
    once = updated_card(CARD, fake_evaluation(gap=0.1, pooling=("mean", "cls")), "runs/b")
    once += "\nWritten below it.\n"
    again = updated_card(once, fake_evaluation(tasks=("pairs",)), "runs/b")
    assert again.count(EVALUATION_START) == again.count(EVALUATION_END) == 1
    assert "Written below it." in again
    assert "topics" not in again
    assert updated_card(again, fake_evaluation(tasks=("pairs",)), "runs/b") == again
    results = ModelCard(again).data.eval_results
    assert [result.metric_name for result in results] == [
        "by someone else",
        "Spearman, mean pooling (jepa-hf evaluate)",
    ]


@given(text=st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), max_size=60))
@settings(max_examples=30, deadline=None)
def test_any_text_of_a_card_survives(text: str) -> None:
    body = f"# Title\n\n{text}\n\nThe end."
    content = updated_card(body, fake_evaluation(tasks=("pairs",)), "runs/a")
    assert ModelCard(content).text.strip().startswith(body)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (f"{CARD}{EVALUATION_START}", "Expected one .* in card .* Fix or delete them"),
        (f"{CARD}{EVALUATION_END}{EVALUATION_START}", "Expected one"),
        ("---\n- a list\n---\nText", "has damaged metadata"),
        ("---\na: [\n---\nText", "has damaged metadata"),
    ],
)
def test_a_damaged_card_is_one_sentence(content: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence) as refusal:
        updated_card(content, fake_evaluation(), "runs/a")
    assert "\n" not in str(refusal.value)


def test_line_ends_stay(tmp_path: Path) -> None:
    content = updated_card(CARD.replace("\n", "\r\n"), fake_evaluation(), "runs/a")
    assert "# My model\r\n\r\nText with" in content
