"""`JepaTrainer`: a `Trainer` for `JepaForRepresentationPrediction`."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import BaseImageProcessor, PreTrainedTokenizerBase, TrainerCallback

from ..distributed.deepspeed_state import zero3_init_disabled
from ..errors import UsageError
from ..hub.export import export_run
from ..hub.model_card import ModelCardInfo
from ..masking.base_collator import MaskingCollator
from ..masking.span_collator import DataCollatorForSpanJEPA
from ..models.modeling_jepa import JepaForRepresentationPrediction
from ..models.packed_sequences import document_counts, gather_document_ids
from ..monitoring.health import findings
from ..monitoring.health_sample import HealthSample
from .base_trainer import BaseJepaTrainer
from .callbacks import EmaTargetCallback, HealthCallback, WeightDecayCallback, unwrap_jepa
from .defaults import default_collator, is_packed, load_processing_class, tokenized
from .flops import PREDICTOR_TABLES, ParameterCounts, count_parameters, training_flops
from .health_measurement import health_batches, measure_health
from .metric_accumulator import MetricAccumulator
from .model_card_info import collect_facts
from .stream_padding import PADDING_ROW_KEY
from .training_args import JepaTrainingArguments

# Targets of an evaluation that its health is measured on: a bound on memory.
_EVALUATED_TARGETS = 8192

# Per-batch metrics that the model may return.
_BATCH_METRICS = (
    "prediction_loss",
    "mlm_loss",
    "variance_loss",
    "covariance_loss",
    "sigreg_loss",
    "contrastive_loss",
    "cosine",
)


class JepaTrainer(BaseJepaTrainer):
    """Train a JEPA: collate masked views, average the target encoder, log health.

    Args:
        model: A `JepaForRepresentationPrediction`, or the directory or Hub name of an encoder or a
            JEPA.
        args: `JepaTrainingArguments` (default: writes to `out`).
        data_collator: Makes the views (default: the collator for the model's modality, with the
            run's seed).
        train_dataset: Rows of token ids (`input_ids`) or text (`text`, tokenized here), images
            (`image`), or feature vectors or series (`features`). Set the standardization of
            features with `model.set_standardization` first; run_jepa.py fits it on the training
            rows.
        eval_dataset: Like `train_dataset`.
        processing_class: The tokenizer or image processor (default: that of `model`, if that is a
            name).
        max_seq_length: Maximum number of tokens per row of text (default: 512, or less where model
            and tokenizer require it).
        probe: Called with the model at each evaluation, such as `online_probe.OnlineProbe`. Its
            results become metrics of the evaluation (`eval_...`), which `metric_for_best_model` may
            name.
        callbacks: Additional callbacks. An `EmaTargetCallback` among them replaces the default one.
        **kwargs: As for `Trainer`.

    Raises:
        UsageError: A second EMA callback, data of another modality, or a contrastive term over
            batches of one.
    """

    args: JepaTrainingArguments
    model: JepaForRepresentationPrediction
    _signature_columns: Any  # untyped in `Trainer`

    def __init__(
        self,
        model: JepaForRepresentationPrediction | str,
        args: JepaTrainingArguments | None = None,
        data_collator: MaskingCollator | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | BaseImageProcessor | None = None,
        max_seq_length: int | None = None,
        probe: Callable[[JepaForRepresentationPrediction], dict[str, float]] | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        **kwargs: Any,
    ):
        args = args if args is not None else JepaTrainingArguments()
        if isinstance(model, (str, Path)):
            name = str(model)
            with zero3_init_disabled():
                model = JepaForRepresentationPrediction.from_any_pretrained(name)
            if processing_class is None:
                processing_class = load_processing_class(name, model.encoder_adapter.modality)
        if data_collator is None:
            data_collator = default_collator(model, processing_class, args.seed)
        if isinstance(data_collator, DataCollatorForSpanJEPA) and processing_class is not None:
            tokenizer = cast(PreTrainedTokenizerBase, processing_class)
            max_length = cast(Any, model.encoder_adapter).max_length
            max_length = min(max_length, tokenizer.model_max_length, max_seq_length or 512)
            train_dataset = tokenized(train_dataset, tokenizer, max_length, data_collator.whole_word)
            eval_dataset = tokenized(eval_dataset, tokenizer, max_length, data_collator.whole_word)

        has_one_sample = args.train_batch_size * args.world_size < 2 and not is_packed(train_dataset)
        if model.config.contrastive_weight > 0 and has_one_sample:
            raise UsageError(
                "contrastive_weight compares the samples of a batch with each other, and a batch here has one. Raise "
                "--per_device_train_batch_size, or set --contrastive_weight 0."
            )

        self._evaluate_in_training_batches(args)
        model.freeze()
        if args.torch_compile:
            model.prepare_to_compile()
        self.probe = probe
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=self._with_default_callbacks(callbacks or (), model, args),
            **kwargs,
        )

    def _with_default_callbacks(
        self, callbacks: Sequence[TrainerCallback], model: JepaForRepresentationPrediction, args: JepaTrainingArguments
    ) -> list[TrainerCallback]:
        """Add the callbacks for the target encoder, the weight decay and health."""
        callbacks = list(callbacks)
        _check_single_ema(callbacks)
        if not any(_is_ema(callback) for callback in callbacks):
            ema = EmaTargetCallback(
                args.ema_decay,
                args.ema_decay_end,
                args.ema_schedule,
                pretrained=bool(model.config.name_or_path),
                default=model.config.ema_decay_range,
            )
            callbacks.insert(0, ema)
        if args.weight_decay_end is not None:
            callbacks.append(WeightDecayCallback(args.weight_decay_end))
        if args.health_steps:
            callbacks.append(HealthCallback(self.measure_health, self.log, args.health_steps, args.stop_on_collapse))
        return callbacks

    # ---- EMA

    def add_callback(self, callback: type[TrainerCallback] | TrainerCallback) -> None:
        """Like `Trainer.add_callback`, but refuse a second `EmaTargetCallback`."""
        _check_single_ema([*self.callback_handler.callbacks, callback])
        super().add_callback(callback)

    @property
    def ema_callback(self) -> EmaTargetCallback:
        """The callback that moves the target encoder."""
        return next(callback for callback in self.callback_handler.callbacks if isinstance(callback, EmaTargetCallback))

    @property
    def health_findings(self) -> dict[str, tuple[int, str]]:
        """Findings of the watchdog by kind: first step and sentence, see `health.findings`."""
        return findings(self.state.log_history, self.state.max_steps)

    @property
    def stopped_early(self) -> bool:
        """Whether the run ended before its last step because of its health findings."""
        is_unfinished = self.state.global_step < self.state.max_steps
        return self.args.stop_on_collapse and is_unfinished and bool(self.health_findings)

    # ---- data

    # `remove_unused_columns` removes all columns that the model's forward does not name; no
    # argument adds some.
    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if isinstance(self.data_collator, MaskingCollator):
            columns = (*(self._signature_columns or ()), *self.data_collator.extra_columns, PADDING_ROW_KEY)
            self._signature_columns = list(dict.fromkeys(columns))

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """Like `Trainer`'s, with batches as `MaskingCollator.for_training` makes them."""
        with self._with_collator(lambda collator: collator.for_training()):
            return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> torch.utils.data.DataLoader:
        """Like `Trainer.get_eval_dataloader`, with masks that are the same in every evaluation."""
        with self._with_collator(lambda collator: collator.for_evaluation()):
            return super().get_eval_dataloader(eval_dataset)

    @contextmanager
    def _with_collator(self, change: Callable[[MaskingCollator], MaskingCollator]) -> Iterator[None]:
        """Give loaders that are built meanwhile a changed copy of the collator."""
        collator = self.data_collator
        if isinstance(collator, MaskingCollator):
            self.data_collator = change(collator)
        try:
            yield
        finally:
            self.data_collator = collator

    # ---- optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Name the parameters with weight decay: no biases, norms or tables of the predictor."""
        if self.args.decay_norms_and_biases:
            return [name for name, _ in model.named_parameters()]
        names = super().get_decay_parameter_names(model)
        return [name for name in names if not name.endswith(PREDICTOR_TABLES)]

    def floating_point_ops(self, inputs: dict[str, torch.Tensor]) -> int:
        """Estimate the floating-point operations of one micro-batch, see `flops.training_flops`."""
        return training_flops(self._unwrapped, self._parameter_counts, inputs)

    @cached_property
    def _parameter_counts(self) -> ParameterCounts:
        return count_parameters(self._unwrapped)

    # ---- logged metrics

    def count_targets(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Count the targets of a micro-batch; with `pool_targets` masks that have any."""
        valid = inputs["target_valid"]
        if not self._unwrapped.config.pool_targets:
            return valid.sum()
        if "document_ids" not in inputs:
            return valid.any(dim=-1).sum()
        positions = inputs["target_positions"].flatten(0, 1)
        documents = gather_document_ids(inputs["document_ids"], positions, valid.flatten(0, 1))
        return (document_counts(documents, inputs["document_valid"].shape[1]) > 0).sum()

    def count_tokens(self, inputs: dict[str, torch.Tensor], padding: bool = False) -> torch.Tensor:
        """Count the positions of one micro-batch, with or without padding."""
        if "attention_mask" in inputs and not padding:
            return inputs["attention_mask"].sum()
        samples = len(inputs["target_valid"])
        return inputs["target_valid"].new_full(
            (), samples * self._unwrapped.encoder_adapter.length(inputs), dtype=torch.long
        )

    @property
    def _unwrapped(self) -> JepaForRepresentationPrediction:
        # accelerate's `unwrap_model` walks over all modules, which is too slow several times a
        # step.
        return unwrap_jepa(self.model)

    @staticmethod
    def mask_rows(inputs: dict[str, torch.Tensor], own: torch.Tensor) -> None:
        """Mark all targets of the rows where `own`, bool `[B]`, is False as invalid."""
        inputs["target_valid"] = inputs["target_valid"] & own[:, None, None]

    def update_metrics(self, outputs: Any, inputs: dict[str, torch.Tensor], means: MetricAccumulator) -> None:
        """Add the parts of the loss, the masked fraction and the number of rows without targets.

        Args:
            outputs: The model's `JepaOutput`.
            inputs: The micro-batch.
            means: Of training or of an evaluation.
        """
        valid = outputs.target_valid
        for name in _BATCH_METRICS:
            value = getattr(outputs, name)
            if value is not None:
                means.add(name, value, outputs.num_targets)
        if (
            self._unwrapped.encoder_adapter.grid
        ):  # a vector that is one token is masked in part, which cannot be counted
            positions = self.count_tokens(inputs) * valid.shape[1]
            means.add("masked_fraction", inputs["target_valid"].sum() / positions, positions)
        if "document_valid" in inputs:  # of packed rows, documents
            exists = inputs["document_valid"]
            empty = exists & (document_counts(outputs.target_samples.flatten(1), exists.shape[1]) == 0)
        else:
            empty = ~valid.flatten(1).any(dim=1)
        means.count("rows_without_targets", empty.sum())
        if means is self._means["eval"]:
            means.add("loss", outputs.loss, outputs.num_targets)
            self._evaluated.add(outputs, inputs, self._unwrapped.config.pool_targets)

    def evaluation_loop(
        self,
        dataloader: torch.utils.data.DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Add the probe's results to the metrics."""
        self._evaluated = HealthSample(_EVALUATED_TARGETS // self.args.world_size)
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        del self._evaluated
        if self.probe is not None:
            with self.compute_loss_context_manager():
                results = self.probe(self._unwrapped)
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in results.items()})
        return output

    def finish_evaluation(self, means: MetricAccumulator) -> None:
        """Add the health of the first rows, up to `_EVALUATED_TARGETS` targets of all ranks.

        The prediction loss stays the mean over all targets.
        """
        self._evaluated.gather(self.accelerator)
        one = torch.ones((), device=self.args.device)
        for name, value in self._evaluated.measure(self._unwrapped.config).items():
            if name != "prediction_loss":
                means.add(name, value * one, one)

    def training_logs(self) -> dict[str, float]:
        """Return the metrics that are logged with the training loss, and the EMA decay."""
        logs = super().training_logs()
        if self.ema_callback.decay is not None:
            logs["ema_decay"] = self.ema_callback.decay
        return logs

    # ---- health

    @cached_property
    def _health_batches(self) -> list[dict[str, torch.Tensor]]:
        return health_batches(self)

    def measure_health(self) -> dict[str, float]:
        """Measure the health of encoders and predictor on a fixed batch, the same on all ranks.

        Returns:
            The metrics of `health_measurement.measure_health` with the prefix `health_`; empty if
            the batch has targets of fewer than two samples.
        """
        was_training = self.model.training
        values = measure_health(self, self._unwrapped, self._health_batches, self.ema_callback.pairs)
        self._unwrapped.train(was_training)
        return {f"health_{name}": value for name, value in values.items()}

    # ---- the final directory

    def export_final_model(self, model: nn.Module, output_dir: str, state_dict: dict[str, torch.Tensor] | None) -> None:
        """Write the exported encoder with its processing class, and the full JEPA below it."""
        jepa = cast(JepaForRepresentationPrediction, model)
        export_run(jepa, output_dir, cast(Any, self.processing_class), self.args.export_encoder, state_dict)

    def model_card_info(self, name: str) -> ModelCardInfo:
        """Return the facts for the card of the model that users will load as `name`."""
        return collect_facts(self, name, self._passes.passes if self._is_stream else None)


def _is_ema(callback: type[TrainerCallback] | TrainerCallback) -> bool:
    """Return whether an object or a class is an `EmaTargetCallback`: `Trainer` takes both."""
    return issubclass(callback if isinstance(callback, type) else type(callback), EmaTargetCallback)


def _check_single_ema(callbacks: Sequence[type[TrainerCallback] | TrainerCallback]) -> None:
    if sum(map(_is_ema, callbacks)) > 1:
        raise UsageError(
            "There is already an EmaTargetCallback; a second one would move the target encoder twice per step. Pass "
            "your own in JepaTrainer(callbacks=[...]) instead of adding it."
        )
