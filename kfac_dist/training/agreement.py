"""Ranks that would train something else than rank 0 are refused before the first of them waits for another."""

import hashlib
import json
from pathlib import Path

from torch import nn

from kfac_dist import __version__
from kfac_dist.communicator import Communicator
from kfac_dist.data.base import Dataset
from kfac_dist.errors import InputError

_REMEDY = {
    "code": "install the same version on every host",
    "data": "every rank must read the same images in the same order: compare the folders, and sort and seed in a data "
    "set of your own",
    "model": "install the same version of its package on every host",
}


def check_ranks_agree(communicator: Communicator, dataset: Dataset, model: nn.Module) -> None:
    """Compare code, data and network over the ranks; collective.

    Raises:
        AgreedInputError: Naming the first rank that differs from rank 0, and in what.
    """
    own = {"code": code_fingerprint(), "data": _data_fingerprint(dataset), "model": _model_fingerprint(model)}
    found = [json.loads(part) for part in communicator.gather_bytes(json.dumps(own).encode())]
    with communicator.raise_on_all_ranks():
        for rank, other in enumerate(found):
            for what, remedy in _REMEDY.items():
                if other[what] != found[0][what]:
                    raise InputError(
                        f"all ranks must have the same {what}, but rank {rank} has {other[what]} and rank 0 has "
                        f"{found[0][what]}; {remedy}"
                    )


def code_fingerprint() -> str:
    """Version of kfac_dist and a digest of its source files."""
    digest = hashlib.sha256()
    folder = Path(__file__).resolve().parents[1]
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return f"{__version__}, sources {digest.hexdigest()[:12]}"


def _data_fingerprint(dataset: Dataset) -> str:
    classes = hashlib.sha256("\0".join(dataset.class_names).encode()).hexdigest()[:12]
    shape = "x".join(map(str, dataset.image_shape))
    return (
        f"{dataset.num_train} training and {dataset.num_eval} test images of {shape} in {dataset.num_classes} classes, "
        f"names {classes}" + (f", contents {dataset.digest}" if dataset.digest else "")
    )


def _model_fingerprint(model: nn.Module) -> str:
    values = [*model.named_parameters(), *model.named_buffers()]
    listed = "\n".join(f"{name} {tuple(value.shape)} {value.dtype}" for name, value in values)
    return f"{len(values)} parameters and buffers, {hashlib.sha256(listed.encode()).hexdigest()[:12]}"
