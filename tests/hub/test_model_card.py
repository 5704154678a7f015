"""Model cards have the values of their run, intact tables and valid metadata."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from huggingface_hub.utils import get_session
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from helpers.cli import train
from helpers.evaluation import fake_evaluation
from helpers.fake_hub import Hub
from helpers.tiny_models import CORPUS, save_tiny_encoder, write_lines
from jepa_hf import JepaConfig
from jepa_hf.evaluation.results import update_card
from jepa_hf.hub.model_card import CITATIONS, DatasetInfo, ModelCardInfo, rename_card, render_card
from jepa_hf.utils.markdown import single_line

from ..utils.test_markdown import NASTY


def facts(**changes: Any) -> ModelCardInfo:
    values: dict[str, Any] = {
        "name": "me/model",
        "modality": "text",
        "family": "bert",
        "parameters": 1_234_567,
        "version": "0.1",
        "training": {"steps": 1500, "learning rate": 2e-5, "views": "drop"},
        "metrics": {"top1 accuracy": (0.01, 0.5), "rank": (None, 31.25), "probe linear": (0.5, 0.75)},
        "rows": 1000,
        "data_statistics": {"tokens read": 12345},
        "data": DatasetInfo("data.txt", "test.txt", "topics.csv"),
    }
    return ModelCardInfo(**{**values, **changes})


def metadata_of(card: Any) -> dict[str, Any]:
    return yaml.safe_load(re.match("---\n(.*?)\n---\n", str(card), re.DOTALL).group(1))


def tables(text: str) -> list[list[list[str]]]:
    """Return the tables of a Markdown text, as rows of cells."""
    actual: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            actual[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        elif actual[-1]:
            actual.append([])
    return [table for table in actual if table]


def test_metadata() -> None:
    """The metadata has all fields that the Hub reads."""
    names = DatasetInfo("org/data", datasets=["org/data"])
    metadata = metadata_of(render_card(facts(base_model="org/base", data=names, language="en", license="mit")))
    assert metadata["base_model"] == "org/base"
    assert metadata["datasets"] == ["org/data"]
    assert (metadata["language"], metadata["license"]) == ("en", "mit")
    assert metadata["library_name"] == "transformers"
    assert metadata["pipeline_tag"] == "feature-extraction"
    assert {"jepa", "sentence-transformers"} <= set(metadata["tags"])


def test_metadata_omits_unknown_values() -> None:
    """Unknown values have no key."""
    metadata = metadata_of(render_card(facts(metrics={})))
    assert not {"model-index", "base_model", "datasets", "language", "license"} & set(metadata)


def test_tables_hold_the_values() -> None:
    """The three tables hold the formatted values."""
    data, training, results = tables(str(render_card(facts())))
    header = [["setting", "value"], ["---", "---"]]
    names = [["evaluated on", "test.txt"], ["probed on", "topics.csv"]]
    assert data == [*header, ["data", "data.txt"], ["rows", "1,000"], ["tokens read", "12,345"], *names]
    assert training == [*header, ["steps", "1,500"], ["learning rate", "2e-05"], ["views", "drop"]]
    assert results[2:] == [["top1 accuracy", "0.01", "0.5"], ["rank", "", "31.25"], ["probe linear", "0.5", "0.75"]]


def test_evaluation_metadata() -> None:
    """The Hub's client reads the evaluation; losses and NaN are left out."""
    metrics = {**facts().metrics, "prediction loss": (None, 1.0), "spread": (None, float("nan"))}
    name, results = model_index_to_eval_results(metadata_of(render_card(facts(metrics=metrics)))["model-index"])
    assert name == "model"
    assert [(result.dataset_name, result.metric_type, result.metric_value) for result in results] == [
        ("test.txt", "top1_accuracy", 0.5),
        ("test.txt", "rank", 31.25),
        ("topics.csv", "probe_linear", 0.75),
    ]


def test_hub_accepts_all_modalities() -> None:
    """`ModelCard.validate` passes on a fake Hub that reads the card as the client does."""
    with Hub() as hub, hub.use_in_process():
        for modality in ("text", "images", "features"):
            card = render_card(facts(modality=modality, base_model="org/base"))
            card.validate()
            assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()
        assert len(hub.asked("POST /api/validate-yaml")) == 3
        damaged = {"content": "---\nmodel-index: 3\n---\n", "repoType": "model"}
        assert get_session().post(f"{hub.url}/api/validate-yaml", json=damaged).status_code == 400


def test_card_without_evaluation() -> None:
    """The card states that no evaluation was run."""
    card = str(render_card(facts(metrics={})))
    assert len(tables(card)) == 2
    assert "No evaluation was run." in card


READER = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def card_path(text: str) -> ModelCard:
    """Return a card with the text in every field."""
    return render_card(
        facts(
            name=f"me/x{text}",
            family=text,
            base_name=f"x{text}",
            base_model=text if len(text) % 2 else None,
            license=f"x{text}",
            language=f"x{text}",
            training={f"x{text}": text, "last": text},
            metrics={f"x{text}y": (1.0, 2.0)},
            data_statistics={f"y{text}": f"x{text}"},
            data=DatasetInfo(f"x{text}", f"x{text}", f"x{text}", [f"x{text}"]),
            health_findings=[f"x{text}", f"y{text}"],
        )
    )


HARMLESS = {parity: card_path("a" * (2 - parity)) for parity in (0, 1)}


@given(NASTY.filter(single_line))
@settings(max_examples=60, deadline=None)
def test_text_cannot_become_markup(text: str) -> None:
    """Arbitrary text in all fields gives the same headings, tables, code and links, no tag, and valid metadata."""
    nasty, harmless = card_path(text), HARMLESS[len(text) % 2]
    assert kinds(nasty.text) == kinds(harmless.text)
    for code in re.findall(r"```python\n(.*?)```", nasty.text, flags=re.DOTALL):
        compile(code, "card", "exec")
    actual, expected = metadata_of(nasty), metadata_of(harmless)
    assert actual.keys() == expected.keys()
    for name in ("library_name", "pipeline_tag", "tags"):
        assert actual[name] == expected[name]
    assert actual["license"] == actual["language"] == actual["datasets"][0] == single_line(f"x{text}")
    (result,) = model_index_to_eval_results(actual["model-index"])[1]
    assert (result.dataset_name, result.metric_value) == (single_line(f"x{text}"), 2.0)
    assert str(nasty).encode().decode() == str(nasty)


def kinds(text: str) -> list[str]:
    """Return the types of the blocks of a Markdown text, and of the markup inside them."""
    actual = []
    for token in READER.parse(text):
        actual.append(token.type)
        actual += [child.type for child in token.children or () if child.type not in ("text", "text_special")]
    return actual


@settings(max_examples=40, deadline=None)
@given(old=NASTY, new=st.from_regex(r"[a-z]{1,5}/[a-zA-Z0-9][a-zA-Z0-9._-]{0,8}", fullmatch=True))
def test_renamed_card(old: str, new: str) -> None:
    """Code and title have the new name; all other lines are unchanged."""
    card = str(render_card(facts(name=f"out/x{old}")))
    renamed = rename_card(card, new)
    assert renamed.count(f'("{new}"') == 4
    assert len(renamed.splitlines()) == len(card.splitlines())
    changed = [line for line, before in zip(renamed.splitlines(), card.splitlines(), strict=True) if line != before]
    assert len(changed) <= 5


def test_foreign_card_is_not_renamed() -> None:
    """A card without loading code is unchanged."""
    assert rename_card("# Mine\n\nNo code.", "me/x") == "# Mine\n\nNo code."


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (lambda: JepaConfig.for_images(), {"jepa", "i-jepa"}),
        (lambda: JepaConfig.for_features(3), {"jepa"}),
        (lambda: JepaConfig.for_features(3, average_top_k_layers=2), {"jepa", "data2vec"}),
        (lambda: JepaConfig.for_features(3, variance_weight=1.0), {"jepa", "vicreg"}),
        (lambda: JepaConfig.for_features(3, sigreg_weight=1.0), {"jepa", "lejepa"}),
        (lambda: JepaConfig.for_features(3, contrastive_weight=1.0), {"jepa", "cpc"}),
    ],
)
def test_citations(config: Any, expected: set[str]) -> None:
    """Only the methods that a run used are cited."""
    from jepa_hf.models.encoder_adapters import encoder_adapter_for
    from jepa_hf.training.model_card_info import citations

    built = config()
    used = citations(built, encoder_adapter_for(built.encoder_config).modality)
    assert set(used) == expected
    card = str(render_card(facts(citations=used)))
    assert {key for key, entry in CITATIONS.items() if entry in card} == expected


@pytest.mark.parametrize("name", ["me/model", "out", "out/", "/some/where/out"])
def test_title_is_the_last_part_of_the_name(name: str) -> None:
    """Repository and folder names are shortened to their last part."""
    title = re.search("^# (.*)$", str(render_card(facts(name=name))), flags=re.MULTILINE)
    assert title is not None
    assert title.group(1) == name.rstrip("/").split("/")[-1]


def test_card_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The card of a real run has its values and no path of this machine."""
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
    assert re.search(r"A text encoder \(bert, \d+ K parameters\)", text)
    assert re.search(r"Trained with `jepa_hf` \d+\.\d+", text)
    assert text.count('from_pretrained("out"') == 3
    assert "Training started from the local model base." in text
    expected = {
        "steps": "3",
        "samples per step": "8",
        "learning rate": r"0\.001, linear",
        "weight decay": "0",
        "objective": r"smooth_l1, targets: the last layer, layer norm, prediction_weight 5\.657, "
        r"mlm_weight 0\.5, contrastive_weight 1",
        "views": r"masked positions replaced, mask ratio 0\.3, mean span length 5\.0",
        "predictor": "mlp",
        "EMA decay": r"0\.9 to 0\.9, linear",
        "precision": "float32",
        "hardware": r"1 x CPU \(\w+\), \d+ threads? each",
        "exported encoder": r"target \(EMA: 73 % of the start, the rest an average along the run\)",  # 0.9³
        "seconds": r"\d+(\.\d+)?",
        "seed": "42",
        "pooler": ".+",
    }
    data, training, results = tables(text)
    seen: dict[str, str] = dict(data[2:])
    assert (seen.pop("data"), seen.pop("rows")) == ("data.txt", "190")
    assert seen.pop("evaluated on") == "data.txt, held-out rows"
    assert re.fullmatch(r"[\d,]{3,}", seen.pop("tokens read"))
    assert re.fullmatch(r"0\.\d+", seen.pop("epochs"))
    assert seen == {}
    actual: dict[str, str] = dict(training[2:])
    assert actual.keys() == expected.keys()
    assert [name for name, pattern in expected.items() if not re.fullmatch(pattern, actual[name])] == [], actual
    assert {"loss", "prediction loss", "constant baseline loss", "top1 accuracy", "target rank"} <= {
        r[0] for r in results
    }
    assert "position baseline loss" in {r[0] for r in results}
    for name, start, end in results[2:]:
        assert re.fullmatch(r"-?\d+(\.\d+)?(e-?\d+)?", start), name
        assert re.fullmatch(r"-?\d+(\.\d+)?(e-?\d+)?", end), name
    assert not re.search(r"\b(None|nan|TODO)\b|\[More", text)
    _, evaluated = model_index_to_eval_results(card.data.to_dict()["model-index"])
    assert {"top1_accuracy", "target_rank", "context_rank"} <= {result.metric_type for result in evaluated}
    assert "![loss and health over the run](training.png)" in text
    assert Path("out/training.png").is_file()


def test_watchdog_paragraph() -> None:
    """Each warning is listed; so is their absence; without measurements there is no paragraph."""
    assert "- step 40: total collapse: the targets" in str(
        render_card(facts(health_findings=["step 40: total collapse: the targets"]))
    )
    assert "detected no collapse" in str(render_card(facts(health_findings=[])))
    assert "collapse and" not in str(render_card(facts(health_findings=None)))
    assert "<script>" not in str(render_card(facts(health_findings=["<script>"])))


def test_evaluation_section_is_inserted() -> None:
    """It follows the results; the run's own metadata are kept."""
    card = render_card(facts())
    update_card(card, fake_evaluation(models=("me/model",)), "me/model")
    sections = re.findall("^## (.*)$", card.text, flags=re.MULTILINE)
    assert sections[3:6] == ["Results", "Evaluation of the frozen representations", "Limitations"]
    kinds_of = {result.metric_type for result in ModelCard(str(card)).data.eval_results}
    assert {"top1_accuracy", "probe_linear", "accuracy", "spearmanr", "recall_at_1"} <= kinds_of
