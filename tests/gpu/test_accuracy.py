"""ResNet-20 on the real CIFAR-10: half precision learns as well as fp32."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("pydantic")  # a machine with a GPU may have little else installed

from kfac_dist import KFAC, LossScaler, create_communicator
from kfac_dist.data.augment import CropFlip
from kfac_dist.data.cifar10 import read_cifar10
from kfac_dist.data.sampling import SlotSampler
from kfac_dist.models import create_model
from kfac_dist.training.precision import Precision
from kfac_dist.training.schedules import damping_at, polynomial_decay
from kfac_dist.vocabulary import PrecisionName

BATCH, EPOCHS, LEARNING_RATE = 512, 4, 0.03
PRECISIONS: tuple[PrecisionName, ...] = ("fp32", "fp16", "bf16")


def train(name: PrecisionName, folder: Path, device: torch.device, num_train: int, num_eval: int, epochs: int) -> float:
    """Test accuracy in percent after training as configs/cifar10/kfac_resnet20.yaml does, without the trainer."""
    precision, arrays = Precision(name), read_cifar10(folder)
    images = torch.from_numpy(arrays.train_images[:num_train]).to(device)
    labels = torch.from_numpy(arrays.train_labels[:num_train]).to(device)
    tests = torch.from_numpy(arrays.eval_images[:num_eval]).to(device)
    answers = torch.from_numpy(arrays.eval_labels[:num_eval]).to(device)
    memory_format = torch.channels_last if device.type == "cuda" else torch.contiguous_format

    def normalised(batch: Tensor) -> Tensor:
        return ((batch.float() - 120) / 64).to(memory_format=memory_format)

    model = create_model("resnet20", 10, (3, 32, 32), seed=0).to(device, memory_format=memory_format)
    scaler = LossScaler() if precision.needs_loss_scale else None
    optimizer = KFAC(
        model, create_communicator("reduce", "mpi", device), lr=LEARNING_RATE, ema_decay=0.9, refresh=5,
        weight_rescaling="always", loss_scaler=scaler,
    )  # fmt: skip
    batch_size = min(BATCH, num_train // 2)
    sampler = SlotSampler(num_train, batch_size, 1, 0)
    crop_flip = CropFlip(4, True, 0)
    for iteration in range(sampler.num_iterations(epochs)):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = polynomial_decay(sampler.epoch_at(iteration), LEARNING_RATE, 2, 0, epochs)
            group["momentum"] = 0.9 / LEARNING_RATE * group["lr"]
            group["damping"] = damping_at(iteration, 0.1, 0.001, 100)
        indices = torch.from_numpy(sampler.indices(iteration, 0)).to(device)
        batch = crop_flip.apply(normalised(images[indices]), iteration, 0)
        optimizer.zero_grad()
        with precision.autocast(device):
            loss = F.cross_entropy(model(batch.to(memory_format=memory_format)), labels[indices])
        (loss if scaler is None else scaler.scale_loss(loss)).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad(), precision.autocast(device):
        correct = sum(
            int((model(normalised(part)).argmax(dim=1) == expected).sum())
            for part, expected in zip(tests.split(1000), answers.split(1000), strict=True)
        )
    return 100 * correct / len(tests)


@pytest.mark.gpu
def test_half_precision_learns_cifar10_as_well_as_fp32(data_dir: Path) -> None:
    accuracies = {name: train(name, data_dir, torch.device("cuda"), 50_000, 10_000, EPOCHS) for name in PRECISIONS}
    print(accuracies)
    assert accuracies["fp32"] > 70
    for name in ("fp16", "bf16"):
        assert accuracies[name] > accuracies["fp32"] - 2.0, accuracies
