"""Train a small vision transformer on the digits with K-FAC; `describe` says which parameters get a plain gradient."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from kfac_dist import KFAC, create_communicator


class VisionTransformer(nn.Module):
    """16 patches of 2×2 pixels, two encoder layers, the mean over patches, a linear layer."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.position = nn.Parameter(0.02 * torch.randn(16, 1, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.classify = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, 10) of images (N, 1, 8, 8)."""
        patches = F.unfold(images, 2, stride=2).permute(2, 0, 1)  # (16, N, 4), sequence first
        logits: Tensor = self.classify(self.encoder(self.embed(patches) + self.position).mean(dim=0))
        return logits


communicator = create_communicator()
torch.manual_seed(communicator.rank)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:1792, None] / 16
labels = torch.tensor(digits.target)[:1792]
images, labels = (part[communicator.rank :: communicator.size] for part in (images, labels))

model = VisionTransformer()
optimizer = KFAC(model, communicator, lr=0.05, momentum=0.9, damping=0.3, ema_decay=0.9)
communicator.print_once("\n".join(optimizer.describe()))

for epoch in range(5):
    total = 0.0
    for batch in torch.randperm(len(images)).split(32 // communicator.size):
        optimizer.zero_grad()
        optimizer.num_samples = len(batch)  # as N is not the first dimension of what the layers get
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        total += loss.item() * len(batch) / len(images)
    communicator.print_once(f"epoch {epoch + 1}: loss {total:.3f}")
