"""Lists training images on all ranks: `list_images.py ROOT [ROOT_OF_THE_LAST_RANK]`, and compares the ranks' lists."""

import hashlib
import sys
from pathlib import Path

import torch

from kfac_dist.communicator import create_communicator, launch
from kfac_dist.data.imagenet import listing_cache
from kfac_dist.data.imagenet.folder import list_images
from kfac_dist.data.imagenet.listing import Listing, walk

walked: list[Path] = []


def counted(folder: Path) -> Listing:
    walked.append(folder)
    return walk(folder)


def main() -> int:
    communicator = create_communicator("reduce", "mpi", torch.device("cpu"))
    root = Path(sys.argv[-1] if communicator.rank == communicator.size - 1 else sys.argv[1])
    listing_cache.walk = counted
    images = list_images(root, "train", None, communicator)
    found = hashlib.sha256(images.names.tobytes() + images.labels.tobytes()).digest()
    num_lists = len(set(communicator.gather_bytes(found)))
    num_walks = sum(map(bool, communicator.gather_bytes(b"x" * len(walked))))
    communicator.print_once(
        f"{len(images)} images, walked over by {num_walks} of {communicator.size} ranks, {num_lists} list"
    )
    return 0


launch.run(main)
