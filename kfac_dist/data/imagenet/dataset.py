"""ImageNet, or any tree of its layout, read from files while training.

Images are decoded and cut ahead of the training step as bytes; normalisation happens on the training device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_dist.data.base import Batch, Original, share
from kfac_dist.data.imagenet.crops import Crops
from kfac_dist.data.imagenet.decoder import DecodedBatch, Decoder, Request
from kfac_dist.data.imagenet.folder import ImageList
from kfac_dist.data.imagenet.image_file import decode, read_image_file
from kfac_dist.data.sampling import SlotSampler
from kfac_dist.tensors.host_copy import to_device

# Of the channels of ImageNet's training images in [0, 1]; what torchvision's recipes use.
CHANNEL_MEAN = (0.485, 0.456, 0.406)
CHANNEL_DEVIATION = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Normalisation:
    """What makes network inputs of bytes: scale * bytes - shift.

    Attributes:
        scale: (3, 1, 1).
        shift: (3, side, side) or (3, 1, 1).
    """

    scale: Tensor
    shift: Tensor

    @classmethod
    def by_mean_image(cls, mean_image: Tensor) -> Normalisation:
        """The paper's: subtract the mean image, scale to [0, 1]. `mean_image`: (3, side, side) in 0 ... 255."""
        return cls(torch.full((3, 1, 1), 1 / 255, dtype=mean_image.dtype), mean_image / 255)

    @classmethod
    def by_channel(cls) -> Normalisation:
        """Today's standard: (bytes / 255 - mean) / deviation, of each channel."""
        mean, deviation = (
            torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (CHANNEL_MEAN, CHANNEL_DEVIATION)
        )
        return cls(1 / (255 * deviation), mean / deviation)

    def to(self, device: torch.device, dtype: torch.dtype) -> Normalisation:
        """The same on another device and in another floating type."""
        return Normalisation(self.scale.to(device, dtype), self.shift.to(device, dtype))

    def apply(self, images: Tensor) -> Tensor:
        """(N, 3, side, side) uint8 to floating inputs of the shift's type."""
        return images.to(self.shift.dtype).mul_(self.scale).sub_(self.shift)

    def undo(self, images: Tensor) -> Tensor:
        """Inputs to values in [0, 1]."""
        return ((images + self.shift) / (255 * self.scale)).clamp(0, 1)


class FolderDataset:
    """Training and evaluation images in folders.

    Args:
        train: Training images.
        evaluation: Evaluation images, with the training classes' labels.
        crops: What is cut from each.
        normalisation: How bytes become inputs.
        decoder: What reads and decodes; the batches are the same for each to about one level in 255.
        skip_damaged: Whether a damaged image is replaced (training) or left out (evaluation) instead of
            ending the run. The replacement is the next good image of its slot, so the batch keeps its size
            and no other slot is concerned.
        device: Training device.
        dtype: Floating type of the batches.
    """

    reads_files = True
    digest = ""

    def __init__(
        self,
        train: ImageList,
        evaluation: ImageList,
        crops: Crops,
        normalisation: Normalisation,
        decoder: Decoder,
        skip_damaged: bool,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.train = train
        self.evaluation = evaluation
        self.crops = crops
        self.normalisation = normalisation.to(device, dtype)
        self.decoder = decoder
        self.skip_damaged = skip_damaged
        self.device = device
        self._skipped: list[str] = []

    @property
    def class_names(self) -> tuple[str, ...]:
        """Folder names of the classes."""
        return self.train.class_names

    @property
    def num_classes(self) -> int:
        """Number of training classes."""
        return len(self.train.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(3, side, side)."""
        return 3, self.crops.side, self.crops.side

    @property
    def num_train(self) -> int:
        """Number of training images."""
        return len(self.train)

    @property
    def num_eval(self) -> int:
        """Number of evaluation images."""
        return len(self.evaluation)

    def train_batches(
        self, sampler: SlotSampler, rank: int, num_ranks: int, first_iteration: int, last_iteration: int
    ) -> Iterator[Batch]:
        """This rank's slots; see `Dataset.train_batches`.

        Raises:
            ImageError: On this rank only, if an image is damaged and must not be, or all of a slot are.
        """
        slots = deque[tuple[int, int]]()  # of the batches that the decoder works on

        def requests() -> Iterator[list[Request]]:
            for iteration, slot, indices in sampler.slots(rank, num_ranks, first_iteration, last_iteration):
                slots.append((iteration, slot))
                crops = self.crops.train(len(indices), iteration, slot)
                yield [
                    Request(self.train.path(index), crop, int(self.train.labels[index]))
                    for index, crop in zip(indices, crops, strict=True)
                ]

        for batch in self.decoder.run(requests()):
            yield Batch(*slots.popleft(), *self._tensors(batch, self._replaced(batch)))

    def eval_batches(self, rank: int, num_ranks: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's share of the evaluation images; see `Dataset.eval_batches`.

        Raises:
            ImageError: On this rank only, if an image is damaged and must not be.
        """
        mine = share(self.num_eval, rank, num_ranks)
        crop = self.crops.evaluation()

        def requests() -> Iterator[list[Request]]:
            for start in range(0, len(mine), batch_size):
                yield [
                    Request(self.evaluation.path(index), crop, int(self.evaluation.labels[index]))
                    for index in mine[start : start + batch_size]
                ]

        for batch in self.decoder.run(requests()):
            places = [place for place in range(len(batch.requests)) if self._is_good(batch, place)]
            if places:
                yield self._tensors(batch, places)

    def take_skipped(self) -> list[str]:
        """Damaged images met since the last call, with what is wrong; see `Dataset.take_skipped`."""
        skipped, self._skipped = self._skipped, []
        return skipped

    def originals(self, sampler: SlotSampler, iteration: int, slot: int, limit: int) -> list[Original]:
        """Images as they are stored, with the outline of their crop; see `Dataset.originals`."""
        indices = sampler.indices(iteration, slot)
        found = []
        for index, crop in list(zip(indices, self.crops.train(len(indices), iteration, slot), strict=True))[:limit]:
            file = read_image_file(self.train.path(index))
            found.append(Original(decode(file), crop(file.height, file.width).outline()))
        return found

    def to_pixels(self, images: Tensor) -> Tensor:
        """Undo the normalisation; see `Dataset.to_pixels`."""
        return self.normalisation.undo(images)

    def _replaced(self, batch: DecodedBatch) -> list[int]:
        """Place of the image that is used in each place of a training batch."""
        size = len(batch.requests)
        good = [self._is_good(batch, place) for place in range(size)]
        if not any(good):
            raise batch.problems[0]
        return [
            next((place + step) % size for step in range(size) if good[(place + step) % size]) for place in range(size)
        ]

    def _is_good(self, batch: DecodedBatch, place: int) -> bool:
        problem = batch.problems.get(place)
        if problem is None:
            return True
        if not self.skip_damaged:
            raise problem
        self._skipped.append(str(problem))
        return False

    def _tensors(self, batch: DecodedBatch, places: list[int]) -> tuple[Tensor, Tensor]:
        images = batch.images.to(self.device, non_blocking=True)
        if places != list(range(len(images))):
            images = images[to_device(torch.tensor(places), self.device)]
        labels = torch.tensor([batch.requests[place].label for place in places])
        return self.normalisation.apply(images), to_device(labels, self.device)
