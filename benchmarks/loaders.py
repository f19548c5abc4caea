"""Images per second of both ImageNet loaders beside torchvision's ImageFolder with a DataLoader, on the CPU.

    python benchmarks/loaders.py IMAGES --workers 2 --output benchmarks/results/DATE-loaders

IMAGES is a folder of images; an ImageFolder tree is made of links to it. All three deliver float batches of 32
images of 224×224 after a resize to 256×256, a random crop and a flip. They take turns; the figures are medians over the
rounds, per second of the clock and per second of processor time, which other work on the machine changes less. Without
DALI its row is left out.
"""

import argparse
import gc
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from program import count, create_parser, describe_run, run, table, write_record

from kfac_dist.data.imagenet.crops import Crops
from kfac_dist.data.imagenet.dali import DaliDecoder
from kfac_dist.data.imagenet.dataset import FolderDataset, Normalisation
from kfac_dist.data.imagenet.decoder import Decoder, ThreadDecoder
from kfac_dist.data.imagenet.folder import list_images
from kfac_dist.data.sampling import SlotSampler
from kfac_dist.errors import InputError

TITLE = "Loaders on the CPU"
PACKAGES = ("pillow", "nvidia-dali-cuda130")
ENDINGS = (".jpg", ".jpeg", ".png")
BATCH = 32
SIDE = 224
CPU = torch.device("cpu")

BatchSizes = Callable[[], Iterator[int]]
"""Starts one epoch of a loader; each number is that of the images of a batch that is there."""


@dataclass(frozen=True)
class Rate:
    """Images per second of the clock, from the first batch on, and per second of processor time."""

    images_per_second: float
    images_per_processor_second: float


def link_tree(source_folder: Path, root: Path, num_images: int) -> None:
    """An ImageFolder tree of two classes, of links to the images, in turn.

    Raises:
        InputError: If there is no such folder, or no image in it.
    """
    found = source_folder.iterdir() if source_folder.is_dir() else ()
    files = sorted(path.resolve() for path in found if path.suffix.lower() in ENDINGS)
    if not files:
        raise InputError(f"FOLDER must be a folder with files {' '.join(ENDINGS)}, got {source_folder}, which has none")
    for split in ("train", "val"):
        for number in range(num_images):
            folder = root / split / f"class{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            source = files[number % len(files)]
            (folder / f"{number:06}{source.suffix}").symlink_to(source)


def own_loader(root: Path, decoder: Decoder) -> BatchSizes:
    """This project's pipeline with a decoder."""
    train = list_images(root, "train")
    dataset = FolderDataset(
        train=train,
        evaluation=train,
        crops=Crops("paper", SIDE, flip=True, seed=0),
        normalisation=Normalisation.by_mean_image(torch.full((3, SIDE, SIDE), 120.0, dtype=torch.float64)),
        decoder=decoder,
        skip_damaged=False,
        device=CPU,
        dtype=torch.float32,
    )
    sampler = SlotSampler(len(train), BATCH, 1, seed=0)
    return lambda: (len(batch.labels) for batch in dataset.train_batches(sampler, 0, 1, 0, len(train) // BATCH))


def plain_loader(root: Path, workers: int) -> BatchSizes:
    """ImageFolder and DataLoader, as torchvision's documentation puts them together."""
    from torch.utils.data import DataLoader
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    steps = [transforms.Resize((256, 256)), transforms.RandomCrop(SIDE), transforms.RandomHorizontalFlip()]
    folder = ImageFolder(str(root / "train"), transforms.Compose([*steps, transforms.ToTensor()]))
    loader = DataLoader(folder, BATCH, shuffle=True, drop_last=True, num_workers=workers)
    return lambda: (len(labels) for _, labels in loader)


def create_loaders(root: Path, workers: int) -> dict[str, BatchSizes]:
    """What there is to compare, by name."""
    loaders = {
        "torchvision": own_loader(root, ThreadDecoder(SIDE, workers, pin_memory=False)),
        "ImageFolder + DataLoader": plain_loader(root, workers),
    }
    try:
        return {"dali": own_loader(root, DaliDecoder(SIDE, workers, CPU)), **loaders}
    except InputError as error:
        print(f"without DALI: {error}", file=sys.stderr)
        return loaders


def processor_seconds() -> float:
    """Of this process and those it has waited for."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure(loader: BatchSizes) -> Rate:
    """Run one epoch."""
    gc.collect()
    processor = processor_seconds()
    sizes = loader()
    first = next(sizes)
    start = time.perf_counter()
    others = sum(sizes)
    seconds = time.perf_counter() - start
    del sizes  # ends worker processes, whose time counts from then on
    gc.collect()
    return Rate(others / seconds, (first + others) / (processor_seconds() - processor))


def package_version(name: str) -> str:
    """Version of an installed package."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = create_parser(__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="its images are read")
    parser.add_argument("--workers", type=count, default=len(os.sched_getaffinity(0)), help="default: one per core")
    parser.add_argument("--images", type=count, default=512, help="of an epoch, at least 64; default: 512")
    parser.add_argument("--rounds", type=count, default=5, help="rounds that count; default: 5")
    arguments = parser.parse_args()
    if arguments.images < 2 * BATCH:
        parser.error(f"argument --images: must be >= {2 * BATCH}, since the first batch is not timed")
    return arguments


def main() -> None:
    """Measure, print and write."""
    arguments = parse_arguments()
    torch.set_num_threads(1)
    environment = describe_run(CPU)
    environment["packages"] |= {name: package_version(name) for name in PACKAGES}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        link_tree(arguments.folder, root, arguments.images)
        loaders = create_loaders(root, arguments.workers)
        rounds: dict[str, list[Rate]] = {loader: [] for loader in loaders}
        for number in range(arguments.rounds + 1):
            for loader, batch_sizes in loaders.items():
                rate = measure(batch_sizes)
                if number:  # the first round reads the files into memory
                    rounds[loader].append(rate)
    medians = {
        loader: Rate(
            statistics.median(rate.images_per_second for rate in rates),
            statistics.median(rate.images_per_processor_second for rate in rates),
        )
        for loader, rates in rounds.items()
    }
    rows = [
        [loader, f"{of.images_per_second:.0f}", f"{of.images_per_processor_second:.0f}"]
        for loader, of in medians.items()
    ]
    versions = ", ".join(f"{name} {environment['packages'][name]}" for name in PACKAGES)
    lines = [f"Workers: {arguments.workers}; {versions}.", ""]
    lines += table(["loader", "images per second", "per second of processor time"], rows)
    results = {
        loader: asdict(of) | {"rounds": [asdict(rate) for rate in rounds[loader]]} for loader, of in medians.items()
    }
    write_record(arguments.output, TITLE, environment, results, lines)
    print("\n".join(lines))


if __name__ == "__main__":
    run(main)
