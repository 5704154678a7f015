"""`RepresentationTrainingArguments`: `TrainingArguments` with the defaults that both trainers here need."""

from dataclasses import dataclass, field

from transformers import TrainingArguments


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
