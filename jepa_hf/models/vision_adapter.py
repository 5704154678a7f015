"""Adapter of vision transformers: patches are dropped behind the embeddings."""

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from .encoder_adapter import required_input
from .errors import UsageError
from .positions import gather_positions, sincos_positions


class VisionEncoderAdapter:
    """Vision transformers over patches; prefix tokens ([CLS], registers) are always visible.

    ViT, I-JEPA, DINOv2. See `EncoderAdapter`.
    """

    modality = "images"
    input_names: tuple[str, ...] = ("pixel_values",)
    masked_tokens_options: tuple[str, ...] = ("drop",)
    absolute_positions = True
    # Used for masked image modelling only.
    unused_parameters: tuple[str, ...] = ("embeddings.mask_token",)
    compiled_attention: ClassVar[dict[str, str]] = {}

    def __init__(self, config: PreTrainedConfig):
        self.config = config
        self._visible: torch.Tensor | None = None

    @torch.no_grad()
    def init_missing_weights(self, encoder: PreTrainedModel) -> None:
        """Initialize sine-cosine positions (I-JEPA) and a projection of matching scale.

        With transformers' standard deviation of 0.02, projected 4 × 4 patches have a tenth of the
        positions' norm, and targets differ by position only (benchmarks/RESULTS.md, entry 5).
        """
        embeddings: Any = encoder.embeddings
        projection = embeddings.patch_embeddings.projection.weight
        init.normal_(projection, std=projection[0].numel() ** -0.5)
        table = embeddings.position_embeddings
        patches = sincos_positions(self.grid, table.shape[-1]).to(table)
        init.copy_(table, torch.cat([table[:, : table.shape[1] - len(patches)], patches[None]], dim=1))

    def register_hooks(self, encoder: PreTrainedModel) -> None:
        """Register a hook on the embeddings that drops patches in `encode_visible`.

        Not in each call, because torch.compile cannot trace the registration of a hook.
        """
        embeddings: Any = encoder.embeddings
        embeddings.register_forward_hook(self._keep_visible)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images, in pixels."""
        return _height_width(self.config, "image_size")

    @property
    def patch_size(self) -> tuple[int, int]:
        """Height and width of a patch, in pixels."""
        return _height_width(self.config, "patch_size")

    @property
    def grid(self) -> tuple[int, ...]:
        """Rows and columns of patches."""
        size, patch = self.image_size, self.patch_size
        return size[0] // patch[0], size[1] // patch[1]

    def select_inputs(self, arguments: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
        """Select the pixels.

        Raises:
            UsageError: no images, or images of another size than the encoder's.
        """
        pixels, size = required_input(arguments, "pixel_values"), self.image_size
        if tuple(pixels.shape[-2:]) != size:
            raise UsageError(
                f"Expected images of {size[0]} x {size[1]} pixels, which the encoder reads, got {pixels.shape[-2]} x "
                f"{pixels.shape[-1]}. Set the image processor's size."
            )
        return {"pixel_values": pixels}

    def length(self, inputs: dict[str, torch.Tensor]) -> int:
        """Return the number of patches."""
        return self.grid[0] * self.grid[1]

    def valid_mask(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return a mask that is all True: images are not padded."""
        pixels = next(iter(inputs.values()))
        return torch.ones(pixels.shape[0], self.length(inputs), dtype=torch.bool, device=pixels.device)

    def encode(self, encoder: PreTrainedModel, inputs: dict[str, torch.Tensor], **flags: bool) -> Any:
        """Run the encoder on all patches; prefix tokens are removed from the output."""
        output = encoder(**inputs, return_dict=True, **flags)
        return self._patches_only(output, self.length(inputs))

    def encode_visible(
        self,
        encoder: PreTrainedModel,
        inputs: dict[str, torch.Tensor],
        positions: torch.Tensor,
        valid: torch.Tensor | None,
        **flags: bool,
    ) -> Any:
        """Run the encoder's layers on the visible patches only.

        Raises:
            ValueError: a row of `valid` is neither True nor False throughout.
        """
        # The check would synchronize with a GPU on every step, and break a compiled graph.
        if valid is not None and valid.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_rectangular(valid)

        self._visible = positions
        try:
            output = encoder(**inputs, return_dict=True, **flags)
            if self._visible is not None:
                raise ValueError("The encoder read all patches. Call register_hooks(encoder) of its adapter first.")
        finally:
            self._visible = None
        return self._patches_only(output, positions.shape[1])

    def _keep_visible(self, _embeddings: nn.Module, _inputs: tuple, embedded: torch.Tensor) -> torch.Tensor:
        """Gather the visible of the patches `[N, prefix + L, D]`; a hook for `encode_visible`."""
        if self._visible is None:
            return embedded
        visible, self._visible = self._visible, None
        prefix = embedded.shape[1] - self.grid[0] * self.grid[1]
        return torch.cat([embedded[:, :prefix], gather_positions(embedded[:, prefix:], visible)], dim=1)

    @staticmethod
    def _patches_only(output: Any, count: int) -> Any:
        """Remove prefix tokens from the encoder's output, in place."""
        output.last_hidden_state = output.last_hidden_state[:, -count:]
        if output.hidden_states is not None:
            output.hidden_states = tuple(state[:, -count:] for state in output.hidden_states)
        return output


def _check_rectangular(valid: torch.Tensor) -> None:
    """Raise a `ValueError` unless each row of `valid`, bool `[N, C]`, is constant."""
    if not bool((valid.all(dim=1) | ~valid.any(dim=1)).all()):
        raise ValueError("Image batches must be rectangular: rows of context_valid are all True or all False.")


def _height_width(config: PreTrainedConfig, name: str) -> tuple[int, int]:
    """Read height and width, which a configuration has as one or two numbers."""
    value = getattr(config, name)
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise UsageError(f"{name} must be one or two integers of at least 1, not {value!r:.80}.")
    return pair
