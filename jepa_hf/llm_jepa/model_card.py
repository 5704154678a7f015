"""The card of a language model that was fine-tuned with paired views."""

from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..hub.model_card import DataNames
from ..utils.markdown import escaped, in_code, one_line, table

_TEMPLATE = """\
---
{metadata}
---

# {title}

A causal language model fine-tuned with LLM-JEPA: beside the next-token loss on its answers, the representation of one
view of a row predicts that of the other (a question and its answer, a text and its code). {start}Trained with
`jepa_hf` {version}.

## Use it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
{asking}
answer = model.generate(**asked, max_new_tokens=128)[0, asked["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))
```

## How it was trained

{training}

## How it went

{results}

A small distance between views proves nothing by itself: it is smallest where all views look the same, which their
effective rank would tell.

## Limits

It knows what its data held and inherits the slant of that data and of the model it started from. Nothing is known about
it beyond the numbers on this card.

## Citation

```bibtex
{citations}
```
"""

LLM_JEPA = """\
@misc{huang2025llmjepa,
  title = {LLM-JEPA: Large Language Models Meet Joint Embedding Predictive Architectures},
  author = {Huang, Hai and LeCun, Yann and Balestriero, Randall},
  year = {2025},
  eprint = {2509.14252},
  archivePrefix = {arXiv}
}"""
# How a conversation, or a text alone, is asked.
_ASKING = {
    True: """\
messages = [{"role": "user", "content": "..."}]
asked = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)""",
    False: 'asked = tokenizer("...\\n", return_tensors="pt")',
}
STP = """\
@misc{stp2026,
  title = {Semantic Tube Prediction: Beating LLM Data Efficiency with JEPA},
  year = {2026},
  eprint = {2602.22617},
  archivePrefix = {arXiv}
}"""


def render_card(
    name: str,
    version: str,
    training: dict[str, Any],
    metrics: dict[str, float],
    data: DataNames,
    *,
    with_paths: bool = False,
    with_template: bool = True,
    base_model: str | None = None,
    language: str | None = None,
    license: str | None = None,
) -> ModelCard:
    """The card; all text is taken as it is, and what would be markup is escaped.

    Args:
        name: what users pass to `from_pretrained`.
        version: of this package.
        training: rows of the training table.
        metrics: rows of the result table, of the last evaluation.
        data: names of the data.
        with_paths: whether STP's paths were part of the loss, and its paper is to be cited.
        with_template: whether it is asked by a chat template, or by text alone.
        base_model: the model on the Hub that it started from, where there is one.
        language, license: where known.
    """
    title = name.rstrip("/").split("/")[-1]
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["llm-jepa", "jepa", "jepa_hf"],
        base_model=base_model and one_line(base_model),
        datasets=[one_line(dataset) for dataset in data.datasets] or None,
        language=language and one_line(language),
        license=license and one_line(license),
        model_name=one_line(title) or "model",
    )
    rows = {"data": data.train, "evaluated on": data.validation, **training}
    shown = [(escaped(key), escaped(str(value))) for key, value in rows.items() if value not in ("", None)]
    results = [(escaped(key), f"{value:.4g}") for key, value in metrics.items()]
    text = _TEMPLATE.format(
        metadata=metadata.to_yaml(),
        title=escaped(title),
        start=f"It started from {escaped(base_model)}. " if base_model else "",
        name=in_code(name),
        asking=_ASKING[with_template],
        version=version,
        training=table(("setting", "value"), shown),
        results=table(("evaluation", "at the end"), results) if results else "No evaluation was run.",
        citations="\n\n".join([LLM_JEPA, *([STP] if with_paths else [])]),
    )
    return ModelCard(text, ignore_metadata_errors=True)
