"""What a causal language model answers, and whether that is right."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UsageError
from .answer_scoring import scorer
from .view_tokenizer import PairedViewTokenizer


@torch.inference_mode()
def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 16,
    show_progress: bool = False,
) -> list[str]:
    """Greedy answers, in batches of prompts of like length.

    Args:
        model: a causal language model, or a `PeftModel` around one.
        tokenizer: its tokenizer, whichever side it pads on.
        prompts: what the model is to go on from, special tokens written out (see `PairedViewTokenizer.prompt`).
        max_new_tokens: most tokens of an answer; fewer where the model has not so many positions.
        batch_size: prompts that are answered together.
        show_progress: show a bar.

    Returns:
        The answers without special tokens and without blanks around them, in the order of the prompts.

    Raises:
        UsageError: a prompt leaves no room for an answer, see `room_for`.
    """
    encoded = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    room_for(model.config, max(map(len, encoded), default=0), max_new_tokens)  # before the first is answered
    order = sorted(range(len(prompts)), key=lambda at: -len(encoded[at]))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    stops = _stop_tokens(model, tokenizer)
    training, answers = model.training, [""] * len(prompts)
    model.eval()
    bar = tqdm(total=len(prompts), desc="generating", unit=" answers", disable=not show_progress, leave=False)
    for begin in range(0, len(order), batch_size):
        chosen = order[begin : begin + batch_size]
        width = max(len(encoded[at]) for at in chosen)
        ids = torch.tensor([[pad] * (width - len(encoded[at])) + encoded[at] for at in chosen], device=model.device)
        real = torch.tensor([[0] * (width - len(encoded[at])) + [1] * len(encoded[at]) for at in chosen])
        found = model.generate(
            input_ids=ids,
            attention_mask=real.to(model.device),
            max_new_tokens=room_for(model.config, width, max_new_tokens),
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=pad,
            eos_token_id=stops,
        )
        for at, answer in zip(chosen, found[:, width:], strict=True):
            answers[at] = tokenizer.decode(answer, skip_special_tokens=True).strip()
        bar.update(len(chosen))
    bar.close()
    model.train(training)
    return answers


def room_for(config: PreTrainedConfig, length: int, max_new_tokens: int) -> int:
    """How many tokens an answer to a prompt of `length` tokens may have: `max_new_tokens`, or what positions are left.

    Raises:
        UsageError: none are left.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return max_new_tokens
    if length >= positions:
        raise UsageError(
            f"a prompt has {length} tokens, and the model {positions} positions, which leaves none for an answer; "
            "leave the row out"
        )
    return min(max_new_tokens, positions - length)


def _stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Those that end an answer: the tokenizer's, which training taught, and those that the model came with."""
    own = model.generation_config.eos_token_id
    known = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    return sorted(token for token in known if token is not None)


def judge(
    model: PreTrainedModel,
    view_tokenizer: PairedViewTokenizer,
    rows: Sequence[dict[str, Any]],
    metrics: Sequence[str] = ("exact_match", "prefix_match"),
    database: str | Path | None = None,
    **kwargs: Any,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Answer the prompts of rows and score the answers.

    Args:
        rows: with messages, or with the two columns; the answer is the message that is the second view.
        metrics: see `scorer`.
        database: for "sql".
        kwargs: of `generate_answers`.

    Returns:
        By metric the share that is right; and for each row `prompt`, `answer`, `right` and each metric's verdict.
    """
    scorers = {metric: scorer(metric, database) for metric in metrics}
    asked = [view_tokenizer.prompt(row, number) for number, row in enumerate(rows)]
    answers = generate_answers(model, view_tokenizer.tokenizer, [prompt for prompt, _ in asked], **kwargs)
    found = [
        {
            "prompt": prompt,
            "answer": answer,
            "right": right,
            **{metric: bool(of(answer, right, row)) for metric, of in scorers.items()},
        }
        for (prompt, right), answer, row in zip(asked, answers, rows, strict=True)
    ]
    return {metric: sum(row[metric] for row in found) / max(len(found), 1) for metric in metrics}, found
