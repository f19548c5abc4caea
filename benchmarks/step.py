"""A training step of K-FAC beside one of SGD: seconds, seconds by stage, and on GPUs peak memory.

    python benchmarks/step.py --batch 128 --output benchmarks/results/DATE-step
    mpirun -n 4 python benchmarks/step.py --model resnet50 --image-size 224 --classes 1000 --batch 32 --precision bf16

    torch    torch.optim.SGD, to show that ours is not slow; on one rank only, since it averages nothing
    sgd      this package's SGD
    kfacN    K-FAC with a refresh of the Fisher every N steps

The optimizers take turns, each on a network of its own, so that a machine whose speed drifts favours none; the figures
are medians over the rounds. A turn is --steps steps, or more where it takes more to fill whole intervals. Within a turn
the host runs ahead of the GPU, as in training. Ratios are to the baseline: `sgd`, or `torch` where that is faster.
"""

import argparse
import socket
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
import torch.nn.functional as F
from clock import allocated_bytes, seconds_of, watch_peak
from program import count, create_parser, describe_run, device_from, table, write_record
from torch import Tensor, nn
from workload import Workload, add_workload_arguments, workloads_from

from kfac_dist.communicator import Communicator, create_communicator, launch, library_version
from kfac_dist.errors import AgreedInputError
from kfac_dist.optim.kfac import KFAC
from kfac_dist.optim.loss_scale import LossScaler
from kfac_dist.optim.sgd import SGD
from kfac_dist.precision import configure_backends
from kfac_dist.timing import STAGES, StageTimer

TITLE = "K-FAC's step beside SGD's"
BASELINES = ("torch", "sgd")


@dataclass(frozen=True)
class Candidate:
    """An optimizer with a network of its own.

    Attributes:
        name: One of `BASELINES`, or kfacN.
        interval: Steps from one refresh to the next; 1 for SGD.
        step: Trains one step.
        timer: Charged by `step`.
        state_bytes: GPU memory that it holds between steps.
    """

    name: str
    interval: int
    step: Callable[[], None]
    timer: StageTimer
    state_bytes: int


@dataclass(frozen=True)
class Turn:
    """Figures of a candidate's turn: seconds per step, of the slowest rank; stages of rank 0; largest peak."""

    seconds: float
    stage_seconds: dict[str, float]
    peak_bytes: int


@dataclass(frozen=True)
class StepFigures:
    """Results of a workload, by candidate.

    Attributes:
        seconds: Median seconds per step.
        rounds: Seconds per step in each round.
        ratio_to_baseline: Of the medians, to the fastest SGD.
        stage_seconds: Median seconds per step by stage, of rank 0.
        peak_bytes: Most GPU memory that it needs if alone; 0 on a CPU.
        peak_bytes_beyond_sgd: The same less what `sgd` needs.
    """

    seconds: dict[str, float]
    rounds: dict[str, list[float]]
    ratio_to_baseline: dict[str, float]
    stage_seconds: dict[str, dict[str, float]]
    peak_bytes: dict[str, int]
    peak_bytes_beyond_sgd: dict[str, int]


def create_step(workload: Workload, name: str, communicator: Communicator, timer: StageTimer) -> Callable[[], None]:
    """A function that trains a candidate's own network by one step; collective."""
    model, images, labels = workload.create(communicator.rank)
    optimizer, scale_loss, update = create_optimizer(name, model, communicator, workload, timer)

    def step() -> None:
        optimizer.zero_grad()
        with timer.stage("forward"), workload.precision.autocast(workload.device):
            loss = F.cross_entropy(model(images), labels)
        with timer.stage("backward"):
            scale_loss(loss).backward()
        update()

    return step


def create_optimizer(
    name: str, model: nn.Module, communicator: Communicator, workload: Workload, timer: StageTimer
) -> tuple[torch.optim.Optimizer, Callable[[Tensor], Tensor], Callable[[], None]]:
    """A candidate's optimizer, what scales its loss, and what updates the weights; collective."""
    needs_scale = workload.precision.needs_loss_scale
    if name == "torch":
        baseline = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, foreach=True)
        torch_scaler = torch.amp.GradScaler(workload.device.type, enabled=needs_scale)

        def update() -> None:
            with timer.stage("update"):
                torch_scaler.step(baseline)
                torch_scaler.update()

        return baseline, torch_scaler.scale, update
    scaler = LossScaler() if needs_scale else None
    optimizer: KFAC | SGD
    if name == "sgd":
        optimizer = SGD(model, communicator, lr=1e-4, loss_scaler=scaler, timer=timer)
    else:
        optimizer = KFAC(
            model, communicator, lr=1e-5, damping=0.03, ema_decay=0.9, refresh=interval_of(name),
            loss_scaler=scaler, timer=timer,
        )  # fmt: skip
    return optimizer, scaler.scale_loss if scaler else lambda loss: loss, optimizer.step


def interval_of(name: str) -> int:
    """Steps of a candidate from one refresh to the next; 1 for SGD."""
    return 1 if name in BASELINES else int(name.removeprefix("kfac"))


def create_candidate(workload: Workload, name: str, communicator: Communicator) -> Candidate:
    """Set one up and train its first step, which refreshes; collective."""
    timer = StageTimer.on(workload.device)
    before = allocated_bytes(workload.device)
    step = create_step(workload, name, communicator, timer)
    step()
    return Candidate(name, interval_of(name), step, timer, allocated_bytes(workload.device) - before)


def take_turn(candidate: Candidate, num_steps: int, communicator: Communicator, device: torch.device) -> Turn:
    """Train whole intervals of at least `num_steps` steps; collective."""
    num_intervals = -(-num_steps // candidate.interval)
    taken = num_intervals * candidate.interval
    candidate.timer.lap()
    communicator.barrier()
    with watch_peak(device) as peak_so_far:
        seconds = seconds_of(candidate.step, taken, device)
        peak = peak_so_far()
    stages = candidate.timer.lap()
    largest = torch.tensor([seconds / taken, candidate.state_bytes + peak], dtype=torch.float64)
    slowest, peak_bytes = communicator.all_reduce_(largest, "max").tolist()
    return Turn(slowest, {stage: value / taken for stage, value in stages.items()}, int(peak_bytes))


def measure(
    workload: Workload, communicator: Communicator, intervals: Sequence[int], num_rounds: int, num_steps: int
) -> StepFigures:
    """Let the candidates take turns; one more round warms up. Collective."""
    baselines = BASELINES if communicator.size == 1 else ("sgd",)
    names = [*baselines, *(f"kfac{interval}" for interval in intervals)]
    candidates = [create_candidate(workload, name, communicator) for name in names]
    turns: dict[str, list[Turn]] = {name: [] for name in names}
    for number in range(num_rounds + 1):
        for candidate in candidates:
            turn = take_turn(candidate, num_steps, communicator, workload.device)
            if number:
                turns[candidate.name].append(turn)
    return summarise(turns)


def summarise(turns: dict[str, list[Turn]]) -> StepFigures:
    """Medians over the rounds, and ratios of them."""
    rounds = {name: [turn.seconds for turn in taken] for name, taken in turns.items()}
    seconds = {name: statistics.median(values) for name, values in rounds.items()}
    baseline = min(seconds[name] for name in BASELINES if name in seconds)
    peaks = {name: max(turn.peak_bytes for turn in taken) for name, taken in turns.items()}
    return StepFigures(
        seconds=seconds,
        rounds=rounds,
        ratio_to_baseline={name: value / baseline for name, value in seconds.items()},
        stage_seconds={
            name: {stage: statistics.median(turn.stage_seconds[stage] for turn in taken) for stage in STAGES}
            for name, taken in turns.items()
        },
        peak_bytes=peaks,
        peak_bytes_beyond_sgd={name: peak - peaks["sgd"] for name, peak in peaks.items()},
    )


def tables(figures: dict[str, StepFigures]) -> list[str]:
    """Markdown; a row for each workload, and for each of its candidates by stage."""
    names = list(next(iter(figures.values())).seconds)
    rows = [
        [workload, *(f"{1e3 * of.seconds[name]:.1f} ({of.ratio_to_baseline[name]:.2f}×)" for name in names)]
        for workload, of in figures.items()
    ]
    lines = [
        "Milliseconds per step (and times the faster SGD); kfacN refreshes the Fisher every N steps:",
        "",
        *table(["workload", *names], rows),
    ]
    if any(any(of.peak_bytes.values()) for of in figures.values()):
        rows = [
            [workload, *(f"{of.peak_bytes[n] / 2**20:.0f} ({of.peak_bytes_beyond_sgd[n] / 2**20:+.0f})" for n in names)]
            for workload, of in figures.items()
        ]
        lines += ["", "Peak MiB of GPU memory (and beyond sgd's):", "", *table(["workload", *names], rows)]
    stages = [stage for stage in STAGES if stage != "data"]
    rows = [
        [workload, name, *(f"{1e3 * of.stage_seconds[name][stage]:.2f}" for stage in stages)]
        for workload, of in figures.items()
        for name in names
    ]
    return [*lines, "", "Milliseconds per step by stage:", "", *table(["workload", "optimizer", *stages], rows)]


def parse_arguments() -> argparse.Namespace:
    """Command line; all ranks have the same."""
    parser = create_parser(__doc__)
    add_workload_arguments(parser, ("fp32", "fp16", "bf16", "fp64"))
    parser.add_argument("--intervals", type=count, nargs="+", default=[1, 10, 20], help="default: 1 10 20")
    parser.add_argument("--rounds", type=count, default=5, help="rounds that count; default: 5")
    parser.add_argument("--steps", type=count, default=5, help="least steps of a turn; default: 5")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> int:
    """Measure on this rank; rank 0 prints and writes after each workload."""
    setup = create_communicator("reduce", "mpi", torch.device("cpu"))  # until the devices are known
    try:
        with setup.raise_on_all_ranks():
            device = device_from(arguments.device, setup.local_rank)
        communicator = create_communicator(device=device)
        launch.set_threads_per_rank(setup.local_size)
        configure_backends(deterministic=False)
        names = [name.decode() for name in setup.gather_bytes(socket.gethostname().encode())]
        hosts = [f"host {list(dict.fromkeys(names)).index(name)}" for name in names]
        environment = describe_run(device, library_version(), hosts)
        figures: dict[str, StepFigures] = {}
        for workload in workloads_from(arguments, device):
            with setup.raise_on_all_ranks():
                figures[workload.name] = measure(
                    workload, communicator, arguments.intervals, arguments.rounds, arguments.steps
                )
            if setup.is_main:
                results = {name: asdict(of) for name, of in figures.items()}
                write_record(arguments.output, TITLE, environment, results, tables(figures))
        setup.print_once("\n".join(tables(figures)))
        return 0
    except AgreedInputError as error:
        setup.print_once(f"error: {error}", sys.stderr)
        return launch.EXIT_BAD_INPUT


if __name__ == "__main__":
    launch.run(partial(main, parse_arguments()))  # arguments first: on a wrong one, or --help, all ranks leave alike
