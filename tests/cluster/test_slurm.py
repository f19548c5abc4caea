"""The batch scripts under a real Slurm: limits, requeues, cancelling, launchers, arrays, a scaling sweep."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster, Job, wait_for
from tests.faults.conftest import EVERYTHING, assert_same, records
from tests.paths import QUICKSTART

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(600)]

TWO_NODES = ("--nodes=2", "--ntasks-per-node=1")


def train(
    cluster: Cluster, folder: Path, name: str, flags: tuple[str, ...] = (), arguments: tuple[str, ...] = (), **env: str
) -> Job:
    """Submit 20 iterations on two tasks, with a checkpoint every other iteration."""
    overrides = [*EVERYTHING, f"run.output_dir={folder}", f"run.name={name}"]
    return cluster.submit("train.sbatch", [*TWO_NODES, *flags], [QUICKSTART, *overrides, *arguments], **env)


@pytest.fixture(scope="session")
def whole(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    job = train(cluster, folder, "whole")
    shown = job.wait()
    assert (shown["JobState"], shown["ExitCode"], shown["Restarts"]) == ("COMPLETED", "0:0", "0"), job.log
    return folder / "whole"


def test_a_job_trains_on_two_nodes(whole: Path) -> None:
    assert (whole / "DONE").exists()
    assert len(records(whole)) == 20
    assert records(whole, "summary")[-1]["iterations"] == 20
    environment = json.loads((whole / "environment.json").read_text())
    assert environment["num_ranks"] == 2
    assert "SLURM_JOB_ID" in environment["variables"]


def test_a_job_at_its_time_limit_is_requeued_and_finishes_the_same(
    cluster: Cluster, whole: Path, patient: str, tmp_path: Path
) -> None:
    """Both launchers at once: Slurm looks at time limits every half a minute only."""
    limit = ("--time=1", "--signal=B:USR1@50")
    env = {"KFAC_DIST_PYTHON": patient, "WAIT_AT": "8"}
    jobs = {"mpirun": train(cluster, tmp_path, "mpirun", limit, **env)}
    if cluster.has_pmix():
        jobs["srun"] = train(cluster, tmp_path, "srun", limit, KFAC_DIST_LAUNCHER="srun", **env)
    for name, job in jobs.items():
        shown = job.wait()
        assert (shown["JobState"], shown["ExitCode"], shown["Restarts"]) == ("COMPLETED", "0:0", "1"), job.log
        for text in ("got SIGUSR1", "exit code 75: queueing the job again", "start number 2", "resumed at iteration"):
            assert text in job.log, name
        assert_same(whole, tmp_path / name)
    if "srun" not in jobs:
        pytest.skip("mpirun passed; srun was not tried: this Slurm has no pmix")


def test_scancel_leaves_a_checkpoint_to_go_on_with(cluster: Cluster, whole: Path, patient: str, tmp_path: Path) -> None:
    job = train(cluster, tmp_path, "part", KFAC_DIST_PYTHON=patient, WAIT_AT="9")
    newest = tmp_path / "part/checkpoints/iteration-00000008/manifest.json"
    wait_for(lambda: job.log.count("waiting at iteration 9") == 2 and newest.exists(), "iteration 9", 60)
    cluster.call("scancel", str(job.number))
    shown = job.wait()
    assert (shown["JobState"], shown["Restarts"]) == ("CANCELLED", "0"), job.log
    assert not (tmp_path / "part/DONE").exists()
    job = train(cluster, tmp_path, "part", arguments=("--resume", "auto"))
    assert job.wait()["JobState"] == "COMPLETED", job.log
    assert_same(whole, tmp_path / "part")


def test_only_a_job_that_stopped_in_order_is_requeued(
    cluster: Cluster, stand_in: Callable[[str], str], tmp_path: Path
) -> None:
    bad = train(cluster, tmp_path, "bad", arguments=("train.label_smoothing=7",))
    codes = {code: cluster.submit("train.sbatch", [], ["x"], KFAC_DIST_PYTHON=stand_in(f"sleep 1; exit {code}"))
             for code in (3, 93, 9)}  # fmt: skip
    stopped = cluster.submit(
        "train.sbatch", [], ["x"],
        KFAC_DIST_PYTHON=stand_in('sleep 1; echo "asked: $*"; exit $((SLURM_RESTART_COUNT ? 0 : 75))'),
    )  # fmt: skip
    shown = bad.wait()
    assert (shown["JobState"], shown["ExitCode"], shown["Restarts"]) == ("FAILED", "2:0", "0"), bad.log
    assert "train.label_smoothing" in bad.log
    assert "exit code 2: not queued again" in bad.log
    for code, job in codes.items():
        shown = job.wait()
        assert (shown["JobState"], shown["ExitCode"], shown["Restarts"]) == ("FAILED", f"{code}:0", "0"), job.log
    shown = stopped.wait()
    assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", "1"), stopped.log
    first, *_, last = [line for line in stopped.log.splitlines() if line.startswith("asked: ")]
    assert first.endswith("train.py x")
    assert last.endswith("finished.py x --resume job")


def test_a_stop_that_is_asked_for_while_ranks_start_is_no_reason_to_requeue(
    cluster: Cluster, patient: str, tmp_path: Path
) -> None:
    job = train(cluster, tmp_path, "part", KFAC_DIST_PYTHON=patient, WAIT_AT="3")
    wait_for(lambda: "2 ranks on" in job.log, "the start of the ranks", 30)
    cluster.call("scancel", "--batch", "--signal=TERM", str(job.number))
    shown = job.wait()
    assert (shown["JobState"], shown["ExitCode"], shown["Restarts"]) == ("FAILED", "75:0", "0"), job.log
    assert "got SIGTERM" in job.log
    newest = max((tmp_path / "part/checkpoints").glob("iteration-*"))
    assert newest.name <= "iteration-00000004"


def test_srun_that_starts_each_rank_alone_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    job = train(cluster, tmp_path, "apart", KFAC_DIST_LAUNCHER="srun", KFAC_DIST_LAUNCH_FLAGS="--mpi=none")
    shown = job.wait()
    assert (shown["JobState"], shown["ExitCode"], shown["Restarts"]) == ("FAILED", "2:0", "0"), job.log
    assert "(SLURM_STEP_NUM_TASKS=2) but MPI sees 1: every process would train alone" in job.log
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("launcher", ["mpirun", "srun"])
def test_ranks_come_from_tasks_or_from_gpus(cluster: Cluster, stand_in: Callable[[str], str], launcher: str) -> None:
    if launcher == "srun" and not cluster.has_pmix():
        pytest.skip("this Slurm has no pmix")
    show = stand_in('echo "rank ${OMPI_COMM_WORLD_RANK:-$SLURM_PROCID} on $SLURMD_NODENAME"; sleep 1')
    env = {"KFAC_DIST_PYTHON": show, "KFAC_DIST_LAUNCHER": launcher}
    gpus = cluster.submit("train.sbatch", ["--nodes=2", "--gpus-per-node=2"], ["x"], **env)
    tasks = cluster.submit("train.sbatch", ["--nodes=2", "--ntasks=3"], ["x"], **env)
    for job, nodes in ((gpus, (1, 1, 2, 2)), (tasks, (1, 1, 2))):
        assert job.wait()["JobState"] == "COMPLETED", job.log
        assert f"{len(nodes)} ranks on node[1-2], started by {launcher}" in job.log
        shown = {line for line in job.log.splitlines() if line.startswith("rank")}
        assert shown == {f"rank {rank} on node{node}" for rank, node in enumerate(nodes)}


def test_an_array_of_study_workers(cluster: Cluster, stand_in: Callable[[str], str]) -> None:
    worker = stand_in('echo "asked: $*"; sleep 1; exit $((SLURM_ARRAY_TASK_ID == 1 && !SLURM_RESTART_COUNT ? 75 : 0))')
    flags = ["--array=0-2", f"--output={cluster.folder}/%A_%a.out"]
    array = cluster.submit("study.sbatch", flags, ["study.yaml", "--folder", "out"], KFAC_DIST_PYTHON=worker)
    elements = [Job(cluster, f"{array.number}_{index}") for index in range(3)]
    for index, job in enumerate(elements):
        shown = job.wait()
        assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", str(int(index == 1))), job.log
        asked = [line for line in job.log.splitlines() if line.startswith("asked: ")]
        assert asked == ["asked: -m kfac_dist.study run study.yaml --folder out --workers 1"] * (1 + (index == 1))


def test_the_scaling_sweep(cluster: Cluster, tmp_path: Path) -> None:
    arguments = [QUICKSTART, "data.train_limit=128", "batch.per_rank=8"]
    env = {"KFAC_DIST_SCALING_FOLDER": str(tmp_path), "KFAC_DIST_SCALING_ITERATIONS": "6"}
    job = cluster.submit("scaling.sbatch", TWO_NODES, arguments, **env)
    assert job.wait()["JobState"] == "COMPLETED", job.log
    points = json.loads((tmp_path / "scaling.json").read_text())
    assert [(point["num_ranks"], point["batch_size"]) for point in points] == [(1, 8), (2, 16)]
    assert [len(records(tmp_path / f"ranks-{ranks}")) for ranks in (1, 2)] == [6, 6]
    assert (tmp_path / "scaling.md").read_text() in job.log
    assert (tmp_path / "figure2.png").read_bytes().startswith(b"\x89PNG")
