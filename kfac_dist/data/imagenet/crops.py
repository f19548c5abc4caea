"""Which part of an image a network sees, and at what size: geometry and its random draws, no pixels moved.

Two recipes:

- ``paper``: resize to a square ignoring the aspect ratio (256 for an output of 224), cut out the output at a
  random place, or in the middle for evaluation.
- ``random_resized_crop``: a rectangle of 8 to 100 % of the area and aspect ratio 3/4 to 4/3, resized to the
  output; for evaluation the shorter side is resized (256 for 224) and the middle cut out (Szegedy et al. 2014).

All draws of a slot come from one generator keyed by (seed, iteration, slot) and do not depend on the images'
sizes, so they are the same whoever decodes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kfac_dist.data.random_streams import RandomStream, keyed_generator
from kfac_dist.vocabulary import Preprocessing

_AREA = (0.08, 1.0)
_LOG_ASPECT = (math.log(3 / 4), math.log(4 / 3))
_ATTEMPTS = 10


@dataclass(frozen=True)
class Crop:
    """A square cut from an image: cut a box, resize it, cut the square, mirror it. All in pixels.

    Attributes:
        box: (top, left, height, width) in the image.
        resized: (height, width) that the box is resized to, >= side.
        offset: (top, left) of the square in the resized box.
        side: Height and width of the result.
        mirrored: Whether left and right are exchanged.
    """

    box: tuple[int, int, int, int]
    resized: tuple[int, int]
    offset: tuple[int, int]
    side: int
    mirrored: bool

    def apply(self, pixels: np.ndarray) -> Tensor:
        """The square, (3, side, side) uint8, of an image (H, W, 3) uint8.

        Resizing is bilinear with antialiasing (a triangle filter as wide as the reduction).
        """
        top, left, height, width = self.box
        cut = torch.from_numpy(pixels[top : top + height, left : left + width]).permute(2, 0, 1)
        resized = torch.nn.functional.interpolate(cut[None], size=self.resized, mode="bilinear", antialias=True)[0]
        top, left = self.offset
        square = resized[:, top : top + self.side, left : left + self.side]
        return square.flip(2) if self.mirrored else square

    def outline(self) -> tuple[float, float, float, float]:
        """(top, left, height, width) of the square in the image's own pixels."""
        top, left, height, width = self.box
        rows, columns = height / self.resized[0], width / self.resized[1]
        return (
            top + self.offset[0] * rows,
            left + self.offset[1] * columns,
            self.side * rows,
            self.side * columns,
        )


CropFunction = Callable[[int, int], Crop]
"""The crop of an image, given its height and width."""


@dataclass(frozen=True)
class Crops:
    """The crops of a run.

    Attributes:
        preprocessing: Which recipe.
        side: Height and width of the images that the network sees.
        flip: Whether a training image is mirrored with probability one half.
        seed: The run's seed, >= 0.
    """

    preprocessing: Preprocessing
    side: int
    flip: bool
    seed: int

    def train(self, num_images: int, iteration: int, slot: int) -> list[CropFunction]:
        """Random crops for the images of one slot."""
        generator = keyed_generator(self.seed, RandomStream.CROP_FLIP, iteration, slot)
        mirrored = generator.random(num_images) < (0.5 if self.flip else 0.0)
        places = generator.random((num_images, 2))
        if self.preprocessing == "paper":
            return [_paper_crop(self.side, place, bool(mirror)) for place, mirror in zip(places, mirrored, strict=True)]
        shapes = generator.random((num_images, _ATTEMPTS, 2))
        return [
            _random_resized_crop(self.side, place, shape, bool(mirror))
            for place, shape, mirror in zip(places, shapes, mirrored, strict=True)
        ]

    def evaluation(self) -> CropFunction:
        """The crop of an evaluation image: its middle."""
        if self.preprocessing == "paper":
            margin = resized_side(self.side) - self.side
            return lambda height, width: _square_crop(
                height, width, self.side, (margin // 2, margin // 2), mirrored=False
            )
        return lambda height, width: _centre_crop(height, width, self.side)


def resized_side(side: int) -> int:
    """Side to which images are resized before the output is cut out: 256 for 224, in proportion for others."""
    return round(side * 256 / 224)


def upper_left_crop(side: int) -> CropFunction:
    """The upper-left square of the resized image, of which the paper's mean image is the mean."""
    return lambda height, width: _square_crop(height, width, side, (0, 0), mirrored=False)


def _square_crop(height: int, width: int, side: int, offset: tuple[int, int], mirrored: bool) -> Crop:
    resized = resized_side(side)
    return Crop((0, 0, height, width), (resized, resized), offset, side, mirrored)


def _paper_crop(side: int, place: np.ndarray, mirrored: bool) -> CropFunction:
    top, left = (int(number) for number in place * (resized_side(side) - side + 1))
    return lambda height, width: _square_crop(height, width, side, (top, left), mirrored)


def _random_resized_crop(side: int, place: np.ndarray, shapes: np.ndarray, mirrored: bool) -> CropFunction:
    def crop(height: int, width: int) -> Crop:
        rows, columns = _random_box(height, width, shapes)
        top, left = int(place[0] * (height - rows + 1)), int(place[1] * (width - columns + 1))
        return Crop((top, left, rows, columns), (side, side), (0, 0), side, mirrored)

    return crop


def _random_box(height: int, width: int, shapes: np.ndarray) -> tuple[int, int]:
    """Height and width of the first drawn box that fits, else of the largest with an allowed aspect ratio."""
    for area_draw, aspect_draw in shapes:
        area = height * width * (_AREA[0] + area_draw * (_AREA[1] - _AREA[0]))
        aspect = math.exp(_LOG_ASPECT[0] + aspect_draw * (_LOG_ASPECT[1] - _LOG_ASPECT[0]))
        columns, rows = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < columns <= width and 0 < rows <= height:
            return rows, columns
    narrowest, widest = math.exp(_LOG_ASPECT[0]), math.exp(_LOG_ASPECT[1])
    columns = max(1, min(width, round(height * widest)))
    return max(1, min(height, round(width / narrowest))), columns


def _centre_crop(height: int, width: int, side: int) -> Crop:
    short = resized_side(side)
    rows, columns = (max(short, int(short * length / min(height, width))) for length in (height, width))
    return Crop((0, 0, height, width), (rows, columns), ((rows - side) // 2, (columns - side) // 2), side, False)
