"""The collator for images: decodes and augments them, and hides blocks of their patches."""

import logging
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any, Self

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from transformers import BaseImageProcessor

from ..data.image_decoding import decode_image
from ..errors import UsageError
from .base_collator import MaskingCollator, chosen_positions, mask_keys
from .block_sampling import default_num_context, largest_target, sample_block_masks
from .counter_rng import content_keys, uniforms

logger = logging.getLogger(__name__)

# Range of a random crop's width over its height.
_CROP_ASPECT_RATIO = (3 / 4, 4 / 3)


class DataCollatorForBlockJEPA(MaskingCollator):
    """Decodes and augments a batch of images and hides blocks of their patches (I-JEPA, Assran et al. 2023).

    A sample's crop and flip come from the same key as its masks, so they depend on the seed, the epoch and the image
    alone. An image that cannot be decoded stays in the batch as a black one without targets and context, and a warning
    names it, once per worker process (without persistent workers: once per epoch).

    Args:
        image_processor: resizes, rescales and normalises, as the model's own; must give all images one size.
        grid: rows and columns of the model's plane of patches.
        num_masks: target blocks per image, which share one context.
        target_scale: range of a target block's area as a share of the plane.
        target_aspect_ratio: range of a target block's height over its width.
        context_scale: range of the area of the context block, a square, before the targets are taken out.
        inside_targets: keep target blocks inside the image, whose edges are then hidden less often than its middle;
            False cuts blocks at the edge and hides all patches alike.
        random_resized_crop: range of the area, as a share of the image, of a random crop (width over height 3/4 to 4/3)
            that is resized to the model's input; None: no crop, the image processor resizes.
        random_flip: mirror every other image, left to right.
        image_column_name: column with the images: PIL images, dicts of `bytes` and `path` as
            `datasets.Image(decode=False)` gives, or uint8 arrays `[H, W]` or `[H, W, C]`.
        num_channels: what the model reads: 3 for RGB, 1 for grey.
        seed: seed of masks and augmentation.

    Returns of a call (B images, M target blocks of at most T patches, C patches of context; T and C never change):
        `pixel_values` float32 `[B, num_channels, H, W]`; `target_positions` long and `target_valid` bool `[B, M, T]`;
        `context_positions` long and `context_valid` bool `[B, 1, C]`.

    Raises:
        UsageError: settings out of range, an image processor that does not fit them, a column that is missing or holds
            something else, a file that cannot be read, or an image that comes out in another size.
    """

    def __init__(
        self,
        image_processor: BaseImageProcessor,
        grid: tuple[int, int],
        num_masks: int = 4,
        target_scale: tuple[float, float] = (0.15, 0.2),
        target_aspect_ratio: tuple[float, float] = (0.75, 1.5),
        context_scale: tuple[float, float] = (0.85, 1.0),
        inside_targets: bool = False,
        random_resized_crop: tuple[float, float] | None = None,
        random_flip: bool = False,
        image_column_name: str = "image",
        num_channels: int = 3,
        seed: int = 42,
    ):
        super().__init__(num_masks, seed)
        if min(grid) < 1 or grid[0] * grid[1] < 2:
            raise UsageError(f"grid must have at least two patches, and {grid} has not: use a smaller patch_size")
        shares = {"target_scale": target_scale, "context_scale": context_scale}
        if random_resized_crop is not None:
            shares["random_resized_crop"] = random_resized_crop
        for name, (low, high) in shares.items():
            if not 0 < low <= high <= 1:
                raise UsageError(f"{name} must be two numbers in rising order, above 0 and up to 1, not {low}, {high}")
        if not 0 < target_aspect_ratio[0] <= target_aspect_ratio[1] < float("inf"):
            raise UsageError(
                "target_aspect_ratio must be two positive numbers in rising order, not "
                f"{target_aspect_ratio[0]}, {target_aspect_ratio[1]}"
            )
        if num_channels not in (1, 3):
            raise UsageError(f"num_channels must be 1 (grey) or 3 (RGB), not {num_channels}")
        for name in ("image_mean", "image_std"):
            value = getattr(image_processor, name)
            if image_processor.do_normalize and np.ndim(value) == 1 and len(value) != num_channels:
                raise UsageError(
                    f"the image processor's {name} is for {len(value)} channels and the model reads {num_channels}: "
                    "give the image processor one number per channel"
                )
        self.image_processor = image_processor
        self.grid = grid
        self.target_scale = target_scale
        self.target_aspect_ratio = target_aspect_ratio
        self.context_scale = context_scale
        self.inside_targets = inside_targets
        self.random_resized_crop = random_resized_crop
        self.random_flip = random_flip
        self.image_column_name = image_column_name
        self.columns = (image_column_name,)
        self.num_channels = num_channels
        self._mode = "RGB" if num_channels == 3 else "L"
        self.height, self.width = _output_size(image_processor)
        if self.height % grid[0] or self.width % grid[1]:
            raise UsageError(
                f"the image processor gives images of {self.height} x {self.width} pixels, which the model's grid of "
                f"{grid[0]} x {grid[1]} patches does not divide: set the image processor's size to the model's "
                "image_size"
            )
        self._num_context = default_num_context(
            grid, num_masks, target_scale, target_aspect_ratio, context_scale, inside_targets
        )
        self._largest_target = largest_target(grid, target_scale, target_aspect_ratio)
        self._warned_of: set[int] = set()

    def for_evaluation(self) -> Self:
        """A copy that does not augment and whose masks never change."""
        fixed = super().for_evaluation()
        fixed.random_resized_crop = None
        fixed.random_flip = False
        return fixed

    @property
    def summary(self) -> dict[str, Any]:
        return {
            "target blocks": self.num_masks,
            "target scale": self.target_scale,
            "target aspect ratio": self.target_aspect_ratio,
            "context scale": self.context_scale,
            "target blocks inside": self.inside_targets,
            "random resized crop": self.random_resized_crop,
            "random flip": self.random_flip,
        }

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        decoded = [self._decode(row, feature) for row, feature in enumerate(features)]
        readable = np.array([image is not None for image in decoded])
        black = Image.new(self._mode, (self.width, self.height))
        images = [black if image is None else image for image in decoded]

        content = np.array([_content_hash(image) for image in images], dtype=np.uint64)
        # Two streams of each sample's randomness.
        keys, augmentation = mask_keys(content_keys(content, self.seed, self.epoch), 2).reshape(-1, 2).T
        targets, context = sample_block_masks(
            keys,
            self.grid,
            self.num_masks,
            self.target_scale,
            self.target_aspect_ratio,
            self.context_scale,
            self._num_context,
            self.inside_targets,
        )
        targets &= readable[:, None, None]
        context &= readable[:, None]
        target_positions, target_valid = chosen_positions(
            targets.reshape(-1, targets.shape[-1]), (self._largest_target,)
        )
        context_positions, context_valid = chosen_positions(context, (self._num_context,))
        shape = (len(images), self.num_masks, -1)
        return {
            "pixel_values": self._pixel_values(self._augment(images, augmentation)),
            "target_positions": torch.from_numpy(target_positions.reshape(shape)),
            "target_valid": torch.from_numpy(target_valid.reshape(shape)),
            "context_positions": torch.from_numpy(context_positions[:, None]),
            "context_valid": torch.from_numpy(context_valid[:, None]),
        }

    def _decode(self, row: int, feature: Mapping[str, Any]) -> Image.Image | None:
        """The image of a row of the batch; None, with a warning, if it is damaged."""
        column = self.image_column_name
        name = f"row {row} of the batch, column '{column}'"
        if column not in feature:
            raise UsageError(
                f"row {row} of the batch has no column '{column}'; set image_column_name to what it has: "
                f"{', '.join(feature)}"
            )
        stored = feature[column]
        if isinstance(stored, Mapping) and stored.get("path") is not None:
            name = f"'{stored['path']}'"
        try:
            return decode_image(stored, self._mode)
        except UsageError as error:
            raise UsageError(f"{name} {error}") from None
        except Exception as error:  # PIL's decoders raise nearly anything on damaged data
            identity = hash(repr(stored)) if isinstance(stored, Mapping) else None
            if identity is None or identity not in self._warned_of:
                unknown = isinstance(error, UnidentifiedImageError)  # whose message names an object in memory
                reason = "its bytes are no image that PIL knows" if unknown else error
                logger.warning("%s is skipped, for it cannot be decoded: %s", name, reason)
                self._warned_of.add(identity)
            return None

    def _augment(self, images: Sequence[Image.Image], keys: np.ndarray) -> Sequence[Image.Image]:
        """The images, cropped at random to the model's size and mirrored at random, as far as these are asked for."""
        draws = uniforms(keys, 0, 5)
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

    def _pixel_values(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """What the model reads, float32 `[B, num_channels, H, W]`."""
        settings: dict[str, bool] = {"do_convert_rgb": False}
        if self.random_resized_crop is not None:
            # Crops have the right size already; without these two the processor takes twice as long.
            settings |= {"do_resize": False, "do_center_crop": False}
        arrays = [np.asarray(array) for array in self.image_processor(images, **settings)["pixel_values"]]
        shape = (self.num_channels, self.height, self.width)
        for row, array in enumerate(arrays):
            if array.shape != shape:
                raise UsageError(
                    f"the image processor makes row {row} of the batch, an image of {images[row].height} x "
                    f"{images[row].width} pixels, an array of shape {array.shape} instead of {shape}: set its size to "
                    f'{{"height": {self.height}, "width": {self.width}}} and do_resize to True'
                )
        return torch.from_numpy(np.stack(arrays).astype(np.float32, copy=False))


def _output_size(image_processor: BaseImageProcessor) -> tuple[int, int]:
    """Height and width of what the image processor gives."""
    size = dict(image_processor.crop_size if image_processor.do_center_crop else image_processor.size)
    match size:
        case {"height": height, "width": width}:
            return height, width
        case {"shortest_edge": edge} if len(size) == 1:  # square images become squares; others are found out later
            return edge, edge
    raise UsageError(
        f"the image processor's size {size} leaves open how large its images become: set it to "
        '{"height": ..., "width": ...}'
    )


def _content_hash(image: Image.Image) -> int:
    """64 bits that depend on an image's size and pixels."""
    digest = blake2b(repr(image.size).encode(), digest_size=8)
    digest.update(image.tobytes())
    return int.from_bytes(digest.digest(), "little")


def _crop_box(
    width: int, height: int, scale: tuple[float, float], area: float, ratio: float, left: float, top: float
) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a random crop, in pixels.

    Its area is uniform in `scale`, the logarithm of its aspect ratio uniform over what fits into the image, its place
    uniform. An image so long that no allowed ratio fits gives the largest crop that does.

    Args:
        width, height: of the image.
        scale: range of the crop's area as a share of the image's.
        area, ratio, left, top: draws, uniform in [0, 1).
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
