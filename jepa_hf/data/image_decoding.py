"""Decoding of images from files, bytes and arrays."""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ..errors import UsageError


def decode_image(stored: Any, mode: str) -> Image.Image:
    """Decode the image in a cell of a dataset, upright and in a PIL mode.

    Args:
        stored: A PIL image, a uint8 array, or a dict of `bytes` and `path`.
        mode: "RGB" or "L".

    Raises:
        UsageError: The cell holds no image, or names a file that cannot be read. The message lacks
            its subject.
        Exception: Any exception that PIL raises on damaged data.
    """
    image: Image.Image
    match stored:
        case None | {"bytes": None, "path": None}:
            raise ValueError("there is no image")
        case {"bytes": None, "path": path}:
            image = Image.open(BytesIO(_read_bytes(path)))
        case {"bytes": data}:
            image = Image.open(BytesIO(data))
        case np.ndarray():
            image = _image_from_array(stored)
        case Image.Image():
            image = stored
        case _:
            raise UsageError(f"holds {type(stored).__name__}, not an image. Cast it to datasets.Image(decode=False).")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        # PIL would clip 16 bits to 8 instead of scaling them.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert(mode)


def _read_bytes(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}. Restore it or leave it out.") from None


def _image_from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8 or array.size == 0 or array.ndim < 2 or array.shape[2:] not in ((), (1,), (3,), (4,)):
        raise UsageError(
            f"holds {array.dtype} of shape {array.shape}, not an image. Provide uint8 of shape [H, W] or [H, W, C]."
        )
    return Image.fromarray(array.squeeze(2) if array.shape[2:] == (1,) else array)
