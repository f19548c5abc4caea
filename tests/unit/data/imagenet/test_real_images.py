"""Real images: what both loaders make of them, the mean image against Pillow, and an epoch's coverage."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from kfac_dist import create_communicator
from kfac_dist.data.base import share
from kfac_dist.data.imagenet.crops import CropFunction, Crops
from kfac_dist.data.imagenet.dali import DaliDecoder
from kfac_dist.data.imagenet.decoder import Decoder, Request, ThreadDecoder
from kfac_dist.data.imagenet.folder import ImageList, list_images
from kfac_dist.data.imagenet.mean_image import compute_mean_image
from kfac_dist.data.sampling import SlotSampler

SIDE = 224
CPU = torch.device("cpu")


@pytest.fixture(params=["imagenette-mini", "imagenet-photos"])
def real_images(request: pytest.FixtureRequest, data_dir: Path, tmp_path: Path) -> ImageList:
    """Evaluation images: cut to 224x224 beforehand, and photographs at their own sizes."""
    folder = data_dir / request.param
    if not folder.is_dir():
        pytest.skip(f"needs {folder}")
    if request.param == "imagenette-mini":
        return list_images(folder, "val").evenly(100)
    (tmp_path / "val").mkdir()
    (tmp_path / "val/all").symlink_to(folder)
    return list_images(tmp_path, "val")


def decoded(decoder: Decoder, images: ImageList, crops: list[CropFunction]) -> Tensor:
    requests = [Request(images.path(index), crop, 0) for index, crop in enumerate(crops)]
    batches = list(decoder.run(iter([requests[:64], requests[64:]])))
    assert not any(batch.problems for batch in batches)
    return torch.cat([batch.images for batch in batches]).int()


@pytest.mark.parametrize("preprocessing", ["paper", "random_resized_crop"])
def test_loaders_agree(real_images: ImageList, preprocessing: str) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed (the extra dali)")
    crops = Crops(preprocessing, SIDE, True, seed=0)  # type: ignore[arg-type]
    for name, chosen, most in (
        ("evaluation", [crops.evaluation()] * len(real_images), 1),
        ("training", crops.train(len(real_images), 0, 0), 20),  # crops that reach a border
    ):
        ours = decoded(ThreadDecoder(SIDE, 2, False), real_images, chosen)
        dali = decoded(DaliDecoder(SIDE, 2, CPU), real_images, chosen)
        assert torch.equal(ours, dali)  # DALI decodes: the same bytes
        difference = (ours - decoded(DaliDecoder(SIDE, 2, CPU, resize_in_dali=True), real_images, chosen)).abs()
        print(f"{preprocessing}, {name}: largest {difference.max()}, mean {difference.double().mean():.3f} of 255")
        assert difference.max() <= most
        assert (difference > 1).double().mean() < 1e-3
        assert difference.double().mean() < 0.2


def test_evaluation_is_what_pillow_computes(real_images: ImageList) -> None:
    """Pillow's bilinear resizing and a slice: another program's way to the same pixels."""
    crop = Crops("paper", SIDE, True, seed=0).evaluation()
    ours = decoded(ThreadDecoder(SIDE, 2, False), real_images, [crop] * len(real_images)).numpy()
    differences = [
        np.abs(image - resized_by_pillow(real_images.path(index))[:, 16:240, 16:240])
        for index, image in enumerate(ours)
    ]
    assert max(difference.max() for difference in differences) <= 1
    assert np.mean(differences) < 0.1


def resized_by_pillow(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        resized = image.convert("RGB").resize((256, 256), Image.Resampling.BILINEAR)
    return np.asarray(resized).transpose(2, 0, 1).astype(int)


def test_mean_image(data_dir: Path) -> None:
    if not (data_dir / "imagenette-mini").is_dir():
        pytest.skip("needs imagenette-mini")
    train = list_images(data_dir / "imagenette-mini", "train").evenly(150)
    mean, _ = compute_mean_image(train, SIDE, create_communicator("reduce"), workers=2, skip=False)
    direct = np.mean([resized_by_pillow(train.path(i))[:, :SIDE, :SIDE] for i in range(len(train))], axis=0)
    difference = np.abs(mean.numpy() - direct)
    print(f"largest {difference.max():.3f}, mean {difference.mean():.4f} of 255")
    assert difference.max() < 0.25  # roundings of single images, at most 1 each
    assert difference.mean() < 0.05


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_an_epoch_covers_each_image_once(data_dir: Path, num_ranks: int) -> None:
    root = data_dir / "imagenette-mini"
    if not root.is_dir():
        pytest.skip(f"needs {root}")
    train, evaluation = list_images(root, "train"), list_images(root, "val")
    assert (len(train), len(evaluation), len(train.class_names)) == (1000, 250, 10)
    sampler = SlotSampler(len(train), 10, 12, seed=0)  # 8 1/3 iterations an epoch: 3 epochs in 25
    seen = Counter(
        train.path(index)
        for rank in range(num_ranks)
        for iteration in range(25)
        for slot in sampler.local_slots(rank, num_ranks)
        for index in sampler.indices(iteration, slot)
    )
    assert len(seen) == 1000
    assert set(seen.values()) == {3}
    assert sorted(index for rank in range(num_ranks) for index in share(250, rank, num_ranks)) == list(range(250))
