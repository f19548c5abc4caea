"""Batches of images decoded ahead of the training step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from kfac_dist.data.imagenet.crops import CropFunction
from kfac_dist.data.imagenet.image_file import decode, read_image_file
from kfac_dist.errors import ImageError

BATCHES_AHEAD = 3  # beyond the one that the network works on


@dataclass(frozen=True)
class Request:
    """An image wanted in a batch: its file, what to cut from it, and its label."""

    path: Path
    crop: CropFunction
    label: int


@dataclass(frozen=True)
class DecodedBatch:
    """A batch of images.

    Attributes:
        requests: What was asked for, n >= 1.
        images: (n, 3, side, side) uint8, on the CPU (pinned where there is a GPU) or on the GPU.
        problems: What is wrong with images that could not be used, by place; their pixels are undefined.
    """

    requests: list[Request]
    images: Tensor
    problems: dict[int, ImageError]


class Decoder(Protocol):
    """Turns lists of requests into batches, in the same order."""

    def run(self, batches: Iterator[list[Request]]) -> Iterator[DecodedBatch]:
        """Decode each list; work on later ones goes on while the caller is busy with a batch."""


class ThreadDecoder:
    """Pillow and torch's resizing, in threads.

    Both leave Python's lock alone, so threads do what processes would, without forking a process that has
    MPI open and without copying batches between processes.

    Args:
        side: Height and width of the images.
        workers: Threads.
        pin_memory: Whether batches lie in page-locked memory, from where a GPU fetches them asynchronously.
    """

    def __init__(self, side: int, workers: int, pin_memory: bool) -> None:
        self.side = side
        self.workers = workers
        self.pin_memory = pin_memory

    def run(self, batches: Iterator[list[Request]]) -> Iterator[DecodedBatch]:
        """See `Decoder`."""
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="decode")
        ahead: deque[tuple[list[Request], Tensor, list[Future[ImageError | None]]]] = deque()
        try:
            for requests in batches:
                shape = (len(requests), 3, self.side, self.side)
                images = torch.empty(shape, dtype=torch.uint8, pin_memory=self.pin_memory)
                tasks = [pool.submit(fill, image, request) for image, request in zip(images, requests, strict=True)]
                ahead.append((requests, images, tasks))
                if len(ahead) > BATCHES_AHEAD:
                    yield _finish(*ahead.popleft())
            while ahead:
                yield _finish(*ahead.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


def fill(image: Tensor, request: Request) -> ImageError | None:
    """Read, decode and cut one image into its place of a batch; returns what is wrong with it."""
    try:
        file = read_image_file(request.path)
        image.copy_(request.crop(file.height, file.width).apply(decode(file)))
    except ImageError as error:
        return error
    return None


def _finish(requests: list[Request], images: Tensor, tasks: list[Future[ImageError | None]]) -> DecodedBatch:
    results = [task.result() for task in tasks]
    return DecodedBatch(requests, images, {place: e for place, e in enumerate(results) if e is not None})
