"""Masked-language-model heads: their layout in each family, the head, and its loading."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from .encoder_adapters import TEXT_WITH_PADDING_OFFSET
from .errors import UsageError


@dataclass(frozen=True)
class MaskedLMHeadLayout:
    """Parameter names and settings of the head in a family's `...ForMaskedLM`.

    The decoder's weight is always tied to the input embeddings.

    Args:
        base: prefix of the encoder's parameters.
        dense: name of the dense layer.
        norm: name of the layer norm.
        bias: name of the decoder's bias.
        activation: name of the activation function.
        norm_eps: epsilon of the layer norm.
        dense_bias: whether the dense layer has a bias.
        norm_bias: whether the layer norm has a bias.
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
    """Return the layout of the masked-language-model head of an encoder's family.

    Raises:
        UsageError: the family has no known head.
    """
    family = config.model_type
    if family in ("bert", "deberta-v2"):
        base = "bert." if family == "bert" else "deberta."
        names = ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.bias")
        if family == "deberta-v2" and not config.legacy:
            head = "lm_predictions.lm_head"
            names = (f"{head}.dense", f"{head}.LayerNorm", f"{head}.bias")
        return MaskedLMHeadLayout(base, *names, config.hidden_act, config.layer_norm_eps)
    if family == "distilbert":
        names = ("vocab_transform", "vocab_layer_norm", "vocab_projector.bias")
        return MaskedLMHeadLayout("distilbert.", *names, config.activation, 1e-12)
    if family in TEXT_WITH_PADDING_OFFSET:
        names = ("lm_head.dense", "lm_head.layer_norm", "lm_head.bias")
        return MaskedLMHeadLayout("roberta.", *names, "gelu", config.layer_norm_eps)
    if family == "electra":
        names = ("generator_predictions.dense", "generator_predictions.LayerNorm", "generator_lm_head.bias")
        return MaskedLMHeadLayout("electra.", *names, "gelu", config.layer_norm_eps)
    if family == "modernbert":
        names = ("head.dense", "head.norm", "decoder.bias")
        activation, eps = config.classifier_activation, config.norm_eps
        return MaskedLMHeadLayout("model.", *names, activation, eps, config.classifier_bias, config.norm_bias)
    raise UsageError(
        f"mlm_weight above 0 needs a masked-language-model head, and none is known for {family} encoders. "
        "Set mlm_weight to 0."
    )


class MaskedLMHead(nn.Module):
    """Dense, activation, norm, then the input embeddings as decoder, plus a bias per token."""

    def __init__(self, encoder: PreTrainedModel):
        super().__init__()
        layout = masked_lm_head_layout(encoder.config)
        embeddings: Any = encoder.get_input_embeddings()
        vocab_size, width = embeddings.weight.shape
        self.dense = nn.Linear(encoder.config.hidden_size, width, bias=layout.dense_bias)
        self.activation = ACT2FN[layout.activation]
        self.norm = nn.LayerNorm(width, eps=layout.norm_eps, bias=layout.norm_bias)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, states: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """Compute logits: states `[..., D]`, embedding table `[V, E]` -> `[..., V]`."""
        return F.linear(self.norm(self.activation(self.dense(states))), embeddings, self.bias)

    def resize(self, vocab_size: int) -> None:
        """Cut the bias or pad it with 0 to a new vocabulary size."""
        bias = self.bias.detach()
        self.bias = nn.Parameter(F.pad(bias, (0, max(vocab_size - bias.shape[0], 0)))[:vocab_size])


def masked_lm_sum(logits: torch.Tensor, tokens: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Sum −log softmax(logits) of the valid tokens: `[N, T, V]`, long, bool `[N, T]` -> scalar."""
    labels = torch.where(valid, tokens, -100)
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum", ignore_index=-100)


def encoder_and_head_from_pretrained(
    name_or_path: str, config: PreTrainedConfig, **kwargs: Any
) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """Load an encoder and the state dict of its `MaskedLMHead`.

    Args:
        name_or_path: directory or Hub name.
        config: the encoder's configuration.
        kwargs: passed to `from_pretrained`.

    Returns:
        The encoder, and the head's state dict, empty if the checkpoint has no head.
    """
    layout = masked_lm_head_layout(config)
    masked_lm, info = AutoModelForMaskedLM.from_pretrained(
        name_or_path, config=config, output_loading_info=True, **kwargs
    )
    if f"{layout.dense}.weight" in info["missing_keys"]:
        return masked_lm.base_model, {}
    return masked_lm.base_model, head_state(masked_lm, layout)


def head_state(masked_lm: PreTrainedModel, layout: MaskedLMHeadLayout) -> dict[str, torch.Tensor]:
    """Return the head of a `...ForMaskedLM` as a state dict of `MaskedLMHead`."""
    state = masked_lm.state_dict()
    head = {"bias": state[layout.bias]}
    for layer, source in (("dense", layout.dense), ("norm", layout.norm)):
        for parameter in ("weight", "bias"):
            if f"{source}.{parameter}" in state:
                head[f"{layer}.{parameter}"] = state[f"{source}.{parameter}"]
    return head
