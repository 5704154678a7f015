"""Masked-language-model heads: their layout in each family, the head, and its loading."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN

from .encoder_adapters import TEXT_WITH_PADDING_OFFSET
from .encoders import is_pooler_parameter
from .errors import UsageError


@dataclass(frozen=True)
class MaskedLMHeadLayout:
    """Parameter names and settings of the head in a family's `...ForMaskedLM`.

    Args:
        base: prefix of the encoder's parameters.
        dense: name of the dense layer.
        norm: name of the layer norm.
        decoder: name of the linear layer over the vocabulary; None if the input embeddings are always used instead.
        bias: name of the bias per token if it is not, or not only, `decoder`'s own.
        activation: name of the activation function.
        norm_eps: epsilon of the layer norm.
        dense_bias: whether the dense layer has a bias.
        norm_bias: whether the layer norm has a bias.
        decoder_bias: whether there is a bias per token.
    """

    base: str
    dense: str
    norm: str
    decoder: str | None
    bias: str | None
    activation: str
    norm_eps: float
    dense_bias: bool = True
    norm_bias: bool = True
    decoder_bias: bool = True


def masked_lm_head_layout(config: PreTrainedConfig) -> MaskedLMHeadLayout:
    """Return the layout of the masked-language-model head of an encoder's family.

    Raises:
        UsageError: the family has no known head.
    """
    family = config.model_type
    names: tuple[str, str, str | None, str | None]
    if family in ("deberta", "deberta-v2") and not config.legacy:
        head = "lm_predictions.lm_head"
        names = (f"{head}.dense", f"{head}.LayerNorm", None, f"{head}.bias")
        return MaskedLMHeadLayout("deberta.", *names, config.hidden_act, config.layer_norm_eps)
    if family in ("bert", "deberta", "deberta-v2"):
        base, head = "bert." if family == "bert" else "deberta.", "cls.predictions"
        names = (f"{head}.transform.dense", f"{head}.transform.LayerNorm", f"{head}.decoder", f"{head}.bias")
        return MaskedLMHeadLayout(base, *names, config.hidden_act, config.layer_norm_eps)
    if family == "albert":
        names = ("predictions.dense", "predictions.LayerNorm", "predictions.decoder", "predictions.bias")
        return MaskedLMHeadLayout("albert.", *names, config.hidden_act, config.layer_norm_eps)
    if family == "distilbert":
        names = ("vocab_transform", "vocab_layer_norm", "vocab_projector", None)
        return MaskedLMHeadLayout("distilbert.", *names, config.activation, 1e-12)
    if family in (*TEXT_WITH_PADDING_OFFSET, "mpnet"):
        base = "mpnet." if family == "mpnet" else "roberta."
        names = ("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "lm_head.bias")
        return MaskedLMHeadLayout(base, *names, "gelu", config.layer_norm_eps)
    if family == "electra":
        names = ("generator_predictions.dense", "generator_predictions.LayerNorm", "generator_lm_head", None)
        return MaskedLMHeadLayout("electra.", *names, "gelu", config.layer_norm_eps)
    if family == "modernbert":
        biases = (config.classifier_bias, config.norm_bias, config.decoder_bias)
        names = ("head.dense", "head.norm", "decoder", None)
        return MaskedLMHeadLayout("model.", *names, config.classifier_activation, config.norm_eps, *biases)
    raise UsageError(
        f"mlm_weight above 0 needs a masked-language-model head, and none is known for {family} encoders. "
        "Set mlm_weight to 0."
    )


class MaskedLMHead(nn.Module):
    """Dense, activation, norm, then a decoder over the vocabulary and a bias per token.

    The decoder is the table of input embeddings, or a matrix of its own if the encoder's
    `tie_word_embeddings` is False.
    """

    def __init__(self, encoder: PreTrainedModel):
        super().__init__()
        layout = masked_lm_head_layout(encoder.config)
        embeddings: Any = encoder.get_input_embeddings()
        vocab_size, width = embeddings.weight.shape
        is_tied = layout.decoder is None or encoder.config.tie_word_embeddings
        self.dense = nn.Linear(encoder.config.hidden_size, width, bias=layout.dense_bias)
        self.activation = ACT2FN[layout.activation]
        self.norm = nn.LayerNorm(width, eps=layout.norm_eps, bias=layout.norm_bias)
        self.decoder = None if is_tied else nn.Parameter(torch.zeros(vocab_size, width))
        self.bias = nn.Parameter(torch.zeros(vocab_size)) if layout.decoder_bias else None

    def forward(self, states: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """Compute logits: states `[..., D]`, table of input embeddings `[V, E]` -> `[..., V]`."""
        decoder = embeddings if self.decoder is None else self.decoder
        return F.linear(self.norm(self.activation(self.dense(states))), decoder, self.bias)

    def initialize(self, std: float) -> None:
        """Initialize a bias and a decoder that no checkpoint contained."""
        if self.bias is not None:
            init.zeros_(self.bias)
        if self.decoder is not None:
            init.trunc_normal_(self.decoder, std=std)

    def resize(self, vocab_size: int) -> None:
        """Cut the bias and the decoder or pad them with 0 to a new vocabulary size."""
        for name, parameter in list(self.named_parameters(recurse=False)):
            more = max(vocab_size - len(parameter), 0)
            padded = torch.cat([parameter.detach(), parameter.new_zeros(more, *parameter.shape[1:])])
            setattr(self, name, nn.Parameter(padded[:vocab_size]))


def masked_lm_sum(logits: torch.Tensor, tokens: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Sum −log softmax(logits) of the valid tokens: `[N, T, V]`, long, bool `[N, T]` -> scalar."""
    labels = torch.where(valid, tokens, -100)
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum", ignore_index=-100)


def head_from_pretrained(name_or_path: str, encoder: PreTrainedModel, **kwargs: Any) -> dict[str, torch.Tensor]:
    """Load the state dict of the `MaskedLMHead` of an encoder that was loaded from `name_or_path`.

    If the checkpoint has an output matrix of its own, `tie_word_embeddings` of the encoder's
    configuration is set to False, whatever its file says.

    Returns:
        The state dict, empty if the checkpoint has no head.
    """
    layout = masked_lm_head_layout(encoder.config)
    masked_lm, info = AutoModelForMaskedLM.from_pretrained(name_or_path, output_loading_info=True, **kwargs)
    if f"{layout.dense}.weight" in info["missing_keys"]:
        return {}
    if layout.decoder is not None:
        decoder = masked_lm.get_submodule(layout.decoder)
        encoder.config.tie_word_embeddings = decoder.weight is masked_lm.get_input_embeddings().weight
    state, names = masked_lm.state_dict(), _parameter_names(layout, encoder.config.tie_word_embeddings)
    return {own: state[family_names[0]] for own, family_names in names.items()}


def masked_lm_state(
    encoder_state: dict[str, torch.Tensor], head: MaskedLMHead, config: PreTrainedConfig
) -> dict[str, torch.Tensor]:
    """Return the state dict of the family's `...ForMaskedLM`, without tied weights."""
    layout = masked_lm_head_layout(config)
    state = {f"{layout.base}{name}": value for name, value in encoder_state.items() if not is_pooler_parameter(name)}
    values = head.state_dict()
    for own, names in _parameter_names(layout, config.tie_word_embeddings).items():
        state |= dict.fromkeys(names, values[own])
    return state


def _parameter_names(layout: MaskedLMHeadLayout, is_tied: bool) -> dict[str, list[str]]:
    """Map the names of `MaskedLMHead`'s parameters to those of the family, the one in use first.

    Some families have the bias per token twice, tied like the decoder: `decoder`'s own is used.
    """
    names = {"dense.weight": [f"{layout.dense}.weight"], "norm.weight": [f"{layout.norm}.weight"]}
    if layout.dense_bias:
        names["dense.bias"] = [f"{layout.dense}.bias"]
    if layout.norm_bias:
        names["norm.bias"] = [f"{layout.norm}.bias"]
    if layout.decoder is not None and not is_tied:
        names["decoder"] = [f"{layout.decoder}.weight"]
    if layout.decoder_bias:
        own_bias = None if layout.decoder is None else f"{layout.decoder}.bias"
        names["bias"] = [name for name in (own_bias, layout.bias) if name is not None]
    return names
