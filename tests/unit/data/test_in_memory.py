"""One's own arrays as a data set: what is accepted, what is refused and how, and how it is shown."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from kfac_dist.data.augment import CropFlip
from kfac_dist.data.in_memory import ImageArrays, InMemoryDataset, channel_statistics, downsample
from kfac_dist.data.sampling import SlotSampler
from kfac_dist.errors import InputError

CPU = torch.device("cpu")
CLASSES = ("a", "b", "c", "d")


def bytes_of(num_images: int, side: int = 6) -> np.ndarray:
    return np.random.default_rng(num_images).integers(0, 256, (num_images, 3, side, side), dtype=np.uint8)


ARRAYS = ImageArrays(bytes_of(20), np.arange(20) % 4, bytes_of(7), np.arange(7) % 4, CLASSES)


def create(arrays: ImageArrays, crop_flip: CropFlip | None = None) -> InMemoryDataset:
    return InMemoryDataset(arrays, crop_flip or CropFlip(0, False, seed=0), CPU, torch.float64)


def floats(low: float, high: float, dtype: str = "float32") -> ImageArrays:
    """The same images with other values: 0 ... 255 moved to low ... high."""
    train, evaluation = (
        (low + (high - low) * (images / 255)).astype(dtype) for images in (ARRAYS.train_images, ARRAYS.eval_images)
    )
    return replace(ARRAYS, train_images=train, eval_images=evaluation)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-2, 2), (0, 4000)])
def test_floating_images_give_the_batches_of_bytes(low: float, high: float) -> None:
    ours, theirs = create(floats(low, high, "float64")), create(ARRAYS)
    sampler = SlotSampler(20, 4, 5, seed=0)
    for mine, other in zip(*(made.train_batches(sampler, 0, 1, 0, 1) for made in (ours, theirs)), strict=True):
        torch.testing.assert_close(mine.images, other.images, rtol=1e-9, atol=1e-9)
    for (left, _), (right, _) in zip(ours.eval_batches(0, 1, 3), theirs.eval_batches(0, 1, 3), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)
    shown = ours.to_pixels(next(ours.train_batches(sampler, 0, 1, 0, 1)).images)
    stored, bytes_ = (
        np.stack([original.pixels for original in made.originals(sampler, 0, 0, 4)]) for made in (ours, theirs)
    )
    assert np.abs(255 * shown.permute(0, 2, 3, 1).numpy() - stored).max() <= 0.51
    assert np.abs(stored - bytes_.astype(int)).max() <= 1  # black stays black and white white


def test_the_digest_tells_orders_and_bytes_apart_but_no_roundings() -> None:
    digest = create(ARRAYS).digest
    labels, images = ARRAYS.train_labels, ARRAYS.eval_images
    assert create(replace(ARRAYS, train_labels=labels.astype("uint8"), eval_images=images.copy("F"))).digest == digest
    assert create(replace(ARRAYS, train_labels=labels[::-1])).digest != digest
    assert create(replace(ARRAYS, eval_images=images[::-1])).digest != digest
    assert create(floats(0, 1)).digest == create(floats(0, 1 + 1e-6)).digest


@pytest.mark.parametrize("dtype", ["int32", "uint8", "uint16", "int64", "uint64"])
def test_labels_of_any_integer_type(dtype: str) -> None:
    made = create(replace(ARRAYS, train_labels=ARRAYS.train_labels.astype(dtype)))
    assert made.train_labels.dtype == torch.int64
    assert made.train_labels.tolist() == ARRAYS.train_labels.tolist()


def test_read_only_and_reordered_arrays_are_taken() -> None:
    frozen = bytes_of(20)
    frozen.setflags(write=False)
    made = create(replace(ARRAYS, train_images=frozen, eval_images=ARRAYS.eval_images[::-1]))
    np.testing.assert_array_equal(made.train_images.numpy(), frozen)
    np.testing.assert_array_equal(made.eval_images.numpy(), ARRAYS.eval_images[::-1])


def test_constant_channels_are_divided_by_one() -> None:
    images = np.full((7, 2, 5, 3), 0.1, dtype=np.float32)
    images[:, 0] = np.random.default_rng(0).normal(size=(7, 5, 3))
    mean, deviation = channel_statistics(images)
    np.testing.assert_allclose(mean, images.mean((0, 2, 3), dtype=np.float64), rtol=1e-13)
    np.testing.assert_allclose(deviation, [images[:, 0].std(dtype=np.float64), 1.0], rtol=1e-13)


def test_images_of_zeros_can_be_shown() -> None:
    made = create(replace(ARRAYS, train_images=np.zeros_like(ARRAYS.train_images)))
    assert made.to_pixels(torch.zeros(1, 3, 6, 6)).tolist() == np.zeros((1, 3, 6, 6)).tolist()  # not 0 / 0


def with_value(array: np.ndarray, place: tuple[int, ...], value: float) -> np.ndarray:
    changed = array.copy()
    changed[place] = value
    return changed


FLOATS = floats(0, 1)
NAN = with_value(FLOATS.train_images, (3, 1, 2, 5), np.nan)
TRAIN, EVAL, LABELS = ARRAYS.train_images, ARRAYS.eval_images, ARRAYS.train_labels
SHAPE = "must be of shape (images, channels, height, width)"
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"train_images": torch.zeros(2, 3, 6, 6)}, "train_images must be a NumPy array, got Tensor: convert with np.asar"),
    ({"eval_labels": [0, 1]}, "eval_labels must be a NumPy array, got list: convert with np.asarray"),
    ({"train_images": TRAIN.astype(int)}, "must be of type uint8, float16, float32, float64, got int64: convert with"),
    ({"train_images": TRAIN.astype(">f4")}, "train_images must be of type uint8, float16, float32, float64, got >f4"),
    ({"eval_images": EVAL[:, 0]}, f"eval_images {SHAPE}, none zero, got (7, 6, 6)"),
    ({"eval_images": EVAL[:0], "eval_labels": LABELS[:0]}, f"eval_images {SHAPE}, none zero, got (0, 3, 6, 6)"),
    ({"train_images": TRAIN.transpose(0, 2, 3, 1)}, f"{SHAPE}, got (20, 6, 6, 3), which looks like channels last"),
    ({"train_images": NAN}, "train_images must be finite, got nan at (3, 1, 2, 5): replace or leave out such images"),
    ({"eval_images": bytes_of(7, 8)}, "eval_images must have the shape of train_images, (3, 6, 6), got (3, 8, 8)"),
    ({"eval_images": FLOATS.eval_images}, "eval_images must have the type of train_images, uint8, got float32"),
    ({"train_labels": LABELS / 1.0}, "train_labels must be class indices of an integer type, got float64: convert"),
    ({"train_labels": LABELS > 1}, "train_labels must be class indices of an integer type, got bool"),
    ({"train_labels": np.eye(4, dtype=int)[LABELS]}, "train_labels must be of shape (images,), one class index each, "),
    ({"train_labels": LABELS[:19]}, "train_labels must hold one label for each of the 20 train_images, got 19"),
    ({"train_labels": LABELS + 1}, "train_labels must be in [0, 4), the number of class_names, got 4 at 3 (5 such"),
    ({"eval_labels": ARRAYS.eval_labels - 1}, "eval_labels must be in [0, 4), the number of class_names, got -1 at 0"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_other_arrays_are_refused_by_name_rule_and_value(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        create(replace(ARRAYS, **changes))


def test_originals_outline_the_crop() -> None:
    made = create(ARRAYS, CropFlip(2, True, seed=3))
    sampler = SlotSampler(20, 10, 2, seed=0)
    originals = made.originals(sampler, 1, 1, 6)
    batch = next(b for b in made.train_batches(sampler, 0, 1, 1, 2) if b.slot == 1)
    cropped = made.to_pixels(batch.images[:6]).permute(0, 2, 3, 1).numpy()
    assert len(originals) == 6
    for original, image in zip(originals, cropped, strict=True):
        assert original.outline is not None
        top, left, height, width = (int(number) for number in original.outline)
        padded = np.full((10, 10, 3), np.nan)
        padded[2:8, 2:8] = original.pixels / 255
        crop = padded[top + 2 : top + 2 + height, left + 2 : left + 2 + width]
        assert any(np.nanmax(np.abs(crop - way)) < 1e-6 for way in (image, image[:, ::-1])), (
            "the outline is not what was cut out"
        )
    assert [original.outline for original in create(ARRAYS).originals(sampler, 1, 1, 2)] == [None, None]


def test_downsampling_takes_means_of_squares() -> None:
    images = np.arange(2 * 1 * 4 * 4, dtype=np.uint8).reshape(2, 1, 4, 4)
    arrays = ImageArrays(images, np.zeros(2, np.int64), images.astype(np.float64), np.zeros(2, np.int64), ("a",))
    small = downsample(arrays, 2)
    assert small.train_images.dtype == np.uint8
    # 0, 1, 4, 5 are 2.5 on average, which rounds to 2
    assert small.train_images[0, 0].tolist() == [[2, 4], [10, 12]]
    assert small.eval_images[1, 0].tolist() == [[18.5, 20.5], [26.5, 28.5]]
    assert downsample(arrays, 1) is arrays
