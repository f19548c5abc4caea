"""What the benchmarks train: a network, and a batch of random images for it."""

import argparse
import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from program import add_device_argument, count
from torch import Tensor, nn

from kfac_dist.errors import InputError
from kfac_dist.models import create_model
from kfac_dist.training.precision import Precision
from kfac_dist.vocabulary import PrecisionName


@dataclass(frozen=True)
class Workload:
    """A network and the batch that each rank trains it on.

    Attributes:
        model: A name that `create_model` takes.
        image_size: Height and width of the images, in pixels.
        num_classes: Outputs of the network.
        batch: Images per rank and step.
        precision: Of forward and backward.
        device: Where all of it is.
    """

    model: str
    image_size: int
    num_classes: int
    batch: int
    precision: Precision
    device: torch.device

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.model} {self.image_size} px, batch {self.batch}, {self.precision.name}"

    def create(self, rank: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
        """Network in training mode, images (batch, 3, size, size) and labels (batch,); laid out as the trainer does.

        Args:
            rank: Each has images of its own.

        Raises:
            InputError: If there is no such model, or it does not take such images or so few of them.
        """
        shape = (3, self.image_size, self.image_size)
        layout = torch.channels_last if self.device.type == "cuda" else torch.contiguous_format
        model = create_model(self.model, self.num_classes, shape, seed=0)
        self._check_sizes(model, shape)
        model = model.to(self.device, self.precision.weights).to(memory_format=layout)
        generator = torch.Generator().manual_seed(rank)
        images = torch.randn(self.batch, *shape, generator=generator, dtype=self.precision.weights)
        labels = torch.randint(self.num_classes, (self.batch,), generator=generator)
        return model.train(), images.to(self.device, memory_format=layout), labels.to(self.device)

    def _check_sizes(self, model: nn.Module, shape: tuple[int, int, int]) -> None:
        """Send a batch without values through a copy of the network without values."""
        try:
            copy.deepcopy(model).to("meta").train()(torch.empty(self.batch, *shape, device="meta"))
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f"--model {self.model} cannot be trained on --batch {self.batch} with --image-size {self.image_size}: "
                f"{error}; give more or larger images"
            ) from error


def add_workload_arguments(parser: argparse.ArgumentParser, precisions: Sequence[PrecisionName]) -> None:
    """Let the command line choose workloads, for `workloads_from`; the first precision is the default."""
    parser.add_argument("--model", default="resnet20", help="as for model.name of a recipe; default: resnet20")
    parser.add_argument("--image-size", type=count, default=32, metavar="PIXELS", help="default: 32")
    parser.add_argument("--classes", type=count, default=10, help="default: 10")
    parser.add_argument("--batch", type=count, nargs="+", default=[128], help="images per rank; default: 128")
    parser.add_argument("--precision", nargs="+", choices=precisions, default=[precisions[0]])
    add_device_argument(parser)


def workloads_from(arguments: argparse.Namespace, device: torch.device) -> list[Workload]:
    """Every batch size in every precision."""
    return [
        Workload(arguments.model, arguments.image_size, arguments.classes, batch, Precision(precision), device)
        for batch in arguments.batch
        for precision in arguments.precision
    ]
