"""`kfac-dist plan`: what a run will take on any number of ranks, before it is queued.

kfac-dist plan CONFIG [key=value …] [--ranks 1,2,4] [--profile NAME|FILE] [--grow-batch] [--output DIR] [--json]
[mpirun -n P] kfac-dist plan CONFIG --measure FILE.yaml
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from kfac_dist.communicator import Communicator, create_communicator, launch
from kfac_dist.communicator.devices import check_precision, choose_device
from kfac_dist.config.load import load_config
from kfac_dist.config.schema import Config
from kfac_dist.errors import AgreedInputError, InputError
from kfac_dist.planning.plan import Plan, batches_on, make_plan
from kfac_dist.planning.plan_text import describe_plan
from kfac_dist.planning.profile import Profile, load_profile
from kfac_dist.training.command_line import parse_plan

_DEFAULT_PROFILE = "h100"


def plan(arguments: Sequence[str]) -> None:
    """`kfac-dist plan`; ends the process."""
    launch.run(partial(main, arguments))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one rank; rank 0 prints and writes.

    Args:
        arguments: Those of `kfac-dist plan`; by default this process's command line.

    Returns:
        The exit code, which is the same on every rank.
    """
    program = "python -m kfac_dist.commands.plan" if arguments is None else "kfac-dist plan"
    setup = create_communicator("reduce", device=torch.device("cpu"))  # until the devices are known
    try:
        with setup.raise_on_all_ranks():
            options = parse_plan(sys.argv[1:] if arguments is None else arguments, program)
        if options.help:
            setup.print_once(options.help_text)
            return 0
        with setup.raise_on_all_ranks():
            config = load_config(options.config, options.overrides)
        profile, name = _profile(options, config, setup)
        with setup.raise_on_all_ranks():
            if setup.is_main:
                _show(make_plan(config, profile, options.numbers, options.grow_batch), options, config, profile, name)
        return 0
    except AgreedInputError as error:
        setup.print_once(f"error: {error}", sys.stderr)
        return launch.EXIT_BAD_INPUT


def _profile(options: argparse.Namespace, config: Config, setup: Communicator) -> tuple[Profile, str]:
    """The machine, and what to call it; collective."""
    if options.measure is None:
        with setup.raise_on_all_ranks():
            name = options.profile or _DEFAULT_PROFILE
            return load_profile(name), name
    from kfac_dist.planning.measure import measure_profile  # what a plan from a file does without

    launch.set_threads_per_rank(setup.local_size)
    with setup.raise_on_all_ranks():
        if setup.is_main:
            # Before the half minute that measuring takes.
            _check_writable(options.measure, "--measure")
            batches_on(config, options.numbers, options.grow_batch)
        device = choose_device(config.run.device, setup.local_rank)
        check_precision(config.train.precision, device)
    communicator = create_communicator(config.communication.reduce_scatter, config.communication.backend, device)
    profile = measure_profile(config, communicator, device)
    with setup.raise_on_all_ranks():
        if setup.is_main:
            _write(options.measure, profile.to_yaml(), "--measure")
    return profile, options.measure.name


def _show(plan: Plan, options: argparse.Namespace, config: Config, profile: Profile, name: str) -> None:
    text = describe_plan(plan, config, profile, name)
    record = json.dumps({"profile": profile.model_dump(mode="json"), **plan.as_json()}, indent=2)
    if options.output is not None:
        from kfac_dist.plots.plan import draw_plan
        from kfac_dist.plots.runs import save_figure

        _write(options.output / "plan.txt", text + "\n", "--output")
        _write(options.output / "plan.json", record + "\n", "--output")
        title = f"{config.model.name}, {plan.points[0].batch // plan.points[0].num_ranks} images a GPU"
        if not options.grow_batch:
            title = f"{config.model.name}, batch {config.batch.global_size:,}"
        save_figure(draw_plan(plan.points, f"{title}, {name}: predicted"), options.output / "plan.png")
    print(record if options.json else text)


def _write(path: Path, text: str, option: str) -> None:
    with _writing(path, option):
        path.write_text(text, encoding="utf-8")


def _check_writable(path: Path, option: str) -> None:
    """Refuse a file that cannot be written, and leave everything as it is."""
    with _writing(path, option):
        is_new = not path.exists()
        path.open("a").close()
        if is_new:
            path.unlink()


@contextmanager
def _writing(path: Path, option: str) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise InputError(f"{option}: cannot write {path} ({error.strerror}); choose another path") from error


if __name__ == "__main__":
    launch.run(main)
