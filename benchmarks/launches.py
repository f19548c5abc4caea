"""Operations and memory of a training step on a GPU: K-FAC's with and without a refresh beside SGD's.

    python benchmarks/launches.py --model resnet50 --image-size 224 --classes 1000 --batch 32 --precision bf16
    python -m tests.emulated_gpu python benchmarks/launches.py …      on a machine without a GPU

    torch     torch.optim.SGD
    sgd       this package's SGD
    stale     K-FAC, in a step without a refresh of the Fisher
    refresh   K-FAC, in a step with one

A GPU starts one kernel or copy for most operations, several for some (factorisations), and the host takes some
microseconds for each: where a step's operations take the GPU less than that, the host holds it up. An operation counts
if it computes or copies, the few on the host's own tensors, too. One on a list of tensors counts as one, though a GPU
may take several launches for a long list, or as many as the list has where layouts differ and torch takes the tensors
one by one. Their number depends on the network and its precision, hardly on the batch.

Memory is what torch's allocator gives out: what is held between steps, weights and optimizer, and the most within a
step. What libraries take besides (the CUDA context, cuDNN's and cuSOLVER's workspaces) is not in it, and on an emulated
GPU neither is what single kernels take for themselves.
"""

import argparse
import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from clock import allocated_bytes, watch_peak
from program import create_parser, describe_run, device_from, run, table, write_record
from step import create_optimizer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from workload import Workload, add_workload_arguments, workloads_from

from kfac_dist.communicator import create_communicator
from kfac_dist.timing import HostClock, StageTimer
from kfac_dist.training.precision import configure_backends

TITLE = "Operations and memory of a training step"
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
    """One; as many as there are tensors where a foreach operation cannot take them together.

    Torch asks for one shape and, but for dimensions of size 1, equal strides (ATen/native/ForeachUtils.h).
    """
    if not name.startswith("_foreach"):
        return 1
    lists = [argument for argument in args if isinstance(argument, list) and isinstance(argument[0], Tensor)]
    orders = [{_order(tensor) for tensor in together} for together in zip(*lists, strict=True)]
    return 1 if all(len(order) == 1 for order in orders) else len(lists[0])


def _order(tensor: Tensor) -> tuple[tuple[int, int], ...]:
    """Of its values in memory."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return tuple((size, stride if size > 1 else 0) for size, stride in pairs)


@dataclass(frozen=True)
class StepCost:
    """What one step gives to the device.

    Attributes:
        forward: Operations, as the next two.
        backward: With the hooks that build factors.
        step: Of the optimizer.
        total: All three.
        held_bytes: Of memory between steps, data aside; 0 on a CPU.
        peak_bytes: The most within the step.
    """

    forward: int
    backward: int
    step: int
    total: int
    held_bytes: int
    peak_bytes: int


def create_training(workload: Workload, name: str) -> Callable[[], StepCost]:
    """A function that trains a step and says what it cost."""
    device = workload.device
    gc.collect()  # the network before
    before = allocated_bytes(device)
    model, images, labels = workload.create()
    before += images.nbytes + labels.nbytes if device.type == "cuda" else 0
    timer = StageTimer(HostClock())  # CUDA's would wait for nothing, but its events are no operations
    optimizer, scale_loss, update = create_optimizer(name, model, create_communicator(device=device), workload, timer)

    def train() -> StepCost:
        with LaunchCounter() as counter, watch_peak(device) as peak_so_far:
            marks = [counter.total]
            held = allocated_bytes(device)
            optimizer.zero_grad()
            with workload.precision.autocast(device):
                loss = F.cross_entropy(model(images), labels)
            marks.append(counter.total)
            scale_loss(loss).backward()
            marks.append(counter.total)
            update()
            marks.append(counter.total)
            peak = held + peak_so_far() - before
        forward, backward, step = (later - earlier for earlier, later in pairwise(marks))
        del loss
        optimizer.zero_grad()
        return StepCost(forward, backward, step, counter.total, allocated_bytes(device) - before, peak)

    return train


def measure(workload: Workload) -> dict[str, StepCost]:
    """Count each kind of step, in a run that has settled."""
    costs = {name: settled_steps(workload, name)[0] for name in ("torch", "sgd")}
    stale, *_, refresh = settled_steps(workload, f"kfac{_INTERVAL}")
    return costs | {"stale": stale, "refresh": refresh}


def settled_steps(workload: Workload, name: str) -> list[StepCost]:
    """Those of a network of its own, which is gone afterwards; from the cheapest to the dearest."""
    train = create_training(workload, name)
    steps = [train() for _ in range(_INTERVAL + 2)][2:]
    return sorted(steps, key=lambda cost: cost.total)


def tables(costs: dict[str, dict[str, StepCost]]) -> list[str]:
    """A table for each workload."""
    lines = []
    for workload, by_name in costs.items():
        rows = [
            [
                name,
                *(f"{count:,}" for count in (cost.forward, cost.backward, cost.step, cost.total)),
                *(f"{value / 2**20:,.0f}" for value in (cost.held_bytes, cost.peak_bytes)),
            ]
            for name, cost in by_name.items()
        ]
        heads = ["", "forward", "backward", "step", "total", "held, MiB", "peak, MiB"]
        lines += [f"## {workload}", "", *table(heads, rows), ""]
    return lines[:-1]


def main(arguments: argparse.Namespace) -> None:
    """Count, print and write after each workload."""
    device = device_from(arguments.device)
    configure_backends(deterministic=False)
    environment = describe_run(device)
    costs: dict[str, dict[str, StepCost]] = {}
    for workload in workloads_from(arguments, device):
        costs[workload.name] = measure(workload)
        results = {name: {kind: vars(cost) for kind, cost in by_name.items()} for name, by_name in costs.items()}
        write_record(arguments.output, TITLE, environment, results, tables(costs))
    print("\n".join(tables(costs)))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = create_parser(__doc__)
    add_workload_arguments(parser, ("fp32", "bf16"))  # with fp16 overflows leave out most of the first steps
    return parser.parse_args()


if __name__ == "__main__":
    run(partial(main, parse_arguments()))
