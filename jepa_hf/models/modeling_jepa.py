"""The model: a context encoder, an EMA target encoder and a predictor in one `PreTrainedModel`."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor, Partial
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput, logging
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from .backbones import backbone_for, encoder_from_config, encoder_from_pretrained
from .configuration_jepa import JepaConfig
from .contrastive import candidates_of_all_ranks, infonce
from .errors import UsageError
from .lora import add_adapters, initialize_adapters, is_adapter, merge_adapters
from .losses import (
    batch_standardize,
    covariance_penalty,
    fixed_directions,
    layer_normalize,
    prediction_loss,
    sigreg,
    variance_hinge,
)
from .mlm_head import MaskedLMHead, head_state, masked_lm_head_layout
from .packed_sequences import document_counts, document_means, documents_at, instance_normalize
from .positions import gather_positions, repeat_samples, sincos_positions
from .predictors import MLPPredictor, PooledPredictor, TokenPredictor, TransformerPredictor

logger = logging.get_logger(__name__)


@dataclass
class JepaOutput(ModelOutput):
    """What `JepaForRepresentationPrediction` returns. B rows, M masks each, T targets per mask (one per sample, where
    the configuration has `pooled_targets`), width D. A row is a sample, or S of them at most where rows are packed.

    Args:
        loss: scalar, the weighted sum of the parts.
        prediction_loss: scalar, mean over the targets.
        mlm_loss, variance_loss, covariance_loss, sigreg_loss, contrastive_loss: scalars, unweighted; None where the
            weight is 0.
        cosine: scalar, mean cosine similarity of predictions and targets, without gradient.
        num_targets: scalar, number of valid targets.
        predictions: `[B, M, T, D]`.
        targets: `[B, M, T, D]`, normalised.
        target_valid: bool `[B, M, T]`.
        target_samples: long `[B, M, T]`, which sample of its row each is of; 0 where rows are not packed, -1 where not
            valid.
        sample_predictions: with `contrastive_weight`, what each view's mean predicts, `[B * S * views, D]`.
        sample_targets: with `contrastive_weight`, each sample's mean over the target layers, `[B * S, D]`.
        context_state: the context encoder's last layer, `[B * M, C, D]`, in eval mode or on request.
        context_valid: bool `[B * M, C]`, which of these are real tokens, in eval mode or on request.
        context_samples: long `[B * M, C]`, as `target_samples`, in eval mode or on request.
        context_hidden_states: all layers of the context encoder, on request.
        target_hidden_states: all layers of the target encoder, `[B, L, D]` each, on request.
    """

    loss: torch.Tensor | None = None
    prediction_loss: torch.Tensor | None = None
    mlm_loss: torch.Tensor | None = None
    variance_loss: torch.Tensor | None = None
    covariance_loss: torch.Tensor | None = None
    sigreg_loss: torch.Tensor | None = None
    contrastive_loss: torch.Tensor | None = None
    cosine: torch.Tensor | None = None
    num_targets: torch.Tensor | None = None
    predictions: torch.Tensor | None = None
    targets: torch.Tensor | None = None
    target_valid: torch.Tensor | None = None
    target_samples: torch.Tensor | None = None
    sample_predictions: torch.Tensor | None = None
    sample_targets: torch.Tensor | None = None
    context_state: torch.Tensor | None = None
    context_valid: torch.Tensor | None = None
    context_samples: torch.Tensor | None = None
    context_hidden_states: tuple[torch.Tensor, ...] | None = None
    target_hidden_states: tuple[torch.Tensor, ...] | None = None


class JepaForRepresentationPrediction(PreTrainedModel):
    """Context encoder, EMA target encoder and predictor.

    The model neither samples masks (the collator does) nor moves the target encoder (`EmaTargetCallback` does). The
    target encoder is frozen and in eval mode, always.

    >>> from transformers import BertConfig
    >>> from jepa_hf import JepaConfig
    >>> tiny = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    >>> model = JepaForRepresentationPrediction(JepaConfig(tiny))
    >>> model.get_encoder("context").config.model_type
    'bert'
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
        self.backbone = backbone_for(config.encoder_config)
        self.context_encoder = encoder_from_config(config.encoder_config)
        self.target_encoder = encoder_from_config(config.encoder_config)
        self._prepare_encoders()
        if config.lora is not None:
            for encoder in (self.context_encoder, self.target_encoder):
                add_adapters(encoder, config.lora)
        if config.predictor_type == "mlp":
            self.predictor = MLPPredictor(config.hidden_size, config.pred_mlp_ratio, config.pred_dropout)
        else:
            sizes = {
                "hidden_size": config.hidden_size,
                "width": config.pred_hidden_size,
                "num_hidden_layers": config.pred_num_hidden_layers,
                "num_attention_heads": config.pred_num_attention_heads,
                "mlp_ratio": config.pred_mlp_ratio,
                "dropout": config.pred_dropout,
            }
            grid = self.backbone.grid
            self.predictor = TransformerPredictor(grid=grid, **sizes) if grid else TokenPredictor(**sizes)
        self.mlm_head = MaskedLMHead(self.context_encoder) if config.mlm_weight > 0 else None
        self.pooled_predictor = PooledPredictor(config.hidden_size) if config.contrastive_weight > 0 else None
        self.main_input_name = self.backbone.input_names[0]
        self.post_init()
        # What FSDP wraps: layers, and not the embeddings that the encoders name too, which accelerate wraps itself.
        layers = [module for module in self.context_encoder.modules() if isinstance(module, GradientCheckpointingLayer)]
        self._no_split_modules = sorted({type(layer).__name__ for layer in layers})
        self.train(self.training)
        self.freeze()

    # ---- loading and saving

    @classmethod
    def from_encoder_pretrained(
        cls,
        name_or_path: str,
        *,
        encoder_kwargs: dict[str, Any] | None = None,
        **jepa_kwargs: Any,
    ) -> "JepaForRepresentationPrediction":
        """A JEPA around a pretrained encoder: the context encoder is loaded, the target encoder is its exact copy.

        Args:
            name_or_path: directory or Hub name of a plain encoder, or of one with a task head. With `mlm_weight` above
                0 the checkpoint's own masked-language-model head is loaded too, where it has one.
            encoder_kwargs: passed to the encoder's `from_pretrained` (revision, token, cache_dir,
                attn_implementation, ...). Weights are float32 unless `dtype` says otherwise.
            jepa_kwargs: arguments of `JepaConfig`.
        """
        encoder_kwargs = {"dtype": torch.float32, **(encoder_kwargs or {})}
        encoder_config = AutoConfig.from_pretrained(name_or_path, **_hub_kwargs(encoder_kwargs))
        config = JepaConfig.for_encoder(encoder_config, **jepa_kwargs)
        head: dict[str, torch.Tensor] = {}
        if config.mlm_weight > 0:
            layout = masked_lm_head_layout(encoder_config)
            masked_lm, info = AutoModelForMaskedLM.from_pretrained(
                name_or_path, config=encoder_config, output_loading_info=True, **encoder_kwargs
            )
            encoder = masked_lm.base_model
            if f"{layout.dense}.weight" not in info["missing_keys"]:
                head = head_state(masked_lm, layout)
        else:
            encoder = encoder_from_pretrained(name_or_path, encoder_config, **encoder_kwargs)

        attention = encoder.config._attn_implementation
        config.encoder_config = encoder.config
        config.name_or_path = str(name_or_path)
        model = cls._from_config(config, attn_implementation=attention, dtype=encoder.dtype)
        if config.lora is not None:
            add_adapters(encoder, config.lora)
        model.context_encoder = encoder
        model.target_encoder = copy.deepcopy(encoder)
        model._prepare_encoders()
        if head:
            model.mlm_head.load_state_dict(head)
        elif model.mlm_head is not None:
            logger.warning(f"{name_or_path} has no masked-language-model head: it starts from random weights")
        model.freeze()
        return model.eval()

    @classmethod
    def from_any_pretrained(
        cls, name_or_path: str, *, encoder_kwargs: dict[str, Any] | None = None, **jepa_kwargs: Any
    ) -> "JepaForRepresentationPrediction":
        """A JEPA to train on, from an encoder (`from_encoder_pretrained`) or from a JEPA, whichever lies there.

        Args:
            name_or_path: directory or Hub name of an encoder or of a JEPA.
            encoder_kwargs: passed to `from_pretrained`.
            jepa_kwargs: arguments of `JepaConfig`; over a JEPA's own, those given here win.

        Raises:
            UsageError: other adapters (`lora`) than those that a JEPA was trained with.
        """
        hub_kwargs = _hub_kwargs(encoder_kwargs or {})
        config = AutoConfig.from_pretrained(name_or_path, **hub_kwargs)
        if not isinstance(config, JepaConfig):
            return cls.from_encoder_pretrained(name_or_path, encoder_kwargs=encoder_kwargs, **jepa_kwargs)
        if "lora" in jepa_kwargs and jepa_kwargs["lora"] != config.lora:
            had = "without adapters" if config.lora is None else f"with lora {config.lora}"
            raise UsageError(
                f"{name_or_path} is a JEPA that was trained {had}, which its weights are for: leave lora out, or name "
                "the plain encoder beside it"
            )
        config = JepaConfig(**{**config.to_dict(), **jepa_kwargs})
        return cls.from_pretrained(name_or_path, config=config, **{"dtype": torch.float32, **(encoder_kwargs or {})})

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """As `PreTrainedModel.save_pretrained`, with the weights under the names that they have here.

        By default transformers writes some encoders' weights (ViT, I-JEPA, DINOv2) under the names of an older layout.
        `from_pretrained` knows both; `Trainer`, resuming, would silently load none of them.
        """
        super().save_pretrained(save_directory, *args, **{"save_original_format": False, **kwargs})

    def initialize_weights(self) -> None:
        """Fill in what no checkpoint gave; a target encoder that none gave is the context encoder's copy."""
        super().initialize_weights()
        self.backbone.initialize(self.context_encoder)
        initialize_adapters(self.context_encoder)
        given = dict(self.context_encoder.named_parameters())
        for name, parameter in self.target_encoder.named_parameters():
            init.copy_(parameter, given[name])  # does nothing where the checkpoint gave the parameter

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
            if self.config.pred_init == "unit_gain":
                for part in module.modules():
                    if isinstance(part, nn.Linear):
                        init.trunc_normal_(part.weight, std=part.in_features**-0.5)
            init.trunc_normal_(module.mask_token, std=self.config.initializer_range)
            if len(module.grid) == 1:
                init.trunc_normal_(module.position_embeddings, std=self.config.initializer_range)
            else:
                # from_pretrained builds on the meta device and leaves non-persistent buffers uninitialised.
                init.copy_(module.position_embeddings, sincos_positions(module.grid, self.config.pred_hidden_size))
        elif isinstance(module, MaskedLMHead):
            init.zeros_(module.bias)

    def _prepare_encoders(self) -> None:
        self.backbone.prepare(self.context_encoder)
        for encoder in (self.context_encoder, self.target_encoder):
            # What notes the layers' outputs: transformers would install it when it is first asked for them, which
            # breaks a graph of torch.compile into five.
            maybe_install_capturing_hooks(encoder)

    def prepare_to_compile(self) -> None:
        """Give both encoders the attention that torch.compile makes the most of; what it computes is the same."""
        for encoder in (self.context_encoder, self.target_encoder):
            given = encoder.config._attn_implementation
            encoder.set_attn_implementation(self.backbone.compiled_attention.get(given, given))

    def set_standardization(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Have both encoders standardise their input, raw feature vectors. See `FeatureEncoderModel`."""
        for encoder in (self.context_encoder, self.target_encoder):
            encoder.set_standardization(mean, std)

    def train(self, mode: bool = True) -> "JepaForRepresentationPrediction":
        """Set the training mode of all but the target encoder, which stays frozen and in eval mode.

        `from_pretrained` makes every parameter trainable again and ends with `eval()`; `Trainer` calls `train()` on
        each micro-step, where to set every module, or to look at every parameter, would take time.
        """
        changed = mode != self.training
        trained = [part for part in self.children() if part is not self.target_encoder]
        if changed or any(_differ(part, mode) for part in trained) or _differ(self.target_encoder, False):
            super().train(mode)
            self.target_encoder.train(False)
        if changed:
            self.freeze()
        return self

    def freeze(self) -> None:
        """Make untrainable what gets no gradient: the target encoder, what the backbone leaves unused, and with `lora`
        all of the context encoder but the adapters."""
        self.target_encoder.requires_grad_(False)
        # A parameter that takes no part in the loss would make DDP wait for its gradient.
        if self.config.prediction_weight == 0 and not self._predicts_tokens:
            self.predictor.requires_grad_(False)
        adapted = self.config.lora is not None
        for name, parameter in self.context_encoder.named_parameters():
            if name in self.backbone.unused_parameters or (adapted and not is_adapter(name)):
                parameter.requires_grad_(False)

    @property
    def _predicts_tokens(self) -> bool:
        """Whether the masked-language-model loss is read from the predictor's outputs."""
        return self.config.mlm_weight > 0 and self.config.context_mode == "dropped"

    def get_encoder(self, which: str = "context") -> PreTrainedModel:
        """The trained encoder: a plain transformers model; with `lora`, one with adapters in it (see `merged_encoder`).

        Args:
            which: "context" or "target".
        """
        if which not in ("context", "target"):
            raise ValueError(f"an encoder is either 'context' or 'target', not {which!r}")
        return self.context_encoder if which == "context" else self.target_encoder

    def merged_encoder(
        self, which: str = "context", state_dict: dict[str, torch.Tensor] | None = None
    ) -> PreTrainedModel:
        """The trained encoder without adapters: the model's own where it has none, else a copy with them merged.

        Args:
            which: "context" or "target".
            state_dict: the copy's weights, under the names of `get_encoder(which)`; default the model's own.
        """
        encoder = self.get_encoder(which)
        if self.config.lora is None:
            return encoder
        plain = encoder_from_config(encoder.config, dtype=encoder.dtype)
        add_adapters(plain, self.config.lora)
        plain.load_state_dict(encoder.state_dict() if state_dict is None else state_dict)
        merge_adapters(plain.eval())
        return plain

    def get_input_embeddings(self) -> nn.Module:
        return self.context_encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.context_encoder.set_input_embeddings(value)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Module:
        """Resize the embeddings of both encoders, the masked-language-model head and the configurations alike."""
        before = self.get_input_embeddings().weight.shape[0]
        embeddings = self.context_encoder.resize_token_embeddings(new_num_tokens, *args, **kwargs)
        # The rows that are new are random: the target's must be the same ones.
        self.target_encoder.resize_token_embeddings(new_num_tokens, *args, **kwargs)
        with torch.no_grad():
            self.target_encoder.get_input_embeddings().weight[before:] = embeddings.weight[before:]
        size = embeddings.weight.shape[0]
        if self.mlm_head is not None:
            bias = self.mlm_head.bias
            self.mlm_head.bias = nn.Parameter(F.pad(bias.detach(), (0, max(size - bias.shape[0], 0)))[:size])
        self.config.encoder_config.vocab_size = size
        self.train(self.training)
        self.freeze()
        return embeddings

    # ---- forward

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        features: torch.Tensor | None = None,
        context_input_ids: torch.Tensor | None = None,
        context_features: torch.Tensor | None = None,
        context_positions: torch.Tensor | None = None,
        context_valid: torch.Tensor | None = None,
        target_positions: torch.Tensor | None = None,
        target_valid: torch.Tensor | None = None,
        sequence_ids: torch.Tensor | None = None,
        sequence_valid: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        output_hidden_states: bool = False,
        return_loss: bool = True,
    ) -> JepaOutput:
        """Predict the target encoder's representations at the target positions.

        Args:
            input_ids, attention_mask: clean tokens, long `[B, L]`.
            pixel_values: clean images, `[B, channels, height, width]`.
            features: clean feature vectors `[B, F]`, or series of them `[B, L, F]` with `attention_mask` long `[B, L]`.
            context_input_ids: the masked view, long `[B, L]` or `[B, M, L]`, where masked positions are kept.
            context_features: the same of feature vectors, `[B, ...]` or `[B, M, ...]`.
            context_positions: visible positions, long `[B, M, C]`, where masked ones are dropped; `[B, 1, C]` serves
                all M masks.
            context_valid: bool, same shape, False where `context_positions` is only filled up; of text it may be left
                out where nothing is.
            target_positions: long `[B, M, T]`, M masks per sample.
            target_valid: bool `[B, M, T]`.
            sequence_ids: of packed rows, the document of each token, long `[B, L]`, -1 on padding. Each document is
                then a sample: what it gives is what it would give in a row of its own.
            sequence_valid: of packed rows, which numbers stand for a document, bool `[B, S]`.
            num_items_in_batch: number of targets of the whole update; default that of this batch. The loss is the sum
                over this batch's targets divided by it, so that accumulated losses add up.
            output_hidden_states: also return the encoders' states.
            return_loss: also compute the loss.
        """
        if target_positions is None or target_valid is None:
            raise ValueError(
                "target_positions and target_valid are missing; make the batch with the collator, or call "
                "get_encoder() for representations alone"
            )
        clean = self.backbone.clean_inputs(
            {
                "input_ids": input_ids,
                "attention_mask": attention_mask,
                "pixel_values": pixel_values,
                "features": features,
                "sequence_ids": sequence_ids,
            }
        )
        if (sequence_ids is None) != (sequence_valid is None):
            raise ValueError("packed rows need both sequence_ids and sequence_valid; make the batch with the collator")
        batch, masks, _ = target_positions.shape
        positions, valid = target_positions.flatten(0, 1), target_valid.flatten(0, 1)
        # Of each position the sample in its row, -1 on padding; a row that is not packed is one sample.
        samples = self.backbone.valid(clean).long() - 1 if sequence_ids is None else sequence_ids
        most = 1 if sequence_valid is None else sequence_valid.shape[1]

        targets, sample_targets, target_states = self._targets(
            clean, samples, most, positions, masks, output_hidden_states
        )
        if self.config.context_mode == "kept":
            masked_view = context_input_ids if context_features is None else context_features
            view = self._view_kept(clean, masked_view, positions, valid, masks, output_hidden_states)
        else:
            view = self._view_dropped(clean, context_positions, context_valid, masks, output_hidden_states)
        encoded, seen, seen_positions, readable = view
        predictions = self.predictor(
            repeat_samples(encoded.last_hidden_state, positions.shape[0] // seen.shape[0]),
            seen_positions,
            readable,
            positions,
            valid,
            None if sequence_ids is None else repeat_samples(sequence_ids, masks),
        )
        target_samples = documents_at(samples, positions, valid)
        if self.config.pooled_targets:
            predictions, targets = (document_means(x, target_samples, most) for x in (predictions, targets))
            valid = document_counts(target_samples, most) > 0
            target_samples = torch.arange(most, device=valid.device).expand_as(valid).masked_fill(~valid, -1)

        output = JepaOutput(
            num_targets=valid.sum(),
            predictions=predictions.unflatten(0, (batch, masks)),
            targets=targets.unflatten(0, (batch, masks)),
            target_valid=valid.unflatten(0, (batch, masks)),
            target_samples=target_samples.unflatten(0, (batch, masks)),
        )
        read = documents_at(samples, seen_positions[:: len(seen_positions) // len(seen)], seen)
        if self.pooled_predictor is not None:
            states = encoded.last_hidden_state
            pooled = _by_sample(document_means(states.float(), read, most).to(states.dtype), batch)
            output.sample_predictions, output.sample_targets = self.pooled_predictor(pooled), sample_targets
        if return_loss:
            total = output.num_targets.clamp_min(1) if num_items_in_batch is None else num_items_in_batch
            per_view = document_counts(target_samples, most).unflatten(0, (len(seen), -1)).sum(dim=1)
            # A sample without targets, such as a row that only fills up a batch, is compared with nothing.
            counted = per_view.unflatten(0, (batch, -1)).sum(dim=1) > 0
            self._add_losses(output, clean, encoded, positions, valid, total)
            if self.config.variance_weight > 0 or self.config.covariance_weight > 0 or self.config.sigreg_weight > 0:
                of_counted = repeat_samples(counted, len(seen) // batch).gather(1, read.clamp_min(0)) & seen
                self._add_statistics(output, encoded.last_hidden_state, of_counted, counted.sum(), total)
            if self.config.contrastive_weight > 0:
                same_size = sequence_valid is None
                self._add_contrast(output, _by_sample(per_view[..., None], batch), counted.flatten(), same_size, total)
        if output_hidden_states or not self.training:
            output.context_state, output.context_valid = encoded.last_hidden_state, seen
            output.context_samples = read
        if output_hidden_states:
            output.context_hidden_states = encoded.hidden_states
            output.target_hidden_states = target_states
        return output

    @torch.no_grad()
    def _targets(
        self,
        clean: dict[str, torch.Tensor],
        samples: torch.Tensor,
        most: int,
        positions: torch.Tensor,
        masks: int,
        hidden_states: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None, tuple[torch.Tensor, ...] | None]:
        """The target encoder reads the clean view once; its *output* at the targets is what is normalised.

        Over an instance's positions it is normalised before it is gathered; where each position stands for itself,
        afterwards, so that nothing is computed of positions that are no target.

        Args:
            samples: the sample in its row that each position is of, long `[B, L]`.
            most: samples in a row, at most.

        Returns:
            the targets `[N, T, D]`; with `contrastive_weight` each sample's mean `[B * most, D]`, averaged over the
            normalised means of the target layers; and the hidden states on request.
        """
        several = self.config.target_layers > 1
        encoded = self.backbone.encode(self.target_encoder, clean, hidden_states=several or hidden_states)
        layers = encoded.hidden_states[-self.config.target_layers :] if several else [encoded.last_hidden_state]
        by_sample, over_positions = positions.reshape(len(samples), -1), self.config.target_norm == "instance"
        read = layers if over_positions else [gather_positions(layer, by_sample) for layer in layers]
        # Layer by layer, so that only the running sum and one layer are held in float32.
        total = sum(self._normalize(layer.float(), samples, most) for layer in read)
        states = self._normalize(total / len(layers), samples, most) if several else total
        gathered = gather_positions(states, by_sample) if over_positions else states
        gathered = gathered.reshape(*positions.shape, -1)
        means = None
        if self.config.contrastive_weight > 0:
            pooled = [layer_normalize(document_means(layer.float(), samples, most)) for layer in layers]
            means = (sum(pooled) / len(layers)).flatten(0, 1)
        return gathered, means, encoded.hidden_states if hidden_states else None

    def _normalize(self, states: torch.Tensor, samples: torch.Tensor, most: int) -> torch.Tensor:
        if self.config.target_norm == "layer":
            return layer_normalize(states)
        if self.config.target_norm == "instance":
            return instance_normalize(states, samples, most)
        return states

    def _view_kept(
        self,
        clean: dict[str, torch.Tensor],
        masked_view: torch.Tensor | None,
        positions: torch.Tensor,
        valid: torch.Tensor,
        masks: int,
        hidden_states: bool,
    ) -> tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Encode the view in which masked positions are [MASK] tokens, or features filled in.

        Returns:
            the encoder's output, then `[N, L]`: which positions are real, their numbers, and which are context.
        """
        name = self.backbone.input_names[0]
        if masked_view is None:
            raise ValueError(f"context_mode 'kept' needs context_{name}; make the collator with context_mode='kept'")
        inputs = {other: repeat_samples(value, masks) for other, value in clean.items()}
        inputs[name] = masked_view.reshape(-1, *clean[name].shape[1:])
        seen = self.backbone.valid(inputs)
        encoded = self.backbone.encode(self.context_encoder, inputs, hidden_states)
        numbers = torch.arange(seen.shape[1], device=seen.device).expand_as(seen)
        # Where a row has fewer targets than columns, the filled-up positions must not hide a token.
        hidden = torch.zeros_like(seen, dtype=torch.int32).scatter_add(1, positions, valid.int()) > 0
        return encoded, seen, numbers, seen & ~hidden

    def _view_dropped(
        self,
        clean: dict[str, torch.Tensor],
        context_positions: torch.Tensor | None,
        context_valid: torch.Tensor | None,
        masks: int,
        hidden_states: bool,
    ) -> tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Encode the visible positions only. One context `[B, 1, C]` is encoded once and read by all M masks."""
        if context_positions is None:
            raise ValueError(
                "context_mode 'dropped' needs context_positions; make the collator with context_mode='dropped'"
            )
        contexts = context_positions.shape[1]
        inputs = {name: repeat_samples(value, contexts) for name, value in clean.items()}
        numbers = context_positions.flatten(0, 1)
        seen = None if context_valid is None else context_valid.flatten(0, 1)
        encoded = self.backbone.encode_visible(self.context_encoder, inputs, numbers, seen, hidden_states)
        if seen is None:
            seen = torch.ones_like(numbers, dtype=torch.bool)
        repeat = masks // contexts
        return encoded, seen, repeat_samples(numbers, repeat), repeat_samples(seen, repeat)

    def _add_losses(
        self,
        output: JepaOutput,
        clean: dict[str, torch.Tensor],
        encoded: Any,
        positions: torch.Tensor,
        valid: torch.Tensor,
        total: torch.Tensor | int,
    ) -> None:
        """Add the losses of predictions and tokens."""
        config = self.config
        here = output.num_targets.clamp_min(1)
        predictions, targets = output.predictions.flatten(0, 1), output.targets.flatten(0, 1)
        each = prediction_loss(config.loss, predictions, targets, config.smooth_l1_beta)
        summed = torch.where(valid, each, torch.zeros_like(each)).sum()
        output.prediction_loss = summed / here
        # Told by every run: here, torch.compile makes one kernel of it.
        alike = F.cosine_similarity(predictions.detach().float(), targets.float(), dim=-1)
        output.cosine = torch.where(valid, alike, torch.zeros_like(alike)).sum() / here
        loss = config.prediction_weight * summed / total
        if config.mlm_weight > 0:
            summed = self._mlm_sum(clean, encoded, predictions, positions, valid)
            output.mlm_loss = summed / here
            loss = loss + config.mlm_weight * summed / total
        output.loss = loss

    def _add_statistics(
        self,
        output: JepaOutput,
        states: torch.Tensor,
        counted: torch.Tensor,
        num_samples: torch.Tensor,
        total: torch.Tensor | int,
    ) -> None:
        """Add the statistics of the context encoder's outputs.

        A micro-batch counts by its share of the update's targets, so that the shares add up to 1.

        Args:
            states: `[B * views, C, D]`.
            counted: bool `[B * views, C]`, the outputs that statistics are about.
            num_samples: scalar, how many samples these are of.
        """
        config, loss, share = self.config, output.loss, output.num_targets / total
        if config.variance_weight > 0:
            output.variance_loss = variance_hinge(states, counted)
            loss = loss + config.variance_weight * share * output.variance_loss
        if config.covariance_weight > 0:
            output.covariance_loss = covariance_penalty(states, counted)
            loss = loss + config.covariance_weight * share * output.covariance_loss
        if config.sigreg_weight > 0:
            directions = None if self.training else fixed_directions(states.shape[-1], states.device)
            output.sigreg_loss = sigreg(states, counted, num_samples, directions)
            loss = loss + config.sigreg_weight * share * output.sigreg_loss
        output.loss = loss

    def _add_contrast(
        self,
        output: JepaOutput,
        counts: torch.Tensor,
        counted: torch.Tensor,
        same_size: bool,
        total: torch.Tensor | int,
    ) -> None:
        """Add each view's cross-entropy of finding its own sample's target among those of the batch, of all ranks.

        Args:
            counts: targets of each view, long `[B * S * views, 1]`: a view counts by them, so that micro-batches and
                ranks add up to the whole.
            counted: bool `[B * S]`, the samples that have targets; others are no candidates.
            same_size: False where ranks may have room for different numbers of samples.
        """
        config, predictions, targets = self.config, output.sample_predictions, output.sample_targets
        marked = torch.cat([targets, counted[:, None].to(targets.dtype)], dim=1)
        marked, own = candidates_of_all_ranks(marked, same_size)
        candidates, there = marked[:, :-1], marked[:, -1] > 0
        own = own.repeat_interleave(len(predictions) // len(own))
        candidates = batch_standardize(candidates, there)
        each = infonce(predictions, candidates, own, config.contrastive_temperature, there)
        each = torch.where(counts[:, 0] > 0, each, torch.zeros_like(each))
        summed = (each * counts[:, 0]).sum()
        output.contrastive_loss = summed / output.num_targets.clamp_min(1)
        output.loss = output.loss + config.contrastive_weight * summed / total

    def _mlm_sum(
        self,
        clean: dict[str, torch.Tensor],
        encoded: Any,
        predictions: torch.Tensor,
        positions: torch.Tensor,
        valid: torch.Tensor,
    ) -> torch.Tensor:
        """Summed cross-entropy of the hidden tokens, read from the encoder's [MASK] positions where they were kept,
        from the predictor's guesses where they were dropped."""
        states = predictions if self._predicts_tokens else gather_positions(encoded.last_hidden_state, positions)
        logits = self.mlm_head(states, _whole(self.get_input_embeddings().weight))
        masks = positions.shape[0] // clean["input_ids"].shape[0]
        labels = repeat_samples(clean["input_ids"], masks).gather(1, positions)
        labels = torch.where(valid, labels, -100)
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum", ignore_index=-100)


def _differ(part: nn.Module, mode: bool) -> bool:
    """Whether any module of `part` is in another mode than `mode`."""
    return any(module.training != mode for module in part.modules())


def _by_sample(values: torch.Tensor, batch: int) -> torch.Tensor:
    """`[B * views, S, D]` -> `[B * S * views, D]`: a sample's views next to each other."""
    return values.unflatten(0, (batch, -1)).transpose(1, 2).flatten(0, 2)


def _whole(weight: torch.Tensor) -> torch.Tensor:
    """A weight that is read outside its module, where FSDP2 leaves each rank its shard of it.

    The ranks' gradients are averaged, as FSDP2 averages those that come through the module.
    """
    if not isinstance(weight, DTensor):
        return weight
    return weight.full_tensor(grad_placements=[Partial("avg")] * weight.device_mesh.ndim)


def _hub_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those that say where to find a file rather than how to build a model."""
    names = ("revision", "token", "cache_dir", "trust_remote_code", "local_files_only", "subfolder")
    return {name: kwargs[name] for name in names if name in kwargs}
