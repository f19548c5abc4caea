"""The doctor's rules on folders and shared memory."""

import os
from pathlib import Path

import pytest

from kfac_dist.doctor import files
from kfac_dist.doctor.findings import Status
from kfac_dist.doctor.ranks import RankFacts

MOUNTS = r"""overlay / overlay rw 0 0
/dev/sda1 /data ext4 rw 0 0
server:/home /data/home nfs4 rw 0 0
tmpfs /tmp tmpfs rw 0 0
/dev/sdb1 /with\040space xfs rw 0 0
/dev/sdc1 /data/home/x ext4 rw 0 0
server:/x /data/home/x lustre rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "point", "kind"),
    [
        ("/", "/", "overlay"),
        ("/database", "/", "overlay"),
        ("/data", "/data", "ext4"),
        ("/data/home/me", "/data/home", "nfs4"),
        ("/with space/runs", "/with space", "xfs"),
        ("/data/home/x", "/data/home/x", "lustre"),  # mounted over another
    ],
)
def test_mount(path: str, point: str, kind: str) -> None:
    assert files.find_mount(path, MOUNTS) == files.Mount(point, kind)


@pytest.mark.parametrize(
    ("kind", "output", "data"),
    [
        ("ext4", "ok", "ok"),
        ("nfs4", "ok", "note"),
        ("fuse.sshfs", "ok", "note"),
        ("tmpfs", "warning", "ok"),
        ("overlay", "note", "ok"),
    ],
)
def test_kinds_of_file_systems(kind: str, output: Status, data: Status) -> None:
    mount = files.Mount("/data", kind)
    assert files.check_output_kind(Path("/data/runs"), mount).status == output
    assert files.check_data(Path("/data/x"), 1, mount).status == data
    assert f"{kind} on /data" in files.check_output_kind(Path("/data/runs"), mount).found


@pytest.mark.parametrize(("free", "status"), [(50 << 20, "error"), (2 << 30, "warning"), (50 << 30, "ok")])
def test_space(free: int, status: Status) -> None:
    assert files.check_space(Path("runs"), free).status == status


def test_writing(tmp_path: Path) -> None:
    assert files.existing_part(tmp_path / "runs" / "new") == tmp_path
    assert files.write_small_file(tmp_path) > 0
    assert os.listdir(tmp_path) == []
    blocked = tmp_path / "file"
    blocked.touch()
    folder = files.existing_part(blocked / "runs")
    assert folder == blocked
    with pytest.raises(NotADirectoryError) as caught:
        files.write_small_file(folder)
    finding = files.not_writable(blocked / "runs", caught.value)
    assert finding.status == "error"
    assert finding.found == f"{blocked}/runs cannot be written: Not a directory"


def test_marker(tmp_path: Path) -> None:
    marker = files.make_marker(tmp_path)
    assert files.wait_for_marker(marker, 0)
    assert not files.wait_for_marker(str(tmp_path / "elsewhere"), 0.1)
    assert [finding.status for finding in files.check_marker(marker, [True, True])] == ["ok"]
    (finding,) = files.check_marker(marker, [True, False, False])
    assert (finding.status, finding.ranks) == ("warning", (1, 2))
    assert files.check_marker("", [False, False]) == []
    assert files.check_marker(marker, [True]) == []


def test_reading(tmp_path: Path) -> None:
    folder = tmp_path / "train" / "n01440764"
    folder.mkdir(parents=True)
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "lost+found" / "#12").write_bytes(b"x")  # no part of the data, and not readable for most
    assert files.check_data(tmp_path, files.read_samples(tmp_path)[0], None).status == "error"
    (folder / "0.JPEG").write_bytes(bytes(3 << 20))
    (tmp_path / "again").symlink_to(tmp_path)  # a circle
    num_bytes, rate = files.read_samples(folder)
    assert num_bytes == 3 << 20
    assert rate > 0
    assert files.read_samples(tmp_path)[0] >= 3 << 20
    assert files.check_data(tmp_path, num_bytes, None).status == "ok"
    with pytest.raises(FileNotFoundError) as caught:
        files.read_samples(tmp_path / "nowhere")
    finding = files.not_readable(tmp_path / "nowhere", caught.value)
    assert finding.found == f"{tmp_path}/nowhere cannot be read: No such file or directory"
    assert "data.root" in finding.remedy


def test_speeds() -> None:
    everyone = [RankFacts(data_mb_per_s=200.0) for _ in range(4)]
    assert [finding.found for finding in files.check_speeds(everyone)] == [
        "200 (rank 0) to 200 MB/s a rank, read (perhaps from the cache)"
    ]
    everyone[2].output_mb_per_s = 3.0
    everyone[0].output_mb_per_s = 100.0
    writing, reading = files.check_speeds(everyone)
    assert (writing.status, reading.status) == ("note", "ok")
    assert writing.found == "3 (rank 2) to 100 MB/s written and synchronised: slow"
    assert files.check_speeds([RankFacts()]) == []


@pytest.mark.parametrize(
    ("total", "free", "status"),
    [
        (None, 0, "warning"),
        (64 << 20, 64 << 20, "warning"),
        (8 << 30, 100 << 20, "warning"),
        (8 << 30, 7 << 30, "ok"),
    ],
)
def test_shared_memory(total: int | None, free: int, status: Status) -> None:
    finding = files.check_shared_memory(total, free)
    assert finding.status == status
    assert ("--shm-size" in finding.remedy) == (total is None or total < 1 << 30)
