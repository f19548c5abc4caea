"""K-FAC in a Lightning module: `fit` with accumulation and bf16, a checkpoint, and a run that goes on from it.

lightning_module.py FOLDER    for the checkpoint
"""

import sys
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kfac_dist import KFAC


class Classifier(lightning.LightningModule):
    """A small convolutional network for the digits."""

    def __init__(self) -> None:
        super().__init__()
        conv, norm = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.net = nn.Sequential(conv, norm, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 10))
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], batch_index: int) -> Tensor:
        """The loss of one micro-batch; Lightning divides it by their number."""
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        """K-FAC and a schedule. Clip with max_grad_norm: Lightning's gradient_clip_val sees one rank's gradient."""
        optimizer = KFAC(self, lr=0.03, momentum=0.9, damping=0.03, max_grad_norm=5.0)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def fit(epochs: int, start: Path | None = None) -> lightning.Trainer:
    """Train up to this number of epochs, from a checkpoint if one is given."""
    model = Classifier()
    trainer = lightning.Trainer(
        max_epochs=epochs, accumulate_grad_batches=2, precision="bf16-mixed", accelerator="cpu", devices=1,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, DataLoader(dataset, batch_size=64), ckpt_path=start)
    print(f"epochs up to {epochs}: loss {model.losses[0]:.3f} -> {model.losses[-1]:.3f}")
    return trainer


digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:1792, None] / 16
dataset = TensorDataset(images, torch.tensor(digits.target)[:1792])
checkpoint = Path(sys.argv[1]) / "digits.ckpt"
fit(2).save_checkpoint(checkpoint)
fit(4, checkpoint)
