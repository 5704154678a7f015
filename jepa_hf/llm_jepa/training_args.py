"""`LlmJepaTrainingArguments`: `TrainingArguments`, and what the paired-view objective adds."""

from dataclasses import dataclass, field

from ..errors import UsageError
from ..training.training_args import RepresentationTrainingArguments
from .data_collator import VIEW_PASSES
from .losses import PAIR_LOSSES

_CHOICES = {
    "pair_loss": PAIR_LOSSES,
    "target_gradient": ("full", "stop", "ema"),
    "tube_form": ("triple", "patch"),
    "view_passes": VIEW_PASSES,
}


@dataclass
class LlmJepaTrainingArguments(RepresentationTrainingArguments):
    """Arguments of `LlmJepaTrainer`.

    Args:
        lm_weight, pair_weight, pair_loss, infonce_temperature, target_gradient, tube_weight, tube_form: see
            `PairedViewObjective`, whose gamma and lambda are the first two.
        loss_dropout: probability alpha that an update leaves out the views and their pass (LLM-JEPA, section 5.2);
            the draw is the same on all ranks and after a resume. A step then costs (2 − alpha) passes on average; the
            paper keeps pair_weight · (1 − alpha) constant.
        ema_decay: of the teacher, where `target_gradient` is "ema"; default 0.999.
        view_passes: see `DataCollatorForPairedViews`.

    Raises:
        UsageError: a number out of range, or an unknown choice.
    """

    lm_weight: float = field(default=1.0, metadata={"help": "Weight of the next-token loss (gamma)."})
    pair_weight: float = field(default=1.0, metadata={"help": "Weight of the distance between the views (lambda)."})
    pair_loss: str = field(default="cosine", metadata={"help": "cosine, l2, mse or infonce."})
    infonce_temperature: float = field(default=0.07, metadata={"help": "What infonce divides cosines by."})
    loss_dropout: float = field(default=0.0, metadata={"help": "Share of the updates that leave the views out."})
    target_gradient: str = field(
        default="full", metadata={"help": "The predicted view: full, it learns too; stop; or ema, a teacher reads it."}
    )
    ema_decay: float = field(default=0.999, metadata={"help": "EMA decay of that teacher."})
    tube_weight: float = field(default=0.0, metadata={"help": "Weight of STP's straightness of paths."})
    tube_form: str = field(default="triple", metadata={"help": "Of the paths: triple (paper) or patch (its code)."})
    view_passes: str = field(default="packed", metadata={"help": "Views share a row (packed), or not (separate)."})

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise UsageError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        for name in ("lm_weight", "pair_weight", "tube_weight"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"{name} must not be negative, but is {getattr(self, name)}")
        if not 0.0 <= self.loss_dropout <= 1.0:
            raise UsageError(f"loss_dropout must lie between 0 and 1, not {self.loss_dropout}")
        if not 0.0 <= self.ema_decay <= 1.0:
            raise UsageError(f"ema_decay must lie between 0 and 1, not {self.ema_decay}")
        if not self.infonce_temperature > 0:
            raise UsageError(f"infonce_temperature must be above 0, not {self.infonce_temperature}")
        super().__post_init__()
        if self.use_liger_kernel and (self.liger_kernel_config or {}).get("fused_linear_cross_entropy", True):
            raise UsageError(
                "use_liger_kernel puts a forward of its own in place of the one that reads the views: leave it out, or "
                'take its other kernels alone (in Python, liger_kernel_config={"fused_linear_cross_entropy": False})'
            )
