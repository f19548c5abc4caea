"""Accuracy over the evaluation images, shared out over the ranks."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from kfac_dist.communicator import Communicator
from kfac_dist.data.base import Dataset
from kfac_dist.data.skipped import SkippedImages
from kfac_dist.errors import ImageError

_BATCH = 500
_PIXELS = 2**22  # of a batch: 83 images of 224x224


@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataset: Dataset,
    communicator: Communicator,
    skipped_images: SkippedImages,
    on_batch: Callable[[], None] = lambda: None,
) -> tuple[float, float, float]:
    """Mean loss, top-1 and top-5 in percent over all evaluation images; collective.

    Every image counts once, however the images divide over the ranks; a rank may have none. `on_batch` is called after
    each batch.

    Raises:
        TrainingFailed: On every rank, if images are damaged.
    """
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=next(model.parameters()).device)
    batch_size = max(1, min(_BATCH, _PIXELS // math.prod(dataset.image_shape[1:])))
    problem = ""
    try:
        for images, labels in dataset.eval_batches(communicator.rank, communicator.size, batch_size):
            logits = model(images)
            ranked = logits.topk(min(5, dataset.num_classes), dim=1).indices == labels[:, None]
            loss = F.cross_entropy(logits, labels, reduction="sum")
            counts = [ranked[:, 0].sum(), ranked.any(dim=1).sum(), torch.full_like(loss, len(labels))]
            sums += torch.stack([loss.double(), *(count.double() for count in counts)])
            on_batch()
    except ImageError as error:  # this rank's alone, until the others know
        problem = str(error)
    skipped_images.gather_and_check(problem)
    loss_sum, top1, top5, count = communicator.all_reduce_(sums).tolist()
    return loss_sum / count, 100 * top1 / count, 100 * top5 / count
