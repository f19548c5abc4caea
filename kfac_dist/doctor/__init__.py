"""Whether a machine is ready for training: `scripts/doctor.py`.

    findings    what a check found and its remedy; the merged list; the limit on time
    software    Python, packages, the MPI library against mpirun (imports neither torch nor MPI)
    ranks       launcher, world size, hosts, versions, threads against cores, latency and bandwidth
    machine     GPUs, NCCL, CUDA-awareness; folders for output and data
    examine     runs the checks on every rank and gathers them

The rules are functions of facts (an environment, numbers, texts), so they can be tested without the hardware.
"""
