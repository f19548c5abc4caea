"""The main job as a user starts it: two ranks under mpirun, then one plain process."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kfac_dist.config.load import load_config
from kfac_dist.report.health import EVENTS
from kfac_dist.runs.writer import KINDS
from tests.paths import ROOT

QUICKSTART = ROOT / "configs" / "quickstart.yaml"

STAGES = ("forward", "backward", "reduce_scatter", "inverse", "precondition", "all_gather", "update")
FIELDS = {
    "train": {
        "iteration",
        "epoch",
        "loss",
        "top1",
        "learning_rate",
        "momentum",
        "damping",
        "images_per_second",
        "stage_seconds",
        "communication_bytes",
    },
    "eval": {"iteration", "epoch", "loss", "top1", "top5"},
    "summary": {"top1", "iterations", "seconds"},
}


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quickstart")


@pytest.fixture(scope="module")
def finished(mpirun: Callable[..., Any], output_dir: Path) -> Any:
    return mpirun(2, ["train.py", QUICKSTART, f"run.output_dir={output_dir}"], timeout=180)


@pytest.fixture(scope="module")
def records(finished: Any, output_dir: Path) -> list[dict[str, Any]]:
    assert finished.returncode == 0, finished.stderr
    return read_records(output_dir / "quickstart")


def read_records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.mpi
def test_accuracy_on_two_ranks(finished: Any, records: list[dict[str, Any]], output_dir: Path) -> None:
    top1 = records[-1]["top1"]
    assert top1 >= 97
    assert finished.stdout.count("test accuracy") == 1  # rank 0 alone speaks
    assert f"test accuracy {top1:.2f} %" in finished.stdout
    assert str(output_dir / "quickstart") in finished.stdout
    assert "2 ranks over " in finished.stderr  # MPI, or NCCL where there are two GPUs
    assert (output_dir / "quickstart" / "DONE").is_file()


@pytest.mark.mpi
def test_metrics(records: list[dict[str, Any]]) -> None:
    for record in records:
        assert FIELDS[record["kind"]] <= record.keys()
    training = [record for record in records if record["kind"] == "train"]
    assert [record["iteration"] for record in training] == list(range(68))  # ceil(6 x 1438 / 128)
    for record in training:
        assert set(STAGES) <= record["stage_seconds"].keys()
        assert all(record["stage_seconds"][stage] > 0 for stage in STAGES)
    assert [int(record["epoch"]) for record in records if record["kind"] == "eval"] == [1, 2, 3, 4, 5, 6]
    assert training[0]["learning_rate"] == 0.03
    assert training[-1]["learning_rate"] < 1e-3
    summary = records[-1]
    assert summary["kind"] == "summary"
    assert summary["iterations"] == 68
    assert summary["communication_bytes"] == sum(record["communication_bytes"] for record in training)


@pytest.mark.mpi
def test_every_field_is_documented(records: list[dict[str, Any]]) -> None:
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8").partition("\n## Metrics\n")[2]
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", page.partition("\n## ")[0], re.MULTILINE)
    documented = {kind: {"kind", *re.findall(r"`(\w+)`", text)} for kind, text in rows}
    assert documented.keys() == set(KINDS)
    for record in records:
        assert record.keys() - documented[record["kind"]] == set()
    assert EVENTS.keys() <= documented["event"]


@pytest.mark.mpi
def test_run_directory(records: list[dict[str, Any]], output_dir: Path) -> None:
    del records  # the run is over
    run = output_dir / "quickstart"
    assert load_config(run / "config.yaml") == load_config(QUICKSTART, [f"run.output_dir={output_dir}"])
    environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    assert environment["num_ranks"] == 2
    assert sum(environment["ranks_by_host"].values()) == 2
    assert environment["packages"]["torch"]
    assert environment.keys() >= {"command", "cpu", "git", "gpus", "mpi_library", "python", "started", "variables"}
    assert len(list(run.glob("events.out.tfevents.*"))) == 1


@pytest.mark.mpi
def test_plain_python_is_one_rank_and_overwrites_nothing(
    records: list[dict[str, Any]], output_dir: Path, run_python: Callable[..., Any]
) -> None:
    before = (output_dir / "quickstart" / "metrics.jsonl").read_bytes()
    finished = run_python(["train.py", QUICKSTART, f"run.output_dir={output_dir}", "train.epochs=0.2"])
    assert finished.returncode == 0, finished.stderr
    assert "1 rank, without MPI" in finished.stderr
    second = output_dir / "quickstart-2"
    assert str(second) in finished.stdout
    assert (second / "DONE").is_file()
    environment = json.loads((second / "environment.json").read_text(encoding="utf-8"))
    assert environment["num_ranks"] == 1
    ours, theirs = (
        [record["loss"] for record in run if record["kind"] == "train"] for run in (read_records(second), records)
    )
    assert len(ours) == 3
    assert ours == pytest.approx(theirs[:3], rel=1e-4)  # the same run, whatever the number of ranks
    assert (output_dir / "quickstart" / "metrics.jsonl").read_bytes() == before
