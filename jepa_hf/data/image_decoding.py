"""Decoding of images from files, bytes and arrays."""

import logging
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import UsageError
from ..utils.counts import evenly_spaced, left_out_message
from .image_files import image_formats

logger = logging.getLogger(__name__)

# Formats whose 32-bit integers PIL scales to 16 bits.
_SIXTEEN_BIT_FORMATS = ("PNG", "PPM", "JPEG2000", "SGI")
_BITS_PER_SAMPLE = 258  # tag of TIFF
_NO_IMAGE, _UNKNOWN_RANGE = "no image", "numbers of unknown range, neither 8 nor 16 bits"
_MAX_CHECKED, _MAX_NAMED = 1000, 3
_DECODING_THREADS = 4


def decode_image(stored: Any, mode: str) -> Image.Image:
    """Decode the image in a cell of a dataset, upright and in a PIL mode.

    Of an animation, the first frame counts, of an opened one the current frame. Transparency is dropped.
    More than 8 bits per channel are scaled to 8.

    Args:
        stored: A PIL image, a uint8 array, or a dict of `bytes` and `path`.
        mode: "RGB" or "L".

    Raises:
        UsageError: The cell holds no image, numbers of unknown range, or the name of a file that
            cannot be read. The message lacks its subject.
        Exception: Any exception that PIL raises on damaged data; ValueError for numbers whose range
            a file does not say.
    """
    image: Image.Image
    match stored:
        case None | {"bytes": None, "path": None}:
            raise ValueError(_NO_IMAGE)
        case {"bytes": None, "path": path}:
            image = Image.open(BytesIO(_read_bytes(path)), formats=image_formats())
        case {"bytes": data}:
            image = Image.open(BytesIO(data), formats=image_formats())
        case np.ndarray():
            image = _image_from_array(stored)
        case Image.Image():
            image = stored
            _check_range(image)
        case _:
            raise UsageError(f"holds {type(stored).__name__}, not an image. Cast it to datasets.Image(decode=False).")
    image.load()
    excess_bits = _excess_bits(image)
    image = ImageOps.exif_transpose(image)
    if excess_bits:
        # PIL would clip them instead of scaling.
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> excess_bits).clip(0, 255).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # PIL warns of a direct conversion
    if image.mode == "La":  # the only mode of PIL that does not become RGB
        image = image.convert("LA")
    if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX"):
        image = image.convert("RGB")
    return image.convert(mode)


def _excess_bits(image: Image.Image) -> int:
    """Return how many bits per channel an image has above 8.

    Raises:
        ValueError: The range of its numbers is unknown.
    """
    tags = getattr(image, "tag_v2", {})  # only TIFF has any
    if image.mode.startswith("I;16"):
        return tags.get(_BITS_PER_SAMPLE, (16,))[0] - 8
    if image.mode == "F" or (image.mode == "I" and image.format not in _SIXTEEN_BIT_FORMATS):
        raise ValueError(_UNKNOWN_RANGE)
    return 8 if image.mode == "I" else 0


def _check_range(image: Image.Image) -> None:
    """Refuse an image in memory whose numbers have an unknown range."""
    try:
        _excess_bits(image)
    except ValueError:
        raise UsageError(
            f"holds a PIL image of mode {image.mode!r}, {_UNKNOWN_RANGE}. Scale its array to 0..255 and pass that as "
            "uint8."
        ) from None


def _read_bytes(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}. Restore it or leave it out.") from None


def _image_from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8 or array.size == 0 or array.ndim < 2 or array.shape[2:] not in ((), (1,), (3,), (4,)):
        remedies = ["Provide uint8 of shape [H, W] or [H, W, C]"]
        if array.dtype.kind == "f":
            remedies.append("scale 0..1 by (array * 255).round().astype('uint8')")
        if array.ndim == 3 and array.shape[0] in (3, 4):
            remedies.append("move channels to the end by array.transpose(1, 2, 0), or pass grey images as a list")
        raise UsageError(f"holds {array.dtype} of shape {array.shape}, not an image. {'; '.join(remedies)}.")
    return Image.fromarray(array.squeeze(2) if array.shape[2:] == (1,) else array)


def failure_reason(error: Exception) -> str:
    """Return why an image is left out, without what differs from image to image."""
    match error:
        case UnidentifiedImageError():
            return "that PIL cannot identify"
        case Image.DecompressionBombError():
            return "above PIL's limit of pixels"
        case ValueError(args=[str(message)]) if message in (_NO_IMAGE, _UNKNOWN_RANGE):
            return f"with {message}"
        case OSError() if "truncated" in str(error):
            return "truncated"
    return f"that PIL cannot decode ({str(error).partition('(')[0].strip() or 'no reason given'})"


def leave_out_unreadable(images: Dataset, part: str) -> Dataset:
    """Decode images before a run, at most 1,000 spread evenly, and leave out those that are damaged.

    A message counts them by reason and names the `part`, "training" or "validation". Later damaged ones are skipped
    by the collator.

    Raises:
        UsageError: No image that was tried can be decoded, or a file is missing.
    """
    rows = evenly_spaced(len(images), _MAX_CHECKED)

    def problem(row: int) -> str | None:
        stored = images[row]["image"]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of metadata that PIL cannot read
                decode_image(stored, "RGB")
        except UsageError as error:
            raise UsageError(f"'{(stored or {}).get('path')}' {error}") from None
        except Exception as error:  # PIL's decoders raise nearly any exception on damaged data
            return failure_reason(error)
        return None

    with ThreadPoolExecutor(_DECODING_THREADS) as pool:
        found = dict(zip(rows, pool.map(problem, rows), strict=True))
    problems = {row: reason for row, reason in found.items() if reason is not None}
    if not problems:
        return images
    checked = "images" if len(rows) == len(images) else "images that were tried"
    message = left_out_message(Counter(problems.values()), len(rows), f"{part} {checked}")
    examples = [images[row]["image"]["path"] or f"row {row + 1}" for row in list(problems)[:_MAX_NAMED]]
    message += f" (such as {', '.join(examples)})"
    if len(problems) == len(rows):
        raise UsageError(f"No image can be decoded: {message}. Provide images that PIL reads.")
    logger.warning("%s", message)
    return images.select([row for row in range(len(images)) if row not in problems])
