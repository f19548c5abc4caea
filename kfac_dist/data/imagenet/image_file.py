"""One image: from a file's bytes to RGB pixels, or an error that names the file.

Files are judged by what is in them, not by their names: a PNG may be called .JPEG. Orientation tags are ignored, as
torchvision's ImageFolder ignores them. Grey values of 16 bits are scaled to 8, which Pillow's own conversion does not
do (it cuts them off at 255, which is white); values without a known range are refused.

(torchvision's own decoder would be faster than Pillow, but has been deprecated since version 0.29 and is to be
removed.)
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from kfac_dist.errors import ImageError

MAX_PIXELS = 89_478_485
"""Images of more pixels are refused before they are decoded: 256 MiB of RGB; ImageNet's largest is far below."""

_BITS_PER_SAMPLE, _PHOTOMETRIC, _BLACK_IS_ZERO = 258, 262, 1  # TIFF tags, and a value of the second
_END_OF_IMAGE = b"\xff\xd9"
_END_WITHIN = 4096  # bytes from the end of the file: some writers add padding or a note


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
        ImageError: If it cannot be read, is empty, is no image, has more than `MAX_PIXELS`, or values without a
            known range.
    """
    try:
        content = path.read_bytes()
        if not content:
            raise ValueError("the file is empty")
        with Image.open(io.BytesIO(content)) as image:
            (width, height), form, mode = image.size, image.format, image.mode
            _is_16_bit_grey(image)
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
            if _is_16_bit_grey(image):
                grey = (np.asarray(image).astype(np.uint32) + 128) // 257  # 0 ... 65,535 to 0 ... 255, rounded
                return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)
            return np.array(image.convert("RGB"))
    except Exception as error:  # a damaged file fails in any way
        raise _unusable(file.path, error) from error


def _is_16_bit_grey(image: Image.Image) -> bool:
    """Whether values are grey levels from 0 (black) to 65,535; if not, Pillow converts them to 8 bits.

    Raises:
        ValueError: If Pillow would cut off the values, and their range is not known.
    """
    if image.mode != "F" and image.mode != "I" and not image.mode.startswith("I;"):
        return False
    if image.mode != "F" and image.format in ("PNG", "PPM"):  # a PGM's own largest value is scaled to 65,535
        return True
    tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    if image.mode.startswith("I;") and tags.get(_BITS_PER_SAMPLE) == (16,) and tags.get(_PHOTOMETRIC) == _BLACK_IS_ZERO:
        return True
    raise ValueError(
        f"{image.format} of mode {image.mode}, whose values have no known range: 8 or 16 bits a channel are read"
    )


def _unusable(path: Path, error: Exception) -> ImageError:
    reason = str(error) if isinstance(error, ValueError | OSError) else repr(error)
    if "cannot identify image file" in reason:
        reason = "no image in a known format"
    return ImageError(
        f"{path} cannot be used ({reason}): replace or delete it, or set data.on_error=skip to go on without"
    )
