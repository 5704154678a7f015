"""Claims about the collator for features."""

import pickle
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_hf.errors import UsageError
from jepa_hf.masking.feature_collator import DataCollatorForFeatureJEPA
from jepa_hf.models.configuration_feature_encoder import FeatureEncoderConfig
from jepa_hf.models.modeling_feature_encoder import FeatureEncoderModel

few = settings(max_examples=40, deadline=None)

MODES = ("time", "patches", "flat")
CASES = [
    ("time", "drop"),
    ("time", "mask_token"),
    ("patches", "drop"),
    ("patches", "mask_token"),
    ("flat", "mask_token"),
]
WIDTH, PATCH = 31, 2  # 16 patches, the last of one feature
PATCHES = 16
FILL = np.arange(100, 100 + WIDTH, dtype=np.float32)

Batch = dict[str, torch.Tensor]


def collator(mode: str, masked_tokens: str = "mask_token", **options: Any) -> DataCollatorForFeatureJEPA:
    config = FeatureEncoderConfig(WIDTH, mode=mode, patch_size=PATCH, max_position_embeddings=64)
    return DataCollatorForFeatureJEPA(config, masked_tokens=masked_tokens, fill_values=FILL, **options)


def row(mode: str, seed: int, steps: int = 20) -> dict[str, np.ndarray]:
    shape = (steps, WIDTH) if mode == "time" else (WIDTH,)
    return {"features": np.random.default_rng(seed).standard_normal(shape).astype(np.float32)}


def flags(positions: torch.Tensor, valid: torch.Tensor, length: int) -> torch.Tensor:
    """`[B, M, K]` positions to `[B, M, length]` bool; fails if a position is listed twice."""
    counts = torch.zeros(*positions.shape[:2], length, dtype=torch.long)
    counts.scatter_add_(2, positions, valid.long())
    assert counts.max() <= 1
    return counts.bool()


def hidden(batch: Batch) -> torch.Tensor:
    """`[B, M, positions]`: read from the targets over time and patches, and from the view where it was kept."""
    length = batch["features"].shape[1] if batch["features"].dim() == 3 else PATCHES
    if "context_features" not in batch:
        return flags(batch["target_positions"], batch["target_valid"], length)
    clean, view = batch["features"], batch["context_features"]
    view = view[:, None] if view.dim() == clean.dim() else view
    changed = view != clean[:, None]
    if clean.dim() == 3:
        assert torch.equal(changed.any(dim=-1), changed.all(dim=-1))
        return changed.any(dim=-1)
    groups = [changed[..., first : first + PATCH] for first in range(0, WIDTH, PATCH)]
    assert all(torch.equal(group.any(dim=-1), group.all(dim=-1)) for group in groups)
    return torch.stack([group.any(dim=-1) for group in groups], dim=-1)


def masks_by_row(batches: Iterable[Batch]) -> dict[bytes, list[list[int]]]:
    """For each row's clean features, the hidden positions of each mask."""
    actual = {}
    for batch in batches:
        for number, (features, masks) in enumerate(zip(batch["features"], hidden(batch), strict=True)):
            if "attention_mask" in batch:
                features = features[batch["attention_mask"][number].bool()]
            actual[features.numpy().tobytes()] = [mask.nonzero().flatten().tolist() for mask in masks]
    return actual


# ---- the batch


@pytest.mark.parametrize("num_masks", [1, 3])
@pytest.mark.parametrize(("mode", "masked_tokens"), CASES)
def test_batch_keeps_the_contract(mode: str, masked_tokens: str, num_masks: int) -> None:
    """Keys, shapes and dtypes are those of the design's table, for each mode, one mask and several."""
    lengths = (20, 7, 13)
    rows = [row(mode, seed, steps) for seed, steps in enumerate(lengths)]
    batch = collator(mode, masked_tokens, num_masks=num_masks)(rows)
    shape = (3, 20, WIDTH) if mode == "time" else (3, WIDTH)
    targets = {"time": 6, "patches": 5, "flat": 1}[mode]
    expected = {
        "features": (shape, torch.float32),
        "target_positions": ((3, num_masks, targets), torch.long),
        "target_valid": ((3, num_masks, targets), torch.bool),
    }
    if mode == "time":
        expected["attention_mask"] = ((3, 20), torch.long)
    if masked_tokens == "mask_token":
        several = shape if num_masks == 1 else (3, num_masks, *shape[1:])
        expected["context_features"] = (several, torch.float32)
    else:
        visible = 14 if mode == "time" else 11
        expected["context_positions"] = ((3, num_masks, visible), torch.long)
        expected["context_valid"] = ((3, num_masks, visible), torch.bool)
    assert {name: (tuple(value.shape), value.dtype) for name, value in batch.items()} == expected
    for number, given_row in enumerate(rows):
        features = batch["features"][number].numpy()
        if mode == "time":
            assert batch["attention_mask"][number].tolist() == [1] * lengths[number] + [0] * (20 - lengths[number])
            assert (features[lengths[number] :] == 0).all()
            features = features[: lengths[number]]
        assert np.array_equal(features, given_row["features"])


OPTIONS = st.fixed_dictionaries(
    {
        "mask_ratio": st.floats(0.02, 0.98),
        "mean_span_length": st.sampled_from((None, 1.0, 3.5)),
        "num_masks": st.integers(1, 3),
        "max_length": st.sampled_from((None, 48)),
        "seed": st.integers(0, 2**40),
    }
)
LENGTHS = st.lists(st.integers(2, 48), min_size=1, max_size=5)


@pytest.mark.parametrize(("mode", "masked_tokens"), CASES)
@few
@given(options=OPTIONS, lengths=LENGTHS)
def test_the_number_hidden_is_exact(mode: str, masked_tokens: str, options: dict[str, Any], lengths: list[int]) -> None:
    """Each mask hides round(ratio × positions), at least one, and leaves at least one; padding is never hidden."""
    batch = collator(mode, masked_tokens, **options)([row(mode, seed, n) for seed, n in enumerate(lengths)])
    actual = hidden(batch)
    for number, steps in enumerate(lengths):
        count = steps if mode == "time" else PATCHES
        expected = min(max(round(count * options["mask_ratio"]), 1), count - 1)
        assert actual[number].sum(dim=-1).tolist() == [expected] * options["num_masks"]
        assert not actual[number, :, count:].any()


@pytest.mark.parametrize("mode", ["time", "patches"])
@few
@given(options=OPTIONS, lengths=LENGTHS)
def test_visible_hidden_and_padding_make_up_the_row(mode: str, options: dict[str, Any], lengths: list[int]) -> None:
    """Dropped: each position is visible, hidden or padding, and only one of these."""
    batch = collator(mode, "drop", **options)([row(mode, seed, n) for seed, n in enumerate(lengths)])
    actual = hidden(batch)
    visible = flags(batch["context_positions"], batch["context_valid"], actual.shape[-1])
    padding = batch["attention_mask"][:, None] == 0 if mode == "time" else torch.zeros(1, 1, PATCHES, dtype=torch.bool)
    assert (actual.long() + visible.long() + padding.long() == 1).all()


@pytest.mark.parametrize("mode", ["time", "patches"])
@few
@given(options=OPTIONS, lengths=LENGTHS)
def test_kept_view_holds_the_fill_values_at_the_targets_alone(
    mode: str, options: dict[str, Any], lengths: list[int]
) -> None:
    """`context_features` is `features` with `fill_values` at the steps, or in the patches, that are targets."""
    batch = collator(mode, "mask_token", **options)([row(mode, seed, n) for seed, n in enumerate(lengths)])
    clean = batch["features"][:, None]
    view = batch["context_features"].reshape(len(lengths), options["num_masks"], *clean.shape[2:])
    length = clean.shape[2] if mode == "time" else PATCHES
    targets = flags(batch["target_positions"], batch["target_valid"], length)
    targets = targets[..., None] if mode == "time" else targets.repeat_interleave(PATCH, dim=-1)[..., :WIDTH]
    assert torch.equal(view, torch.where(targets, torch.from_numpy(FILL), clean))


@few
@given(options=OPTIONS, count=st.integers(1, 4))
def test_flat_hides_groups_of_features_and_targets_the_vector(options: dict[str, Any], count: int) -> None:
    """Groups of `patch_size` neighbours get the fill values; the only target is position 0, valid in each mask."""
    batch = collator("flat", **options)([row("flat", seed) for seed in range(count)])
    assert torch.equal(batch["target_positions"], torch.zeros(count, options["num_masks"], 1, dtype=torch.long))
    assert batch["target_valid"].shape == batch["target_positions"].shape
    assert batch["target_valid"].all()
    clean = batch["features"][:, None]
    view = batch["context_features"].reshape(count, options["num_masks"], WIDTH)
    columns = hidden(batch).repeat_interleave(PATCH, dim=-1)[..., :WIDTH]
    assert torch.equal(view, torch.where(columns, torch.from_numpy(FILL), clean))


def test_fill_values_are_zeros_by_default() -> None:
    config = FeatureEncoderConfig(WIDTH, mode="flat", patch_size=PATCH)
    batch = DataCollatorForFeatureJEPA(config, masked_tokens="mask_token")([row("flat", 0)])
    assert sorted(set(batch["context_features"][batch["context_features"] != batch["features"]].tolist())) == [0.0]


@pytest.mark.parametrize(("mode", "mean"), [("time", 5.0), ("patches", 1.0), ("flat", 1.0)])
def test_spans_are_of_five_steps_and_of_one_patch_by_default(mode: str, mean: float) -> None:
    """The summary for the model card says so, and the masks are those of the same mean given by hand."""
    default, by_hand = collator(mode), collator(mode, mean_span_length=mean)
    other = collator(mode, mean_span_length=6.0 - mean)
    assert default.card_settings == {"mask ratio": 0.3, "mean span length": mean}
    rows = [row(mode, seed, 40) for seed in range(8)]
    masks = masks_by_row([default(rows)])
    assert masks == masks_by_row([by_hand(rows)])
    assert masks != masks_by_row([other(rows)])


# ---- what the masks depend on


@pytest.mark.parametrize(("mode", "masked_tokens"), CASES)
@few
@given(lengths=LENGTHS, order=st.randoms(use_true_random=False), size=st.integers(1, 3), steps=st.integers(48, 64))
def test_masks_depend_neither_on_batch_size_nor_on_order_nor_on_padding(
    mode: str, masked_tokens: str, lengths: list[int], order: Any, size: int, steps: int
) -> None:
    """One batch, or the shuffled rows in small batches, padded further: each row has the same masks."""
    rows = [row(mode, seed, n) for seed, n in enumerate(lengths)]
    together = masks_by_row([collator(mode, masked_tokens, num_masks=2)(rows)])
    shuffled = order.sample(rows, len(rows))
    padded = collator(mode, masked_tokens, num_masks=2, max_length=steps)
    apart = masks_by_row(padded(shuffled[i : i + size]) for i in range(0, len(rows), size))
    assert together == apart
    assert len(together) == len(rows)


@pytest.mark.parametrize("mode", MODES)
def test_masks_differ_by_epoch_number_seed_and_content(mode: str) -> None:
    """Epoch, number of the mask, seed, and a change of one feature: each alone gives other masks; nothing else does."""
    rows = [row(mode, seed, 40) for seed in range(6)]
    first = collator(mode, num_masks=3)
    masks = masks_by_row([first(rows)])
    assert masks == masks_by_row([first(rows)])
    assert all(len({tuple(mask) for mask in of_row}) == 3 for of_row in masks.values())
    assert len({tuple(of_row[0]) for of_row in masks.values()}) == 6
    assert masks_by_row([collator(mode, num_masks=3, seed=43)(rows)]) != masks
    assert masks_by_row([first.for_evaluation()(rows)]) != masks
    first.epoch = 1
    next_epoch = masks_by_row([first(rows)])
    assert next_epoch.keys() == masks.keys()
    assert all(next_epoch[name] != masks[name] for name in masks)
    changed = rows[0]["features"].copy()
    changed.flat[-1] += 1e-3
    assert not torch.equal(hidden(first([{"features": changed}])), hidden(first(rows[:1])))


def test_a_copy_in_a_worker_masks_alike() -> None:
    """What a spawned worker unpickles gives the same batch."""
    original, rows = collator("time", "drop", num_masks=2), [row("time", seed) for seed in range(3)]
    batch, copied = original(rows), pickle.loads(pickle.dumps(original))(rows)
    assert batch.keys() == copied.keys()
    assert all(torch.equal(batch[name], copied[name]) for name in batch)


@pytest.mark.parametrize("mode", ["patches", "flat"])
def test_every_patch_is_hidden_equally_often(mode: str) -> None:
    """Over 4,000 masks each of 16 patches is hidden within five standard deviations of its share."""
    batch = collator(mode, num_masks=4)([row(mode, seed) for seed in range(1000)])
    counts, share = hidden(batch).sum(dim=(0, 1)).float(), 5 / PATCHES
    assert counts.sum() == 4000 * 5
    assert (counts - 4000 * share).abs().max() < 5 * (4000 * share * (1 - share)) ** 0.5


def test_every_step_is_hidden_about_equally_often() -> None:
    """Over 8,000 masks each of 60 steps is hidden within a tenth of its share: the ends are not left out."""
    batch = collator("time", "drop", num_masks=4)([row("time", seed, 60) for seed in range(2000)])
    counts, share = hidden(batch).sum(dim=(0, 1)).float(), 18 / 60
    assert counts.sum() == 8000 * 18
    assert (counts / (8000 * share) - 1).abs().max() < 0.1


# ---- short rows, static shapes


@pytest.mark.parametrize("masked_tokens", ["mask_token", "drop"])
@pytest.mark.parametrize("steps", [0, 1])
def test_a_series_of_fewer_than_two_steps_is_refused_or_has_no_target(masked_tokens: str, steps: int) -> None:
    """With "error" the row is named; with "skip" it is in the batch, fully visible, and the others are unchanged."""
    rows = [row("time", 0), row("time", 1, steps), row("time", 2)]
    with pytest.raises(UsageError, match=r"Row 1 .*fewer than two steps"):
        collator("time", masked_tokens)(rows)
    batch = collator("time", masked_tokens, on_too_short="skip")(rows)
    assert batch["target_valid"].any(dim=-1).flatten().tolist() == [True, False, True]
    assert batch["attention_mask"].sum(dim=1).tolist() == [20, steps, 20]
    if masked_tokens == "mask_token":
        assert torch.equal(batch["context_features"][1], batch["features"][1])
    else:
        assert batch["context_valid"][1].sum() == steps
    others = collator("time", masked_tokens)([rows[0], rows[2]])
    assert masks_by_row([others]).items() <= masks_by_row([batch]).items()
    alone = collator("time", masked_tokens, on_too_short="skip")(rows[1:2])
    assert alone["features"].shape == (1, 1, WIDTH)
    assert not alone["target_valid"].any()


@few
@given(
    st.floats(0.02, 0.98),
    st.sampled_from(("mask_token", "drop")),
    st.lists(st.lists(st.integers(0, 33), min_size=2, max_size=2), min_size=2, max_size=4),
)
def test_max_length_gives_the_same_shapes_for_every_batch(
    ratio: float, masked_tokens: str, batches: list[list[int]]
) -> None:
    """Short, long and mixed series at any ratio: one set of shapes, no wider than a full series needs."""
    static = collator("time", masked_tokens, mask_ratio=ratio, max_length=33, num_masks=2, on_too_short="skip")
    shapes = set()
    for lengths in [[33, 33], *batches]:
        batch = static([row("time", seed, n) for seed, n in enumerate(lengths)])
        shapes.add(tuple((name, tuple(value.shape)) for name, value in batch.items()))
    assert len(shapes) == 1
    hides = min(max(round(33 * ratio), 1), 32)
    actual = dict(shapes.pop())
    assert actual["features"] == (2, 33, WIDTH)
    assert actual["target_positions"] == (2, 2, hides)
    assert masked_tokens == "mask_token" or actual["context_positions"] == (2, 2, 33 - hides)


# ---- input


def test_rows_may_be_lists_arrays_or_tensors_and_hold_other_columns() -> None:
    """All give the same batch; further columns are left out."""
    features = row("time", 0)["features"]
    collate = collator("time", "drop")
    expected = collate([{"features": features}])
    for same in (features.tolist(), features.astype(np.float64), torch.from_numpy(features), features.T.copy().T):
        batch = collate([{"features": same, "label": 3, "name": "x"}])
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[name], expected[name]) for name in batch)


@pytest.mark.parametrize(
    ("mode", "features", "message"),
    [
        ("patches", np.zeros(30), r"row 1 .*\(30,\), not \[31\]"),
        ("flat", np.zeros((2, 31)), r"row 1 .*\(2, 31\), not \[31\]"),
        ("time", np.zeros(31), r"row 1 .*\(31,\), not \[steps, 31\]"),
        ("time", np.zeros((5, 30)), r"row 1 .*\(5, 30\), not \[steps, 31\]"),
        ("time", [[0.0] * 31, [0.0] * 30], r"row 1 .*not a rectangle of numbers"),
        ("flat", ["a"] * 31, r"row 1 .*not a rectangle of numbers"),
        ("time", np.zeros((65, 31)), r"Row 1 .*65 steps, more than max_position_embeddings 64"),
    ],
)
def test_rows_of_another_shape_are_refused(mode: str, features: Any, message: str) -> None:
    """The row, what it is and what it should be are named."""
    with pytest.raises(UsageError, match=message):
        collator(mode)([row(mode, 0), {"features": features}])


def test_a_series_longer_than_max_length_is_refused() -> None:
    collate = collator("time", max_length=16)
    assert collate([row("time", 0, 16)])["features"].shape == (1, 16, WIDTH)
    with pytest.raises(UsageError, match=r"Row 1 .*17 steps, more than max_length 16"):
        collate([row("time", 0, 9), row("time", 0, 17)])


@pytest.mark.parametrize(
    ("mode", "options", "message"),
    [
        ("time", {"mask_ratio": 0.0}, "mask_ratio must lie strictly between 0 and 1, not 0.0"),
        ("time", {"mask_ratio": float("nan")}, "mask_ratio must lie strictly between 0 and 1"),
        ("time", {"mean_span_length": 0.5}, "mean_span_length must be at least 1, not 0.5"),
        ("time", {"masked_tokens": "both"}, "masked_tokens must be drop or mask_token, not 'both'"),
        ("time", {"num_masks": 0}, "num_masks must be at least 1, not 0"),
        ("time", {"on_too_short": "cut"}, "on_too_short must be error or skip, not 'cut'"),
        ("time", {"max_length": 65}, "max_length must lie between 2 and .* 64, not 65"),
        ("time", {"max_length": 1}, "max_length must lie between 2 and .* 64, not 1"),
        ("flat", {"masked_tokens": "drop"}, "mode flat .*--masked_tokens mask_token"),
        ("patches", {"fill_values": [0.0] * 30}, r"fill_values .*input_dim 31 .*\(30,\)"),
    ],
)
def test_bad_options_are_refused_by_name(mode: str, options: dict[str, Any], message: str) -> None:
    config = FeatureEncoderConfig(WIDTH, mode=mode, patch_size=PATCH, max_position_embeddings=64)
    with pytest.raises(UsageError, match=message):
        DataCollatorForFeatureJEPA(config, **({"masked_tokens": "mask_token"} | options))


@pytest.mark.parametrize("mode", ["patches", "flat"])
def test_one_patch_is_too_few(mode: str) -> None:
    """One must be hidden and one left."""
    with pytest.raises(UsageError, match="patch_size 31 makes one patch of 31 features"):
        DataCollatorForFeatureJEPA(FeatureEncoderConfig(WIDTH, mode=mode, patch_size=WIDTH), masked_tokens="mask_token")


# ---- with the encoder


@pytest.mark.parametrize(("mode", "masked_tokens"), CASES)
@torch.no_grad()
def test_the_encoder_reads_what_the_collator_makes(mode: str, masked_tokens: str) -> None:
    """Both views have the encoder's shapes; what is hidden does not reach the context view's representations."""
    torch.set_num_threads(1)
    collate = collator(mode, masked_tokens)
    model = FeatureEncoderModel(
        FeatureEncoderConfig(
            WIDTH, mode=mode, patch_size=PATCH, max_position_embeddings=64, hidden_size=16, num_hidden_layers=1
        )
    ).eval()
    batch = collate([row(mode, seed, steps) for seed, steps in enumerate((12, 20))])
    mask = batch.get("attention_mask")
    assert model(batch["features"], attention_mask=mask).last_hidden_state.isfinite().all()
    if masked_tokens == "mask_token":
        assert model(batch["context_features"], attention_mask=mask).last_hidden_state.isfinite().all()
        return
    view = {"positions": batch["context_positions"][:, 0], "attention_mask": batch["context_valid"][:, 0]}
    expected = model(batch["features"], **view).last_hidden_state
    columns = hidden(batch)[:, 0]
    columns = columns[..., None] if mode == "time" else columns.repeat_interleave(PATCH, dim=1)[:, :WIDTH]
    other = torch.where(columns, 50.0, batch["features"])
    assert not torch.equal(other, batch["features"])
    valid = view["attention_mask"]
    assert torch.equal(model(other, **view).last_hidden_state[valid], expected[valid])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_that_rows_bring_is_removed(side: str) -> None:
    """A padded series with its mask gives the batch of the series alone, whatever the padding holds."""
    rows = [row("time", seed, steps=6) for seed in range(3)]
    padding = np.full((4, rows[0]["features"].shape[1]), np.nan, dtype=np.float32)
    padded = []
    for series in (entry["features"] for entry in rows):
        order = slice(None, None, 1 if side == "left" else -1)
        values = np.concatenate([padding, series][order])
        padded.append({"features": values, "attention_mask": ([0] * 4 + [1] * 6)[order]})
    expected, batch = collator("time")(rows), collator("time")(padded)
    assert batch.keys() == expected.keys()
    for name, value in batch.items():
        assert value.equal(expected[name]), name


@pytest.mark.parametrize(("mask", "message"), [([1, 0, 1, 1], "zeros between"), ([1, 1], r"shape \[2\] for 4 steps")])
def test_masks_that_are_no_padding_are_refused(mask: list[int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        collator("time")([{**row("time", 0, steps=4), "attention_mask": mask}])
