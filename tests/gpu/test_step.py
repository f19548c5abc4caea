"""What only a GPU can show: real half-precision products, and a host that never waits."""

import math
import warnings
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_dist import KFAC, SGD, LossScaler, create_communicator
from kfac_dist.communicator import Communicator
from kfac_dist.curvature.blocks.create import create_blocks
from kfac_dist.curvature.inversion import InverseRefresh, InversionTask
from kfac_dist.curvature.precondition import Preconditioner
from kfac_dist.curvature.running import BlockCurvature
from kfac_dist.models import create_model
from kfac_dist.training.precision import Precision
from kfac_dist.vocabulary import BackendChoice

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")


@cache
def communicator(backend: BackendChoice) -> Communicator:
    """One for all tests; one rank needs no library, but for "nccl"."""
    return create_communicator("reduce", backend, CUDA)


def make_step(
    optimizer_class: type[KFAC | SGD], precision: Precision, backend: BackendChoice = "auto", **settings: Any
) -> tuple[Any, nn.Module]:
    """A function that trains one step on the same images, and its network."""
    model = create_model("resnet20", 10, (3, 16, 16), seed=0).to(CUDA, memory_format=torch.channels_last).train()
    images = torch.randn(16, 3, 16, 16, device=CUDA).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (16,), device=CUDA)
    scaler = LossScaler() if precision.needs_loss_scale else None
    optimizer = optimizer_class(model, communicator(backend), lr=1e-3, loss_scaler=scaler, **settings)

    def step() -> Tensor:
        optimizer.zero_grad()
        with precision.autocast(CUDA):
            loss = F.cross_entropy(model(images), labels)
        with optimizer.overlap_backward():
            (loss if scaler is None else scaler.scale_loss(loss)).backward()
        optimizer.step()
        return loss.detach()

    return step, model


def precondition(curvature: BlockCurvature, gradient: Tensor) -> Tensor:
    [[(_, direction)]] = Preconditioner().apply([curvature], [gradient])
    return direction


def count_synchronisations(step: Any, num_steps: int) -> int:
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(num_steps):
                step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # Not torch's notice of the mode itself, which speaks of synchronizing operations, too.
    texts = [text for warning in caught if "called a synchronizing" in (text := str(warning.message))]
    print(*dict.fromkeys(texts), sep="\n")
    return len(texts)


@pytest.mark.parametrize("interval", [2, 10])  # Cholesky factors, inverses
@pytest.mark.parametrize("form", ["diagonal", "unit", "full"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_never_makes_the_host_wait(precision: str, form: str, interval: int) -> None:
    settings = {"damping": 0.03, "refresh": interval, "ema_decay": 0.9, "weight_rescaling": "always", "batchnorm": form}
    step, _ = make_step(KFAC, Precision(precision), **settings)  # type: ignore[arg-type]
    assert count_synchronisations(step, interval + 2) == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nor_does_a_step_of_sgd(precision: str) -> None:
    step, _ = make_step(SGD, Precision(precision))  # type: ignore[arg-type]
    assert count_synchronisations(step, 4) == 0


@pytest.mark.parametrize(("precision", "num_waits"), [("bf16", 0), ("fp16", 1)])
def test_nor_where_nccl_sends_gradients_within_the_backward_pass(precision: str, num_waits: int) -> None:
    for optimizer_class in (KFAC, SGD):
        step, _ = make_step(optimizer_class, Precision(precision), "nccl")  # type: ignore[arg-type]
        assert count_synchronisations(step, 4) == 4 * num_waits


def test_in_fp16_the_host_waits_once_a_step_for_the_overflow_flag() -> None:
    for optimizer_class in (KFAC, SGD):
        step, _ = make_step(optimizer_class, Precision("fp16"))
        assert count_synchronisations(step, 4) == 4


def test_training_equals_the_cpus() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(6, 8, 3, 16, 16, generator=generator, dtype=torch.float64)
    labels = torch.randint(10, (6, 8), generator=generator)
    trained = []
    for device in (torch.device("cpu"), CUDA):
        model = create_model("resnet20", 10, (3, 16, 16), seed=0).to(device, torch.float64).train()
        optimizer = KFAC(model, lr=0.01, damping=0.03, momentum=0.9, refresh=2, ema_decay=0.9)
        for inputs, expected in zip(images.to(device), labels.to(device), strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), expected).backward()
            optimizer.step()
        trained.append(nn.utils.parameters_to_vector(model.parameters()).detach().cpu())
    on_cpu, on_gpu = trained
    assert float((on_gpu - on_cpu).norm() / on_cpu.norm()) < 1e-8


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_loss_falls_and_stays_finite(precision: str) -> None:
    step, model = make_step(KFAC, Precision(precision), damping=0.1, refresh=3, ema_decay=0.9)  # type: ignore[arg-type]
    losses = [float(step()) for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0]
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def test_a_step_where_the_gpu_is_torchs_default_device() -> None:
    step, _ = make_step(KFAC, Precision("bf16"))
    with CUDA:
        assert math.isfinite(float(step()))


LAYERS = {
    "linear": (nn.Linear(70, 24), (256, 70), (256, 24)),
    "3x3": (nn.Conv2d(16, 24, 3, padding=1), (9, 16, 20, 20), (9, 24, 20, 20)),
    "1x1 strided": (nn.Conv2d(16, 24, 1, stride=2), (9, 16, 20, 20), (9, 24, 10, 10)),
    "odd channels": (nn.Conv2d(3, 7, 7, stride=2, padding=3), (9, 3, 33, 33), (9, 7, 17, 17)),
    "grouped": (nn.Conv2d(16, 24, 3, groups=4), (9, 16, 20, 20), (9, 24, 18, 18)),
    "batchnorm": (nn.BatchNorm2d(16), (9, 16, 20, 20), (9, 16, 20, 20)),
    "batchnorm of lines": (nn.BatchNorm1d(16), (9, 16, 20), (9, 16, 20)),
    "batchnorm of features": (nn.BatchNorm1d(16), (9, 16), (9, 16)),
}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_statistics_equal_float64_on_the_cpu(name: str, half: torch.dtype, channels_last: bool) -> None:
    layer, input_shape, output_shape = LAYERS[name]
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(input_shape, generator=generator) + 0.5).to(half)
    g = (torch.randn(output_shape, generator=generator) / 64).to(half)
    (block,) = create_blocks(layer, list(layer.parameters()), "full")
    for matrix in block.factor_shapes:
        reference = block.factor(matrix, x.double(), g.double())
        on_gpu = [tensor.to(CUDA) for tensor in (x, g)]
        if channels_last and x.dim() == 4:
            on_gpu = [tensor.to(memory_format=torch.channels_last) for tensor in on_gpu]
        factor = block.factor(matrix, *on_gpu)
        assert factor.dtype == torch.float32
        error = float((factor.cpu().double() - reference).norm() / reference.norm())
        assert error < 1e-5, f"{matrix}: {error:.1e}"


def test_batchnorm_far_from_zero_with_gradients_laid_out_otherwise() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 16, 20, 20, generator=generator) + 1000
    g = torch.randn(9, 16, 20, 20, generator=generator)
    (block,) = create_blocks(layer := nn.BatchNorm2d(16), list(layer.parameters()), "full")
    reference = block.factor("F", x.double(), g.double())
    factor = block.factor("F", x.to(CUDA, memory_format=torch.channels_last), g.to(CUDA))
    assert float((factor.cpu().double() - reference).norm() / reference.norm()) < 1e-3


def test_a_failed_factorisation_keeps_the_previous_solver_until_its_answer_is_read() -> None:
    layer = nn.Linear(5, 3, device=CUDA)
    (block,) = create_blocks(layer, list(layer.parameters()), "diagonal")
    curvature = BlockCurvature(block)
    for matrix, (count, size) in block.factor_shapes.items():
        roots = torch.randn(count, size, size, device=CUDA)
        curvature.averages[matrix].update(roots @ roots.mT, None)
    refresh = InverseRefresh(deferred=True)
    gradient = torch.randn(block.num_values, device=CUDA)
    refresh.refresh([InversionTask(curvature, 0.1, ["A", "G"])])
    before = precondition(curvature, gradient)
    curvature.running["G"][0, 0, 0] = float("nan")
    refresh.refresh([InversionTask(curvature, 0.1, ["A", "G"])])
    torch.testing.assert_close(precondition(curvature, gradient), before)
    assert refresh.refresh([]).num_retries == 1
