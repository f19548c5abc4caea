"""Images a second of both loaders against torchvision's ImageFolder with a DataLoader, on the CPU.

    python scripts/benchmark_loaders.py FOLDER [--workers 2] [--rounds 5] [--output benchmarks/NAME]

FOLDER is a folder of images; an ImageFolder tree is made of links to it. All three deliver float batches of
32 images of 224x224 after a resize to 256x256, a random crop and a flip. The loaders take turns within each
round; the medians over the rounds are reported, by the clock and by processor time, which other work on the
machine does not change as much.
"""

import argparse
import gc
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from kfac_dist.data.imagenet.crops import Crops
from kfac_dist.data.imagenet.dali import DaliDecoder
from kfac_dist.data.imagenet.dataset import FolderDataset, Normalisation
from kfac_dist.data.imagenet.decoder import Decoder, ThreadDecoder
from kfac_dist.data.imagenet.folder import list_images
from kfac_dist.data.sampling import SlotSampler

BATCH = 32
SIDE = 224
CPU = torch.device("cpu")
Batches = Callable[[], Iterator[tuple[Tensor, Tensor]]]


def link_tree(folder: Path, root: Path, num_images: int) -> None:
    """An ImageFolder tree of two classes, of links to the images of a folder, in turn."""
    files = sorted(path.resolve() for path in folder.iterdir() if path.is_file())
    for split in ("train", "val"):
        for number in range(num_images):
            folder = root / split / f"class{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            source = files[number % len(files)]
            (folder / f"{number:06}{source.suffix}").symlink_to(source)


def own_batches(root: Path, decoder: Decoder) -> Batches:
    """This project's pipeline with a decoder."""
    train = list_images(root, "train")
    mean = torch.full((3, SIDE, SIDE), 120.0, dtype=torch.float64)
    crops = Crops("paper", SIDE, flip=True, seed=0)
    normalisation = Normalisation.by_mean_image(mean)
    dataset = FolderDataset(train, train, crops, normalisation, decoder, False, CPU, torch.float32)
    sampler = SlotSampler(len(train), BATCH, 1, seed=0)
    last = len(train) // BATCH
    return lambda: ((batch.images, batch.labels) for batch in dataset.train_batches(sampler, 0, 1, 0, last))


def plain_batches(root: Path, workers: int) -> Batches:
    """ImageFolder and DataLoader, as torchvision's documentation puts them together."""
    from torch.utils.data import DataLoader
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    steps = [transforms.Resize((256, 256)), transforms.RandomCrop(SIDE), transforms.RandomHorizontalFlip()]
    folder = ImageFolder(str(root / "train"), transforms.Compose([*steps, transforms.ToTensor()]))
    return lambda: iter(DataLoader(folder, BATCH, shuffle=True, drop_last=True, num_workers=workers))


def processor_seconds() -> float:
    """Of this process and those it has waited for."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure(batches: Batches) -> tuple[float, float]:
    """Images a second by the clock, from the first batch on, and images a second of processor time."""
    gc.collect()
    processor = processor_seconds()
    iterator = batches()
    images = len(next(iterator)[0])
    start = time.perf_counter()
    counted = sum(len(labels) for _, labels in iterator)
    seconds = time.perf_counter() - start
    del iterator  # ends worker processes, whose time counts from then on
    gc.collect()
    return counted / seconds, (images + counted) / (processor_seconds() - processor)


def package_version(name: str) -> str:
    """Version of an installed package."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def processor_model() -> str:
    """What the kernel calls the processor."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def main() -> None:
    """Measure, print a table and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="write FILE.md and FILE.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        link_tree(options.folder, root, options.images)
        loaders = {
            "dali": own_batches(root, DaliDecoder(SIDE, options.workers, CPU)),
            "torchvision": own_batches(root, ThreadDecoder(SIDE, options.workers, pin_memory=False)),
            "ImageFolder + DataLoader": plain_batches(root, options.workers),
        }
        figures: dict[str, list[tuple[float, float]]] = {loader: [] for loader in loaders}
        for number in range(options.rounds + 1):
            for loader, batches in loaders.items():
                figure = measure(batches)
                if number:  # the first round reads the files into memory
                    figures[loader].append(figure)
    report(figures, options)


def report(figures: dict[str, list[tuple[float, float]]], options: argparse.Namespace) -> None:
    """Print the medians; write them with what they were measured on."""
    rows = [
        {
            "loader": loader,
            "images_per_second": statistics.median(by_clock for by_clock, _ in values),
            "images_per_processor_second": statistics.median(by_processor for _, by_processor in values),
            "rounds": values,
        }
        for loader, values in figures.items()
    ]
    facts = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": f"python scripts/benchmark_loaders.py {options.folder.name} --workers {options.workers} "
        f"--images {options.images} --rounds {options.rounds}",
        "processor": processor_model(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg(),
        "versions": {name: package_version(name) for name in ("torch", "torchvision", "pillow", "nvidia-dali-cuda130")},
    }
    lines = ["| loader | images/s | images/s of processor time (per core) |", "| --- | ---: | ---: |"]
    for row in rows:
        lines.append(f"| {row['loader']} | {row['images_per_second']:.0f} | {row['images_per_processor_second']:.0f} |")
    print("\n".join(lines))
    if options.output is not None:
        options.output.with_suffix(".json").write_text(json.dumps({**facts, "results": rows}, indent=2) + "\n")
        text = [
            f"# Loaders on the CPU, {facts['date']}",
            "",
            f"`{facts['command']}`, medians of {options.rounds} rounds in which the loaders take turns.",
            "",
            *lines,
            "",
            f"{facts['processor']}, {facts['cores']} cores, load average at the end "
            f"{facts['load_average'][0]:.1f}; {options.workers} workers; "
            + ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
            + ".",
        ]
        options.output.with_suffix(".md").write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
