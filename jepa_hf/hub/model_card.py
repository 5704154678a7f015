"""The model card: what was trained, on what, how it went, what it is not good for, and how to load it."""

import math
import platform
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..utils.markdown import escaped, in_code, one_line, table

_TEMPLATE = """\
---
{metadata}
---

# {title}

{introduction} {start} Trained with `jepa_hf` {version}.

## Use it

{usage}

Train on, with the predictor and both encoders:

```python
from jepa_hf import JepaForRepresentationPrediction

model = JepaForRepresentationPrediction.from_pretrained("{name}", subfolder="jepa")
```

## What it was trained on

{data}

## How it was trained

{training}

## How it went

{results}

{health}The loss alone says little: it is lowest when a model has collapsed. Three rivals read no context: *constant
prediction loss* is that of the best constant, *position prediction loss* that of each position's mean target, *sample
prediction loss* that of each sample's. A predictor that is not below all three has learned nothing about single
targets. *Hit rate in sample* is how often the right target is the nearest among those of its sample, *hit rate* among
those of many samples, where knowing the sample is enough for many hits. *Rank* is the effective number of directions
that the representations use.

![loss and health over the run](training.png)

{begin}
{end}

## Limits

{limits} It knows what its data held and inherits the slant of that data. Nothing is known about it beyond the numbers
on this card.

## Licence

{licence}

## Citation

What this run used:

```bibtex
{citations}
```
"""

# Between these `jepa-hf evaluate` puts its tables.
BEGIN, END = "<!-- jepa-hf evaluate: begin -->", "<!-- jepa-hf evaluate: end -->"

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

_LIMITS = {
    "text": "The encoder was trained without labels: its sentence embeddings are plain means over tokens, tuned for no "
    "task, and what is longer than it takes is cut.",
    "images": "The encoder was trained without labels and tuned for no task; it takes images at the size of its image "
    "processor.",
    "features": "The encoder was trained without labels and tuned for no task; it takes the columns it was trained on, "
    "in their order and units.",
}

# What a run may rest on, in BibTeX.
CITATIONS = {
    "jepa": """\
@misc{lecun2022path,
  title = {A Path Towards Autonomous Machine Intelligence},
  author = {LeCun, Yann},
  year = {2022},
  url = {https://openreview.net/forum?id=BZ5a1r-kVsf}
}""",
    "i-jepa": """\
@inproceedings{assran2023self,
  title = {Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture},
  author = {Assran, Mahmoud and Duval, Quentin and Misra, Ishan and Bojanowski, Piotr and Vincent, Pascal and Rabbat,
    Michael and LeCun, Yann and Ballas, Nicolas},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2023}
}""",
    "data2vec": """\
@inproceedings{baevski2022data2vec,
  title = {data2vec: A General Framework for Self-supervised Learning in Speech, Vision and Language},
  author = {Baevski, Alexei and Hsu, Wei-Ning and Xu, Qiantong and Babu, Arun and Gu, Jiatao and Auli, Michael},
  booktitle = {Proceedings of the 39th International Conference on Machine Learning},
  year = {2022}
}""",
    "vicreg": """\
@inproceedings{bardes2022vicreg,
  title = {VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning},
  author = {Bardes, Adrien and Ponce, Jean and LeCun, Yann},
  booktitle = {International Conference on Learning Representations},
  year = {2022}
}""",
    "lejepa": """\
@misc{balestriero2025lejepa,
  title = {LeJEPA: Provable and Scalable Self-Supervised Learning Without the Heuristics},
  author = {Balestriero, Randall and LeCun, Yann},
  year = {2025},
  eprint = {2511.08544},
  archivePrefix = {arXiv}
}""",
    "cpc": """\
@misc{oord2018cpc,
  title = {Representation Learning with Contrastive Predictive Coding},
  author = {van den Oord, A{\\"a}ron and Li, Yazhe and Vinyals, Oriol},
  year = {2018},
  eprint = {1807.03748},
  archivePrefix = {arXiv}
}""",
}


@dataclass
class DataNames:
    """What the data is called: names of files without their folders, or of data sets on the Hub.

    Args:
        train, validation: what was trained and evaluated on; empty where it is not known.
        probe: what the encoder was probed on at evaluations.
        datasets: those that are on the Hub, by name.
    """

    train: str = ""
    validation: str = ""
    probe: str = ""
    datasets: list[str] = field(default_factory=list)


@dataclass
class CardFacts:
    """Real values for a card. All text is taken as it is: what would be markup is escaped.

    Args:
        name: what users pass to `from_pretrained`: the Hub repository, or the directory.
        modality: what the encoder reads: "text", "images" or "features".
        family: the encoder's model type.
        parameters: its number of parameters.
        version: the version of this package.
        training: rows of the training table, name and value.
        metrics: rows of the result table: name, value at the start (or None), value at the end.
        rows: number of training rows, where known.
        data: names of the data.
        seen: rows of the data table beside these, name and value.
        found: what the watchdog said during the run; None where nothing was measured.
        citations: keys of `CITATIONS`.
        base_model: the pretrained encoder on the Hub that it started from, where there is one.
        base_name: what it started from, where that is no model on the Hub; None for random weights.
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
    rows: int | None = None
    data: DataNames = field(default_factory=DataNames)
    seen: dict[str, Any] = field(default_factory=dict)
    found: list[str] | None = None
    citations: list[str] = field(default_factory=lambda: ["jepa"])
    base_model: str | None = None
    base_name: str | None = None
    language: str | None = None
    license: str | None = None


def render_card(facts: CardFacts) -> ModelCard:
    """The card of a trained encoder. Its metadata is what the Hub reads, the evaluation among it."""
    task = "image-feature-extraction" if facts.modality == "images" else "feature-extraction"
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        tags=["jepa", "jepa_hf", "self-supervised", *_TAGS[facts.modality]],
        base_model=facts.base_model and one_line(facts.base_model),
        datasets=[one_line(name) for name in facts.data.datasets] or None,
        language=facts.language and one_line(facts.language),
        license=facts.license and one_line(facts.license),
        model_name=one_line(_title(facts.name)) or "model",
        eval_results=_eval_results(facts, task) or None,
    )
    text = _TEMPLATE.format(
        metadata=data.to_yaml(),
        title=escaped(_title(facts.name)),
        name=in_code(facts.name),
        introduction=_INTRODUCTION[facts.modality].format(
            family=escaped(facts.family), parameters=f"{facts.parameters / 1e6:.1f} M parameters"
        ),
        start=_start(facts),
        usage=_USAGE[facts.modality].format(name=in_code(facts.name)),
        version=facts.version,
        data=_settings(_data_rows(facts)),
        training=_settings(facts.training),
        results=_results(facts),
        health=_health(facts.found),
        begin=BEGIN,
        end=END,
        limits=_LIMITS[facts.modality],
        licence=_licence(facts),
        citations="\n\n".join(CITATIONS[key] for key in facts.citations),
    )
    return ModelCard(text, ignore_metadata_errors=True)


def rename_card(text: str, name: str) -> str:
    """The card of a model that is now loaded as `name`: its title, where that was the old name, and its code."""
    found = re.search(r'from_pretrained\("([^"\n]+)"', text)
    if found is None:
        return text
    old = found.group(1)
    text = text.replace(f'("{old}"', f'("{in_code(name)}"')
    return text.replace(f"\n# {escaped(_title(old))}\n", f"\n# {escaped(_title(name))}\n", 1)


def dataset_type(name: str) -> str:
    """What a card's metadata tells data sets apart by: the name of one on the Hub, or like such a name.

    >>> dataset_type("my topics (new).csv")
    'my-topics-new-.csv'
    """
    return re.sub(r"[^\w./-]+", "-", name).strip("-") or "local"


def _title(name: str) -> str:
    """The last part of a repository's or a directory's name."""
    return name.rstrip("/").split("/")[-1]


def _start(facts: CardFacts) -> str:
    if facts.base_model:
        return f"It started from {_link(facts.base_model)}."
    return f"It started from {escaped(facts.base_name)}." if facts.base_name else "It started from random weights."


def _link(repo_id: str) -> str:
    return f"[{escaped(repo_id)}](https://huggingface.co/{quote(one_line(repo_id))})"


def _data_rows(facts: CardFacts) -> dict[str, Any]:
    names = {"data": facts.data.train, "rows": facts.rows, **facts.seen}
    names |= {"evaluated on": facts.data.validation, "probed on": facts.data.probe}
    return {name: value for name, value in names.items() if value not in ("", None)}


def _results(facts: CardFacts) -> str:
    if not facts.metrics:
        return "No evaluation was run."
    rows = [(escaped(name), _value(first), _value(last)) for name, (first, last) in facts.metrics.items()]
    return table(("evaluation", "start", "end"), rows)


def _eval_results(facts: CardFacts, task: str) -> list[EvalResult]:
    """The last evaluation as the Hub's leaderboards and search read it.

    Losses and chances, which compare with nothing outside the run, are left out, and so is what is not finite.
    """
    results = []
    for name, (_, value) in facts.metrics.items():
        source = (facts.data.probe if name.startswith("probe") else facts.data.validation) or "validation data"
        if math.isfinite(value) and not name.endswith(("loss", "chance")):
            results.append(
                EvalResult(
                    task_type=task,
                    dataset_type=dataset_type(source),
                    dataset_name=one_line(source) or "validation data",
                    dataset_split="validation",
                    metric_type=name.replace(" ", "_"),
                    metric_name=name,
                    metric_value=float(f"{value:.6g}"),
                )
            )
    return results


def _licence(facts: CardFacts) -> str:
    if facts.license:
        return f"The weights: {escaped(facts.license)}."
    rests = f"that of {_link(facts.base_model)} and " if facts.base_model else ""
    return (
        f"Whoever publishes the weights has not stated theirs; {rests}the terms of the training data bind them. "
        "`jepa_hf`, which trained them, is under Apache-2.0."
    )


def _health(found: list[str] | None) -> str:
    """A paragraph on what the watchdog said."""
    if found is None:
        return ""
    if not found:
        return "Health, measured on a fixed batch over the whole run, showed no collapse and no divergence.\n\n"
    return "What the watchdog said during the run:\n\n" + "".join(f"- {escaped(said)}\n" for said in found) + "\n"


def _settings(values: dict[str, Any]) -> str:
    return table(("setting", "value"), [(escaped(name), _value(value)) for name, value in values.items()])


def _value(value: Any) -> str:
    if value is None:
        return ""
    return (
        f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else escaped(str(value))
    )


def hardware(device: torch.device, processes: int) -> str:
    """What a run goes on: the kind of device, and how many processes.

    >>> hardware(torch.device("cpu"), 2)  # doctest: +ELLIPSIS
    '2 x CPU (...), ... thread...'
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif device.type == "cpu":
        threads = torch.get_num_threads()
        name = f"CPU ({platform.machine()}), {threads} thread{'s' if threads > 1 else ''} each"
    else:
        name = device.type
    return f"{processes} x {name}"


def hub_name(name_or_path: str) -> str | None:
    """What a card may name as base model: a Hub repository, not a path on somebody's machine."""
    if not name_or_path or Path(name_or_path).exists():
        return None
    try:
        validate_repo_id(name_or_path)
    except HFValidationError:
        return None
    return name_or_path
