"""Whether a machine is ready for training: `scripts/doctor.py`.

    findings    what a check found and how to mend it; the merged list
    software    Python, packages, MPI library against mpirun, limits of the process (imports neither torch nor MPI)
    ranks       launcher, world size, hosts, versions
    threads     threads against cores
    network     latency and bandwidth between the ranks
    gpus        GPUs, precisions, NCCL, CUDA-awareness
    files       folders for output and data, /dev/shm
    examine     runs the checks on every rank and gathers them

The rules are functions of facts (an environment, numbers, texts), so they can be tested without the hardware.
"""
