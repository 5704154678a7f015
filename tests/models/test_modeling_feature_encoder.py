"""Claims about the feature encoder: what it computes, that reading a subset of positions is exact, and round trips.

Where outputs are compared, weights are drawn at a standard deviation of 0.3: at 0.02 errors hide.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModel

from helpers.batches import scale_weights
from jepa_hf.errors import UsageError
from jepa_hf.models.configuration_feature_encoder import FeatureEncoderConfig
from jepa_hf.models.modeling_feature_encoder import FeatureEncoderModel

torch.set_num_threads(1)

MODES = ("time", "patches", "flat")
WIDTH = 22  # 8 patches of 3 features, the last with 2 of padding


def tiny_config(mode: str = "patches", **overrides: Any) -> FeatureEncoderConfig:
    small = {
        "input_dim": WIDTH,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "patch_size": 3,
        "max_position_embeddings": 12,
    }
    return FeatureEncoderConfig(mode=mode, **(small | overrides))


def strong_encoder(mode: str, implementation: str = "sdpa", **overrides: Any) -> FeatureEncoderModel:
    model = FeatureEncoderModel._from_config(tiny_config(mode, **overrides), attn_implementation=implementation)
    scale_weights(model)
    model.set_standardization(torch.linspace(-2, 3, model.config.input_dim), torch.full((model.config.input_dim,), 1.5))
    return model.eval()


def inputs(mode: str, batch: int = 4, steps: int = 9, seed: int = 0) -> torch.Tensor:
    shape = (batch, steps, WIDTH) if mode == "time" else (batch, WIDTH)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def length(mode: str) -> int:
    return {"time": 9, "patches": 8, "flat": 1}[mode]


# ---- configuration


def test_parameter_counts_are_those_of_edifices_encoder() -> None:
    """Flat mode: 4,812,800 parameters at the defaults with 287 features, 7,120 in Edifice's test configuration."""
    with torch.device("meta"):
        default = FeatureEncoderModel(FeatureEncoderConfig(287, mode="flat"))
        small = FeatureEncoderModel(
            FeatureEncoderConfig(32, mode="flat", embed_dim=16, encoder_depth=2, num_heads=4, dropout=0.0)
        )
    assert default.num_parameters() == 4_812_800
    assert small.num_parameters() == 7_120
    assert small.config.hidden_dropout_prob == 0.0


@given(st.integers(1, 5000))
def test_the_default_patch_size_is_the_least_that_gives_at_most_64_patches(input_dim: int) -> None:
    config = FeatureEncoderConfig(input_dim)
    assert config.num_patches <= 64
    assert (config.num_patches - 1) * config.patch_size < input_dim <= config.num_patches * config.patch_size
    assert config.patch_size == 1 or -(-input_dim // (config.patch_size - 1)) > 64


def test_the_configuration_survives_json(tmp_path: Path) -> None:
    """Values given under Edifice's names, too, come back as they were, from the file and from its dictionary."""
    config = tiny_config("time", embed_dim=24, dropout=0.3, mlp_ratio=2.5, patch_size=None)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is FeatureEncoderConfig
    assert loaded.to_diff_dict() == config.to_diff_dict()
    assert (loaded.hidden_size, loaded.hidden_dropout_prob, loaded.embed_dim) == (24, 0.3, 24)
    assert json.loads((tmp_path / "config.json").read_text())["input_dim"] == WIDTH
    assert AutoConfig.for_model(**config.to_dict()).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"input_dim": None}, "needs input_dim"),
        ({"input_dim": 0}, "input_dim must be at least 1, not 0"),
        ({"mode": "space"}, "mode must be one of time, patches, flat, not 'space'"),
        ({"hidden_size": 18}, "hidden_size 18 is not a multiple of num_attention_heads 4"),
        ({"num_heads": 3}, "hidden_size 16 is not a multiple of num_attention_heads 3"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1"),
        ({"max_position_embeddings": 0}, "max_position_embeddings must be at least 1"),
        ({"patch_size": 0}, "patch_size must be between 1 and the 22 features"),
        ({"patch_size": 23}, "patch_size must be between 1 and the 22 features"),
        ({"hidden_dropout_prob": 1.0}, r"hidden_dropout_prob must be in \[0, 1\), not 1.0"),
        ({"dropout": -0.1}, r"hidden_dropout_prob must be in \[0, 1\), not -0.1"),
        ({"mlp_ratio": 0.0}, "mlp_ratio must be above 0"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps must be above 0"),
        ({"initializer_range": -1.0}, "initializer_range must be above 0"),
    ],
)
def test_bad_configurations_are_refused_by_name(overrides: dict[str, Any], message: str) -> None:
    tiny_config()
    with pytest.raises(UsageError, match=message):
        tiny_config(**overrides)


# ---- what it computes


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_the_forward_pass_is_the_documented_formula(mode: str) -> None:
    """Written out with plain functions: standardise, embed, pre-norm blocks, layer norm, mean."""
    model, x = strong_encoder(mode), inputs(mode)
    p = dict(model.named_parameters())
    z = (x - torch.linspace(-2, 3, WIDTH)) / 1.5
    if mode == "time":
        h = z @ p["embeddings.projection.weight"].T + p["embeddings.projection.bias"]
        h = h + p["embeddings.position_embeddings"][:9]
    elif mode == "flat":
        h = F.gelu(z @ p["embeddings.projection.weight"].T + p["embeddings.projection.bias"])[:, None]
    else:
        columns = [z[:, 3 * i : 3 * i + 3] for i in range(8)]
        h = torch.stack([c @ p["embeddings.weight"][i, : c.shape[1]] for i, c in enumerate(columns)], dim=1)
        h = h + p["embeddings.position_embeddings"]
    states = [h]
    for i in range(2):

        def norm(states: torch.Tensor, name: str) -> torch.Tensor:
            return F.layer_norm(states, (16,), p[f"{name}.weight"], p[f"{name}.bias"], 1e-5)

        def linear(states: torch.Tensor, name: str) -> torch.Tensor:
            return states @ p[f"{name}.weight"].T + p[f"{name}.bias"]

        layer = f"layers.{i}"
        query, key, value = linear(norm(h, f"{layer}.norm1"), f"{layer}.attention.qkv").split(16, dim=-1)
        heads = []
        for head in range(4):
            part = slice(4 * head, 4 * head + 4)
            scores = query[..., part] @ key[..., part].transpose(1, 2) / 2.0
            heads.append(scores.softmax(dim=-1) @ value[..., part])
        h = h + linear(torch.cat(heads, dim=-1), f"{layer}.attention.proj")
        h = h + linear(F.gelu(linear(norm(h, f"{layer}.norm2"), f"{layer}.fc1")), f"{layer}.fc2")
        states.append(h)
    expected = F.layer_norm(h, (16,), p["norm.weight"], p["norm.bias"], 1e-5)

    output = model(x, output_hidden_states=True)
    assert output.last_hidden_state.shape == (4, length(mode), 16)
    torch.testing.assert_close(output.last_hidden_state, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.pooler_output, expected.mean(dim=1), rtol=1e-4, atol=1e-4)
    assert len(output.hidden_states) == 3
    for actual, wanted in zip(output.hidden_states, states, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_outputs_come_as_asked() -> None:
    """Hidden states only on request, a tuple with return_dict=False, by argument and by configuration."""
    model, x = strong_encoder("patches"), inputs("patches")
    plain = model(x)
    assert plain.hidden_states is None
    as_tuple = model(x, output_hidden_states=True, return_dict=False)
    assert torch.equal(as_tuple[0], plain.last_hidden_state)
    assert torch.equal(as_tuple[1], plain.pooler_output)
    assert len(as_tuple[2]) == 3
    model.config.output_hidden_states = True
    assert len(model(x).hidden_states) == 3


@torch.no_grad()
def test_raw_features_are_standardised_by_the_model() -> None:
    """Raw features through a set mean and deviation equal standardised ones through 0 and 1, even far from 0."""
    model, x = strong_encoder("patches"), inputs("patches")
    mean, std = 1000.0 * torch.arange(WIDTH), torch.linspace(0.5, 20, WIDTH)
    raw = x.double() * std + mean
    model.set_standardization([0.0] * WIDTH, [1.0] * WIDTH)
    expected = model(x).last_hidden_state
    assert not torch.allclose(model(raw.float()).last_hidden_state, expected, atol=0.1)
    model.set_standardization(mean, std)
    torch.testing.assert_close(model(raw.float()).last_hidden_state, expected, rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ([0.0] * 21, [1.0] * WIDTH, r"mean .*input_dim 22 .*\(21,\)"),
        ([0.0] * WIDTH, [[1.0] * WIDTH], r"std .*input_dim 22 .*\(1, 22\)"),
        ([0.0] * 5 + [float("nan")] * 17, [1.0] * WIDTH, "mean of feature 5 is nan"),
        ([0.0] * WIDTH, [1.0] * 4 + [0.0] * 18, "std of feature 4 is 0.0"),
        ([0.0] * WIDTH, [1.0] * 4 + [1e-60] * 18, "std of feature 4 is 0.0"),  # 0 in float32
        ([0.0] * WIDTH, [float("inf")] * WIDTH, "std of feature 0 is inf"),
    ],
)
def test_bad_statistics_are_refused_and_change_nothing(mean: list, std: list, message: str) -> None:
    model = FeatureEncoderModel(tiny_config())
    with pytest.raises(UsageError, match=message):
        model.set_standardization(mean, std)
    assert torch.equal(model.feature_mean, torch.zeros(WIDTH))
    assert torch.equal(model.feature_std, torch.ones(WIDTH))


@pytest.mark.parametrize(
    ("mode", "shape", "message"),
    [
        ("patches", (2, 21), "has 21 features, but the encoder reads 22"),
        ("flat", (2, 23), "has 23 features, but the encoder reads 22"),
        ("time", (2, 5, 21), "has 21 features, but the encoder reads 22"),
        ("patches", (2, 5, 22), r"mode patches .*\(2, 5, 22\)"),
        ("time", (2, 22), r"mode time .*\(2, 22\)"),
        ("time", (2, 13, 22), "13 steps .*max_position_embeddings 12"),
    ],
)
def test_input_of_another_shape_is_refused(mode: str, shape: tuple[int, ...], message: str) -> None:
    model = FeatureEncoderModel(tiny_config(mode))
    with pytest.raises(UsageError, match=message):
        model(torch.zeros(shape))


def test_a_mask_of_another_length_is_refused() -> None:
    model, x = FeatureEncoderModel(tiny_config("time")), inputs("time")
    with pytest.raises(UsageError, match=r"attention_mask .*\(4, 9\).*\(4, 3\) positions"):
        model(x, attention_mask=torch.ones(4, 9), positions=torch.zeros(4, 3, dtype=torch.long))


# ---- positions and masks


def random_subset(real: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which positions are visible `[N, L]`, their numbers `[N, C]`, filled up with 0, and which of these are valid."""
    visible = real.bool() & (torch.rand(real.shape, generator=torch.Generator().manual_seed(seed)) < 0.6)
    visible[:, 1] = True
    visible[0, 2:] = False  # so that a row is filled up
    counts = visible.sum(dim=1)
    assert counts.min() < counts.max()
    valid = torch.arange(int(counts.max())) < counts[:, None]
    positions = torch.zeros(valid.shape, dtype=torch.long)
    positions[valid] = visible.nonzero()[:, 1]
    return visible, positions, valid


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("mode", ["time", "patches"])
@torch.no_grad()
def test_reading_some_positions_equals_hiding_the_others_as_keys(mode: str, implementation: str) -> None:
    model, x = strong_encoder(mode, implementation), inputs(mode)
    real = torch.ones(4, length(mode), dtype=torch.long)
    if mode == "time":
        real[2, 6:] = 0
    for seed in range(3):
        visible, positions, valid = random_subset(real, seed)
        full = model(x, attention_mask=visible, output_hidden_states=True)
        some = model(x, attention_mask=valid, positions=positions, output_hidden_states=True)
        assert some.last_hidden_state.shape == (*positions.shape, 16)
        for actual, wanted in zip(
            (some.last_hidden_state, *some.hidden_states), (full.last_hidden_state, *full.hidden_states), strict=True
        ):
            assert error(actual[valid], wanted[visible]) < 1e-5
        assert error(some.pooler_output, full.pooler_output) < 1e-5
        # The proof that the comparison can fail: the filled-up positions, read as if they were real.
        assert error(model(x, positions=positions).last_hidden_state[valid], full.last_hidden_state[visible]) > 0.01


@pytest.mark.parametrize("mode", ["time", "patches"])
@torch.no_grad()
def test_positions_count(mode: str) -> None:
    """The order of steps, or of patches, changes more than the order of the output."""
    x = inputs(mode)[..., :21]  # whole patches
    model = strong_encoder(mode, input_dim=21)
    model.set_standardization([0.0] * 21, [1.0] * 21)
    swapped = x.flip(1) if mode == "time" else x.view(4, -1, 3).flip(1).reshape(4, -1)
    assert error(model(swapped).last_hidden_state.flip(1), model(x).last_hidden_state) > 0.1


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(0, 3), st.floats(-100, 100))
@torch.no_grad()
def test_padding_changes_nothing(steps: int, padding: int, garbage: float) -> None:
    """A series alone and the same series with any numbers behind it, marked as padding, are encoded alike."""
    model, x = strong_encoder("time"), inputs("time", steps=steps, seed=steps)
    padded = F.pad(x, (0, 0, 0, padding), value=garbage)
    mask = (torch.arange(steps + padding) < steps).long().expand(4, -1)
    alone, output = model(x), model(padded, attention_mask=mask)
    assert error(output.last_hidden_state[:, :steps], alone.last_hidden_state) < 1e-5
    assert error(output.pooler_output, alone.pooler_output) < 1e-5


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_eager_and_sdpa_agree(mode: str) -> None:
    """With a mask that hides some keys, all keys of one row, and without a mask."""
    x, size = inputs(mode), length(mode)
    masks = [None]
    if size > 1:
        mask = torch.ones(4, size, dtype=torch.long)
        mask[1, size // 2 :] = 0
        mask[3] = 0
        masks.append(mask)
    eager, sdpa = strong_encoder(mode, "eager"), strong_encoder(mode, "sdpa")
    assert (eager.config._attn_implementation, sdpa.config._attn_implementation) == ("eager", "sdpa")
    for mask in masks:
        assert error(eager(x, mask).last_hidden_state, sdpa(x, mask).last_hidden_state) < 1e-5


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_row_of_padding_alone_gives_no_nan(implementation: str) -> None:
    """Its states and gradients are finite, its pooled output is 0, and the other rows do not see it."""
    model, x = strong_encoder("time", implementation), inputs("time")
    mask = torch.ones(4, 9, dtype=torch.long)
    mask[2] = 0
    output = model(x, attention_mask=mask)
    assert output.last_hidden_state.isfinite().all()
    assert torch.equal(output.pooler_output[2], torch.zeros(16))
    assert error(output.pooler_output[:2], model(x[:2]).pooler_output) < 1e-5
    (output.last_hidden_state.square().sum() + output.pooler_output.square().sum()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


# ---- training


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_reach_every_parameter(mode: str, checkpointing: bool) -> None:
    """Also through gradient checkpointing, with the same values. With one token (flat) the softmax is constant: the
    query and key parts of qkv get gradients of zero (some processors' kernels round), the value part does not."""
    model, x = strong_encoder(mode, hidden_dropout_prob=0.0), inputs(mode)
    model.train()

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        states = model(x).last_hidden_state
        (states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    actual = gradients()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        assert model.layers[0].gradient_checkpointing
        again = gradients()
        assert all(torch.allclose(again[name], actual[name], atol=1e-5) for name in actual)
        actual = again
    for name, gradient in actual.items():
        # Positions beyond the longest series, and weights of the columns that fill up the last patch, have no part.
        if mode == "time" and name == "embeddings.position_embeddings":
            gradient = gradient[:9]
        if mode == "flat" and ".qkv." in name:
            query_and_key, gradient = gradient[:32].abs().max(), gradient[32:]
            assert query_and_key < 1e-5 * gradient.abs().max(), name
        assert gradient.abs().max() > 0, name
    if mode == "patches":
        patches = actual["embeddings.weight"].abs().amax(dim=2)
        assert (patches.flatten()[:WIDTH] > 0).all()
        assert (patches.flatten()[WIDTH:] == 0).all()


@pytest.mark.parametrize("branch", ["attention.proj", "fc2"])
@pytest.mark.parametrize("mode", MODES)
def test_dropout_acts_on_each_branch_and_in_training_only(mode: str, branch: str) -> None:
    """With the other branch silenced, two passes differ in training and agree in evaluation."""
    model, x = strong_encoder(mode, hidden_dropout_prob=0.5), inputs(mode)
    other = {"attention.proj": "fc2", "fc2": "attention.proj"}[branch]
    for layer in model.layers:
        for parameter in layer.get_submodule(other).parameters():
            torch.nn.init.zeros_(parameter)
    assert torch.equal(model(x).last_hidden_state, model(x).last_hidden_state)
    model.train()
    torch.manual_seed(0)
    assert error(model(x).last_hidden_state, model(x).last_hidden_state) > 0.01


@pytest.mark.parametrize("mode", MODES)
def test_bfloat16_autocast_runs(mode: str) -> None:
    """Forward and backward under autocast, near the float32 outputs; also with weights in bfloat16."""
    model, x = strong_encoder(mode), inputs(mode)
    expected = model(x).last_hidden_state
    mask = torch.ones(4, length(mode), dtype=torch.long)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states = model(x, attention_mask=mask).last_hidden_state
    assert error(states, expected) < 0.1
    states.float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    half = model.to(torch.bfloat16)(x, attention_mask=mask)
    assert half.last_hidden_state.dtype == half.pooler_output.dtype == torch.bfloat16
    assert error(half.last_hidden_state, expected) < 0.1


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_it_compiles_into_one_graph(mode: str) -> None:
    """No branch in forward depends on data."""
    model, x = strong_encoder(mode), inputs(mode)
    size = length(mode)
    positions, valid = torch.arange(size)[None].expand(4, -1), torch.ones(4, size, dtype=torch.bool)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    expected = model(x, attention_mask=valid, positions=positions).last_hidden_state
    assert error(compiled(x, attention_mask=valid, positions=positions).last_hidden_state, expected) < 1e-5
    torch.compiler.reset()


# ---- saving and loading


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_automodel_loads_what_was_saved(mode: str, tmp_path: Path) -> None:
    """Every parameter and the statistics of the features come back, and so does the output."""
    model, x = strong_encoder(mode), inputs(mode)
    model.save_pretrained(tmp_path)
    loaded, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is FeatureEncoderModel
    assert not any(report.values())
    state = model.state_dict()
    assert {"feature_mean", "feature_std"} <= state.keys()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in state.items())
    assert torch.equal(loaded(x).last_hidden_state, model(x).last_hidden_state)


@torch.no_grad()
def test_statistics_stay_in_float32_when_weights_are_loaded_in_bfloat16(tmp_path: Path) -> None:
    """bfloat16 cannot represent a mean of 1,001."""
    model = strong_encoder("patches")
    model.set_standardization([1001.0] * WIDTH, [0.5] * WIDTH)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.embeddings.weight.dtype == torch.bfloat16
    assert torch.equal(loaded.feature_mean, model.feature_mean)
    x = 1001.0 + 0.5 * inputs("patches")
    assert error(loaded(x).last_hidden_state.float(), model(x).last_hidden_state) < 0.1


def test_what_a_checkpoint_lacks_is_initialised(tmp_path: Path) -> None:
    """from_pretrained builds on the meta device: statistics that the file lacks are 0 and 1, weights are random."""
    model = strong_encoder("patches")
    state = model.state_dict()
    missing = {"feature_mean", "feature_std", "embeddings.position_embeddings", "norm.weight"}
    model.save_pretrained(tmp_path, state_dict={name: value for name, value in state.items() if name not in missing})
    loaded, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == missing
    assert torch.equal(loaded.feature_mean, torch.zeros(WIDTH))
    assert torch.equal(loaded.feature_std, torch.ones(WIDTH))
    assert torch.equal(loaded.norm.weight, torch.ones(16))
    assert 0.01 < loaded.embeddings.position_embeddings.std() < 0.03
    assert torch.equal(loaded.embeddings.weight, model.embeddings.weight)


@pytest.mark.parametrize("mode", MODES)
def test_weights_are_drawn_at_the_initializer_range(mode: str) -> None:
    """Matrices and tables at the given deviation, biases 0, norms 1 and 0."""
    torch.manual_seed(0)
    model = FeatureEncoderModel(tiny_config(mode, hidden_size=64, initializer_range=0.05))
    drawn = 0
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            assert (parameter == (1.0 if name.endswith("weight") else 0.0)).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.05, rel=0.1), name
            drawn += 1
    assert drawn == {"time": 10, "patches": 10, "flat": 9}[mode]


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mode", ["time", "patches"])
@pytest.mark.parametrize("subset", [False, True])
def test_masked_features_have_no_effect(mode: str, attention: str, garbage: float, subset: bool) -> None:
    """Outputs and gradients do not depend on features at masked or unread positions."""
    config = FeatureEncoderConfig(
        6, mode=mode, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=2
    )
    model = FeatureEncoderModel._from_config(config, attn_implementation=attention).eval()
    length = 5 if mode == "time" else 3
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, -1] = mask[1, :1] = 0
    clean = torch.randn(2, 5, 6) if mode == "time" else torch.randn(2, 6)
    dirty = clean.clone()
    if mode == "time":
        dirty[mask == 0] = garbage
    else:
        dirty[0, -2:] = dirty[1, :2] = garbage
    inputs: dict[str, torch.Tensor] = {"attention_mask": mask}
    if subset:
        positions = torch.tensor([[0, 1, 0], [1, 2, 0]])
        inputs = {"positions": positions, "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 0]])}
    results = []
    for features in (clean, dirty):
        model.zero_grad()
        output = model(features, **inputs)
        output.pooler_output.square().sum().backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        valid = inputs["attention_mask"].bool()
        results.append([output.pooler_output, output.last_hidden_state[valid], *gradients])
    for one, other in zip(*results, strict=True):
        assert one.isfinite().all()
        assert torch.equal(one, other)


def test_attentions_and_hidden_states_as_in_transformers() -> None:
    """Configuration and call decide on hidden states, attentions and tuples, as in transformers' models."""
    sizes = {"mode": "time", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = FeatureEncoderConfig(3, **sizes)
    model = FeatureEncoderModel._from_config(config, attn_implementation="eager").eval()
    features = torch.randn(2, 4, 3)
    output = model(features, output_attentions=True)
    assert [weights.shape for weights in output.attentions] == [(2, 2, 4, 4)] * 2
    torch.testing.assert_close(output.attentions[0].sum(dim=-1), torch.ones(2, 2, 4))
    assert output.hidden_states is None
    model.config.output_hidden_states = model.config.output_attentions = True
    output = model(features)
    assert len(output.hidden_states) == 3
    assert len(output.attentions) == 2
    model.config.return_dict = False
    last, pooled, states, weights = model(features)
    assert torch.equal(last, output.last_hidden_state)
    assert torch.equal(pooled, output.pooler_output)
    assert (len(states), len(weights)) == (3, 2)
    assert model(features[:0], return_dict=True).last_hidden_state.shape == (0, 4, 16)
