"""Claims of jepa_hf/data/image_decoding.py: depth, palettes, orientation, damaged images."""

import io
import logging
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from jepa_hf.data.image_decoding import decode_image, leave_out_unreadable
from jepa_hf.errors import UsageError

# A ramp over all of 16 bits, and its upper 8.
DEEP = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
SHALLOW = (DEEP >> 8).astype(np.uint8)


def png(color_type: int, pixels: np.ndarray) -> bytes:
    """Write 16 bits per channel, which PIL does for grey only."""
    height, width = pixels.shape[:2]
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def tiff(pixels: np.ndarray, order: str = "<", sample_format: int = 1) -> bytes:
    """Write an uncompressed file of the array's own type."""
    height, width, channels = (*pixels.shape, 1)[:3]
    bits = 8 * pixels.itemsize
    body = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    long_tags = {273: 8 + 2 + 12 * 10 + 4 + 4 * channels, 279: len(body)}
    short_tags = {
        256: width,
        257: height,
        258: bits,
        259: 1,
        262: 1 if channels == 1 else 2,
        277: channels,
        278: height,
    }
    short_tags[339] = sample_format
    lists = 8 + 2 + 12 * 10 + 4
    out = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, 10)
    for tag in sorted({**long_tags, **short_tags}):
        if tag in long_tags:
            out += struct.pack(f"{order}HHII", tag, 4, 1, long_tags[tag])
        elif tag in (258, 339) and channels > 1:
            out += struct.pack(f"{order}HHII", tag, 3, channels, lists + (0 if tag == 258 else 2 * channels))
        else:
            out += struct.pack(f"{order}HHIHH", tag, 3, 1, short_tags[tag], 0)
    per_channel = struct.pack(f"{order}{channels}H", *[bits] * channels)
    per_channel += struct.pack(f"{order}{channels}H", *[sample_format] * channels)
    return out + struct.pack(f"{order}I", 0) + per_channel + body


def pil(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decode(data: bytes, mode: str = "L") -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return np.asarray(decode_image({"bytes": data, "path": None}, mode))


RGB = np.stack([DEEP, DEEP[::-1], DEEP.T], axis=2)
GREY_FILES = {
    "png": png(0, DEEP),
    "png with alpha": png(4, np.dstack([DEEP, DEEP])),
    "tiff": tiff(DEEP),
    "big-endian tiff": tiff(DEEP, ">"),
    "pgm": b"P5\n8 8\n65535\n" + DEEP.astype(">u2").tobytes(),
    "pgm of 10 bits": b"P5\n8 8\n1023\n" + (DEEP >> 6).astype(">u2").tobytes(),
    "plain pgm": b"P2\n8 8\n1023\n" + " ".join(map(str, (DEEP >> 6).ravel())).encode(),
    "jpeg 2000": pil(Image.fromarray(DEEP), "JPEG2000", irreversible=False),
}
COLOR_FILES = {
    "png": png(2, RGB),
    "png with alpha": png(6, np.dstack([RGB, DEEP])),
    "tiff": tiff(RGB),
    "big-endian tiff": tiff(RGB, ">"),
    "ppm": b"P6\n8 8\n65535\n" + RGB.astype(">u2").tobytes(),
}


@pytest.mark.parametrize("name", GREY_FILES)
def test_sixteen_bits_of_grey_are_scaled_to_eight(name: str) -> None:
    """PIL itself would clip all but the darkest values to white."""
    for mode in ("L", "RGB"):
        found = decode(GREY_FILES[name], mode).reshape(8, 8, -1).astype(int)
        assert np.abs(found - SHALLOW[..., None]).max() <= 1


@pytest.mark.parametrize("name", COLOR_FILES)
def test_sixteen_bits_of_color_are_scaled_to_eight(name: str) -> None:
    assert np.abs(decode(COLOR_FILES[name], "RGB").astype(int) - (RGB >> 8)).max() <= 1


@pytest.mark.parametrize(
    "data",
    [
        tiff(DEEP.astype(np.int32), sample_format=2),
        tiff(DEEP.astype(np.uint32) * 65537),
        tiff((DEEP / 65535).astype(np.float32), sample_format=3),
        b"Pf\n8 8\n-1.0\n" + (DEEP / 65535).astype("<f4").tobytes(),
    ],
    ids=["int32", "uint32", "float32", "pfm"],
)
def test_numbers_of_unknown_range_are_refused(data: bytes) -> None:
    """They could be brightness from 0 to 1, to 255, or anything else."""
    with pytest.raises((ValueError, OSError)):
        decode(data)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_images_in_memory_of_unknown_range_are_refused(mode: str) -> None:
    """The sentence names the mode and the remedy; what has a range is scaled, whatever the mode."""
    with pytest.raises(UsageError, match=f"holds a PIL image of mode '{mode}', numbers of unknown range.* uint8"):
        decode_image(Image.fromarray(RGB[..., 0] >> 8).convert(mode), "RGB")


@pytest.mark.parametrize("mode", ["1", "LA", "La", "P", "CMYK", "YCbCr", "HSV", "RGBA", "RGBa", "I;16"])
def test_images_in_memory_of_every_other_mode_are_scaled(mode: str) -> None:
    """Black stays black, white stays white, and grey lies between."""
    grey = Image.fromarray(np.repeat(np.array([[0, 128, 255]], np.uint8), 2, axis=0))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    else:
        between = {"La": "LA", "P": "L"}.get(mode, "RGB")  # from RGB, a palette of few colors
        image = grey.convert(between).convert(mode)
    black, middle, white = np.asarray(decode_image(image, "L"))[0].tolist()
    assert black <= 2
    assert white >= 253
    assert abs(middle - 128) <= 2 or mode == "1"


def test_every_kind_of_palette_and_channels_looks_the_same() -> None:
    """With transparency in any form, in CMYK, and as the first frame of an animation."""
    color = (200, 40, 90)
    plain = Image.new("RGB", (8, 8), color)
    palette = plain.convert("P", palette=Image.Palette.ADAPTIVE)
    clear = plain.convert("RGBA")
    other = Image.new("RGB", (8, 8), (0, 255, 0))
    files = {
        "palette": pil(palette, "PNG"),
        "palette with alpha": pil(palette, "PNG", transparency=bytes([128])),
        "palette with a transparent color": pil(palette, "PNG", transparency=0),
        "alpha": pil(clear, "PNG"),
        "gif": pil(palette, "GIF", save_all=True, append_images=[other]),
        "apng": pil(plain, "PNG", save_all=True, append_images=[other]),
        "pages of a tiff": pil(plain, "TIFF", save_all=True, append_images=[other]),
        "webp": pil(plain, "WEBP", lossless=True, save_all=True, append_images=[other]),
        "CMYK": pil(plain.convert("CMYK"), "TIFF"),
        "YCbCr": pil(plain.convert("YCbCr"), "TIFF"),
    }
    for mode in ("RGB", "L"):
        expected = np.asarray(plain.convert(mode)).astype(int)
        for name, data in files.items():
            assert np.abs(decode(data, mode) - expected).max() <= 2, (name, mode)
    grey = pil(Image.new("LA", (8, 8), (120, 50)), "PNG")
    assert (decode(grey, "L") == 120).all()
    assert (decode(grey, "RGB") == 120).all()


@pytest.mark.parametrize("deep", [False, True])
def test_orientation_is_applied(deep: bool) -> None:
    """Of 8 and of 16 bits."""
    exif = Image.Exif()
    exif[274] = 6  # turn by 90 degrees
    data = pil(Image.fromarray(DEEP if deep else SHALLOW), "PNG", exif=exif)
    np.testing.assert_array_equal(decode(data), np.rot90(SHALLOW, -1))


def test_no_format_that_runs_another_program_is_opened() -> None:
    """A postscript file under another name; PIL would start Ghostscript."""
    with pytest.raises(OSError, match="cannot identify"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n")


def test_damaged_images_are_left_out_and_counted_by_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = pil(Image.new("RGB", (8, 8)), "PNG")
    noise = pil(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)), "JPEG")
    contents = [
        good,
        noise[:-300],
        b"no image",
        good,
        noise[:-200],
        b"",
        tiff(np.ones((8, 8), np.float32), sample_format=3),
    ]
    paths = [tmp_path / f"{number}.png" for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    images = Dataset.from_list([{"image": {"bytes": None, "path": str(path)}} for path in paths])
    with caplog.at_level(logging.INFO, "jepa_hf"):
        kept = leave_out_unreadable(images, "training")
    assert [row["image"]["path"] for row in kept] == [str(paths[0]), str(paths[3])]
    (message,) = caplog.messages
    assert message.startswith("left out 5 of 7 training images: 2 truncated, 2 that PIL cannot identify, ")
    assert "1 with numbers of unknown range, neither 8 nor 16 bits (such as " in message
    with pytest.raises(UsageError, match="No image can be decoded: left out 5 of 5 training images"):
        leave_out_unreadable(images.select([1, 2, 4, 5, 6]), "training")
