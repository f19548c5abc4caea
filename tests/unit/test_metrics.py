"""The run's directory, metrics.jsonl, TensorBoard events, environment record and progress."""

import io
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from kfac_dist import metrics
from kfac_dist.environment import describe_environment
from kfac_dist.errors import InputError
from kfac_dist.metrics import Progress, RunWriter, choose_run_directory, read_metrics

TRAIN = {
    "iteration": 7,
    "epoch": 0.5,
    "loss": 1.25,
    "top1": 60.0,
    "stage_seconds": {"forward": 0.1, "inverse": 0.25},
    "communication_bytes": 1024,
}


@pytest.fixture
def make_writer():
    """Make a writer that is closed after the test."""
    writers = []

    def make(directory, is_main=True):
        writers.append(RunWriter(directory, is_main, "run: {name: test}\n", {"python": "3"}))
        return writers[-1]

    yield make
    for writer in writers:
        writer.close()


def lines_of(directory):
    return (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()


def strict_loads(line):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(line, parse_constant=refuse)


# The folder


def test_folder_names_count_up_past_folders_that_hold_a_run(tmp_path):
    assert choose_run_directory(tmp_path, "a") == tmp_path / "a"
    for name in ("a", "a-2", "a-4"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").touch()
    assert choose_run_directory(str(tmp_path), "a") == tmp_path / "a-3"
    (tmp_path / "a-3").mkdir()  # a folder without metrics holds no run
    assert choose_run_directory(tmp_path, "a") == tmp_path / "a-3"
    assert choose_run_directory(tmp_path, "b") == tmp_path / "b"
    assert not (tmp_path / "b").exists()


def test_a_run_leaves_every_file_of_the_contract(tmp_path, make_writer):
    run = tmp_path / "deep" / "run"
    writer = make_writer(run)
    writer.write("train", **TRAIN)
    assert not (run / "DONE").exists()
    writer.finish()
    assert {path.name.split(".")[0] for path in run.iterdir()} == {
        "config",
        "environment",
        "metrics",
        "events",
        "DONE",
    }
    assert (run / "config.yaml").read_text() == "run: {name: test}\n"
    assert json.loads((run / "environment.json").read_text()) == {"python": "3"}


def test_closing_without_finishing_leaves_no_done_marker(tmp_path, make_writer):
    writer = make_writer(tmp_path)
    writer.close()
    writer.close()
    assert not (tmp_path / "DONE").exists()


def test_other_ranks_write_nothing(tmp_path, make_writer):
    run = tmp_path / "run"
    writer = make_writer(run, is_main=False)
    writer.write("train", **TRAIN)
    writer.finish()
    assert not run.exists()


def test_an_existing_run_is_never_overwritten(tmp_path, make_writer):
    first = make_writer(tmp_path)
    first.write("event", message="first")
    with pytest.raises(InputError, match=r"metrics\.jsonl already exists.*another name"):
        RunWriter(tmp_path, True, "run: {name: second}\n", {})
    assert [json.loads(line)["message"] for line in lines_of(tmp_path)] == ["first"]
    assert (tmp_path / "config.yaml").read_text() == "run: {name: test}\n"


def test_an_output_folder_that_is_a_file_is_an_input_error(tmp_path, make_writer):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"run\.output_dir.*file"):
        make_writer(tmp_path / "file" / "run")


# metrics.jsonl


def test_each_record_is_on_disk_as_one_line_before_the_run_ends(tmp_path, make_writer):
    writer = make_writer(tmp_path)
    for kind in metrics.KINDS:
        writer.write(kind, **TRAIN)
        assert strict_loads(lines_of(tmp_path)[-1]) == {"kind": kind, **TRAIN}
    assert len(lines_of(tmp_path)) == 5


def test_values_that_json_lacks_come_back_as_floats(tmp_path, make_writer):
    writer = make_writer(tmp_path)
    writer.write("train", iteration=0, loss=math.nan, stage_seconds={"inverse": math.inf}, damping=-math.inf)
    record = strict_loads(lines_of(tmp_path)[0])
    assert record["loss"] == "NaN"
    assert math.isnan(float(record["loss"]))
    assert record["stage_seconds"] == {"inverse": "Infinity"}
    assert float(record["damping"]) == -math.inf


def test_tensors_and_numpy_values_become_numbers(tmp_path, make_writer):
    writer = make_writer(tmp_path)
    values = {
        "loss": torch.tensor(0.5),
        "top1": np.float32(12.5),
        "images": np.int64(3),
        "flags": (True, None),
    }
    writer.write("event", layer="größe\n", **values)
    assert strict_loads(lines_of(tmp_path)[0]) == {
        "kind": "event",
        "layer": "größe\n",
        "loss": 0.5,
        "top1": 12.5,
        "images": 3,
        "flags": [True, None],
    }


def test_unknown_kind_and_unknown_type_are_refused(tmp_path, make_writer):
    writer = make_writer(tmp_path)
    with pytest.raises(ValueError, match=r"unknown kind 'test'.*eval"):
        writer.write("test", loss=1.0)
    with pytest.raises(TypeError):
        writer.write("event", loss=object())
    assert lines_of(tmp_path) == []


def test_reading_tolerates_a_line_that_a_crash_cut_off(tmp_path, make_writer):
    writer = make_writer(tmp_path)
    writer.write("train", **TRAIN)
    writer.write("eval", iteration=7, top1=50.0)
    writer.close()
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    assert [record["kind"] for record in read_metrics(tmp_path)] == ["train", "eval"]
    for length in range(len(whole)):
        (tmp_path / "metrics.jsonl").write_bytes(whole[:length])
        assert len(read_metrics(tmp_path)) == whole[:length].count(b"\n")


@pytest.mark.parametrize("damage", ['{"kind": "tr\n', "[1]\n", "\n", "\xff\n"])
def test_reading_names_the_damaged_line(tmp_path, damage):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"kind": "event"}\n' + damage.encode("latin-1") + b"{}\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 2"):
        read_metrics(tmp_path)


def test_reading_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(InputError, match=r"empty.*no readable metrics\.jsonl"):
        read_metrics(tmp_path / "empty")


# TensorBoard


def test_tensorboard_shows_the_same_numbers(tmp_path, make_writer):
    writer = make_writer(tmp_path)
    writer.write("train", **TRAIN)
    writer.write("fisher", iteration=8, layer="block.conv", matrix="A", diff=0.125)
    writer.write("event", message="overflow")
    writer.finish()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    shown = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert shown == {
        "train/epoch": [(7, 0.5)],
        "train/loss": [(7, 1.25)],
        "train/top1": [(7, 60.0)],
        "train/stage_seconds/forward": [(7, pytest.approx(0.1))],
        "train/stage_seconds/inverse": [(7, 0.25)],
        "train/communication_bytes": [(7, 1024.0)],
        "fisher/block.conv/A/diff": [(8, 0.125)],
    }


def test_without_tensorboard_the_run_goes_on_and_says_so_once(tmp_path, monkeypatch, caplog, make_writer):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    writer = make_writer(tmp_path)
    writer.write("train", **TRAIN)
    writer.write("train", **TRAIN)
    writer.finish()
    assert [record.message[:31] for record in caplog.records] == ["TensorBoard is not installed: n"]
    assert len(lines_of(tmp_path)) == 2
    assert (tmp_path / "DONE").exists()


# environment.json


def test_environment_names_versions_machine_and_launch(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("SECRET_TOKEN", "hidden")
    record = describe_environment("Open MPI v5", ["n1", "n1", "n0"])
    assert record["num_ranks"] == 3
    assert record["ranks_by_host"] == {"n1": 2, "n0": 1}
    assert record["mpi_library"] == "Open MPI v5"
    assert torch.__version__.startswith(record["packages"]["torch"])
    assert record["packages"]["numpy"] == np.__version__
    assert record["python"] == ".".join(map(str, sys.version_info[:3]))
    assert record["cpu"]["model"]
    assert record["cpu"]["num_logical"] >= 1
    assert record["variables"]["OMP_NUM_THREADS"] == "3"
    assert record["started"].endswith("+00:00")
    assert "hidden" not in json.dumps(record)


def test_git_state_is_only_that_of_the_checkout_itself(tmp_path):
    from kfac_dist.environment import _git_state

    assert _git_state(tmp_path) is None

    def git(*arguments):
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    git("commit", "--allow-empty", "-m", "first")
    state = _git_state(tmp_path.resolve())
    assert len(state["commit"]) == 40
    assert state["modified"] is False
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "file").touch()
    assert _git_state(tmp_path.resolve())["modified"] is True
    assert _git_state((tmp_path / "new").resolve()) is None


# Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def manual_time(monkeypatch):
    monkeypatch.delenv(metrics.PROGRESS_VARIABLE, raising=False)
    now = [1000.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    return now


def run_progress(total, now, seconds_per_iteration, stream):
    progress = Progress(total, True, stream)
    for iteration in range(total):
        now[0] += seconds_per_iteration
        progress.update(epoch=iteration / 10, loss=2.0, top1=12.34, images_per_second=4321.0)
    progress.close()
    return stream.getvalue().splitlines()


def test_lines_come_every_five_percent_with_time_left(manual_time):
    lines = run_progress(400, manual_time, 0.1, io.StringIO())
    assert len(lines) == 20
    assert lines[4].split("  ") == [
        " 25 %",
        "iteration 100/400",
        "epoch 9.90",
        "loss 2.0000",
        "top-1 12.3 %",
        "4,321 images/s",
        "elapsed 0:00:10",
        "remaining 0:00:30",
    ]
    assert lines[-1].startswith("100 %")
    assert lines[-1].endswith("remaining 0:00:00")


@pytest.mark.parametrize(("total", "num_lines"), [(1, 1), (3, 3), (20, 20), (21, 20), (1000, 20)])
def test_short_runs_get_a_line_an_iteration_and_long_ones_twenty(manual_time, total, num_lines):
    assert len(run_progress(total, manual_time, 0.01, io.StringIO())) == num_lines


def test_a_slow_run_is_never_quiet_for_more_than_a_minute(manual_time):
    lines = run_progress(200, manual_time, 25.0, io.StringIO())
    # Of 10 iterations (250 s) between two 5 % lines, the third, sixth and ninth end a quiet minute.
    assert len(lines) == 80


def test_a_terminal_gets_a_bar(manual_time):
    stream = Terminal()
    progress = Progress(2, True, stream)
    progress.update(epoch=0.5, loss=1.5, top1=40.0, images_per_second=100.0)
    progress.say("evaluated: top-1 99.0 %")
    progress.update(epoch=1.0, loss=1.0, top1=50.0, images_per_second=100.0)
    progress.close()
    assert "2/2" in stream.getvalue()
    assert "loss 1.0000" in stream.getvalue()
    assert "evaluated: top-1 99.0 %\n" in stream.getvalue()


def test_the_environment_overrules_the_guess(manual_time, monkeypatch):
    monkeypatch.setenv(metrics.PROGRESS_VARIABLE, "lines")
    assert len(run_progress(20, manual_time, 0.1, Terminal())) == 20
    monkeypatch.setenv(metrics.PROGRESS_VARIABLE, "bar")
    assert "20/20" in run_progress(20, manual_time, 0.1, io.StringIO())[-1]
    monkeypatch.setenv(metrics.PROGRESS_VARIABLE, "off")
    assert run_progress(20, manual_time, 0.1, Terminal()) == []
    monkeypatch.setenv(metrics.PROGRESS_VARIABLE, "loud")
    with pytest.raises(InputError, match=r"KFAC_DIST_PROGRESS must be bar, lines or off, got 'loud'"):
        Progress(1, True)


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_other_ranks_show_nothing(manual_time, stream):
    progress = Progress(1, False, stream)
    progress.update(epoch=1.0, loss=1.0, top1=1.0, images_per_second=1.0)
    progress.say("evaluated")
    progress.close()
    assert stream.getvalue() == ""
