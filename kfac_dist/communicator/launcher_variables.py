"""What started this process and how many ranks were promised, as far as environment variables tell.

Reads the environment it is given, and nothing else: neither MPI nor torch.distributed is started here.
"""

import sys
from collections.abc import Mapping

from kfac_dist.errors import InputError

ALLOW_SIZE_VARIABLE = "KFAC_DIST_ALLOW_SIZE_MISMATCH"

# MPI's own variables come before Slurm's: inside sbatch, mpirun's daemons run under srun and SLURM_* describe those.
# So does torchrun's: one torchrun a host is started by srun.
# What an allocation has room for (SLURM_NTASKS) is no promise: only srun sets the number of a step's tasks.
_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
_MPI_VARIABLES = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK", "PMI_SIZE", "PALS_RANKID")
_TORCH_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")


def promised_size(environment: Mapping[str, str]) -> tuple[str, int] | None:
    """The world size that the launcher's environment promises.

    Returns:
        The deciding variable and its value, or None when no launcher left one.
    """
    first = ("WORLD_SIZE",) if launched_by_torchrun(environment) else ()
    for variable in (*first, *_SIZE_VARIABLES):
        value = environment.get(variable, "")
        if value.isdigit():
            return variable, int(value)
    return None


def unused_tasks(environment: Mapping[str, str]) -> int:
    """Tasks of Slurm's allocation, where this process was started in it by no launcher and they are more; else 0."""
    tasks = environment.get("SLURM_NTASKS", "")
    # salloc's shell may be a step of one task itself, which leaves the allocation's tasks; srun tells a step's in both.
    by_launcher = promised_size(environment) not in (None, ("SLURM_STEP_NUM_TASKS", 1)) or any(
        name in environment for name in _MPI_VARIABLES
    )
    if by_launcher or not tasks.isdigit() or int(tasks) < 2 or environment.get(ALLOW_SIZE_VARIABLE) == "1":
        return 0
    return int(tasks)


def launched_by_mpi(environment: Mapping[str, str]) -> bool:
    """Whether an MPI launcher started this process, or Slurm, whose srun may be one, promised several ranks."""
    if launched_by_torchrun(environment):
        return False
    promise = promised_size(environment)
    several = promise is not None and promise[0] != "WORLD_SIZE" and promise[1] > 1
    return several or any(variable in environment for variable in _MPI_VARIABLES)


def launched_by_torchrun(environment: Mapping[str, str]) -> bool:
    """Whether all that torch.distributed needs to connect the ranks is there, and no MPI launcher's variables.

    Where torchrun itself was started by srun or mpirun, one on each host, those left theirs: torchrun's count.
    """
    complete = all(environment.get(name, "").isdigit() for name in _TORCH_NUMBERS) and "MASTER_ADDR" in environment
    by_mpi = any(variable in environment for variable in _MPI_VARIABLES)
    return complete and ("TORCHELASTIC_RUN_ID" in environment or not by_mpi)


def check_world_size(size: int, environment: Mapping[str, str]) -> None:
    """Refuse a job that silently became several single-rank jobs.

    Args:
        size: Ranks that the communicator really has.
        environment: Usually `os.environ`.

    Raises:
        InputError: If the launcher promised another number and the opt-out variable is not set.
    """
    promise = promised_size(environment)
    if promise is None or promise[1] == size or environment.get(ALLOW_SIZE_VARIABLE) == "1":
        return
    variable, expected = promise
    promised = f"the launcher promised {expected} ranks ({variable}={expected}) but"
    otherwise = f"If {size} is what you want, set {ALLOW_SIZE_VARIABLE}=1."
    if variable == "WORLD_SIZE":
        raise InputError(
            f"{promised} this communicator has {size}: the ranks would train apart. torchrun's ranks are connected by "
            f"torch.distributed, with backend auto or torch, not by MPI; without torchrun, all of RANK, WORLD_SIZE, "
            f"LOCAL_RANK, MASTER_ADDR and MASTER_PORT must be set. {otherwise}"
        )
    raise InputError(
        f"{promised} MPI sees {size}: every process would train alone. The mpirun and the MPI library that mpi4py "
        f"loads must be the same installation ({library_version()}); under Slurm prefer mpirun to srun, or "
        f"srun --mpi=pmix. {otherwise}"
    )


def library_version() -> str:
    """First line of what the MPI library says of itself, and the mpi4py version; does not start MPI."""
    mpi4py, mpi = sys.modules.get("mpi4py"), sys.modules.get("mpi4py.MPI")
    if mpi4py is None or mpi is None:
        return "MPI not loaded"
    return f"{mpi.Get_library_version().splitlines()[0].strip(chr(0))} (mpi4py {mpi4py.__version__})"
