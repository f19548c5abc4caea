"""What all ranks together could not read: agreed over the ranks, reported, and limited."""

from __future__ import annotations

import torch

from kfac_dist.communicator.base import Communicator
from kfac_dist.data.base import Dataset
from kfac_dist.errors import TrainingFailed

_MOST_SKIPPED = 0.01


class SkippedImages:
    """Collects the images that any rank has skipped, and ends the run on every rank alike.

    Attributes:
        skipped: All skipped files so far with what is wrong, each once; the same on every rank.
    """

    def __init__(self, dataset: Dataset, communicator: Communicator) -> None:
        self.skipped: list[str] = []
        self._dataset = dataset
        self._communicator = communicator
        self._num_taken = 0

    def gather_and_check(self, problem: str) -> None:
        """Tell the other ranks what this rank has met since the last call; collective.

        Args:
            problem: Why this rank cannot go on, else empty.

        Raises:
            TrainingFailed: On every rank, if any cannot go on or more than 1 % of all images are skipped.
        """
        if not self._dataset.reads_files:
            return
        skipped = self._dataset.take_skipped()
        if not self._communicator.all_reduce_(torch.tensor([float(bool(problem)), float(len(skipped))])).any():
            return
        problems = self._gather([problem] if problem else [])
        if problems:
            raise TrainingFailed(problems[0])
        self.skipped = list(dict.fromkeys(self.skipped + self._gather(skipped)))
        num_images = self._dataset.num_train + self._dataset.num_eval
        if len(self.skipped) > max(1, _MOST_SKIPPED * num_images):
            raise TrainingFailed(
                f"{len(self.skipped)} of {num_images} images cannot be used, more than the 1 % that "
                f"data.on_error=skip allows; the last: {self.skipped[-1]}"
            )

    def take_new(self) -> list[str]:
        """What has been skipped since the last call."""
        new, self._num_taken = self.skipped[self._num_taken :], len(self.skipped)
        return new

    def _gather(self, lines: list[str]) -> list[str]:
        parts = self._communicator.gather_bytes("\0".join(lines).encode(errors="surrogateescape"))
        return [line for part in parts for line in part.decode(errors="replace").split("\0") if line]
