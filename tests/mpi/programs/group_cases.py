"""Life and death of the process group; the argument after the number of ranks names the case."""

import logging
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from kfac_dist.communicator import Communicator, MpiCommunicator, connect, create_communicator, launch
from kfac_dist.communicator.connect import connect_gpus
from kfac_dist.communicator.process_group import ProcessGroupCommunicator
from kfac_dist.errors import AgreedInputError


def join(parent: MpiCommunicator, backend: str = "gloo", timeout: float = 60) -> ProcessGroupCommunicator:
    return connect_gpus(parent, torch.device("cpu"), backend, timedelta(seconds=timeout))


def mean_rank(communicator: Communicator) -> float:
    return communicator.all_reduce_(torch.tensor([float(communicator.rank)]), "mean").item()


def init_by_hand(parent: MpiCommunicator, ranks: int, rank: int) -> None:
    """What a user's program may have done before."""
    store = connect._share_store(parent, timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)


def check_two(parent: MpiCommunicator) -> None:
    """The second is beside the first; the hook that aborts the job stays."""
    hook = sys.excepthook
    first, second = join(parent), join(parent)
    assert sys.excepthook is hook
    assert first._group is not second._group
    assert mean_rank(first) == mean_rank(second) == (parent.size - 1) / 2


def check_users_group(parent: MpiCommunicator) -> None:
    """The default group of the user's program is not ours to take, and may go before ours."""
    init_by_hand(parent, parent.size, parent.rank)
    theirs = dist.group.WORLD
    ours = join(parent)
    assert ours._group is not theirs
    assert dist.group.WORLD is theirs
    assert mean_rank(ours) == (parent.size - 1) / 2
    dist.destroy_process_group()


def check_other_order(parent: MpiCommunicator) -> None:
    init_by_hand(parent, parent.size, parent.size - 1 - parent.rank)
    try:
        join(parent)
    except AgreedInputError as error:
        assert "default process group must number its ranks as MPI does" in str(error)  # noqa: PT017
    else:
        raise AssertionError("ranks in another order were taken")


def check_unreachable(parent: MpiCommunicator) -> None:
    """Ends the job: rank 1 looks for the store where there is none."""
    connect._address = lambda parent: "127.0.0.1:1"  # type: ignore[assignment]
    join(parent, timeout=3)


def check_uncaught(parent: MpiCommunicator) -> None:
    """Ends the job, by the hook of sys: launch.run is not there in a user's program."""
    join(parent)
    if parent.rank == parent.size - 1:
        try:
            raise RuntimeError("disk on fire")
        except RuntimeError:
            sys.excepthook(*sys.exc_info())
    parent.barrier()


def check_nccl_on_cpus(parent: MpiCommunicator) -> None:
    for _ in range(2):
        try:
            create_communicator(backend="nccl", device=torch.device("cpu"))
        except AgreedInputError as error:
            refused = str(error)
    assert "no rank has one" in refused
    everywhere = parent.gather_bytes(refused.encode())
    assert len(set(everywhere)) == 1
    raise_on_all(refused)


def raise_on_all(text: str) -> None:
    raise AgreedInputError(text)


def main() -> int:
    logging.basicConfig()
    parent = MpiCommunicator("reduce")
    try:
        globals()[f"check_{sys.argv[2]}"](parent)
    except AgreedInputError as error:
        parent.print_once(f"error: {error}", sys.stderr)
        return launch.EXIT_BAD_INPUT
    parent.print_once("passed")
    return 0


if __name__ == "__main__":
    launch.run(main)
