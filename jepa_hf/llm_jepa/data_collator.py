"""Batches of rows with two views each."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase

from ..errors import UsageError
from .view_tokenizer import IGNORED

VIEW_PASSES = ("packed", "separate")


class DataCollatorForPairedViews:
    """Pads rows of `PairedViewTokenizer` to the longest of the batch, on the side that the tokenizer pads on; views in
    rows of their own on the right, where causal attention does not see it.

    B rows, L their longest, V the longest pair of views (or, separately, of all views):

    | key | shape | meaning |
    | --- | --- | --- |
    | `input_ids`, `attention_mask`, `labels` | `[B, L]` | the conversations; labels −100 where nothing is learnt |
    | `label_positions` | `[B, N]` | the tokens that labels follow, to which others fill up the shorter rows |
    | `view_input_ids` | `[B, V]` packed, `[B, 2, V]` separate | the views, the one that predicts first |
    | `view_position_ids` | the same | restart at 0 with each view and each padding token |
    | `view_ends` | `[B, 2]` | the token that stands for each view |
    | `second_view` | `[B, W]` packed only | where the second view's tokens are; padding of shorter ones comes last |
    | `content` | `[B, 2]` | first and last token of the conversation that STP's paths may touch |

    Restarting positions are how transformers knows sequences that share a row: it keeps them from seeing each other,
    with learned and with rotary positions.

    Args:
        tokenizer: of the model; one without a padding token is refused.
        view_passes: "packed": both views in one row, which continues that of the conversation: one pass reads all;
            "separate": in rows of their own, which another pass reads.
        pad_to_multiple_of: lengths become multiples of it.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, view_passes: str = "packed", pad_to_multiple_of: int | None = None
    ):
        if view_passes not in VIEW_PASSES:
            raise UsageError(f"view_passes must be packed or separate, not {view_passes!r}")
        if tokenizer.pad_token_id is None:
            raise UsageError("the tokenizer has no padding token: set tokenizer.pad_token, to its eos_token if need be")
        self.tokenizer = tokenizer
        self.view_passes = view_passes
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        whole = [row["input_ids"] for row in rows]
        side = self.tokenizer.padding_side
        view_side = side if self.view_passes == "packed" else "right"
        firsts, seconds = ([row[f"{name}_input_ids"] for row in rows] for name in ("text", "code"))
        ends = torch.tensor([[row["text_end"], row["code_end"]] for row in rows])
        if self.view_passes == "packed":
            views = [[*first, *second] for first, second in zip(firsts, seconds, strict=True)]
            view_positions = [[*range(len(a)), *range(len(b))] for a, b in zip(firsts, seconds, strict=True)]
            ends[:, 1] += torch.tensor([len(first) for first in firsts])
        else:
            views = [view for pair in zip(firsts, seconds, strict=True) for view in pair]
            view_positions = [list(range(len(view))) for view in views]

        # Nothing comes before a row's first token but padding, on one side.
        labels = self._padded([[IGNORED, *row["labels"][1:]] for row in rows], IGNORED, side)
        asked = F.pad(labels[:, 1:] != IGNORED, (0, 1))
        batch = {
            "input_ids": self._padded(whole, self.tokenizer.pad_token_id, side),
            "attention_mask": self._padded([[1] * len(row) for row in whole], 0, side),
            "labels": labels,
            # The tokens that are asked come first, in their order.
            "label_positions": asked.int().argsort(dim=1, descending=True, stable=True)[:, : asked.sum(dim=1).max()],
            "content": torch.tensor([row["content"] for row in rows]),
            "view_input_ids": self._padded(views, self.tokenizer.pad_token_id, view_side),
            "view_position_ids": self._padded(view_positions, 0, view_side),
            "view_ends": ends,
        }
        if self.view_passes == "packed":
            places = [range(len(a), len(a) + len(b)) for a, b in zip(firsts, seconds, strict=True)]
            batch["second_view"] = self._padded(places, 0, "right")
        if side == "left":
            batch["content"] += _padding(batch["input_ids"], whole)
        if view_side == "left":
            padding = _padding(batch["view_input_ids"], views)
            batch["view_ends"] += padding
            batch["second_view"] += padding
        if self.view_passes == "separate":
            for name in ("view_input_ids", "view_position_ids"):
                batch[name] = batch[name].unflatten(0, (-1, 2))
        return batch

    def _padded(self, rows: Sequence[Sequence[int]], value: int, side: str) -> torch.Tensor:
        width = max(map(len, rows))
        if self.pad_to_multiple_of:
            width = -(-width // self.pad_to_multiple_of) * self.pad_to_multiple_of
        padded = torch.full((len(rows), width), value)
        for at, row in enumerate(rows):
            begin = width - len(row) if side == "left" else 0
            padded[at, begin : begin + len(row)] = torch.tensor(row)
        return padded


def _padding(padded: torch.Tensor, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """`[N, 1]`: how much of each row is padding."""
    return padded.shape[1] - torch.tensor([[len(row)] for row in rows])
