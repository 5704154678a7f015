"""Encoder adapters: input names, encoding of a subset of positions, layout of positions.

All differences between encoder families are in this file. docs/how-to/encoder-family.md adds one.
"""

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import nn
from transformers import MODEL_MAPPING, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from .attention import SDPA, SDPA_SKIP_EMPTY_MASK
from .configuration_feature_encoder import FeatureEncoderConfig
from .errors import UsageError
from .modeling_feature_encoder import FeatureEncoderModel
from .packed_sequences import block_diagonal_mask, document_position_ids, gather_document_ids
from .positions import gather_positions, sincos_positions
from .upstream import attention_implementation, build_from_config

_TEXT_BY_POSITION_IDS = ("bert", "distilbert", "electra")
TEXT_WITH_PADDING_OFFSET = ("roberta", "xlm-roberta", "camembert")
_VISION = ("vit", "ijepa", "dinov2", "dinov2_with_registers")
_FEATURES = FeatureEncoderConfig.model_type


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
        ...

    @property
    def modality(self) -> str:
        """Key of the defaults in `JepaConfig`: "text", "images" or "features"."""
        ...

    @property
    def input_names(self) -> tuple[str, ...]:
        """Arguments of the JEPA's `forward` to read; the one that is masked comes first."""
        ...

    @property
    def masked_tokens_options(self) -> tuple[str, ...]:
        """Supported modes, the default first.

        "drop" requires an exact `encode_visible`, "mask_token" an input for masked positions.
        """
        ...

    @property
    def absolute_positions(self) -> bool:
        """Whether the encoder's outputs carry absolute positions."""
        ...

    @property
    def unused_parameters(self) -> tuple[str, ...]:
        """Names of the encoder's parameters without gradient in JEPA training."""
        ...

    @property
    def compiled_attention(self) -> Mapping[str, str]:
        """Replacements of attention implementations under torch.compile."""
        ...

    @property
    def grid(self) -> tuple[int, ...]:
        """Shape of the positions: `(length,)`, `(rows, columns)`, or `()` for a single one."""
        ...

    def init_missing_weights(self, encoder: PreTrainedModel) -> None:
        """Replace transformers' initialization of missing weights, if it is unsuitable."""
        ...

    def register_hooks(self, encoder: PreTrainedModel) -> None:
        """Register the hooks of `encode_visible`, once per encoder."""
        ...

    def select_inputs(self, arguments: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
        """Select the encoder's inputs from the JEPA's arguments by name; validate them.

        Raises:
            UsageError: the inputs do not fit the encoder.
        """
        ...

    def length(self, inputs: dict[str, torch.Tensor]) -> int:
        """Return the number of positions L of the clean inputs."""
        ...

    def valid_mask(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return a mask of the clean inputs, bool `[B, L]`, False on padding."""
        ...

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
        ...

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
        ...


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
        _required(arguments, "input_ids")
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
        """Build the encoder's attention mask for visible tokens.

        Args:
            encoder: the encoder.
            positions: long `[N, C]`.
            valid: bool `[N, C]`, False where `positions` is padded; None if nowhere.
            documents: document ids of packed rows, long `[N, C]`.
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
        # A padding query may have no key in its window, for which sdpa gives NaN: it attends to
        # itself.
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
        pixels, size = _required(arguments, "pixel_values"), self.image_size
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
        features = _required(arguments, "features")
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


def _check_rectangular(valid: torch.Tensor) -> None:
    """Raise a `ValueError` unless each row of `valid`, bool `[N, C]`, is constant."""
    if not bool((valid.all(dim=1) | ~valid.any(dim=1)).all()):
        raise ValueError("Image batches must be rectangular: rows of context_valid are all True or all False.")


def _required(arguments: dict[str, torch.Tensor | None], name: str) -> torch.Tensor:
    """Return the input of this name, or raise a `UsageError`."""
    value = arguments[name]
    if value is None:
        raise UsageError(f"Expected {name} in the batch, got none. Make the batch with the collator.")
    return value


def _height_width(config: PreTrainedConfig, name: str) -> tuple[int, int]:
    """Read height and width, which a configuration has as one or two numbers."""
    value = getattr(config, name)
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise UsageError(f"{name} must be one or two integers of at least 1, not {value!r:.80}.")
    return pair


# The adapter of each `model_type`; other types get a `FullLengthTextEncoderAdapter`.
ENCODER_ADAPTERS: dict[str, Callable[[Any], EncoderAdapter]] = {
    **dict.fromkeys(_TEXT_BY_POSITION_IDS, TextEncoderAdapter),
    **dict.fromkeys(TEXT_WITH_PADDING_OFFSET, RobertaEncoderAdapter),
    "modernbert": ModernBertEncoderAdapter,
    **dict.fromkeys(_VISION, VisionEncoderAdapter),
    _FEATURES: FeatureEncoderAdapter,
}


def encoder_adapter_for(config: PreTrainedConfig) -> EncoderAdapter:
    """Return the adapter of an encoder's configuration."""
    return ENCODER_ADAPTERS.get(config.model_type, FullLengthTextEncoderAdapter)(config)


def encoder_from_config(config: PreTrainedConfig, add_pooling_layer: bool = False, **kwargs: Any) -> PreTrainedModel:
    """Build a randomly initialized encoder, by default without pooler, which JEPA does not train."""
    if config.model_type == _FEATURES:
        return build_from_config(FeatureEncoderModel, config, **kwargs)
    without_pooler = {} if add_pooling_layer else no_pooler_argument(config)
    return AutoModel.from_config(config, **without_pooler, **kwargs)


def encoder_from_pretrained(
    name_or_path: str, config: PreTrainedConfig, keep_pooler: bool = False, **kwargs: Any
) -> PreTrainedModel:
    """Load a pretrained encoder, see `encoder_and_loading_info`."""
    return encoder_and_loading_info(name_or_path, config, keep_pooler, **kwargs)[0]


def encoder_and_loading_info(
    name_or_path: str, config: PreTrainedConfig, keep_pooler: bool = False, **kwargs: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a pretrained encoder, from a plain checkpoint or one with a task head.

    Args:
        name_or_path: directory or Hub name.
        config: its configuration.
        keep_pooler: load the pooler too, if the checkpoint has one that is not `untrained_pooler`.
        kwargs: passed to `from_pretrained`.

    Returns:
        The encoder, and the missing and unexpected weights as `from_pretrained` reports them.
    """
    kwargs |= {"config": config, "output_loading_info": True}
    if config.model_type == _FEATURES:
        return cast(Any, FeatureEncoderModel).from_pretrained(name_or_path, **kwargs)
    without_pooler = no_pooler_argument(config)
    encoder, info = AutoModel.from_pretrained(name_or_path, **without_pooler, **kwargs)
    # Loaded twice, because a pooler that the checkpoint lacks would be drawn at random.
    if keep_pooler and without_pooler and any(".pooler." in f".{name}" for name in info["unexpected_keys"]):
        complete = AutoModel.from_pretrained(name_or_path, **kwargs)
        state = complete[0].state_dict()
        if not all(torch.equal(state[name].cpu(), value) for name, value in untrained_pooler(encoder).items()):
            return complete
    return encoder, info


def untrained_pooler(encoder: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Draw the weights of a pooler that `AutoModel` builds and the encoder lacks, always the same.

    No configuration makes `AutoModel` leave the pooler out. An export without its weights would load
    with others each time, and with a table of missing weights.

    Returns:
        Parameters by name; empty for families without pooler.
    """
    if not no_pooler_argument(encoder.config):
        return {}
    config = copy.deepcopy(encoder.config)
    config.num_hidden_layers = 1  # the pooler does not depend on the layers
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = encoder_from_config(config, add_pooling_layer=True, dtype=encoder.dtype).state_dict()
    return {name: value for name, value in state.items() if is_pooler_parameter(name)}


def is_pooler_parameter(name: str) -> bool:
    """Return whether the encoder's parameter of this name belongs to its pooler."""
    return name.startswith("pooler.")


def no_pooler_argument(config: PreTrainedConfig) -> dict[str, bool]:
    """Return the keyword argument that disables the pooler, if `AutoModel` builds one by default."""
    model_class: Any = MODEL_MAPPING[type(config)]
    model_class = model_class[0] if isinstance(model_class, (tuple, list)) else model_class
    argument = inspect.signature(model_class.__init__).parameters.get("add_pooling_layer")
    return {} if argument is None or argument.default is False else {"add_pooling_layer": False}
