"""Batches of rows with two views each."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase

from ..errors import UsageError
from .views import IGNORED

VIEW_PASSES = ("packed", "separate")


class DataCollatorForPairedViews:
    """Pads rows of `PairedViewTokenizer` to the longest of the batch, on the side that the tokenizer pads on.

    B rows, L their longest, V the longest pair of views (or, separately, of all views):

    | key | shape | meaning |
    | --- | --- | --- |
    | `input_ids`, `attention_mask`, `labels` | `[B, L]` | the conversations; labels −100 where nothing is learnt |
    | `label_positions` | `[B, N]` | the tokens that labels follow, to which others fill up the shorter rows |
    | `view_input_ids` | `[B, V]` packed, `[B, 2, V]` separate | the views, the one that predicts first |
    | `view_position_ids` | the same | restart at 0 with each view and each padding token |
    | `view_ends` | `[B, 2]` | the token that stands for each view |
    | `content` | `[B, 2]` | first and last token of the conversation that STP's paths may touch |

    Restarting positions are how transformers knows sequences that share a row: it keeps them from seeing each other,
    with learned and with rotary positions.

    Args:
        tokenizer: of the model; one without a padding token is refused.
        view_passes: "packed": both views in one row, one extra pass; "separate": in rows of their own.
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
        ids = self._padded([row["input_ids"] for row in rows], self.tokenizer.pad_token_id)
        real = self._padded([[1] * len(row["input_ids"]) for row in rows], 0)
        labels = self._padded([row["labels"] for row in rows], IGNORED)
        asked = F.pad(labels[:, 1:] != IGNORED, (0, 1))
        # The tokens that are asked come first, in their order.
        asked_first = asked.int().argsort(dim=1, descending=True, stable=True)[:, : int(asked.sum(dim=1).max())]
        content = torch.tensor([row["content"] for row in rows])
        if self.tokenizer.padding_side == "left":
            content += ids.shape[1] - real.sum(dim=1, keepdim=True)
        batch = {"input_ids": ids, "attention_mask": real, "labels": labels, "content": content}
        batch["label_positions"] = asked_first
        firsts, seconds = ([row[f"{name}_input_ids"] for row in rows] for name in ("text", "code"))
        ends = torch.tensor([[row["text_end"], row["code_end"]] for row in rows])
        if self.view_passes == "packed":
            views = [[*first, *second] for first, second in zip(firsts, seconds, strict=True)]
            positions = [[*range(len(a)), *range(len(b))] for a, b in zip(firsts, seconds, strict=True)]
            ends[:, 1] += torch.tensor([len(first) for first in firsts])
            lengths = torch.tensor([[len(view)] * 2 for view in views])
        else:
            views = [view for pair in zip(firsts, seconds, strict=True) for view in pair]
            positions = [list(range(len(view))) for view in views]
            lengths = torch.tensor([len(view) for view in views]).view(-1, 2)
        view_ids, view_positions = self._padded(views, self.tokenizer.pad_token_id), self._padded(positions, 0)
        if self.tokenizer.padding_side == "left":
            ends = ends + view_ids.shape[1] - lengths
        if self.view_passes == "separate":
            view_ids, view_positions = view_ids.unflatten(0, (-1, 2)), view_positions.unflatten(0, (-1, 2))
        return {**batch, "view_input_ids": view_ids, "view_position_ids": view_positions, "view_ends": ends}

    def _padded(self, rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
        width = max(map(len, rows))
        if self.pad_to_multiple_of:
            width = -(-width // self.pad_to_multiple_of) * self.pad_to_multiple_of
        padded = torch.full((len(rows), width), value)
        for at, row in enumerate(rows):
            begin = width - len(row) if self.tokenizer.padding_side == "left" else 0
            padded[at, begin : begin + len(row)] = torch.tensor(row)
        return padded
