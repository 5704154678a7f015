"""Masked-language-model heads: their layout in each family, and the head itself."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from .backbones import TEXT_WITH_PADDING_OFFSET
from .errors import UsageError


@dataclass(frozen=True)
class MaskedLMHeadLayout:
    """Where a family's `...ForMaskedLM` keeps its head, and what the head is made of: dense, activation, norm, bias.

    The decoder's weight is always that of the input embeddings.
    """

    base: str
    dense: str
    norm: str
    bias: str
    activation: str
    norm_eps: float
    dense_bias: bool = True
    norm_bias: bool = True


def masked_lm_head_layout(config: PreTrainedConfig) -> MaskedLMHeadLayout:
    """The layout of the masked-language-model head that belongs to an encoder's configuration.

    Raises:
        UsageError: a family whose head we do not know.
    """
    family = config.model_type
    if family in ("bert", "deberta-v2"):
        parts = ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.bias")
        if family == "deberta-v2" and not config.legacy:
            parts = tuple(f"lm_predictions.lm_head.{part}" for part in ("dense", "LayerNorm", "bias"))
        base = "bert." if family == "bert" else "deberta."
        return MaskedLMHeadLayout(base, *parts, config.hidden_act, config.layer_norm_eps)
    if family == "distilbert":
        parts = ("vocab_transform", "vocab_layer_norm", "vocab_projector.bias")
        return MaskedLMHeadLayout("distilbert.", *parts, config.activation, 1e-12)
    if family in TEXT_WITH_PADDING_OFFSET:
        parts = ("lm_head.dense", "lm_head.layer_norm", "lm_head.bias")
        return MaskedLMHeadLayout("roberta.", *parts, "gelu", config.layer_norm_eps)
    if family == "electra":
        parts = ("generator_predictions.dense", "generator_predictions.LayerNorm", "generator_lm_head.bias")
        return MaskedLMHeadLayout("electra.", *parts, "gelu", config.layer_norm_eps)
    if family == "modernbert":
        parts = ("head.dense", "head.norm", "decoder.bias")
        activation, eps = config.classifier_activation, config.norm_eps
        return MaskedLMHeadLayout("model.", *parts, activation, eps, config.classifier_bias, config.norm_bias)
    raise UsageError(f"mlm_weight: there is no known masked-language-model head for {family} encoders; set it to 0")


class MaskedLMHead(nn.Module):
    """Dense, activation, norm, then the input embeddings as decoder, plus a bias per token."""

    def __init__(self, encoder: PreTrainedModel):
        super().__init__()
        layout = masked_lm_head_layout(encoder.config)
        vocab_size, width = encoder.get_input_embeddings().weight.shape
        self.dense = nn.Linear(encoder.config.hidden_size, width, bias=layout.dense_bias)
        self.activation = ACT2FN[layout.activation]
        self.norm = nn.LayerNorm(width, eps=layout.norm_eps, bias=layout.norm_bias)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, states: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """`[..., D]`, the embedding table `[V, E]` -> logits `[..., V]`."""
        return F.linear(self.norm(self.activation(self.dense(states))), embeddings, self.bias)


def head_state(masked_lm: PreTrainedModel, layout: MaskedLMHeadLayout) -> dict[str, torch.Tensor]:
    """The parts of a `...ForMaskedLM`'s head under the names of `MaskedLMHead`."""
    state = masked_lm.state_dict()
    head = {"bias": state[layout.bias]}
    for ours, theirs in (("dense", layout.dense), ("norm", layout.norm)):
        for part in ("weight", "bias"):
            if f"{theirs}.{part}" in state:
                head[f"{ours}.{part}"] = state[f"{theirs}.{part}"]
    return head
