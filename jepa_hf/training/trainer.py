"""`JepaTrainer`: a `Trainer` for `JepaForRepresentationPrediction`."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import ModelCard
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from transformers.debug_utils import DebugOption

from ..distributed.deepspeed_state import zero3_init_disabled
from ..hub.export import export_run
from ..hub.loading import hidden_loading_bars
from ..hub.model_card import DatasetInfo, ModelCardInfo, render_card
from ..masking.base_collator import MaskingCollator, SpanMaskingCollator
from ..masking.span_collator import DataCollatorForSpanJEPA
from ..models.jepa_config_checks import WEIGHTS
from ..models.modeling_jepa import JepaForRepresentationPrediction
from ..monitoring.health_sample import HealthSample
from ..utils.modes import evaluation_mode
from ..utils.types import ProcessingClass
from .base_trainer import BaseJepaTrainer
from .batch_metrics import add_batch_metrics, count_targets, evaluation_metrics, weighted_loss
from .callbacks import EmaTargetCallback, HealthCallback, unwrap_jepa
from .checks import check_batch_size, check_comparable, check_targets
from .console import ConsoleCallback
from .defaults import (
    check_single_ema,
    default_callbacks,
    default_collator,
    default_collator_class,
    load_processing_class,
)
from .ema import match_parameters, relative_parameter_distance
from .flops import PREDICTOR_TABLES, ParameterCounts, count_parameters, training_flops
from .health_batches import health_batches
from .inputs import check_collator, check_vocabulary, jepa_around, resolve_arguments, tokenized, without_pandas
from .metric_accumulator import MetricAccumulator
from .model_card_info import collect_facts
from .results import write_masks
from .training_args import JepaTrainingArguments
from .upstream import to_device

# Targets of an evaluation that its health is measured on: a bound on memory.
_EVALUATED_TARGETS = 8192


class JepaTrainer(BaseJepaTrainer):
    """Train a JEPA: collate masked views, average the target encoder, log health.

    Args:
        model: A `JepaForRepresentationPrediction`; an encoder of transformers, which is copied; or
            the directory or Hub name of either.
        args: `JepaTrainingArguments` (default: writes to `out`). Of plain `TrainingArguments` the
            values that differ from their defaults are taken.
        data_collator: Makes the views (default: the collator for the model's modality, with the run's seed).
        train_dataset: Rows of token ids (`input_ids`) or text (`text`, tokenized here), images (`image`), or feature
            vectors or series (`features`), also as a DataFrame. Set the standardization of features with
            `model.set_standardization` first; run_jepa.py fits it on the training rows.
        eval_dataset: Like `train_dataset`, or several by name.
        processing_class: The tokenizer or image processor (default: that of `model`, if that is a name).
        max_seq_length: Maximum number of tokens per row of text (default: 512, or less where model
            and tokenizer require it).
        probe: Called with the model at each evaluation, such as `online_probe.OnlineProbe`. Its results become metrics
            of the evaluation (`eval_...`), which `metric_for_best_model` may name.
        callbacks: Additional callbacks. An `EmaTargetCallback` among them replaces the default one.
        model_init: Instead of `model`: returns a new one at the start of each training.
        **kwargs: As for `Trainer`.

    Raises:
        UsageError: A second EMA callback, data of another modality or without targets, or a
            contrastive term over batches of one.
    """

    args: JepaTrainingArguments
    model: JepaForRepresentationPrediction
    batch_keys = ("target_positions", "target_valid")

    def __init__(
        self,
        model: PreTrainedModel | str | Path | None = None,
        args: TrainingArguments | None = None,
        data_collator: MaskingCollator | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: ProcessingClass | None = None,
        max_seq_length: int | None = None,
        probe: Callable[[JepaForRepresentationPrediction], dict[str, float]] | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        **kwargs: Any,
    ):
        args = resolve_arguments(args, JepaTrainingArguments)
        self.args = args  # `prepare_model` needs them before `Trainer` sets them
        jepa = self.resolve_model(model, model_init)
        modality = jepa.encoder_adapter.modality
        if processing_class is None and not isinstance(model, JepaForRepresentationPrediction):
            name = model if isinstance(model, (str, Path)) else jepa.config.name_or_path
            processing_class = load_processing_class(str(name), modality) if name else None
        check_collator(data_collator, default_collator_class(modality).__name__)
        if data_collator is None:
            data_collator = default_collator(jepa, processing_class, args.seed)
        elif isinstance(data_collator, SpanMaskingCollator):
            data_collator = data_collator.for_model(jepa.config.masked_tokens)
        self._tokenize: Callable[[Any], Any] | None = None
        if isinstance(data_collator, DataCollatorForSpanJEPA) and processing_class is not None:
            tokenizer = cast(PreTrainedTokenizerBase, processing_class)
            check_vocabulary(tokenizer, jepa)
            max_length = cast(Any, jepa.encoder_adapter).max_length
            self._tokenize = partial(
                tokenized,
                tokenizer=tokenizer,
                max_seq_length=min(max_length, tokenizer.model_max_length, max_seq_length or 512),
                word_ids=data_collator.whole_word,
            )
        if jepa.config.contrastive_weight > 0:
            check_batch_size(args, train_dataset)
        self.evaluate_in_training_batches(args)
        self.probe = probe
        health = HealthCallback(
            self.measure_health, self.log, args.health_steps, args.stop_on_collapse, lambda: self.is_interrupted
        )
        super().__init__(
            model=jepa,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=[*default_callbacks(callbacks or (), jepa, args), *([health] if args.health_steps else [])],
            model_init=model_init,
            **kwargs,
        )
        check_targets(self.train_dataset, self.data_collator, "training data")
        check_targets(self.eval_dataset, self.data_collator, "evaluation data")

    def prepare_model(self, model: PreTrainedModel | str | Path) -> JepaForRepresentationPrediction:
        """Load a model by name, wrap an encoder in a JEPA, and freeze what is not trained."""
        if isinstance(model, (str, Path)):
            with hidden_loading_bars(), zero3_init_disabled():
                model = JepaForRepresentationPrediction.from_any_pretrained(str(model))
        jepa = jepa_around(model)
        jepa.freeze()
        jepa.config.return_dict = True  # the trainer reads fields of the output
        if self.args.torch_compile:
            jepa.prepare_to_compile()
        if DebugOption.UNDERFLOW_OVERFLOW in self.args.debug:
            jepa.prepare_to_debug()
        return jepa

    # ---- EMA

    def add_callback(self, callback: type[TrainerCallback] | TrainerCallback) -> None:
        """Like `Trainer.add_callback`, but refuse a second `EmaTargetCallback`."""
        check_single_ema([*self.callback_handler.callbacks, callback])
        super().add_callback(callback)

    @property
    def ema_callback(self) -> EmaTargetCallback:
        """The callback that moves the target encoder."""
        return next(callback for callback in self.callback_handler.callbacks if isinstance(callback, EmaTargetCallback))

    @property
    def stopped_early(self) -> bool:
        """Whether the run ended before its last step because of its health findings."""
        is_unfinished = self.state.global_step < self.state.max_steps
        return self.args.stop_on_collapse and is_unfinished and bool(self.health_findings)

    # ---- data

    def tokenize_rows(self, dataset: Any) -> Any:
        """Tokenize rows of text; return other rows unchanged, those of a DataFrame as a data set."""
        if isinstance(dataset, dict):
            return {name: self.tokenize_rows(part) for name, part in dataset.items()}
        dataset = without_pandas(dataset)
        return dataset if self._tokenize is None else self._tokenize(dataset)

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

    # ---- checks

    def check_training(self) -> None:
        """Like the base's, and refuse a contrastive term over a single sample."""
        super().check_training()
        if self._unwrapped.config.contrastive_weight > 0:
            check_comparable("train_dataset", self.train_dataset)
            check_comparable("eval_dataset", self.eval_dataset)

    def evaluation_metrics(self) -> set[str]:
        """Return the names of the metrics of an evaluation; empty if those of the probe are unknown."""
        probes: Collection[str] | None = () if self.probe is None else getattr(self.probe, "metric_names", None)
        if probes is None:
            return set()
        return evaluation_metrics(self._unwrapped.config).union(probes)

    # ---- logged metrics

    def count_targets(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Count the targets of a micro-batch; with `pool_targets` masks that have any."""
        return count_targets(inputs, self._unwrapped.config.pool_targets)

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
        # accelerate's `unwrap_model` walks over all modules, which is too slow several times a step.
        return unwrap_jepa(self.model)

    @staticmethod
    def mask_rows(inputs: dict[str, torch.Tensor], own: torch.Tensor) -> None:
        """Mark all targets of the rows where `own`, bool `[B]`, is False as invalid."""
        inputs["target_valid"] = inputs["target_valid"] & own[:, None, None]

    def console_callback(self) -> ConsoleCallback:
        """Return the callback that shows loss, accuracy and rank, with tokens per second for text."""
        config = self._unwrapped.config
        weights = {name.replace("_weight", "_loss"): getattr(config, name) for name in WEIGHTS}
        is_text = self._unwrapped.encoder_adapter.modality == "text"
        return ConsoleCallback(weights, config.hidden_size, is_text, self.verdict)

    def update_metrics(self, outputs: Any, inputs: dict[str, torch.Tensor], means: MetricAccumulator) -> None:
        """Add the parts of the loss, the masked fraction and the number of rows without targets."""
        has_positions = bool(self._unwrapped.encoder_adapter.grid)
        samples = add_batch_metrics(means, outputs, inputs, self.count_tokens(inputs) if has_positions else None)
        if outputs.contrastive_loss is not None:
            weight = outputs.num_targets * self._compares_samples(samples)
            means.add("contrastive_loss", outputs.contrastive_loss, weight)
        if means is self._means["eval"]:
            means.add("loss", outputs.loss, outputs.num_targets)
            self._evaluated.add(outputs, inputs, self._unwrapped.config.pool_targets)

    def _compares_samples(self, samples: torch.Tensor) -> torch.Tensor:
        """Return whether a batch with targets of this number of samples has a contrastive loss."""
        if self.args.world_size == 1:
            return samples > 1
        state = self.accelerator.gradient_state  # other ranks have samples, too, except for a last row
        is_last_row = not self.model.training and state.end_of_dataloader and state.remainder == 1
        return samples > 1 if is_last_row else torch.ones_like(samples, dtype=torch.bool)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Add the probe's results to the metrics."""
        self._evaluated = HealthSample(_EVALUATED_TARGETS // self.args.world_size)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)  # type: ignore[misc]
        del self._evaluated
        if self._unwrapped.config.contrastive_weight:
            # A batch of one sample has no contrastive loss, so the loss is that of the means.
            output.metrics[f"{metric_key_prefix}_loss"] = weighted_loss(
                self._unwrapped.config, output.metrics, metric_key_prefix
            )
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

    @torch.no_grad()
    def measure_health(self) -> dict[str, float]:
        """Measure the health of encoders and predictor on a fixed batch, the same on all ranks.

        Returns:
            The metrics of `HealthSample.measure` and `encoder_distance`, the relative L2 distance
            between the parameters of both encoders, with the prefix `health_`. Empty if the batch
            has targets of fewer than two samples.
        """
        model, sample = self._unwrapped, HealthSample()
        with evaluation_mode(model):
            for batch in self._health_batches:
                inputs = to_device(self, batch)
                with self.compute_loss_context_manager():
                    output = model(**inputs, return_loss=False)
                sample.add(output, inputs, model.config.pool_targets)
        values = sample.measure(model.config)
        if values:
            encoders = (encoder.named_parameters() for encoder in (model.context_encoder, model.target_encoder))
            pairs = self.ema_callback.pairs or match_parameters(*encoders)
            values["encoder_distance"] = relative_parameter_distance(*pairs)
        return {f"health_{name}": value for name, value in values.items()}

    # ---- the final directory

    def write_results(self, **kwargs: Any) -> None:
        """Like the base's; `masks.png` too, unless the command wrote it before training."""
        super().write_results(**kwargs)
        if self.state.global_step and not (self._output_dir / "masks.png").exists():
            write_masks(self)

    @property
    def exported_encoder(self) -> str:
        """Encoder in the output directory, see `export_encoder` of the arguments."""
        return self.args.export_encoder or self._unwrapped.config.default_exported_encoder

    def export_final_model(self, model: nn.Module, output_dir: str, state_dict: dict[str, torch.Tensor] | None) -> None:
        """Write the exported encoder with its processing class, and the full JEPA below it."""
        jepa = cast(JepaForRepresentationPrediction, model)
        export_run(jepa, output_dir, cast(Any, self.processing_class), self.exported_encoder, state_dict)

    def render_card(self, name: str, data: DatasetInfo, language: str | None, license: str | None) -> ModelCard:
        """Render the card of the model that users will load as `name`."""
        facts = replace(self.model_card_info(name), data=data, language=language, license=license)
        return render_card(facts)

    def model_card_info(self, name: str) -> ModelCardInfo:
        """Return the facts for the card of the model that users will load as `name`."""
        return collect_facts(self, name, self._passes.passes if self._is_stream else None)
