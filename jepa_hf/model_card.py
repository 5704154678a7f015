"""The model card: what was trained, on what, how it went, and how to load it."""

import re
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

_TEMPLATE = """\
---
{metadata}
---

# {title}

{introduction} Trained with `jepa_hf` {version}.

## Use it

{usage}

Train on, with the predictor and both encoders:

```python
from jepa_hf import JepaForRepresentationPrediction

model = JepaForRepresentationPrediction.from_pretrained("{name}", subfolder="jepa")
```

## How it was trained

{training}

## How it went

{results}

{health}The loss alone says little: it is lowest when a model has collapsed. *Hit rate* is how often the right target
is the nearest among those of the batch; *rank* is the effective number of directions the representations use; the
*constant predictor* always guesses the mean target.

![loss and health over the run](training.png)
"""

_INTRODUCTION = {
    "text": """\
A text encoder ({family}, {parameters}) trained with a joint-embedding predictive architecture (JEPA): a context encoder
reads a text with spans hidden, and a predictor guesses the representation that a slowly moving target encoder gives to
the hidden tokens.""",
    "images": """\
An image encoder ({family}, {parameters}) trained with a joint-embedding predictive architecture (I-JEPA): a context
encoder reads some patches of an image, and a predictor guesses the representations that a slowly moving target encoder,
which sees the whole image, gives to blocks of the others.""",
    "features": """\
A transformer over feature vectors or series of them ({parameters}), trained with a joint-embedding predictive
architecture (JEPA): a context encoder reads a part of the features or time steps, and a predictor guesses the
representation that a slowly moving target encoder gives to the rest.""",
}

_USAGE = {
    "text": """\
```python
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
encoder = AutoModel.from_pretrained("{name}")
```

Sentence embeddings, by mean pooling:

```python
from sentence_transformers import SentenceTransformer

embeddings = SentenceTransformer("{name}").encode(["A sentence.", "Another one."])
```""",
    "images": """\
```python
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained("{name}")
encoder = AutoModel.from_pretrained("{name}")
patches = encoder(**processor(images=image, return_tensors="pt")).last_hidden_state
```

Fine-tune it with labels:

```python
from transformers import AutoModelForImageClassification

classifier = AutoModelForImageClassification.from_pretrained("{name}", num_labels=10)
```""",
    "features": """\
It takes raw values: the training data's mean and spread are stored with it.

```python
from transformers import AutoModel

encoder = AutoModel.from_pretrained("{name}", trust_remote_code=True)  # or with jepa_hf imported, without it
pooled = encoder(features=values).pooler_output
```""",
}

_TAGS = {"text": ["sentence-transformers"], "images": ["i-jepa"], "features": ["tabular", "time-series"]}


@dataclass
class CardFacts:
    """Real values for a card.

    Args:
        name: what users pass to `from_pretrained`: the Hub repository, or the directory.
        modality: what the encoder reads: "text", "images" or "features".
        family: the encoder's model type.
        parameters: its number of parameters.
        version: the version of this package.
        training: rows of the training table, name and value.
        metrics: rows of the result table: name, value at the start (or None), value at the end.
        found: what the watchdog said during the run; None where nothing was measured.
        base_model: the pretrained encoder it started from, where there is one.
        datasets: Hub names of the data sets.
        language: of the data, where known.
        license: of the weights, where known.
    """

    name: str
    modality: str
    family: str
    parameters: int
    version: str
    training: dict[str, Any]
    metrics: dict[str, tuple[float | None, float]]
    found: list[str] | None = None
    base_model: str | None = None
    datasets: list[str] = field(default_factory=list)
    language: str | None = None
    license: str | None = None


def render_card(facts: CardFacts) -> ModelCard:
    """The card of a trained encoder."""
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-feature-extraction" if facts.modality == "images" else "feature-extraction",
        tags=["jepa", "jepa_hf", "self-supervised", *_TAGS[facts.modality]],
        base_model=facts.base_model,
        datasets=facts.datasets or None,
        language=facts.language,
        license=facts.license,
    )
    text = _TEMPLATE.format(
        metadata=data.to_yaml(),
        title=_plain(_title(facts.name)),
        name=_plain(facts.name),
        introduction=_INTRODUCTION[facts.modality].format(
            family=_plain(facts.family), parameters=f"{facts.parameters / 1e6:.1f} M parameters"
        ),
        usage=_USAGE[facts.modality].format(name=_plain(facts.name)),
        version=facts.version,
        training=_table(("setting", "value"), [(name, _value(value)) for name, value in facts.training.items()]),
        results=_table(
            ("evaluation", "start", "end"),
            [(name, _value(first), _value(last)) for name, (first, last) in facts.metrics.items()],
        )
        if facts.metrics
        else "No evaluation was run.",
        health=_health(facts.found),
    )
    return ModelCard(text, ignore_metadata_errors=True)


def rename_card(text: str, name: str) -> str:
    """The card of a model that is now loaded as `name`: its title, where that was the old name, and its code."""
    found = re.search(r'from_pretrained\("([^"\n]+)"', text)
    if found is None:
        return text
    old = found.group(1)
    text = text.replace(f'("{old}"', f'("{name}"')
    return text.replace(f"\n# {_title(old)}\n", f"\n# {_title(name)}\n", 1)


def _title(name: str) -> str:
    """The last part of a repository's or a directory's name."""
    return name.rstrip("/").split("/")[-1]


def _health(found: list[str] | None) -> str:
    """A paragraph on what the watchdog said."""
    if found is None:
        return ""
    if not found:
        return "Health, measured on a fixed batch over the whole run, showed no collapse and no divergence.\n\n"
    return "What the watchdog said during the run:\n\n" + "".join(f"- {_plain(said)}\n" for said in found) + "\n"


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(_plain(cell) for cell in line) + " |" for line in lines)


def _value(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _plain(text: str) -> str:
    """Text that ends no table cell, starts no markup and leaves no quotation."""
    for char in '|<>"`':
        text = text.replace(char, " ")
    return " ".join(text.split())
