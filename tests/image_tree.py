"""An ImageFolder tree of small generated images, of many kinds: what the tests of `imagenet` read."""

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("n01", "n02", "n03")
NUM_TRAIN, NUM_EVAL = 21, 10
SIZES = ((40, 30), (30, 40), (64, 64), (23, 51))  # width, height


def make_image(number: int, label: int) -> Image.Image:
    """A colour of its class, a gradient and noise, none of it periodic: a shift or a flip changes every pixel."""
    width, height = SIZES[number % len(SIZES)]
    generator = np.random.default_rng(number)
    rows, columns = np.linspace(0, 60, height)[:, None, None], np.linspace(0, 90, width)[None, :, None]
    colour = np.array([[60, 20, 20], [20, 60, 20], [20, 20, 60]])[label]
    pixels = colour + rows + columns + generator.integers(0, 20, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def write_tree(root: Path) -> Path:
    """Seven training and three or four evaluation images a class; greys, CMYK and a PNG among them."""
    for split, count in (("train", NUM_TRAIN), ("val", NUM_EVAL)):
        for number in range(count):
            label = number % len(CLASSES)
            folder = root / split / CLASSES[label]
            folder.mkdir(parents=True, exist_ok=True)
            image = make_image(number + 1000 * (split == "val"), label)
            path = folder / f"{number:03}.JPEG"
            if number == 4:
                image.convert("L").save(path, "JPEG", quality=95)
            elif number == 5:
                image.convert("CMYK").save(path, "JPEG", quality=95)
            elif number == 6:
                image.save(path, "PNG")
            else:
                image.save(path, "JPEG", quality=95)
    return root
