"""The mean image that the paper subtracts: of the upper-left 224x224 of the resized training images.

The ranks share the images; the sums are exact, so the result does not depend on their number. The file carries the
fingerprint of the images, and is refused for others.
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from kfac_dist.communicator import Communicator
from kfac_dist.data.base import share
from kfac_dist.data.imagenet.crops import upper_left_crop
from kfac_dist.data.imagenet.folder import ImageList
from kfac_dist.data.imagenet.image_file import decode, read_image_file
from kfac_dist.errors import ImageError, InputError

_CHUNK = 64  # images between two looks at the progress bar
_MOST_SKIPPED = 0.01
_KEY = "kfac_dist mean image"  # of the metadata; one entry, because safetensors orders several at random


def command_for(root: Path, output: str, side: int) -> str:
    """The command line that makes a mean image."""
    return f"python -m kfac_dist.data.mean_image {root} --output {output} --image-size {side}"


def load_mean_image(path: Path, side: int, images: ImageList, root: Path, compares_images: bool = True) -> Tensor:
    """Read a mean image and check that it belongs to the training images.

    Args:
        path: File that this module's command wrote.
        side: Height and width that it must have.
        images: All training images.
        root: The data set's tree, for the message.
        compares_images: Whether the sizes of all images are looked up and compared; takes a while.

    Returns:
        (3, side, side) float64, on the scale of 0 ... 255.

    Raises:
        InputError: If the file is missing, damaged, of another size or of other images.
    """
    from safetensors import SafetensorError, safe_open

    remedy = f"make it with: {command_for(root, str(path), side)}"
    if not path.is_file():
        raise InputError(f"data.mean_image must be a file, got {path}, which is none: {remedy}")
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {}).get(_KEY, "{}"))
            shape = tuple(file.get_slice("mean").get_shape())
            # Nothing of a size that cannot be right is read.
            mean: Tensor = file.get_tensor("mean") if shape == (3, side, side) else torch.empty(0)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise InputError(f"data.mean_image: {path} is not a mean image ({error}): {remedy}") from error
    if not isinstance(facts, dict) or not {"fingerprint", "num_images"} <= facts.keys():
        raise InputError(f"data.mean_image: {path} is not a mean image of this program: {remedy}")
    if shape != (3, side, side):
        made_for = "x".join(map(str, shape[1:]))
        raise InputError(
            f"data.mean_image: {path} is for images of {made_for}, and data.image_size is {side}: {remedy}"
        )
    if compares_images and facts["fingerprint"] != images.fingerprint():
        raise InputError(
            f"data.mean_image: {path} is of other images ({facts['num_images']} of them) than the "
            f"{len(images)} in {images.folder} (names and sizes of the files are compared): {remedy}"
        )
    return mean


def save_mean_image(path: Path, mean: Tensor, images: ImageList) -> None:
    """Write the file, complete or not at all.

    Raises:
        InputError: If it cannot be written.
    """
    from safetensors.torch import save

    facts = {"fingerprint": images.fingerprint(), "num_images": len(images)}
    unfinished = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(save({"mean": mean}, metadata={_KEY: json.dumps(facts)}))
        os.replace(unfinished, path)
    except OSError as error:
        raise InputError(f"--output: cannot write {path} ({error.strerror})") from error


def compute_mean_image(
    images: ImageList, side: int, communicator: Communicator, workers: int, skip: bool
) -> tuple[Tensor, list[str]]:
    """Mean over all images, shared by the ranks; collective.

    Args:
        images: The training images.
        side: Height and width of the result.
        communicator: All its ranks take part.
        workers: Threads a rank.
        skip: Whether damaged images are left out, at most 1 % of all.

    Returns:
        (3, side, side) float64 on the scale of 0 ... 255, and what was left out.

    Raises:
        AgreedInputError: If an image is damaged and `skip` is false, or more than 1 % are.
    """
    # Sums of whole numbers below 2^53: exact in float64, in whatever order they are added.
    total = torch.zeros(3, side, side, dtype=torch.float64)
    problems: list[str] = []
    mine = share(len(images), communicator.rank, communicator.size)
    crop = upper_left_crop(side)

    def square(index: int) -> Tensor | ImageError:
        try:
            file = read_image_file(images.path(index))
            return crop(file.height, file.width).apply(decode(file))
        except ImageError as error:
            return error

    with (
        communicator.raise_on_all_ranks(),
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=len(mine), unit="img", disable=not communicator.is_main, mininterval=1.0) as bar,
    ):
        for start in range(0, len(mine), _CHUNK):
            squares = list(pool.map(square, mine[start : start + _CHUNK]))
            problems += [str(result) for result in squares if isinstance(result, ImageError)]
            if problems and not skip:
                raise InputError(problems[0])
            for result in squares:
                if not isinstance(result, ImageError):
                    total += result  # of another type: adding the bytes to each other would overflow
            bar.update(len(squares))
    skipped = _all_lines(communicator, problems)
    with communicator.raise_on_all_ranks():
        if len(skipped) > _MOST_SKIPPED * len(images):
            raise InputError(
                f"{len(skipped)} of {len(images)} images cannot be used, more than 1 %; the first: {skipped[0]}"
            )
    communicator.all_reduce_(total)
    return total / (len(images) - len(skipped)), skipped


def _all_lines(communicator: Communicator, lines: list[str]) -> list[str]:
    gathered = communicator.gather_bytes("\n".join(lines).encode())
    return [line for part in gathered for line in part.decode().split("\n") if line]
