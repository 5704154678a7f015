"""The predictor's special tokens (LLM-JEPA, section 3.1)."""

from typing import cast

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UsageError

PREDICTOR_TOKEN = "<|predictor_{}|>"
MAX_PREDICTOR_TOKENS = 10


def predictor_tokens(count: int) -> list[str]:
    """Return the k special tokens of the predictor in the order of the official code behind a view.

    Before a view the official code has them in the opposite order.

    >>> predictor_tokens(2)
    ['<|predictor_2|>', '<|predictor_1|>']
    """
    if not 0 <= count <= MAX_PREDICTOR_TOKENS:
        raise UsageError(f"num_predictor_tokens must be between 0 and {MAX_PREDICTOR_TOKENS}, not {count}.")
    return [PREDICTOR_TOKEN.format(number) for number in range(count, 0, -1)]


def add_predictor_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int) -> None:
    """Add the predictor's special tokens to tokenizer and model, if they are missing.

    Args:
        model: a causal language model; its embeddings are enlarged in place.
        tokenizer: its tokenizer, changed in place.
        count: k, 0 to 10.

    Raises:
        UsageError: another `count`.
    """
    tokenizer.add_tokens(predictor_tokens(count), special_tokens=True)
    if len(tokenizer) > cast(nn.Embedding, model.get_input_embeddings()).num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
