"""What `kfac-dist train`, `evaluate`, `explain` and `train.py` do on all ranks, after `commands/early.py`."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch

from kfac_dist.communicator import Communicator, create_communicator, launch
from kfac_dist.communicator.devices import check_precision, choose_device
from kfac_dist.config.load import check_same, load_config
from kfac_dist.config.schema import Config
from kfac_dist.errors import AgreedInputError, NoProgress, RunStopped, TrainingFailed
from kfac_dist.planning.explain import explain as describe_plan
from kfac_dist.runs.log import RunLog, logger
from kfac_dist.training.command_line import Parse, parse_train
from kfac_dist.training.run_state import find_run, load_weights, refuse_unusable
from kfac_dist.training.trainer import Trainer
from kfac_dist.vocabulary import counted


def main(arguments: Sequence[str] | None = None, parse: Parse = parse_train) -> int:
    """Run one rank.

    Args:
        arguments: The command line; by default this process's.
        parse: What reads it.

    Returns:
        The exit code, which is the same on every rank.
    """
    words = sys.argv[1:] if arguments is None else arguments
    setup = create_communicator("reduce", device=torch.device("cpu"))  # until the devices are known
    with RunLog.of_this_process(setup.rank) as log:
        try:
            return _run(partial(parse, words), setup, log)
        except AgreedInputError as error:
            message, code = f"error: {error}", launch.EXIT_BAD_INPUT
        except RunStopped as stop:
            message, code = f"{stop}; go on with --resume auto", launch.EXIT_STOPPED
        except NoProgress as error:
            message, code = f"not started again: {error}", launch.EXIT_NO_PROGRESS
        except TrainingFailed as error:
            message, code = f"training failed: {error}", launch.EXIT_FAILED
        except Exception:
            log.exception()
            raise
        log.show(message, "ERROR", sys.stderr)
        return code


def _run(parse: Callable[[], argparse.Namespace], setup: Communicator, log: RunLog) -> int:
    with setup.raise_on_all_ranks():
        arguments = parse()
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
            setup.print_once(describe_plan(config, arguments.ranks or setup.size))
        return 0
    return _train(config, arguments, setup, log)


def _train(config: Config, arguments: argparse.Namespace, setup: Communicator, log: RunLog) -> int:
    threads = launch.set_threads_per_rank(setup.local_size)
    tasks = launch.unused_tasks(os.environ)
    if tasks and setup.size == 1 and not arguments.evaluate:
        raise AgreedInputError(
            f"this process was started by neither mpirun nor srun, in an allocation of {tasks} tasks "
            f"(SLURM_NTASKS={tasks}), and would train alone: mpirun -n {tasks}, or srun --mpi=pmix, starts as many. If "
            f"1 is what you want, set {launch.ALLOW_SIZE_VARIABLE}=1"
        )
    with setup.raise_on_all_ranks():
        device = choose_device(config.run.device, setup.local_rank)
        check_precision(config.train.precision, device)
    communicator = create_communicator(config.communication.reduce_scatter, config.communication.backend, device)
    logger.info("%s, %s a rank", communicator.description, counted(threads, "thread"))
    trainer = Trainer(config, communicator, device, log)
    if arguments.evaluate:
        path = load_weights(trainer, arguments.evaluate)
        loss, top1, top5 = trainer.evaluate()
        log.show(f"{path}: top-1 {top1:.2f} %, top-5 {top5:.2f} %, loss {loss:.4f}")
        return 0
    if arguments.resume:
        place, is_done = find_run(arguments.resume, config.run, setup)
        if is_done:
            log.show(
                f"{place} is finished: nothing to do; for a new run leave out --resume, and to train this one for more "
                "train.epochs delete its DONE"
            )
            return 0
        if place is not None and not trainer.resume(place):
            refuse_unusable(place, communicator)
            log.show(f"{place} has no checkpoint yet: starting a new run")
    result = trainer.train()
    log.show(f"test accuracy {result.top1:.2f} % after {result.seconds:.1f} s; run: {result.directory}")
    return 0
