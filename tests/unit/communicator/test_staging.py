"""The host buffers that stand in for a device's, here for CPU tensors; and what MPI says of CUDA."""

import pytest
import torch
from mpi4py import MPI

from kfac_dist.communicator import MpiCommunicator, is_cuda_aware, staging
from kfac_dist.communicator.staging import CUDA_AWARE_VARIABLE, NOTHING, WHOLE, Staging
from kfac_dist.errors import InputError


def test_parts_are_fetched_and_stored() -> None:
    pool = Staging(pin_memory=False)
    device = torch.arange(12.0).view(3, 4)
    with pool.staged(device, slice(0, 3), slice(2, 6)) as host:
        assert host.shape == (3, 4)
        assert host.dtype == device.dtype
        assert host.data_ptr() != device.data_ptr()
        assert torch.equal(host.view(-1)[:3], torch.arange(3.0))
        host.fill_(-1)
    assert device.view(-1).tolist() == [0, 1, -1, -1, -1, -1, 6, 7, 8, 9, 10, 11]
    with pool.staged(device, WHOLE, NOTHING) as host:
        assert torch.equal(host, device)
        host.zero_()
    assert device[2, 3] == 11


def test_buffers_are_used_again() -> None:
    pool = Staging(pin_memory=False)
    for _ in range(3):
        for numel in (5000, 6000, 8192):  # all of 32 KiB
            with pool.staged(torch.zeros(numel), WHOLE, WHOLE):
                pass
    assert pool.num_allocated == 1
    with pool.staged(torch.zeros(5000), WHOLE, WHOLE) as one, pool.staged(torch.ones(8000), WHOLE, WHOLE) as other:
        assert one.data_ptr() != other.data_ptr()
        assert not one.any()
        assert other.all()
    assert pool.num_allocated == 2
    with pool.staged(torch.zeros(8193), WHOLE, WHOLE):
        pass
    assert pool.num_allocated == 3


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(0,), (), (1,), (4097,)])
def test_any_type_and_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    pool = Staging(pin_memory=False)
    with pool.staged(torch.ones(3000, dtype=torch.uint8), WHOLE, WHOLE):
        pass  # so that the memory is not fresh
    tensor = torch.ones(shape, dtype=dtype)
    with pool.staged(tensor, WHOLE, WHOLE) as host:
        assert torch.equal(host, tensor)
        host.zero_()
    assert not tensor.any()


@pytest.mark.gpu
def test_pinned_staging_of_a_gpu() -> None:
    pool = Staging()
    with torch.cuda.stream(torch.cuda.Stream()):
        device = torch.arange(1000.0, device="cuda")  # on the stream that uses it: another one would not be waited for
        for number in range(20):
            device.mul_(2).add_(number)
            expected = device.clone()
            with pool.staged(device, WHOLE, WHOLE) as host:
                assert host.is_pinned()
                assert torch.equal(host, expected.cpu())
                host.div_(2)
            assert torch.equal(device, expected / 2)
    assert pool.num_allocated == 1


def test_the_variable_overrides_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, expected in (("1", True), ("0", False)):
        monkeypatch.setenv(CUDA_AWARE_VARIABLE, value)
        assert is_cuda_aware() is expected
        cuda = MpiCommunicator("reduce", torch.device("cuda", 0))  # describes, and touches no device
        assert ("CUDA-aware" if expected else "through pinned host memory") in cuda.description
        assert "CUDA" not in MpiCommunicator("reduce").description
    monkeypatch.setenv(CUDA_AWARE_VARIABLE, "yes")
    with pytest.raises(InputError, match=r"KFAC_DIST_CUDA_AWARE_MPI must be 0 or 1, .* got 'yes'"):
        MpiCommunicator("reduce")


def test_the_library_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CUDA_AWARE_VARIABLE, raising=False)
    if "Open MPI" in MPI.Get_library_version():
        found = [staging.ctypes.CDLL(name) for name in (None, *staging._loaded_mpi_libraries())]
        assert any(hasattr(library, "MPIX_Query_cuda_support") for library in found), "asked no library that answers"
    assert is_cuda_aware() in (False, True)
    staging._library_is_cuda_aware.cache_clear()
    monkeypatch.setattr(staging.ctypes, "CDLL", lambda name: object())
    assert not is_cuda_aware(), "a library without the function is not CUDA-aware"
    staging._library_is_cuda_aware.cache_clear()
