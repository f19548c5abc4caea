"""A picture of training data: a batch as stored, cropped and flipped, mixed, and erased, with its labels."""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from kfac_dist.config.schema import Config
from kfac_dist.data.augment import Augmentation
from kfac_dist.data.base import Dataset, Original
from kfac_dist.data.create import create_dataset
from kfac_dist.data.sampling import SlotSampler

_MOST_NAMES = 2  # of a mixed label: the largest shares
_MOST_LETTERS = 14
_OUTLINE = "#E69F00"


def draw_batch(config: Config, iteration: int, num_images: int) -> Figure:
    """The first images of slot 0 in one iteration, a column each; a row for each step that changes them.

    Running mixup mixes in what earlier iterations made, so the slot's batches from the start are gone through.

    Args:
        config: Of the run; its data are read.
        iteration: >= 0.
        num_images: Columns, >= 1; fewer where the slot has fewer.

    Raises:
        InputError: If the data cannot be read.
    """
    seed = config.run.seed
    dataset = create_dataset(config.data, config.augment, torch.device("cpu"), torch.float32, seed)
    num_slots = config.batch.global_size // config.batch.per_rank
    sampler = SlotSampler(dataset.num_train, config.batch.per_rank, num_slots, seed)
    augmentation = Augmentation(config.augment, dataset.num_classes, seed)
    # As rank 0 of as many ranks as there are slots, which has slot 0 only.
    for batch in dataset.train_batches(sampler, 0, num_slots, 0, iteration + 1):
        steps = augmentation.steps(batch)
    originals = dataset.originals(sampler, iteration, 0, num_images)
    rows = [(name, step.images, step.labels) for name, step in steps]
    return _draw(f"{config.run.name}: iteration {iteration}, slot 0", dataset, originals, rows)


def _draw(
    title: str, dataset: Dataset, originals: Sequence[Original], rows: Sequence[tuple[str, Tensor, Tensor]]
) -> Figure:
    columns = len(originals)
    figure = Figure(figsize=(1.0 + 1.45 * columns, 0.5 + 1.75 * (len(rows) + 1)), layout="constrained")
    figure.suptitle(title, fontsize=11, fontweight="bold")
    grid = figure.subplots(len(rows) + 1, columns, squeeze=False)
    for axes, original in zip(grid[0], originals, strict=True):
        _show(axes, original.pixels)
        if original.outline is not None:
            top, left, height, width = original.outline
            axes.add_patch(Rectangle((left - 0.5, top - 0.5), width, height, fill=False, color=_OUTLINE, linewidth=1.5))
        rows_, columns_ = original.pixels.shape[:2]
        axes.set_title(f"{columns_}×{rows_}", fontsize=7)
    grid[0, 0].set_ylabel("as stored", fontsize=8)
    for line, (name, images, labels) in zip(grid[1:], rows, strict=True):
        pixels = dataset.to_pixels(images[:columns]).permute(0, 2, 3, 1).numpy()
        for axes, image, label in zip(line, pixels, labels, strict=False):
            _show(axes, image)
            axes.set_title(_label_text(label, dataset.class_names), fontsize=6.5)
        line[0].set_ylabel(name, fontsize=8)
    return figure


def _show(axes: Axes, image: np.ndarray) -> None:
    grey = image.shape[2] == 1
    axes.imshow(image[:, :, 0] if grey else image, cmap="gray" if grey else None, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])


def _label_text(label: Tensor, class_names: Sequence[str]) -> str:
    shares, classes = (values.tolist() for values in label.topk(min(_MOST_NAMES, len(class_names))))
    names: list[str] = [class_names[number][:_MOST_LETTERS] for number in classes]
    if shares[0] > 0.995:
        return names[0]
    return "\n".join(f"{share:.2f} {name}" for share, name in zip(shares, names, strict=True) if share > 0.005)
