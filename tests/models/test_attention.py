"""The attention of compiled models: the same numbers, and no mask where nothing is hidden."""

import pytest
import torch
from transformers import BertConfig, BertModel, ModernBertConfig, ModernBertModel, PreTrainedModel, RobertaConfig

from jepa_hf import JepaConfig, JepaForRepresentationPrediction
from jepa_hf.models.attention import SDPA_SKIP_EMPTY_MASK, sdpa_mask_or_none

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 99}


def encoder(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "bert":
        return BertModel(BertConfig(**SIZES), add_pooling_layer=False).eval()
    # A window of 8, narrower than the rows.
    return ModernBertModel(ModernBertConfig(**SIZES, pad_token_id=0, local_attention=8)).eval()


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
@pytest.mark.parametrize("padded", [None, False, True])
def test_it_computes_what_sdpa_computes(kind: str, padded: bool | None) -> None:
    """With masks by token, whether they hide something or not, without one, and in a window."""
    model, ids = encoder(kind), torch.randint(5, 99, (3, 24))
    mask = None if padded is None else torch.ones_like(ids)
    if padded:
        mask[1, 15:] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).last_hidden_state
        model.set_attn_implementation(SDPA_SKIP_EMPTY_MASK)
        actual = model(ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def test_no_mask_is_made_of_nothing_while_a_graph_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where transformers believes that a program is exported, as it does with torch before 2.14."""
    monkeypatch.setattr("transformers.masking_utils.is_torchdynamo_exporting", lambda: True, raising=False)
    model, ids, masks = encoder("bert"), torch.randint(5, 99, (3, 24)), []
    model.set_attn_implementation(SDPA_SKIP_EMPTY_MASK)

    def look(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        calls = [node for node in graph.graph.nodes if "scaled_dot_product" in str(node.target)]
        masks.extend(node.kwargs["attn_mask"] for node in calls)
        return graph.forward

    with torch.no_grad():
        torch.compile(model, backend=look)(ids)
    assert masks == [None, None]


def test_a_window_is_no_such_thing() -> None:
    """Of a row of 6, each token sees 2 to either side."""
    mask = sdpa_mask_or_none(
        batch_size=1,
        q_length=6,
        kv_length=6,
        mask_function=lambda batch, head, query, key: (query - key).abs() <= 2,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=True,
        local_size=5,
        device=torch.device("cpu"),
    )
    assert mask[0, 0].sum(dim=1).tolist() == [3, 4, 5, 5, 4, 3]


def test_only_text_encoders_that_are_given_no_mask_change(tmp_path) -> None:
    """What a user chose stays, and what is saved says nothing of it."""
    model = JepaForRepresentationPrediction(JepaConfig(RobertaConfig(**SIZES)))
    model.prepare_to_compile()
    for each in (model.context_encoder, model.target_encoder):
        assert each.config._attn_implementation == SDPA_SKIP_EMPTY_MASK
    model.save_pretrained(tmp_path)
    loaded = JepaForRepresentationPrediction.from_pretrained(tmp_path)
    assert loaded.context_encoder.config._attn_implementation == "sdpa"
    loaded.set_attn_implementation("eager")
    loaded.prepare_to_compile()
    assert loaded.context_encoder.config._attn_implementation == "eager"
