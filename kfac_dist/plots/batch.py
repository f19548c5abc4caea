"""A batch of training data with its labels: as stored, cropped and flipped, mixed, and erased."""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
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
_MOST_COLUMNS = 16
_OUTLINE = "#E69F00"


def draw_batch(config: Config, iteration: int, num_images: int) -> Figure:
    """The first images of slot 0 in one iteration, a column each; a row for each step that changes them.

    More than 16 images go on below.

    Running mixup mixes in what earlier iterations made, so the slot's batches from the start are gone through.

    Args:
        config: Of the run; its data are read.
        iteration: >= 0.
        num_images: How many, >= 1; fewer where the slot has fewer.

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
    title: str, dataset: Dataset, originals: Sequence[Original], steps: Sequence[tuple[str, Tensor, Tensor]]
) -> Figure:
    columns = min(len(originals), _MOST_COLUMNS)
    starts = range(0, len(originals), columns)
    lines = len(steps) + 1
    figure = Figure(figsize=(1.0 + 1.45 * columns, 0.5 + 1.75 * lines * len(starts)), layout="constrained")
    figure.suptitle(title, fontsize=11, fontweight="bold")
    margin = max(_margin(original) for original in originals)
    padding = _colour_of_zeros(dataset)
    for band, start in zip(figure.subfigures(len(starts), squeeze=False).flat, starts, strict=True):
        grid = band.subplots(lines, columns, squeeze=False)
        shown = originals[start : start + columns]
        for axes in grid[:, len(shown) :].flat:
            axes.remove()
        for axes, original in zip(grid[0], shown, strict=False):
            _show_original(axes, original, margin, padding)
        grid[0, 0].set_ylabel("as stored", fontsize=8)
        for line, (name, images, labels) in zip(grid[1:], steps, strict=True):
            here = slice(start, start + len(shown))
            pixels = dataset.to_pixels(images[here]).permute(0, 2, 3, 1).numpy()
            for axes, image, label in zip(line, pixels, labels[here], strict=False):
                _show(axes, image)
                axes.set_title(_label_text(label, dataset.class_names), fontsize=6.5)
            line[0].set_ylabel(name, fontsize=8)
    return figure


def _margin(original: Original) -> float:
    """Pixels by which what is cut out reaches beyond the image, where that is padded first."""
    if original.outline is None:
        return 0.0
    top, left, height, width = original.outline
    rows, columns = original.pixels.shape[:2]
    return float(max(0, -top, -left, top + height - rows, left + width - columns))


def _show_original(axes: Axes, original: Original, margin: float, padding: str) -> None:
    """Show an image and its crop, which may reach into a margin of the padding's colour."""
    rows, columns = original.pixels.shape[:2]
    _show(axes, original.pixels)
    axes.set_title(f"{columns}×{rows}", fontsize=7)
    if original.outline is not None:
        top, left, height, width = original.outline
        axes.add_patch(Rectangle((left - 0.5, top - 0.5), width, height, fill=False, color=_OUTLINE, linewidth=1.5))
    if margin:
        axes.set_xlim(-1 - margin, columns + margin)
        axes.set_ylim(rows + margin, -1 - margin)
        axes.set_facecolor(padding)


def _colour_of_zeros(dataset: Dataset) -> str:
    """What padding and erasing write: the mean colour."""
    channels = dataset.to_pixels(torch.zeros(1, *dataset.image_shape)).mean(dim=(0, 2, 3)).tolist()
    red, green, blue = channels if len(channels) == 3 else [sum(channels) / len(channels)] * 3
    return to_hex((red, green, blue))


def _show(axes: Axes, image: np.ndarray) -> None:
    """Show (H, W, C) values: in colour where there are three channels, else their mean in grey."""
    if image.shape[2] == 3:
        axes.imshow(image, interpolation="nearest")
    else:
        brightest = 255 if image.dtype == np.uint8 else 1
        axes.imshow(image.mean(axis=2), cmap="gray", vmin=0, vmax=brightest, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])


def _label_text(label: Tensor, class_names: Sequence[str]) -> str:
    shares, classes = (values.tolist() for values in label.topk(min(_MOST_NAMES, len(class_names))))
    names: list[str] = [class_names[number][:_MOST_LETTERS] for number in classes]
    if shares[0] > 0.995:
        return names[0]
    return "\n".join(f"{share:.2f} {name}" for share, name in zip(shares, names, strict=True) if share > 0.005)
