"""The file of a mean image: it carries the fingerprint of the pictures, and is refused for others."""

from __future__ import annotations

import json
import os
from pathlib import Path

from torch import Tensor

from kfac_dist.data.folder import PictureFolder
from kfac_dist.errors import InputError

_KEY = "kfac_dist mean image"  # of the metadata; one entry, because safetensors orders several at random


def command_for(root: Path, output: str, side: int) -> str:
    """The command line that makes a mean image."""
    return f"python -m kfac_dist.data.mean_image {root} --output {output} --image-size {side}"


def load_mean_image(path: Path, side: int, pictures: PictureFolder, root: Path) -> Tensor:
    """Read a mean image and check that it belongs to the training pictures.

    Args:
        path: File that this module's command wrote.
        side: Height and width that it must have.
        pictures: All training pictures.
        root: The data set's tree, for the message.

    Returns:
        (3, side, side) float64, on the scale of 0 ... 255.

    Raises:
        InputError: If the file is missing, damaged, of another size or of other pictures.
    """
    from safetensors import SafetensorError, safe_open

    remedy = f"make it with: {command_for(root, str(path), side)}"
    if not path.is_file():
        raise InputError(f"data.mean_image must be a file, got {path}, which is none: {remedy}")
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {}).get(_KEY, "{}"))
            mean: Tensor = file.get_tensor("mean")
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"data.mean_image: {path} is not a mean image ({error}): {remedy}") from error
    if "fingerprint" not in facts:
        raise InputError(f"data.mean_image: {path} is not a mean image of this program: {remedy}")
    if mean.shape != (3, side, side):
        made_for = mean.shape[-1]
        raise InputError(
            f"data.mean_image: {path} is for images of {made_for}x{made_for}, and data.image_size is {side}: {remedy}"
        )
    if facts["fingerprint"] != pictures.fingerprint():
        raise InputError(
            f"data.mean_image: {path} is of other pictures ({facts['num_images']} of them) than the "
            f"{len(pictures)} in {pictures.folder} (names and sizes of the files are compared): {remedy}"
        )
    return mean


def save_mean_image(path: Path, mean: Tensor, pictures: PictureFolder) -> None:
    """Write the file, complete or not at all.

    Raises:
        InputError: If it cannot be written.
    """
    from safetensors.torch import save

    facts = {"fingerprint": pictures.fingerprint(), "num_images": len(pictures)}
    unfinished = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(save({"mean": mean}, metadata={_KEY: json.dumps(facts)}))
        os.replace(unfinished, path)
    except OSError as error:
        raise InputError(f"--output: cannot write {path} ({error.strerror})") from error
