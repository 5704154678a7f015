"""Short runs to report on, and the text of a page."""

import csv
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from helpers.cli import train
from helpers.tiny_models import CORPUS
from jepa_hf.monitoring.health import is_measurement

MALICIOUS_TEXT = '<script>alert("x")</script> & $body'
_SIZES = "hidden_size=16,num_hidden_layers=1,num_attention_heads=2"
_RUN = ("--do_eval", "--eval_on_start", "--eval_strategy", "steps", "--eval_steps", "2", "--max_steps", "4")
_RUN += ("--logging_steps", "1", "--save_steps", "2", "--per_device_train_batch_size", "4")


def text_run(folder: Path) -> Path:
    """A run on texts with labels, some of them nasty."""
    data = folder / "texts.csv"
    with data.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for number, text in enumerate(CORPUS[:40]):
            writer.writerow(
                [f"{MALICIOUS_TEXT} {text}" if number % 3 else text, MALICIOUS_TEXT if number % 2 else "plain"]
            )
    model = ("--model_type", "bert", "--tokenizer_vocab_size", "300")
    sizes = f"{_SIZES},intermediate_size=32,max_position_embeddings=64"
    start = (*model, "--config_overrides", sizes, "--train_file", data)
    train(*start, "--output_dir", folder / "text", *_RUN, pictures=True)
    return folder / "text"


def image_run(folder: Path) -> Path:
    """A run on a folder of two classes of images."""
    rng = np.random.default_rng(0)
    for number in range(60):
        place = folder / "pictures" / f"class {number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(place / f"{number}.png")
    sizes = f"{_SIZES},intermediate_size=32,image_size=16,patch_size=4"
    model = ("--model_type", "ijepa", "--config_overrides", sizes)
    train(*model, "--train_file", folder / "pictures", "--output_dir", folder / "images", *_RUN, pictures=True)
    return folder / "images"


def feature_run(folder: Path) -> Path:
    """A run on a table with labels and a column of a nasty name."""
    data = folder / "table.csv"
    rng = np.random.default_rng(0)
    with data.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([MALICIOUS_TEXT, "b", "c", "d", "label"])
        writer.writerows([[*rng.normal(size=4).tolist(), number % 3] for number in range(30)])
    model = ("--model_type", "feature_encoder", "--config_overrides", f"{_SIZES},patch_size=1")
    columns = ("--feature_column_names", f"{MALICIOUS_TEXT},b,c,d")
    train(*model, "--train_file", data, *columns, "--output_dir", folder / "features", *_RUN, pictures=True)
    return folder / "features"


def collapse(run: Path) -> None:
    """Rewrite what a run logged into the history of a collapse."""
    metrics = json.loads((run / "metrics.json").read_text())
    last = [entry for entry in metrics["history"] if is_measurement(entry)][-1]
    for whose in ("target", "context"):
        last |= {
            f"health_{whose}_rank": 1.2,
            f"health_{whose}_pairwise_cosine": 0.9999,
            f"health_{whose}_normalized_std": 0.001,
        }
    (run / "metrics.json").write_text(json.dumps(metrics))


class Page(HTMLParser):
    """The content of a page, whose tags must be closed.

    Args:
        source: the page as it is.
        text: all that a reader reads.
        tags: of every element.
        images: address and description of each.
        references: all addresses, of images, links, styles, scripts.
    """

    _VOID = ("meta", "img", "br", "link", "input", "hr")

    def __init__(self, path: Path):
        super().__init__()
        self.text, self.tags, self.images, self.references = "", [], [], []
        self._open: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values: dict[str, Any] = dict(attrs)
        self.tags.append(tag)
        self.references += [values[name] for name in ("src", "href", "data", "action") if name in values]
        if tag == "img":
            self.images.append((values["src"], values["alt"]))
        if tag not in self._VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] != ["style"]:
            self.text += data
