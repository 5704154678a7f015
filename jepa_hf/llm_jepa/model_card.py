"""Model card of a language model that was fine-tuned with LLM-JEPA."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..hub.model_card import DatasetInfo, describe_hardware, hub_repo_id_or_none
from ..utils.atomic_files import atomic_write
from ..utils.markdown import escape_markdown, markdown_table, single_line, strip_code_delimiters
from ..version import __version__
from .decoder import has_lora
from .training_args import LlmJepaTrainingArguments
from .view_tokenizer import PairedViewTokenizer

_TEMPLATE = """\
---
{metadata}
---

# {title}

A causal language model, fine-tuned with LLM-JEPA. Training minimizes the next-token loss and a JEPA
loss: the representation of one view of a row must predict that of the other view. The views are, for
example, a question and its answer, or a text and its code.

{start}Trained with `jepa_hf` {version}.

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


def render_llm_card(
    name: str,
    version: str,
    training: dict[str, Any],
    metrics: dict[str, float],
    data: DatasetInfo,
    *,
    cites_stp: bool = False,
    with_template: bool = True,
    base_model: str | None = None,
    base_name: str | None = None,
    health: str = "",
    language: str | None = None,
    license: str | None = None,
) -> ModelCard:
    """Render the card. All strings are plain text: markup in them is escaped.

    Args:
        name: argument of `from_pretrained`.
        version: version of this package.
        training: rows of the training table; None and empty values are left out.
        metrics: rows of the result table, from the last evaluation.
        data: names of the data.
        cites_stp: whether the loss contained STP, whose paper is then cited.
        with_template: whether prompts use a chat template; otherwise they are plain text.
        base_model: Hub name of the model that training started from, if there is one.
        base_name: how to name that model without a Hub name.
        health: the verdict on the run, or a warning for each finding, in Markdown; may be empty.
        language: language of the data, if known.
        license: license of the weights, if known.
    """
    title = name.rstrip("/").split("/")[-1]
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["llm-jepa", "jepa", "jepa_hf"],
        base_model=base_model and single_line(base_model),
        datasets=[single_line(dataset) for dataset in data.datasets] or None,
        language=language and single_line(language),
        license=license and single_line(license),
        model_name=single_line(title) or "model",
    )
    rows = {"data": data.train, "evaluated on": data.validation, **training}
    settings = [
        (escape_markdown(key), escape_markdown(str(value))) for key, value in rows.items() if value not in ("", None)
    ]
    results = [(escape_markdown(key), f"{value:.4g}") for key, value in metrics.items()]
    text = _TEMPLATE.format(
        metadata=metadata.to_yaml(),
        title=escape_markdown(title),
        start=f"Training started from {escape_markdown(base_model or base_name or '')}. "
        if base_model or base_name
        else "",
        name=strip_code_delimiters(name),
        inputs=_USAGE[with_template],
        version=version,
        training=markdown_table(("setting", "value"), settings),
        health=health,
        results=markdown_table(("evaluation", "at the end"), results) if results else "No evaluation was run.",
        citations="\n\n".join([LLM_JEPA, *([STP] if cites_stp else [])]),
    )
    return ModelCard(text, ignore_metadata_errors=True)


def write_llm_card(trainer: Any, model_name: str | None, data: DatasetInfo, **kwargs: Any) -> None:
    """Write the `README.md` of an `LlmJepaTrainer`'s run.

    Args:
        trainer: the trainer.
        model_name: argument of `from_pretrained`; default the Hub repository, or the last part of
            the output directory.
        data: names of the data.
        **kwargs: `language`, `license` and `dataset`, as for `Trainer.create_model_card`.
    """
    args, folder = trainer.args, Path(trainer.args.output_dir)
    datasets_on_hub = kwargs.get("dataset") or []
    data.datasets += [datasets_on_hub] if isinstance(datasets_on_hub, str) else datasets_on_hub
    start = trainer.model.config.name_or_path
    training = {
        "steps": trainer.state.global_step,
        "adapters": "LoRA" if has_lora(trainer.model) else None,
        "rows per step": trainer.get_total_train_batch_size(args),
        **objective_rows(args, trainer.view_tokenizer),
        "hardware": describe_hardware(args.device, args.world_size),
        "seed": args.seed,
    }
    card = render_llm_card(
        trainer.hub_model_id or args.hub_model_id or model_name or folder.absolute().name,
        __version__,
        training,
        result_rows(trainer.state.log_history, trainer.generation_metrics),
        data,
        cites_stp=bool(args.stp_weight),
        with_template=trainer.processing_class.chat_template is not None,
        base_model=hub_repo_id_or_none(start),
        base_name=f"the local model {Path(start).name}" if start else None,
        health=_health(trainer),
        language=kwargs.get("language"),
        license=kwargs.get("license"),
    )
    with atomic_write(folder / "README.md") as file:
        card.save(file)


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


def objective_rows(args: LlmJepaTrainingArguments, views: PairedViewTokenizer | None) -> dict[str, Any]:
    """Return the rows of the training table about the objective and, if known, the views."""
    return {
        "learning rate": f"{args.learning_rate:.4g}",
        "weights": f"next token {args.lm_weight}, views {args.jepa_weight} ({args.pair_loss})",
        **({} if views is None else _view_rows(views)),
        "gradient through the predicted view": args.target_gradient,
        "loss dropout": args.loss_dropout,
        "STP": f"{args.stp_weight} ({args.stp_variant})" if args.stp_weight else None,
    }


def _view_rows(views: PairedViewTokenizer) -> dict[str, Any]:
    count, position = len(views.predictors), views.predictor_position
    return {
        "next-token loss on": "prompts and answers, without stop tokens" if views.train_on_prompt else "answers",
        "predictor tokens": f"{count}, at the {position} of the first view" if count else "none",
        "predicting view": "the second" if views.reverse else "the first",
        "maximum row length in tokens": views.max_length,
    }


def result_rows(log_history: Iterable[Mapping[str, Any]], generation_metrics: Sequence[str]) -> dict[str, float]:
    """Return the rows of the result table: the metrics of the last evaluation in a run's log."""
    evaluations = [entry for entry in log_history if "eval_loss" in entry]
    last = evaluations[-1] if evaluations else {}
    views = ("view_cosine", "view_rank", "view_pairwise_cosine", "view_top1_accuracy")
    names = ("lm_loss", "router_loss", "pair_loss", *views, *generation_metrics)
    return {name.replace("_", " "): last[f"eval_{name}"] for name in names if f"eval_{name}" in last}
