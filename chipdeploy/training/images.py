"""Image files as RGB of 8 bits a channel. What would come out black or white is refused."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from chipdeploy.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

_NO_RANGE = ("I", "F")  # modes of 32 bits: nothing says which number is white
_OF_8_BITS = 257  # 65535 / 255
_JPEG_END = b"\xff\xd9"


def read_rgb(path: Path) -> Image.Image:
    """Decode one file.

    Raises:
        DataError: it is no image, or its pixels are numbers of 32 bits.
    """
    from PIL import Image

    try:
        with Image.open(path) as file:
            if file.mode not in _NO_RANGE:
                return _in_8_bits(file).convert("RGB")
            mode = file.mode
    except Exception as error:  # Any failure of an image decoder means that the file is no image.
        raise DataError(f"image {str(path)!r} cannot be decoded ({type(error).__name__}); replace it") from error
    raise DataError(f"image {str(path)!r} has pixels of 32 bits (mode {mode}); store it with 8 or 16 bits a channel")


def check_image(path: Path) -> None:
    """Raises DataError as `read_rgb` does, but decodes only what looks damaged: about 0.1 ms a JPEG, 0.4 ms a PNG."""
    if not _looks_whole(path):
        read_rgb(path)


def _looks_whole(path: Path) -> bool:
    """Whether header and checksums are right, and a JPEG, which has no checksums, ends as one."""
    from PIL import Image

    try:
        with Image.open(path) as file:
            kind, mode = file.format, file.mode
            file.verify()
        with path.open("rb") as content:
            content.seek(-len(_JPEG_END), os.SEEK_END)
            return mode not in _NO_RANGE and (kind != "JPEG" or content.read() == _JPEG_END)
    except Exception:
        return False


def _in_8_bits(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode == "P":
        return image.convert("RGBA")  # straight to RGB, the decoder could not tell one transparent colour from another
    if image.mode.startswith("I;16"):
        return Image.fromarray(np.rint(np.asarray(image) / _OF_8_BITS).astype(np.uint8))
    return image


@contextmanager
def quiet_decoding() -> Iterator[None]:
    """No advice of the decoder, which would come anew for each file in each epoch. Not to be entered by threads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
