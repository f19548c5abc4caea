"""Seconds that training waits for a checkpoint, seconds until it is on the disk, and its size.

    [mpirun -n P] python benchmarks/checkpoint.py CONFIG.yaml [key=value …] --output benchmarks/results/DATE-checkpoint

Two iterations of the configuration's run, then three saves of it, each waited for before the next; all into a temporary
folder, which the overrides may not name.
"""

import argparse
import socket
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from program import create_parser, describe_run, table, write_record

from kfac_dist.checkpoints.manifest import Manifest
from kfac_dist.checkpoints.save import MODEL_FILE
from kfac_dist.checkpoints.store import CheckpointStore
from kfac_dist.communicator import Communicator, create_communicator, launch, library_version
from kfac_dist.communicator.devices import choose_device
from kfac_dist.config.load import load_config
from kfac_dist.config.schema import Config
from kfac_dist.errors import AgreedInputError
from kfac_dist.training.checkpoint import Checkpointer, code_version, now
from kfac_dist.training.run_state import take_state
from kfac_dist.training.trainer import Trainer

TITLE = "Checkpoints"
SAVES = 3


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = create_parser(__doc__)
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args()


def measure(config: Config, communicator: Communicator, device: torch.device, folder: Path) -> dict[str, Any]:
    """Train two iterations and save three times; seconds of each save, and bytes."""
    trainer = Trainer(config, communicator, device)
    trainer.schedules.num_iterations = 2
    trainer.train()
    checkpointer = Checkpointer(folder / "measured", communicator, keep=1, keep_best=False)
    waited, written = [], []
    for number in range(SAVES):
        manifest = Manifest(number, communicator.size, None, config.to_yaml(), {}, code_version(), now(), {})
        communicator.barrier()
        start = time.perf_counter()
        first_owned = trainer.optimizer.owned_blocks(first_only=True)
        checkpointer.save(take_state(trainer), first_owned, manifest, wait=False)
        waited.append(time.perf_counter() - start)
        assert checkpointer.finish(), "a checkpoint could not be written"
        written.append(time.perf_counter() - start)
    (newest,) = CheckpointStore(folder / "measured").newest_first()
    sizes = {path.name: path.stat().st_size for path in newest.iterdir()}
    return {
        "ranks": communicator.size,
        "model": config.model.name,
        "seconds_waited": waited,
        "seconds_until_written": written,
        "model_bytes": sizes[MODEL_FILE],
        "checkpoint_bytes": sum(sizes.values()),
    }


def main(arguments: argparse.Namespace) -> int:
    """Measure on this rank; rank 0 prints and writes."""
    setup = create_communicator("reduce", device=torch.device("cpu"))  # until the devices are known
    try:
        with tempfile.TemporaryDirectory() as own:
            folder = Path(setup.gather_bytes(own.encode())[0].decode())
            with setup.raise_on_all_ranks():
                config = load_config(arguments.config, [*arguments.overrides, f"run.output_dir={folder}"])
                device = choose_device(config.run.device, setup.local_rank)
            communicator = create_communicator("reduce", config.communication.backend, device)
            launch.set_threads_per_rank(setup.local_size)
            names = [name.decode() for name in setup.gather_bytes(socket.gethostname().encode())]
            hosts = [f"host {list(dict.fromkeys(names)).index(name)}" for name in names]
            environment = describe_run(device, library_version(), hosts)
            results = measure(config, communicator, device, folder)
            communicator.barrier()  # rank 0's folder goes when all are done
    except AgreedInputError as error:
        setup.print_once(f"error: {error}", sys.stderr)
        return launch.EXIT_BAD_INPUT
    heads = ["network", "ranks", "model MB", "checkpoint MB", "training waits s", "on disk after s"]
    seconds = [f"{statistics.median(results[name]):.3f}" for name in ("seconds_waited", "seconds_until_written")]
    megabytes = [f"{results[name] / 1e6:.2f}" for name in ("model_bytes", "checkpoint_bytes")]
    lines = table(heads, [[results["model"], str(results["ranks"]), *megabytes, *seconds]])
    if setup.is_main:
        write_record(arguments.output, TITLE, environment, results, lines)
    setup.print_once("\n".join(lines))
    return 0


if __name__ == "__main__":
    launch.run(partial(main, parse_arguments()))
