"""`DataCollatorForBlockJEPA`: image decoding, augmentation and block masks."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from transformers import BaseImageProcessor

from ..data.image_decoding import decode_image
from ..errors import UsageError
from .base_collator import MaskingCollator, derive_mask_keys, padded_positions, to_tensors
from .block_sampling import BlockSampler, check_block_settings
from .counter_rng import content_hash, sample_keys, uniform_draws

logger = logging.getLogger(__name__)

# Range of a random crop's width over its height.
_CROP_ASPECT_RATIO = (3 / 4, 4 / 3)


class DataCollatorForBlockJEPA(MaskingCollator):
    """Decode and augment a batch of images and sample block masks (I-JEPA, Assran et al. 2023).

    A sample's crop and flip follow from the same key as its masks, so they depend only on the seed, the epoch and the
    image. An image that cannot be decoded becomes a black one without targets and context. A warning names it, once per
    worker process (without persistent workers: once per epoch).

    A call returns, for B images, M target blocks of at most T patches and C patches of context, where T and C are the
    same in all batches: `pixel_values` float32 `[B, num_channels, H, W]`; `target_positions` long and `target_valid`
    bool `[B, M, T]`; `context_positions` long and `context_valid` bool `[B, 1, C]`.

    Args:
        image_processor: Resizes, rescales and normalizes, as for the model; must return images of one size.
        grid: Rows and columns of the model's patches.
        num_masks: Target blocks per image, which share one context.
        target_scale: Range of a target block's area as a share of the grid.
        target_aspect_ratio: Range of a target block's height over its width.
        context_scale: Range of the area of the square context block, before the targets are removed.
        keep_blocks_inside: Keep target blocks inside the image, so that patches near the edges are masked less often.
            False cuts blocks at the edges and masks all patches with equal probability.
        random_resized_crop: Range of a random crop's area as a share of the image. The crop (width over height 3/4 to
            4/3) is resized to the model's input. None: no crop, the image processor resizes.
        random_flip: Mirror images horizontally with probability 1/2.
        image_column_name: Column with the images: PIL images, dicts of `bytes` and `path` as
            `datasets.Image(decode=False)` returns, or uint8 arrays `[H, W]` or `[H, W, C]`.
        num_channels: Input channels of the model: 3 for RGB, 1 for grey.
        seed: Seed of masks and augmentation.

    Raises:
        UsageError: Settings are out of range or do not fit the image processor. In a call: the column is missing or
            holds no image, a file cannot be read, or the image processor returns an image of another size.
    """

    def __init__(
        self,
        image_processor: BaseImageProcessor,
        grid: tuple[int, int],
        num_masks: int = 4,
        target_scale: tuple[float, float] = (0.15, 0.2),
        target_aspect_ratio: tuple[float, float] = (0.75, 1.5),
        context_scale: tuple[float, float] = (0.85, 1.0),
        keep_blocks_inside: bool = False,
        random_resized_crop: tuple[float, float] | None = None,
        random_flip: bool = False,
        image_column_name: str = "image",
        num_channels: int = 3,
        seed: int = 42,
    ):
        super().__init__(num_masks, seed)
        ranges = {"target_scale": target_scale, "context_scale": context_scale}
        if random_resized_crop is not None:
            ranges["random_resized_crop"] = random_resized_crop
        check_block_settings(ranges, target_aspect_ratio)
        _check_input(grid, num_channels)
        self.image_processor: Any = image_processor  # transformers declares few of its attributes
        _check_channels(self.image_processor, num_channels)
        self.grid = grid
        self.blocks = BlockSampler(
            grid, num_masks, target_scale, target_aspect_ratio, context_scale, keep_blocks_inside
        )
        self.random_resized_crop = random_resized_crop
        self.random_flip = random_flip
        self.image_column_name = image_column_name
        self.extra_columns = (image_column_name,)
        self.num_channels = num_channels
        self._mode = "RGB" if num_channels == 3 else "L"
        self.height, self.width = _output_size(self.image_processor)
        if self.height % grid[0] or self.width % grid[1]:
            raise UsageError(
                f"The image processor returns images of {self.height} x {self.width} pixels, which the model's grid of "
                f"{grid[0]} x {grid[1]} patches does not divide evenly. Set the image processor's size to the model's "
                "image_size."
            )
        self._warned_ids: set[int] = set()

    def for_evaluation(self) -> Self:
        """Return a copy with fixed masks and without augmentation."""
        evaluation = super().for_evaluation()
        evaluation.random_resized_crop = None
        evaluation.random_flip = False
        return evaluation

    @property
    def card_settings(self) -> dict[str, Any]:
        """Settings of the views for the model card, by name."""
        return {
            "target blocks": self.num_masks,
            "target scale": self.blocks.target_scale,
            "target aspect ratio": self.blocks.target_aspect_ratio,
            "context scale": self.blocks.context_scale,
            "target blocks inside": self.blocks.keep_blocks_inside,
            "random resized crop": self.random_resized_crop,
            "random flip": self.random_flip,
        }

    @property
    def target_requirement(self) -> str:
        """Condition of a row that has targets, and the remedy for data without such rows."""
        return "Only images that can be decoded have one. Provide other images."

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Decode, augment and mask the images of a batch."""
        decoded = [self._decode(row, feature) for row, feature in enumerate(features)]
        readable = np.array([image is not None for image in decoded])
        black = Image.new(self._mode, (self.width, self.height))
        images = [black if image is None else image for image in decoded]

        content = np.array([content_hash(repr(image.size).encode(), image.tobytes()) for image in images], np.uint64)
        # Two random streams per sample.
        keys, augmentation = derive_mask_keys(sample_keys(content, self.seed, self.epoch), 2).reshape(-1, 2).T
        targets, context = self.blocks.sample(keys)
        targets &= readable[:, None, None]
        context &= readable[:, None]
        return to_tensors(
            {
                "pixel_values": self._pixel_values(self._augment(images, augmentation)),
                **padded_positions("target", targets, (self.blocks.largest_target,)),
                **padded_positions("context", context[:, None], (self.blocks.default_num_context,)),
            }
        )

    def _decode(self, row: int, feature: Mapping[str, Any]) -> Image.Image | None:
        """Decode the image in a row of the batch. Warn and return None if it is damaged."""
        column = self.image_column_name
        name = f"Row {row} of the batch, column '{column}',"
        if column not in feature:
            raise UsageError(
                f"Row {row} of the batch has no column '{column}'. Set image_column_name to one of its columns: "
                f"{', '.join(feature)}."
            )
        cell = feature[column]
        if isinstance(cell, Mapping) and cell.get("path") is not None:
            name = f"'{cell['path']}'"
        try:
            return decode_image(cell, self._mode)
        except UsageError as error:
            raise UsageError(f"{name} {error}") from None
        except Exception as error:  # PIL's decoders raise nearly any exception on damaged data
            identity = hash(repr(cell)) if isinstance(cell, Mapping) else None
            if identity is None or identity not in self._warned_ids:
                # The message of an UnidentifiedImageError names an object in memory.
                reason = "PIL cannot identify it as an image" if isinstance(error, UnidentifiedImageError) else error
                logger.warning("%s cannot be decoded and is skipped: %s", name, reason)
                if identity is not None:
                    self._warned_ids.add(identity)
            return None

    def _augment(self, images: Sequence[Image.Image], keys: np.ndarray) -> Sequence[Image.Image]:
        """Apply the random crop and the random flip, if they are enabled."""
        draws = uniform_draws(keys, 0, 5)
        if self.random_resized_crop is not None:
            size, resample = (self.width, self.height), self.image_processor.resample
            images = [
                image.resize(size, resample, box=_crop_box(*image.size, self.random_resized_crop, *draw))
                for image, draw in zip(images, draws[:, :4].tolist(), strict=True)
            ]
        if self.random_flip:
            images = [
                image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image
                for image, flip in zip(images, draws[:, 4] < 0.5, strict=True)
            ]
        return images

    def _pixel_values(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Return the model's input, float32 `[B, num_channels, H, W]`."""
        settings: dict[str, bool] = {"do_convert_rgb": False}
        if self.random_resized_crop is not None:
            # Crops already have the final size; resizing again would double the processor's time.
            settings |= {"do_resize": False, "do_center_crop": False}
        arrays = [np.asarray(array) for array in self.image_processor(images, **settings)["pixel_values"]]
        shape = (self.num_channels, self.height, self.width)
        for row, array in enumerate(arrays):
            if array.shape != shape:
                raise UsageError(
                    f"The image processor turns row {row} of the batch, an image of {images[row].height} x "
                    f"{images[row].width} pixels, into an array of shape {array.shape} instead of {shape}. Set its "
                    f'size to {{"height": {self.height}, "width": {self.width}}} and do_resize to True.'
                )
        return np.stack(arrays).astype(np.float32, copy=False)


def _check_input(grid: tuple[int, int], num_channels: int) -> None:
    if min(grid) < 1 or grid[0] * grid[1] < 2:
        raise UsageError(f"grid must have at least two patches, not {grid}. Use a smaller patch_size.")
    if num_channels not in (1, 3):
        raise UsageError(f"num_channels must be 1 (grey) or 3 (RGB), not {num_channels}.")


def _check_channels(image_processor: Any, num_channels: int) -> None:
    if not image_processor.do_normalize:
        return
    for name in ("image_mean", "image_std"):
        value = getattr(image_processor, name)
        if np.ndim(value) == 1 and len(value) != num_channels:
            raise UsageError(
                f"The image processor's {name} is for {len(value)} channels, but the model reads {num_channels}. Set "
                "one number per channel."
            )


def _output_size(image_processor: Any) -> tuple[int, int]:
    """Return height and width of the images that the image processor returns."""
    size = dict(image_processor.crop_size if image_processor.do_center_crop else image_processor.size)
    match size:
        case {"height": height, "width": width}:
            return height, width
        case {"shortest_edge": edge} if len(size) == 1:  # for square images; `_pixel_values` rejects others
            return edge, edge
    raise UsageError(
        f"The image processor's size {size} does not determine the size of its images. Set it to "
        '{"height": ..., "width": ...}.'
    )


def _crop_box(
    width: int, height: int, scale: tuple[float, float], area: float, ratio: float, left: float, top: float
) -> tuple[float, float, float, float]:
    """Return left, top, right and bottom of a random crop of an image, in pixels.

    The area is uniform in `scale`, as a share of the image's, the logarithm of the aspect ratio uniform over the
    ratios that fit into the image, the position uniform. If the image is too long for all allowed ratios,
    return the largest crop that fits. `area`, `ratio`, `left` and `top` are draws, uniform in [0, 1).
    """
    area = scale[0] + area * (scale[1] - scale[0])
    lowest, highest = (
        min(max(limit, _CROP_ASPECT_RATIO[0]), _CROP_ASPECT_RATIO[1])
        for limit in (area * width / height, width / (area * height))
    )
    aspect = lowest * (highest / lowest) ** ratio
    crop_height = min((area * width * height / aspect) ** 0.5, height, width / aspect)
    crop_width = min(crop_height * aspect, width)
    x, y = left * (width - crop_width), top * (height - crop_height)
    return x, y, min(x + crop_width, width), min(y + crop_height, height)
