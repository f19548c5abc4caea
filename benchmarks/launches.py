"""Operations that a training step gives to the device: K-FAC's with and without a refresh beside SGD's.

    python benchmarks/launches.py --model resnet50 --image-size 224 --classes 1000 --batch 32 --precision bf16
    python -m tests.emulated_gpu python benchmarks/launches.py …      on a machine without a GPU

    torch     torch.optim.SGD
    sgd       this package's SGD
    stale     K-FAC, in a step without a refresh of the Fisher
    refresh   K-FAC, in a step with one

A GPU starts one kernel or copy for most operations, several for some (factorisations), and the host takes some
microseconds for each: where a step's operations take the GPU less than that, the host holds it up. An operation counts
if it computes or copies; one on a list of tensors as one, or as many as the list has where layouts differ and torch
takes the tensors one by one. The figures depend on the network and its precision, hardly on the batch.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from program import create_parser, describe_run, device_from, run, table, write_record
from step import create_optimizer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from workload import Workload, add_workload_arguments, workloads_from

from kfac_dist.communicator import create_communicator
from kfac_dist.timing import HostClock, StageTimer
from kfac_dist.training.precision import configure_backends

TITLE = "Operations of a training step"
PHASES = ("forward", "backward", "step")
_INTERVAL = 10  # a refresh, then stale steps
_WITHOUT_KERNEL = {"empty", "empty_strided", "new_empty", "new_empty_strided", "empty_like", "detach", "is_pinned"}


class LaunchCounter(TorchDispatchMode):
    """Counts operations within its block.

    Attributes:
        total: So far.
    """

    def __init__(self) -> None:
        """Start at 0."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one, and carry it out."""
        if not func.is_view and func.overloadpacket.__name__ not in _WITHOUT_KERNEL:
            self.total += num_launches(func.overloadpacket.__name__, args)
        return func(*args, **(kwargs or {}))


def num_launches(name: str, args: Any) -> int:
    """One; as many as there are tensors where a foreach operation cannot take them together."""
    if not name.startswith("_foreach"):
        return 1
    lists = [argument for argument in args if isinstance(argument, list) and isinstance(argument[0], Tensor)]
    layouts = [{(tensor.shape, tensor.stride()) for tensor in together} for together in zip(*lists, strict=True)]
    return 1 if all(len(layout) == 1 for layout in layouts) else len(lists[0])


@dataclass(frozen=True)
class Launches:
    """Operations of one step, by phase."""

    forward: int
    backward: int
    step: int

    @property
    def total(self) -> int:
        """Of all phases."""
        return self.forward + self.backward + self.step


def _total(launches: Launches) -> int:
    return launches.total


def count_step(train: Callable[[LaunchCounter], list[int]]) -> Launches:
    """Train a step and count."""
    with LaunchCounter() as counter:
        return Launches(*train(counter))


def create_training(workload: Workload, name: str) -> Callable[[LaunchCounter], list[int]]:
    """A function that trains a step and returns the operations of each phase."""
    model, images, labels = workload.create()
    communicator = create_communicator(device=workload.device)
    timer = StageTimer(HostClock())  # CUDA's would wait for nothing, but its events are no operations
    optimizer, scale_loss, update = create_optimizer(name, model, communicator, workload, timer)

    def train(counter: LaunchCounter) -> list[int]:
        marks = [counter.total]
        optimizer.zero_grad()
        with workload.precision.autocast(workload.device):
            loss = F.cross_entropy(model(images), labels)
        marks.append(counter.total)
        scale_loss(loss).backward()
        marks.append(counter.total)
        update()
        marks.append(counter.total)
        return [after - before for before, after in pairwise(marks)]

    return train


def measure(workload: Workload) -> dict[str, Launches]:
    """Count each kind of step, in a run that has settled."""
    counts: dict[str, Launches] = {}
    for name in ("torch", "sgd", f"kfac{_INTERVAL}"):
        train = create_training(workload, name)
        steps = [count_step(train) for _ in range(_INTERVAL + 2)][2:]  # with fp16 an overflow may put off the refresh
        if name.startswith("kfac"):
            counts |= {"stale": min(steps, key=_total), "refresh": max(steps, key=_total)}
        else:
            counts[name] = steps[-1]
    return counts


def tables(counts: dict[str, dict[str, Launches]]) -> list[str]:
    """A table for each workload."""
    lines = []
    for workload, by_name in counts.items():
        rows = [
            [name, *(f"{getattr(launches, phase):,}" for phase in PHASES), f"{launches.total:,}"]
            for name, launches in by_name.items()
        ]
        lines += [f"## {workload}", "", *table(["", *PHASES, "total"], rows), ""]
    return lines[:-1]


def main(arguments: argparse.Namespace) -> None:
    """Count, print and write."""
    device = device_from(arguments.device)
    configure_backends(deterministic=False)
    environment = describe_run(device)
    counts = {workload.name: measure(workload) for workload in workloads_from(arguments, device)}
    results = {
        workload: {name: vars(launches) | {"total": launches.total} for name, launches in by_name.items()}
        for workload, by_name in counts.items()
    }
    write_record(arguments.output, TITLE, environment, results, tables(counts))
    print("\n".join(tables(counts)))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = create_parser(__doc__)
    add_workload_arguments(parser, ("fp32", "fp16", "bf16"))
    return parser.parse_args()


if __name__ == "__main__":
    run(partial(main, parse_arguments()))
