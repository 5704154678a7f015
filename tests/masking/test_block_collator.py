"""Claims about the block collator."""

import io
import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader
from transformers import CLIPImageProcessorPil, IJepaConfig, ViTImageProcessorPil

from jepa_hf import JepaConfig, JepaForRepresentationPrediction
from jepa_hf.errors import UsageError
from jepa_hf.masking.block_collator import DataCollatorForBlockJEPA, _crop_box
from jepa_hf.masking.block_sampling import BlockSampler
from jepa_hf.masking.counter_rng import uniform_draws

torch.set_num_threads(1)
few = settings(max_examples=40, deadline=None)
GRID = (8, 8)
PROCESSOR = ViTImageProcessorPil(size={"height": 32, "width": 32})

Batch = dict[str, torch.Tensor]


def picture(seed: int = 0, width: int = 32, height: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def stored(data: bytes | None, path: str | None = None) -> dict[str, Any]:
    """A row as `datasets.Image(decode=False)` gives it."""
    return {"image": {"bytes": data, "path": path}}


def rows(count: int) -> list[dict[str, Any]]:
    return [stored(encoded(picture(seed))) for seed in range(count)]


def collator(**arguments: Any) -> DataCollatorForBlockJEPA:
    return DataCollatorForBlockJEPA(**{"image_processor": PROCESSOR, "grid": GRID, **arguments})


def augmenting(**arguments: Any) -> DataCollatorForBlockJEPA:
    return collator(random_resized_crop=(0.3, 1.0), random_flip=True, **arguments)


def same(one: Batch, other: Batch) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def samples(batches: list[Batch] | DataLoader) -> list[Batch]:
    """The samples of all batches, one by one."""
    return [
        {name: tensor[row] for name, tensor in batch.items()}
        for batch in batches
        for row in range(len(batch["pixel_values"]))
    ]


def flags(positions: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """`[B, M, K]` positions to `[B, M, patches]` bool; fails if a position is listed twice."""
    counts = torch.zeros(*positions.shape[:2], GRID[0] * GRID[1], dtype=torch.long)
    counts.scatter_add_(2, positions, valid.long())
    assert counts.max() <= 1
    return counts.bool()


@few
@given(count=st.integers(1, 12), num_masks=st.integers(1, 5), seed=st.integers(0, 2**32), epoch=st.integers(0, 50))
def test_a_batch_has_fixed_shapes_and_disjoint_views(count: int, num_masks: int, seed: int, epoch: int) -> None:
    """T and C are those of the sampler whatever the batch; all of the context is valid, and none of it a target."""
    make = collator(num_masks=num_masks, seed=seed)
    make.epoch = epoch
    batch = make(rows(count))
    most, context = BlockSampler(GRID).largest_target, BlockSampler(GRID, num_masks).default_num_context
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in batch.items()} == {
        "pixel_values": ((count, 3, 32, 32), torch.float32),
        "target_positions": ((count, num_masks, most), torch.long),
        "target_valid": ((count, num_masks, most), torch.bool),
        "context_positions": ((count, 1, context), torch.long),
        "context_valid": ((count, 1, context), torch.bool),
    }
    assert batch["context_valid"].all()
    targets = flags(batch["target_positions"], batch["target_valid"])
    assert targets.any(dim=-1).any(dim=-1).all()
    assert not (targets & flags(batch["context_positions"], batch["context_valid"])).any()
    assert (batch["target_positions"][~batch["target_valid"]] == 0).all()


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """The keys that the collator draws with: those of its last masks and those of its last augmentation."""
    noted: dict[str, np.ndarray] = {}

    sample_masks = BlockSampler.sample

    def sample(self: BlockSampler, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        noted["masks"] = keys
        return sample_masks(self, keys)

    def draw(keys: np.ndarray, *arguments: int) -> np.ndarray:
        noted["augmentation"] = keys
        return uniform_draws(keys, *arguments)

    monkeypatch.setattr(BlockSampler, "sample", sample)
    monkeypatch.setattr("jepa_hf.masking.block_collator.uniform_draws", draw)
    return noted


def test_masks_are_those_of_the_sampler(keys: dict[str, np.ndarray]) -> None:
    """Under settings other than the defaults: targets and context are what the sampler draws for the same keys."""
    shape = {"target_scale": (0.05, 0.1), "target_aspect_ratio": (1.0, 2.0), "context_scale": (0.3, 0.4)}
    batch = collator(num_masks=2, **shape)(rows(20))
    targets, context = BlockSampler(GRID, 2, **shape).sample(keys["masks"])
    assert np.array_equal(flags(batch["target_positions"], batch["target_valid"]), targets)
    assert np.array_equal(flags(batch["context_positions"], batch["context_valid"])[:, 0], context)
    assert batch["target_positions"].shape[-1] == BlockSampler(GRID, 2, **shape).largest_target


def test_masks_and_augmentation_draw_from_two_streams(keys: dict[str, np.ndarray]) -> None:
    """A crop is independent of the blocks: no two of the 40 keys of 20 images are the same."""
    augmenting()(rows(20))
    assert len({*keys["masks"].tolist(), *keys["augmentation"].tolist()}) == 40


@pytest.mark.parametrize(
    "processor",
    [
        PROCESSOR,
        ViTImageProcessorPil(size={"height": 16, "width": 48}, do_normalize=False),
        ViTImageProcessorPil(size={"height": 40, "width": 40}, do_rescale=False, do_normalize=False),
        CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}),
    ],
    ids=["plain", "oblong", "bytes", "centre crop"],
)
def test_without_augmentation_pixels_are_the_processor_s(processor: Any) -> None:
    """Images of several sizes: bit for bit what the image processor itself makes of them."""
    images = [picture(1), picture(2, 50, 40), picture(3, 41, 64)]
    batch = collator(image_processor=processor)([{"image": image} for image in images])
    assert torch.equal(batch["pixel_values"], processor(images, return_tensors="pt")["pixel_values"].float())


@pytest.mark.parametrize(
    "processor",
    [PROCESSOR, CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32})],
    ids=["plain", "centre crop"],
)
def test_a_crop_of_everything_is_the_image_resized_to_the_model_s_size(processor: Any) -> None:
    """The processor neither resizes nor crops once more: a square image, cropped to all of it, is only resized."""
    image = picture(0, 64, 64)
    batch = collator(image_processor=processor, random_resized_crop=(1.0, 1.0))([{"image": image}])
    small = image.resize((32, 32), processor.resample)
    expected = processor(small, do_resize=False, do_center_crop=False, return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], expected)


UNIFORM = st.floats(0, 1, exclude_max=True)


@settings(max_examples=300, deadline=None)
@given(
    width=st.integers(1, 2000),
    height=st.integers(1, 2000),
    scale=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted).map(tuple),
    draws=st.tuples(UNIFORM, UNIFORM, UNIFORM, UNIFORM),
)
def test_a_crop_lies_in_the_image_and_in_its_ranges(
    width: int, height: int, scale: tuple[float, float], draws: tuple[float, float, float, float]
) -> None:
    """Aspect ratio always from 3/4 to 4/3; the area is in its range, or the largest that fits with such a ratio."""
    left, top, right, bottom = _crop_box(width, height, scale, *draws)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    aspect, area = (right - left) / (bottom - top), (right - left) * (bottom - top) / (width * height)
    assert 0.749 < aspect < 1.334
    largest = min(4 / 3 * height / width, 4 / 3 * width / height, 1)
    assert min(scale[0], largest) * 0.999 < area < scale[1] * 1.001


def test_crops_are_spread_over_their_ranges() -> None:
    """On a square image the area is uniform and every place is reached; elongated ones are not always cut in the
    middle."""
    draws = np.random.default_rng(0).random((20_000, 4))
    boxes = np.array([_crop_box(100, 100, (0.2, 0.7), *draw) for draw in draws.tolist()])
    size = boxes[:, 2:] - boxes[:, :2]
    area = size.prod(axis=1) / 10_000
    tenths = np.histogram(area, bins=10, range=(0.2, 0.7))[0]
    assert np.abs(tenths - 2000).max() < 5 * np.sqrt(2000)
    assert abs(np.corrcoef(area, np.log(size[:, 0] / size[:, 1]))[0, 1]) < 0.03
    place = boxes[:, :2] / (100 - size)
    assert np.abs(place.mean(axis=0) - 0.5).max() < 0.02
    assert np.abs(np.corrcoef(place.T)[0, 1]) < 0.03
    long = np.array([_crop_box(400, 100, (0.9, 1.0), *draw) for draw in draws[:1000].tolist()])
    assert long[:, 0].min() < 10
    assert long[:, 2].max() > 390


def test_a_crop_is_that_part_of_the_image() -> None:
    """On a picture of its own coordinates, what the model sees are neighbouring coordinates in the right order, from a
    part as large as the range says, other parts for other images, none of them stretched beyond 4/3."""
    ramp = np.arange(128, dtype=np.uint8)
    images = [
        np.stack([*np.meshgrid(ramp, ramp), np.full((128, 128), number, np.uint8)], axis=2) for number in range(40)
    ]
    plain = ViTImageProcessorPil(size={"height": 32, "width": 32}, do_rescale=False, do_normalize=False)
    batch = collator(image_processor=plain, random_resized_crop=(0.25, 0.5))([{"image": image} for image in images])
    x, y, number = batch["pixel_values"].unbind(dim=1)
    assert (number == torch.arange(40.0)[:, None, None]).all()
    across, down = x.diff(dim=2).mean(dim=(1, 2)), y.diff(dim=1).mean(dim=(1, 2))
    assert (across > 0).all()
    assert (down > 0).all()
    area = (across * 32 / 128) * (down * 32 / 128)
    assert 0.22 < area.min() < 0.3
    assert 0.45 < area.max() < 0.53
    assert (across / down).log().abs().max() < np.log(4 / 3) * 1.1
    assert x[:, 0, 0].unique().numel() > 15


def test_about_half_of_the_images_are_mirrored_exactly() -> None:
    """Every image comes out as it is or mirrored left to right; its masks do not change."""
    data = rows(400)
    batch = collator(random_flip=True)(data)
    plain = collator()(data)
    kept = (batch["pixel_values"] == plain["pixel_values"]).flatten(1).all(dim=1)
    mirrored = (batch["pixel_values"] == plain["pixel_values"].flip(-1)).flatten(1).all(dim=1)
    assert (kept ^ mirrored).all()
    assert 160 < mirrored.sum() < 240
    assert all(torch.equal(batch[name], plain[name]) for name in batch if name != "pixel_values")


def test_a_sample_depends_on_neither_its_batch_nor_the_workers() -> None:
    """Batches of 1, 7 and 40, in reverse, in two workers: the same pixels and masks, augmented ones included."""
    data = rows(40)
    expected = samples([augmenting()(data)])
    for batches in (
        DataLoader(data, 1, collate_fn=augmenting()),
        DataLoader(data, 7, collate_fn=augmenting()),
        DataLoader(data, 7, collate_fn=augmenting(), num_workers=2),
        DataLoader(data, 7, collate_fn=pickle.loads(pickle.dumps(augmenting()))),
    ):
        actual = samples(batches)
        assert len(actual) == 40
        assert all(same(one, other) for one, other in zip(actual, expected, strict=True))
    backwards = samples([augmenting()(data[::-1])])[::-1]
    assert all(same(one, other) for one, other in zip(backwards, expected, strict=True))


def test_epoch_and_seed_change_pixels_and_masks_and_come_back() -> None:
    """Workers that live on see the new epoch; the same epoch gives the same batch again."""
    data, make = rows(12), augmenting()
    loader = DataLoader(data, 12, collate_fn=make, num_workers=1, persistent_workers=True)
    epochs = []
    for epoch in (0, 1, 0):
        make.epoch = epoch
        epochs.append(next(iter(loader)))
    assert same(epochs[0], epochs[2])
    for other in (epochs[1], augmenting(seed=43)(data)):
        for one, two in zip(samples([epochs[0]]), samples([other]), strict=True):
            assert not torch.equal(one["pixel_values"], two["pixel_values"])
            assert not torch.equal(one["target_positions"], two["target_positions"])


def test_evaluation_does_not_augment_and_its_masks_stay() -> None:
    """Pixels are the processor's, masks are the same in every epoch and not those of training, which goes on."""
    data, training = rows(10), augmenting()
    evaluation = training.for_evaluation()
    fixed = evaluation(data)
    assert torch.equal(fixed["pixel_values"], collator()(data)["pixel_values"])
    for epoch in range(3):
        training.epoch = epoch
        assert same(evaluation(data), fixed)
        batch = training(data)
        for one, two in zip(samples([batch]), samples([fixed]), strict=True):
            assert not torch.equal(one["pixel_values"], two["pixel_values"])
            assert not torch.equal(one["target_positions"], two["target_positions"])


def test_every_form_of_an_image_gives_the_same_batch(tmp_path: Path) -> None:
    """Bytes, a path, a PIL image and an array: pixels and masks alike; further columns do not matter."""
    image = picture(5, 40, 30)
    path = tmp_path / "a.png"
    path.write_bytes(encoded(image))
    make = augmenting()
    expected = make([{"image": image}])
    for row in (
        stored(encoded(image)),
        stored(encoded(image), "nowhere.png"),
        stored(encoded(image, "BMP")),
        stored(None, str(path)),
        {"image": np.asarray(image), "label": 3},
    ):
        assert same(make([row]), expected)
    assert same(collator(image_column_name="img")([{"img": image}]), collator()([{"image": image}]))


def test_other_pixels_or_another_size_give_other_masks() -> None:
    """One changed value and the same bytes in another shape count as other content."""
    array = np.zeros((4, 6, 3), dtype=np.uint8)
    changed = array.copy()
    changed[3, 5, 2] = 1
    batch = collator()([{"image": value} for value in (array, changed, array.reshape(6, 4, 3), array)])
    first, second, third, fourth = batch["target_positions"]
    assert torch.equal(first, fourth)
    assert not torch.equal(first, second)
    assert not torch.equal(first, third)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("num_channels", [1, 3])
def test_every_mode_becomes_what_the_model_reads(mode: str, num_channels: int) -> None:
    """A grey picture in any mode of PIL comes out as the same grey, in one channel or in three."""
    plain = ViTImageProcessorPil(size={"height": 32, "width": 32}, do_rescale=False, do_normalize=False)
    grey = Image.new("L", (32, 32), 0)
    grey.paste(255, (0, 0, 16, 32))
    image = grey.convert("RGB").convert(mode) if mode != "I;16" else Image.fromarray(np.asarray(grey) * np.uint16(257))
    assert image.mode == mode
    data = encoded(image, "TIFF" if mode == "CMYK" else "PNG")
    batch = collator(image_processor=plain, num_channels=num_channels)([stored(data)])
    expected = torch.from_numpy(np.asarray(grey).copy()).float().expand(1, num_channels, 32, 32)
    assert torch.equal(batch["pixel_values"], expected)


def test_sixteen_bits_keep_their_shades() -> None:
    """Values beyond 255 are scaled down, not clipped."""
    ramp = (np.arange(32 * 32).reshape(32, 32) * 64).astype(np.uint16)
    plain = ViTImageProcessorPil(size={"height": 32, "width": 32}, do_rescale=False, do_normalize=False)
    batch = collator(image_processor=plain, num_channels=1)([stored(encoded(Image.fromarray(ramp)))])
    assert torch.equal(batch["pixel_values"][0, 0], torch.from_numpy((ramp // 256).astype(np.float32)))


def test_grey_arrays_may_have_a_channel() -> None:
    array = np.asarray(picture().convert("L"))
    grey = ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.5], image_std=[0.5])
    make = collator(image_processor=grey, num_channels=1)
    assert make([{"image": array}])["pixel_values"].shape == (1, 1, 32, 32)
    assert same(make([{"image": array}]), make([{"image": array[:, :, None]}]))


def test_photographs_are_turned_upright() -> None:
    """The orientation in a camera's metadata is applied, as `datasets` does."""
    image = picture(0, 32, 32)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    batch = collator()([stored(encoded(image, exif=exif)), {"image": image.transpose(Image.Transpose.ROTATE_270)}])
    assert torch.equal(batch["pixel_values"][0], batch["pixel_values"][1])
    assert not torch.equal(batch["pixel_values"][0], collator()([{"image": image}])["pixel_values"][0])


DAMAGED = {
    "nothing": b"",
    "text": b"This is not an image.",
    "truncated PNG": encoded(picture(9))[:900],
    "truncated JPEG": encoded(picture(9), "JPEG")[:700],
    "half a header": encoded(picture(9))[:20],
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_image_is_skipped_and_named(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is black, without targets and context; its neighbours are as they would be without it; the warning has its
    path, or the row and the column."""
    path = tmp_path / "bad.png"
    path.write_bytes(DAMAGED[kind])
    good = rows(2)
    make = augmenting()
    with caplog.at_level(logging.WARNING):
        batch = make([good[0], stored(DAMAGED[kind]), good[1], stored(None, str(path))])
    expected = make(good)
    assert same({name: tensor[[0, 2]] for name, tensor in batch.items()}, expected)
    black = PROCESSOR(Image.new("RGB", (32, 32)), return_tensors="pt")["pixel_values"][0]
    for row in (1, 3):
        assert torch.equal(batch["pixel_values"][row], black)
        assert not batch["target_valid"][row].any()
        assert not batch["context_valid"][row].any()
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "Row 1 of the batch, column 'image'" in caplog.messages[0]
    assert f"'{path}'" in caplog.messages[1]


def test_a_damaged_image_is_named_once_a_process(caplog: pytest.LogCaptureFixture) -> None:
    """In every epoch, in training and evaluation: one warning for each of two images."""
    make = collator()
    data = [stored(b"one", "a.png"), stored(b"two"), stored(b"one", "a.png")]
    with caplog.at_level(logging.WARNING):
        for epoch in range(3):
            make.epoch = epoch
            make(data)
            make.for_evaluation()(data[::-1])
    assert len(caplog.records) == 2


def test_a_batch_of_damaged_images_has_the_usual_shapes() -> None:
    """So that all ranks go on alike; a null and a decompression bomb count as damaged."""
    good = collator()(rows(3))
    bad = collator()([stored(b""), stored(None), {"image": None}])
    assert {name: tensor.shape for name, tensor in bad.items()} == {name: tensor.shape for name, tensor in good.items()}
    assert not bad["target_valid"].any()
    assert not bad["context_valid"].any()


def test_a_decompression_bomb_is_skipped(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """PIL refuses an image of more than twice its limit of pixels, before it takes the memory."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 32 * 32)
    with caplog.at_level(logging.WARNING):
        batch = collator()([stored(encoded(picture(0, 64, 64)), "bomb.png"), stored(encoded(picture(1)))])
    assert batch["target_valid"].flatten(1).any(dim=1).tolist() == [False, True]
    assert "'bomb.png'" in caplog.text
    assert "decompression bomb" in caplog.text


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"]),
    changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=30),
    length=st.integers(0, 10**6),
)
@pytest.mark.filterwarnings("ignore")
def test_no_damage_stops_a_run(kind: str, changes: list[tuple[int, int]], length: int) -> None:
    """Any bytes changed, any length cut, in every format: the row is decoded or skipped, its neighbor is unchanged."""
    data = bytearray(encoded(picture(3, 8, 8), kind))
    for place, value in changes:
        data[place % min(len(data), 100)] = value
    data = bytes(data[: length % len(data) + 1]) if length % 3 == 0 else bytes(data)
    batch = augmenting()([stored(data), stored(encoded(picture(4)))])
    assert batch["pixel_values"].isfinite().all()
    assert batch["target_valid"][0].any() == batch["context_valid"][0].all() == batch["context_valid"][0].any()
    assert same(samples([batch])[1], samples([augmenting()([stored(encoded(picture(4)))])])[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grid": (1, 1)}, r"grid .*two patches.*patch_size"),
        ({"grid": (0, 8)}, r"grid .*\(0, 8\)"),
        ({"grid": (7, 8)}, r"32 x 32 pixels.*7 x 8 patches.*image_size"),
        ({"num_masks": 0}, r"num_masks must be at least 1"),
        ({"target_scale": (0.2, 0.1)}, r"target_scale .*0\.2, 0\.1"),
        ({"context_scale": (0.5, 1.5)}, r"context_scale .*1\.5"),
        ({"random_resized_crop": (0.0, 1.0)}, r"random_resized_crop .*0\.0, 1\.0"),
        ({"random_resized_crop": (float("nan"), 1.0)}, r"random_resized_crop .*nan"),
        ({"target_aspect_ratio": (0.0, 1.0)}, r"target_aspect_ratio .*0\.0, 1\.0"),
        ({"num_channels": 4}, r"num_channels must be 1 .* or 3"),
        ({"num_channels": 1}, r"image_mean is for 3 channels, but the model reads 1"),
        ({"image_processor": ViTImageProcessorPil(size={"longest_edge": 9})}, r"longest_edge.*does not determine"),
        ({"image_processor": ViTImageProcessorPil(size={"shortest_edge": 9, "longest_edge": 12})}, "not determine"),
    ],
)
def test_a_wrong_setting_is_refused(arguments: dict[str, Any], message: str) -> None:
    """When the collator is made: a UsageError that names the setting."""
    with pytest.raises(UsageError, match=message):
        collator(**arguments)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"img": picture(), "label": 1}, r"Row 1 of the batch has no column 'image'.*img, label"),
        ({"image": "a.png"}, r"Row 1 .*holds str.*decode=False"),
        ({"image": np.zeros((4, 4, 3))}, r"Row 1 .*float64 of shape \(4, 4, 3\).*uint8"),
        ({"image": np.zeros((3, 8, 8), dtype=np.uint8)}, r"shape \(3, 8, 8\).*\[H, W, C\]"),
        ({"image": np.zeros((0, 4, 3), dtype=np.uint8)}, r"shape \(0, 4, 3\)"),
        (stored(None, "nowhere/a.png"), r"'nowhere/a.png' cannot be read: No such file.*"),
    ],
)
def test_a_row_without_an_image_is_refused(row: dict[str, Any], message: str) -> None:
    """Bytes without an image and a missing file are errors, not damaged images."""
    with pytest.raises(UsageError, match=message):
        collator()([{"image": picture()}, row])


def test_an_image_that_comes_out_in_another_size_is_named() -> None:
    """A processor that keeps the shape of images makes squares of squares only; the row and its size are named."""
    make = collator(image_processor=ViTImageProcessorPil(size={"shortest_edge": 32}))
    assert make([{"image": picture(0, 50, 50)}])["pixel_values"].shape == (1, 3, 32, 32)
    with pytest.raises(UsageError, match=r"row 1 of the batch, an image of 40 x 60 pixels, .*\(3, 32, 48\).*height"):
        make([{"image": picture()}, {"image": picture(1, 60, 40)}])
    with pytest.raises(UsageError, match=r"row 0 .*do_resize"):
        collator(image_processor=ViTImageProcessorPil(size={"height": 32, "width": 32}, do_resize=False))(
            [{"image": picture(0, 16, 16)}]
        )


def test_the_model_learns_from_a_batch_and_nothing_from_a_damaged_image() -> None:
    """Forward and backward through a small I-JEPA: with a damaged image the loss and every gradient are those of the
    batch without it, and finite."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = JepaForRepresentationPrediction(JepaConfig(IJepaConfig(**sizes, image_size=32, patch_size=4))).train()
    results = []
    for data in (rows(4), [*rows(4), stored(b"")]):
        model.zero_grad()
        loss = model(**augmenting()(data)).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert results[0][0] > 0
    assert sum(gradient.abs().sum() > 0 for gradient in results[0][1:]) > 20
    for one, other in zip(*results, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other)


def test_the_summary_has_every_setting_of_the_views() -> None:
    assert augmenting().card_settings == {
        "target blocks": 4,
        "target scale": (0.15, 0.2),
        "target aspect ratio": (0.75, 1.5),
        "context scale": (0.85, 1.0),
        "target blocks inside": False,
        "random resized crop": (0.3, 1.0),
        "random flip": True,
    }
