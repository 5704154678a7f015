"""The JEPA model: context encoder, EMA target encoder and predictor in one `PreTrainedModel`."""

import copy
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Partial
from transformers import AutoConfig, AutoModel, AutoModelForPreTraining
from transformers.utils import can_return_tuple, logging

from .argument_names import refuse_unread_arguments
from .batch import JepaBatch, make_batch
from .configuration_jepa import JepaConfig, check_predictor_settings
from .context_view import ContextView, encode_masked_view, encode_visible_view
from .encoders import encoder_and_loading_info, is_pooler_parameter
from .errors import UsageError
from .lora import add_lora
from .mlm_head import MaskedLMHead, head_from_pretrained
from .modeling_jepa_base import JepaPreTrainedModel
from .objective import jepa_loss
from .outputs import JepaOutput, Predicted, SampleVectors
from .packed_sequences import document_counts, gather_document_ids, mean_pool_by_document
from .positions import gather_positions, repeat_interleave_samples
from .predictors import MLPPredictor, PooledPredictor, SingleTokenPredictor, TransformerPredictor
from .sentence_transformers_files import read_sentence_transformers_files
from .targets import encode_targets
from .upstream import attention_implementation, build_from_config

logger = logging.get_logger(__name__)


class JepaForRepresentationPrediction(JepaPreTrainedModel):
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

    def __init__(self, config: JepaConfig):
        super().__init__(config)
        self.predictor = _build_predictor(config, self.encoder_adapter.grid)
        self.mlm_head = MaskedLMHead(self.context_encoder) if config.mlm_weight > 0 else None
        predicts_pooled = config.contrastive_weight > 0 and config.contrastive_predictor == "mlp"
        self.pooled_predictor = PooledPredictor(config.hidden_size) if predicts_pooled else None
        self.finish_init()

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
            name_or_path: directory or Hub name of an encoder, plain or with a task head. Its pooler is kept and not
                trained. With `mlm_weight` above 0, its masked-language-model head is loaded too, if it has one.
            encoder_kwargs: passed to the encoder's `from_pretrained` (revision, token, cache_dir,
                attn_implementation, ...). The default `dtype` is float32.
            jepa_kwargs: arguments of `JepaConfig`.

        Raises:
            UsageError: an argument that `JepaConfig` does not have.
        """
        refuse_unread_arguments(jepa_kwargs, JepaConfig.argument_names(), "JepaConfig", strict=True)
        encoder_kwargs = {"dtype": torch.float32, **(encoder_kwargs or {})}
        encoder_config = AutoConfig.from_pretrained(name_or_path, **_hub_kwargs(encoder_kwargs))
        config = JepaConfig.for_encoder(encoder_config, **{**jepa_kwargs, "pretrained_encoder": True})
        encoder, _ = encoder_and_loading_info(name_or_path, encoder_config, keep_pooler=True, **encoder_kwargs)
        head = head_from_pretrained(name_or_path, encoder, **encoder_kwargs) if config.mlm_weight > 0 else {}

        attention = attention_implementation(encoder.config)
        config.encoder_config = encoder.config
        config.name_or_path = str(name_or_path)
        model = build_from_config(cls, config, attn_implementation=attention, dtype=encoder.dtype)
        if config.lora is not None:
            add_lora(encoder, config.lora)
        model.context_encoder = encoder
        model.target_encoder = copy.deepcopy(encoder)
        model._prepare_encoders()
        # Set only now, so that random numbers of the other parts do not depend on a pooler.
        config.add_pooling_layer = any(is_pooler_parameter(name) for name, _ in encoder.named_parameters())
        config.sentence_transformers = read_sentence_transformers_files(name_or_path, **_hub_kwargs(encoder_kwargs))
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
            UsageError: `lora` differs from that of the loaded JEPA, or an argument that `JepaConfig` does not have.
        """
        refuse_unread_arguments(jepa_kwargs, JepaConfig.argument_names(), "JepaConfig", strict=True)
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
        check_predictor_settings(values, jepa_kwargs)
        config = JepaConfig(**{**values, **jepa_kwargs})
        return cls.from_pretrained(name_or_path, config=config, **{"dtype": torch.float32, **(encoder_kwargs or {})})

    def freeze(self) -> None:
        """Freeze the target encoder and all parameters that get no gradient."""
        super().freeze()
        # DDP would wait for the gradient of a parameter that is not part of the loss.
        if self.config.prediction_weight == 0 and not self._predicts_tokens:
            self.predictor.requires_grad_(False)

    @property
    def _predicts_tokens(self) -> bool:
        """Whether the MLM loss is computed from the predictor's outputs."""
        return self.config.mlm_weight > 0 and self.config.masked_tokens == "drop"

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize the embeddings of both encoders, the MLM head and the configurations."""
        embeddings = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        if self.mlm_head is not None:
            self.mlm_head.resize(embeddings.weight.shape[0])
        return embeddings

    @can_return_tuple
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
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
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
            context_positions: visible positions for "drop", long `[B, M, C]`; `[B, 1, C]` is shared by all M masks.
            context_valid: bool of the same shape, False on padding; None if nothing is padded.
            target_positions: long `[B, M, T]`, M masks per sample.
            target_valid: bool `[B, M, T]`.
            document_ids: document ids of packed rows, long `[B, L]`, -1 on padding. Each document
                is a sample, and its results equal those of a row of its own.
            document_valid: bool `[B, S]`, document ids of packed rows that exist.
            num_items_in_batch: number of targets of the optimizer update; default that of this batch. The loss is a sum
                over this batch's targets divided by it, so that accumulated losses add up.
            output_hidden_states: also return the encoders' hidden states; default as in the configuration.
            output_attentions: also return the encoders' attention weights, which "eager" attention
                computes; default as in the configuration.
            return_loss: also compute the loss.

        `return_dict=False`, here or in the configuration, returns a tuple without the fields that are None.
        """
        batch = make_batch(
            self.encoder_adapter,
            {
                "input_ids": input_ids,
                "attention_mask": attention_mask,
                "pixel_values": pixel_values,
                "features": features,
                "document_ids": document_ids,
            },
            target_positions,
            target_valid,
            document_valid,
        )
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        requested = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        flags = {name: True for name, value in requested.items() if value}
        targets = encode_targets(self.config, self.encoder_adapter, self.target_encoder, batch, **flags)
        masked_input = context_input_ids if context_features is None else context_features
        view = self._encode_context(batch, masked_input, context_positions, context_valid, **flags)
        predicted = self._predict(view, targets.vectors, batch)
        sample_vectors = None
        if targets.sample_means is not None:
            sample_predictions = _pool_context(view, batch)
            if self.pooled_predictor is not None:
                sample_predictions = self.pooled_predictor(sample_predictions)
            sample_vectors = SampleVectors(sample_predictions, targets.sample_means)
        terms: dict[str, torch.Tensor] = {}
        if return_loss:
            logits = None if self.mlm_head is None else self._mlm_logits(view, predicted, batch)
            terms = jepa_loss(
                self.config, batch, view, predicted, sample_vectors, logits, num_items_in_batch, self.training
            )
        return_states = output_hidden_states or not self.training
        return JepaOutput(
            **terms,
            **_output_vectors(predicted, sample_vectors, batch.num_masks),
            context_state=view.encoded.last_hidden_state if return_states else None,
            context_valid=view.valid if return_states else None,
            context_samples=view.samples if return_states else None,
            context_hidden_states=view.encoded.hidden_states if output_hidden_states else None,
            target_hidden_states=targets.encoded.hidden_states if output_hidden_states else None,
            context_attentions=view.encoded.attentions if output_attentions else None,
            target_attentions=targets.encoded.attentions if output_attentions else None,
        )

    def _encode_context(
        self,
        batch: JepaBatch,
        masked_input: torch.Tensor | None,
        context_positions: torch.Tensor | None,
        context_valid: torch.Tensor | None,
        **flags: bool,
    ) -> ContextView:
        """Encode the context view in the configured `masked_tokens`."""
        adapter, encoder = self.encoder_adapter, self.context_encoder
        if self.config.masked_tokens == "mask_token":
            return encode_masked_view(adapter, encoder, batch, masked_input, **flags)
        return encode_visible_view(adapter, encoder, batch, context_positions, context_valid, **flags)

    def _predict(self, view: ContextView, targets: torch.Tensor, batch: JepaBatch) -> Predicted:
        """Predict the targets from the view; with `pool_targets` average both by sample."""
        repeats = batch.num_masks // view.num_views
        predictions = self.predictor(
            repeat_interleave_samples(view.encoded.last_hidden_state, repeats),
            context_positions=repeat_interleave_samples(view.positions, repeats),
            context_valid=repeat_interleave_samples(view.is_context, repeats),
            target_positions=batch.positions,
            target_valid=batch.valid,
            document_ids=None
            if batch.document_ids is None
            else repeat_interleave_samples(batch.document_ids, batch.num_masks),
        )
        valid, max_samples = batch.valid, batch.max_samples
        samples = gather_document_ids(batch.samples, batch.positions, valid)
        # The gradient of a value that does not count would be 0 × NaN, if the value is NaN.
        predictions, targets = (torch.where(valid[..., None], x, 0.0) for x in (predictions, targets))
        if self.config.pool_targets:
            predictions, targets = (mean_pool_by_document(x, samples, max_samples) for x in (predictions, targets))
            valid = document_counts(samples, max_samples) > 0
            samples = torch.arange(max_samples, device=valid.device).expand_as(valid).masked_fill(~valid, -1)
        return Predicted(predictions, targets, valid, samples, valid.sum())

    def _mlm_logits(self, view: ContextView, predicted: Predicted, batch: JepaBatch) -> torch.Tensor:
        """Compute the logits of the target tokens, `[B * M, T, V]`."""
        states = predicted.predictions
        if not self._predicts_tokens:
            states = gather_positions(view.encoded.last_hidden_state, batch.positions)
            states = torch.where(batch.valid[..., None], states, 0.0)
        embeddings: Any = self.get_input_embeddings()
        return cast("MaskedLMHead", self.mlm_head)(states, _unsharded(embeddings.weight))


def _output_vectors(
    predicted: Predicted, sample_vectors: SampleVectors | None, num_masks: int
) -> dict[str, torch.Tensor | None]:
    """Return the fields of `JepaOutput` about predictions and targets, by row and mask."""
    predictions, targets, valid, samples = (value.unflatten(0, (-1, num_masks)) for value in predicted[:4])
    return {
        "num_targets": predicted.num_targets,
        "predictions": predictions,
        "targets": targets,
        "target_valid": valid,
        "target_samples": samples,
        "sample_predictions": None if sample_vectors is None else sample_vectors.predictions,
        "sample_targets": None if sample_vectors is None else sample_vectors.targets,
    }


def _pool_context(view: ContextView, batch: JepaBatch) -> torch.Tensor:
    """Average the context of each sample in each view: `[B * S * views, D]`."""
    states = view.encoded.last_hidden_state
    pooled = mean_pool_by_document(states.float(), view.samples, batch.max_samples).to(states.dtype)
    return pooled.unflatten(0, (-1, view.num_views)).transpose(1, 2).flatten(0, 2)


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


# A copy of this file that comes with an export is loaded with trust_remote_code and registers nothing.
if __name__ == "jepa_hf.models.modeling_jepa":
    AutoConfig.register(JepaConfig.model_type, JepaConfig, exist_ok=True)
    AutoModel.register(JepaConfig, JepaForRepresentationPrediction, exist_ok=True)
    AutoModelForPreTraining.register(JepaConfig, JepaForRepresentationPrediction, exist_ok=True)
