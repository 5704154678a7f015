"""`JepaTrainer`: a `Trainer` for `JepaForRepresentationPrediction`."""

from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    BaseImageProcessor,
    PreTrainedTokenizerBase,
    SchedulerType,
    TrainerCallback,
)

from ..data.tokenization import tokenize_dataset
from ..distributed.deepspeed_state import whole_weights
from ..errors import UsageError
from ..hub.export import export_run
from ..hub.model_card import CardFacts, hardware, hub_name
from ..masking.base_collator import MaskingCollator
from ..masking.block_collator import DataCollatorForBlockJEPA
from ..masking.feature_collator import DataCollatorForFeatureJEPA
from ..masking.span_collator import DataCollatorForSpanJEPA
from ..models.configuration_jepa import WEIGHTS, JepaConfig
from ..models.modeling_jepa import JepaForRepresentationPrediction, JepaOutput
from ..models.packed_sequences import document_counts, documents_at
from ..models.predictors import TransformerPredictor
from ..monitoring.health import RIVALS, findings, is_measurement
from ..monitoring.health_sample import HealthSample
from ..version import __version__
from .base_trainer import RepresentationTrainer
from .callbacks import EmaTargetCallback, HealthCallback, WeightDecayCallback, unwrapped
from .ema import match_parameters, relative_distance
from .metric_accumulator import RunningMeans
from .stream_padding import REPEATED
from .training_args import JepaTrainingArguments

# Targets of an evaluation that its health is measured on: a bound on memory.
_EVALUATED_TARGETS = 8192

# Samples of the fixed batch that health is measured on during training.
_HEALTH_SAMPLES = 128

# Of the predictor: what is looked up and added, not multiplied.
_PREDICTOR_TABLES = ("predictor.mask_token", "predictor.position_embeddings")


# What the model tells of a batch, where it computes it.
_TOLD = (
    "prediction_loss",
    "mlm_loss",
    "variance_loss",
    "covariance_loss",
    "sigreg_loss",
    "contrastive_loss",
    "cosine",
)

# Measures of an evaluation that a card shows.
_ON_CARD = (
    "loss",
    "prediction_loss",
    *RIVALS,
    "hit_rate_in_sample",
    "hit_rate_in_sample_chance",
    "hit_rate",
    "hit_rate_chance",
    "sample_hit_rate",
    "sample_hit_rate_chance",
    "target_rank",
    "context_rank",
    "context_pairwise_cosine",
)

# What a position is, for readers.
_UNITS = {"text": "tokens", "images": "patches", "features": "positions"}


class JepaTrainer(RepresentationTrainer):
    """Trains a JEPA: collates masked views, averages the target encoder, logs health beside the loss.

    Args:
        model: a `JepaForRepresentationPrediction`, or the directory or Hub name of an encoder (or of a JEPA).
        args: `JepaTrainingArguments`; default writes to `out`.
        data_collator: default the one for what the model reads (`DataCollatorForSpanJEPA`, `DataCollatorForBlockJEPA`
            or `DataCollatorForFeatureJEPA`), with the run's seed.
        train_dataset, eval_dataset: rows of token ids (`input_ids`), or of text (`text`), which are tokenised here; of
            images (`image`); or of feature vectors or series of them (`features`), which the model standardises with
            what `model.set_standardization` was given before (run_jepa.py fits it on the training rows).
        processing_class: the tokenizer or image processor; default the one beside `model`, where that is a name.
        max_seq_length: where rows of text are cut, default 512 or what model and tokenizer allow.
        probe: judges the model at each evaluation, such as `online_probe.OnlineProbe`; what it gives becomes part of
            the evaluation's metrics, as `eval_...`, so that `metric_for_best_model` may name it.
        callbacks: more callbacks. An `EmaTargetCallback` among them takes the place of the default one.
        kwargs: as `Trainer` takes them.

    Raises:
        UsageError: a second EMA callback, data that the model does not read, or a contrastive term over batches of one.
    """

    args: JepaTrainingArguments

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
            with whole_weights():
                name, model = str(model), JepaForRepresentationPrediction.from_any_pretrained(str(model))
            if processing_class is None:
                processing_class = _processing_class(name, model.backbone.modality)
        if data_collator is None:
            data_collator = _default_collator(model, processing_class, args.seed)
        if isinstance(data_collator, DataCollatorForSpanJEPA) and processing_class is not None:
            longest = min(model.backbone.max_length, processing_class.model_max_length, max_seq_length or 512)
            train_dataset = _tokenized(train_dataset, processing_class, longest, data_collator.whole_word)
            eval_dataset = _tokenized(eval_dataset, processing_class, longest, data_collator.whole_word)

        alone = args.train_batch_size * args.world_size < 2 and not _is_packed(train_dataset)
        if model.config.contrastive_weight > 0 and alone:
            raise UsageError(
                "contrastive_weight compares the samples of a batch with each other, and a batch here has one: raise "
                "--per_device_train_batch_size, or give --contrastive_weight 0"
            )

        self._evaluate_in_training_batches(args)
        model.freeze()
        if args.torch_compile:
            model.prepare_to_compile()
        callbacks = list(callbacks or ())
        _refuse_second_ema(callbacks)
        if not any(_is_ema(callback) for callback in callbacks):
            callbacks.insert(
                0,
                EmaTargetCallback(
                    args.ema_decay,
                    args.ema_decay_end,
                    args.ema_schedule,
                    pretrained=bool(model.config.name_or_path),
                    default=model.config.ema_decay_range,
                ),
            )
        if args.weight_decay_end is not None:
            callbacks.append(WeightDecayCallback(args.weight_decay_end))
        if args.health_steps:
            callbacks.append(HealthCallback(self.measure_health, self.log, args.health_steps, args.stop_on_collapse))
        self.probe = probe
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            **kwargs,
        )

    # ---- EMA

    def add_callback(self, callback: type[TrainerCallback] | TrainerCallback) -> None:
        _refuse_second_ema([*self.callback_handler.callbacks, callback])
        super().add_callback(callback)

    @property
    def ema(self) -> EmaTargetCallback:
        """The callback that moves the target encoder."""
        return next(callback for callback in self.callback_handler.callbacks if isinstance(callback, EmaTargetCallback))

    @property
    def found(self) -> dict[str, tuple[int, str]]:
        """What the watchdog found: by kind the first step and a sentence, see `health.findings`."""
        return findings(self.state.log_history, self.state.max_steps)

    @property
    def gave_up(self) -> bool:
        unfinished = self.state.global_step < self.state.max_steps
        return self.args.stop_on_collapse and unfinished and bool(self.found)

    # ---- data

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if isinstance(self.data_collator, MaskingCollator):
            columns = (*self._signature_columns, *self.data_collator.columns, REPEATED)
            self._signature_columns = list(dict.fromkeys(columns))

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """As `Trainer`'s, with batches for training alone, see `MaskingCollator.for_training`."""
        with self._collating(lambda collator: collator.for_training()):
            return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> torch.utils.data.DataLoader:
        """As `Trainer`'s, with masks that are the same on every evaluation."""
        with self._collating(lambda collator: collator.for_evaluation()):
            return super().get_eval_dataloader(eval_dataset)

    @contextmanager
    def _collating(self, change: Callable[[MaskingCollator], MaskingCollator]) -> Iterator[None]:
        """Have loaders that are made meanwhile collate by a changed copy of the collator."""
        given = self.data_collator
        if isinstance(given, MaskingCollator):
            self.data_collator = change(given)
        try:
            yield
        finally:
            self.data_collator = given

    # ---- optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Weight decay for matrices: not for biases and norms, nor the predictor's mask token and position table."""
        if self.args.decay_all_parameters:
            return [name for name, _ in model.named_parameters()]
        names = super().get_decay_parameter_names(model)
        return [name for name in names if not name.endswith(_PREDICTOR_TABLES)]

    def floating_point_ops(self, inputs: dict[str, torch.Tensor]) -> float:
        """Floating-point operations of one micro-batch: 2 per parameter and position forward, 4 backward.

        The target encoder does a forward pass only, over the clean view; the context encoder reads its own view, the
        predictor its context and the targets. Embedding tables are look-ups; attention scores are left out, as in
        `PreTrainedModel.floating_point_ops`.
        """
        model = self._unwrapped
        sizes = self._parameter_counts
        samples, masks, targets = inputs["target_positions"].shape
        length = model.backbone.length(inputs)
        if model.config.context_mode == "kept":
            visible, read = samples * masks * length, samples * masks * length
        else:
            contexts, columns = inputs["context_positions"].shape[1:]
            visible, read = samples * contexts * columns, samples * masks * columns
        guessed = samples * masks * targets
        through_predictor = guessed if model.config.predictor_type == "mlp" else read + guessed
        return (
            2 * sizes["encoder"] * samples * length
            + 6 * sizes["encoder"] * visible
            + 6 * sizes["predictor"] * through_predictor
            + 6 * (sizes["targets_only"] + sizes["mlm_head"]) * guessed
        )

    @cached_property
    def _parameter_counts(self) -> dict[str, int]:
        """Parameters that take part in matrix products: embedding tables are left out, but for the decoder."""
        model = self._unwrapped
        tables = sum(m.weight.numel() for m in model.target_encoder.modules() if isinstance(m, nn.Embedding))
        head = 0
        if model.mlm_head is not None:
            head = sum(p.numel() for p in model.mlm_head.parameters()) + model.get_input_embeddings().weight.numel()
        targets_only = 0
        if isinstance(model.predictor, TransformerPredictor):
            last = model.predictor.layers[-1]
            parts = (last.query, last.proj, last.norm2, last.fc1, last.fc2)
            targets_only = sum(p.numel() for part in parts for p in part.parameters())
        predictor = sum(
            p.numel()
            for name, p in model.predictor.named_parameters(prefix="predictor")
            if not name.endswith(_PREDICTOR_TABLES)
        )
        return {
            "encoder": sum(p.numel() for p in model.target_encoder.parameters()) - tables,
            "predictor": predictor - targets_only,
            "targets_only": targets_only,
            "mlm_head": head,
        }

    # ---- what is logged

    def count_targets(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        valid = inputs["target_valid"]
        if not self._unwrapped.config.pooled_targets:
            return valid.sum()
        if "sequence_ids" not in inputs:
            return valid.any(dim=-1).sum()
        positions = inputs["target_positions"].flatten(0, 1)
        documents = documents_at(inputs["sequence_ids"], positions, valid.flatten(0, 1))
        return (document_counts(documents, inputs["sequence_valid"].shape[1]) > 0).sum()

    def count_tokens(self, inputs: dict[str, torch.Tensor], padding: bool = False) -> torch.Tensor:
        if "attention_mask" in inputs and not padding:
            return inputs["attention_mask"].sum()
        samples = len(inputs["target_valid"])
        return inputs["target_valid"].new_full((), samples * self._unwrapped.backbone.length(inputs), dtype=torch.long)

    @property
    def _unwrapped(self) -> JepaForRepresentationPrediction:
        # Not by accelerate, which walks over all modules, and this is asked several times a step.
        return unwrapped(self.model)

    @staticmethod
    def leave_out(inputs: dict[str, torch.Tensor], own: torch.Tensor) -> None:
        """These rows get no targets."""
        inputs["target_valid"] = inputs["target_valid"] & own[:, None, None]

    def track(self, outputs: JepaOutput, inputs: dict[str, torch.Tensor], means: RunningMeans) -> None:
        valid = outputs.target_valid
        for name in _TOLD:
            value = getattr(outputs, name)
            if value is not None:
                means.add(name, value, outputs.num_targets)
        if self._unwrapped.backbone.grid:  # a vector that is one token is hidden in part, which cannot be counted
            places = self.count_tokens(inputs) * valid.shape[1]
            means.add("masked_fraction", inputs["target_valid"].sum() / places, places)
        if "sequence_valid" in inputs:  # of packed rows, documents
            there = inputs["sequence_valid"]
            without = there & (document_counts(outputs.target_samples.flatten(1), there.shape[1]) == 0)
        else:
            without = ~valid.flatten(1).any(dim=1)
        means.count("rows_without_targets", without.sum())
        if means is self._means["eval"]:
            means.add("loss", outputs.loss, outputs.num_targets)
            self._evaluated.add(outputs, inputs, self._unwrapped.config.pooled_targets)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Adds what the probe tells, where there is one."""
        self._evaluated = HealthSample(_EVALUATED_TARGETS // self.args.world_size)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        del self._evaluated
        if self.probe is not None:
            with self.compute_loss_context_manager():
                found = self.probe(self._unwrapped)
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in found.items()})
        return output

    def finish_evaluation(self, means: RunningMeans) -> None:
        """Add the health of the evaluation's first rows, up to `_EVALUATED_TARGETS` targets on all ranks together.

        The prediction loss stays the mean over all targets.
        """
        self._evaluated.gather(self.accelerator)
        one = torch.ones((), device=self.args.device)
        for name, value in self._evaluated.measure(self._unwrapped.config).items():
            if name != "prediction_loss":
                means.add(name, value * one, one)

    def training_logs(self) -> dict[str, float]:
        logs = super().training_logs()
        if self.ema.decay is not None:
            logs["ema_decay"] = self.ema.decay
        return logs

    # ---- health

    @cached_property
    def _health_batches(self) -> list[dict[str, torch.Tensor]]:
        """The first `_HEALTH_SAMPLES` samples to evaluate on (else to train on), masked the same way every time.

        A packed row holds several.
        """
        rows = self.eval_dataset if self.eval_dataset is not None else self.train_dataset
        if isinstance(rows, dict):
            rows = next(iter(rows.values()))
        self._set_signature_columns_if_needed()
        first: list[dict[str, Any]] = []
        samples = 0
        for row in rows:
            first.append({name: row[name] for name in self._signature_columns if name in row})
            samples += row["sequence_ids"][-1] + 1 if "sequence_ids" in row else 1
            if samples >= _HEALTH_SAMPLES:
                break
        collator, size = self.data_collator, self.args.per_device_train_batch_size
        if isinstance(collator, MaskingCollator):
            collator = collator.for_evaluation()
        return [collator(first[begin : begin + size]) for begin in range(0, len(first), size)]

    @torch.no_grad()
    def measure_health(self) -> dict[str, float]:
        """Health of both encoders and of the predictor on a fixed batch, the same one on every rank.

        Returns:
            What `HealthSample.measure` gives and `encoder_distance`, the relative L2 distance between the two encoders'
            parameters, each after `health_`. Empty where the batch has targets of fewer than two samples.
        """
        model, training = self._unwrapped, self.model.training
        sample = HealthSample()
        model.eval()
        for batch in self._health_batches:
            batch = self._prepare_inputs(batch)
            with self.compute_loss_context_manager():
                output = model(**batch, return_loss=False)
            sample.add(output, batch, model.config.pooled_targets)
        model.train(training)
        values = sample.measure(model.config)
        if not values:
            return {}
        encoders = (model.context_encoder.named_parameters(), model.target_encoder.named_parameters())
        values["encoder_distance"] = relative_distance(*(self.ema.pairs or match_parameters(*encoders)))
        return {f"health_{name}": value for name, value in values.items()}

    # ---- what is written

    def write_final(self, model: nn.Module, output_dir: str, state_dict: dict[str, torch.Tensor] | None) -> None:
        export_run(model, output_dir, self.processing_class, self.args.export_encoder, state_dict)

    def card_facts(self, name: str) -> CardFacts:
        config, state, args = self.model.config, self.state, self.args
        first, last = self.ema.decay_range(max(state.max_steps, 1))
        objective = f"{config.loss}, targets: mean of the top {config.target_layers} layers, {config.target_norm} norm"
        objective += ", one for all targets of a mask" if config.pooled_targets else ""
        weights = {name: getattr(config, name) for name in WEIGHTS}
        shown = {name: weight for name, weight in weights.items() if weight or name == "prediction_weight"}
        objective += "".join(f", {name} {weight:.4g}" for name, weight in shown.items())
        collator, packed = self.data_collator, _is_packed(self.train_dataset)
        views = f"masked positions {config.context_mode}"
        if isinstance(collator, MaskingCollator):
            views += "".join(f", {what} {value}" for what, value in collator.summary.items())
        training = {
            "steps": state.global_step,
            "packed rows per step" if packed else "samples per step": self.get_total_train_batch_size(args),
            "learning rate": f"{args.learning_rate:.4g}, {SchedulerType(args.lr_scheduler_type).value}",
            "weight decay": args.weight_decay,
            "objective": objective,
            "views": views,
            "predictor": config.predictor_type,
            "EMA decay": f"{first:.5g} to {last:.5g}, {self.ema.schedule}",
            "precision": "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32",
            "hardware": hardware(args.device, args.world_size),
            "seed": args.seed,
        }
        seconds = [entry["train_runtime"] for entry in state.log_history if "train_runtime" in entry]
        if seconds:
            training["seconds since it was resumed" if self.resumed else "seconds"] = round(seconds[-1], 1)
        evaluations = [entry for entry in state.log_history if "eval_loss" in entry]
        metrics = {}
        probed = sorted(
            {name.removeprefix("eval_") for entry in evaluations for name in entry if "eval_probe_" in name}
        )
        # An untrained predictor is not compared with its rivals.
        passed_over = () if config.prediction_weight else ("prediction_loss", *RIVALS)
        for metric in (name for name in (*_ON_CARD, *probed) if name not in passed_over):
            values = [entry[f"eval_{metric}"] for entry in evaluations if f"eval_{metric}" in entry]
            if values:
                started = evaluations[0]["step"] < evaluations[-1]["step"]
                metrics[metric.replace("_", " ")] = (values[0] if started else None, values[-1])
        # A stream has no length, so that only its complete passes are known.
        passes = (
            {"complete passes": self._passes.passes} if self._is_stream else {"epochs": round(state.epoch or 0.0, 2)}
        )
        return CardFacts(
            name=name,
            modality=self.model.backbone.modality,
            family=config.encoder_config.model_type,
            parameters=sum(parameter.numel() for parameter in self.model.context_encoder.parameters()),
            version=__version__,
            training=training,
            metrics=metrics,
            rows=len(self.train_dataset) if isinstance(self.train_dataset, Sized) else None,
            seen={
                f"{_UNITS[self.model.backbone.modality]} read": int(state.num_input_tokens_seen),
                **passes,
            },
            found=[f"step {step}: {sentence}" for step, sentence in self.found.values()]
            if any(map(is_measurement, state.log_history))
            else None,
            citations=_citations(config, self.model.backbone.modality),
            base_model=hub_name(config.name_or_path),
            base_name=f"the local model {Path(config.name_or_path).name}" if config.name_or_path else None,
        )


def _processing_class(name: str, modality: str) -> PreTrainedTokenizerBase | BaseImageProcessor | None:
    """What lies beside a model; feature vectors need nothing."""
    if modality == "features":
        return None
    return (AutoTokenizer if modality == "text" else AutoImageProcessor).from_pretrained(name)


def _is_packed(dataset: Any) -> bool:
    """Whether a row may hold several documents. What is streamed may not know its columns."""
    if isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
        return "sequence_ids" in (dataset.column_names or ())
    return isinstance(dataset, Sequence) and len(dataset) > 0 and "sequence_ids" in dataset[0]


def _default_collator(
    model: JepaForRepresentationPrediction,
    processing_class: PreTrainedTokenizerBase | BaseImageProcessor | None,
    seed: int,
) -> MaskingCollator:
    backbone, mode = model.backbone, model.config.context_mode
    if backbone.modality == "features":
        fill = model.context_encoder.feature_mean.numpy(force=True)
        return DataCollatorForFeatureJEPA(backbone.config, context_mode=mode, fill_values=fill, seed=seed)
    if processing_class is None:
        what = "a tokenizer" if backbone.modality == "text" else "an image processor"
        raise UsageError(f"JepaTrainer needs {what} (processing_class=...) or a data_collator")
    if backbone.modality == "images":
        channels = backbone.config.num_channels
        return DataCollatorForBlockJEPA(processing_class, backbone.grid, num_channels=channels, seed=seed)
    return DataCollatorForSpanJEPA(processing_class, context_mode=mode, seed=seed)


def _is_ema(callback: type[TrainerCallback] | TrainerCallback) -> bool:
    """Whether it is an `EmaTargetCallback`: `Trainer` takes objects and classes."""
    return issubclass(callback if isinstance(callback, type) else type(callback), EmaTargetCallback)


def _refuse_second_ema(callbacks: Sequence[type[TrainerCallback] | TrainerCallback]) -> None:
    if sum(map(_is_ema, callbacks)) > 1:
        raise UsageError(
            "there is already an EmaTargetCallback, and a second one would move the target encoder twice per step: "
            "pass one of your own in JepaTrainer(callbacks=[...]) instead of adding it"
        )


def _citations(config: JepaConfig, modality: str) -> list[str]:
    """What the run rests on: the kind of masks, of targets and of regularisers."""
    used = {
        "jepa": True,
        "i-jepa": modality == "images",
        "data2vec": config.target_layers > 1,
        "vicreg": bool(config.variance_weight or config.covariance_weight),
        "lejepa": bool(config.sigreg_weight),
        "cpc": bool(config.contrastive_weight),
    }
    return [key for key, is_used in used.items() if is_used]


def _tokenized(dataset: Any, tokenizer: PreTrainedTokenizerBase, max_seq_length: int, word_ids: bool) -> Any:
    """Rows of token ids as they are; rows of text tokenised; None and dictionaries of data sets passed through."""
    if dataset is None:
        return None
    if isinstance(dataset, dict):
        return {name: _tokenized(part, tokenizer, max_seq_length, word_ids) for name, part in dataset.items()}
    if isinstance(dataset, Sequence) and not isinstance(dataset, (datasets.Dataset, str)) and len(dataset):
        first = dataset[0]
        if isinstance(first, str):
            dataset = datasets.Dataset.from_dict({"text": list(dataset)})
        elif isinstance(first, dict) and "text" in first:
            dataset = datasets.Dataset.from_list(list(dataset))
    if not isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
        return dataset
    columns = dataset.column_names
    if columns is None:
        columns = list(next(iter(dataset)))
    if "input_ids" in columns:
        return dataset
    if "text" not in columns:
        raise UsageError(f"the data set has neither a column input_ids nor text, only {', '.join(columns)}")
    return tokenize_dataset(dataset, tokenizer, max_seq_length=max_seq_length, word_ids=word_ids)
