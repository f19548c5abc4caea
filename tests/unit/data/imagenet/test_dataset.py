"""The data set `imagenet` on a small generated tree, with both loaders: coverage, keys, damage, the mean image."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kfac_dist import create_communicator
from kfac_dist.config.data import ImagenetConfig
from kfac_dist.config.schema import AugmentConfig
from kfac_dist.data.create import create_dataset, describe_dataset
from kfac_dist.data.imagenet import dali as dali_module
from kfac_dist.data.imagenet.crops import Crops, resized_side
from kfac_dist.data.imagenet.dali import DaliDecoder
from kfac_dist.data.imagenet.dataset import CHANNEL_DEVIATION, CHANNEL_MEAN, FolderDataset
from kfac_dist.data.imagenet.decoder import DecodedBatch, Request, ThreadDecoder
from kfac_dist.data.imagenet.folder import list_images
from kfac_dist.data.imagenet.image_file import decode, read_image_file
from kfac_dist.data.imagenet.mean_image import compute_mean_image, load_mean_image, save_mean_image
from kfac_dist.data.sampling import SlotSampler
from kfac_dist.data.skipped import SkippedImages
from kfac_dist.errors import ImageError, InputError, TrainingFailed
from tests.image_tree import NUM_EVAL, NUM_TRAIN, write_tree

CPU = torch.device("cpu")
SIDE = 32


@pytest.fixture(params=["torchvision", "dali"])
def loader(request: pytest.FixtureRequest) -> str:
    if request.param == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed (the extra dali)")
    return str(request.param)


@pytest.fixture(scope="module")
def clean_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree that tests must not change."""
    return write_tree(tmp_path_factory.mktemp("tree"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A tree to damage."""
    return write_tree(tmp_path)


def dataset(root: Path, loader: str = "torchvision", seed: int = 0, **settings: object) -> FolderDataset:
    """With per-channel normalisation unless told otherwise, so that no mean image is needed."""
    given = {"preprocessing": "random_resized_crop", "workers": 2, "image_size": SIDE, **settings}
    config = ImagenetConfig.model_validate({"name": "imagenet", "root": str(root), "loader": loader, **given})
    made = create_dataset(config, AugmentConfig(flip=True), CPU, torch.float64, seed)
    assert isinstance(made, FolderDataset)
    return made


def paper_dataset(root: Path, loader: str = "torchvision", **settings: object) -> FolderDataset:
    path = root / f"mean-{SIDE}"
    train = list_images(root, "train")
    save_mean_image(path, torch.full((3, SIDE, SIDE), 100.0, dtype=torch.float64), train)
    return dataset(root, loader, preprocessing="paper", mean_image=str(path), **settings)


def eval_images(made: FolderDataset, num_ranks: int, batch_size: int = 4) -> tuple[Tensor, Tensor]:
    batches = [batch for rank in range(num_ranks) for batch in made.eval_batches(rank, num_ranks, batch_size)]
    assert all(1 <= len(labels) <= batch_size for _, labels in batches)
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


def test_sizes_and_classes(clean_root: Path) -> None:
    made = dataset(clean_root)
    assert (made.num_train, made.num_eval, made.num_classes) == (NUM_TRAIN, NUM_EVAL, 3)
    assert (made.image_shape, made.class_names) == ((3, SIDE, SIDE), ("n01", "n02", "n03"))
    limited = dataset(clean_root, train_limit=6, eval_limit=3)
    assert (limited.num_train, limited.num_eval) == (6, 3)
    assert eval_images(limited, 1)[1].tolist() == [0, 1, 2]
    with pytest.raises(InputError, match=r"data\.train_limit must be <= 21"):
        dataset(clean_root, train_limit=22)


def test_evaluation_is_a_direct_computation(clean_root: Path, loader: str) -> None:
    made = paper_dataset(clean_root, loader)
    images, labels = eval_images(made, 1)
    assert labels.tolist() == made.evaluation.labels.tolist()
    resized, margin = resized_side(SIDE), (resized_side(SIDE) - SIDE) // 2
    for index, image in enumerate(images):
        pixels = torch.from_numpy(decode(read_image_file(made.evaluation.path(index)))).permute(2, 0, 1)
        whole = torch.nn.functional.interpolate(pixels[None], size=(resized, resized), mode="bilinear", antialias=True)
        expected = (whole[0, :, margin : margin + SIDE, margin : margin + SIDE].double() - 100) / 255
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(made.to_pixels(images), images + 100 / 255)


def test_channel_normalisation(clean_root: Path) -> None:
    made = dataset(clean_root)
    images, _ = eval_images(made, 1)
    pixels = made.to_pixels(images)
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (CHANNEL_MEAN, CHANNEL_DEVIATION))
    torch.testing.assert_close(images, (pixels - mean) / deviation, rtol=1e-6, atol=1e-6)
    assert (255 * pixels - (255 * pixels).round()).abs().max() < 1e-9  # whole levels
    assert 0.2 < pixels.mean() < 0.7


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 13])
def test_every_evaluation_image_exactly_once(clean_root: Path, loader: str, num_ranks: int) -> None:
    made = dataset(clean_root, loader)
    images, labels = eval_images(made, num_ranks, batch_size=3)
    expected_images, expected_labels = eval_images(made, 1, batch_size=NUM_EVAL)
    assert torch.equal(images, expected_images)
    assert torch.equal(labels, expected_labels)
    assert len(images.flatten(1).unique(dim=0)) == NUM_EVAL


class PathsOnly:
    """A decoder that opens nothing and notes what it was asked for."""

    def __init__(self) -> None:
        self.paths: list[Path] = []

    def run(self, batches: Iterator[list[Request]]) -> Iterator[DecodedBatch]:
        for requests in batches:
            self.paths += [request.path for request in requests]
            yield DecodedBatch(requests, torch.zeros(len(requests), 3, SIDE, SIDE, dtype=torch.uint8), {})


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_an_epoch_has_every_training_image_exactly_once(clean_root: Path, num_ranks: int) -> None:
    made = dataset(clean_root)
    made.decoder = decoder = PathsOnly()
    sampler = SlotSampler(NUM_TRAIN, 7, 12, seed=0)  # 4 epochs in one iteration of 84
    for rank in range(num_ranks):
        list(made.train_batches(sampler, rank, num_ranks, 0, 2))
    counts = Counter(decoder.paths)
    assert len(counts) == NUM_TRAIN
    assert set(counts.values()) == {8}


def slots_of(made: FolderDataset, num_ranks: int, first: int = 0, last: int = 3) -> dict[tuple[int, int], Tensor]:
    sampler = SlotSampler(NUM_TRAIN, 5, 4, seed=0)
    slots = {}
    for rank in range(num_ranks):
        batches = made.train_batches(sampler, rank, num_ranks, first, last)
        for iteration in range(first, last):
            for slot in sampler.local_slots(rank, num_ranks):
                batch = next(batches)
                images, labels = batch.images, batch.labels
                assert (batch.iteration, batch.slot) == (iteration, slot)
                assert labels.tolist() == made.train.labels[sampler.indices(iteration, slot)].tolist()
                slots[iteration, slot] = images
        assert next(batches, None) is None
    return slots


@pytest.mark.parametrize("preprocessing", ["paper", "random_resized_crop"])
def test_a_slot_is_the_same_on_any_number_of_ranks(clean_root: Path, loader: str, preprocessing: str) -> None:
    make = paper_dataset if preprocessing == "paper" else dataset
    alone = slots_of(make(clean_root, loader), 1)
    assert len(alone) == 12
    for num_ranks in (2, 4):
        shared = slots_of(make(clean_root, loader, workers=num_ranks), num_ranks)
        assert all(torch.equal(images, shared[place]) for place, images in alone.items())
    resumed = slots_of(make(clean_root, loader), 1, first=1)
    assert all(torch.equal(images, alone[place]) for place, images in resumed.items())
    other_seed = slots_of(make(clean_root, loader, seed=1), 1)
    assert not torch.equal(alone[0, 0], other_seed[0, 0])


@pytest.mark.parametrize("preprocessing", ["paper", "random_resized_crop"])
def test_dali_gives_what_torchvision_gives(clean_root: Path, preprocessing: str) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed (the extra dali)")
    make = paper_dataset if preprocessing == "paper" else dataset
    theirs = slots_of(make(clean_root), 1)
    ours = make(clean_root, "dali")
    assert all(torch.equal(images, theirs[place]) for place, images in slots_of(ours, 1).items())
    ours.decoder = DaliDecoder(SIDE, 2, CPU, resize_in_dali=True)  # as on a GPU
    scale = ours.normalisation.scale
    levels = torch.cat([(images - theirs[place]) / scale for place, images in slots_of(ours, 1).items()]).abs()
    assert levels.mean() < 0.35
    assert (levels > 1.01).double().mean() < 0.01  # at the border of an image the filters differ
    assert levels.max() < 25


# The mean image ------------------------------------------------------------------------------------------------


def test_mean_image_is_a_direct_computation(clean_root: Path) -> None:
    train = list_images(clean_root, "train")
    mean, skipped = compute_mean_image(train, SIDE, create_communicator("reduce"), workers=2, skip=False)
    squares = []
    for index in range(len(train)):
        pixels = torch.from_numpy(decode(read_image_file(train.path(index)))).permute(2, 0, 1)[None]
        squares.append(torch.nn.functional.interpolate(pixels, size=(37, 37), mode="bilinear", antialias=True)[0])
    expected = np.mean([square[:, :SIDE, :SIDE].numpy() for square in squares], axis=0, dtype=np.float64)
    np.testing.assert_allclose(mean.numpy(), expected, rtol=1e-14)
    assert 50 < mean.mean() < 200  # a sum of bytes as bytes would stay below 256 / 21
    assert skipped == []


def test_mean_image_of_another_size_or_data_set_is_refused(root: Path) -> None:
    train = list_images(root, "train")
    path = root / "mean"
    mean = torch.rand(3, 48, 48, dtype=torch.float64) * 255
    command = rf"make it with: python -m kfac_dist\.data\.mean_image {root} --output {path} --image-size"
    with pytest.raises(InputError, match=rf"data\.mean_image must be a file, got {path}, which is none: {command} 48"):
        load_mean_image(path, 48, train, root)
    save_mean_image(path, mean, train)
    assert torch.equal(load_mean_image(path, 48, train, root), mean)
    with pytest.raises(InputError, match=rf"is for images of 48x48, and data\.image_size is 32: {command} 32"):
        load_mean_image(path, 32, train, root)
    (root / "train/n01/000.JPEG").unlink()
    fewer = list_images(root, "train")
    with pytest.raises(InputError, match=rf"is of other images \(21 of them\) than the 20 in .*: {command} 48"):
        load_mean_image(path, 48, fewer, root)
    assert torch.equal(load_mean_image(path, 48, fewer, root, compares_images=False), mean)  # another rank's work
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=r"is not a mean image"):
        load_mean_image(path, 48, train, root)


def test_mean_image_of_damaged_images(root: Path) -> None:
    (root / "train/n02/001.JPEG").write_bytes(b"")
    train = list_images(root, "train")
    with pytest.raises(InputError, match=r"n02/001\.JPEG cannot be used \(the file is empty\)"):
        compute_mean_image(train, SIDE, create_communicator("reduce"), workers=2, skip=False)
    with pytest.raises(InputError, match=r"1 of 21 images cannot be used, more than 1 %"):
        compute_mean_image(train, SIDE, create_communicator("reduce"), workers=2, skip=True)


# Damage --------------------------------------------------------------------------------------------------------


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "text": b"not found"}[how])


@pytest.mark.parametrize("how", ["empty", "cut", "text"])
def test_a_damaged_image_is_named(root: Path, loader: str, how: str) -> None:
    damage(root / "train/n02/001.JPEG", how)
    with pytest.raises(ImageError, match=r"train/n02/001\.JPEG cannot be used"):
        slots_of(dataset(root, loader), 1)
    damage(root / "val/n03/002.JPEG", how)
    with pytest.raises(ImageError, match=r"val/n03/002\.JPEG cannot be used"):
        eval_images(dataset(root, loader), 1)


def test_a_skipped_image_is_replaced_in_its_own_slot(root: Path, loader: str) -> None:
    whole = slots_of(dataset(root, loader), 1)
    damage(root / "train/n02/001.JPEG", "cut")
    made = dataset(root, loader, on_error="skip")
    sampler = SlotSampler(NUM_TRAIN, 5, 4, seed=0)
    bad = next(index for index in range(NUM_TRAIN) if made.train.path(index).name == "001.JPEG")
    found = 0
    batches = made.train_batches(sampler, 0, 1, 0, 3)
    for place, expected in whole.items():
        indices = sampler.indices(*place)
        batch = next(batches)
        images, labels = batch.images, batch.labels
        for position, index in enumerate(indices):
            source = (position + 1) % 5 if index == bad else position
            found += index == bad
            assert torch.equal(images[position], expected[source])
            assert labels[position] == made.train.labels[indices[source]]
    assert found == len(made.take_skipped()) >= 2
    assert made.take_skipped() == []


def test_a_slot_without_any_good_image_ends_the_run(root: Path, loader: str) -> None:
    for path in (root / "train").glob("*/*"):
        damage(path, "empty")
    with pytest.raises(ImageError, match="cannot be used"):
        slots_of(dataset(root, loader, on_error="skip"), 1)


def test_skipped_evaluation_images_are_left_out(root: Path, loader: str) -> None:
    whole, whole_labels = eval_images(dataset(root, loader), 1)
    damage(root / "val/n01/000.JPEG", "cut")
    damage(root / "val/n03/002.JPEG", "empty")
    made = dataset(root, loader, on_error="skip")
    kept = [i for i in range(NUM_EVAL) if made.evaluation.path(i).name not in ("000.JPEG", "002.JPEG")]
    for num_ranks in (1, 4):
        images, labels = eval_images(made, num_ranks)
        assert torch.equal(images, whole[kept])
        assert torch.equal(labels, whole_labels[kept])
        assert len(made.take_skipped()) == 2


def test_skips_are_counted_once_and_limited(root: Path) -> None:
    made = dataset(root)
    skipped_images = SkippedImages(made, create_communicator("reduce"))
    skipped_images.gather_and_check("")
    assert skipped_images.take_new() == []
    made._skipped = ["a.JPEG", "a.JPEG"]
    skipped_images.gather_and_check("")
    assert (skipped_images.take_new(), skipped_images.take_new(), skipped_images.skipped) == (
        ["a.JPEG"],
        [],
        ["a.JPEG"],
    )
    made._skipped = ["b.JPEG"]
    with pytest.raises(TrainingFailed, match=r"2 of 31 images cannot be used, more than the 1 % .*; the last: b\.JP"):
        skipped_images.gather_and_check("")
    with pytest.raises(TrainingFailed, match=r"^c\.JPEG is empty$"):
        skipped_images.gather_and_check("c.JPEG is empty")


def test_dali_goes_on_where_its_decoder_fails(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed (the extra dali)")
    whole = slots_of(dataset(root), 1)
    original = dali_module._prepare
    spoiled = []

    def spoil(request: Request) -> object:
        prepared = original(request)
        if request.path.name == "001.JPEG":
            spoiled.append(request.path)
            return dali_module._Prepared(prepared.content[:200], prepared.crop, None)
        return prepared

    monkeypatch.setattr(dali_module, "_prepare", spoil)
    assert all(torch.equal(images, whole[place]) for place, images in slots_of(dataset(root, "dali"), 1).items())
    assert len(spoiled) >= 2


def test_dali_that_is_not_installed(clean_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "nvidia.dali", None)
    with pytest.raises(InputError, match=r"data\.loader must be torchvision here, got 'dali', .*kfac_dist\[dali\]"):
        dataset(clean_root, "dali")


@pytest.mark.parametrize("decoder", [ThreadDecoder(SIDE, 2, False), None])
def test_leaving_in_the_middle_ends_the_work(clean_root: Path, decoder: ThreadDecoder | None) -> None:
    import threading

    if decoder is None:
        pytest.importorskip("nvidia.dali", reason="DALI is not installed (the extra dali)")
    before = threading.active_count()
    train = list_images(clean_root, "train")
    crops = Crops("paper", SIDE, True, 0)
    requests = ([Request(train.path(0), crop, 0) for crop in crops.train(2, i, 0)] for i in range(1000))
    batches = (decoder or DaliDecoder(SIDE, 2, CPU)).run(requests)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before
    assert next(requests)  # not all were drawn


def test_description_lists_the_folder_where_there_is_one(clean_root: Path, tmp_path: Path) -> None:
    config = {"name": "imagenet", "preprocessing": "random_resized_crop"}
    here = describe_dataset(ImagenetConfig.model_validate({**config, "root": str(clean_root), "train_limit": 9}))
    assert (here.num_train, here.num_classes, here.image_shape) == (9, 3, (3, 224, 224))
    published = describe_dataset(ImagenetConfig.model_validate({**config, "root": str(tmp_path / "none")}))
    assert (published.num_train, published.num_classes) == (1_281_167, 1000)
