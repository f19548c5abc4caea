"""The doctor's rules on GPUs and folders, given made-up facts."""

import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kfac_dist.communicator.devices import RankDevice
from kfac_dist.doctor import examine, machine
from kfac_dist.doctor.findings import Status
from kfac_dist.doctor.ranks import RankFacts


@pytest.mark.parametrize(
    ("num_gpus", "driver", "torch_cuda", "visible", "status", "words"),
    [
        (8, True, "13.0", None, "ok", "8 visible"),
        (1, True, "13.0", "3", "ok", "CUDA_VISIBLE_DEVICES=3"),
        (0, False, "13.0", None, "ok", "no NVIDIA driver"),
        (0, True, "13.0", "", "note", "CUDA_VISIBLE_DEVICES=)"),
        (0, True, "13.0", "-1", "note", "CUDA_VISIBLE_DEVICES=-1)"),
        (0, True, None, None, "warning", " for the CPU)"),
        (0, True, "13.0", None, "warning", " for CUDA 13.0)"),
        (0, True, "13.0", "9", "warning", "torch sees no GPU"),
    ],
)
def test_driver(
    num_gpus: int, driver: bool, torch_cuda: str | None, visible: str | None, status: Status, words: str
) -> None:
    finding = machine.check_visible(num_gpus, driver, torch_cuda, visible)
    assert finding.status == status
    assert words in finding.found


@pytest.mark.parametrize(
    ("capability", "failure", "status", "words", "remedy"),
    [
        ((9, 0), "", "ok", "capability 9.0: fp32, fp16, bf16", ""),
        ((8, 0), "", "ok", "capability 8.0: fp32, fp16, bf16", ""),
        ((7, 5), "", "note", "capability 7.5: fp32, fp16; no bf16", "train.precision=fp16 or fp32"),
        ((7, 0), "", "note", "capability 7.0: fp32, fp16; no bf16", "train.precision=fp16 or fp32"),
        ((6, 1), "", "note", "capability 6.1: fp32; no bf16", "train.precision=fp32"),
        ((5, 0), "no kernel image", "error", "cannot use it: no kernel image", "install a build"),
    ],
)
def test_gpu(capability: tuple[int, int], failure: str, status: Status, words: str, remedy: str) -> None:
    finding = machine.check_gpu("NVIDIA H200", capability, failure)
    assert finding.status == status
    assert finding.found.startswith("NVIDIA H200, compute capability ")
    assert words in finding.found
    assert remedy in finding.remedy


@pytest.mark.parametrize(
    ("version", "environment", "docker", "status"),
    [
        (None, {}, False, "warning"),
        ("2.30.7", {}, False, "ok"),
        ("2.30.7", {}, True, "note"),
        ("2.30.7", {"NCCL_SOCKET_IFNAME": "eth"}, True, "ok"),
    ],
)
def test_nccl(version: str | None, environment: Mapping[str, str], docker: bool, status: Status) -> None:
    finding = machine.check_nccl(version, environment, ["eth0", "lo"], docker)
    assert finding.status == status
    assert status != "note" or "NCCL_SOCKET_IFNAME=<the hosts' interface> (here: eth0, lo)" in finding.remedy


def devices(*uuids: str, num_gpus: int = 1) -> list[RankDevice]:
    return [RankDevice("a", "cuda", uuid, "", num_gpus) if uuid else RankDevice("a", "cpu") for uuid in uuids]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (devices("", ""), []),
        (devices("GPU-1", "GPU-2"), [("ok", ())]),
        (devices("GPU-1", "", "GPU-2", ""), [("error", (1, 3))]),
        (devices("GPU-1", "GPU-2", "GPU-1"), [("warning", (0, 2))]),
        (devices("GPU-1", "GPU-2", num_gpus=4), [("note", (0, 1))]),
        (devices("GPU-1", "GPU-1", num_gpus=4), [("warning", (0, 1)), ("note", (0, 1))]),
    ],
)
def test_one_gpu_per_rank(given: list[RankDevice], expected: list[tuple[Status, tuple[int, ...]]]) -> None:
    assert [(finding.status, finding.ranks) for finding in machine.check_gpu_per_rank(given)] == expected


def test_what_is_wrong_between_ranks_is_said() -> None:
    (missing,) = machine.check_gpu_per_rank(devices("GPU-1", ""))
    assert "rank 0 uses cuda (on a); rank 1 has no GPU (on a)" in missing.found
    assert "CUDA_VISIBLE_DEVICES" in missing.remedy
    (shared,) = machine.check_gpu_per_rank(devices("GPU-1", "GPU-1"))
    assert shared.found == "2 ranks share GPU GPU-1: they take turns, and NCCL refuses"
    assert "over MPI, or gloo under torchrun" in shared.remedy
    (idle,) = machine.check_gpu_per_rank(devices("GPU-1", num_gpus=8))
    assert idle.found == "1 of 8 GPUs of a used"
    assert idle.remedy == "mpirun --map-by ppr:8:node, torchrun --nproc-per-node=8"


def test_cuda_awareness() -> None:
    assert machine.check_cuda_aware(True).status == "ok"
    assert machine.check_cuda_aware(False).status == "note"


@pytest.mark.gpu
def test_a_real_gpu_can_be_used() -> None:
    assert machine.try_gpu(torch.device("cuda", 0)) == ""
    assert machine.nccl_version()


@pytest.mark.gpu
@pytest.mark.parametrize("mpi", [None, object()])
def test_torchruns_ranks_hear_nothing_of_cuda_aware_mpi(mpi: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examine, "running_mpi", lambda: mpi)
    monkeypatch.setattr(examine, "is_cuda_aware", lambda: False)
    findings = examine._gpus(RankFacts(RankDevice("alpha", "cpu")), 0)
    aware = machine.check_cuda_aware(False)
    assert [finding for finding in findings if finding.name == aware.name] == ([] if mpi is None else [aware])


@pytest.mark.gpu
@pytest.mark.skipif("KFAC_DIST_EMULATED_GPUS" in os.environ, reason="an emulated GPU has no driver")
def test_a_real_gpu_has_a_driver() -> None:
    assert machine.has_driver()


@pytest.mark.parametrize(("free", "status"), [(50 << 20, "error"), (2 << 30, "warning"), (50 << 30, "ok")])
def test_space(free: int, status: Status, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    assert machine.check_output(tmp_path).status == status


def test_writing(tmp_path: Path) -> None:
    assert "can be written" in machine.check_output(tmp_path / "runs" / "new").found
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").touch()
    finding = machine.check_output(tmp_path / "file" / "runs")
    assert finding.status == "error"
    assert finding.found == f"{tmp_path}/file/runs cannot be written: Not a directory"


def test_reading(tmp_path: Path) -> None:
    nothing = machine.check_data(tmp_path)
    assert (nothing.status, nothing.found) == ("error", f"{tmp_path} holds no data")
    (tmp_path / "train").mkdir()
    assert machine.check_data(tmp_path).status == "ok"
    missing = machine.check_data(tmp_path / "nowhere")
    assert (missing.status, missing.found) == ("error", f"{tmp_path}/nowhere cannot be read: No such file or directory")
    assert "data.root" in missing.remedy
