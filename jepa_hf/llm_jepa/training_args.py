"""Training arguments of `LlmJepaTrainer`."""

from dataclasses import dataclass, field
from functools import partial

from ..errors import UsageError
from ..models.argument_owners import owner_of_argument
from ..training.training_args import BaseJepaTrainingArguments
from .data_collator import VIEW_PASSES
from .losses import PAIR_LOSSES

_CHOICES = {
    "pair_loss": PAIR_LOSSES,
    "target_gradient": ("full", "stop", "ema"),
    "stp_variant": ("triple", "patch"),
    "view_passes": VIEW_PASSES,
}


@dataclass
class LlmJepaTrainingArguments(BaseJepaTrainingArguments):
    """Arguments of `LlmJepaTrainer`.

    Args:
        lm_weight: gamma, see `PairedViewObjective`, as for the next six.
        jepa_weight: lambda.
        pair_loss: distance between the views.
        infonce_temperature: temperature of "infonce".
        target_gradient: gradient through the second view.
        stp_weight: weight of the STP loss.
        stp_variant: form of the STP loss.
        loss_dropout: probability alpha that an update skips the views and their pass (LLM-JEPA,
            section 5.2). The draw is the same on all ranks and after a resume. A step then costs
            2 − alpha passes on average; the paper keeps jepa_weight · (1 − alpha) constant.
        ema_decay: EMA decay of the teacher for `target_gradient="ema"`.
        view_passes: see `DataCollatorForPairedViews`.

    Raises:
        UsageError: a number out of range, or an unknown choice.
    """

    _owner_of = staticmethod(partial(owner_of_argument, llm=True))

    lm_weight: float = field(default=1.0, metadata={"help": "Weight of the next-token loss (gamma of the paper)."})
    jepa_weight: float = field(
        default=1.0, metadata={"help": "Weight of the distance between the views (lambda of the paper)."}
    )
    pair_loss: str = field(
        default="cosine", metadata={"help": "Distance between the views: cosine, l2, mse or infonce."}
    )
    infonce_temperature: float = field(default=0.07, metadata={"help": "Temperature of infonce."})
    loss_dropout: float = field(default=0.0, metadata={"help": "Fraction of updates that skip the views (0 to 1)."})
    target_gradient: str = field(
        default="full",
        metadata={
            "help": "Gradient through the predicted view: full, stop (none), or ema (encoded by an EMA teacher)."
        },
    )
    ema_decay: float = field(default=0.999, metadata={"help": "EMA decay of the teacher of target_gradient ema."})
    stp_weight: float = field(
        default=0.0, metadata={"help": "Weight of the STP loss, which straightens paths (0: off)."}
    )
    stp_variant: str = field(
        default="triple", metadata={"help": "Form of the STP loss: triple (the paper) or patch (its code)."}
    )
    view_passes: str = field(
        default="packed",
        metadata={
            "help": "Both views follow the conversation in its row (packed), or each has its own row (separate)."
        },
    )

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise UsageError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}.")
        for name in ("lm_weight", "jepa_weight", "stp_weight"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"{name} must not be negative, got {getattr(self, name)}.")
        if not (self.lm_weight or self.stp_weight or (self.jepa_weight and self.loss_dropout < 1)):
            raise UsageError(
                "Nothing would be learned: lm_weight, jepa_weight and stp_weight are 0. Raise one of them."
            )
        if not 0.0 <= self.loss_dropout <= 1.0:
            raise UsageError(f"loss_dropout must be between 0 and 1, got {self.loss_dropout}.")
        if not 0.0 <= self.ema_decay <= 1.0:
            raise UsageError(f"ema_decay must be between 0 and 1, got {self.ema_decay}.")
        if not self.infonce_temperature > 0:
            raise UsageError(f"infonce_temperature must be above 0, got {self.infonce_temperature}.")
        super().__post_init__()
        if self.use_liger_kernel and (self.liger_kernel_config or {}).get("fused_linear_cross_entropy", True):
            raise UsageError(
                "use_liger_kernel replaces the forward that reads the views. Leave it out, or use only its other "
                'kernels: liger_kernel_config={"fused_linear_cross_entropy": False} (in Python).'
            )
