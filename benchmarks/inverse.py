"""Cholesky factors and explicit inverses: what each costs by size, and from which refresh interval an inverse pays.

    python benchmarks/inverse.py --sizes 64 256 1024 --output benchmarks/results/DATE-inverse

Forming the inverse from the Cholesky factor costs once; each step then multiplies instead of solving. The cases take
turns; the figures are medians over the rounds. The default sizes n are those of a ResNet's convolutions. A solve has
n/9 right-hand sides, as the gradient of a 3×3 convolution has if it has as many outputs as inputs, and n and 4 n, as
those of a bottleneck's 1×1 convolutions have. The last column is the interval times right-hand sides over rows.
"""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from clock import seconds_of
from program import (
    add_device_argument,
    count,
    create_parser,
    describe_run,
    device_from,
    positive,
    run,
    table,
    write_record,
)
from torch import Tensor

from kfac_dist.curvature.solvers import Solver

TITLE = "Cholesky solves beside explicit inverses"
HEADS = {
    "size": "n",
    "matrices": "matrices",
    "columns": "right-hand sides",
    "batched": "Cholesky of all at once",
    "one_by_one": "one by one",
    "invert": "form one inverse",
    "solve": "solve",
    "multiply": "multiply",
    "pays_from": "inverse pays from interval",
    "columns_per_row": "that is, right-hand sides a row",
}


def cases(size: int, num_matrices: int, columns: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """What is timed, by its name in `HEADS`."""
    roots = torch.randn(num_matrices, size, size + 9, device=device)
    matrices = roots @ roots.mT / size + torch.eye(size, device=device)
    factors = Solver(torch.linalg.cholesky(matrices[:1]))
    right = torch.randn(1, size, columns, device=device)
    return {
        "batched": partial(torch.linalg.cholesky_ex, matrices),
        "one_by_one": partial(_factorise_each, matrices.split(1)),
        "invert": factors.inverted,
        "solve": partial(factors.solve, right),
        "multiply": partial(factors.inverted().solve, right),
    }


def _factorise_each(matrices: tuple[Tensor, ...]) -> None:
    for matrix in matrices:
        torch.linalg.cholesky_ex(matrix)


def measure(
    size: int, columns: int, num_matrices: int, num_rounds: int, num_calls: int, device: torch.device
) -> dict[str, Any]:
    """Milliseconds of each case, and the refresh interval from which an inverse pays: None if never."""
    timed = cases(size, num_matrices, columns, device)
    rounds: dict[str, list[float]] = {name: [] for name in timed}
    for number in range(num_rounds + 1):
        for name, case in timed.items():
            seconds = seconds_of(case, num_calls, device) / num_calls
            if number:  # the first round warms up
                rounds[name].append(1e3 * seconds)
    median = {name: statistics.median(values) for name, values in rounds.items()}
    saved = median["solve"] - median["multiply"]
    pays_from = median["invert"] / saved if saved > 0 else None
    columns_per_row = pays_from and pays_from * columns / size
    sizes = {"size": size, "matrices": num_matrices, "columns": columns}
    return sizes | median | {"pays_from": pays_from, "columns_per_row": columns_per_row}


def tables(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown."""
    cells = [[_cell(row[name]) for name in HEADS] for row in rows]
    return ["Milliseconds, fp32.", "", *table(list(HEADS.values()), cells)]


def _cell(value: float | None) -> str:
    if value is None:
        return "never"
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def main() -> None:
    """Measure, print and write after each size."""
    parser = create_parser(__doc__)
    add_device_argument(parser)
    parser.add_argument("--sizes", type=count, nargs="+", default=[64, 144, 256, 576, 1024, 1152, 2048, 2304])
    parser.add_argument(
        "--columns", type=positive, nargs="+", default=[1 / 9, 1, 4], help="for each row; default: 1/9 1 4"
    )
    parser.add_argument("--matrices", type=count, default=4, help="of each size to be factorised; default: 4")
    parser.add_argument("--rounds", type=count, default=5, help="rounds that count; default: 5")
    parser.add_argument("--calls", type=count, default=3, help="calls of each case in a round; default: 3")
    arguments = parser.parse_args()
    device = device_from(arguments.device)
    environment = describe_run(device)
    rows: list[dict[str, Any]] = []
    for size in arguments.sizes:
        for ratio in arguments.columns:
            columns = max(1, round(ratio * size))
            rows.append(measure(size, columns, arguments.matrices, arguments.rounds, arguments.calls, device))
        write_record(arguments.output, TITLE, environment, rows, tables(rows))
    print("\n".join(tables(rows)))


if __name__ == "__main__":
    run(main)
