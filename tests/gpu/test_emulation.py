"""That an emulated GPU finds what tests on it are to find; tests/gpu/test_emulated_gpu.py runs them on one."""

import os

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("KFAC_DIST_EMULATED_GPUS" not in os.environ, reason="the GPU is a real one"),
]


def test_tensors_of_two_devices_are_refused() -> None:
    here, there = torch.ones(3), torch.ones(3, device="cuda")
    for operation in (torch.add, torch.dot, torch.Tensor.mul_):
        for pair in ((here, there), (there, here)):
            with pytest.raises(RuntimeError, match="to be on the same device"):
                operation(*pair)
    with pytest.raises(RuntimeError, match="to be on the same device"):
        torch._foreach_add_([there], [here])
    assert float((there * torch.tensor(2.0)).sum()) == 6, "scalars of the CPU are taken"


def test_products_to_another_type_are_refused_as_on_a_gpu() -> None:
    half, single = torch.ones(2, 3, 3, device="cuda", dtype=torch.bfloat16), torch.ones(2, 3, 3, device="cuda")
    for product, left, right in ((torch.bmm, half, single), (torch.mm, half[0], single[0])):
        assert product(left, left, out_dtype=torch.float32).dtype == torch.float32
        for pair, dtype in (
            ((left, right), torch.float32),
            ((right, right), torch.float64),
            ((left, left), torch.half),
        ):
            with pytest.raises(RuntimeError, match="must be the same"):
                product(*pair, out_dtype=dtype)


def test_an_asynchronous_copy_is_late() -> None:
    host = torch.zeros(3, pin_memory=True)
    before, after = torch.cuda.Event(), torch.cuda.Event()
    before.record()
    host.copy_(torch.ones(3, device="cuda"), non_blocking=True)
    after.record()
    before.synchronize()
    assert host.isnan().all()
    assert not after.query()
    after.synchronize()
    assert host.tolist() == [1, 1, 1]


def test_a_source_that_changes_too_early_is_found_out() -> None:
    host = torch.ones(3).pin_memory()
    host.to("cuda", non_blocking=True)
    host.zero_()
    with pytest.raises(RuntimeError, match="has changed before"):
        torch.cuda.synchronize()


def test_new_memory_holds_nan() -> None:
    assert torch.empty(5, device="cuda").isnan().all()
    assert torch.zeros(5, device="cuda").new_empty(5).isnan().all()


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_what_makes_the_host_wait_is_reported() -> None:
    device = torch.ones(3, device="cuda")
    pinned, pageable = torch.ones(3).pin_memory(), torch.ones(3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for waits in (
            device.sum().item,
            device.cpu,
            device.nonzero,
            lambda: device[device > 0],
            lambda: pinned.copy_(device),
            lambda: pageable.copy_(device, non_blocking=True),
            lambda: pageable.to("cuda", non_blocking=True),
        ):
            with pytest.raises(RuntimeError, match="called a synchronizing CUDA operation"):
                waits()
        device.copy_(pinned, non_blocking=True)
        pinned.copy_(device, non_blocking=True)
        torch.where(device > 0, device, 0.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()


def test_autocast_and_the_backward_pass_are_those_of_a_gpu() -> None:
    layer = torch.nn.Linear(3, 2, device="cuda")
    with torch.autocast("cuda", torch.float16):
        output = layer(torch.ones(4, 3, device="cuda"))
    assert output.dtype == torch.float16
    output.float().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.is_cuda
    assert layer.weight.grad.cpu().tolist() == [[4.0] * 3] * 2
