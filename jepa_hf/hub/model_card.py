"""Model card of an encoder: usage, training data, settings, results, limitations, citations."""

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

from ..utils.counts import counted
from ..utils.formatting import format_parameters
from ..utils.markdown import escape_markdown, markdown_table, single_line, strip_code_delimiters

_TEMPLATE = """\
---
{metadata}
---

# {title}

{introduction}

{start} Trained with `jepa_hf` {version}.

## Usage

{usage}

The repository also holds the full model with the predictor and both encoders. Load it to continue
training:

```python
from jepa_hf import JepaForRepresentationPrediction

model = JepaForRepresentationPrediction.from_pretrained("{name}", subfolder="jepa")
```

## Training data

{data}

## Training procedure

{training}

## Results

{results}

{health}A low loss alone does not show that training succeeded: a collapsed model reaches the lowest loss.
Compare the prediction loss with three baselines that read no context:

- *constant baseline loss*: the best constant vector.
- *position baseline loss*: the mean target of each position.
- *sample baseline loss*: the mean target of each sample.

A predictor that does not beat all three has learned nothing about individual targets. *Top1
accuracy in sample* is that of retrieving the correct target among those of the same sample. *Top1
accuracy* is that among the targets of many samples; identifying the sample is enough for many of
these hits. *Rank* is the effective number of dimensions that the representations use.

![loss and health over the run](training.png)

{begin}
{end}

## Limitations

{limits}

The model inherits the content and biases of its training data. It was evaluated only as reported on
this card.

## License

{licence}

## Citation

Please cite the work that this run builds on:

```bibtex
{citations}
```
"""

# `jepa-hf evaluate` writes its tables between these markers.
EVALUATION_START, EVALUATION_END = "<!-- jepa-hf evaluate: begin -->", "<!-- jepa-hf evaluate: end -->"

_INTRODUCTION = {
    "text": """\
A text encoder ({family}, {parameters}), pretrained without labels by a joint-embedding predictive
architecture (JEPA). The context encoder reads a text in which spans are masked. A predictor predicts
the representations of the masked tokens, which the target encoder computes from the full text. The
target encoder is an exponential moving average of the context encoder.""",
    "images": """\
An image encoder ({family}, {parameters}), pretrained without labels by an image-based joint-embedding
predictive architecture (I-JEPA). The context encoder reads a subset of an image's patches. A
predictor predicts the representations of blocks of the other patches, which the target encoder
computes from the full image. The target encoder is an exponential moving average of the context
encoder.""",
    "features": """\
A transformer encoder of feature vectors or time series ({parameters}), pretrained without labels by a
joint-embedding predictive architecture (JEPA). The context encoder reads a subset of the features or
time steps. A predictor predicts the representations of the others, which the target encoder computes
from the full input. The target encoder is an exponential moving average of the context encoder.""",
}

_USAGE = {
    "text": """\
```python
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
encoder = AutoModel.from_pretrained("{name}")
```

Sentence embeddings:

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

To fine-tune with labels:

```python
from transformers import AutoModelForImageClassification

classifier = AutoModelForImageClassification.from_pretrained("{name}", num_labels=10)
```""",
    "features": """\
Pass raw values: the encoder standardizes them with the stored mean and standard deviation of its
training data.

```python
from transformers import AutoModel

# trust_remote_code is not needed after `import jepa_hf`.
encoder = AutoModel.from_pretrained("{name}", trust_remote_code=True)
pooled = encoder(features=values).pooler_output
```""",
}

_TAGS = {"text": ["sentence-transformers"], "images": ["i-jepa"], "features": ["tabular", "time-series"]}

_LIMITS = {
    "text": """\
The encoder was trained without labels and is not tuned for any task. Its sentence embeddings are
pooled token representations (`1_Pooling/config.json`). Inputs beyond its maximum length are truncated.""",
    "images": """\
The encoder was trained without labels and is not tuned for any task. It expects images at the size
that its image processor produces.""",
    "features": """\
The encoder was trained without labels and is not tuned for any task. It expects the columns of its
training data, in the same order and units.""",
}

# BibTeX entries of the work that a run may build on.
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
class DatasetInfo:
    """Names of the data: file names without their folders, or data sets on the Hub; empty if there are none.

    `probe` is the data on which the encoder is probed during evaluation, `datasets` those that are on the Hub.
    """

    train: str = ""
    validation: str = ""
    probe: str = ""
    datasets: list[str] = field(default_factory=list)


@dataclass
class ModelCardInfo:
    """Values of an encoder's card. All strings are plain text: markup in them is escaped.

    Args:
        name: argument of `from_pretrained`: the Hub repository, or the directory.
        modality: "text", "images" or "features".
        family: the encoder's model type.
        metrics: rows of the result table, name to values at the start (or None) and at the end.
        health_findings: warnings of the collapse watchdog; None if nothing was measured.
        citations: keys of `CITATIONS`.
        base_model: Hub name of the pretrained encoder that the run started from, if there is one.
        base_name: description of a pretrained encoder that is not on the Hub; None for random weights.
    """

    name: str
    modality: str
    family: str
    parameters: int
    version: str
    training: dict[str, Any]
    metrics: dict[str, tuple[float | None, float]]
    rows: int | None = None
    data: DatasetInfo = field(default_factory=DatasetInfo)
    data_statistics: dict[str, Any] = field(default_factory=dict)
    health_findings: list[str] | None = None
    citations: list[str] = field(default_factory=lambda: ["jepa"])
    base_model: str | None = None
    base_name: str | None = None
    language: str | None = None
    license: str | None = None


def render_card(facts: ModelCardInfo) -> ModelCard:
    """Render the card of an encoder, with its evaluation in the metadata that the Hub reads."""
    task = "image-feature-extraction" if facts.modality == "images" else "feature-extraction"
    metadata = card_metadata(
        *(facts.name, facts.data, facts.base_model, facts.language, facts.license),
        pipeline_tag=task,
        tags=["jepa", "jepa_hf", "self-supervised", *_TAGS[facts.modality]],
        eval_results=_eval_results(facts, task) or None,
    )
    text = _TEMPLATE.format(
        metadata=metadata,
        title=escape_markdown(card_title(facts.name)),
        name=strip_code_delimiters(facts.name),
        introduction=_INTRODUCTION[facts.modality].format(
            family=escape_markdown(facts.family), parameters=format_parameters(facts.parameters)
        ),
        start=_start_sentence(facts),
        usage=_USAGE[facts.modality].format(name=strip_code_delimiters(facts.name)),
        version=facts.version,
        data=_settings(_data_rows(facts)),
        training=_settings(facts.training),
        results=_results(facts),
        health=_health(facts.health_findings),
        begin=EVALUATION_START,
        end=EVALUATION_END,
        limits=_LIMITS[facts.modality],
        licence=_licence(facts),
        citations="\n\n".join(CITATIONS[key] for key in facts.citations),
    )
    return ModelCard(text, ignore_metadata_errors=True)


def card_metadata(
    name: str, data: DatasetInfo, base_model: str | None, language: str | None, license: str | None, **kwargs: Any
) -> str:
    """Return the metadata of a card as YAML; `kwargs` are further arguments of `ModelCardData`."""
    return ModelCardData(
        library_name="transformers",
        base_model=base_model and single_line(base_model),
        datasets=[single_line(dataset) for dataset in data.datasets] or None,
        language=language and single_line(language),
        license=license and single_line(license),
        model_name=single_line(card_title(name)) or "model",
        **kwargs,
    ).to_yaml()


def rename_card(text: str, name: str) -> str:
    """Replace the model's name in a card: in its code, and in its title if that is the old name."""
    match = re.search(r'from_pretrained\("([^"\n]+)"', text)
    if match is None:
        return text
    old = match.group(1)
    text = text.replace(f'("{old}"', f'("{strip_code_delimiters(name)}"')
    return text.replace(f"\n# {escape_markdown(card_title(old))}\n", f"\n# {escape_markdown(card_title(name))}\n", 1)


def dataset_type(name: str) -> str:
    """Return the identifier of a data set in a card's metadata, in the form of a Hub name.

    >>> dataset_type("my topics (new).csv")
    'my-topics-new-.csv'
    """
    return re.sub(r"[^\w./-]+", "-", name).strip("-") or "local"


def card_title(name: str) -> str:
    """Return the last part of a repository's or a directory's name."""
    return name.rstrip("/").split("/")[-1]


def _start_sentence(facts: ModelCardInfo) -> str:
    if facts.base_model:
        return f"Training started from {_link(facts.base_model)}."
    start = escape_markdown(facts.base_name) if facts.base_name else "random weights"
    return f"Training started from {start}."


def _link(repo_id: str) -> str:
    return f"[{escape_markdown(repo_id)}](https://huggingface.co/{quote(single_line(repo_id))})"


def _data_rows(facts: ModelCardInfo) -> dict[str, Any]:
    names = {"data": facts.data.train, "rows": facts.rows, **facts.data_statistics}
    names |= {"evaluated on": facts.data.validation, "probed on": facts.data.probe}
    return {name: value for name, value in names.items() if value not in ("", None)}


def _results(facts: ModelCardInfo) -> str:
    if not facts.metrics:
        return "No evaluation was run."
    rows = [(escape_markdown(name), _value(first), _value(last)) for name, (first, last) in facts.metrics.items()]
    return markdown_table(("evaluation", "start", "end"), rows)


def _eval_results(facts: ModelCardInfo, task: str) -> list[EvalResult]:
    """Return the last evaluation in the form that the Hub's leaderboards and search read.

    Losses and chance levels are left out, because they are not comparable between runs. So are
    values that are not finite.
    """
    results = []
    for name, (_, value) in facts.metrics.items():
        source = (facts.data.probe if name.startswith("probe") else facts.data.validation) or "validation data"
        if math.isfinite(value) and not name.endswith(("loss", "chance")):
            results.append(
                EvalResult(
                    task_type=task,
                    dataset_type=dataset_type(source),
                    dataset_name=single_line(source) or "validation data",
                    dataset_split="validation",
                    metric_type=name.replace(" ", "_"),
                    metric_name=name,
                    metric_value=float(f"{value:.6g}"),
                )
            )
    return results


def _licence(facts: ModelCardInfo) -> str:
    if facts.license:
        return f"License of the weights: {escape_markdown(facts.license)}."
    base_terms = f"the license of {_link(facts.base_model)} and " if facts.base_model else ""
    return (
        f"The publisher has not stated a license for the weights. They are subject to {base_terms}the terms of the\n"
        "training data. The training code, `jepa_hf`, is licensed under Apache-2.0."
    )


def _health(warnings: list[str] | None) -> str:
    """Return a paragraph on the watchdog's warnings; empty if nothing was measured."""
    if warnings is None:
        return ""
    if not warnings:
        return (
            "The collapse watchdog evaluated fixed rows throughout the run and detected no collapse and no\n"
            "divergence.\n\n"
        )
    lines = "".join(f"- {escape_markdown(warning)}\n" for warning in warnings)
    return f"The collapse watchdog, which evaluates fixed rows during training, reported:\n\n{lines}\n"


def _settings(values: dict[str, Any]) -> str:
    return markdown_table(
        ("setting", "value"), [(escape_markdown(name), _value(value)) for name, value in values.items()]
    )


def _value(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else escape_markdown(str(value))


def describe_hardware(device: torch.device, processes: int) -> str:
    """Describe the hardware of a run: number of processes and kind of device.

    >>> describe_hardware(torch.device("cpu"), 2)  # doctest: +ELLIPSIS
    '2 x CPU (...), ... thread...'
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif device.type == "cpu":
        name = f"CPU ({platform.machine()}), {counted(torch.get_num_threads(), 'thread')} each"
    else:
        name = device.type
    return f"{processes} x {name}"


def hub_repo_id_or_none(name_or_path: str) -> str | None:
    """Return `name_or_path` if it can name a Hub repository, None for a local path."""
    if not name_or_path or Path(name_or_path).exists():
        return None
    try:
        validate_repo_id(name_or_path)
    except HFValidationError:
        return None
    return name_or_path
