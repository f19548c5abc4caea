"""Train an image classifier with distributed K-FAC: `[mpirun -n P] python train.py CONFIG.yaml [key=value …]`."""

import argparse
import logging
import sys
from typing import NoReturn

import torch

from kfac_dist.communicator import create_communicator, launch
from kfac_dist.config.load import check_same, load_config
from kfac_dist.devices import check_precision, choose_device
from kfac_dist.errors import AgreedInputError, InputError, RunStopped, TrainingFailed
from kfac_dist.planning.explain import explain
from kfac_dist.training.run_state import find_run
from kfac_dist.training.trainer import Trainer


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}\n{self.format_usage().strip()}")


def parse_arguments() -> argparse.Namespace:
    """Command line; all ranks have the same."""
    parser = _Parser(description=__doc__, add_help=False)
    parser.add_argument("config", nargs="?", help="YAML file; see configs/")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="change a key of the file")
    parser.add_argument("--print-config", action="store_true", help="show the resolved configuration and stop")
    parser.add_argument("--explain", action="store_true", help="show layers, owners, bytes and schedules, and stop")
    parser.add_argument("--ranks", type=int, help="ranks that --explain assumes (default: those there are)")
    parser.add_argument(
        "--resume", metavar="auto|PATH",
        help="go on with a run's folder or checkpoint; auto: with the last run of run.name, if it was not finished",
    )  # fmt: skip
    parser.add_argument("-h", "--help", action="store_true", help="show this text and stop")
    arguments = parser.parse_intermixed_args()  # options may stand before, between and behind overrides
    if arguments.help:
        arguments.help_text = parser.format_help()
    elif arguments.config is None:
        parser.error("the following arguments are required: config")
    elif arguments.ranks is not None and arguments.ranks < 1:
        parser.error(f"argument --ranks: must be >= 1, got {arguments.ranks}")
    return arguments


def main() -> int:
    """Run one rank; returns the exit code, which is the same on every rank."""
    setup = create_communicator("reduce", device=torch.device("cpu"))  # until the devices are known
    logging.basicConfig(level=logging.INFO if setup.is_main else logging.ERROR, format="%(message)s")
    try:
        with setup.raise_on_all_ranks():
            arguments = parse_arguments()
        if arguments.help:
            setup.print_once(arguments.help_text)
            return 0
        with setup.raise_on_all_ranks():
            config = load_config(arguments.config, arguments.overrides)
        with setup.raise_on_all_ranks():
            check_same(setup.gather_bytes(config.shared_yaml().encode()))
        if arguments.print_config:
            setup.print_once(config.to_yaml())
            return 0
        if arguments.explain:
            with setup.raise_on_all_ranks():
                setup.print_once(explain(config, arguments.ranks or setup.size))
            return 0
        threads = launch.set_threads_per_rank(setup.local_size)
        with setup.raise_on_all_ranks():
            device = choose_device(config.run.device, setup.local_rank)
            check_precision(config.train.precision, device)
        communicator = create_communicator(config.communication.reduce_scatter, config.communication.backend, device)
        logging.info("%s, %d threads a rank", communicator.description, threads)
        trainer = Trainer(config, communicator, device)
        if arguments.resume:
            place, is_done = find_run(arguments.resume, config.run, setup)
            if is_done:
                setup.print_once(f"{place} is finished: nothing to do; for a new run leave out --resume")
                return 0
            if place is not None and not trainer.resume(place):
                setup.print_once(f"{place} has no checkpoint that is whole: starting a new run")
        result = trainer.train()
        setup.print_once(f"test accuracy {result.top1:.2f} % after {result.seconds:.1f} s; run: {result.directory}")
        return 0
    except AgreedInputError as error:
        setup.print_once(f"error: {error}", sys.stderr)
        return launch.EXIT_BAD_INPUT
    except RunStopped as stop:
        setup.print_once(f"{stop}; go on with --resume", sys.stderr)
        return launch.EXIT_STOPPED
    except TrainingFailed as error:
        setup.print_once(f"training failed: {error}", sys.stderr)
        return launch.EXIT_FAILED


if __name__ == "__main__":
    launch.run(main)
