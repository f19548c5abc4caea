"""Claims: one worker at a time, whoever else tries; and what happens to those of the dead."""

import errno
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kfac_dist.study import claims
from kfac_dist.study.claims import Heartbeat, claim_trial, count_deaths, is_claimed, release_all

LEASE = 60.0


def take_all(folder: Path, barrier: "multiprocessing.synchronize.Barrier", taken: Path) -> None:
    """A process that takes all the trials that it can."""
    barrier.wait()
    mine = [number for number in range(200) if claim_trial(folder / str(number), LEASE)]
    (taken / str(os.getpid())).write_text(json.dumps(mine))
    barrier.wait()  # the claims of a process that is gone are free


def test_of_four_processes_one_gets_each_trial(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(4)
    (tmp_path / "taken").mkdir()
    processes = [
        context.Process(target=take_all, args=(tmp_path / "trials", barrier, tmp_path / "taken")) for _ in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    taken = [json.loads(path.read_text()) for path in (tmp_path / "taken").iterdir()]
    assert len(taken) == 4
    assert sorted(number for mine in taken for number in mine) == list(range(200))


@pytest.fixture
def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture
def other_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Claims are looked at from another machine until the fixture is undone."""
    with monkeypatch.context() as patch:
        patch.setattr(claims, "this_machine", lambda: "another machine")
        yield patch


def rewrite_owner(claim: claims.Claim, **changes: object) -> None:
    path = claim.folder / "owner.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_dead_process_of_this_machine_holds_nothing(tmp_path: Path, dead_pid: int) -> None:
    claim = claim_trial(tmp_path, LEASE)
    assert claim is not None
    assert is_claimed(tmp_path, LEASE)
    assert claim_trial(tmp_path, LEASE) is None
    rewrite_owner(claim, pid=dead_pid)
    assert not is_claimed(tmp_path, LEASE)
    second = claim_trial(tmp_path, LEASE)
    assert second is not None
    assert (second.number, claim.is_last, second.is_last) == (1, False, True)


def test_a_process_with_a_dead_ones_number_is_another(tmp_path: Path) -> None:
    claim = claim_trial(tmp_path, LEASE)
    assert claim is not None
    rewrite_owner(claim, started="1")
    assert claim_trial(tmp_path, LEASE) is not None


def test_a_lease_of_another_machine(tmp_path: Path, other_machine: pytest.MonkeyPatch) -> None:
    claim = claim_trial(tmp_path, LEASE)
    assert claim is not None
    other_machine.undo()
    assert claim_trial(tmp_path, LEASE) is None
    old = time.time() - 2 * LEASE
    os.utime(claim.folder / "owner.json", (old, old))
    assert not is_claimed(tmp_path, LEASE)
    claim.touch()
    assert is_claimed(tmp_path, LEASE)
    os.utime(claim.folder / "owner.json", (old, old))
    assert claim_trial(tmp_path, LEASE) is not None


def test_who_may_only_read_goes_by_its_own_clock(tmp_path: Path, other_machine: pytest.MonkeyPatch) -> None:
    claim = claim_trial(tmp_path, LEASE)
    assert claim is not None
    other_machine.undo()

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    other_machine.setattr(Path, "touch", refuse)
    assert is_claimed(tmp_path, LEASE)
    old = time.time() - 2 * LEASE
    os.utime(claim.folder / "owner.json", (old, old))
    assert not is_claimed(tmp_path, LEASE)


def test_a_claim_whose_maker_died_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "claims" / "0"
    folder.mkdir(parents=True)
    assert claim_trial(tmp_path, LEASE) is None
    old = time.time() - 2 * LEASE
    os.utime(folder, (old, old))
    claim = claim_trial(tmp_path, LEASE)
    assert claim is not None
    assert claim.number == 1


def test_given_back(tmp_path: Path) -> None:
    for number in range(3):
        claim = claim_trial(tmp_path, LEASE)
        assert claim is not None
        assert claim.number == number
        claim.release()
    assert count_deaths(tmp_path) == 0


def test_deaths_are_counted_until_they_are_forgiven(tmp_path: Path, dead_pid: int) -> None:
    for number in range(3):
        claim = claim_trial(tmp_path, LEASE)
        assert claim is not None
        assert count_deaths(tmp_path) == number + 1
        rewrite_owner(claim, pid=dead_pid)
    release_all(tmp_path)
    assert count_deaths(tmp_path) == 0


def test_workers_that_ask_for_the_time_are_no_deaths(tmp_path: Path) -> None:
    claim = claim_trial(tmp_path, LEASE)
    assert claim is not None
    for node in range(4):
        (tmp_path / f"claims/.now.node{node}.1").touch()
    assert count_deaths(tmp_path) == 1
    release_all(tmp_path)
    assert count_deaths(tmp_path) == 0


def test_the_heartbeat_touches_and_notices(tmp_path: Path) -> None:
    orphaned: list[int] = []
    claim = claim_trial(tmp_path, LEASE)
    assert claim is not None
    old = time.time() - 1000
    os.utime(claim.folder / "owner.json", (old, old))
    with Heartbeat(claim, 0.1, os.getppid(), lambda: orphaned.append(1)) as heartbeat:
        deadline = time.monotonic() + 10
        while (claim.folder / "owner.json").stat().st_mtime < old + 500 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (claim.folder / "owner.json").stat().st_mtime > old + 500
        assert not heartbeat.is_lost
        (tmp_path / "claims" / "1").mkdir()
        while not heartbeat.is_lost and time.monotonic() < deadline:
            time.sleep(0.01)
        assert heartbeat.is_lost
    assert not orphaned
    with Heartbeat(claim, 0.1, -1, lambda: orphaned.append(1)):
        while not orphaned and time.monotonic() < deadline:
            time.sleep(0.01)
    assert orphaned
