"""A checkpoint on the disk is whole or found out; nothing of it is executed."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kfac_dist.checkpoints.manifest import MANIFEST_FILE, Manifest, read_manifest
from kfac_dist.checkpoints.save import MODEL_FILE, ShardSave, shard_name
from kfac_dist.checkpoints.shard import FileRecord, ShardReader, check_file, read_tensors, write_shard, write_tensors
from kfac_dist.checkpoints.store import CheckpointStore
from kfac_dist.communicator import create_communicator
from kfac_dist.errors import InputError
from kfac_dist.training.checkpoint import Checkpointer, RankState, find_checkpoint, read_state

EMPTY = Manifest(0, 1, None, "a: 1\n", {}, "0", "now", {})


def make(iteration: int, top1: float | None = None) -> Manifest:
    return Manifest(iteration, 1, top1, "run: {name: a}\n", {"num_train": 3}, "0.1.0", "2026-01-01T00:00:00", {})


def state(value: float) -> RankState:
    return RankState(
        run={"iteration": 7, "optimizer": {"state": {0: {"momentum_buffer": torch.full((2, 3), value)}}}},
        weights={"0.weight": torch.full((3,), value)},
        buffers={"1.running_mean": torch.full((2,), value)},
        blocks={"conv": {"running": {"A": torch.eye(2) * value}, "retry": None}, "fc": {"retry": (0.1, ["A"], 2)}},
        mixup={3: (torch.zeros(1), torch.ones(1))},
    )


def saved(run: Path, *numbers: int, top1: float | None = None, keep: int = 9, keep_best: bool = True) -> Checkpointer:
    checkpointer = Checkpointer(run, create_communicator("reduce"), keep, keep_best)
    for number in numbers:
        assert checkpointer.save(state(number), ["conv", "fc"], make(number, top1), wait=True)
    return checkpointer


def test_a_checkpoint_comes_back(tmp_path: Path) -> None:
    saved(tmp_path, 7)
    communicator = create_communicator("reduce")
    found = find_checkpoint(tmp_path, communicator)
    assert found is not None
    assert found.path == tmp_path / "checkpoints" / "iteration-00000007"
    assert find_checkpoint(found.path, communicator) == found
    back = read_state(found, 0, 1, ["fc", "conv"], [1, 3])
    assert torch.equal(back.run["optimizer"]["state"][0]["momentum_buffer"], torch.full((2, 3), 7.0))
    assert torch.equal(back.weights["0.weight"], torch.full((3,), 7.0))
    assert torch.equal(back.buffers["1.running_mean"], torch.full((2,), 7.0))
    assert torch.equal(back.blocks["conv"]["running"]["A"], torch.eye(2) * 7)
    assert back.blocks["fc"] == {"retry": (0.1, ["A"], 2)}
    assert list(back.mixup) == [3]
    assert read_state(found, 1, 2, ["fc"], [1]).buffers == {}, "another number of ranks takes the averages"
    with pytest.raises(InputError, match="has no block/other: it was written for another model"):
        read_state(found, 0, 1, ["other"], [])
    assert set(read_tensors(found.path / MODEL_FILE)) == {"0.weight"}


def test_there_is_none(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path, create_communicator("reduce")) is None


def test_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, create_communicator("reduce"), keep=2, keep_best=True)
    for number, top1 in enumerate([10.0, 70.0, 50.0, 60.0, None]):
        assert checkpointer.save(state(number), [], make(number, top1), wait=True)
    store = CheckpointStore(tmp_path)
    assert [path.name[-1] for path in store.newest_first()] == ["4", "3", "1"]
    assert sorted(path.name for path in store.folder.iterdir()) == [f"iteration-0000000{n}" for n in (1, 3, 4)]


def test_what_a_crash_left_is_removed_by_the_next(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for name in (".saving-00000003-abcd", ".deleting-iteration-00000001"):
        (store.folder / name).mkdir(parents=True)
        (store.folder / name / "half").write_bytes(b"x")
    assert store.newest_first() == []
    saved(tmp_path, 5)
    assert [path.name for path in store.folder.iterdir()] == ["iteration-00000005"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    run = tmp_path_factory.mktemp("run")
    saved(run, 1, 2)
    folder = run / "checkpoints" / "iteration-00000002"
    return run, {path.name: path.read_bytes() for path in folder.iterdir()}


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=120)
@given(data=st.data())
def test_damage_anywhere_is_found_and_the_one_before_is_used(whole: Any, data: st.DataObject) -> None:
    run, contents = whole
    folder = run / "checkpoints" / "iteration-00000002"
    name = data.draw(st.sampled_from(sorted(contents)))
    content = contents[name]
    how = data.draw(st.sampled_from(["flip", "truncate", "delete", "append", "empty"]))
    place = data.draw(st.integers(0, len(content) - 1))
    try:
        if how == "delete":
            (folder / name).unlink()
        else:
            flipped = content[:place] + bytes([content[place] ^ data.draw(st.integers(1, 255))]) + content[place + 1 :]
            damaged = {"flip": flipped, "truncate": content[:place], "append": content + b"x", "empty": b""}[how]
            (folder / name).write_bytes(damaged)
        found = find_checkpoint(run, create_communicator("reduce"))
        assert found is not None
        harmless = (
            name == MANIFEST_FILE and how in ("flip", "append", "truncate") and _same_json(folder / name, content)
        )
        assert found.path.name == ("iteration-00000002" if harmless else "iteration-00000001")
    finally:
        (folder / name).write_bytes(content)


def _same_json(path: Path, content: bytes) -> bool:
    """White space may change: the checksum is of what the JSON says."""
    try:
        return bool(json.loads(path.read_bytes()) == json.loads(content))
    except ValueError:
        return False


def test_a_manifest_of_another_format_or_with_paths_is_refused(tmp_path: Path) -> None:
    record = FileRecord(1, "00", [])
    for files, message in (({"../x": record}, "file names must be plain"), ({"a/b": record}, "must be plain")):
        (tmp_path / MANIFEST_FILE).write_text(EMPTY.with_files(files).to_json())
        with pytest.raises(InputError, match=message):
            read_manifest(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kfac_dist.checkpoints.manifest.FORMAT", 99)
        (tmp_path / MANIFEST_FILE).write_text(EMPTY.to_json())
    with pytest.raises(InputError, match="must be of format 1, got 99"):
        read_manifest(tmp_path)


def test_a_link_is_no_file_of_a_checkpoint(tmp_path: Path) -> None:
    record = write_tensors(tmp_path / "real", {"a": torch.ones(2)})
    check_file(tmp_path / "real", record)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(InputError, match="must be a file"):
        check_file(tmp_path / "link", record)


def test_a_full_disk_keeps_what_is_there_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpointer = saved(tmp_path, 1)

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kfac_dist.checkpoints.shard.save_file", full)
    assert not checkpointer.save(state(2), [], make(2), wait=True)
    assert checkpointer.num_failed == 1
    assert "a checkpoint could not be written, training goes on: [Errno 28] No space left" in caplog.text
    monkeypatch.undo()
    assert [path.name[-1] for path in CheckpointStore(tmp_path).newest_first()] == ["1"]
    assert checkpointer.save(state(3), ["conv", "fc"], make(3), wait=True)
    assert [path.name[-1] for path in CheckpointStore(tmp_path).newest_first()] == ["3", "1"]


def test_a_checkpoint_is_there_where_older_ones_cannot_be_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Defect: it counted as failed, and a run that had come to its end ended with 3."""
    checkpointer = saved(tmp_path, 1)

    def fail(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(CheckpointStore, "prune", fail)
    assert checkpointer.save(state(2), [], make(2), wait=True)
    assert (checkpointer.num_failed, checkpointer.newest_failed) == (0, False)
    assert "older checkpoints could not be deleted: [Errno 13] Permission denied" in caplog.text


def test_a_folder_that_cannot_be_made(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    checkpointer = Checkpointer(tmp_path, create_communicator("reduce"), 1, keep_best=False)
    assert not checkpointer.save(state(2), [], make(2), wait=True)
    assert "could not be written" in caplog.text


def test_a_rank_that_failed_is_not_waited_for(tmp_path: Path) -> None:
    folder = tmp_path / "half"
    folder.mkdir()
    committed: list[Any] = []
    save = ShardSave(folder, 0, 2, {"run": {"iteration": 1}}, {"w": torch.ones(1)}, committed.append)
    assert save.wait_until_written()
    save.abandon()
    assert not save.join()
    assert "another rank could not write" in str(save.error)
    assert not committed


def test_the_state_is_copied_before_save_returns(tmp_path: Path) -> None:
    changing = state(5)
    checkpointer = Checkpointer(tmp_path, create_communicator("reduce"), 1, keep_best=False)
    checkpointer.save(changing, ["conv"], make(5), wait=False)
    changing.weights["0.weight"].zero_()
    changing.blocks["conv"]["running"]["A"].zero_()
    assert checkpointer.finish()
    found = find_checkpoint(tmp_path, create_communicator("reduce"))
    assert found is not None
    back = read_state(found, 0, 1, ["conv"], [])
    assert torch.equal(back.weights["0.weight"], torch.full((3,), 5.0))
    assert torch.equal(back.blocks["conv"]["running"]["A"], torch.eye(2) * 5)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    seen: list[str] = []
    watching = True

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if watching and event.startswith(("pickle.", "marshal.loads", "exec")):
            seen.append(event)

    sys.addaudithook(hook)
    found = find_checkpoint(tmp_path, create_communicator("reduce"))
    assert found is not None
    read_state(found, 0, 1, ["conv", "fc"], [3])
    watching = False
    assert seen == []


def test_a_shard_that_is_none(tmp_path: Path) -> None:
    write_tensors(tmp_path / "plain", {"a": torch.ones(1)})
    with pytest.raises(InputError, match="lists no items"):
        ShardReader(tmp_path / "plain")
    (tmp_path / "junk").write_bytes(b"\xff" * 100)
    with pytest.raises(InputError, match="must be a readable safetensors file"):
        ShardReader(tmp_path / "junk")
    write_shard(tmp_path / shard_name(0), {"run": {"a": 1}})
    with pytest.raises(InputError, match="has no item 'other'"):
        ShardReader(tmp_path / shard_name(0)).read("other")
