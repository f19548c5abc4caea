"""Seconds until the training images of an ImageFolder tree are listed: by walking over it, and from the cache.

    python benchmarks/listing.py --classes 1000 --images 1281 --output benchmarks/results/DATE-listing

Makes a tree of empty files in a temporary folder (TMPDIR; ImageNet's size takes 1.28 million inodes) and deletes it.
The forms take turns; each figure is a process's own, interpreter and imports not counted. The kernel has the folders in
its memory: a disk or a network file system that has to be asked for them takes longer to walk over.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from program import ROOT, count, create_parser, describe_run, run, table, write_record

TITLE = "Listing an ImageFolder tree"
OLD = 3600  # seconds: what was modified just now is not kept in the cache

# What a rank does at its start. The first form is that of every rank before the list was handed over.
MEASURED = """
import json, sys, time
from pathlib import Path
from kfac_dist.data.imagenet import listing, listing_cache
folder, form = Path(sys.argv[1]), sys.argv[2]
start = time.perf_counter()
found = listing.walk(folder) if form == "walk" else listing_cache.find_listing(folder)
seconds = time.perf_counter() - start
start = time.perf_counter()
content = found.to_bytes()
listing.Listing.from_bytes(content)
print(json.dumps([seconds, time.perf_counter() - start, len(content), len(found.names)]))
"""
FORMS = {"walk": "walk over all folders", "write": "the same, and write the cache", "read": "from the cache"}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = create_parser(__doc__)
    parser.add_argument("--classes", type=count, default=100, metavar="N", help="class folders; default: 100")
    parser.add_argument("--images", type=count, default=1281, metavar="N", help="files in each; default: 1281")
    parser.add_argument("--rounds", type=count, default=3, metavar="N", help="that the medians are of; default: 3")
    return parser.parse_args()


def make_tree(folder: Path, classes: int, images: int) -> None:
    """Class folders of empty files with names as long as ImageNet's, modified a while ago."""
    for number in range(classes):
        place = folder / f"n{number:08}"
        place.mkdir(parents=True)
        for image in range(images):
            os.close(os.open(place / f"n{number:08}_{image:05}.JPEG", os.O_CREAT | os.O_WRONLY))
        os.utime(place, (time.time() - OLD,) * 2)
    os.utime(folder, (time.time() - OLD,) * 2)


def measure(folder: Path, caches: Path, form: str) -> list[float]:
    """Seconds until listed, seconds to make bytes of it and back, those bytes, images."""
    if form != "read":
        for path in caches.rglob("*"):
            if path.is_file():
                path.unlink()
    finished = subprocess.run(
        [sys.executable, "-c", MEASURED, str(folder), form],
        env=os.environ | {"XDG_CACHE_HOME": str(caches), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    figures: list[float] = json.loads(finished.stdout)
    return figures


def measure_all(folder: Path, caches: Path, rounds: int) -> dict[str, Any]:
    """Every form in turn; the first round, which is not counted, reads the tree into memory."""
    listed: dict[str, list[float]] = {form: [] for form in FORMS}
    handed_over = []
    num_bytes = images = 0.0
    for number in range(rounds + 1):
        for form, seconds in listed.items():
            until_listed, until_handed, num_bytes, images = measure(folder, caches, form)
            if number:
                seconds.append(until_listed)
                handed_over.append(until_handed)
    return {
        "images": int(images),
        "bytes": int(num_bytes),
        "seconds_to_bytes_and_back": handed_over,
        "seconds_until_listed": listed,
    }


def main(arguments: argparse.Namespace) -> None:
    """Measure, print, write."""
    environment = describe_run(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as name:
        folder, caches = Path(name) / "train", Path(name) / "caches"
        make_tree(folder, arguments.classes, arguments.images)
        results = measure_all(folder, caches, arguments.rounds)
    listed = results["seconds_until_listed"]
    rows = [[text, f"{statistics.median(listed[form]):.3f}"] for form, text in FORMS.items()]
    handed_over = statistics.median(results["seconds_to_bytes_and_back"])
    lines = [f"{results['images']:,} empty files in {arguments.classes:,} class folders.", ""]
    lines += table(["", "seconds until listed"], rows)
    lines += [
        "",
        f"Handed to other ranks, and kept: {results['bytes'] / 2**20:.1f} MiB; {handed_over:.3f} s to make and read.",
    ]
    write_record(arguments.output, TITLE, environment, results, lines)
    print("\n".join(lines))


if __name__ == "__main__":
    run(partial(main, parse_arguments()))
