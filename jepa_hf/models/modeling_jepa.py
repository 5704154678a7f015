"""The JEPA model: context encoder, EMA target encoder and predictor in one `PreTrainedModel`."""

import copy
from os import PathLike
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Partial
from transformers import AutoConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from .configuration_jepa import JepaConfig
from .context_view import ContextView, encode_masked_view, encode_visible_view
from .encoder_adapters import encoder_adapter_for, encoder_from_config, encoder_from_pretrained
from .errors import UsageError
from .lora import add_lora, initialize_lora, is_lora_parameter, merge_lora
from .loss_terms import add_statistics, contrastive_term, mlm_term, prediction_term
from .losses import layer_norm_no_affine
from .mlm_head import MaskedLMHead, encoder_and_head_from_pretrained
from .modeling_feature_encoder import FeatureEncoderModel
from .outputs import JepaOutput, Predicted
from .packed_sequences import document_counts, gather_document_ids, instance_normalize, mean_pool_by_document
from .positions import gather_positions, repeat_interleave_samples
from .predictors import MLPPredictor, PooledPredictor, SingleTokenPredictor, TransformerPredictor

logger = logging.get_logger(__name__)


class JepaForRepresentationPrediction(PreTrainedModel):
    """Context encoder, EMA target encoder and predictor.

    The collator samples the masks, and `EmaTargetCallback` updates the target encoder. The target
    encoder is always frozen and in eval mode.

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
        self.encoder_adapter = encoder_adapter_for(config.encoder_config)
        self.context_encoder = encoder_from_config(config.encoder_config)
        self.target_encoder = encoder_from_config(config.encoder_config)
        self._prepare_encoders()
        if config.lora is not None:
            for encoder in (self.context_encoder, self.target_encoder):
                add_lora(encoder, config.lora)
        self.predictor = _build_predictor(config, self.encoder_adapter.grid)
        self.mlm_head = MaskedLMHead(self.context_encoder) if config.mlm_weight > 0 else None
        self.pooled_predictor = PooledPredictor(config.hidden_size) if config.contrastive_weight > 0 else None
        self.main_input_name = self.encoder_adapter.input_names[0]
        self.post_init()
        # The modules that FSDP wraps: layers only, because accelerate wraps the embeddings itself.
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
        """Build a JEPA around a pretrained encoder; the target encoder is an exact copy.

        Args:
            name_or_path: directory or Hub name of an encoder, plain or with a task head. If
                `mlm_weight` is above 0, its masked-language-model head is loaded too, if it has
                one.
            encoder_kwargs: passed to the encoder's `from_pretrained` (revision, token, cache_dir,
                attn_implementation, ...). The default `dtype` is float32.
            jepa_kwargs: arguments of `JepaConfig`.
        """
        encoder_kwargs = {"dtype": torch.float32, **(encoder_kwargs or {})}
        encoder_config = AutoConfig.from_pretrained(name_or_path, **_hub_kwargs(encoder_kwargs))
        config = JepaConfig.for_encoder(encoder_config, **jepa_kwargs)
        head: dict[str, torch.Tensor] = {}
        if config.mlm_weight > 0:
            encoder, head = encoder_and_head_from_pretrained(name_or_path, encoder_config, **encoder_kwargs)
        else:
            encoder = encoder_from_pretrained(name_or_path, encoder_config, **encoder_kwargs)

        attention = encoder.config._attn_implementation
        config.encoder_config = encoder.config
        config.name_or_path = str(name_or_path)
        model = cls._from_config(config, attn_implementation=attention, dtype=encoder.dtype)
        if config.lora is not None:
            add_lora(encoder, config.lora)
        model.context_encoder = encoder
        model.target_encoder = copy.deepcopy(encoder)
        model._prepare_encoders()
        if head:
            model.mlm_head.load_state_dict(head)
        elif model.mlm_head is not None:
            logger.warning(f"{name_or_path} has no masked-language-model head. The head starts from random weights.")
        model.freeze()
        return model.eval()

    @classmethod
    def from_any_pretrained(
        cls, name_or_path: str, *, encoder_kwargs: dict[str, Any] | None = None, **jepa_kwargs: Any
    ) -> "JepaForRepresentationPrediction":
        """Load a JEPA for further training, or build one with `from_encoder_pretrained`.

        Args:
            name_or_path: directory or Hub name of a JEPA or of an encoder.
            encoder_kwargs: passed to `from_pretrained`.
            jepa_kwargs: arguments of `JepaConfig`; they override those of a loaded JEPA.

        Raises:
            UsageError: `lora` differs from that of the loaded JEPA.
        """
        values, _ = JepaConfig.get_config_dict(name_or_path, **_hub_kwargs(encoder_kwargs or {}))
        if values.get("model_type") != JepaConfig.model_type:
            return cls.from_encoder_pretrained(name_or_path, encoder_kwargs=encoder_kwargs, **jepa_kwargs)
        lora = values.get("lora")
        if "lora" in jepa_kwargs and jepa_kwargs["lora"] != lora:
            adapters = "without adapters" if lora is None else f"with lora {lora}"
            raise UsageError(
                f"{name_or_path} is a JEPA that was trained {adapters}, and its weights require the same. Leave lora "
                "out, or name the plain encoder in the same run."
            )
        config = JepaConfig(**{**values, **jepa_kwargs})
        return cls.from_pretrained(name_or_path, config=config, **{"dtype": torch.float32, **(encoder_kwargs or {})})

    def save_pretrained(self, save_directory: str | PathLike[Any], *args: Any, **kwargs: Any) -> None:
        """Save like `PreTrainedModel.save_pretrained`, with the parameter names of this model.

        By default transformers saves some encoders (ViT, I-JEPA, DINOv2) under the names of an
        older layout. `from_pretrained` reads both, but a resuming `Trainer` would silently
        skip these weights.
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
            init.zeros_(module.bias)

    def _prepare_encoders(self) -> None:
        self.encoder_adapter.register_hooks(self.context_encoder)
        for encoder in (self.context_encoder, self.target_encoder):
            # transformers would install the hooks that record hidden states on first use, which
            # splits a torch.compile graph into five.
            maybe_install_capturing_hooks(encoder)

    def prepare_to_compile(self) -> None:
        """Switch both encoders to the fastest attention implementation under torch.compile."""
        for encoder in (self.context_encoder, self.target_encoder):
            implementation = encoder.config._attn_implementation
            encoder.set_attn_implementation(self.encoder_adapter.compiled_attention.get(implementation, implementation))

    def set_standardization(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Set mean and standard deviation `[F]` of raw features. See `FeatureEncoderModel`."""
        for encoder in (self.context_encoder, self.target_encoder):
            cast("FeatureEncoderModel", encoder).set_standardization(mean, std)

    def train(self, mode: bool = True) -> "JepaForRepresentationPrediction":
        """Set the training mode of all parts but the target encoder, which stays in eval mode.

        `from_pretrained` makes every parameter trainable and ends with `eval()`, so a change of
        mode freezes again. `Trainer` calls `train()` on each micro-step, so other calls must be
        cheap.
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
        """Freeze all parameters without gradient.

        These are the target encoder, unused parameters, and with `lora` the context encoder except
        for its adapters.
        """
        self.target_encoder.requires_grad_(False)
        # DDP would wait for the gradient of a parameter that is not part of the loss.
        if self.config.prediction_weight == 0 and not self._predicts_tokens:
            self.predictor.requires_grad_(False)
        uses_lora = self.config.lora is not None
        for name, parameter in self.context_encoder.named_parameters():
            if name in self.encoder_adapter.unused_parameters or (uses_lora and not is_lora_parameter(name)):
                parameter.requires_grad_(False)

    @property
    def _predicts_tokens(self) -> bool:
        """Whether the MLM loss is computed from the predictor's outputs."""
        return self.config.mlm_weight > 0 and self.config.masked_tokens == "drop"

    def get_encoder(self, which: str | None = "context") -> PreTrainedModel:
        """Return an encoder; with `lora` it contains adapters (see `merged_encoder`).

        Args:
            which: "context" or "target".
        """
        if which not in ("context", "target"):
            raise ValueError(f"Expected 'context' or 'target', got {which!r}.")
        return self.context_encoder if which == "context" else self.target_encoder

    def merged_encoder(
        self, which: str = "context", state_dict: dict[str, torch.Tensor] | None = None
    ) -> PreTrainedModel:
        """Return an encoder without adapters: the model's own, or with `lora` a merged copy.

        Args:
            which: "context" or "target".
            state_dict: the copy's weights, named as in `get_encoder(which)`; default the model's
                own.
        """
        encoder = self.get_encoder(which)
        if self.config.lora is None:
            return encoder
        plain = encoder_from_config(encoder.config, dtype=encoder.dtype)
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
        """Resize the embeddings of both encoders, the MLM head and the configurations."""
        old_embeddings: Any = self.get_input_embeddings()
        old_size = old_embeddings.weight.shape[0]
        embeddings = self.context_encoder.resize_token_embeddings(new_num_tokens, *args, **kwargs)
        target_embeddings = self.target_encoder.resize_token_embeddings(new_num_tokens, *args, **kwargs)
        with torch.no_grad():  # new rows are random, and both encoders must have the same
            target_embeddings.weight[old_size:] = embeddings.weight[old_size:]
        vocab_size = embeddings.weight.shape[0]
        if self.mlm_head is not None:
            self.mlm_head.resize(vocab_size)
        self.config.encoder_config.vocab_size = vocab_size
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
        document_ids: torch.Tensor | None = None,
        document_valid: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        output_hidden_states: bool = False,
        return_loss: bool = True,
    ) -> JepaOutput:
        """Predict the target encoder's representations at the target positions.

        Args:
            input_ids: clean tokens, long `[B, L]`.
            attention_mask: of tokens or series, long `[B, L]`.
            pixel_values: clean images, `[B, channels, height, width]`.
            features: clean feature vectors `[B, F]`, or series of them `[B, L, F]`.
            context_input_ids: masked tokens for "mask_token", long `[B, L]` or `[B, M, L]`.
            context_features: masked features for "mask_token", `[B, ...]` or `[B, M, ...]`.
            context_positions: visible positions for "drop", long `[B, M, C]`; `[B, 1, C]` is
                shared by all M masks.
            context_valid: bool of the same shape, False on padding; None if nothing is padded.
            target_positions: long `[B, M, T]`, M masks per sample.
            target_valid: bool `[B, M, T]`.
            document_ids: document ids of packed rows, long `[B, L]`, -1 on padding. Each document
                is a sample, and its results equal those of a row of its own.
            document_valid: bool `[B, S]`, document ids of packed rows that exist.
            num_items_in_batch: number of targets of the optimizer update; default that of this
                batch. The loss is a sum over this batch's targets divided by it, so that
                accumulated losses add up.
            output_hidden_states: also return the encoders' hidden states.
            return_loss: also compute the loss.
        """
        positions, valid = _flat_targets(target_positions, target_valid)
        clean = self.encoder_adapter.select_inputs(
            {
                "input_ids": input_ids,
                "attention_mask": attention_mask,
                "pixel_values": pixel_values,
                "features": features,
                "document_ids": document_ids,
            }
        )
        if (document_ids is None) != (document_valid is None):
            raise ValueError("Packed rows need both document_ids and document_valid. Make the batch with the collator.")
        # Index of each position's sample in its row, -1 on padding; an unpacked row is one sample.
        samples = self.encoder_adapter.valid_mask(clean).long() - 1 if document_ids is None else document_ids
        max_samples = 1 if document_valid is None else document_valid.shape[1]
        batch, masks = len(samples), len(positions) // len(samples)

        targets, sample_targets, target_states = self._targets(
            clean, samples, max_samples, positions, masks, output_hidden_states
        )
        masked_input = context_input_ids if context_features is None else context_features
        view = self._encode_context(
            clean, masked_input, context_positions, context_valid, positions, valid, output_hidden_states
        )
        predicted = self._predict(view, targets, positions, valid, samples, max_samples, document_ids)
        output = JepaOutput(
            num_targets=predicted.num_targets,
            predictions=predicted.predictions.unflatten(0, (batch, masks)),
            targets=predicted.targets.unflatten(0, (batch, masks)),
            target_valid=predicted.valid.unflatten(0, (batch, masks)),
            target_samples=predicted.samples.unflatten(0, (batch, masks)),
        )
        context_samples = gather_document_ids(samples, view.positions, view.valid)
        if self.pooled_predictor is not None:
            states = view.encoded.last_hidden_state
            pooled = mean_pool_by_document(states.float(), context_samples, max_samples).to(states.dtype)
            output.sample_predictions = self.pooled_predictor(_group_views_by_sample(pooled, batch))
            output.sample_targets = sample_targets
        if return_loss:
            counts = document_counts(predicted.samples, max_samples)
            counts = counts.unflatten(0, (batch, len(view.valid) // batch, -1)).sum(dim=2)
            total = predicted.num_targets.clamp_min(1) if num_items_in_batch is None else num_items_in_batch
            output.loss = self._loss(output, predicted, view, clean, positions, context_samples, counts, total)
        if output_hidden_states or not self.training:
            output.context_state, output.context_valid = view.encoded.last_hidden_state, view.valid
            output.context_samples = context_samples
        if output_hidden_states:
            output.context_hidden_states = view.encoded.hidden_states
            output.target_hidden_states = target_states
        return output

    @torch.no_grad()
    def _targets(
        self,
        clean: dict[str, torch.Tensor],
        samples: torch.Tensor,
        max_samples_per_row: int,
        positions: torch.Tensor,
        masks: int,
        hidden_states: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None, tuple[torch.Tensor, ...] | None]:
        """Encode the clean view once with the target encoder, normalize and gather the targets.

        Instance normalization needs all positions and comes before the gather. Other normalizations
        come after it, so that only targets are normalized.

        Args:
            clean: clean inputs.
            samples: index of each position's sample in its row, long `[B, L]`.
            max_samples_per_row: maximum number S of samples in a row.
            positions: target positions, long `[B * M, T]`.
            masks: M.
            hidden_states: also return all layers.

        Returns:
            Targets `[B * M, T, D]`; with `contrastive_weight` each sample's mean `[B * S, D]`,
            averaged over the normalized means of the target layers; the hidden states on request.
        """
        averages_layers = self.config.average_top_k_layers > 1
        encoded = self.encoder_adapter.encode(
            self.target_encoder, clean, hidden_states=averages_layers or hidden_states
        )
        layers = [encoded.last_hidden_state]
        if averages_layers:
            layers = encoded.hidden_states[-self.config.average_top_k_layers :]
        row_positions = positions.reshape(len(samples), -1)
        gather_last = self.config.target_norm == "instance"
        inputs = layers if gather_last else [gather_positions(layer, row_positions) for layer in layers]
        # Only the running sum and one layer are held in float32.
        targets: Any = sum(self._normalize(layer.float(), samples, max_samples_per_row) for layer in inputs)
        if averages_layers:
            targets = self._normalize(targets / len(layers), samples, max_samples_per_row)
        if gather_last:
            targets = gather_positions(targets, row_positions)
        mean_pool_by_sample: Any = None
        if self.config.contrastive_weight > 0:
            means = [
                layer_norm_no_affine(mean_pool_by_document(layer.float(), samples, max_samples_per_row))
                for layer in layers
            ]
            mean_pool_by_sample = sum(means) / len(layers)
            mean_pool_by_sample = mean_pool_by_sample.flatten(0, 1)
        targets = targets.reshape(*positions.shape, -1)
        return targets, mean_pool_by_sample, encoded.hidden_states if hidden_states else None

    def _normalize(self, states: torch.Tensor, samples: torch.Tensor, max_samples_per_row: int) -> torch.Tensor:
        """Apply `target_norm` to float32 states `[B, L, D]`; see `_targets`."""
        if self.config.target_norm == "layer":
            return layer_norm_no_affine(states)
        if self.config.target_norm == "instance":
            return instance_normalize(states, samples, max_samples_per_row)
        return states

    def _encode_context(
        self,
        clean: dict[str, torch.Tensor],
        masked_input: torch.Tensor | None,
        context_positions: torch.Tensor | None,
        context_valid: torch.Tensor | None,
        positions: torch.Tensor,
        valid: torch.Tensor,
        hidden_states: bool,
    ) -> ContextView:
        """Encode the context view in the configured `masked_tokens`."""
        adapter, encoder = self.encoder_adapter, self.context_encoder
        if self.config.masked_tokens == "mask_token":
            return encode_masked_view(adapter, encoder, clean, masked_input, positions, valid, hidden_states)
        return encode_visible_view(adapter, encoder, clean, context_positions, context_valid, hidden_states)

    def _predict(
        self,
        view: ContextView,
        targets: torch.Tensor,
        positions: torch.Tensor,
        valid: torch.Tensor,
        samples: torch.Tensor,
        max_samples: int,
        document_ids: torch.Tensor | None,
    ) -> Predicted:
        """Predict the targets from the view; with `pool_targets` average both by sample."""
        repeats = len(positions) // len(view.valid)
        predictions = self.predictor(
            repeat_interleave_samples(view.encoded.last_hidden_state, repeats),
            repeat_interleave_samples(view.positions, repeats),
            repeat_interleave_samples(view.is_context, repeats),
            positions,
            valid,
            None if document_ids is None else repeat_interleave_samples(document_ids, len(positions) // len(samples)),
        )
        target_samples = gather_document_ids(samples, positions, valid)
        if self.config.pool_targets:
            predictions, targets = (
                mean_pool_by_document(x, target_samples, max_samples) for x in (predictions, targets)
            )
            valid = document_counts(target_samples, max_samples) > 0
            target_samples = torch.arange(max_samples, device=valid.device).expand_as(valid).masked_fill(~valid, -1)
        return Predicted(predictions, targets, valid, target_samples, valid.sum())

    def _loss(
        self,
        output: JepaOutput,
        predicted: Predicted,
        view: ContextView,
        clean: dict[str, torch.Tensor],
        positions: torch.Tensor,
        context_samples: torch.Tensor,
        counts: torch.Tensor,
        total: torch.Tensor | int,
    ) -> torch.Tensor:
        """Compute the loss, and set its unweighted terms in `output`.

        loss = Σ_k w_k · sum_k / total + Σ_j w_j · (n / total) · statistic_j, with sums over the n
        targets of this micro-batch and `total` targets in the optimizer update. The shares n /
        total of the micro-batches add up to 1.

        Args:
            output: receives the terms.
            predicted: predictions and targets.
            view: the context view.
            clean: clean inputs.
            positions: target positions, long `[B * M, T]`.
            context_samples: sample of each position of the view, long `[B * views, C]`.
            counts: targets of each sample in each view, long `[B, views, S]`.
            total: number of targets of the update.
        """
        config = self.config
        # Padding rows and samples that are too short have no targets.
        has_targets = counts.sum(dim=1) > 0
        loss = prediction_term(config, output, predicted, total)
        if config.mlm_weight > 0:
            states = predicted.predictions
            if not self._predicts_tokens:
                states = gather_positions(view.encoded.last_hidden_state, positions)
            embeddings: Any = self.get_input_embeddings()
            logits = cast("MaskedLMHead", self.mlm_head)(states, _unsharded(embeddings.weight))
            tokens = repeat_interleave_samples(clean["input_ids"], len(positions) // len(counts)).gather(1, positions)
            loss = loss + mlm_term(config, output, predicted, logits, tokens, total)
        if config.variance_weight > 0 or config.covariance_weight > 0 or config.sigreg_weight > 0:
            of_view = repeat_interleave_samples(has_targets, counts.shape[1])
            counted = of_view.gather(1, context_samples.clamp_min(0)) & view.valid
            share = predicted.num_targets / total
            states = view.encoded.last_hidden_state
            loss = add_statistics(
                config, output, loss, states, counted, has_targets.sum(), share, training=self.training
            )
        if config.contrastive_weight > 0:
            packed = "document_ids" in clean
            loss = loss + contrastive_term(config, output, predicted.num_targets, counts, has_targets, packed, total)
        return loss


def _build_predictor(
    config: JepaConfig, grid: tuple[int, ...]
) -> MLPPredictor | TransformerPredictor | SingleTokenPredictor:
    """Build the predictor for positions of the shape `grid`."""
    if config.predictor_type == "mlp":
        return MLPPredictor(config.hidden_size, config.pred_mlp_ratio, config.pred_dropout)
    sizes: dict[str, Any] = {
        "hidden_size": config.hidden_size,
        "width": config.pred_hidden_size,
        "num_hidden_layers": config.pred_num_hidden_layers,
        "num_attention_heads": config.pred_num_attention_heads,
        "mlp_ratio": config.pred_mlp_ratio,
        "dropout": config.pred_dropout,
    }
    return TransformerPredictor(grid=grid, **sizes) if grid else SingleTokenPredictor(**sizes)


def _flat_targets(
    target_positions: torch.Tensor | None, target_valid: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Flatten `[B, M, T]` -> `[B * M, T]`; raise a `ValueError` if there are no targets."""
    if target_positions is None or target_valid is None:
        raise ValueError(
            "target_positions and target_valid are missing. Make the batch with the collator, or call "
            "get_encoder() for representations alone."
        )
    return target_positions.flatten(0, 1), target_valid.flatten(0, 1)


def _any_module_in_other_mode(part: nn.Module, mode: bool) -> bool:
    """Return whether any submodule is in another training mode."""
    return any(module.training != mode for module in part.modules())


def _group_views_by_sample(values: torch.Tensor, batch: int) -> torch.Tensor:
    """Group the views of each sample: `[B * views, S, D]` -> `[B * S * views, D]`."""
    return values.unflatten(0, (batch, -1)).transpose(1, 2).flatten(0, 2)


def _unsharded(weight: torch.Tensor) -> torch.Tensor:
    """Gather a weight that FSDP2 shards and that is used outside its module.

    Its gradients are averaged over the ranks, as FSDP2 does within a module.
    """
    if not isinstance(weight, DTensor):
        return weight
    return weight.full_tensor(grad_placements=[Partial("avg")] * weight.device_mesh.ndim)


def _hub_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Select the arguments that locate a file on the Hub."""
    names = ("revision", "token", "cache_dir", "trust_remote_code", "local_files_only", "subfolder")
    return {name: kwargs[name] for name in names if name in kwargs}
