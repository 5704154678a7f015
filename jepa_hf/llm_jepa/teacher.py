"""Teacher of LLM-JEPA: an exponential moving average (EMA) of the model's decoder."""

import copy
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from ..errors import UsageError
from ..training.ema import match_parameters
from .decoder import get_decoder

TEACHER_FILE = "teacher.safetensors"


def match_teacher(decoder: nn.Module, teacher: nn.Module) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Pair the decoder's trainable parameters with the teacher's by name."""
    trainable = {name for name, parameter in decoder.named_parameters() if parameter.requires_grad}
    return match_parameters(
        *([item for item in module.named_parameters() if item[0] in trainable] for module in (decoder, teacher))
    )


def copy_decoder(model: PreTrainedModel) -> nn.Module:
    """Return a frozen copy of the model's decoder."""
    teacher = copy.deepcopy(get_decoder(model)).eval().requires_grad_(False)
    teacher._forward_hooks.clear()  # the copied hooks of a previously attached objective
    return teacher


def save_teacher(teacher: nn.Module, checkpoint: Path) -> None:
    """Write the teacher's weights to a checkpoint."""
    state = {name: value.contiguous() for name, value in teacher.state_dict().items()}
    save_file(state, checkpoint / TEACHER_FILE, metadata={"format": "pt"})


def load_teacher(teacher: nn.Module, checkpoint: str) -> None:
    """Load the teacher's weights from a checkpoint."""
    path = Path(checkpoint) / TEACHER_FILE
    if not path.is_file():
        raise UsageError(
            f"{checkpoint} holds no teacher ({TEACHER_FILE}), which target_gradient ema needs. Start a new run."
        )
    teacher.load_state_dict(load_file(path))
