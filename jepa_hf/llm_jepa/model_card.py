"""Model card of a language model that was trained with LLM-JEPA."""

from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from ..hub.model_card import DatasetInfo, card_metadata, card_title, describe_hardware, hub_repo_id_or_none
from ..training.model_card_info import evaluation_names
from ..utils.markdown import escape_markdown, markdown_table, strip_code_delimiters
from ..version import __version__
from .decoder import has_lora
from .view_tokenizer import PairedViewTokenizer

_TEMPLATE = """\
---
{metadata}
---

# {title}

A causal language model, trained with LLM-JEPA. Training minimizes the next-token loss and a JEPA
loss: the representation of one view of a row must predict that of the other view. The views are, for
example, a question and its answer, or a text and its code.

Training started from {start}. Trained with `jepa_hf` {version}.

## Usage

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
{inputs}
output = model.generate(**inputs, max_new_tokens=128)
answer = output[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))
```

## Training procedure

{training}

## Results

{results}

A small distance between the views does not by itself show that they match: collapsed representations
have the smallest distance. Collapse shows as a low *view rank* or as a *view pairwise cosine* near 1.
{health}

## Limitations

The model inherits the content and biases of its training data and of the model it started from. It
was evaluated only as reported on this card.

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
# Code of the usage section: with a chat template, and with plain text.
_USAGE = {
    True: """\
messages = [{"role": "user", "content": "..."}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)""",
    False: 'inputs = tokenizer("...\\n", return_tensors="pt")',
}
STP = """\
@misc{stp2026,
  title = {Semantic Tube Prediction: Beating LLM Data Efficiency with JEPA},
  year = {2026},
  eprint = {2602.22617},
  archivePrefix = {arXiv}
}"""


def render_llm_card(trainer: Any, name: str, data: DatasetInfo, language: str | None, license: str | None) -> ModelCard:
    """Render the card of an `LlmJepaTrainer`'s run. All strings are plain text: markup in them is escaped."""
    start = trainer.model.config.name_or_path
    base_model = hub_repo_id_or_none(start)
    tags = ["llm-jepa", "jepa", "jepa_hf"]
    results = _result_rows(trainer)
    start_name = escape_markdown(base_model or f"the local model {Path(start).name}") if start else "random weights"
    text = _TEMPLATE.format(
        metadata=card_metadata(name, data, base_model, language, license, pipeline_tag="text-generation", tags=tags),
        title=escape_markdown(card_title(name)),
        start=start_name,
        name=strip_code_delimiters(name),
        inputs=_USAGE[trainer.processing_class.chat_template is not None],
        version=__version__,
        training=_table(("setting", "value"), _training_rows(trainer, data)),
        health=_health(trainer),
        results=_table(("evaluation", "at the end"), results) if results else "No evaluation was run.",
        citations="\n\n".join([LLM_JEPA, *([STP] if trainer.args.stp_weight else [])]),
    )
    return ModelCard(text, ignore_metadata_errors=True)


def _table(header: tuple[str, str], rows: Mapping[str, Any]) -> str:
    """Build a table of values, without those that are None or empty."""
    cells = [(key, f"{value:.4g}" if isinstance(value, float) else str(value)) for key, value in rows.items()]
    return markdown_table(
        header, [(escape_markdown(key), escape_markdown(value)) for key, value in cells if value not in ("", "None")]
    )


def _health(trainer: Any) -> str:
    """Return the verdict with all its reasons; before the end of the run, a warning for each finding."""
    verdict = trainer.verdict()
    if verdict is None:
        findings = [f"Step {step}: {sentence}." for step, sentence in trainer.health_findings.values()]
        lines = [f"**Warning.** {escape_markdown(finding)}" for finding in findings]
    else:
        reasons = " ".join([*verdict.reasons, verdict.skill]).strip()
        lines = [f"**{verdict.title}.** {escape_markdown(reasons)}"]
    return "".join(f"\n{line}\n" for line in lines)


def _training_rows(trainer: Any, data: DatasetInfo) -> dict[str, Any]:
    """Return the rows of the training table."""
    args, views, state = trainer.args, trainer.view_tokenizer, trainer.state
    return {
        "data": data.train,
        "rows": len(trainer.train_dataset) if isinstance(trainer.train_dataset, Sized) else None,
        "evaluated on": data.validation,
        "steps": state.global_step,
        "epochs": round(state.epoch or 0.0, 2),
        "adapters": "LoRA" if has_lora(trainer.model) else None,
        "rows per step": trainer.get_total_train_batch_size(args),
        "learning rate": args.learning_rate,
        "weights": f"next token {args.lm_weight}, views {args.jepa_weight} ({args.pair_loss})",
        **({} if views is None else _view_rows(views)),
        "gradient through the predicted view": args.target_gradient,
        "loss dropout": args.loss_dropout,
        "STP": f"{args.stp_weight} ({args.stp_variant})" if args.stp_weight else None,
        "hardware": describe_hardware(args.device, args.world_size),
        "seed": args.seed,
    }


def _view_rows(views: PairedViewTokenizer) -> dict[str, Any]:
    count, position = len(views.predictors), views.predictor_position
    return {
        "next-token loss on": "prompts and answers, without stop tokens" if views.train_on_prompt else "answers",
        "predictor tokens": f"{count}, at the {position} of the first view" if count else "none",
        "predicting view": "the second" if views.reverse else "the first",
        "maximum row length in tokens": views.max_length,
    }


def _result_rows(trainer: Any) -> dict[str, float]:
    """Return the rows of the result table: the metrics of the last evaluation on each evaluation data set."""
    views = ("view_cosine", "view_rank", "view_pairwise_cosine", "view_top1_accuracy", "view_top1_accuracy_chance")
    rows: dict[str, float] = {}
    for name in evaluation_names(trainer):
        evaluations: list[dict[str, float]] = [
            entry for entry in trainer.state.log_history if f"eval_{name}loss" in entry
        ]
        last = evaluations[-1] if evaluations else {}
        for metric in ("lm_loss", "router_loss", "pair_loss", *views, *trainer.generation_metrics):
            if f"eval_{name}{metric}" in last:
                rows[f"{name}{metric}".replace("_", " ")] = last[f"eval_{name}{metric}"]
    return rows
