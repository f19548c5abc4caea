"""What the batch scripts start, with stand-ins for Slurm, mpirun and containers; tests/cluster has the real Slurm."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.paths import ROOT

# Stands for every program: notes how it was called, and ends as the variable of its name says.
STUB = """#!/bin/bash
echo "$(basename "$0") $*" >>"$LOG"
case "$*" in *finished.py*) exit "${finished:-0}" ;; esac
name=$(basename "$0" .sh)
exit "${!name:-0}"
"""
RANK = 'sh -c trap "" USR1; true 2>/dev/null >"$0"; exec "$@" HOME/kfac_dist-started.7'


class Submitted:
    """A checkout whose scripts/mpirun.sh is a stand-in, and stand-ins on PATH."""

    def __init__(self, folder: Path) -> None:
        self.home, self.log, self.path = folder / "home", folder / "log", folder / "path"
        shutil.copytree(ROOT / "scripts", self.home / "scripts")
        self.path.mkdir()
        for stub in (
            *(self.path / name for name in ("srun", "scontrol", "apptainer")),
            self.home / "scripts/mpirun.sh",
        ):
            stub.write_text(STUB)
            stub.chmod(0o755)

    def run(self, script: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a script where it was submitted; a variable of Slurm's is given without its prefix SLURM_."""
        self.log.write_text("")
        slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_SUBMIT_DIR": str(self.home)}
        path = f"{self.path}:{os.environ['PATH']}"
        return subprocess.run(
            ["bash", ROOT / "scripts/slurm" / script, *arguments],
            cwd=self.home,
            env={"PATH": path, "HOME": str(self.home), "TMPDIR": str(self.home), "LOG": str(self.log), **slurm, **env},
            capture_output=True,
            text=True,
            timeout=30,
        )

    def calls(self) -> list[str]:
        """What was called, with HOME for the checkout."""
        return self.log.read_text().replace(str(self.home), "HOME").splitlines()


@pytest.fixture
def submitted(tmp_path: Path) -> Submitted:
    return Submitted(tmp_path)


def test_mpirun_on_all_ranks(submitted: Submitted) -> None:
    done = submitted.run("train.sbatch", "c.yaml", "a.b=c d", SLURM_NTASKS="16", KFAC_DIST_LAUNCH_FLAGS="-x A --tag b")
    assert done.returncode == 0, done.stderr
    assert submitted.calls() == [
        f"mpirun.sh -n 16 -x A --tag b {RANK} python3 HOME/train.py c.yaml a.b=c d",
        f"mpirun.sh -n 1 -x A --tag b {RANK} python3 HOME/scripts/slurm/finished.py c.yaml a.b=c d",
    ]


def test_what_the_scripts_start_gets_their_environment(submitted: Submitted) -> None:
    """Slurm leaves NONE there after `sbatch --export=NONE`, and srun would pass nothing on."""
    launcher = submitted.home / "scripts/mpirun.sh"
    launcher.write_text('#!/bin/bash\necho "export: ${SLURM_EXPORT_ENV-all}" >>"$LOG"\n')
    submitted.run("train.sbatch", "c.yaml", SLURM_EXPORT_ENV="NONE")
    assert set(submitted.calls()) == {"export: all"}


def test_apptainer_under_mpirun_with_gpus(submitted: Submitted) -> None:
    env = {"KFAC_DIST_CONTAINER": "/images/kfac.sif", "KFAC_DIST_CONTAINER_MOUNTS": "/data:/data"}
    submitted.run("train.sbatch", "c.yaml", SLURM_GPUS_ON_NODE="4", **env)
    assert submitted.calls()[0] == (
        "mpirun.sh -n 8 --map-by ppr:4:node:OVERSUBSCRIBE apptainer exec --bind HOME:HOME,HOME:HOME,/data:/data "
        f"--pwd HOME --nv /images/kfac.sif {RANK} python3 HOME/train.py c.yaml"
    )


def test_pyxis_under_srun(submitted: Submitted) -> None:
    env = {"KFAC_DIST_CONTAINER": "registry/kfac:1", "KFAC_DIST_CONTAINER_RUNTIME": "pyxis"}
    slurm = {"SLURM_NTASKS": "8", "SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "6"}
    submitted.run("train.sbatch", "c.yaml", KFAC_DIST_LAUNCHER="srun", **env, **slurm)
    assert submitted.calls()[0] == (
        "srun --mpi=pmix --kill-on-bad-exit=0 --ntasks=8 --cpus-per-task=6 --gpu-bind=none "
        "--container-image=registry/kfac:1 --container-mounts=HOME:HOME,HOME:HOME --container-workdir=HOME "
        f"{RANK} python3 HOME/train.py c.yaml"
    )


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"KFAC_DIST_LAUNCHER": "mpiexec"}, "KFAC_DIST_LAUNCHER must be mpirun or srun, got mpiexec"),
        ({"KFAC_DIST_CONTAINER_RUNTIME": "docker"}, "must be apptainer or pyxis, got docker"),
        ({"KFAC_DIST_CONTAINER": "x", "KFAC_DIST_CONTAINER_RUNTIME": "pyxis"}, "set KFAC_DIST_LAUNCHER=srun as well"),
        ({"KFAC_DIST_SITE": "/none"}, "KFAC_DIST_SITE must name a file to source, got /none"),
        ({"SLURM_HET_SIZE": "2"}, "a heterogeneous job's ranks are of its first component only"),
        ({"SLURM_SUBMIT_DIR": "/"}, "submit from the checkout of kfac_dist, or set KFAC_DIST_HOME to it, got /"),
    ],
)
def test_what_cannot_work_is_refused(submitted: Submitted, env: dict[str, str], message: str) -> None:
    done = submitted.run("train.sbatch", "c.yaml", **env)
    assert done.returncode == 2
    assert message in done.stderr
    assert submitted.calls() == []


@pytest.mark.parametrize("script", ["train.sbatch", "scaling.sbatch", "study.sbatch"])
def test_without_arguments_the_usage_is_shown(submitted: Submitted, script: str) -> None:
    done = submitted.run(script)
    assert done.returncode == 2
    assert f"scripts/slurm/{script}" in done.stderr


@pytest.mark.parametrize(
    ("given", "after"),
    [
        (("c.yaml", "x=1"), "c.yaml x=1 --resume job"),
        (("c.yaml", "--resume", "auto"), "c.yaml --resume auto"),
        (("--resume=runs/a/checkpoints/iteration-00000008/", "c.yaml"), "c.yaml --resume runs/a"),
        (("--resume", "runs/a/checkpoints/unused-iteration-00000008-2", "c.yaml"), "c.yaml --resume runs/a"),
        (("c.yaml", "--evaluate", "runs/a"), "c.yaml --evaluate runs/a"),
    ],
)
def test_a_requeued_job_goes_on(submitted: Submitted, given: tuple[str, ...], after: str) -> None:
    submitted.run("train.sbatch", *given, SLURM_RESTART_COUNT="2")
    assert submitted.calls()[0].endswith(f"HOME/train.py {after}")


@pytest.mark.parametrize(
    ("env", "code", "requeued"),
    [
        ({"mpirun": "75"}, 75, True),
        ({"finished": "75"}, 75, True),  # mpirun said 0, but there is no DONE
        ({"mpirun": "75", "scontrol": "1"}, 75, True),
        *(({"mpirun": str(code)}, code, False) for code in (1, 2, 3, 93, 130, 137)),
        ({}, 0, False),
    ],
)
def test_the_exit_code_decides(submitted: Submitted, env: dict[str, str], code: int, requeued: bool) -> None:
    done = submitted.run("train.sbatch", "c.yaml", **env)
    assert done.returncode == code
    assert ("scontrol requeue 7" in submitted.calls()) == requeued
    assert ("Slurm refuses the requeue: submit again with --resume auto" in done.stdout) == ("scontrol" in env)


def test_the_sign_of_the_ranks_is_taken_away(submitted: Submitted) -> None:
    launcher = submitted.home / "scripts/mpirun.sh"
    launcher.write_text(STUB.replace("case", 'touch "$TMPDIR/kfac_dist-started.7"\ncase', 1))
    assert submitted.run("train.sbatch", "c.yaml").returncode == 0
    assert len(submitted.calls()) == 2
    assert not (submitted.home / "kfac_dist-started.7").exists()


def test_the_clusters_own_settings(submitted: Submitted) -> None:
    site = submitted.home / "scripts/slurm/site.sh"
    site.write_text('export KFAC_DIST_LAUNCHER=srun\nfalse\necho "$unset" >/dev/null\n')  # as `module` does
    submitted.run("train.sbatch", "c.yaml")
    assert submitted.calls()[0].startswith("srun ")


@pytest.mark.parametrize(("runtime", "start"), [("apptainer", "apptainer exec"), ("pyxis", "srun --ntasks=1")])
def test_a_study_worker_in_a_container(submitted: Submitted, runtime: str, start: str) -> None:
    env = {"KFAC_DIST_CONTAINER": "image", "KFAC_DIST_CONTAINER_RUNTIME": runtime, "KFAC_DIST_LAUNCHER": "srun"}
    submitted.run("study.sbatch", "s.yaml", "--folder", "out", **env)
    (call,) = submitted.calls()
    assert call.startswith(start)
    assert call.endswith("python3 -m kfac_dist.study run s.yaml --folder out --workers 1")


@pytest.mark.parametrize(("signal", "requeued"), [("USR1", True), ("TERM", False), ("", False)])
def test_a_study_worker_that_was_still_starting(submitted: Submitted, signal: str, requeued: bool) -> None:
    """It dies of the signal that is passed on to it; without a signal, 138 is a failure."""
    worker = submitted.path / "worker"
    worker.write_text(f"#!/bin/sh\n[ -z '{signal}' ] || kill -{signal} $PPID\nsleep 0.5\nexit 138\n")
    worker.chmod(0o755)
    done = submitted.run("study.sbatch", "s.yaml", "--folder", "out", KFAC_DIST_PYTHON=str(worker))
    assert done.returncode == (75 if signal else 138), done.stdout
    assert submitted.calls() == ["scontrol requeue 7"] * requeued
