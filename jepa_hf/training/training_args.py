"""`JepaTrainingArguments`: `TrainingArguments` with the defaults and options of a JEPA."""

import math
from dataclasses import dataclass, field
from numbers import Real
from typing import cast

import torch
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from ..errors import UsageError
from ..models.argument_owners import owner_of_argument
from ..utils.flags import MayChange
from ..utils.keywords import ChecksKeywords

# Fields of `TrainingArguments` that do not affect the weights: a resumed run may have other values.
# Fields of this package's classes say so in their type, `MayChange`.
MAY_CHANGE = frozenset({
    "output_dir", "resume_from_checkpoint", "do_train", "do_predict", "use_cpu", "local_rank", "debug",
    "logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node", "logging_nan_inf_filter",
    "log_level", "log_level_replica", "disable_tqdm", "skip_memory_metrics",
    "report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id",
    "eval_strategy", "eval_steps", "eval_delay", "per_device_eval_batch_size", "eval_on_start",
    "eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps",
    "save_only_model", "save_strategy", "save_steps", "save_on_each_node", "save_total_limit",
    "restore_callback_states_from_checkpoint",
    "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision",
    "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend",
    "ddp_timeout",
})  # fmt: skip

# The least values of fields of `TrainingArguments`, and the largest seed that numpy takes.
_MINIMA = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0,
    "weight_decay": 0,
    "adam_epsilon": 0,
    "max_grad_norm": 0,
    "seed": 0,
    "data_seed": 0,
    "logging_steps": 0,
    "save_steps": 0,
    "eval_steps": 0,
    "eval_delay": 0,
    "eval_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "dataloader_prefetch_factor": 1,
}
_MAX_SEED = 2**32 - 1


@dataclass
class BaseJepaTrainingArguments(TrainingArguments, ChecksKeywords):
    """Base of the trainers' arguments: `TrainingArguments` with other defaults.

    `per_device_eval_batch_size` defaults to `per_device_train_batch_size`, so that evaluation compares as many rows of
    a batch as training does. The default `accelerator_config` copies batches from pinned memory asynchronously
    (`non_blocking`). Progress is shown unless `disable_tqdm` is set, at any verbosity of transformers.

    Attributes:
        adapts_logging_steps: Whether `logging_steps` is not set. A run then logs 20 times, and at
            least every 500 steps.

    Raises:
        UsageError: A number out of range.
    """

    _owner_of = staticmethod(owner_of_argument)

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
    include_num_input_tokens_seen: str = field(
        default="non_padding", metadata={"help": "Tokens to count: all, non_padding or no."}
    )
    logging_steps: float | None = field(  # type: ignore[assignment]  # a float after `__post_init__`
        default=None,
        metadata={
            "help": "Steps between two log entries; below 1 a fraction of the run (default: 20 entries, at least one "
            "every 500 steps)."
        },
    )
    project: str = field(default="jepa_hf", metadata={"help": "Project name for trackers."})

    def __post_init__(self) -> None:
        self._check_numbers()
        self.adapts_logging_steps = self.logging_steps is None
        if self.logging_steps is None:
            self.logging_steps = TrainingArguments.logging_steps  # which is also the default of `eval_steps`
        self.disable_tqdm = bool(self.disable_tqdm)  # transformers' default depends on its verbosity
        if not torch.accelerator.is_available():  # several processes and bfloat16 then need no flag
            self.use_cpu = True
        if self.per_device_eval_batch_size is None:
            self.per_device_eval_batch_size = self.per_device_train_batch_size
        if self.greater_is_better is None and (self.metric_for_best_model or "").endswith("pairwise_cosine"):
            self.greater_is_better = False  # 1 in a collapse
        uses_default_config = self.accelerator_config is None
        super().__post_init__()
        config = cast(AcceleratorConfig, self.accelerator_config)
        # From pinned memory a batch is copied while the device works; otherwise the host waits for the copy.
        if uses_default_config:
            config.non_blocking = self.dataloader_pin_memory
        # None selects the dispatcher for streams, which fails on batches of different lengths.
        if config.dispatch_batches is None:
            config.dispatch_batches = False

    def _check_numbers(self) -> None:
        """Refuse numbers of `TrainingArguments` that it does not check, and that fail late or train nonsense."""
        for name, minimum in _MINIMA.items():
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, Real) or not math.isfinite(value):
                raise UsageError(f"{name} must be a finite number, not {value!r:.80}.")
            if value < minimum:
                raise UsageError(f"{name} must be at least {minimum}, not {value}.")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{name} must be in [0, 1), not {getattr(self, name)}.")
        if self.seed > _MAX_SEED:
            raise UsageError(f"seed must be at most {_MAX_SEED}, not {self.seed}.")


@dataclass
class JepaTrainingArguments(BaseJepaTrainingArguments):
    """`TrainingArguments` with an EMA schedule, exports, health, and a JEPA's defaults.

    Args:
        ema_decay: EMA decay of the target encoder's first update (default: derived from the run's length and start).
        ema_decay_end: Decay of its last update (default: as above, or `ema_decay` if only that is set).
        ema_schedule: "constant", "linear" or "cosine" in between.
        weight_decay_end: Weight decay of the last update, at the end of a cosine from
            `weight_decay` (default: constant).
        decay_norms_and_biases: Apply weight decay to biases, norms and tables too, as plain AdamW over all parameters.
        export_encoder: Encoder in the output directory: "context", "target", or "both", which
            writes the context encoder there and the target encoder to `target_encoder/` (default:
            "target" for text with a pretrained start, else "context").
        health_steps: Steps between two health measurements on a fixed batch (see `HealthCallback`);
            below 1 a fraction of the run, but at least 25 steps; 0 for none.
        stop_on_collapse: End the run when a measurement shows a collapse, instead of warning.

    Raises:
        UsageError: A number out of range, an unknown choice, or `load_best_model_at_end` by the loss.
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
    export_encoder: MayChange[str | None] = field(
        default=None,
        metadata={
            "help": "Encoder to export: context, target, or both (the target encoder to target_encoder/). Default: "
            "target for text with a pretrained start, which forgets less; else context."
        },
    )
    health_steps: MayChange[float] = field(
        default=0.05,
        metadata={"help": "Steps between two health measurements; below 1: a fraction of the run; 0: never."},
    )
    stop_on_collapse: MayChange[bool] = field(
        default=False, metadata={"help": "End the run when representations collapse, instead of warning."}
    )
    # Changed defaults.
    ddp_find_unused_parameters: bool | None = field(
        default=False,
        metadata={"help": "Search for unused parameters under DDP (default: off, because there are none)."},
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
            value = getattr(self, name)
            has_default = name == "export_encoder" and value is None
            if value not in choices and not has_default:
                raise UsageError(f"{name} must be one of {', '.join(choices)}, not {value!r}.")
        if self.load_best_model_at_end and self.metric_for_best_model in (None, "loss", "eval_loss"):
            raise UsageError(
                "load_best_model_at_end needs --metric_for_best_model, because a collapsed JEPA has the lowest loss. "
                "Suitable are probe_linear (needs --probe_task) and context_rank, with --greater_is_better true."
            )
        super().__post_init__()
