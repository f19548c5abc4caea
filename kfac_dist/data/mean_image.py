"""The command that computes a mean image.

[mpirun -n P] python -m kfac_dist.data.mean_image DATA_ROOT --output FILE [--image-size 224]
"""

from __future__ import annotations

import argparse
import logging
import sys
from functools import partial
from pathlib import Path

import torch

from kfac_dist.communicator import create_communicator, launch
from kfac_dist.data.imagenet.folder import list_images
from kfac_dist.data.imagenet.mean_image import compute_mean_image, save_mean_image
from kfac_dist.errors import AgreedInputError, InputError


def main(options: argparse.Namespace) -> int:
    """Run one rank; returns the exit code, which is the same on every rank."""
    communicator = create_communicator("reduce", device=torch.device("cpu"))
    logging.basicConfig(level=logging.WARNING if communicator.is_main else logging.ERROR, format="%(message)s")
    try:
        with communicator.raise_on_all_ranks():
            workers = options.workers or launch.set_threads_per_rank(communicator.local_size)
            if options.image_size < 1 or workers < 1:
                raise InputError("--image-size and --workers must be >= 1")
            images = list_images(options.root, "train", None, communicator)
        mean, skipped = compute_mean_image(images, options.image_size, communicator, workers, options.skip_damaged)
        with communicator.raise_on_all_ranks():
            if communicator.is_main:
                save_mean_image(options.output, mean, images)
        for problem in skipped:
            communicator.print_once(f"left out: {problem}", sys.stderr)
        communicator.print_once(f"{options.output}: mean of {len(images) - len(skipped)} images")
        return 0
    except AgreedInputError as error:
        communicator.print_once(f"error: {error}", sys.stderr)
        return launch.EXIT_BAD_INPUT


def parse_arguments() -> argparse.Namespace:
    """Command line; all ranks have the same."""
    parser = argparse.ArgumentParser(
        prog="python -m kfac_dist.data.mean_image",
        description="Compute the mean image of an ImageFolder tree's training images; mpirun shares the work.",
    )
    parser.add_argument("root", type=Path, help="the tree that holds train/<class>/<image>")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="file to write")
    parser.add_argument("--image-size", type=int, default=224, metavar="N", help="data.image_size (224)")
    parser.add_argument("--workers", type=int, metavar="N", help="threads a rank (default: its share of cores)")
    parser.add_argument("--skip-damaged", action="store_true", help="leave out damaged images, at most 1 %%")
    return parser.parse_args()


if __name__ == "__main__":
    launch.run(partial(main, parse_arguments()))
