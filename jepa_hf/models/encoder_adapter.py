"""The interface between the JEPA and an encoder family."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from .errors import UsageError


class EncoderAdapter(Protocol):
    """Interface between the JEPA and one family of encoders.

    An adapter has no parameters. It is built from the encoder's configuration, and the encoder is
    an argument of each call. In the shapes, B is the batch, N = B × views, L the number of
    positions of a sample, C <= L that of visible positions, and D the encoder's width. A position
    is a token, a patch or a time step; [CLS] and register tokens of images are not positions.

    Text adapters also have `max_length` and `check_packing`, image adapters `image_size` and
    `patch_size` (see `TextEncoderAdapter`, `VisionEncoderAdapter`).
    """

    @property
    def config(self) -> Any:
        """The encoder's configuration."""

    @property
    def modality(self) -> str:
        """Key of the defaults in `JepaConfig`: "text", "images" or "features"."""

    @property
    def input_names(self) -> tuple[str, ...]:
        """Arguments of the JEPA's `forward` to read; the one that is masked comes first."""

    @property
    def masked_tokens_options(self) -> tuple[str, ...]:
        """Supported modes, the default first.

        "drop" requires an exact `encode_visible`, "mask_token" an input for masked positions.
        """

    @property
    def absolute_positions(self) -> bool:
        """Whether the encoder's outputs carry absolute positions."""

    @property
    def unused_parameters(self) -> tuple[str, ...]:
        """Names of the encoder's parameters without gradient in JEPA training."""

    @property
    def compiled_attention(self) -> Mapping[str, str]:
        """Replacements of attention implementations under torch.compile."""

    @property
    def grid(self) -> tuple[int, ...]:
        """Shape of the positions: `(length,)`, `(rows, columns)`, or `()` for a single one."""

    def init_missing_weights(self, encoder: PreTrainedModel) -> None:
        """Replace transformers' initialization of missing weights, if it is unsuitable."""

    def register_hooks(self, encoder: PreTrainedModel) -> None:
        """Register the hooks of `encode_visible`, once per encoder."""

    def select_inputs(self, arguments: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
        """Select the encoder's inputs from the JEPA's arguments by name; validate them.

        Raises:
            UsageError: the inputs do not fit the encoder.
        """

    def length(self, inputs: dict[str, torch.Tensor]) -> int:
        """Return the number of positions L of the clean inputs."""

    def valid_mask(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return a mask of the clean inputs, bool `[B, L]`, False on padding."""

    def encode(self, encoder: PreTrainedModel, inputs: dict[str, torch.Tensor], **flags: bool) -> Any:
        """Run the encoder on all positions.

        Args:
            encoder: the context or the target encoder.
            inputs: clean inputs; their values on padding have no effect.
            flags: passed to the encoder. `output_hidden_states` also returns the layers' outputs,
                `[B, L, D]` each, `output_attentions` their attention weights.

        Returns:
            A transformers output; `last_hidden_state` is `[B, L, D]`.
        """

    def encode_visible(
        self,
        encoder: PreTrainedModel,
        inputs: dict[str, torch.Tensor],
        positions: torch.Tensor,
        valid: torch.Tensor | None,
        **flags: bool,
    ) -> Any:
        """Run the encoder on a subset of positions, as if the others were masked in attention.

        Documents of packed rows are encoded independently.

        Args:
            encoder: the context encoder.
            inputs: clean inputs, `[N, L]` each.
            positions: long `[N, C]`.
            valid: bool `[N, C]`, False where `positions` is padded; None if nowhere.
            flags: as in `encode`.

        Returns:
            A transformers output; `last_hidden_state` is `[N, C, D]`.
        """


def required_input(arguments: dict[str, torch.Tensor | None], name: str) -> torch.Tensor:
    """Return the input of this name, or raise a `UsageError`."""
    value = arguments[name]
    if value is None:
        raise UsageError(f"Expected {name} in the batch, got none. Make the batch with the collator.")
    return value
