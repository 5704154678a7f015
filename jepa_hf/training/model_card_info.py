"""Facts about a JEPA run for its model card."""

from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Any

from transformers import SchedulerType

from ..hub.model_card import ModelCardInfo, describe_hardware, hub_repo_id_or_none
from ..masking.base_collator import MaskingCollator
from ..models.configuration_jepa import JepaConfig
from ..models.encoders import no_pooler_argument
from ..models.jepa_config_checks import WEIGHTS
from ..monitoring.health import BASELINES, measurements
from ..version import __version__
from .ema import initial_weight_fraction
from .inputs import is_packed

# Metrics of an evaluation that a card shows.
_ON_CARD = (
    "loss",
    "prediction_loss",
    *BASELINES,
    "top1_accuracy_in_sample",
    "top1_accuracy_in_sample_chance",
    "top1_accuracy",
    "top1_accuracy_chance",
    "sample_top1_accuracy",
    "sample_top1_accuracy_chance",
    "target_rank",
    "context_rank",
    "context_pairwise_cosine",
)

# The unit of a position.
_UNITS = {"text": "tokens", "images": "patches", "features": "positions"}


def collect_facts(trainer: Any, name: str, passes: int | None) -> ModelCardInfo:
    """Collect the facts about a `JepaTrainer`'s run."""
    model, state, dataset = trainer.model, trainer.state, trainer.train_dataset
    config, modality = model.config, model.encoder_adapter.modality
    measured = measurements(state.log_history)
    return ModelCardInfo(
        name=name,
        modality=modality,
        family=config.encoder_config.model_type,
        parameters=model.context_encoder.num_parameters(),
        version=__version__,
        training=_training(trainer, config),
        metrics=_metrics(state.log_history, config, evaluation_names(trainer)),
        rows=len(dataset) if isinstance(dataset, Sized) else None,
        data_statistics={
            f"{_UNITS[modality]} read": int(state.num_input_tokens_seen),
            **({"epochs": round(state.epoch or 0.0, 2)} if passes is None else {"complete passes": passes}),
        },
        health_findings=[f"step {step}: {sentence}" for step, sentence in trainer.health_findings.values()]
        if measured
        else None,
        citations=citations(config, modality),
        base_model=hub_repo_id_or_none(config.name_or_path),
        base_name=f"the local model {Path(config.name_or_path).name}" if config.name_or_path else None,
    )


def _training(trainer: Any, config: JepaConfig) -> dict[str, Any]:
    """Collect the rows of the training table."""
    args, state = trainer.args, trainer.state
    first, last = trainer.ema_callback.decay_range(max(state.max_steps, 1))
    views = f"masked positions {'dropped' if config.masked_tokens == 'drop' else 'replaced'}"
    if isinstance(trainer.data_collator, MaskingCollator):
        views += "".join(f", {name} {value}" for name, value in trainer.data_collator.card_settings.items())
    rows_name = "packed rows per step" if is_packed(trainer.train_dataset) else "samples per step"
    facts = {
        "steps": state.global_step,
        rows_name: trainer.get_total_train_batch_size(args),
        "learning rate": f"{args.learning_rate:.4g}, {SchedulerType(args.lr_scheduler_type).value}",
        "weight decay": args.weight_decay,
        "objective": _objective(config),
        "views": views,
        "predictor": config.predictor_type,
        "EMA decay": f"{first:.5g} to {last:.5g}, {trainer.ema_callback.schedule}",
        "precision": "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32",
        "hardware": describe_hardware(args.device, args.world_size),
        "seed": args.seed,
    }
    exported = trainer.exported_encoder
    if exported == "target":
        share = initial_weight_fraction(max(state.max_steps, 1), first, last, trainer.ema_callback.schedule)
        exported += f" (EMA: {100 * share:.0f} % of the start, the rest an average along the run)"
    facts["exported encoder"] = exported
    if no_pooler_argument(config.encoder_config):
        facts["pooler"] = "that of the start, not trained" if config.add_pooling_layer else "random, not trained"
    if config.sentence_transformers is not None:
        facts["sentence embeddings"] = "maximum length, pooling and normalization of the start"
    seconds = [entry["train_runtime"] for entry in state.log_history if "train_runtime" in entry]
    if seconds:
        facts["seconds since it was resumed" if trainer.resumed else "seconds"] = round(seconds[-1], 1)
    return facts


def _objective(config: JepaConfig) -> str:
    count = config.average_top_k_layers
    layers = "the last layer" if count == 1 else f"mean of the top {count} layers"
    objective = f"{config.loss}, targets: {layers}, {config.target_norm} norm"
    objective += ", one for all targets of a mask" if config.pool_targets else ""
    weights = {name: getattr(config, name) for name in WEIGHTS}
    return objective + "".join(
        f", {name} {weight:.4g}" for name, weight in weights.items() if weight or name == "prediction_weight"
    )


def evaluation_names(trainer: Any) -> list[str]:
    """Return the names of the evaluation data sets, as they stand in the log; [""] for a single one."""
    return [f"{name}_" for name in trainer.eval_dataset] if isinstance(trainer.eval_dataset, dict) else [""]


def _metrics(
    log_history: Sequence[dict[str, Any]], config: JepaConfig, names: Sequence[str]
) -> dict[str, tuple[float | None, float]]:
    """Collect the rows of the result table: first and last value of each metric on each evaluation data set."""
    # An untrained predictor is not compared with the baselines.
    skipped = () if config.prediction_weight else ("prediction_loss", *BASELINES)
    metrics: dict[str, tuple[float | None, float]] = {}
    for prefix in (f"eval_{name}" for name in names):
        evaluations = [entry for entry in log_history if f"{prefix}loss" in entry]
        logged = {key.removeprefix(prefix) for entry in evaluations for key in entry}
        probes = sorted(metric for metric in logged if metric.startswith("probe_"))
        for metric in (metric for metric in (*_ON_CARD, *probes) if metric not in skipped):
            values = [entry[f"{prefix}{metric}"] for entry in evaluations if f"{prefix}{metric}" in entry]
            if values:
                has_start = evaluations[0]["step"] < evaluations[-1]["step"]
                label = f"{prefix.removeprefix('eval_')}{metric}".replace("_", " ")
                metrics[label] = (values[0] if has_start else None, values[-1])
    return metrics


def citations(config: JepaConfig, modality: str) -> list[str]:
    """List the works that a run builds on: its masks, targets and regularizers."""
    used = {
        "jepa": True,
        "i-jepa": modality == "images",
        "data2vec": config.average_top_k_layers > 1,
        "vicreg": bool(config.variance_weight or config.covariance_weight),
        "lejepa": bool(config.sigreg_weight),
        "cpc": bool(config.contrastive_weight),
    }
    return [key for key, is_used in used.items() if is_used]
