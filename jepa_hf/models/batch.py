"""A collated batch in the form that encoders, predictor and loss read."""

from typing import NamedTuple

import torch

from .encoder_adapter import EncoderAdapter


class JepaBatch(NamedTuple):
    """A batch of B rows with M masks each, N = B × M.

    A row is a sample, or has up to S samples if rows are packed.

    Args:
        clean: the encoder's clean inputs, `[B, L]` or `[B, ...]` each.
        samples: long `[B, L]`, index of each position's sample in its row, -1 on padding.
        max_samples: S.
        num_masks: M.
        positions: target positions, long `[N, T]`.
        valid: bool `[N, T]`, False where `positions` is padded.
        document_ids: of packed rows, the same as `samples`.
    """

    clean: dict[str, torch.Tensor]
    samples: torch.Tensor
    max_samples: int
    num_masks: int
    positions: torch.Tensor
    valid: torch.Tensor
    document_ids: torch.Tensor | None


def make_batch(
    adapter: EncoderAdapter,
    inputs: dict[str, torch.Tensor | None],
    target_positions: torch.Tensor | None,
    target_valid: torch.Tensor | None,
    document_valid: torch.Tensor | None,
) -> JepaBatch:
    """Select and check the arguments of the JEPA's `forward`.

    `inputs` are the clean inputs of all modalities and the document ids of packed rows. Targets are `[B, M, T]`, and
    `document_valid` bool `[B, S]` says which document ids exist.

    Raises:
        ValueError: no rows, targets that are missing or of another shape, or only one of the two
            arguments of packed rows.
        UsageError: the inputs do not fit the encoder.
    """
    if target_positions is None or target_valid is None:
        raise ValueError(
            "target_positions and target_valid are missing. Make the batch with the collator, or call "
            "get_encoder() for representations alone."
        )
    if target_positions.dim() != 3 or target_positions.shape != target_valid.shape:
        raise ValueError(
            "target_positions and target_valid must have one shape [rows, masks, targets], not "
            f"{tuple(target_positions.shape)} and {tuple(target_valid.shape)}. Make the batch with the collator."
        )
    if not len(target_positions):
        raise ValueError("The batch has no rows. Leave empty batches out, for instance with drop_last.")
    clean = adapter.select_inputs(inputs)
    document_ids = inputs["document_ids"]
    if (document_ids is None) != (document_valid is None):
        raise ValueError("Packed rows need both document_ids and document_valid. Make the batch with the collator.")
    # Without packing, a row is one sample.
    samples = adapter.valid_mask(clean).long() - 1 if document_ids is None else document_ids
    max_samples = 1 if document_valid is None else document_valid.shape[1]
    positions, valid = target_positions.flatten(0, 1), target_valid.flatten(0, 1)
    return JepaBatch(clean, samples, max_samples, target_positions.shape[1], positions, valid, document_ids)
