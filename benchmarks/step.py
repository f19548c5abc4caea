"""A training step of K-FAC beside one of SGD: seconds and rates by stage, bytes that travel, on GPUs peak memory.

    python benchmarks/step.py --batch 128 --output benchmarks/results/DATE-step
    mpirun -n 4 python benchmarks/step.py --model resnet50 --image-size 224 --classes 1000 --batch 32 --precision bf16

    torch    torch.optim.SGD, to show that ours is not slow; on one rank only, since it averages nothing
    sgd      this package's SGD
    kfacN    K-FAC with a refresh of the Fisher every N steps
    kfac1@F  K-FAC with a refresh in every step, its A and G from a fraction F of the batch (--fractions)

The optimizers take turns, each on a network of its own, so that a machine whose speed drifts favours none; the figures
are medians over the rounds. A turn is --steps steps, or more where it takes more to fill whole intervals. Within a turn
the host runs ahead of the GPU, as in training. Ratios are to the baseline: `sgd`, or `torch` where that is faster.

A first turn, which is not timed, counts each stage's operations. The stage "factors" is what K-FAC's backward takes
beyond sgd's. Rates are held against those of one large product, or for stage 4 one large Cholesky factorisation, on
rank 0. --output also draws the stages, as PATH.svg, where matplotlib is installed.
"""

import argparse
import socket
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from clock import allocated_bytes, seconds_of, watch_peak
from program import count, create_parser, describe_run, device_from, write_record
from step_figures import BASELINES, StepFigures, tables
from torch import Tensor, nn
from work import Ceilings, Traffic, WorkClock, measure_ceilings, traffic_of
from workload import Workload, add_workload_arguments, workloads_from

from kfac_dist.communicator import Communicator, create_communicator, launch, library_version
from kfac_dist.errors import AgreedInputError
from kfac_dist.optim.kfac import KFAC
from kfac_dist.optim.loss_scale import LossScaler
from kfac_dist.optim.sgd import SGD
from kfac_dist.timing import STAGES, StageTimer
from kfac_dist.training.precision import HALF_DTYPES, configure_backends

TITLE = "K-FAC's step beside SGD's"


@dataclass(frozen=True)
class Candidate:
    """An optimizer with a network of its own.

    Attributes:
        name: One of `BASELINES`, kfacN or kfac1@F.
        interval: Steps from one refresh to the next; 1 for SGD.
        step: Trains one step.
        timer: Charged by `step`.
        clock: The timer's.
        traffic: Bytes of a step's collectives; None of SGD.
        state_bytes: GPU memory that it holds between steps.
    """

    name: str
    interval: int
    step: Callable[[], None]
    timer: StageTimer
    clock: WorkClock
    traffic: Traffic | None
    state_bytes: int


@dataclass(frozen=True)
class Turn:
    """Figures of a candidate's turn: seconds per step, of the slowest rank; stages of rank 0; largest peak."""

    seconds: float
    stage_seconds: dict[str, float]
    peak_bytes: int


def create_step(
    workload: Workload, name: str, communicator: Communicator, timer: StageTimer
) -> tuple[Callable[[], None], torch.optim.Optimizer]:
    """A function that trains a candidate's own network by one step, and the optimizer; collective."""
    model, images, labels = workload.create(communicator.rank)
    optimizer, scale_loss, update = create_optimizer(name, model, communicator, workload, timer)

    def step() -> None:
        optimizer.zero_grad()
        with timer.stage("forward"), workload.precision.autocast(workload.device):
            loss = F.cross_entropy(model(images), labels)
        with timer.stage("backward"):
            scale_loss(loss).backward()
        update()

    return step, optimizer


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
            sample_fraction=fraction_of(name), loss_scaler=scaler, timer=timer,
        )  # fmt: skip
    return optimizer, scaler.scale_loss if scaler else lambda loss: loss, optimizer.step


def interval_of(name: str) -> int:
    """Steps of a candidate from one refresh to the next; 1 for SGD."""
    return 1 if name in BASELINES else int(name.removeprefix("kfac").partition("@")[0])


def fraction_of(name: str) -> float:
    """Share of the samples that K-FAC's A and G are computed from."""
    return float(name.partition("@")[2] or 1)


def create_candidate(workload: Workload, name: str, communicator: Communicator) -> Candidate:
    """Set one up and train its first step, which refreshes; collective."""
    clock = WorkClock(workload.device)
    timer = StageTimer(clock)
    before = allocated_bytes(workload.device)
    step, optimizer = create_step(workload, name, communicator, timer)
    step()
    traffic = traffic_of(optimizer) if isinstance(optimizer, KFAC) else None
    return Candidate(name, interval_of(name), step, timer, clock, traffic, allocated_bytes(workload.device) - before)


def steps_of_turn(candidate: Candidate, num_steps: int) -> int:
    """The steps of whole intervals, at least `num_steps`."""
    return -(-num_steps // candidate.interval) * candidate.interval


def count_operations(candidate: Candidate, num_steps: int) -> dict[str, float]:
    """Operations per step by stage, of a turn that is not timed; collective."""
    taken = steps_of_turn(candidate, num_steps)
    with candidate.clock.counting():
        candidate.timer.lap()
        for _ in range(taken):
            candidate.step()
        return {stage: value / taken for stage, value in candidate.timer.lap().items()}


def take_turn(candidate: Candidate, num_steps: int, communicator: Communicator, device: torch.device) -> Turn:
    """Train whole intervals of at least `num_steps` steps; collective."""
    taken = steps_of_turn(candidate, num_steps)
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
    workload: Workload, communicator: Communicator, variants: Sequence[str], num_rounds: int, num_steps: int
) -> StepFigures:
    """Let the candidates take turns; the one that counts operations warms up. Collective."""
    baselines = BASELINES if communicator.size == 1 else ("sgd",)
    names = [*baselines, *variants]
    candidates = [create_candidate(workload, name, communicator) for name in names]
    operations = {candidate.name: count_operations(candidate, num_steps) for candidate in candidates}
    turns: dict[str, list[Turn]] = {name: [] for name in names}
    for _ in range(num_rounds):
        for candidate in candidates:
            turns[candidate.name].append(take_turn(candidate, num_steps, communicator, workload.device))
    half = HALF_DTYPES.get(workload.precision.name)
    ceilings = measure_ceilings(workload.device, half)
    return summarise(turns, operations, candidates[-1].traffic, ceilings)


def summarise(
    turns: dict[str, list[Turn]],
    operations: dict[str, dict[str, float]],
    traffic: Traffic | None,
    ceilings: Ceilings,
) -> StepFigures:
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
        operations=operations,
        traffic=traffic,
        ceilings=ceilings,
        peak_bytes=peaks,
        peak_bytes_beyond_sgd={name: peak - peaks["sgd"] for name, peak in peaks.items()},
    )


def parse_arguments() -> argparse.Namespace:
    """Command line; all ranks have the same."""
    parser = create_parser(__doc__)
    add_workload_arguments(parser, ("fp32", "fp16", "bf16", "fp64"))
    parser.add_argument("--intervals", type=count, nargs="+", default=[1, 10, 20], help="default: 1 10 20")
    parser.add_argument("--fractions", type=fraction, nargs="+", default=[], help="in (0, 1); default: none")
    parser.add_argument("--rounds", type=count, default=5, help="rounds that count; default: 5")
    parser.add_argument("--steps", type=count, default=5, help="least steps of a turn; default: 5")
    return parser.parse_args()


def fraction(text: str) -> float:
    """A share in (0, 1) of the command line."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must be in (0, 1), got {text}")
    return value


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
        variants = [f"kfac{interval}" for interval in arguments.intervals]
        variants += [f"kfac1@{fraction:g}" for fraction in arguments.fractions]
        for workload in workloads_from(arguments, device):
            with setup.raise_on_all_ranks():
                figures[workload.name] = measure(workload, communicator, variants, arguments.rounds, arguments.steps)
            if setup.is_main:
                results = {name: asdict(of) for name, of in figures.items()}
                write_record(arguments.output, TITLE, environment, results, tables(figures))
                if arguments.output is not None and find_spec("matplotlib"):
                    from step_picture import draw_stages

                    draw_stages(figures).savefig(f"{arguments.output}.svg")
        setup.print_once("\n".join(tables(figures)))
        return 0
    except AgreedInputError as error:
        setup.print_once(f"error: {error}", sys.stderr)
        return launch.EXIT_BAD_INPUT


if __name__ == "__main__":
    launch.run(partial(main, parse_arguments()))  # arguments first: on a wrong one, or --help, all ranks leave alike
