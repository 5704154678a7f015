"""Greedy generation of answers, and their evaluation."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UsageError
from ..evaluation.progress import progress_bar
from ..utils.modes import evaluation_mode
from .answer_scoring import get_scorer
from .view_tokenizer import PairedViewTokenizer


@torch.inference_mode()
def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 16,
    progress: str | None = None,
) -> list[str]:
    """Generate greedy answers, in batches of prompts of similar length.

    Args:
        model: a causal language model, or a `PeftModel` around one.
        tokenizer: its tokenizer; the padding side is arbitrary.
        prompts: texts to continue, with special tokens written out (see `PairedViewTokenizer.prompt`).
        max_new_tokens: maximum number of tokens of an answer; fewer if the model has not enough positions.
        batch_size: number of prompts of a batch.
        progress: name to show the progress under, see `progress_bar`; None shows none.

    Returns:
        The answers without special tokens and surrounding whitespace, in the order of the prompts.

    Raises:
        UsageError: a prompt leaves no position for an answer, see `clamp_new_tokens`.
    """
    encoded = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    # Fail before the first batch.
    clamp_new_tokens(model.config, max(map(len, encoded), default=0), max_new_tokens)
    order = sorted(range(len(prompts)), key=lambda index: -len(encoded[index]))
    pad = tokenizer.pad_token_id or tokenizer.eos_token_id or 0
    stops = _stop_tokens(model, tokenizer)
    generate: Any = model.generate
    answers = [""] * len(prompts)
    bar = progress_bar(len(prompts), progress or "", "answers", show=progress is not None)
    with evaluation_mode(model), bar:
        for begin in range(0, len(order), batch_size):
            batch = order[begin : begin + batch_size]
            rows = [encoded[index] for index in batch]
            width = max(map(len, rows))
            ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
            output = generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=clamp_new_tokens(model.config, width, max_new_tokens),
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=pad,
                eos_token_id=stops,
            )
            texts = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
            for index, text in zip(batch, texts, strict=True):
                answers[index] = text.strip()
            bar.update(len(batch))
    return answers


def clamp_new_tokens(config: PreTrainedConfig, length: int, max_new_tokens: int) -> int:
    """Limit `max_new_tokens` to the positions that a prompt of `length` tokens leaves."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return max_new_tokens
    if length >= positions:
        raise UsageError(
            f"A prompt has {length} tokens, but the model has only {positions} positions, so there is no room for an "
            "answer. Remove the row."
        )
    return min(max_new_tokens, positions - length)


def _stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the stop tokens of the tokenizer, used in training, and of the generation config."""
    model_stops = model.generation_config.eos_token_id
    stops = {tokenizer.eos_token_id, *(model_stops if isinstance(model_stops, list) else [model_stops])}
    return sorted(token for token in stops if token is not None)


def evaluate_generation(
    model: PreTrainedModel,
    view_tokenizer: PairedViewTokenizer,
    rows: Sequence[dict[str, Any]],
    metrics: Sequence[str] = ("exact_match", "prefix_match"),
    database: str | Path | None = None,
    **kwargs: Any,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Generate answers to the prompts of rows and score them.

    Args:
        model: a causal language model, or a `PeftModel` around one.
        view_tokenizer: splits rows into prompt and reference answer.
        rows: rows with `messages`, or with the two columns. The reference is the message that is the second view.
        metrics: see `get_scorer`.
        database: path for the metric "sql", see `get_scorer`.
        **kwargs: of `generate_answers`.

    Returns:
        The proportion of correct answers by metric; and for each row `prompt`, `answer`, `right`
        (the reference) and each metric's result.
    """
    scorers = {metric: get_scorer(metric, database) for metric in metrics}
    pairs = [view_tokenizer.prompt(row, number) for number, row in enumerate(rows)]
    for (_, reference), row in zip(pairs, rows, strict=True):
        for metric, score in scorers.items():
            if not score(reference, reference, row):
                raise UsageError(
                    f"Metric {metric} cannot judge answers to a row whose reference is {reference!r:.80}: even the "
                    "reference is wrong by it. Choose another metric."
                )
    answers = generate_answers(model, view_tokenizer.tokenizer, [prompt for prompt, _ in pairs], **kwargs)
    results: list[dict[str, Any]] = [
        {
            "prompt": prompt,
            "answer": answer,
            "right": reference,
            **{metric: bool(score(answer, reference, row)) for metric, score in scorers.items()},
        }
        for (prompt, reference), answer, row in zip(pairs, answers, rows, strict=True)
    ]
    return {metric: sum(result[metric] for result in results) / max(len(results), 1) for metric in metrics}, results
