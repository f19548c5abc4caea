"""Time K-FAC's step beside SGD's in one run: `python scripts/benchmark_step.py --output benchmarks/DATE-step`.

The two take turns, so that a machine whose speed drifts does not favour either; figures are medians. K-FAC alternates
steps with and without a refresh, from which the mean step at any refresh interval follows. Writes OUTPUT.json and
OUTPUT.md.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from kfac_dist.communicator import create_communicator, launch, library_version
from kfac_dist.models import create_model
from kfac_dist.optim.kfac import KFAC
from kfac_dist.optim.sgd import SGD
from kfac_dist.runs.environment import describe_environment
from kfac_dist.timing import StageTimer

INTERVALS = (1, 5, 10, 20)
# name: (model, image size, images a step)
WORKS = {
    "resnet20-b128": ("resnet20", 32, 128),
    "resnet32-b128": ("resnet32", 32, 128),
    "resnet50-64px-b32": ("resnet50", 64, 32),
}


def step_function(work: str, name: str, device: torch.device, timer: StageTimer) -> Callable[[], float]:
    """A function that trains one step on the same random images and returns its seconds."""
    model_name, size, batch = WORKS[work]
    model = create_model(model_name, 1000 if "50" in model_name else 10, (3, size, size), seed=0).to(device).train()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, size, size, generator=generator).to(device)
    labels = torch.randint(10, (batch,), generator=generator).to(device)
    communicator = create_communicator("reduce", "mpi", device)
    if name == "kfac":
        optimizer: KFAC | SGD = KFAC(model, communicator, lr=1e-4, damping=0.03, refresh=2, ema_decay=0.9, timer=timer)
    else:
        optimizer = SGD(model, communicator, lr=1e-4, timer=timer)

    def step() -> float:
        synchronise(device)
        start = time.perf_counter()
        optimizer.zero_grad()
        with timer.stage("forward"):
            loss = F.cross_entropy(model(images), labels)
        with timer.stage("backward"):
            loss.backward()
        optimizer.step()
        synchronise(device)
        return time.perf_counter() - start

    return step


def measure(work: str, device: torch.device, repeats: int) -> dict[str, object]:
    """Median seconds of SGD's step and of K-FAC's with and without a refresh, and the refresh's stages."""
    timer = StageTimer()
    sgd = step_function(work, "sgd", device, StageTimer())
    kfac = step_function(work, "kfac", device, timer)
    seconds: dict[str, list[float]] = {"sgd": [], "refresh": [], "stale": []}
    stages: list[dict[str, float]] = []
    for repeat in range(repeats + 1):
        timings = {"sgd": sgd()}
        timer.lap()
        timings["refresh"] = kfac()
        taken = timer.lap()
        timings["stale"] = kfac()
        if repeat:  # the first round warms up
            stages.append(taken)
            for name, value in timings.items():
                seconds[name].append(value)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {n: (median["refresh"] + (n - 1) * median["stale"]) / n / median["sgd"] for n in INTERVALS}
    return {
        "seconds": median,
        "fastest_seconds": {name: min(values) for name, values in seconds.items()},
        "ratio_to_sgd": ratios,
        "refresh_stage_seconds": {s: statistics.median(taken[s] for taken in stages) for s in stages[0]},
    }


def synchronise(device: torch.device) -> None:
    """Wait for the device, so that the host's clock measures its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def markdown(results: dict[str, dict[str, object]], environment: dict[str, object], threads: int) -> str:
    """The results as a table."""
    head = " | ".join(f"refresh every {n}" for n in INTERVALS)
    lines = [
        "# K-FAC's step beside SGD's",
        "",
        f"`{environment['command']}`, {environment['started']}, {environment['cpu']['model']}, {threads} threads, "  # type: ignore[index]
        f"GPUs: {environment['gpus'] or 'none'}, torch {environment['packages']['torch']}. Medians; ratios to SGD.",  # type: ignore[index]
        "",
        f"| work | SGD s | refresh s | stale s | {head} |",
        "|---" * (4 + len(INTERVALS)) + "|",
    ]
    for work, result in results.items():
        seconds, ratios = result["seconds"], result["ratio_to_sgd"]
        cells = [f"{seconds[name]:.4f}" for name in ("sgd", "refresh", "stale")]  # type: ignore[index]
        cells += [f"{ratios[n]:.2f}×" for n in INTERVALS]  # type: ignore[index]
        lines.append(f"| {work} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--works", nargs="+", choices=list(WORKS), default=list(WORKS))
    parser.add_argument("--repeats", type=int, default=7, help="rounds that count (one more warms up)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", required=True, help="path without suffix")
    arguments = parser.parse_args()
    threads = launch.set_threads_per_rank(1)
    environment = describe_environment(library_version(), ["local"])
    del environment["working_directory"]  # of no use to a reader
    results = {}
    for work in arguments.works:
        results[work] = measure(work, torch.device(arguments.device), arguments.repeats)
        print(work, results[work], file=sys.stderr, flush=True)
    path = Path(arguments.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps({"results": results, "environment": environment}, indent=2) + "\n")
    path.with_suffix(".md").write_text(markdown(results, environment, threads))
    print(path.with_suffix(".md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
