"""Claims about the encoder adapters: reading a subset of positions is exact, and each family's head is where we say.

Weights are drawn at a standard deviation of 0.3: with the usual 0.02 the outputs hardly depend on positions, and every
error below hides.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    IJepaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from helpers.batches import image_batch, image_config, rows, scale_weights, skip_unless_transformers_loads
from helpers.tiny_models import FAMILIES, save_tiny_encoder, tiny_config, tiny_tokenizer
from jepa_hf import JepaConfig, JepaForRepresentationPrediction, UsageError
from jepa_hf.hub.export import export_masked_lm
from jepa_hf.models.encoder_adapters import encoder_adapter_for
from jepa_hf.models.encoders import encoder_and_loading_info, encoder_from_config
from jepa_hf.models.mlm_head import masked_lm_head_layout
from jepa_hf.models.positions import gather_positions, sincos_positions

DROPS_EXACTLY = ("bert", "distilbert", "roberta", "electra", "modernbert")


@pytest.mark.parametrize("trailing", [(), (5,), (2, 3)])
def test_gather_positions_picks_rows_by_number(trailing: tuple[int, ...]) -> None:
    states, positions = torch.randn(2, 4, *trailing), torch.tensor([[3, 0, 0], [1, 2, 3]])
    picked = gather_positions(states, positions)
    assert picked.shape == (2, 3, *trailing)
    for row in range(2):
        for column in range(3):
            assert torch.equal(picked[row, column], states[row, positions[row, column]])


# ---- dropping


def strong_encoder(config: PreTrainedConfig, implementation: str | None = None) -> PreTrainedModel:
    encoder = encoder_from_config(config, attn_implementation=implementation)
    scale_weights(encoder)
    return encoder.eval()


def padded(family: str, side: str, count: int = 6) -> dict[str, torch.Tensor]:
    tokenizer = tiny_tokenizer(family)
    ids = [row["input_ids"] for row in rows(family, count, longest=40)]
    length = max(len(row) for row in ids)
    pads = [[tokenizer.pad_token_id] * (length - len(row)) for row in ids]
    inputs = [pad + row if side == "left" else row + pad for pad, row in zip(pads, ids, strict=True)]
    input_ids = torch.tensor(inputs)
    return {"input_ids": input_ids, "attention_mask": input_ids.ne(tokenizer.pad_token_id).long()}


def random_subset(real: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which positions are visible `[N, L]`, their numbers `[N, C]`, filled up with 0, and which of these are valid."""
    visible = real.bool() & (torch.rand(real.shape, generator=torch.Generator().manual_seed(seed)) < 0.5)
    counts = visible.sum(dim=1)
    assert counts.min() > 0
    assert counts.min() < counts.max()  # so that some rows are filled up
    valid = torch.arange(int(counts.max())) < counts[:, None]
    positions = torch.zeros(valid.shape, dtype=torch.long)
    positions[valid] = visible.nonzero()[:, 1]
    return visible, positions, valid


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def full_pass_with_hidden_keys(
    encoder: PreTrainedModel, inputs: dict[str, torch.Tensor], visible: torch.Tensor
) -> torch.Tensor:
    """The family's own full-length pass; its own mask hides what is not visible, as it hides padding."""
    return encoder(input_ids=inputs["input_ids"], attention_mask=visible.long()).last_hidden_state


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", DROPS_EXACTLY)
@torch.no_grad()
def test_dropping_positions_equals_hiding_them_as_keys(family: str, implementation: str, side: str) -> None:
    encoder = strong_encoder(tiny_config(family), implementation)
    encoder_adapter, inputs = encoder_adapter_for(encoder.config), padded(family, side)
    for seed in range(3):
        visible, positions, valid = random_subset(inputs["attention_mask"], seed)
        expected = full_pass_with_hidden_keys(encoder, inputs, visible)[visible]
        output = encoder_adapter.encode_visible(encoder, inputs, positions, valid, output_hidden_states=True)
        assert output.last_hidden_state.isfinite().all()
        assert error(output.last_hidden_state[valid], expected) < 1e-5
        assert len(output.hidden_states) == encoder.config.num_hidden_layers + 1


@pytest.mark.parametrize("family", DROPS_EXACTLY)
@torch.no_grad()
def test_a_plain_gather_is_far_from_exact(family: str) -> None:
    # The proof that the test above can fail.
    encoder, inputs = strong_encoder(tiny_config(family)), padded(family, "right")
    visible, positions, valid = random_subset(inputs["attention_mask"], seed=0)
    expected = full_pass_with_hidden_keys(encoder, inputs, visible)[visible]
    gathered = {"input_ids": inputs["input_ids"].gather(1, positions), "attention_mask": valid.long()}
    assert error(encoder(**gathered).last_hidden_state[valid], expected) > 0.1
    if family == "modernbert":  # true positions, but a window of neighbours in the shortened sequence
        windowless = encoder(**gathered, position_ids=positions).last_hidden_state[valid]
        assert error(windowless, expected) > 0.1
    if family == "roberta":  # positions counted from 0
        unshifted = encoder(**gathered, position_ids=positions).last_hidden_state[valid]
        assert error(unshifted, expected) > 0.1


@torch.no_grad()
def test_deberta_cannot_drop() -> None:
    # Why it is refused: even with true position ids its relative distances are those of the shortened sequence.
    encoder, inputs = strong_encoder(tiny_config("deberta-v2")), padded("deberta-v2", "right")
    visible, positions, valid = random_subset(inputs["attention_mask"], seed=0)
    expected = full_pass_with_hidden_keys(encoder, inputs, visible)[visible]
    encoder_adapter = encoder_adapter_for(encoder.config)
    assert encoder_adapter.masked_tokens_options == ("mask_token",)
    assert (
        error(encoder_adapter.encode_visible(encoder, inputs, positions, valid).last_hidden_state[valid], expected)
        > 0.1
    )


@torch.no_grad()
def test_modernbert_sees_half_its_window_to_each_side() -> None:
    # A change of one token reaches exactly local_attention // 2 positions in a model of one local layer.
    config = tiny_config("modernbert")
    encoder = strong_encoder(config)
    assert config.layer_types[1] == "sliding_attention"
    encoder.layers = encoder.layers[1:2]
    encoder_adapter = encoder_adapter_for(config)
    ids = torch.arange(20, 60)[None]
    changed = ids.clone()
    changed[0, 20] = 5
    positions, valid = torch.arange(0, 40, 2)[None], torch.ones(1, 20, dtype=torch.bool)
    states = [
        encoder_adapter.encode_visible(
            encoder, {"input_ids": x, "attention_mask": torch.ones_like(x)}, positions, valid
        ).last_hidden_state[0]
        for x in (ids, changed)
    ]
    moved = (states[0] - states[1]).abs().amax(dim=-1) > 1e-4
    assert positions[0][moved].tolist() == [16, 18, 20, 22, 24]


def test_modernbert_refuses_to_drop_under_an_attention_that_takes_no_mask() -> None:
    encoder = strong_encoder(tiny_config("modernbert"))
    encoder.config._attn_implementation = "flash_attention_2"
    inputs, positions = padded("modernbert", "right"), torch.zeros(6, 3, dtype=torch.long)
    with pytest.raises(UsageError, match=r"flash_attention_2.*sdpa, or --masked_tokens mask_token"):
        encoder_adapter_for(encoder.config).encode_visible(
            encoder, inputs, positions, torch.ones_like(positions).bool()
        )


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_longest_sequence_is_accepted_and_fits_the_grid(family: str) -> None:
    encoder = strong_encoder(tiny_config(family))
    encoder_adapter = encoder_adapter_for(encoder.config)
    assert encoder_adapter.max_length == 128
    assert encoder_adapter.grid[0] >= encoder_adapter.max_length
    ids = torch.full((1, encoder_adapter.max_length), 20)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert encoder_adapter.encode(encoder, inputs).last_hidden_state.isfinite().all()


# ---- building


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pooler_is_left_out_however_the_encoder_is_built(family: str, tmp_path: Path) -> None:
    config = tiny_config(family)
    plain = save_tiny_encoder(family, tmp_path / "plain")
    with_head = save_tiny_encoder(family, tmp_path / "head", head="mlm")
    built = [encoder_from_config(config), *(encoder_and_loading_info(name, config)[0] for name in (plain, with_head))]
    for encoder in built:
        assert not [name for name, _ in encoder.named_parameters() if "pooler" in name]


def test_some_encoders_would_have_a_pooler() -> None:
    # The proof that the test above can fail.
    for config in (tiny_config("bert"), tiny_config("roberta"), image_config()):
        assert [name for name, _ in AutoModel.from_config(config).named_parameters() if "pooler" in name]
        assert not [name for name, _ in encoder_from_config(config).named_parameters() if "pooler" in name]


# ---- masked-language-model heads


HEADS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in FAMILIES),
    ("deberta-v2", {"legacy": False}),
    ("electra", {"embedding_size": 32}),
    ("modernbert", {"norm_bias": True, "classifier_bias": True}),
    ("bert", {"hidden_act": "relu", "layer_norm_eps": 1e-3}),
    ("xlm-roberta", {}),
    ("camembert", {}),
    ("albert", {"embedding_size": 16}),
    ("mpnet", {}),
    ("deberta", {"legacy": True}),
    ("deberta", {"legacy": False}),
    ("modernbert", {"decoder_bias": False}),
    # An output matrix of its own.
    *(
        (family, {"tie_word_embeddings": False})
        for family in ("bert", "distilbert", "roberta", "electra", "modernbert")
    ),
    *((family, {"tie_word_embeddings": False}) for family in ("albert", "mpnet", "deberta", "deberta-v2")),
]
# A family with the configuration and the tokenizer of one in `FAMILIES`.
COUSINS = {"xlm-roberta": "roberta", "camembert": "roberta", "mpnet": "roberta", "albert": "bert", "deberta": "bert"}


def head_config(family: str, overrides: dict[str, Any]) -> tuple[str, PreTrainedConfig]:
    """Return the family whose tokenizer is used, and a tiny configuration."""
    cousin = COUSINS.get(family, family)
    config = tiny_config(cousin, **(overrides if family == cousin else {}))
    if family != cousin:
        values = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "layer_types")}
        config = AutoConfig.for_model(family, **{**values, **overrides})
    return cousin, config


@pytest.mark.parametrize(("family", "overrides"), HEADS, ids=lambda value: str(value))
@torch.no_grad()
def test_the_checkpoints_own_head_gives_its_own_logits(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    cousin, config = head_config(family, overrides)
    masked_lm = AutoModelForMaskedLM.from_config(config)
    skip_unless_transformers_loads(masked_lm)
    scale_weights(masked_lm)
    masked_lm.eval().save_pretrained(tmp_path)
    # Reloaded, because saving and loading may change the checkpoint's meaning.
    expected = AutoModelForMaskedLM.from_pretrained(tmp_path)(**padded(cousin, "right")).logits

    model = JepaForRepresentationPrediction.from_encoder_pretrained(
        str(tmp_path), masked_tokens="mask_token", mlm_weight=1.0
    )
    states = model.context_encoder(**padded(cousin, "right")).last_hidden_state
    logits = model.mlm_head(states, model.get_input_embeddings().weight)
    assert error(logits, expected) < 1e-5
    # The proof that the head matters: with another one the logits are far away.
    scale_weights(model.mlm_head, seed=1)
    assert error(model.mlm_head(states, model.get_input_embeddings().weight), expected) > 0.1


@pytest.mark.parametrize(("family", "overrides"), HEADS, ids=lambda value: str(value))
@torch.no_grad()
def test_head_survives_saving_and_export(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    """Start, full model and `export --head mlm` have the same logits, and the export misses no weight."""
    cousin, config = head_config(family, overrides)
    masked_lm = AutoModelForMaskedLM.from_config(config)
    skip_unless_transformers_loads(masked_lm)
    scale_weights(masked_lm)
    masked_lm.eval().save_pretrained(tmp_path / "start")
    batch = padded(cousin, "right")
    expected = AutoModelForMaskedLM.from_pretrained(tmp_path / "start")(**batch).logits

    model = JepaForRepresentationPrediction.from_encoder_pretrained(str(tmp_path / "start"), mlm_weight=1.0)
    model.save_pretrained(tmp_path / "jepa")
    loaded = JepaForRepresentationPrediction.from_pretrained(tmp_path / "jepa")
    export_masked_lm(loaded, tmp_path / "export")
    exported, info = AutoModelForMaskedLM.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert error(exported(**batch).logits, expected) < 1e-5


@torch.no_grad()
def test_untied_head_under_a_tied_configuration(tmp_path: Path) -> None:
    """An output matrix in the checkpoint is used even if the configuration says that there is none."""
    masked_lm = AutoModelForMaskedLM.from_config(tiny_config("bert", tie_word_embeddings=False))
    scale_weights(masked_lm)
    masked_lm.config.tie_word_embeddings = True
    masked_lm.save_pretrained(tmp_path, state_dict=masked_lm.state_dict())
    expected = AutoModelForMaskedLM.from_pretrained(tmp_path)(**padded("bert", "right")).logits
    model = JepaForRepresentationPrediction.from_encoder_pretrained(str(tmp_path), mlm_weight=1.0)
    states = model.context_encoder(**padded("bert", "right")).last_hidden_state
    assert error(model.mlm_head(states, model.get_input_embeddings().weight), expected) < 1e-5


def test_an_unknown_head_is_refused_by_the_knob_that_asks_for_it() -> None:
    config = AutoConfig.for_model("mobilebert", hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    with pytest.raises(UsageError, match=r"mlm_weight.*mobilebert"):
        masked_lm_head_layout(config)
    with pytest.raises(UsageError, match=r"mlm_weight.*vit"):
        JepaForRepresentationPrediction(JepaConfig(image_config(), mlm_weight=0.5))


# ---- images


def image_encoders() -> list[PreTrainedConfig]:
    vit = image_config()
    sizes = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "image_size",
        "patch_size",
    )
    values = {name: getattr(vit, name) for name in sizes}
    return [vit, IJepaConfig(**values), Dinov2Config(**values), Dinov2WithRegistersConfig(**values)]


# Tokens before the patches: [CLS], registers.
PREFIX = {"vit": 1, "ijepa": 0, "dinov2": 1, "dinov2_with_registers": 5}


def first_layer(encoder: PreTrainedModel) -> nn.Module:
    return next(module for module in encoder.modules() if isinstance(module, nn.ModuleList))[0]


@pytest.mark.parametrize("config", image_encoders(), ids=lambda config: config.model_type)
def test_an_image_model_fits_through_the_same_forward_and_reads_visible_patches_only(config: PreTrainedConfig) -> None:
    model = JepaForRepresentationPrediction(JepaConfig(config, pred_num_hidden_layers=1)).train()
    assert model.config.masked_tokens == "drop"
    lengths: dict[str, int] = {}
    for name, encoder in (("context", model.context_encoder), ("target", model.target_encoder)):
        first_layer(encoder).register_forward_pre_hook(
            lambda _module, args, name=name: lengths.update({name: args[0].shape[1]})
        )
    output = model(**image_batch())
    prefix = PREFIX[config.model_type]
    assert lengths == {"context": 7 + prefix, "target": 16 + prefix}
    assert output.predictions.shape == output.targets.shape == (2, 4, 3, 32)
    assert output.loss.isfinite()
    output.loss.backward()
    trained = {name: p for name, p in model.context_encoder.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())
    frozen = {name for name, _ in model.context_encoder.named_parameters()} - trained.keys()
    assert frozen <= {"embeddings.mask_token"}
    assert all(p.grad is None for p in model.target_encoder.parameters())


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("config", image_encoders(), ids=lambda config: config.model_type)
@torch.no_grad()
def test_dropping_patches_equals_hiding_them_as_keys(config: PreTrainedConfig, implementation: str) -> None:
    encoder, batch = strong_encoder(config, implementation), image_batch(count=3)
    positions, valid = batch["context_positions"][:, 0], batch["context_valid"][:, 0]
    prefix = PREFIX[config.model_type]
    keys = torch.zeros(3, 16, dtype=torch.long).scatter(1, positions, 1)
    keys = torch.cat([torch.ones(3, prefix, dtype=torch.long), keys], dim=1)
    full = encoder(pixel_values=batch["pixel_values"], attention_mask=keys).last_hidden_state[:, prefix:]
    inputs = {"pixel_values": batch["pixel_values"]}
    encoder_adapter = encoder_adapter_for(config)
    encoder_adapter.register_hooks(encoder)
    visible = encoder_adapter.encode_visible(encoder, inputs, positions, valid).last_hidden_state
    assert error(visible, gather_positions(full, positions)) < 1e-5
    # Reading the rest too, as the target encoder does, is something else.
    assert error(gather_positions(encoder_adapter.encode(encoder, inputs).last_hidden_state, positions), visible) > 0.1
    # A call by itself, as others make it, hides nothing.
    torch.testing.assert_close(
        encoder(**inputs).last_hidden_state[:, prefix:], encoder_adapter.encode(encoder, inputs)[0]
    )


def test_an_encoder_that_would_read_the_hidden_patches_too_is_refused() -> None:
    config = image_config()
    encoder, batch = strong_encoder(config), image_batch()
    positions, valid = batch["context_positions"][:, 0], batch["context_valid"][:, 0]
    with pytest.raises(ValueError, match="register_hooks"):
        encoder_adapter_for(config).encode_visible(encoder, {"pixel_values": batch["pixel_values"]}, positions, valid)


@pytest.mark.parametrize("config", image_encoders(), ids=lambda config: config.model_type)
def test_pixels_and_positions_start_equally_loud(config: PreTrainedConfig) -> None:
    """Sine-cosine positions, and a projection that keeps the size of the pixels; both encoders start alike."""
    model = JepaForRepresentationPrediction(JepaConfig(config))
    embeddings = model.context_encoder.embeddings
    positions = embeddings.position_embeddings[0, -16:]
    assert positions.equal(sincos_positions((4, 4), 32))
    pixels = torch.randn(200, 3, 16, 16)
    projected = embeddings.patch_embeddings(pixels)
    assert 0.8 < projected.std() < 1.2
    assert 0.5 < positions.square().mean().sqrt() / projected.std() < 1
    for source, copied in zip(model.context_encoder.parameters(), model.target_encoder.parameters(), strict=True):
        assert source.equal(copied)


def test_weights_that_a_checkpoint_gives_are_not_drawn_again(tmp_path: Path) -> None:
    encoder = strong_encoder(image_config())
    encoder.save_pretrained(tmp_path)
    model = JepaForRepresentationPrediction.from_encoder_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "jepa")
    for loaded in (model, JepaForRepresentationPrediction.from_pretrained(tmp_path / "jepa")):
        for name, value in encoder.state_dict().items():
            assert loaded.context_encoder.state_dict()[name].equal(value), name


def test_a_ragged_image_batch_is_refused() -> None:
    config = image_config()
    encoder, batch = strong_encoder(config), image_batch()
    valid = batch["context_valid"][:, 0].clone()
    valid[0, -1] = False
    with pytest.raises(ValueError, match="rectangular"):
        encoder_adapter_for(config).encode_visible(
            encoder, {"pixel_values": batch["pixel_values"]}, batch["context_positions"][:, 0], valid
        )


def test_a_plane_of_patches_counts_rows_first() -> None:
    assert encoder_adapter_for(image_config(image_size=(8, 12), patch_size=(4, 2))).grid == (2, 6)
