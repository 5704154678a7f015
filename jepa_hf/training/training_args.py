"""`JepaTrainingArguments`: `TrainingArguments` with the defaults and options of a JEPA."""

from dataclasses import dataclass, field
from typing import cast

from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from ..errors import UsageError


@dataclass
class BaseJepaTrainingArguments(TrainingArguments):
    """Base of the trainers' arguments: `TrainingArguments` with other defaults.

    `per_device_eval_batch_size` defaults to `per_device_train_batch_size`, so that evaluation
    compares as many rows of a batch as training does. The default `accelerator_config` copies
    batches from pinned memory asynchronously (`non_blocking`).
    """

    output_dir: str = field(default="out", metadata={"help": "Output directory of the run."})
    per_device_eval_batch_size: int | None = field(  # type: ignore[assignment]  # an int after `__post_init__`
        default=None,
        metadata={
            "help": "Evaluation batch size of --objective llm; otherwise evaluation uses the training batch size."
        },
    )
    ddp_broadcast_buffers: bool | None = field(
        default=False,
        metadata={
            "help": "Broadcast buffers under DDP (default: off: none changes, and it costs up to a fifth of a step)."
        },
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Leave NaN and inf losses out of the log. Synchronizes with the device in every step."},
    )
    project: str = field(default="jepa_hf", metadata={"help": "Project name for trackers."})

    def __post_init__(self) -> None:
        if self.per_device_eval_batch_size is None:
            self.per_device_eval_batch_size = self.per_device_train_batch_size
        uses_default_config = self.accelerator_config is None
        super().__post_init__()
        config = cast(AcceleratorConfig, self.accelerator_config)
        # From pinned memory a batch is copied while the device works; otherwise the host waits for
        # the copy.
        if uses_default_config:
            config.non_blocking = self.dataloader_pin_memory
        # None selects the dispatcher for streams, which fails on batches of different lengths.
        if config.dispatch_batches is None:
            config.dispatch_batches = False


@dataclass
class JepaTrainingArguments(BaseJepaTrainingArguments):
    """`TrainingArguments` with an EMA schedule, exports, health, and a JEPA's defaults.

    Args:
        ema_decay: EMA decay of the target encoder's first update (default: derived from the run's
            length and start).
        ema_decay_end: Decay of its last update (default: as above, or `ema_decay` if only that is
            set).
        ema_schedule: "constant", "linear" or "cosine" in between.
        weight_decay_end: Weight decay of the last update, at the end of a cosine from
            `weight_decay` (default: constant).
        decay_norms_and_biases: Apply weight decay to biases, norms and tables too, as plain AdamW
            over all parameters.
        export_encoder: Encoder in the output directory: "context", "target", or "both", which
            writes the target encoder to `target_encoder/`.
        health_steps: Steps between two health measurements on a fixed batch (see `HealthCallback`);
            below 1 a fraction of the run, but at least 25 steps; 0 for none.
        stop_on_collapse: End the run when a measurement shows a collapse, instead of warning.

    Raises:
        UsageError: A number out of range, an unknown choice, or `load_best_model_at_end` by the
            loss.
    """

    ema_decay: float | None = field(
        default=None,
        metadata={"help": "EMA decay of the target encoder at the start (default: from the run's length and start)."},
    )
    ema_decay_end: float | None = field(
        default=None,
        metadata={"help": "EMA decay at the end (default: from the run's length and start, or ema_decay)."},
    )
    ema_schedule: str = field(default="linear", metadata={"help": "EMA decay schedule: constant, linear or cosine."})
    weight_decay_end: float | None = field(
        default=None, metadata={"help": "Weight decay at the end of a cosine from weight_decay (default: constant)."}
    )
    decay_norms_and_biases: bool = field(
        default=False, metadata={"help": "Apply weight decay to biases, norms and tables too."}
    )
    export_encoder: str = field(
        default="context",
        metadata={"help": "Encoder to export: context, target, or both (the target encoder to target_encoder/)."},
    )
    health_steps: float = field(
        default=0.05,
        metadata={"help": "Steps between two health measurements; below 1: a fraction of the run; 0: never."},
    )
    stop_on_collapse: bool = field(
        default=False, metadata={"help": "End the run when representations collapse, instead of warning."}
    )
    # Changed defaults.
    ddp_find_unused_parameters: bool | None = field(
        default=False,
        metadata={"help": "Search for unused parameters under DDP (default: off, because there are none)."},
    )
    include_num_input_tokens_seen: str = field(
        default="non_padding", metadata={"help": "Tokens to count: all, non_padding or no."}
    )

    def __post_init__(self) -> None:
        for name in ("ema_decay", "ema_decay_end"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value <= 1.0:
                raise UsageError(f"{name} must lie between 0 and 1, not {value}.")
        if self.weight_decay_end is not None and not self.weight_decay_end >= 0:
            raise UsageError(f"weight_decay_end must not be negative, but is {self.weight_decay_end}.")
        if not (0 <= self.health_steps < 1 or (self.health_steps > 0 and self.health_steps == int(self.health_steps))):
            raise UsageError(
                "health_steps must be an integer number of steps or a fraction of the run below 1, not "
                f"{self.health_steps}."
            )
        if self.stop_on_collapse and not self.health_steps:
            raise UsageError("stop_on_collapse needs measurements. Set health_steps above 0.")
        for name, choices in (
            ("ema_schedule", ("constant", "linear", "cosine")),
            ("export_encoder", ("context", "target", "both")),
        ):
            if getattr(self, name) not in choices:
                raise UsageError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}.")
        if self.load_best_model_at_end and self.metric_for_best_model in (None, "loss", "eval_loss"):
            raise UsageError(
                "load_best_model_at_end needs --metric_for_best_model, because a collapsed JEPA has the lowest loss. "
                "Suitable are probe_linear (needs --probe_task) and context_rank, with --greater_is_better true."
            )
        super().__post_init__()
