"""Export of an encoder to ONNX with torch's own exporter."""

import copy
import importlib.util
import inspect
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UsageError, one_line
from ..models.modeling_jepa import JepaForRepresentationPrediction
from ..utils.types import ProcessingClass

ONNX_FILE = "model.onnx"
_OUTPUTS = ("last_hidden_state", "pooler_output")
# A protobuf file holds 2 GB; larger weights go to a file next to it.
_MAX_INLINE_BYTES = 1_900_000_000


class _Encoder(nn.Module):
    """An encoder that returns a tuple of tensors."""

    def __init__(self, encoder: PreTrainedModel, inputs: tuple[str, ...], outputs: tuple[str, ...]):
        super().__init__()
        self.encoder, self.inputs, self.outputs = encoder, inputs, outputs

    def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        output = self.encoder(**dict(zip(self.inputs, values, strict=True)), return_dict=True)
        return tuple(output[name] for name in self.outputs)


def check_onnx_installed() -> None:
    """Refuse an export without the packages that torch's exporter needs."""
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"An export to ONNX needs {' and '.join(missing)}, which cannot be imported. Run pip install "
            "'jepa_hf[onnx]'."
        )


def export_onnx(
    model: JepaForRepresentationPrediction,
    output_dir: str | Path,
    processing_class: ProcessingClass | None = None,
    which: str = "context",
) -> None:
    """Write `model.onnx`, the encoder's configuration, and its tokenizer or image processor.

    Inputs are named as in the encoder's `forward`: for text those that the tokenizer returns. Batch and length are
    dynamic. Outputs are `last_hidden_state`, and `pooler_output` of the feature encoder and of a pretrained pooler.

    Args:
        model: the trained model.
        output_dir: directory to write to.
        processing_class: tokenizer or image processor.
        which: "context" or "target".

    Raises:
        UsageError: onnx or onnxscript is not installed, or torch cannot export the encoder.
    """
    check_onnx_installed()
    encoder = copy.deepcopy(model.merged_encoder(which)).cpu().float().eval()
    inputs, shapes = _example(model, encoder, processing_class)
    with torch.no_grad():
        example_output = encoder(**inputs, return_dict=True)
    outputs = tuple(name for name in _OUTPUTS if example_output.get(name) is not None)
    try:
        program = torch.onnx.export(
            _Encoder(encoder, tuple(inputs), outputs).eval(),
            tuple(inputs.values()),
            dynamic_shapes=(tuple(shapes.values()),),
            input_names=list(inputs),
            output_names=list(outputs),
            dynamo=True,
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        raise UsageError(
            f"torch {torch.__version__} cannot export {model.config.encoder_config.model_type} encoders to ONNX: "
            f"{one_line(error.__cause__ or error):.300}. Export it with another torch version, or load "
            "the encoder with transformers."
        ) from error
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    size = sum(parameter.numel() * parameter.element_size() for parameter in encoder.parameters())
    program.save(output_dir / ONNX_FILE, external_data=size > _MAX_INLINE_BYTES)  # type: ignore[union-attr]
    encoder.config.save_pretrained(output_dir)
    if processing_class is not None:
        processing_class.save_pretrained(output_dir)


def _example(
    model: JepaForRepresentationPrediction, encoder: PreTrainedModel, processing_class: ProcessingClass | None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return example inputs of the encoder and their dynamic dimensions, by name."""
    adapter, batch = model.encoder_adapter, torch.export.Dim("batch")
    if adapter.modality == "images":
        pixels = torch.zeros(2, encoder.config.num_channels, *adapter.image_size)  # type: ignore[attr-defined]
        return {"pixel_values": pixels}, {"pixel_values": {0: batch}}
    if adapter.modality == "features":
        width, is_series = encoder.config.input_dim, encoder.config.mode == "time"
        if not is_series:
            return {"features": torch.zeros(2, width)}, {"features": {0: batch}}
        dimensions = {0: batch, 1: torch.export.Dim("length", max=adapter.grid[0])}
        steps = min(4, adapter.grid[0])
        inputs = {"features": torch.zeros(2, steps, width), "attention_mask": torch.ones(2, steps, dtype=torch.long)}
        return inputs, dict.fromkeys(inputs, dimensions)
    names = ["input_ids", "attention_mask"]
    if isinstance(processing_class, PreTrainedTokenizerBase):
        accepted = inspect.signature(encoder.forward).parameters
        names = [name for name in processing_class.model_input_names if name in accepted]
    dimensions = {0: batch, 1: torch.export.Dim("length", max=adapter.max_length)}  # type: ignore[attr-defined]
    # Not the padding token, by which some encoders count positions.
    values = {"input_ids": (encoder.config.pad_token_id or 0) + 1, "token_type_ids": 0, "attention_mask": 1}
    inputs = {name: torch.full((2, 8), values[name]) for name in names}
    return inputs, dict.fromkeys(inputs, dimensions)
