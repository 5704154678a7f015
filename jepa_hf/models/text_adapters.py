"""Adapters of text encoders: positions, padding, packed rows, attention masks by query and key."""

from typing import Any, ClassVar

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .attention import SDPA, SDPA_SKIP_EMPTY_MASK
from .encoder_adapter import required_input
from .errors import UsageError
from .packed_sequences import block_diagonal_mask, document_position_ids, gather_document_ids
from .upstream import attention_implementation


class TextEncoderAdapter:
    """Encoders with a `position_ids` argument, for which dropping tokens is exact.

    BERT, DistilBERT, ELECTRA. See `EncoderAdapter`.
    """

    modality = "text"
    input_names = ("input_ids", "attention_mask")
    masked_tokens_options: tuple[str, ...] = ("drop", "mask_token")
    absolute_positions = True
    unused_parameters = ()
    compiled_attention: ClassVar[dict[str, str]] = {SDPA: SDPA_SKIP_EMPTY_MASK}

    def __init__(self, config: PreTrainedConfig):
        self.config = config

    @property
    def grid(self) -> tuple[int, ...]:
        """A line of `max_position_embeddings` positions."""
        return (self.config.max_position_embeddings,)

    @property
    def max_length(self) -> int:
        """Maximum number of tokens of a sequence."""
        return self.config.max_position_embeddings

    def init_missing_weights(self, encoder: PreTrainedModel) -> None:
        """Do nothing: transformers' initialization is kept."""

    def register_hooks(self, encoder: PreTrainedModel) -> None:
        """Do nothing: positions are an argument of these encoders."""

    def check_packing(self, encoder: PreTrainedModel) -> None:
        """Refuse packed rows if attention cannot be limited to documents.

        Raises:
            UsageError: the attention implementation does not support dense masks.
        """
        _check_dense_masks(encoder, "Packed rows need", "leave out --packed")

    def select_inputs(self, arguments: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
        """Select token ids, and the mask and the document ids if present."""
        required_input(arguments, "input_ids")
        selected = {name: arguments[name] for name in (*self.input_names, "document_ids")}
        return {name: value for name, value in selected.items() if value is not None}

    def length(self, inputs: dict[str, torch.Tensor]) -> int:
        """Return the number of tokens."""
        return inputs["input_ids"].shape[1]

    def valid_mask(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the attention mask, all True if there is none."""
        if "attention_mask" not in inputs:
            return torch.ones_like(inputs["input_ids"], dtype=torch.bool)
        return inputs["attention_mask"].bool()

    def encode(self, encoder: PreTrainedModel, inputs: dict[str, torch.Tensor], **flags: bool) -> Any:
        """Run the encoder on all tokens."""
        if "document_ids" in inputs:
            valid = self.valid_mask(inputs)
            all_positions = torch.arange(valid.shape[1], device=valid.device).expand_as(valid)
            return self.encode_visible(encoder, inputs, all_positions, valid, **flags)
        mask = inputs.get("attention_mask")
        return encoder(
            input_ids=self.token_ids(inputs),
            attention_mask=None if mask is None else self.attention(encoder, mask.bool()),
            return_dict=True,
            **flags,
        )

    def encode_visible(
        self,
        encoder: PreTrainedModel,
        inputs: dict[str, torch.Tensor],
        positions: torch.Tensor,
        valid: torch.Tensor | None,
        **flags: bool,
    ) -> Any:
        """Run the encoder on the visible tokens with their original position ids."""
        documents = None
        if "document_ids" in inputs:
            documents = gather_document_ids(inputs["document_ids"], positions, valid)
        return encoder(
            input_ids=self.token_ids(inputs).gather(1, positions),
            attention_mask=self.visible_attention(encoder, positions, valid, documents),
            position_ids=self.position_ids(inputs).gather(1, positions),
            return_dict=True,
            **flags,
        )

    def token_ids(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the token ids, with the padding token where the attention mask is 0.

        Some encoders count positions by the padding token, and an id on padding may be none.
        """
        padding = ~self.valid_mask(inputs)
        return inputs["input_ids"].masked_fill(padding, self.config.pad_token_id or 0)

    def position_ids(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the position ids of all tokens, long `[N, L]`."""
        if "document_ids" in inputs:
            return document_position_ids(inputs["document_ids"])
        length = inputs["input_ids"].shape[1]
        return torch.arange(length, device=inputs["input_ids"].device).expand_as(inputs["input_ids"])

    def attention(self, encoder: PreTrainedModel, valid: torch.Tensor) -> torch.Tensor:
        """Build the encoder's attention mask from `valid`, bool `[N, L]`.

        SDPA gets a mask by query and key. transformers would inspect a mask `[N, L]` for padding,
        which synchronizes with the device.
        """
        return valid[:, None, None, :] if _is_sdpa(encoder) else valid.long()

    def visible_attention(
        self,
        encoder: PreTrainedModel,
        positions: torch.Tensor,
        valid: torch.Tensor | None,
        documents: torch.Tensor | None = None,
    ) -> Any:
        """Build the encoder's attention mask for visible tokens at `positions`, long `[N, C]`.

        `valid`, bool `[N, C]`, is False where they are padded; None if nowhere. `documents`, long `[N, C]`, are the
        document ids of packed rows.
        """
        if documents is None:
            return None if valid is None else self.attention(encoder, valid)
        self.check_packing(encoder)
        return _dense_mask(encoder, block_diagonal_mask(documents))


class RobertaEncoderAdapter(TextEncoderAdapter):
    """RoBERTa, XLM-RoBERTa, CamemBERT: positions count from `pad_token_id + 1` and skip padding."""

    @property
    def max_length(self) -> int:
        """Maximum number of tokens of a sequence, without the offset."""
        return self.config.max_position_embeddings - self.config.pad_token_id - 1

    def position_ids(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the position ids of all tokens; padding has `pad_token_id`."""
        not_padding = self.token_ids(inputs).ne(self.config.pad_token_id)
        if "document_ids" in inputs:
            count = document_position_ids(inputs["document_ids"], not_padding) + 1
        else:
            count = not_padding.long().cumsum(dim=1)
        return count * not_padding + self.config.pad_token_id


class ModernBertEncoderAdapter(TextEncoderAdapter):
    """ModernBERT: local layers attend within a window of original positions."""

    absolute_positions = False

    def attention(self, encoder: PreTrainedModel, valid: torch.Tensor) -> torch.Tensor:
        """Return a mask by token, from which transformers builds each layer's mask."""
        return valid.long()

    def visible_attention(
        self,
        encoder: PreTrainedModel,
        positions: torch.Tensor,
        valid: torch.Tensor | None,
        documents: torch.Tensor | None = None,
    ) -> Any:
        """Build one dense mask for global and one for local layers."""
        if valid is None:
            valid = torch.ones_like(positions, dtype=torch.bool)
        if documents is None:
            _check_dense_masks(encoder, "With masked_tokens 'drop' ModernBERT needs", "--masked_tokens mask_token")
            full = valid[:, None, None, :].expand(-1, 1, valid.shape[1], -1)
        else:
            self.check_packing(encoder)
            full = block_diagonal_mask(documents)
        distance = (positions[:, :, None] - positions[:, None, :]).abs()
        # A padding query may have no key in its window, for which sdpa gives NaN: it attends to itself.
        self_mask = torch.eye(valid.shape[1], dtype=torch.bool, device=valid.device)
        local = (full & (distance <= self.config.local_attention // 2)[:, None]) | self_mask
        return {
            "full_attention": _dense_mask(encoder, full),
            "sliding_attention": _dense_mask(encoder, local),
        }


class FullLengthTextEncoderAdapter(TextEncoderAdapter):
    """Text encoders for which dropping tokens is inexact (relative positions) or unverified."""

    masked_tokens_options = ("mask_token",)
    absolute_positions = False
    compiled_attention: ClassVar[dict[str, str]] = {}

    def select_inputs(self, arguments: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
        """Select the inputs; add a mask, because some of these encoders warn without one."""
        inputs = super().select_inputs(arguments)
        return {"attention_mask": torch.ones_like(inputs["input_ids"])} | inputs

    def attention(self, encoder: PreTrainedModel, valid: torch.Tensor) -> torch.Tensor:
        """Return a mask by token, which every encoder supports."""
        return valid.long()

    def check_packing(self, encoder: PreTrainedModel) -> None:
        """Refuse packed rows."""
        raise UsageError(
            f"Packed rows are not exact for {self.config.model_type} encoders, whose attention depends on every "
            "position of the row. Leave out --packed."
        )


def _is_sdpa(encoder: PreTrainedModel) -> bool:
    return attention_implementation(encoder.config) in (SDPA, SDPA_SKIP_EMPTY_MASK)


def _check_dense_masks(encoder: PreTrainedModel, subject: str, alternative: str) -> None:
    """Raise a `UsageError` if the encoder's attention does not support masks by query and key."""
    implementation = attention_implementation(encoder.config)
    if not _is_sdpa(encoder) and implementation != "eager":
        raise UsageError(
            f"{subject} an attention mask by query and key, which attn_implementation {implementation!r} does not "
            f"support. Use sdpa, or {alternative}."
        )


def _dense_mask(encoder: PreTrainedModel, allowed: torch.Tensor) -> torch.Tensor:
    """Convert a mask by query and key, bool `[N, 1, C, C]`; eager attention adds it."""
    if _is_sdpa(encoder):
        return allowed
    lowest = torch.finfo(encoder.dtype).min
    return torch.zeros(allowed.shape, dtype=encoder.dtype, device=allowed.device).masked_fill(~allowed, lowest)
