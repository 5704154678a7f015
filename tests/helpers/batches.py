"""Tiny JEPAs and hand-made batches for them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, ViTConfig

from helpers.tiny_models import CORPUS, tiny_config, tiny_tokenizer
from jepa_hf import DataCollatorForSpanJEPA, JepaConfig, JepaForRepresentationPrediction

# Over matrices this small, threads only wait for each other.
torch.set_num_threads(1)

Row = dict[str, list[int]]

REPOSITORY = Path(__file__).resolve().parents[2]

# Every combination of family, context mode and predictor that the design allows.
ATTENTION_IMPLEMENTATIONS: list[tuple[str, str, str]] = [
    *((family, "drop", "transformer") for family in ("bert", "distilbert", "roberta", "electra", "modernbert")),
    *(
        (family, "mask_token", predictor)
        for family in ("bert", "distilbert", "roberta", "electra", "deberta-v2", "modernbert")
        for predictor in ("transformer", "mlp")
    ),
]
ONE_OF_EACH_FAMILY = [case for case in ATTENTION_IMPLEMENTATIONS if case[1] == "drop" or case[0] == "deberta-v2"][:6]


def rows(family: str, count: int, longest: int = 24) -> list[Row]:
    """The corpus as rows of token ids of differing lengths, at most `longest`."""
    ids = tiny_tokenizer(family)(CORPUS[:count], truncation=True, max_length=longest)["input_ids"]
    return [{"input_ids": row} for row in ids]


def pack(texts: Sequence[Row], max_length: int = 32) -> tuple[list[Row], list[tuple[int, int]]]:
    """Rows of as many documents as fit, in order, and each document's row and number there."""
    packed: list[Row] = []
    places = []
    for text in texts:
        length = len(text["input_ids"])
        if not packed or len(packed[-1]["input_ids"]) + length > max_length:
            packed.append({"document_ids": []} | {name: [] for name in text})
        number = (packed[-1]["document_ids"] or [-1])[-1] + 1
        for name, values in (text | {"document_ids": [number] * length}).items():
            packed[-1][name] = packed[-1][name] + values
        places.append((len(packed) - 1, number))
    return packed, places


def text_batch(
    family: str, masked_tokens: str, count: int = 4, masks: int = 1, **kwargs: Any
) -> dict[str, torch.Tensor]:
    """One collated batch."""
    collator = DataCollatorForSpanJEPA(
        tiny_tokenizer(family),
        masked_tokens=masked_tokens,
        num_masks=masks,
        mask_ratio=0.4,
        mean_span_length=2,
        **kwargs,
    )
    return collator(rows(family, count))


def scale_weights(module: nn.Module, std: float = 0.3, seed: int = 0) -> None:
    """Draw every parameter anew and wide enough to tell layers, positions and biases apart in the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
        for part in module.modules():
            if isinstance(part, nn.LayerNorm):
                part.weight += 1.0


def skip_unless_transformers_loads(masked_lm: PreTrainedModel) -> None:
    """Transformers 5.10 cannot load a DeBERTa-v2 head with legacy=False: it ties a parameter that is not built."""
    if not getattr(masked_lm.config, "legacy", True) and masked_lm.all_tied_weights_keys:
        pytest.skip("this transformers cannot load its own DeBERTa-v2 head with legacy=False")


def tiny_jepa(
    family: str = "bert",
    masked_tokens: str | None = None,
    predictor_type: str = "transformer",
    strong: bool = True,
    encoder: dict[str, Any] | None = None,
    contrastive_weight: float = 0.0,
    **kwargs: Any,
) -> JepaForRepresentationPrediction:
    """A tiny model in eval mode. If `strong`, its two encoders differ from each other, as in the middle of a run.

    Without the contrastive term, unless it is asked for: most claims are about single positions.
    """
    config = JepaConfig(
        tiny_config(family, **(encoder or {})),
        masked_tokens=masked_tokens,
        predictor_type=predictor_type,
        pred_num_hidden_layers=2,
        contrastive_weight=contrastive_weight,
        **kwargs,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = JepaForRepresentationPrediction(config)
    if strong:
        scale_weights(model)
    return model.eval()


def image_config(**overrides: Any) -> ViTConfig:
    """A plane of 4 x 4 patches, two layers, no dropout."""
    settings = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "image_size": 8,
        "patch_size": 2,
    }
    return ViTConfig(**(settings | overrides))


def image_batch(count: int = 2, masks: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    """Images with `masks` targets of three patches each and one context of seven that none of the masks touches."""
    generator = torch.Generator().manual_seed(seed)
    targets, contexts = [], []
    for _ in range(count):
        order = torch.randperm(16, generator=generator)
        contexts.append(order[None, :7].sort().values)
        hidden = order[7:]
        picks = [hidden[torch.randperm(9, generator=generator)[:3]] for _ in range(masks)]
        targets.append(torch.stack(picks))
    target_positions, context_positions = torch.stack(targets), torch.stack(contexts)
    return {
        "pixel_values": torch.randn(count, 3, 8, 8, generator=generator),
        "target_positions": target_positions,
        "target_valid": torch.ones_like(target_positions, dtype=torch.bool),
        "context_positions": context_positions,
        "context_valid": torch.ones_like(context_positions, dtype=torch.bool),
    }
