"""What `gpu_check.py` measures. Needs torch and torchvision only; runs on a CPU, too, which tests it."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_dist.communicator import Communicator
from kfac_dist.curvature.blocks.base import Block
from kfac_dist.curvature.blocks.create import create_blocks
from kfac_dist.curvature.blocks.kronecker import KroneckerBlock
from kfac_dist.models import create_model
from kfac_dist.optim.kfac import KFAC
from kfac_dist.optim.loss_scale import LossScaler
from kfac_dist.optim.sgd import SGD
from kfac_dist.precision import HALF_DTYPES, Precision
from kfac_dist.timing import StageTimer

INTERVALS = (1, 10, 20)


@dataclass(frozen=True)
class Work:
    """A network and a batch of random images for it."""

    model: str
    size: int
    batch: int
    precision: Precision
    device: torch.device

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.model} {self.size}px b{self.batch} {self.precision.name}"

    @property
    def memory_format(self) -> torch.memory_format:
        """As the trainer has it."""
        return torch.channels_last if self.device.type == "cuda" else torch.contiguous_format

    def create(self) -> tuple[nn.Module, Tensor, Tensor]:
        """Network in training mode, images and labels."""
        classes = 1000 if self.size > 64 else 10
        model = create_model(self.model, classes, (3, self.size, self.size), seed=0)
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(self.batch, 3, self.size, self.size, generator=generator)
        labels = torch.randint(classes, (self.batch,), generator=generator)
        model = model.to(self.device, memory_format=self.memory_format).train()
        return model, images.to(self.device, memory_format=self.memory_format), labels.to(self.device)


def measure_steps(work: Work, communicator: Communicator, rounds: int, steps: int) -> dict[str, Any]:
    """Seconds a step of SGD and of K-FAC at several refresh intervals, in turns; medians over the rounds.

    The host runs ahead of the device within a round, as in training. `torch` is torch's own SGD with its own gradient
    scaler, to show that our SGD is no slow yardstick; ratios are to the faster of the two.
    """
    contenders: dict[str, Callable[[], None]] = {}
    results: dict[str, Any] = {"peak_bytes": {}, "stage_seconds": {}}
    timers: dict[str, StageTimer] = {}
    kept: dict[str, int] = {}
    for name in ("torch", "sgd", *(f"kfac{interval}" for interval in INTERVALS)):
        timers[name] = StageTimer.on(work.device)
        before = _allocated(work.device)
        contenders[name] = _stepper(work, name, communicator, timers[name])
        contenders[name]()
        kept[name] = _allocated(work.device) - before
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, step in contenders.items():
            interval = int(name.removeprefix("kfac")) if name.startswith("kfac") else 1
            count = max(interval, steps // interval * interval)  # whole intervals
            with _peak(work.device) as peak:
                taken = _time(work.device, step, count)
            stages = timers[name].lap()
            if turn:  # the first round warms up
                seconds[name].append(taken / count)
                results["peak_bytes"][name] = kept[name] + peak()
                results["stage_seconds"][name] = {stage: value / count for stage, value in stages.items()}
    results["seconds"] = {name: statistics.median(values) for name, values in seconds.items()}
    yardstick = min(results["seconds"]["torch"], results["seconds"]["sgd"])
    results["ratio_to_sgd"] = {name: value / yardstick for name, value in results["seconds"].items()}
    return results


def _stepper(work: Work, name: str, communicator: Communicator, timer: StageTimer) -> Callable[[], None]:
    model, images, labels = work.create()
    scaler = LossScaler() if work.precision.needs_loss_scale and name != "torch" else None
    torch_scaler = torch.amp.GradScaler(work.device.type, enabled=work.precision.needs_loss_scale and name == "torch")
    optimizer: torch.optim.Optimizer
    if name == "torch":
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, foreach=True)
    elif name == "sgd":
        optimizer = SGD(model, communicator, lr=1e-4, loss_scaler=scaler, timer=timer)
    else:
        interval = int(name.removeprefix("kfac"))
        optimizer = KFAC(
            model, communicator, lr=1e-5, damping=0.03, ema_decay=0.9, refresh=interval, loss_scaler=scaler, timer=timer
        )

    def step() -> None:
        optimizer.zero_grad()
        with timer.stage("forward"), work.precision.autocast(work.device):
            loss = F.cross_entropy(model(images), labels)
        with timer.stage("backward"):
            torch_scaler.scale(loss if scaler is None else scaler.scale_loss(loss)).backward()
        if name == "torch":
            torch_scaler.step(optimizer)
            torch_scaler.update()
        else:
            optimizer.step()

    return step


def measure_factors(work: Work, repeats: int) -> dict[str, Any]:
    """Rate of building all A and G, in half precision and in fp32, beside plain products of the same shapes.

    Rates count 2·rows·n² operations for each n×n matrix, what a product of unfolded inputs would do; the shortcut for
    convolutions does less, so its rate may exceed the product's.
    """
    calls = list(_calls(work))
    half = HALF_DTYPES[work.precision.name]
    flops = gemm_seconds = 0.0
    for block, _, g in calls:
        rows = _rows(block, g)
        for count, size in block.factor_shapes.values():
            flops += 2.0 * count * rows * size * size
            operand = torch.randn(count, rows, size, device=work.device, dtype=half)
            gemm_seconds += _time(work.device, lambda o=operand: torch.bmm(o.mT, o), repeats) / repeats  # type: ignore[misc]
            del operand
    seconds = {}
    for name, dtype in (("half", half), ("fp32", torch.float32)):
        seconds[name] = 0.0
        for block, x, g in calls:
            inputs = x.to(dtype), g.to(dtype)
            for matrix in block.factor_shapes:
                block.factor(matrix, *inputs)
                seconds[name] += _time(work.device, lambda: block.factor(matrix, *inputs), repeats) / repeats  # noqa: B023
    return {
        "tera_operations": flops / 1e12,
        "seconds": seconds | {"gemm": gemm_seconds},
        "tflops": {name: flops / 1e12 / value for name, value in (seconds | {"gemm": gemm_seconds}).items()},
        "half_over_fp32": seconds["fp32"] / seconds["half"],
        "share_of_gemm_rate": gemm_seconds / seconds["half"],
    }


def measure_errors(work: Work) -> dict[str, Any]:
    """Relative error (Frobenius norm) of the factors of a half-precision pass, against float64.

    `sums`: of the same half-precision tensors in float64, so what fp32 sums add. `rounding`: of the same tensors
    before they were rounded.
    """
    half = HALF_DTYPES[work.precision.name]
    errors: dict[str, list[float]] = {"sums": [], "rounding": []}
    full = Work(work.model, work.size, work.batch, Precision("fp32"), work.device)
    for block, x, g in _calls(full):
        g = g * 1024  # as loss scaling does
        for matrix in block.factor_shapes:
            statistic = block.factor(matrix, x.to(half), g.to(half)).double()
            for name, inputs in (
                ("sums", (x.to(half).double(), g.to(half).double())),
                ("rounding", (x.double(), g.double())),
            ):
                reference = block.factor(matrix, *inputs)
                errors[name].append(float((statistic - reference).norm() / reference.norm()))
    return {name: {"median": statistics.median(values), "largest": max(values)} for name, values in errors.items()}


def measure_inverses(device: torch.device, sizes: dict[int, int], repeats: int) -> list[dict[str, float]]:
    """Milliseconds of factorising a batch of matrices at once and one by one, and of both ways to solve with one.

    Args:
        device: Where.
        sizes: Matrices in the batch by size.
        repeats: Runs that are averaged.
    """
    rows = []
    for size, count in sizes.items():
        roots = torch.randn(count, size, size, device=device)
        stack = roots @ roots.mT / size + torch.eye(size, device=device)
        right = torch.randn(1, size, size, device=device)
        factors = torch.linalg.cholesky(stack[:1])
        inverse = torch.cholesky_inverse(factors)
        cases: dict[str, Callable[[], object]] = {
            "batched": lambda s=stack: torch.linalg.cholesky_ex(s),  # type: ignore[misc]
            "one_by_one": lambda s=stack: [torch.linalg.cholesky_ex(matrix) for matrix in s.split(1)],  # type: ignore[misc]
            "invert": lambda f=factors: torch.cholesky_inverse(f),  # type: ignore[misc]
            "solve": lambda f=factors, r=right: torch.cholesky_solve(r, f),  # type: ignore[misc]
            "multiply": lambda i=inverse, r=right: torch.bmm(i, r),  # type: ignore[misc]
        }
        row: dict[str, float] = {"size": size, "count": count}
        for name, case in cases.items():
            case()
            row[name] = 1e3 * _time(device, case, repeats) / repeats
        rows.append(row)
    return rows


def _calls(work: Work) -> Iterator[tuple[Block, Tensor, Tensor]]:
    """Each Linear and convolution with the input and the output gradient of one pass."""
    model, images, labels = work.create()
    blocks = [b for b in create_blocks(model, list(model.parameters()), "diagonal") if isinstance(b, KroneckerBlock)]
    inputs: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    for block in blocks:

        def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor, name: str = block.name) -> None:
            inputs[name] = arguments[0].detach()
            output.register_hook(lambda g: gradients.__setitem__(name, g))

        block.module.register_forward_hook(hook)
    with work.precision.autocast(work.device):
        loss = F.cross_entropy(model(images), labels)
    loss.backward()
    for block in blocks:
        yield block, inputs.pop(block.name), gradients.pop(block.name)


def _rows(block: Block, g: Tensor) -> int:
    """Samples times positions of a layer's output."""
    return g.shape[0] * (g.shape[2:].numel() if g.dim() == 4 else 1)


def _time(device: torch.device, function: Callable[[], object], count: int) -> float:
    """Seconds of `count` calls."""
    _synchronise(device)
    start = time.perf_counter()
    for _ in range(count):
        function()
    _synchronise(device)
    return time.perf_counter() - start


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


@contextmanager
def _peak(device: torch.device) -> Iterator[Callable[[], int]]:
    """Most bytes allocated on a GPU within the block beyond those before it, once it has ended; 0 on a CPU."""
    if device.type != "cuda":
        yield lambda: 0
        return
    torch.cuda.reset_peak_memory_stats(device)
    before = _allocated(device)
    yield lambda: torch.cuda.max_memory_allocated(device) - before
