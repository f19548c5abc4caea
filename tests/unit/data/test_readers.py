"""Readers on small files in the original formats, and batches on the device."""

import os
import pickle
import struct
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import scipy.io
import torch
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR10

from kfac_dist.config.data import BUILT_IN, Cifar10Config, DigitsConfig, SvhnConfig, name_of
from kfac_dist.config.schema import AugmentConfig
from kfac_dist.data import cifar10 as cifar10_module
from kfac_dist.data import create, digits
from kfac_dist.data.augment import CropFlip
from kfac_dist.data.cifar10 import read_cifar10
from kfac_dist.data.create import create_dataset, describe_dataset
from kfac_dist.data.digits import read_digits
from kfac_dist.data.in_memory import ImageArrays, InMemoryDataset, channel_statistics
from kfac_dist.data.sampling import SlotSampler
from kfac_dist.data.svhn import read_svhn
from kfac_dist.errors import InputError

CPU = torch.device("cpu")
CIFAR_FILES = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]


class Python2Pickler(pickle._Pickler):  # type: ignore[name-defined]
    """Writes byte strings as Python 2 did, as the published batches have them."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_bytes(self, value: bytes) -> None:
        self.write(b"T" + struct.pack("<i", len(value)) + value)

    dispatch[bytes] = save_bytes


def cifar_batch(first: int, num_images: int = 3) -> dict[bytes, object]:
    data = (np.arange(num_images * 3072).reshape(num_images, 3072) * 7 + first).astype(np.uint8)
    return {b"batch_label": b"x", b"labels": [(first + n) % 10 for n in range(num_images)], b"data": data}


def write_batch(path: Path, batch: object) -> None:
    with path.open("wb") as file:
        Python2Pickler(file, protocol=2).dump(batch)


@pytest.fixture
def cifar_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for first, name in enumerate(CIFAR_FILES):
        write_batch(folder / name, cifar_batch(first))
    return folder


def test_cifar10_batches_from_the_folder_or_its_parent(cifar_folder: Path) -> None:
    for root in (cifar_folder, cifar_folder.parent):
        arrays = read_cifar10(root)
        assert arrays.train_images.shape == (15, 3, 32, 32)
        assert arrays.train_images.dtype == np.uint8
        assert arrays.train_labels.tolist() == [first + n for first in range(5) for n in range(3)]
        assert arrays.eval_labels.tolist() == [5, 6, 7]
        assert arrays.train_labels.dtype == np.int64
        # The second training batch's third image: 1,024 values of red, then green, then blue, row by row.
        assert arrays.train_images[5, 1, 2, 3] == ((2 * 3072 + 1024 + 2 * 32 + 3) * 7 + 1) % 256


def test_cifar10_missing_folder_and_file(tmp_path: Path, cifar_folder: Path) -> None:
    with pytest.raises(InputError, match=r"data\.root .*nowhere.*data_batch_1.* missing: unpack https://"):
        read_cifar10(tmp_path / "nowhere")
    (cifar_folder / "data_batch_4").unlink()
    with pytest.raises(InputError, match=r"where data_batch_4 is missing"):
        read_cifar10(cifar_folder)


@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 0.999])
def test_truncated_cifar10_batch_is_named(cifar_folder: Path, kept: float) -> None:
    path = cifar_folder / "data_batch_2"
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(InputError, match=r"data_batch_2 is not a CIFAR-10 batch .*truncated"):
        read_cifar10(cifar_folder)


@pytest.mark.parametrize(
    ("batch", "problem"),
    [
        ([1, 2], "no dictionary"),
        ({b"data": cifar_batch(0)[b"data"]}, "no dictionary with data and labels"),
        (cifar_batch(0) | {b"labels": [1, 2]}, "each of the 3 images"),
        (cifar_batch(0) | {b"labels": [1, 2, 10]}, "labels outside"),
        (cifar_batch(0) | {b"labels": [1, 2, 0.5]}, "whole number"),
        (cifar_batch(0) | {b"data": np.zeros((3, 3072))}, "bytes with 3072"),
        (cifar_batch(0) | {b"data": np.zeros((3, 100), np.uint8)}, "bytes with 3072"),
        (cifar_batch(0, num_images=0), "0 images"),
    ],
)
def test_cifar10_batch_of_another_structure_is_named(cifar_folder: Path, batch: object, problem: str) -> None:
    write_batch(cifar_folder / "test_batch", batch)
    with pytest.raises(InputError, match=rf"test_batch is not a CIFAR-10 batch .*{problem}"):
        read_cifar10(cifar_folder)


def test_whole_cifar10_batch_must_have_the_published_sum(cifar_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar10_module, "_WHOLE_BATCH", 3)
    with pytest.raises(InputError, match=r"data_batch_1 must have the MD5 sum c99cafc152244af753f735de768cd75f"):
        read_cifar10(cifar_folder)


class Exploit:
    def __init__(self, command: tuple[Callable[..., object], str]) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return self.command[0], (self.command[1],)


def test_cifar10_sums_are_torchvisions() -> None:
    assert list(map(tuple, CIFAR10.train_list)) == list(cifar10_module.TRAIN_SUMS.items())
    assert list(map(tuple, CIFAR10.test_list)) == list(cifar10_module.EVAL_SUMS.items())


def test_code_in_a_cifar10_batch_does_not_run(cifar_folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    write_batch(cifar_folder / "data_batch_1", cifar_batch(0) | {b"x": Exploit((os.system, f"touch {marker}"))})
    with pytest.raises(InputError, match=r"data_batch_1 .*system, which image data do not need"):
        read_cifar10(cifar_folder)
    assert not marker.exists()


def test_published_cifar10() -> None:
    root = os.environ.get("KFAC_DIST_DATA")
    if root is None or not (Path(root) / "cifar-10-batches-py").is_dir():
        pytest.skip("KFAC_DIST_DATA does not name a folder with cifar-10-batches-py")
    arrays = read_cifar10(Path(root))
    assert arrays.train_images.shape == (50_000, 3, 32, 32)
    assert np.bincount(arrays.train_labels).tolist() == [5_000] * 10
    assert np.bincount(arrays.eval_labels).tolist() == [1_000] * 10
    mean, deviation = channel_statistics(arrays.train_images)
    np.testing.assert_allclose(mean / 255, [0.4914, 0.4822, 0.4465], atol=1e-4)
    np.testing.assert_allclose(deviation / 255, [0.2470, 0.2435, 0.2616], atol=1e-4)


@pytest.fixture
def svhn_folder(tmp_path: Path) -> Path:
    for name, num_images in (("train_32x32.mat", 12), ("test_32x32.mat", 4)):
        images = np.arange(32 * 32 * 3 * num_images).reshape(32, 32, 3, num_images) % 251
        labels = (np.arange(num_images)[:, None] % 10 + 1).astype(np.uint8)
        scipy.io.savemat(tmp_path / name, {"X": images.astype(np.uint8), "y": labels}, do_compression=True)
    return tmp_path


def test_svhn(svhn_folder: Path) -> None:
    arrays = read_svhn(svhn_folder)
    assert arrays.train_images.shape == (12, 3, 32, 32)
    assert arrays.eval_images.shape == (4, 3, 32, 32)
    assert arrays.train_labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2]
    assert arrays.train_labels.dtype == np.int64
    assert arrays.train_images[7, 2, 5, 6] == (((5 * 32 + 6) * 3 + 2) * 12 + 7) % 251


def test_svhn_missing_and_damaged_files(svhn_folder: Path) -> None:
    path = svhn_folder / "test_32x32.mat"
    content = path.read_bytes()
    for kept in (0, 50, 130, 200, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:kept])
        with pytest.raises(InputError, match=r"test_32x32\.mat is not an SVHN file .*truncated"):
            read_svhn(svhn_folder)
    scipy.io.savemat(path, {"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.array([[1], [11]])})
    with pytest.raises(InputError, match=r"test_32x32\.mat .*labels outside"):
        read_svhn(svhn_folder)
    scipy.io.savemat(path, {"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.array([[1]])})
    with pytest.raises(InputError, match=r"test_32x32\.mat .*not images and their labels"):
        read_svhn(svhn_folder)
    path.unlink()
    with pytest.raises(InputError, match=r"where test_32x32\.mat is missing: fetch them from http"):
        read_svhn(svhn_folder)


def test_digits_split() -> None:
    arrays = read_digits()
    assert arrays.train_images.shape == (1438, 1, 8, 8)
    assert arrays.eval_images.shape == (359, 1, 8, 8)
    all_images = np.concatenate([arrays.train_images, arrays.eval_images]).reshape(-1, 64)
    all_labels = np.concatenate([arrays.train_labels, arrays.eval_labels])
    mine = sorted(zip(all_images.tolist(), all_labels.tolist(), strict=True))
    bunch = load_digits()
    assert mine == sorted(zip(bunch.data.astype(int).tolist(), bunch.target.tolist(), strict=True))
    shares = np.bincount(arrays.eval_labels) / np.bincount(all_labels)
    assert np.abs(shares - 0.2).max() < 0.003
    for labels in (arrays.train_labels, arrays.eval_labels):  # the first images, too, are of mixed classes
        assert np.bincount(labels[:100], minlength=10).min() >= 3


def test_digits_are_the_same_where_scikit_learn_keeps_them_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    found = read_digits()
    monkeypatch.setattr(digits, "_FILE", "elsewhere")
    for array, other in zip(astuple(found), astuple(read_digits()), strict=True):
        np.testing.assert_array_equal(array, other)


def test_channel_statistics() -> None:
    images = np.random.default_rng(0).integers(0, 256, (7, 2, 5, 3), dtype=np.uint8)
    images[:, 1] = 9
    mean, deviation = channel_statistics(images)
    np.testing.assert_allclose(mean, images.mean((0, 2, 3)), rtol=1e-13)
    np.testing.assert_allclose(deviation, [images[:, 0].std(), 1.0], rtol=1e-13)


@pytest.fixture
def arrays() -> ImageArrays:
    generator = np.random.default_rng(0)
    return ImageArrays(
        generator.integers(0, 256, (20, 3, 6, 6), dtype=np.uint8),
        np.arange(20) % 4,
        generator.integers(0, 256, (7, 3, 6, 6), dtype=np.uint8),
        np.arange(7) % 4,
        ("a", "b", "c", "d"),
    )


def test_train_batches_are_the_slots_normalised_and_augmented(arrays: ImageArrays) -> None:
    crop_flip = CropFlip(1, True, seed=5)
    dataset = InMemoryDataset(arrays, crop_flip, CPU, torch.float64)
    assert (dataset.num_classes, dataset.image_shape, dataset.num_train, dataset.num_eval) == (
        4,
        (3, 6, 6),
        20,
        7,
    )
    sampler = SlotSampler(20, 4, 6, seed=5)
    mean = arrays.train_images.mean((0, 2, 3), keepdims=True)
    deviation = arrays.train_images.std((0, 2, 3), keepdims=True)
    normalised = torch.from_numpy((arrays.train_images - mean) / deviation)
    batches = list(dataset.train_batches(sampler, rank=1, num_ranks=2, first_iteration=3, last_iteration=5))
    places = [(iteration, slot) for iteration in (3, 4) for slot in (1, 3, 5)]
    for batch, (iteration, slot) in zip(batches, places, strict=True):
        images, labels = batch.images, batch.labels
        assert (batch.iteration, batch.slot) == (iteration, slot)
        indices = torch.from_numpy(sampler.indices(iteration, slot))
        expected = crop_flip.apply(normalised[indices], iteration, slot)
        torch.testing.assert_close(images, expected, rtol=1e-13, atol=1e-13)
        assert labels.tolist() == (indices % 4).tolist()
        assert images.dtype == torch.float64


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 9])
@pytest.mark.parametrize("batch_size", [2, 100])
def test_eval_batches_have_every_image_once(arrays: ImageArrays, num_ranks: int, batch_size: int) -> None:
    dataset = InMemoryDataset(arrays, CropFlip(1, True, seed=5), CPU, torch.float64)
    mean = arrays.train_images.mean((0, 2, 3), keepdims=True)
    deviation = arrays.train_images.std((0, 2, 3), keepdims=True)
    batches = [batch for rank in range(num_ranks) for batch in dataset.eval_batches(rank, num_ranks, batch_size)]
    assert all(0 < len(images) <= batch_size for images, _ in batches)
    images = torch.cat([images for images, _ in batches])
    expected = torch.from_numpy((arrays.eval_images - mean) / deviation)
    torch.testing.assert_close(images, expected, rtol=1e-13, atol=1e-13)
    assert torch.cat([labels for _, labels in batches]).tolist() == arrays.eval_labels.tolist()


def test_create_dataset_takes_the_first_images(svhn_folder: Path) -> None:
    settings = SvhnConfig(name="svhn", root=str(svhn_folder), train_limit=5, eval_limit=3)
    augment = AugmentConfig(pad_crop=2, flip=True)
    dataset = create_dataset(settings, augment, CPU, torch.float32, seed=4)
    assert (dataset.num_train, dataset.num_eval) == (5, 3)
    assert dataset.train_labels.tolist() == [1, 2, 3, 4, 5]
    assert dataset.crop_flip == CropFlip(padding=2, flip=True, seed=4)
    images, _ = next(dataset.eval_batches(0, 1, 8))
    assert images.dtype == torch.float32
    # Normalised by the images in use, not by those beyond the limit.
    pixels = read_svhn(svhn_folder)
    used = pixels.train_images[:5].astype(np.float64)
    expected = (pixels.eval_images[0, 0, 0, 0] - used[:, 0].mean()) / used[:, 0].std()
    assert images[0, 0, 0, 0].item() == pytest.approx(expected, rel=1e-5)


def test_create_dataset_digits_and_cifar10(cifar_folder: Path) -> None:
    digits = create_dataset(DigitsConfig(name="digits"), AugmentConfig(), CPU, torch.float64, seed=0)
    assert (digits.num_train, digits.num_eval, digits.num_classes, digits.image_shape) == (
        1438,
        359,
        10,
        (1, 8, 8),
    )
    images = next(digits.train_batches(SlotSampler(1438, 1438, 1, 0), 0, 1, 0, 1)).images
    assert images.mean().item() == pytest.approx(0, abs=1e-12)
    assert images.std(correction=0).item() == pytest.approx(1, rel=1e-12)
    settings = Cifar10Config(name="cifar10", root=str(cifar_folder))
    cifar = create_dataset(settings, AugmentConfig(), CPU, torch.float32, seed=0)
    assert (cifar.num_train, cifar.image_shape) == (15, (3, 32, 32))


@pytest.mark.parametrize(("key", "available"), [("train_limit", 1438), ("eval_limit", 359)])
def test_limit_above_the_images_there_are(key: str, available: int) -> None:
    settings = DigitsConfig.model_validate({"name": "digits", key: 5000})
    with pytest.raises(InputError, match=rf"data\.{key} must be <= {available}, .*got 5000"):
        create_dataset(settings, AugmentConfig(), CPU, torch.float32, seed=0)


def test_padding_must_leave_something_of_an_image() -> None:
    digits = DigitsConfig(name="digits")
    create_dataset(digits, AugmentConfig(pad_crop=7), CPU, torch.float32, seed=0)
    for padding in (8, 100):
        with pytest.raises(InputError, match=rf"augment\.pad_crop must be < 8, the side of an image, got {padding}"):
            create_dataset(digits, AugmentConfig(pad_crop=padding), CPU, torch.float32, seed=0)


def test_every_built_in_kind_has_its_row() -> None:
    assert create._SOURCES.keys() == {name_of(kind) for kind in BUILT_IN}


def test_descriptions_are_what_the_readers_read(cifar_folder: Path, svhn_folder: Path) -> None:
    digits = DigitsConfig(name="digits")
    made = create_dataset(digits, AugmentConfig(), CPU, torch.float32, seed=0)
    described = describe_dataset(digits)
    assert (described.num_train, described.num_classes) == (made.num_train, made.num_classes)
    svhn = SvhnConfig(name="svhn", root=str(svhn_folder))
    small = Cifar10Config(name="cifar10", root=str(cifar_folder), downsample=4)
    assert describe_dataset(small).image_shape == (3, 8, 8)
    half = SvhnConfig(name="svhn", root=str(svhn_folder), downsample=2)
    for settings in (digits, Cifar10Config(name="cifar10", root=str(cifar_folder)), svhn, small, half):
        made = create_dataset(settings, AugmentConfig(), CPU, torch.float32, seed=0)
        assert describe_dataset(settings).image_shape == made.image_shape
    assert describe_dataset(svhn).num_train == 73_257
    assert describe_dataset(SvhnConfig(name="svhn", root="none", train_limit=9)).num_train == 9
