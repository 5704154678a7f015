"""`JepaTrainingArguments` and its base: `TrainingArguments` with the defaults, and the knobs, of a JEPA."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from ..errors import UsageError


@dataclass
class RepresentationTrainingArguments(TrainingArguments):
    """Base of the trainers' arguments: `TrainingArguments` with other defaults, and nothing of its own.

    `per_device_eval_batch_size` defaults to `per_device_train_batch_size`, so that evaluation compares as many rows of
    a batch as training does.

    Where `accelerator_config` is not given, batches are copied from pinned memory without waiting (`non_blocking`).
    """

    output_dir: str = field(default="out", metadata={"help": "Where the run writes."})
    per_device_eval_batch_size: int | None = field(
        default=None,
        metadata={"help": "Used by --objective llm alone; otherwise evaluation uses the training batch size."},
    )
    ddp_broadcast_buffers: bool | None = field(
        default=False, metadata={"help": "No buffer changes in training: sending them costs up to a fifth of a step."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Hide NaN and inf losses from the log; waits for the device on every step."}
    )
    project: str = field(default="jepa_hf", metadata={"help": "Project name for trackers."})

    def __post_init__(self) -> None:
        if self.per_device_eval_batch_size is None:
            self.per_device_eval_batch_size = self.per_device_train_batch_size
        untold = self.accelerator_config is None
        super().__post_init__()
        # From pinned memory a batch is copied while the device works; otherwise the host waits for both.
        if untold:
            self.accelerator_config.non_blocking = self.dataloader_pin_memory
        # The dispatcher, which None stands for while streaming, fails on batches of differing lengths.
        if self.accelerator_config.dispatch_batches is None:
            self.accelerator_config.dispatch_batches = False


@dataclass
class JepaTrainingArguments(RepresentationTrainingArguments):
    """`TrainingArguments` with an EMA schedule, exports, health, and the defaults that a JEPA needs.

    Args:
        ema_decay: decay of the target encoder's first update; default derived from the run's length and start.
        ema_decay_end: decay of its last update; default as above, or `ema_decay` where only that is given.
        ema_schedule: "constant", "linear" or "cosine" in between.
        weight_decay_end: weight decay of the last update, which a cosine leads to; default constant at `weight_decay`.
        decay_all_parameters: apply weight decay to biases, norms and tables too, as plain AdamW over all parameters.
        export_encoder: which encoder the output directory holds, "context", "target", or "both": then the target
            encoder's directory is `target_encoder/`.
        health_steps: steps between two measurements of health on a fixed batch (see `HealthCallback`), below 1 a share
            of the run, but 25 steps at least; 0 for none.
        stop_on_collapse: end the run where these measurements show a collapse; otherwise it is a warning.

    Raises:
        UsageError: a number out of range, an unknown choice, or `load_best_model_at_end` judged by the loss.
    """

    ema_decay: float | None = field(
        default=None,
        metadata={"help": "EMA decay of the target encoder at the start; default from run length and start."},
    )
    ema_decay_end: float | None = field(
        default=None, metadata={"help": "EMA decay at the end; default from run length and start, or ema_decay."}
    )
    ema_schedule: str = field(default="linear", metadata={"help": "EMA decay schedule: constant, linear or cosine."})
    weight_decay_end: float | None = field(
        default=None, metadata={"help": "Weight decay at the end of a cosine from weight_decay; default constant."}
    )
    decay_all_parameters: bool = field(
        default=False, metadata={"help": "Apply weight decay to biases, norms and tables too."}
    )
    export_encoder: str = field(
        default="context", metadata={"help": "Encoder to export: context, target, or both (target_encoder/)."}
    )
    health_steps: float = field(
        default=0.05, metadata={"help": "Measure health every so many steps; below 1: a share of the run; 0: never."}
    )
    stop_on_collapse: bool = field(
        default=False, metadata={"help": "End the run where representations collapse, instead of warning."}
    )
    # Changed defaults.
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Every trainable parameter is used: searching costs time."}
    )
    include_num_input_tokens_seen: str = field(
        default="non_padding", metadata={"help": "Count the tokens read: all, non_padding or no."}
    )

    def __post_init__(self) -> None:
        for name in ("ema_decay", "ema_decay_end"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value <= 1.0:
                raise UsageError(f"{name} must lie between 0 and 1, not {value}")
        if self.weight_decay_end is not None and not self.weight_decay_end >= 0:
            raise UsageError(f"weight_decay_end must not be negative, but is {self.weight_decay_end}")
        if not (0 <= self.health_steps < 1 or (self.health_steps > 0 and self.health_steps == int(self.health_steps))):
            raise UsageError(
                f"health_steps must be a whole number of steps or a share of the run below 1, not {self.health_steps}"
            )
        if self.stop_on_collapse and not self.health_steps:
            raise UsageError("stop_on_collapse needs measurements: set health_steps above 0")
        for name, choices in (
            ("ema_schedule", ("constant", "linear", "cosine")),
            ("export_encoder", ("context", "target", "both")),
        ):
            if getattr(self, name) not in choices:
                raise UsageError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        if self.load_best_model_at_end and self.metric_for_best_model in (None, "loss", "eval_loss"):
            raise UsageError(
                "load_best_model_at_end needs --metric_for_best_model, because a JEPA's loss is lowest when it has "
                "collapsed; good ones are probe_linear (needs --probe_task) and context_rank, with --greater_is_better "
                "true"
            )
        super().__post_init__()
