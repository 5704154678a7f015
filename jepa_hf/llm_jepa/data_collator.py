"""Collation of rows with two views each."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase

from ..errors import UsageError
from ..models.argument_owners import owner_of_argument
from ..utils.keywords import ChecksKeywords
from .view_tokenizer import IGNORE_INDEX

VIEW_PASSES = ("packed", "separate")


class DataCollatorForPairedViews(ChecksKeywords):
    """Pad and batch rows of `PairedViewTokenizer`.

    Rows are padded to the longest of the batch, on the tokenizer's padding side. Views in separate
    rows are padded on the right, where causal attention does not see the padding.

    B rows, L the longest, V the longest pair of views (or the longest view, if they are separate):

    | key | shape | meaning |
    | --- | --- | --- |
    | `input_ids`, `attention_mask`, `labels` | `[B, L]` | the conversations; labels without loss are −100 |
    | `label_positions` | `[B, N]` | positions whose next token has a label; shorter rows are filled with others |
    | `view_input_ids` | `[B, V]` packed, `[B, 2, V]` separate | the views, the predicting one first |
    | `view_position_ids` | as `view_input_ids` | restart at 0 with each view and each padding token |
    | `view_ends` | `[B, 2]` | position of the token whose state represents the view |
    | `second_view` | `[B, W]`, packed only | positions of the second view's tokens, padded on the right |
    | `stp_span` | `[B, 2]` | first and last position of the conversation that STP paths may use |

    transformers detects sequences that share a row by their restarting positions and masks
    attention between them, with learned and with rotary positions.

    Args:
        tokenizer: the model's tokenizer.
        view_passes: "packed": both views follow the conversation in the same row, and one pass
            reads all; "separate": each view has a row of its own, and a second pass reads them.
        pad_to_multiple_of: pad lengths to a multiple of this.

    Raises:
        UsageError: another `view_passes`.
    """

    # Columns of the data set that the collator reads and the model does not.
    extra_columns = ("labels", "stp_span", "text_input_ids", "text_end", "code_input_ids", "code_end")

    _owner_of = staticmethod(partial(owner_of_argument, llm=True))

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, view_passes: str = "packed", pad_to_multiple_of: int | None = None
    ):
        if view_passes not in VIEW_PASSES:
            raise UsageError(f"view_passes must be packed or separate, got {view_passes!r}.")
        self.tokenizer = tokenizer
        self.view_passes = view_passes
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate rows, see the table of the class."""
        conversations = [row["input_ids"] for row in rows]
        side = self.tokenizer.padding_side
        view_side = side if self.view_passes == "packed" else "right"
        first_views, second_views = ([row[f"{name}_input_ids"] for row in rows] for name in ("text", "code"))
        ends = torch.tensor([[row["text_end"], row["code_end"]] for row in rows])
        if self.view_passes == "packed":
            pairs = list(zip(first_views, second_views, strict=True))
            views = [[*first, *second] for first, second in pairs]
            view_positions = [[*range(len(first)), *range(len(second))] for first, second in pairs]
            ends[:, 1] += torch.tensor([len(first) for first in first_views])
        else:
            views = [view for pair in zip(first_views, second_views, strict=True) for view in pair]
            view_positions = [list(range(len(view))) for view in views]

        # A row's first token has no predecessor (or, with left padding, only padding): it is never a label.
        labels = self._padded([[IGNORE_INDEX, *row["labels"][1:]] for row in rows], IGNORE_INDEX, side)
        has_label = F.pad(labels[:, 1:] != IGNORE_INDEX, (0, 1))
        batch = {
            "input_ids": self._padded(conversations, self.pad_token_id, side),
            "attention_mask": self._padded([[1] * len(row) for row in conversations], 0, side),
            "labels": labels,
            # A stable sort puts positions with a label first and keeps their order.
            "label_positions": has_label.int().argsort(dim=1, descending=True, stable=True)[
                :, : has_label.sum(dim=1).max()
            ],
            "stp_span": torch.tensor([row["stp_span"] for row in rows]),
            "view_input_ids": self._padded(views, self.pad_token_id, view_side),
            "view_position_ids": self._padded(view_positions, 0, view_side),
            "view_ends": ends,
        }
        if self.view_passes == "packed":
            positions = [range(len(first), len(first) + len(second)) for first, second in pairs]
            batch["second_view"] = self._padded(positions, 0, "right")
        if side == "left":
            batch["stp_span"] += _num_padding(batch["input_ids"], conversations)
        if view_side == "left":
            padding = _num_padding(batch["view_input_ids"], views)
            batch["view_ends"] += padding
            batch["second_view"] += padding
        if self.view_passes == "separate":
            for name in ("view_input_ids", "view_position_ids"):
                batch[name] = batch[name].unflatten(0, (-1, 2))
        return batch

    @property
    def pad_token_id(self) -> int:
        """Return the padding token, or any other: padding is never attended to."""
        return self.tokenizer.pad_token_id or 0

    def _padded(self, rows: Sequence[Sequence[int]], value: int, side: str) -> torch.Tensor:
        width = max(map(len, rows))
        if self.pad_to_multiple_of:
            width = -(-width // self.pad_to_multiple_of) * self.pad_to_multiple_of
        padded = torch.full((len(rows), width), value)
        for index, row in enumerate(rows):
            begin = width - len(row) if side == "left" else 0
            padded[index, begin : begin + len(row)] = torch.tensor(row)
        return padded


def _num_padding(padded: torch.Tensor, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return the number of padding tokens of each row, `[N, 1]`."""
    return padded.shape[1] - torch.tensor([[len(row)] for row in rows])
