"""The mean image that the paper subtracts: of the upper-left 224x224 of the resized training pictures.

[mpirun -n P] python -m kfac_dist.data.mean_image DATA_ROOT --output FILE [--image-size 224]

The ranks share the pictures; the sums are exact, so the file does not depend on their number.
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from kfac_dist.communicator import Communicator, create_communicator, launch
from kfac_dist.data.base import share
from kfac_dist.data.folder import PictureFolder, list_pictures
from kfac_dist.data.mean_file import save_mean_image
from kfac_dist.data.pictures import PictureError, decode, read_picture
from kfac_dist.data.views import upper_left_view
from kfac_dist.errors import AgreedInputError, InputError

_CHUNK = 64  # pictures between two looks at the progress bar
_MOST_SKIPPED = 0.01


def compute_mean_image(
    pictures: PictureFolder, side: int, communicator: Communicator, workers: int, skip: bool
) -> tuple[Tensor, list[str]]:
    """Mean over all pictures, shared by the ranks; collective.

    Args:
        pictures: The training pictures.
        side: Height and width of the result.
        communicator: All its ranks take part.
        workers: Threads a rank.
        skip: Whether damaged pictures are left out, at most 1 % of all.

    Returns:
        (3, side, side) float64 on the scale of 0 ... 255, and what was left out.

    Raises:
        AgreedInputError: If a picture is damaged and `skip` is false, or more than 1 % are.
    """
    # Sums of whole numbers below 2^53: exact in float64, in whatever order they are added.
    total = torch.zeros(3, side, side, dtype=torch.float64)
    problems: list[str] = []
    mine = share(len(pictures), communicator.rank, communicator.size)
    view = upper_left_view(side)

    def square(index: int) -> Tensor | PictureError:
        try:
            picture = read_picture(pictures.path(index))
            return view(picture.height, picture.width).apply(decode(picture))
        except PictureError as error:
            return error

    with (
        communicator.agree(),
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=len(mine), unit="img", disable=not communicator.is_main, mininterval=1.0) as bar,
    ):
        for start in range(0, len(mine), _CHUNK):
            squares = list(pool.map(square, mine[start : start + _CHUNK]))
            problems += [str(result) for result in squares if isinstance(result, PictureError)]
            if problems and not skip:
                raise InputError(problems[0])
            for result in squares:
                if not isinstance(result, PictureError):
                    total += result  # of another type: adding the bytes to each other would overflow
            bar.update(len(squares))
    skipped = _all_lines(communicator, problems)
    with communicator.agree():
        if len(skipped) > _MOST_SKIPPED * len(pictures):
            raise InputError(
                f"{len(skipped)} of {len(pictures)} pictures cannot be used, more than 1 %; the first: {skipped[0]}"
            )
    communicator.all_reduce_(total)
    return total / (len(pictures) - len(skipped)), skipped


def _all_lines(communicator: Communicator, lines: list[str]) -> list[str]:
    gathered = communicator.gather_bytes("\n".join(lines).encode())
    return [line for part in gathered for line in part.decode().split("\n") if line]


def main(options: argparse.Namespace) -> int:
    """Run one rank; returns the exit code, which is the same on every rank."""
    communicator = create_communicator("reduce", "mpi", torch.device("cpu"))
    try:
        with communicator.agree():
            launch.check_world_size(communicator.size, os.environ)
            workers = options.workers or launch.share_threads(communicator.local_size)
            if options.image_size < 1 or workers < 1:
                raise InputError("--image-size and --workers must be >= 1")
            pictures = list_pictures(options.root, "train")
        mean, skipped = compute_mean_image(pictures, options.image_size, communicator, workers, options.skip_damaged)
        with communicator.agree():
            if communicator.is_main:
                save_mean_image(options.output, mean, pictures)
        for problem in skipped:
            communicator.print_once(f"left out: {problem}", sys.stderr)
        communicator.print_once(f"{options.output}: mean of {len(pictures) - len(skipped)} pictures")
        return 0
    except AgreedInputError as error:
        communicator.print_once(f"error: {error}", sys.stderr)
        return launch.EXIT_BAD_INPUT


def parse_arguments() -> argparse.Namespace:
    """Command line; all ranks have the same."""
    parser = argparse.ArgumentParser(
        prog="python -m kfac_dist.data.mean_image",
        description="Compute the mean image of an ImageFolder tree's training pictures; mpirun shares the work.",
    )
    parser.add_argument("root", type=Path, help="the tree that holds train/<class>/<picture>")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="file to write")
    parser.add_argument("--image-size", type=int, default=224, metavar="N", help="data.image_size (224)")
    parser.add_argument("--workers", type=int, metavar="N", help="threads a rank (default: its share of cores)")
    parser.add_argument("--skip-damaged", action="store_true", help="leave out damaged pictures, at most 1 %%")
    return parser.parse_args()


if __name__ == "__main__":
    launch.run(partial(main, parse_arguments()))
