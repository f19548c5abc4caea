"""The run's directory, metrics.jsonl, TensorBoard events."""

import errno
import json
import math
import multiprocessing
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kfac_dist.errors import InputError, RankFailed
from kfac_dist.runs import folders
from kfac_dist.runs.folders import choose_run_directory, claim_run_directory, last_run_directory, run_of_job
from kfac_dist.runs.reader import read_metrics
from kfac_dist.runs.writer import KINDS, RunWriter

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


def run_there(folder, name, config="", job=None):
    (folder / name).mkdir()
    (folder / name / "metrics.jsonl").touch()
    (folder / name / "config.yaml").write_text(config)
    if job is not None:
        (folder / name / "environment.json").write_text(json.dumps({"variables": {"SLURM_JOB_ID": job}}))


def test_the_last_run_is_found_though_an_earlier_one_was_deleted(tmp_path):
    assert last_run_directory(tmp_path, "a") is None
    run_there(tmp_path, "a-2", "run: {name: a}")
    assert last_run_directory(tmp_path, "a") == tmp_path / "a-2"
    assert choose_run_directory(tmp_path, "a") == tmp_path / "a-3", "the newest has the highest number"
    run_there(tmp_path, "a-7", "run: {name: a-7}")  # the only run of another name
    run_there(tmp_path, "a-9", "run: [")
    run_there(tmp_path, "a-x", "run: {name: a}")
    assert last_run_directory(tmp_path, "a") == tmp_path / "a-2"
    run_there(tmp_path, "a-3")
    run_there(tmp_path, "a", "run: {name: a}")  # without a gap the folder's name is enough
    assert last_run_directory(tmp_path, "a") == tmp_path / "a-3"
    run_there(tmp_path, "a-6", "run: {name: a}")
    assert choose_run_directory(tmp_path, "a") == tmp_path / "a-8"


def test_a_folder_that_may_not_be_entered_is_no_run_of_this_name(tmp_path, monkeypatch):
    """Defect: such as another user's, anywhere behind a gap; it ended every run of the name."""
    run_there(tmp_path, "a", "run: {name: a}")
    (tmp_path / "a-7").mkdir()
    exists = Path.exists

    def may_not(path, **options):
        if path.parent.name == "a-7":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return exists(path, **options)

    monkeypatch.setattr(Path, "exists", may_not)
    assert last_run_directory(tmp_path, "a") == tmp_path / "a"
    assert choose_run_directory(tmp_path, "a") == tmp_path / "a-2"


def test_the_run_of_a_job(tmp_path):
    for name, job in (("a", "7"), ("a-2", "7"), ("a-3", "8"), ("a-4", None), ("b", "9")):
        run_there(tmp_path, name, f"run: {{name: {name[0]}}}", job)
    (tmp_path / "a-4" / "environment.json").write_text("{")
    assert run_of_job(tmp_path, "a", "7") == tmp_path / "a-2"
    assert run_of_job(tmp_path, "a", "9") is None


def claim(folder, start, names):
    start.wait()
    names.put(claim_run_directory(folder, "a").name)


def test_starts_at_once_get_a_folder_each(tmp_path):
    count = 6
    context = multiprocessing.get_context("fork")
    start, names = context.Barrier(count), context.Queue()
    processes = [context.Process(target=claim, args=(tmp_path, start, names)) for _ in range(count)]
    for process in processes:
        process.start()
    found = sorted(names.get(timeout=30) for _ in range(count))
    for process in processes:
        process.join()
    assert found == ["a", *(f"a-{number}" for number in range(2, count + 1))]


def test_a_folder_that_another_takes_in_between_is_left_to_it(tmp_path, monkeypatch):
    def choose(*arguments):
        chosen = choose_run_directory(*arguments)
        if chosen.name == "a":
            chosen.mkdir()
            (chosen / "metrics.jsonl").touch()
        return chosen

    monkeypatch.setattr(folders, "choose_run_directory", choose)
    assert claim_run_directory(tmp_path, "a") == tmp_path / "a-2"


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "metrics.jsonl").touch()
    assert choose_run_directory("~/runs", "a") == tmp_path / "runs" / "a-2"


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
    for kind in KINDS:
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


class FullDisk:
    """TensorBoard's writer where no room is left: it fails from the second scalar on."""

    def __init__(self, directory):
        self.calls = 0

    def add_scalar(self, *arguments):
        self.calls += 1
        if self.calls > 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    def close(self):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_costs_the_event_files_first(tmp_path, monkeypatch, caplog, make_writer):
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", FullDisk)
    writer = make_writer(tmp_path / "run")
    for _ in range(3):
        writer.write("train", **TRAIN)
    writer.finish()
    assert len(lines_of(tmp_path / "run")) == 3
    assert (tmp_path / "run" / "DONE").exists()
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert str(tmp_path / "run") in record.getMessage()
    assert "No space left on device" in record.getMessage()


def test_event_files_whose_last_lines_find_no_room(tmp_path, monkeypatch, caplog, make_writer):
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", FullDisk)
    writer = make_writer(tmp_path / "run")
    writer.finish()
    assert (tmp_path / "run" / "DONE").exists()
    assert caplog.text.count("given up") == 1


def test_metrics_that_cannot_be_written_end_the_run_with_the_folder(tmp_path, make_writer):
    writer = make_writer(tmp_path / "run")
    writer._stream.close()
    writer._stream = open("/dev/full", "w")  # noqa: SIM115 - the writer closes it
    with pytest.raises(
        RankFailed, match=rf"metrics\.jsonl in {tmp_path / 'run'} \(No space left on device\): make room"
    ):
        writer.write("train", **TRAIN)
    writer.close()
    assert not (tmp_path / "run" / "DONE").exists()


def test_a_run_that_cannot_begin_is_not_the_last_one(tmp_path, make_writer):
    """Defect: after a start on a full disk `--resume auto` meant the empty folder, and trained from scratch."""
    make_writer(tmp_path / "run").write("train", **TRAIN)
    claimed = claim_run_directory(tmp_path, "run")
    (claimed / "environment.json").symlink_to("/dev/full")
    with pytest.raises(InputError, match="No space left"):
        make_writer(claimed)
    assert last_run_directory(tmp_path, "run") == tmp_path / "run"
    assert choose_run_directory(tmp_path, "run") == claimed


def test_a_claim_that_cannot_be_given_up_hides_no_error(tmp_path, make_writer, monkeypatch):
    """A disk that is read-only all at once."""
    claimed = claim_run_directory(tmp_path, "run")
    (claimed / "environment.json").symlink_to("/dev/full")

    def refuse(path, **options):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(InputError, match="No space left"):
        make_writer(claimed)


def test_no_room_for_the_marker(tmp_path, make_writer):
    writer = make_writer(tmp_path / "run")
    (tmp_path / "run" / "DONE").symlink_to("/dev/full")
    with pytest.raises(RankFailed, match=r"cannot write DONE in .*No space left"):
        writer.finish()


def test_metrics_are_on_the_disk_before_a_checkpoint_counts_on_them(tmp_path, make_writer, monkeypatch):
    writer = make_writer(tmp_path / "run")
    synced = []
    monkeypatch.setattr("os.fsync", lambda number: synced.append(Path(f"/proc/self/fd/{number}").resolve().name))
    writer.write("train", **TRAIN)
    assert writer.sync() == (tmp_path / "run" / "metrics.jsonl").stat().st_size > 0
    assert synced == ["metrics.jsonl"]
    assert make_writer(tmp_path / "run", is_main=False).sync() == 0


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EINVAL])
def test_a_disk_that_tells_late_that_it_is_full(tmp_path, make_writer, monkeypatch, number):
    """As NFS does; where fsync is not known, nothing has failed."""

    def fail(number_of_file):
        raise OSError(number, os.strerror(number))

    writer = make_writer(tmp_path / "run")
    monkeypatch.setattr("os.fsync", fail)
    writer.write("train", **TRAIN)
    if number == errno.EINVAL:
        writer.finish()
    else:
        with pytest.raises(RankFailed, match=r"cannot write metrics.jsonl .* go on with --resume auto"):
            writer.finish()
    assert (tmp_path / "run" / "DONE").exists() == (number == errno.EINVAL)
