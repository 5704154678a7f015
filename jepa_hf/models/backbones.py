"""The only file that knows encoder families: what one eats, how it reads a subset of positions, where positions lie.

One small adapter per kind. An adapter holds no parameters: it is derived from the encoder's configuration and is given
the encoder to run.
"""

import inspect
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from .attention import SDPA, SDPA_UNMASKED
from .configuration_feature_encoder import FeatureEncoderConfig
from .errors import UsageError
from .modeling_feature_encoder import FeatureEncoderModel
from .packed_sequences import documents_at, positions_in_documents, same_document
from .positions import gather_positions, sincos_positions

_TEXT_BY_POSITION_IDS = ("bert", "distilbert", "electra")
TEXT_WITH_PADDING_OFFSET = ("roberta", "xlm-roberta", "camembert")
_VISION = ("vit", "ijepa", "dinov2", "dinov2_with_registers")
_FEATURES = FeatureEncoderConfig.model_type


class TextBackbone:
    """Encoders of token ids whose position_ids can be given: dropping tokens is exact (BERT, DistilBERT, ELECTRA)."""

    modality = "text"
    input_names = ("input_ids", "attention_mask")
    context_modes = ("dropped", "kept")
    # Whether the outputs carry absolute positions.
    absolute_positions = True
    unused_parameters = ()
    # What a compiled model takes in place of an attention implementation.
    compiled_attention: ClassVar[dict[str, str]] = {SDPA: SDPA_UNMASKED}

    def __init__(self, config: PreTrainedConfig):
        self.config = config

    @property
    def grid(self) -> tuple[int, ...]:
        """Positions that the predictor embeds: a line of `max_position_embeddings`."""
        return (self.config.max_position_embeddings,)

    @property
    def max_length(self) -> int:
        """Most tokens that one sequence may have."""
        return self.config.max_position_embeddings

    def initialize(self, encoder: PreTrainedModel) -> None:
        """Nothing: random weights stay as transformers draws them."""

    def prepare(self, encoder: PreTrainedModel) -> None:
        """Nothing: these encoders take positions as an argument."""

    def check_packing(self, encoder: PreTrainedModel) -> None:
        """Refuse packed rows where the encoder's attention cannot be kept within documents.

        Raises:
            UsageError: an attention implementation that takes no dense masks.
        """
        _check_dense_masks(encoder, "packed rows need", "leave out --packed")

    def clean_inputs(self, given: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
        """Of the model's arguments, those that the encoder reads; without a mask, every token is real."""
        names = (*self.input_names, "sequence_ids")
        return {name: given[name] for name in names if given[name] is not None}

    def length(self, inputs: dict[str, torch.Tensor]) -> int:
        """Number of positions of the inputs."""
        return inputs["input_ids"].shape[1]

    def valid(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """bool `[B, L]`, False on padding."""
        if "attention_mask" not in inputs:
            return torch.ones_like(inputs["input_ids"], dtype=torch.bool)
        return inputs["attention_mask"].bool()

    def encode(self, encoder: PreTrainedModel, inputs: dict[str, torch.Tensor], hidden_states: bool = False) -> Any:
        """Run the encoder over all positions; `last_hidden_state` is `[B, L, D]`."""
        if "sequence_ids" in inputs:
            valid = self.valid(inputs)
            every = torch.arange(valid.shape[1], device=valid.device).expand_as(valid)
            return self.encode_visible(encoder, inputs, every, valid, hidden_states)
        mask = inputs.get("attention_mask")
        return encoder(
            input_ids=inputs["input_ids"],
            attention_mask=None if mask is None else self.attention(encoder, mask.bool()),
            output_hidden_states=hidden_states,
            return_dict=True,
        )

    def encode_visible(
        self,
        encoder: PreTrainedModel,
        inputs: dict[str, torch.Tensor],
        positions: torch.Tensor,
        valid: torch.Tensor | None,
        hidden_states: bool = False,
    ) -> Any:
        """Run the encoder over a subset of positions, as if the others were hidden from attention.

        Of packed rows each document is read as in a row of its own.

        Args:
            inputs: clean inputs, `[N, L]` each.
            positions: long `[N, C]`.
            valid: bool `[N, C]`, False where `positions` is only filled up; None where it is nowhere.

        Returns:
            The encoder's output; `last_hidden_state` is `[N, C, D]`.
        """
        documents = None
        if "sequence_ids" in inputs:
            documents = documents_at(inputs["sequence_ids"], positions, valid)
        return encoder(
            input_ids=inputs["input_ids"].gather(1, positions),
            attention_mask=self.visible_attention(encoder, positions, valid, documents),
            position_ids=self.position_ids(inputs).gather(1, positions),
            output_hidden_states=hidden_states,
            return_dict=True,
        )

    def position_ids(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The position ids of the full pass, long `[N, L]`."""
        if "sequence_ids" in inputs:
            return positions_in_documents(inputs["sequence_ids"])
        length = inputs["input_ids"].shape[1]
        return torch.arange(length, device=inputs["input_ids"].device).expand_as(inputs["input_ids"])

    def attention(self, encoder: PreTrainedModel, valid: torch.Tensor) -> torch.Tensor:
        """The attention mask of tokens of which `valid`, bool `[N, L]`, are real, in the form the encoder takes.

        In a mask `[N, L]` transformers looks whether all is real, for which the host waits for the device. SDPA takes
        one by query and key, which it does not look into.
        """
        return valid[:, None, None, :] if _is_sdpa(encoder) else valid.long()

    def visible_attention(
        self,
        encoder: PreTrainedModel,
        positions: torch.Tensor,
        valid: torch.Tensor | None,
        documents: torch.Tensor | None = None,
    ) -> Any:
        """The attention mask of the visible tokens, in the form the encoder takes.

        Args:
            positions, valid: as in `encode_visible`.
            documents: the document of each, long `[N, C]`, of packed rows.
        """
        if documents is None:
            return None if valid is None else self.attention(encoder, valid)
        self.check_packing(encoder)
        return _dense_mask(encoder, same_document(documents))


class RobertaBackbone(TextBackbone):
    """RoBERTa counts positions from `pad_token_id + 1` and skips padding."""

    @property
    def max_length(self) -> int:
        return self.config.max_position_embeddings - self.config.pad_token_id - 1

    def position_ids(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        real = inputs["input_ids"].ne(self.config.pad_token_id)
        if "sequence_ids" in inputs:
            count = positions_in_documents(inputs["sequence_ids"], real) + 1
        else:
            count = real.long().cumsum(dim=1)
        return count * real + self.config.pad_token_id


class ModernBertBackbone(TextBackbone):
    """ModernBERT's local layers see a window of true positions, not of neighbours in the shortened sequence."""

    absolute_positions = False

    def attention(self, encoder: PreTrainedModel, valid: torch.Tensor) -> torch.Tensor:
        """Its layers' masks differ, which transformers makes of the one by token."""
        return valid.long()

    def visible_attention(
        self,
        encoder: PreTrainedModel,
        positions: torch.Tensor,
        valid: torch.Tensor | None,
        documents: torch.Tensor | None = None,
    ) -> Any:
        if valid is None:
            valid = torch.ones_like(positions, dtype=torch.bool)
        if documents is None:
            _check_dense_masks(encoder, "context_mode 'dropped' gives ModernBERT", "--context_mode kept")
            full = valid[:, None, None, :].expand(-1, 1, valid.shape[1], -1)
        else:
            self.check_packing(encoder)
            full = same_document(documents)
        distance = (positions[:, :, None] - positions[:, None, :]).abs()
        # A padding query may have no key in its window: it sees itself, or sdpa gives NaN.
        itself = torch.eye(valid.shape[1], dtype=torch.bool, device=valid.device)
        local = (full & (distance <= self.config.local_attention // 2)[:, None]) | itself
        return {
            "full_attention": _dense_mask(encoder, full),
            "sliding_attention": _dense_mask(encoder, local),
        }


class FullLengthTextBackbone(TextBackbone):
    """Text encoders whose tokens cannot be left out exactly: relative positions of what is left, or unknown to us."""

    context_modes = ("kept",)
    absolute_positions = False
    compiled_attention: ClassVar[dict[str, str]] = {}

    def clean_inputs(self, given: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
        """With a mask always: some warn without one."""
        clean = super().clean_inputs(given)
        return {"attention_mask": torch.ones_like(clean["input_ids"])} | clean

    def attention(self, encoder: PreTrainedModel, valid: torch.Tensor) -> torch.Tensor:
        """By token, which every encoder knows."""
        return valid.long()

    def check_packing(self, encoder: PreTrainedModel) -> None:
        """Refuse packed rows."""
        raise UsageError(
            f"packed rows are not exact for {self.config.model_type} encoders, whose attention depends on every "
            "position of the row; leave out --packed"
        )


def _is_sdpa(encoder: PreTrainedModel) -> bool:
    return encoder.config._attn_implementation in (SDPA, SDPA_UNMASKED)


def _check_dense_masks(encoder: PreTrainedModel, what: str, otherwise: str) -> None:
    implementation = encoder.config._attn_implementation
    if not _is_sdpa(encoder) and implementation != "eager":
        raise UsageError(
            f"{what} a mask of who attends to whom, which attn_implementation {implementation!r} does not take; use "
            f"sdpa, or {otherwise}"
        )


def _dense_mask(encoder: PreTrainedModel, allowed: torch.Tensor) -> torch.Tensor:
    """Who may attend to whom, bool `[N, 1, C, C]`, as the encoder's attention takes it: eager adds it."""
    if _is_sdpa(encoder):
        return allowed
    lowest = torch.finfo(encoder.dtype).min
    return torch.zeros(allowed.shape, dtype=encoder.dtype, device=allowed.device).masked_fill(~allowed, lowest)


class VisionBackbone:
    """Vision transformers over a plane of patches; tokens before the patches ([CLS], registers) are always kept."""

    modality = "images"
    input_names = ("pixel_values",)
    context_modes = ("dropped",)
    absolute_positions = True
    # Stands in for patches in pretraining by masked images; nothing here reads it.
    unused_parameters = ("embeddings.mask_token",)
    compiled_attention: ClassVar[dict[str, str]] = {}

    def __init__(self, config: PreTrainedConfig):
        self.config = config
        self._visible: torch.Tensor | None = None

    @torch.no_grad()
    def initialize(self, encoder: PreTrainedModel) -> None:
        """Draw weights that no checkpoint gave: sine-cosine positions (I-JEPA), and pixels as loud as these.

        With transformers' standard deviation of 0.02, patches of 4 come out of their projection at a tenth of the
        positions' size, and all targets are alike but for the place (benchmarks/RESULTS.md, section 5).
        """
        projection = encoder.embeddings.patch_embeddings.projection.weight
        init.normal_(projection, std=projection[0].numel() ** -0.5)
        table = encoder.embeddings.position_embeddings
        patches = sincos_positions(self.grid, table.shape[-1]).to(table)
        init.copy_(table, torch.cat([table[:, : table.shape[1] - len(patches)], patches[None]], dim=1))

    def prepare(self, encoder: PreTrainedModel) -> None:
        """Have the encoder's embeddings leave out what `encode_visible` does not want seen.

        Once per encoder and not in each call, because torch.compile cannot trace the registration of a hook.
        """
        encoder.embeddings.register_forward_hook(self._keep_visible)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images, in pixels."""
        return _pair(self.config, "image_size")

    @property
    def patch_size(self) -> tuple[int, int]:
        """Height and width of a patch, in pixels."""
        return _pair(self.config, "patch_size")

    @property
    def grid(self) -> tuple[int, ...]:
        """Positions that the predictor embeds: a plane of patches, rows first."""
        size, patch = self.image_size, self.patch_size
        return size[0] // patch[0], size[1] // patch[1]

    def clean_inputs(self, given: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
        """Of the model's arguments, those that the encoder reads.

        Raises:
            UsageError: images of another size than the encoder's, whose patches would be counted wrongly.
        """
        pixels, size = given["pixel_values"], self.image_size
        if tuple(pixels.shape[-2:]) != size:
            raise UsageError(
                f"the images have {pixels.shape[-2]} x {pixels.shape[-1]} pixels and the encoder reads {size[0]} x "
                f"{size[1]}: set the image processor's size to that"
            )
        return {"pixel_values": pixels}

    def length(self, inputs: dict[str, torch.Tensor]) -> int:
        """Number of patches."""
        return self.grid[0] * self.grid[1]

    def valid(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """bool `[B, L]`, all True: images are not padded."""
        pixels = inputs["pixel_values"]
        return torch.ones(pixels.shape[0], self.length(inputs), dtype=torch.bool, device=pixels.device)

    def encode(self, encoder: PreTrainedModel, inputs: dict[str, torch.Tensor], hidden_states: bool = False) -> Any:
        """Run the encoder over all patches; `last_hidden_state` is `[B, L, D]`, without what precedes the patches."""
        output = encoder(**inputs, output_hidden_states=hidden_states, return_dict=True)
        return self._patches_only(output, self.length(inputs))

    def encode_visible(
        self,
        encoder: PreTrainedModel,
        inputs: dict[str, torch.Tensor],
        positions: torch.Tensor,
        valid: torch.Tensor,
        hidden_states: bool = False,
    ) -> Any:
        """Run the encoder over a subset of patches: they alone go through its layers. See `TextBackbone`."""
        # On a GPU the look would wait for the device on every step; in a compiled model it would end the graph.
        look = valid.device.type == "cpu" and not torch.compiler.is_compiling()
        if look and not bool((valid.all(dim=1) | ~valid.any(dim=1)).all()):
            raise ValueError("image batches must be rectangular: a row of context_valid is True or False throughout")

        self._visible = positions
        try:
            output = encoder(**inputs, output_hidden_states=hidden_states, return_dict=True)
            if self._visible is not None:
                raise ValueError("the encoder reads all patches: give it to prepare() first")
        finally:
            self._visible = None
        return self._patches_only(output, positions.shape[1])

    def _keep_visible(self, _embeddings: nn.Module, _inputs: tuple, embedded: torch.Tensor) -> torch.Tensor:
        """Forward hook: of the embedded patches `[N, prefix + L, D]` those of the present `encode_visible`, if any."""
        if self._visible is None:
            return embedded
        visible, self._visible = self._visible, None
        prefix = embedded.shape[1] - self.grid[0] * self.grid[1]
        return torch.cat([embedded[:, :prefix], gather_positions(embedded[:, prefix:], visible)], dim=1)

    @staticmethod
    def _patches_only(output: Any, count: int) -> Any:
        output.last_hidden_state = output.last_hidden_state[:, -count:]
        if output.hidden_states is not None:
            output.hidden_states = tuple(state[:, -count:] for state in output.hidden_states)
        return output


class FeatureBackbone:
    """Our own encoder of feature vectors: time steps, or patches of one vector, or one token for the whole of it."""

    modality = "features"
    input_names = ("features", "attention_mask")
    absolute_positions = True
    unused_parameters = ()
    compiled_attention: ClassVar[dict[str, str]] = {}

    def __init__(self, config: FeatureEncoderConfig):
        self.config = config
        # One token cannot be left out: hidden features are filled in instead.
        self.context_modes = ("kept",) if config.mode == "flat" else ("dropped", "kept")

    @property
    def grid(self) -> tuple[int, ...]:
        """Positions that the predictor embeds: a line of time steps or of patches; none for one token."""
        return {
            "time": (self.config.max_position_embeddings,),
            "patches": (self.config.num_patches,),
            "flat": (),
        }[self.config.mode]

    def initialize(self, encoder: PreTrainedModel) -> None:
        """Nothing: random weights stay as the encoder draws them."""

    def prepare(self, encoder: PreTrainedModel) -> None:
        """Nothing: the encoder takes positions as an argument."""

    def clean_inputs(self, given: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
        """Of the model's arguments, those that the encoder reads; without a mask, every time step is real."""
        clean = {"features": given["features"]}
        if self.config.mode == "time":
            mask = given["attention_mask"]
            clean["attention_mask"] = (
                torch.ones(clean["features"].shape[:2], dtype=torch.long, device=clean["features"].device)
                if mask is None
                else mask
            )
        return clean

    def length(self, inputs: dict[str, torch.Tensor]) -> int:
        """Number of time steps, of patches, or 1."""
        if self.config.mode == "time":
            return inputs["features"].shape[1]
        return self.grid[0] if self.grid else 1

    def valid(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """bool `[B, L]`, False on padding."""
        if self.config.mode == "time":
            return inputs["attention_mask"].bool()
        features = inputs["features"]
        return torch.ones(features.shape[0], self.length(inputs), dtype=torch.bool, device=features.device)

    def encode(self, encoder: PreTrainedModel, inputs: dict[str, torch.Tensor], hidden_states: bool = False) -> Any:
        """Run the encoder over all positions; `last_hidden_state` is `[B, L, D]`."""
        return encoder(**inputs, output_hidden_states=hidden_states, return_dict=True)

    def encode_visible(
        self,
        encoder: PreTrainedModel,
        inputs: dict[str, torch.Tensor],
        positions: torch.Tensor,
        valid: torch.Tensor,
        hidden_states: bool = False,
    ) -> Any:
        """Run the encoder over a subset of positions, as if the others were hidden. See `TextBackbone`."""
        return encoder(
            features=inputs["features"],
            attention_mask=valid.long(),
            positions=positions,
            output_hidden_states=hidden_states,
            return_dict=True,
        )


def _pair(config: PreTrainedConfig, name: str) -> tuple[int, int]:
    """Height and width, which a configuration gives as one number or as two."""
    value = getattr(config, name)
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise UsageError(f"{name} must be one or two whole numbers, at least 1, not {value!r:.80}")
    return pair


Backbone = TextBackbone | VisionBackbone | FeatureBackbone


def backbone_for(config: PreTrainedConfig) -> Backbone:
    """The adapter of an encoder's configuration."""
    if config.model_type in _VISION:
        return VisionBackbone(config)
    if config.model_type == _FEATURES:
        return FeatureBackbone(config)
    if config.model_type == "modernbert":
        return ModernBertBackbone(config)
    if config.model_type in TEXT_WITH_PADDING_OFFSET:
        return RobertaBackbone(config)
    if config.model_type in _TEXT_BY_POSITION_IDS:
        return TextBackbone(config)
    return FullLengthTextBackbone(config)


def encoder_from_config(config: PreTrainedConfig, **kwargs: Any) -> PreTrainedModel:
    """A randomly initialised encoder without pooler, so that no trainable parameter goes unused."""
    if config.model_type == _FEATURES:
        # Not by AutoModel, which knows one class of configuration: code that a checkpoint brings has its own.
        return FeatureEncoderModel._from_config(config, **kwargs)
    return AutoModel.from_config(config, **_without_pooler(config), **kwargs)


def encoder_from_pretrained(name_or_path: str, config: PreTrainedConfig, **kwargs: Any) -> PreTrainedModel:
    """A pretrained encoder without pooler, from a plain directory or one in the layout of a task head."""
    if config.model_type == _FEATURES:
        return FeatureEncoderModel.from_pretrained(name_or_path, config=config, **kwargs)
    return AutoModel.from_pretrained(name_or_path, config=config, **_without_pooler(config), **kwargs)


def _without_pooler(config: PreTrainedConfig) -> dict[str, bool]:
    model_class = AutoModel._model_mapping[type(config)]
    model_class = model_class[0] if isinstance(model_class, (tuple, list)) else model_class
    takes_it = "add_pooling_layer" in inspect.signature(model_class.__init__).parameters
    return {"add_pooling_layer": False} if takes_it else {}
