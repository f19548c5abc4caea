"""From which refresh interval an explicit inverse pays: `python scripts/benchmark_inverse.py > FILE.md`.

Forming the inverse from the Cholesky factor costs once; each step then multiplies instead of solving. Best of several
repeats, one thread, fp32; the sizes are those of 3×3 convolutions of ResNets.
"""

import platform
import time
from collections.abc import Callable

import torch

from kfac_dist.curvature.solvers import Solver
from kfac_dist.runs.environment import describe_environment

SIZES = ((144, 16), (288, 32), (576, 64), (1152, 128), (2304, 256))


def fastest_milliseconds(function: Callable[[], object], repeats: int = 9) -> float:
    """Best of several calls after one to warm up."""
    function()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return 1e3 * best


def main() -> None:
    """Print a Markdown table."""
    torch.set_num_threads(1)
    cpu = describe_environment("", [])["cpu"]["model"]
    print("# Cholesky solves against explicit inverses\n")
    print(f"`python scripts/benchmark_inverse.py`, {cpu}, one thread, torch {torch.__version__}, {platform.system()}\n")
    print("| n | gradient columns | form inverse ms | solve ms | multiply ms | pays from interval |")
    print("|---|---|---|---|---|---|")
    for size, columns in SIZES:
        samples = torch.randn(1, size, size + 9)
        factors = Solver(torch.linalg.cholesky(samples @ samples.mT / size + torch.eye(size)))
        inverse = factors.inverted()
        right = torch.randn(1, size, columns)
        form = fastest_milliseconds(factors.inverted)
        solve = fastest_milliseconds(lambda: factors.solve(right))  # noqa: B023
        multiply = fastest_milliseconds(lambda: inverse.solve(right))  # noqa: B023
        pays = f"{form / (solve - multiply):.1f}" if solve > multiply else "never"
        print(f"| {size} | {columns} | {form:.2f} | {solve:.2f} | {multiply:.2f} | {pays} |")


if __name__ == "__main__":
    main()
