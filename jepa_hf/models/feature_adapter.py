"""Adapter of the encoder of feature vectors and series."""

from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from .configuration_feature_encoder import FeatureEncoderConfig
from .encoder_adapter import required_input


class FeatureEncoderAdapter:
    """`FeatureEncoderModel`: time steps, patches of a vector, or one token per vector.

    See `EncoderAdapter`.
    """

    modality = "features"
    input_names = ("features", "attention_mask")
    absolute_positions = True
    unused_parameters = ()
    compiled_attention: ClassVar[dict[str, str]] = {}

    def __init__(self, config: FeatureEncoderConfig):
        self.config = config
        # A single token cannot be dropped: masked features are replaced instead.
        self.masked_tokens_options: tuple[str, ...] = (
            ("mask_token",) if config.mode == "flat" else ("drop", "mask_token")
        )

    @property
    def grid(self) -> tuple[int, ...]:
        """A line of time steps or patches; empty for one token."""
        return {
            "time": (self.config.max_position_embeddings,),
            "patches": (self.config.num_patches,),
            "flat": (),
        }[self.config.mode]

    def init_missing_weights(self, encoder: PreTrainedModel) -> None:
        """Do nothing: the encoder's own initialization is kept."""

    def register_hooks(self, encoder: PreTrainedModel) -> None:
        """Do nothing: positions are an argument of the encoder."""

    def select_inputs(self, arguments: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
        """Select the features, and for series the mask, which defaults to all ones."""
        features = required_input(arguments, "features")
        if self.config.mode != "time":
            return {"features": features}
        mask = arguments["attention_mask"]
        if mask is None:
            mask = torch.ones(features.shape[:2], dtype=torch.long, device=features.device)
        return {"features": features, "attention_mask": mask}

    def length(self, inputs: dict[str, torch.Tensor]) -> int:
        """Return the number of time steps, of patches, or 1."""
        if self.config.mode == "time":
            return inputs["features"].shape[1]
        return self.grid[0] if self.grid else 1

    def valid_mask(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the mask of a series; vectors are not padded."""
        if self.config.mode == "time":
            return inputs["attention_mask"].bool()
        features = inputs["features"]
        return torch.ones(features.shape[0], self.length(inputs), dtype=torch.bool, device=features.device)

    def encode(self, encoder: PreTrainedModel, inputs: dict[str, torch.Tensor], **flags: bool) -> Any:
        """Run the encoder on all positions."""
        return encoder(**inputs, return_dict=True, **flags)

    def encode_visible(
        self,
        encoder: PreTrainedModel,
        inputs: dict[str, torch.Tensor],
        positions: torch.Tensor,
        valid: torch.Tensor | None,
        **flags: bool,
    ) -> Any:
        """Run the encoder's layers on the visible positions only."""
        return encoder(
            features=inputs["features"],
            attention_mask=None if valid is None else valid.long(),
            positions=positions,
            return_dict=True,
            **flags,
        )
