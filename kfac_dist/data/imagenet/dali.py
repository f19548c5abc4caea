"""NVIDIA DALI as the decoder: on the GPU where there is one, on the CPU otherwise.

DALI is fed file contents and crop positions that this program draws, instead of reading a folder by itself:
samples and crops are then the same on any number of ranks, an epoch has each image exactly once without
any padding or last-batch policy, and a run can go on in the middle of an epoch without DALI's checkpoints.

On a GPU DALI does everything. On a CPU it decodes only, and torch resizes: its antialiased CPU resizing takes
several times as long.
"""

from __future__ import annotations

import importlib
import logging
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import Full, Queue
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kfac_dist.data.imagenet.crops import Crop
from kfac_dist.data.imagenet.decoder import BATCHES_AHEAD, DecodedBatch, Request, fill
from kfac_dist.data.imagenet.image_file import decode, read_image_file
from kfac_dist.errors import ImageError, InputError
from kfac_dist.tensors.host_copy import to_device

logger = logging.getLogger(__name__)

_PREFETCHED = 2  # batches inside DALI


@dataclass(frozen=True)
class _Prepared:
    """What DALI gets for one image, or what is wrong with it."""

    content: np.ndarray
    crop: Crop
    problem: ImageError | None


class DaliDecoder:
    """Decodes with DALI; files that are no ordinary JPEGs are decoded by Pillow and handed to it as raw pixels.

    Args:
        side: Height and width of the images.
        workers: Threads, both for reading files and for DALI.
        device: Where decoding happens and the images end up.
        resize_in_dali: Whether DALI also resizes; on a GPU it should.

    Raises:
        InputError: If DALI is not installed.
    """

    def __init__(self, side: int, workers: int, device: torch.device, resize_in_dali: bool | None = None) -> None:
        self._dali = _import_dali()
        self.side = side
        self.workers = workers
        self.device = device
        self.resize_in_dali = device.type == "cuda" if resize_in_dali is None else resize_in_dali

    def run(self, batches: Iterator[list[Request]]) -> Iterator[DecodedBatch]:
        """See `Decoder`."""
        return run_ahead(self._decode_all(batches), BATCHES_AHEAD)

    def _decode_all(self, batches: Iterator[list[Request]]) -> Iterator[DecodedBatch]:
        with ThreadPoolExecutor(self.workers, thread_name_prefix="dali") as pool:
            source = _Source(batches, pool, self._inputs_of)
            pipeline = self._build(source)
            while True:
                try:
                    (outputs,) = pipeline.run()
                except StopIteration:
                    return
                except (RuntimeError, IndexError) as error:
                    # A file that passed for a JPEG upset the decoder, which is then of no further use.
                    logger.warning("DALI failed, its batches are decoded otherwise: %s", _last_line(error))
                    while source.in_flight:
                        yield self._without_dali(source.in_flight.popleft()[0], pool)
                    pipeline = self._build(source)
                    continue
                requests, prepared = source.in_flight.popleft()
                images = self._images(outputs, prepared, pool)
                problems = {place: item.problem for place, item in enumerate(prepared) if item.problem}
                yield DecodedBatch(requests, images, problems)

    def _build(self, source: _Source) -> Any:
        """A pipeline that takes its batches from the source."""
        fn, types = self._dali.fn, self._dali.types
        on_gpu = self.device.type == "cuda"
        pipeline = self._dali.Pipeline(
            batch_size=source.largest_batch,
            num_threads=self.workers,
            device_id=self.device.index or 0 if on_gpu else None,
            prefetch_queue_depth=_PREFETCHED,
        )
        with pipeline:
            if not self.resize_in_dali:
                (content,) = fn.external_source(source=source, num_outputs=1, dtype=[types.UINT8], ndim=[1])
                pipeline.set_outputs(self._decoded(content, "cpu"))
                return _built(pipeline)
            kinds = [types.UINT8, types.INT32, types.INT32, types.FLOAT, types.INT32, types.INT32]
            content, anchor, shape, resized, offset, mirrored = fn.external_source(
                source=source, num_outputs=6, dtype=kinds, ndim=[1, 1, 1, 1, 1, 0]
            )
            images = self._decoded(content, "mixed" if on_gpu else "cpu")
            images = fn.slice(images, start=anchor, shape=shape, axes=[0, 1])
            images = fn.resize(images, size=resized, interp_type=types.INTERP_LINEAR, antialias=True)
            images = fn.slice(images, start=offset, shape=[self.side, self.side], axes=[0, 1])
            pipeline.set_outputs(fn.flip(images, horizontal=mirrored))
        return _built(pipeline)

    def _decoded(self, content: Any, device: str) -> Any:
        # Chroma upsampled as libjpeg does by default, so that all decoders agree to about one level.
        return self._dali.fn.decoders.image(
            content,
            device=device,
            output_type=self._dali.types.RGB,
            adjust_orientation=False,
            jpeg_fancy_upsampling=True,
        )

    def _inputs_of(self, prepared: list[_Prepared]) -> tuple[list[np.ndarray], ...]:
        """What the pipeline gets for a batch: one list an input."""
        contents = [item.content for item in prepared]
        if not self.resize_in_dali:
            return (contents,)
        crops = [item.crop for item in prepared]
        return (
            contents,
            [np.array(crop.box[:2], dtype=np.int32) for crop in crops],
            [np.array(crop.box[2:], dtype=np.int32) for crop in crops],
            [np.array(crop.resized, dtype=np.float32) for crop in crops],
            [np.array(crop.offset, dtype=np.int32) for crop in crops],
            [np.array(crop.mirrored, dtype=np.int32) for crop in crops],
        )

    def _images(self, outputs: Any, prepared: list[_Prepared], pool: ThreadPoolExecutor) -> Tensor:
        """DALI's output as (n, 3, side, side); its own memory is reused by the next run."""
        if self.resize_in_dali:
            images = torch.empty(len(prepared), self.side, self.side, 3, dtype=torch.uint8, device=self.device)
            if self.device.type == "cuda":
                plugin = importlib.import_module("nvidia.dali.plugin.pytorch")
                stream = torch.cuda.current_stream(self.device)
                plugin.feed_ndarray(outputs.as_tensor(), images, cuda_stream=stream)
                stream.synchronize()
            else:
                images.copy_(torch.from_numpy(outputs.as_array()))
            return images.permute(0, 3, 1, 2)
        images = torch.empty(len(prepared), 3, self.side, self.side, dtype=torch.uint8)

        def cut(place: int) -> None:
            images[place] = prepared[place].crop.apply(np.asarray(outputs.at(place)))

        list(pool.map(cut, range(len(prepared))))
        return images

    def _without_dali(self, requests: list[Request], pool: ThreadPoolExecutor) -> DecodedBatch:
        images = torch.empty(len(requests), 3, self.side, self.side, dtype=torch.uint8)
        results = list(pool.map(fill, images, requests))
        problems = {place: problem for place, problem in enumerate(results) if problem is not None}
        return DecodedBatch(requests, to_device(images, self.device), problems)


class _Source:
    """DALI's external source: reads files ahead and remembers which batches DALI has not returned yet."""

    def __init__(self, batches: Iterator[list[Request]], pool: ThreadPoolExecutor, inputs_of: Any) -> None:
        self.in_flight: deque[tuple[list[Request], list[_Prepared]]] = deque()
        self._batches = batches
        self._pool = pool
        self._inputs_of = inputs_of
        self._reading: deque[tuple[list[Request], list[Future[_Prepared]]]] = deque()
        self._read_ahead()
        self.largest_batch = max((len(requests) for requests, _ in self._reading), default=1)

    def __iter__(self) -> _Source:
        return self

    def __next__(self) -> tuple[list[np.ndarray], ...]:
        self._read_ahead()
        if not self._reading:
            raise StopIteration
        requests, tasks = self._reading.popleft()
        prepared = [task.result() for task in tasks]
        self.in_flight.append((requests, prepared))
        inputs: tuple[list[np.ndarray], ...] = self._inputs_of(prepared)
        return inputs

    def _read_ahead(self) -> None:
        while len(self._reading) <= BATCHES_AHEAD:
            requests = next(self._batches, None)
            if requests is None:
                return
            self._reading.append((requests, [self._pool.submit(_prepare, request) for request in requests]))


def run_ahead(batches: Iterator[DecodedBatch], depth: int) -> Iterator[DecodedBatch]:
    """Draw from an iterator in a thread of its own, at most `depth` batches ahead of the caller."""
    queue: Queue[DecodedBatch | BaseException | None] = Queue(depth)
    stopped = threading.Event()

    def put(item: DecodedBatch | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                return queue.put(item, timeout=0.1)
            except Full:
                continue

    def produce() -> None:
        try:
            for batch in batches:
                put(batch)
                if stopped.is_set():
                    return
            put(None)
        except BaseException as error:  # handed to the caller, whatever it is
            put(error)

    thread = threading.Thread(target=produce, name="dali-ahead", daemon=True)
    thread.start()
    try:
        while (item := queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()


def _prepare(request: Request) -> _Prepared:
    try:
        file = read_image_file(request.path)
        content = np.frombuffer(file.content, dtype=np.uint8) if file.is_plain_jpeg else _raw_pixels(decode(file))
        return _Prepared(content, request.crop(file.height, file.width), None)
    except ImageError as error:
        side = request.crop(1, 1).side
        stand_in = Crop((0, 0, 1, 1), (side, side), (0, 0), side, mirrored=False)
        return _Prepared(_raw_pixels(np.zeros((1, 1, 3), dtype=np.uint8)), stand_in, error)


def _raw_pixels(pixels: np.ndarray) -> np.ndarray:
    """Pixels as a PPM file, which DALI reads without loss."""
    height, width, _ = pixels.shape
    return np.concatenate([np.frombuffer(b"P6 %d %d 255\n" % (width, height), dtype=np.uint8), pixels.ravel()])


def _built(pipeline: Any) -> Any:
    pipeline.build()
    return pipeline


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else repr(error)


def _import_dali() -> Any:
    try:
        return importlib.import_module("nvidia.dali")
    except ImportError as error:
        raise InputError(
            f"data.loader must be torchvision here, got 'dali', which is not installed ({error}): install it with "
            "pip install 'kfac_dist[dali]' (in a checkout: scripts/setup.sh dali)"
        ) from error
