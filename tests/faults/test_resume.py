"""A run that was stopped anywhere goes on as if nothing had happened."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch

from tests.faults.conftest import EVERYTHING, assert_same, records, weights, without
from tests.paths import QUICKSTART, ROOT

pytestmark = pytest.mark.mpi

Run = Callable[..., CompletedProcess[str]]
Whole = Callable[[int], Path]

ITERATION = "kfac_dist.training.trainer.Trainer._train_iteration"
KILLS = [
    f"kill:0:{ITERATION}:1",  # before any checkpoint
    "kill:0:kfac_dist.optim.kfac.KFAC._precondition:13",  # while others wait in a collective
    "kill:1:kfac_dist.checkpoints.save.write_shard:3",
    "kill:1:os.fsync:3",
    "kill:0:kfac_dist.checkpoints.store.CheckpointStore.commit:3",
    "kill:0:shutil.rmtree:2",
    *(
        pytest.param(fault, marks=pytest.mark.long)
        for fault in (
            f"kill:1:{ITERATION}:8",
            "kill:0:kfac_dist.checkpoints.save.write_tensors:3",
            "kill:0:kfac_dist.checkpoints.store.sync_folder:4",
            "kill:0:kfac_dist.checkpoints.store.CheckpointStore.prune:5",
            "kill:0:kfac_dist.training.evaluation.evaluate:1",
        )
    ),
]
BASES = {
    "sgd": ("optimizer.name=sgd", "kfac=null", "train.precision=fp32"),
    "fp16": ("train.precision=fp16",),
    "interval": ("kfac.refresh={schedule: every, interval: 3}", "kfac.batchnorm=full"),
    "eq21": ("kfac.refresh={schedule: eq21, after_iteration: 4}", "kfac.ema_decay=0.8"),
}
"""Besides the base of all other tests: how else a run may be configured."""


@pytest.mark.parametrize("fault", KILLS)
def test_killed_anywhere(fault: str, train: Run, whole_run: Whole, tmp_path: Path) -> None:
    killed = train(2, "part", fault=fault)
    assert "fault: " in killed.stdout
    assert killed.returncode != 0
    assert not (tmp_path / "part" / "DONE").exists()
    resumed = train(2, "part", "--resume", "auto")
    assert resumed.returncode == 0, resumed.stderr
    # Without any checkpoint a new run of the next number is made.
    part = tmp_path / ("part" if (tmp_path / "part" / "DONE").exists() else "part-2")
    assert_same(whole_run(2), part)
    assert not list((part / "checkpoints").glob(".*"))


@pytest.mark.parametrize("base", BASES)
def test_every_kind_of_run_goes_on_bit_for_bit(base: str, train: Run, tmp_path: Path) -> None:
    assert train(2, "whole", *BASES[base]).returncode == 0
    # Not where a checkpoint by epochs would be, and within an interval of refreshes.
    killed = train(2, "part", *BASES[base], fault=f"SIGUSR1:1:{ITERATION}:11;kill:1:{ITERATION}:14")
    assert killed.returncode == 75, killed.stderr
    resumed = train(2, "part", "--resume", "auto", *BASES[base])
    assert resumed.returncode == 0, resumed.stderr
    assert_same(tmp_path / "whole", tmp_path / "part")


def test_killed_at_the_very_end(train: Run, whole_run: Whole, tmp_path: Path) -> None:
    """Rank 0 may have finished the run by then, or not."""
    killed = train(2, "part", fault="kill:1:kfac_dist.training.reporter.Reporter.finish:1")
    assert killed.returncode != 0
    resumed = train(2, "part", "--resume", "auto")
    assert resumed.returncode == 0, resumed.stderr
    assert_same(whole_run(2), tmp_path / "part")


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM", "SIGINT"])
def test_a_signal_to_one_rank_stops_all_after_a_checkpoint(
    name: str, train: Run, whole_run: Whole, tmp_path: Path
) -> None:
    stopped = train(2, "part", fault=f"{name}:1:{ITERATION}:8")
    assert stopped.returncode == 75, stopped.stderr
    assert "stopped by a signal at iteration 8" in stopped.stderr
    resumed = train(2, "part", "--resume", "auto")
    assert resumed.returncode == 0, resumed.stderr
    assert_same(whole_run(2), tmp_path / "part")


GRID = "batch={global_size: 144, per_rank: 6}"
"""24 slots, which 1, 2, 3, 4 and 8 ranks share evenly."""


def check_grid(train: Run, mpirun: Run, tmp_path: Path, saved_on: int, resumed_on: Sequence[int]) -> None:
    """A run that is stopped on some ranks goes on, on others: weights as on one rank, curvature bit for bit."""
    assert train(1, "whole", GRID).returncode == 0
    assert train(saved_on, "stopped", GRID, fault=f"SIGUSR1:0:{ITERATION}:11").returncode == 75
    for num_ranks in resumed_on:
        part = tmp_path / "part"
        shutil.copytree(tmp_path / "stopped", part)
        program = ROOT / "tests/faults/programs/reown.py"
        overrides = [f"run.output_dir={tmp_path}", "run.name=part", *without(EVERYTHING, [GRID]), GRID]
        looked = mpirun(num_ranks, [program, part, QUICKSTART, *overrides], env={"PYTHONPATH": str(ROOT)}, timeout=300)
        assert looked.returncode == 0, looked.stdout + looked.stderr
        assert looked.stdout.count(" owns ['0'") >= 1
        resumed = train(num_ranks, "part", "--resume", str(part), GRID, timeout=300)
        assert resumed.returncode == 0, resumed.stderr
        whole, other = weights(tmp_path / "whole"), weights(part)
        for key, value in whole.items():
            if not key.endswith("num_batches_tracked"):
                torch.testing.assert_close(other[key], value, rtol=1e-9, atol=1e-11)
        assert [record["iteration"] for record in records(part)] == list(range(20))
        shutil.rmtree(part)


def test_another_number_of_ranks(train: Run, mpirun: Run, tmp_path: Path) -> None:
    check_grid(train, mpirun, tmp_path, 3, [2, 4])


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("saved_on", [1, 2, 3, 4, 8])
def test_every_other_number_of_ranks(saved_on: int, train: Run, mpirun: Run, tmp_path: Path) -> None:
    check_grid(train, mpirun, tmp_path, saved_on, [1, 2, 3, 4, 8])


def test_a_finished_run_has_nothing_to_go_on_with(train: Run, tmp_path: Path) -> None:
    assert train(1, "done").returncode == 0
    before = (tmp_path / "done" / "metrics.jsonl").read_bytes()
    again = train(1, "done", "--resume", "auto")
    assert again.returncode == 0
    assert "is finished: nothing to do" in again.stdout
    assert (tmp_path / "done" / "metrics.jsonl").read_bytes() == before


def test_resume_auto_without_a_run_starts_one(train: Run, tmp_path: Path) -> None:
    assert train(1, "new", "--resume", "auto").returncode == 0
    assert (tmp_path / "new" / "DONE").exists()


def test_a_changed_configuration_is_refused_by_key(train: Run, tmp_path: Path) -> None:
    assert train(1, "part", fault=f"SIGUSR1:0:{ITERATION}:5").returncode == 75
    before = {path: path.read_bytes() for path in (tmp_path / "part").rglob("*") if path.is_file()}
    changed = train(1, "part", "--resume", "auto", "optimizer.momentum=0.8", "run.seed=3")
    assert changed.returncode == 2
    assert "optimizer.momentum: 0.9 when it was saved, 0.8 now" in changed.stderr
    assert "run.seed: 0 when it was saved, 3 now" in changed.stderr
    assert "Traceback" not in changed.stderr
    assert {path: path.read_bytes() for path in (tmp_path / "part").rglob("*") if path.is_file()} == before
    longer = train(1, "part", "--resume", "auto", "train.evaluate_every=0.5")
    assert longer.returncode == 0, longer.stderr


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(train: Run, whole_run: Whole, tmp_path: Path) -> None:
    assert train(2, "part", fault=f"SIGUSR1:0:{ITERATION}:9").returncode == 75
    newest = max((tmp_path / "part" / "checkpoints").glob("iteration-*"))
    shard = newest / "rank-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    resumed = train(2, "part", "--resume", str(tmp_path / "part"))
    assert resumed.returncode == 0, resumed.stderr
    assert "rank-00001.safetensors: is damaged" in resumed.stderr
    assert_same(whole_run(2), tmp_path / "part")


def test_nothing_at_the_path(train: Run, tmp_path: Path) -> None:
    refused = train(1, "part", "--resume", str(tmp_path / "nowhere"))
    assert refused.returncode == 2
    assert "--resume must be auto, job, or the folder of a run" in refused.stderr


def test_the_manifest_says_what_it_is(train: Run, tmp_path: Path) -> None:
    assert train(2, "run").returncode == 0
    last = max((tmp_path / "run" / "checkpoints").glob("iteration-*"))
    manifest = json.loads((last / "manifest.json").read_text())
    assert (manifest["iteration"], manifest["num_ranks"], manifest["format"]) == (20, 2, 1)
    assert manifest["data"]["num_train"] == 1438
    assert set(manifest["files"]) == {"model.safetensors", "rank-00000.safetensors", "rank-00001.safetensors"}
    blocks = [item for record in manifest["files"].values() for item in record["items"] if item.startswith("block/")]
    assert len(blocks) == len(set(blocks)) == 5
