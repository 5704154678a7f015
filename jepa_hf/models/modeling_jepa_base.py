"""Base class of the JEPA: two encoders, their weights, freezing and saving."""

from os import PathLike
from typing import Any, Self, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_jepa import JepaConfig
from .encoder_adapters import encoder_adapter_for
from .encoders import encoder_from_config, is_pooler_parameter
from .lora import add_lora, initialize_lora, is_lora_parameter, merge_lora
from .mlm_head import MaskedLMHead
from .modeling_feature_encoder import FeatureEncoderModel
from .predictors import TransformerPredictor
from .upstream import attention_implementation, install_capturing_hooks


class JepaPreTrainedModel(PreTrainedModel):
    """Context encoder and frozen target encoder.

    Subclasses add the predictor and end their `__init__` with `finish_init`.
    """

    config_class = JepaConfig
    config: JepaConfig
    base_model_prefix = "context_encoder"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: JepaConfig):
        super().__init__(config)
        self.encoder_adapter = encoder_adapter_for(config.encoder_config)
        self.context_encoder = encoder_from_config(config.encoder_config, config.add_pooling_layer)
        self.target_encoder = encoder_from_config(config.encoder_config, config.add_pooling_layer)
        self._prepare_encoders()
        if config.lora is not None:
            for encoder in (self.context_encoder, self.target_encoder):
                add_lora(encoder, config.lora)
        self.main_input_name = self.encoder_adapter.input_names[0]

    def finish_init(self) -> None:
        """Initialize the weights and freeze; called at the end of a subclass's `__init__`."""
        self.post_init()
        # The modules that FSDP wraps: layers only, because accelerate wraps the embeddings itself.
        layers = [module for module in self.context_encoder.modules() if isinstance(module, GradientCheckpointingLayer)]
        self._no_split_modules = sorted({type(layer).__name__ for layer in layers})
        self.train(self.training)
        self.freeze()

    def save_pretrained(self, save_directory: str | PathLike[Any], *args: Any, **kwargs: Any) -> None:
        """Save like `PreTrainedModel.save_pretrained`, with the parameter names of this model.

        By default transformers saves some encoders (ViT, I-JEPA, DINOv2) under the names of an older layout.
        `from_pretrained` reads both, but a resuming `Trainer` would silently skip these weights.
        """
        super().save_pretrained(save_directory, *args, **{"save_original_format": False, **kwargs})

    def initialize_weights(self) -> None:
        """Initialize missing weights; those of the target are copied from the context encoder."""
        super().initialize_weights()
        self.encoder_adapter.init_missing_weights(self.context_encoder)
        initialize_lora(self.context_encoder)
        context_parameters = dict(self.context_encoder.named_parameters())
        for name, parameter in self.target_encoder.named_parameters():
            init.copy_(parameter, context_parameters[name])  # no effect on weights from a checkpoint

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, TransformerPredictor):
            module.initialize(self.config.initializer_range, unit_gain=self.config.pred_init == "unit_gain")
        elif isinstance(module, MaskedLMHead):
            module.initialize(self.config.initializer_range)

    def _prepare_encoders(self) -> None:
        self.encoder_adapter.register_hooks(self.context_encoder)
        for encoder in (self.context_encoder, self.target_encoder):
            install_capturing_hooks(encoder)

    def prepare_to_compile(self) -> None:
        """Switch both encoders to the fastest attention implementation under torch.compile."""
        for encoder in (self.context_encoder, self.target_encoder):
            implementation = attention_implementation(encoder.config)
            encoder.set_attn_implementation(self.encoder_adapter.compiled_attention.get(implementation, implementation))

    def prepare_to_debug(self) -> None:
        """Switch both encoders to attention masks that `--debug underflow_overflow` can read.

        The masks of sdpa are boolean, and transformers' check computes their absolute value.
        """
        for encoder in (self.context_encoder, self.target_encoder):
            encoder.set_attn_implementation("eager")

    def set_standardization(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Set mean and standard deviation `[F]` of raw features. See `FeatureEncoderModel`."""
        for encoder in (self.context_encoder, self.target_encoder):
            cast("FeatureEncoderModel", encoder).set_standardization(mean, std)

    def train(self, mode: bool = True) -> Self:
        """Set the training mode of all parts but the target encoder, which stays in eval mode.

        `from_pretrained` makes every parameter trainable and ends with `eval()`, so a change of mode freezes again.
        `Trainer` calls `train()` on each micro-step, so other calls must be cheap.
        """
        changed = mode != self.training
        trained = [part for part in self.children() if part is not self.target_encoder]
        if (
            changed
            or any(_any_module_in_other_mode(part, mode) for part in trained)
            or _any_module_in_other_mode(self.target_encoder, False)
        ):
            super().train(mode)
            self.target_encoder.train(False)
        if changed:
            self.freeze()
        return self

    def freeze(self) -> None:
        """Freeze the target encoder, the pooler and unused parameters, with `lora` all but the adapters."""
        self.target_encoder.requires_grad_(False)
        uses_lora = self.config.lora is not None
        for name, parameter in self.context_encoder.named_parameters():
            is_unused = name in self.encoder_adapter.unused_parameters or is_pooler_parameter(name)
            if is_unused or (uses_lora and not is_lora_parameter(name)):
                parameter.requires_grad_(False)

    def get_encoder(self, which: str | None = "context") -> PreTrainedModel:
        """Return an encoder, "context" or "target"; with `lora` it contains adapters (see `merged_encoder`)."""
        if which not in ("context", "target"):
            raise ValueError(f"Expected 'context' or 'target', got {which!r}.")
        return self.context_encoder if which == "context" else self.target_encoder

    def merged_encoder(
        self, which: str = "context", state_dict: dict[str, torch.Tensor] | None = None
    ) -> PreTrainedModel:
        """Return an encoder without adapters: the model's own, or with `lora` a merged copy.

        Args:
            which: "context" or "target".
            state_dict: the copy's weights, named as in `get_encoder(which)`; default the model's own.
        """
        encoder = self.get_encoder(which)
        if self.config.lora is None:
            return encoder
        plain = encoder_from_config(encoder.config, self.config.add_pooling_layer, dtype=encoder.dtype)
        add_lora(plain, self.config.lora)
        plain.load_state_dict(encoder.state_dict() if state_dict is None else state_dict)
        merge_lora(plain.eval())
        return plain

    def get_input_embeddings(self) -> nn.Module:
        """Return the context encoder's input embeddings."""
        return self.context_encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the context encoder's input embeddings."""
        self.context_encoder.set_input_embeddings(value)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize the embeddings of both encoders, and their configuration."""
        old_embeddings: Any = self.get_input_embeddings()
        old_size = old_embeddings.weight.shape[0]
        embeddings = self.context_encoder.resize_token_embeddings(new_num_tokens, *args, **kwargs)
        target_embeddings = self.target_encoder.resize_token_embeddings(new_num_tokens, *args, **kwargs)
        with torch.no_grad():  # new rows are random, and both encoders must have the same
            target_embeddings.weight[old_size:] = embeddings.weight[old_size:]
        vocab_size = embeddings.weight.shape[0]
        self.config.encoder_config.vocab_size = vocab_size
        self.train(self.training)
        self.freeze()
        return embeddings


def _any_module_in_other_mode(part: nn.Module, mode: bool) -> bool:
    """Return whether any submodule is in another training mode."""
    return any(module.training != mode for module in part.modules())
