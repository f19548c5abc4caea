"""One image: from a file's bytes to RGB pixels, or an error that names the file.

Files are judged by what is in them, not by their names: a PNG may be called .JPEG. Orientation tags are ignored, as
torchvision's ImageFolder ignores them. (torchvision's own decoder would be faster than Pillow, but has been deprecated
since version 0.29 and is to be removed.)
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

MAX_PIXELS = 89_478_485
"""Images of more pixels are refused before they are decoded: 256 MiB of RGB; ImageNet's largest is far below."""

_END_OF_IMAGE = b"\xff\xd9"
_END_WITHIN = 4096  # bytes from the end of the file: some writers add padding or a note


class ImageError(RuntimeError):
    """An image that cannot be used; the message names its file."""


@dataclass(frozen=True)
class ImageFile:
    """A file's bytes and what its header says.

    Attributes:
        path: The file.
        content: Its bytes.
        height: Pixels.
        width: Pixels.
        is_plain_jpeg: Whether any JPEG decoder gives its RGB pixels: grey or colour, 8 bits, with an end marker.
    """

    path: Path
    content: bytes
    height: int
    width: int
    is_plain_jpeg: bool


def read_image_file(path: Path) -> ImageFile:
    """Read a file and its header.

    Raises:
        ImageError: If it cannot be read, is empty, is no image, or has more than `MAX_PIXELS`.
    """
    try:
        content = path.read_bytes()
        if not content:
            raise ValueError("the file is empty")
        with Image.open(io.BytesIO(content)) as image:
            (width, height), form, mode = image.size, image.format, image.mode
        if width * height > MAX_PIXELS:
            raise ValueError(f"{width}x{height} pixels, more than {MAX_PIXELS:,}")
    except Exception as error:  # a damaged header fails in any way
        raise _unusable(path, error) from error
    is_plain = form == "JPEG" and mode in ("RGB", "L") and _END_OF_IMAGE in content[-_END_WITHIN:]
    return ImageFile(path, content, height, width, is_plain)


def decode(file: ImageFile) -> np.ndarray:
    """RGB pixels, (H, W, 3) uint8.

    Raises:
        ImageError: If the file is truncated or damaged.
    """
    try:
        with Image.open(io.BytesIO(file.content)) as image:
            return np.array(image.convert("RGB"))
    except Exception as error:  # a damaged file fails in any way
        raise _unusable(file.path, error) from error


def _unusable(path: Path, error: Exception) -> ImageError:
    reason = str(error) if isinstance(error, ValueError | OSError) else repr(error)
    if "cannot identify image file" in reason:
        reason = "no image in a known format"
    return ImageError(
        f"{path} cannot be used ({reason}): replace or delete it, or set data.on_error=skip to go on without"
    )
