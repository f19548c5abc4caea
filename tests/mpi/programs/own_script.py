"""Scripts of one's own, which import nothing but the library; the argument names the case.

raise        the last rank raises while the others wait for it
no_stdout    the same, after its standard output was closed
full_stdout  the same, with text that does not fit on a full disk
own_hook     the same, in a script whose own hook for uncaught exceptions fails itself
thread_ignored  the same, after an exception in another thread, which ends that thread only
opt_out      neither; looks at the hook with and without it
group_after  raise, after the script has made a process group of its own: torch's hook then stands around ours
orders       the ranks begin a collective of the script's and one of ours in different orders
train        K-FAC on data that differ by rank; the weights must not
spawn        the same in two processes that no launcher started, whose script has made the default process group
"""

import sys
import tempfile
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from kfac_dist import KFAC, create_communicator, local_device


def fail(case: str) -> None:
    if case == "own_hook":
        sys.excepthook = lambda kind, error, trace: divmod(1, 0) and None
    communicator = create_communicator()
    assert communicator.size == 2
    if case == "thread_ignored":
        threading.excepthook = lambda report: None
        thread = threading.Thread(target=divmod, args=(1, 0))
        thread.start()
        thread.join()
    if case == "group_after":
        where = communicator.gather_bytes(tempfile.mkdtemp().encode())[0].decode()
        dist.init_process_group("gloo", init_method=f"file://{where}/store", rank=communicator.rank, world_size=2)
    if communicator.rank == 1:
        print(f"failing at {time.time()}", flush=True)
        if case == "no_stdout":
            sys.stdout = None  # type: ignore[assignment]  # as Python has it after a shell's `>&-`
        if case == "full_stdout":
            sys.stdout = open("/dev/full", "w")  # noqa: SIM115
            print("a result")
        raise RuntimeError("disk on fire")
    communicator.barrier()


def look_at_hook() -> None:
    before = sys.excepthook
    communicator = create_communicator(abort_on_exception=False)
    assert sys.excepthook is before
    create_communicator()
    installed = sys.excepthook
    create_communicator()
    assert installed is sys.excepthook is not before
    communicator.print_once("hook left alone, then set once")


def use_both_groups() -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=77))
    communicator = create_communicator()
    theirs, ours = torch.tensor([float(communicator.rank)]), torch.tensor([10.0 + 10.0 * communicator.rank])
    if communicator.rank == 1:
        communicator.all_reduce_(ours)
    work = dist.all_reduce(theirs, async_op=True)
    if communicator.rank == 0:
        communicator.all_reduce_(ours)
    assert work is not None
    work.wait()
    timeout = communicator._group._get_backend(torch.device("cpu")).options._timeout  # type: ignore[attr-defined]
    communicator.print_once(f"theirs {theirs.tolist()}, ours {ours.tolist()}, given up after {timeout}")
    dist.destroy_process_group()


def train() -> None:
    device = local_device()
    communicator = create_communicator()
    torch.manual_seed(communicator.rank)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(device)
    optimizer = KFAC(model, lr=0.1)  # makes a communicator of its own
    start = [parameter.clone() for parameter in model.parameters()]
    for _ in range(3):
        optimizer.zero_grad()
        labels = torch.randint(3, (16,))
        F.cross_entropy(model(torch.randn(16, 6).to(device)), labels.to(device)).backward()
        optimizer.step()
    for parameter, before in zip(model.parameters(), start, strict=True):
        assert not torch.equal(parameter, before)
        assert torch.equal(parameter, communicator.broadcast_(parameter.detach().clone()))
    loaded = "with" if "mpi4py" in sys.modules else "without"
    communicator.print_once(f"{optimizer.communicator.size} ranks {loaded} MPI: {communicator.description}")


def train_in_group(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    train()
    dist.destroy_process_group()


def main(case: str) -> None:
    if case == "spawn":
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(train_in_group, (folder,), nprocs=2)
    elif case == "orders":
        use_both_groups()
    elif case == "train":
        train()
    elif case == "opt_out":
        look_at_hook()
    else:
        fail(case)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(sys.argv[1])
