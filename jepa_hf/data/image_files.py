"""Image files: which suffixes PIL reads, and the images below a folder."""

import logging
import os
from collections import Counter
from functools import cache

from PIL import Image, ImageFile

from ..errors import UsageError
from ..utils.counts import left_out_message

logger = logging.getLogger(__name__)

# Tried first, because some other formats have no signature.
_USUAL_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
# EPS runs Ghostscript, an external program; PIL reads of MPEG only the header.
_EXCLUDED_FORMATS = ("EPS", "MPEG")


@cache
def image_formats() -> tuple[str, ...]:
    """Return the formats that PIL decodes by itself."""
    Image.init()
    stub = ImageFile.StubImageFile
    decoded = [
        name
        for name, (factory, _) in Image.OPEN.items()
        if name not in _EXCLUDED_FORMATS and not (isinstance(factory, type) and issubclass(factory, stub))
    ]
    return tuple(sorted(decoded, key=lambda name: name not in _USUAL_FORMATS))


@cache
def _image_suffixes() -> frozenset[str]:
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in image_formats())


def is_image_file(path: str) -> bool:
    """Return whether a file's suffix, in any case, is one of an image that PIL decodes."""
    return os.path.splitext(path.lower())[1] in _image_suffixes()


def list_images(folder: str) -> list[str]:
    """Return the sorted paths of all images in a folder and its subfolders.

    Links to folders are followed, but each folder is read once. Hidden files and folders are left
    out; a message counts those that look like images.

    Raises:
        UsageError: The folder cannot be read.
    """
    images: list[str] = []
    left_out: Counter[str] = Counter()
    seen: set[str] = set()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
        if (real := os.path.realpath(parent)) in seen:
            folders.clear()
            visible = (name for name in files if not name.startswith("."))
            left_out["in a folder that a link repeats"] += sum(map(is_image_file, visible))
            continue
        seen.add(real)
        # Folders before links to them, so that the paths do not depend on the order of names.
        folders[:] = sorted(
            (name for name in folders if not name.startswith(".")),
            key=lambda name: (os.path.islink(os.path.join(parent, name)), name),
        )
        for name in filter(is_image_file, files):
            path = os.path.join(parent, name)
            if name.startswith("."):
                left_out["hidden"] += 1
            elif not os.path.isfile(path):
                left_out["links to nothing"] += 1
            else:
                images.append(path)
    if left_out := +left_out:  # without zeros
        logger.warning("'%s': %s", folder, left_out_message(left_out, len(images) + left_out.total(), "images"))
    return sorted(images)


def _raise(error: OSError) -> None:
    raise UsageError(f"'{error.filename}' cannot be read: {error.strerror}. Change its permissions, or move it away.")
