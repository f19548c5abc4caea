"""Construction of the factors A and G in half precision: its rate beside plain products, and its errors.

    python benchmarks/factors.py --model resnet50 --image-size 224 --classes 1000 --batch 32 --precision fp16 bf16

Inputs and output gradients are those of one forward and backward pass over random images.

    rates     operations per second of building all A and G, in half precision and in fp32, beside plain products (GEMM)
              of the same shapes. An n×n matrix of r rows counts as 2·r·n² operations, what a product of unfolded inputs
              takes; the shortcut for convolutions takes fewer, so its rate may exceed the product's.
    errors    relative errors (Frobenius norm) against float64. Sums: of the same half-precision values, so what summing
              in fp32 adds. Rounding: of the values before they were rounded to half precision.
"""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from clock import seconds_of
from program import count, create_parser, describe_run, device_from, run, table, write_record
from torch import Tensor, nn
from workload import Workload, add_workload_arguments, workloads_from

from kfac_dist.curvature.blocks.base import Block
from kfac_dist.curvature.blocks.create import create_blocks
from kfac_dist.curvature.blocks.kronecker import KroneckerBlock
from kfac_dist.training.precision import HALF_DTYPES, Precision, configure_backends

TITLE = "Construction of the Kronecker factors"
LOSS_SCALE = 1024  # keeps gradients within fp16's range, as loss scaling does in training


@dataclass(frozen=True)
class Rates:
    """Of building all A and G of a pass.

    Attributes:
        tera_operations: Of all matrices.
        seconds: By way: "half", "fp32" and "gemm".
        tflops: Tera-operations per second, likewise.
        half_over_fp32: How many times faster half precision is.
        share_of_gemm_rate: Rate in half precision, over the plain products'.
    """

    tera_operations: float
    seconds: dict[str, float]
    tflops: dict[str, float]
    half_over_fp32: float
    share_of_gemm_rate: float


@dataclass(frozen=True)
class Errors:
    """Relative errors, "median" and "largest" over the matrices of a pass."""

    sums: dict[str, float]
    rounding: dict[str, float]


def layer_tensors(workload: Workload) -> Iterator[tuple[Block, Tensor, Tensor]]:
    """Each Linear and convolution with its input and its output gradient in one pass."""
    model, images, labels = workload.create()
    blocks = [b for b in create_blocks(model, list(model.parameters()), "diagonal") if isinstance(b, KroneckerBlock)]
    inputs: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        inputs[name] = arguments[0].detach()
        output.register_hook(partial(gradients.__setitem__, name))

    for block in blocks:
        block.module.register_forward_hook(partial(keep, block.name))
    with workload.precision.autocast(workload.device):
        loss = F.cross_entropy(model(images), labels)
    loss.backward()
    for block in blocks:
        yield block, inputs.pop(block.name), gradients.pop(block.name)


def measure_rates(workload: Workload, num_calls: int) -> Rates:
    """Time every matrix of a pass; each figure is the mean of some calls after one that warms up."""
    device, half = workload.device, HALF_DTYPES[workload.precision.name]
    operations = 0.0
    seconds = {"half": 0.0, "fp32": 0.0, "gemm": 0.0}

    def charge(way: str, function: Callable[[], object]) -> None:
        function()
        seconds[way] += seconds_of(function, num_calls, device) / num_calls

    for block, x, g in layer_tensors(workload):
        rows = g.shape[0] * (g.shape[2:].numel() if g.dim() == 4 else 1)  # samples times positions of the output
        for matrix, (groups, size) in block.factor_shapes.items():
            operations += 2.0 * groups * rows * size * size
            operand = torch.randn(groups, rows, size, device=device, dtype=half)
            charge("gemm", partial(torch.bmm, operand.mT, operand))
            del operand
            for way, dtype in (("half", half), ("fp32", torch.float32)):
                charge(way, partial(block.factor, matrix, x.to(dtype), g.to(dtype)))
    return Rates(
        tera_operations=operations / 1e12,
        seconds=seconds,
        tflops={way: operations / 1e12 / value for way, value in seconds.items()},
        half_over_fp32=seconds["fp32"] / seconds["half"],
        share_of_gemm_rate=seconds["gemm"] / seconds["half"],
    )


def measure_errors(workload: Workload) -> Errors:
    """Compare every matrix of a pass in fp32, rounded to half precision, with float64."""
    half = HALF_DTYPES[workload.precision.name]
    sums, rounding = [], []
    for block, x, g in layer_tensors(replace(workload, precision=Precision("fp32"))):
        g = g * LOSS_SCALE
        rounded = x.to(half), g.to(half)
        for matrix in block.factor_shapes:
            factor = block.factor(matrix, *rounded).double()
            sums.append(_relative_error(factor, block.factor(matrix, rounded[0].double(), rounded[1].double())))
            rounding.append(_relative_error(factor, block.factor(matrix, x.double(), g.double())))
    return Errors(*({"median": statistics.median(found), "largest": max(found)} for found in (sums, rounding)))


def _relative_error(matrix: Tensor, reference: Tensor) -> float:
    return float((matrix - reference).norm() / reference.norm())


def rates_table(rates: dict[str, Rates]) -> list[str]:
    """Markdown."""
    heads = ["workload", "half TFLOP/s", "fp32 TFLOP/s", "GEMM TFLOP/s", "share of GEMM's rate", "half over fp32"]
    rows = []
    for workload, of in rates.items():
        figures = [of.tflops["half"], of.tflops["fp32"], of.tflops["gemm"], of.share_of_gemm_rate, of.half_over_fp32]
        rows.append([workload, *(f"{figure:.2f}" for figure in figures)])
    return ["All A and G of one pass; GEMM: plain half-precision products of the same shapes.", "", *table(heads, rows)]


def errors_table(errors: dict[str, Errors]) -> list[str]:
    """Markdown."""
    rows = [
        [workload, *(f"{part[figure]:.1e}" for part in (of.sums, of.rounding) for figure in ("median", "largest"))]
        for workload, of in errors.items()
    ]
    heads = ["workload", "sums, median", "sums, largest", "rounding, median", "rounding, largest"]
    return ["Relative error of A and G against float64, over all matrices of one pass.", "", *table(heads, rows)]


def main() -> None:
    """Measure, print and write after each workload."""
    parser = create_parser(__doc__)
    parser.add_argument("--measure", choices=("rates", "errors"), default="rates", help="default: rates")
    parser.add_argument("--calls", type=count, default=10, help="calls to average over, for rates; default: 10")
    add_workload_arguments(parser, ("bf16", "fp16"))
    arguments = parser.parse_args()
    device = device_from(arguments.device)
    configure_backends(deterministic=False)
    environment = describe_run(device)
    rates: dict[str, Rates] = {}
    errors: dict[str, Errors] = {}
    lines: list[str] = []
    for workload in workloads_from(arguments, device):
        if arguments.measure == "rates":
            rates[workload.name] = measure_rates(workload, arguments.calls)
            lines = rates_table(rates)
        else:
            errors[workload.name] = measure_errors(workload)
            lines = errors_table(errors)
        results = {name: asdict(of) for name, of in (rates | errors).items()}
        write_record(arguments.output, TITLE, environment, results, lines)
    print("\n".join(lines))


if __name__ == "__main__":
    run(main)
