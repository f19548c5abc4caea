"""Figure 3 and the figure of a batch, checked by the data in their axes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes

from kfac_dist import plots
from kfac_dist.config.load import load_config
from kfac_dist.data.augment import RandomErasing, RunningMixup, soft_labels
from kfac_dist.data.create import create_dataset
from kfac_dist.data.imagenet.dataset import FolderDataset
from kfac_dist.data.sampling import SlotSampler
from tests.image_tree import write_tree
from tests.paths import QUICKSTART

SCHEMES = [
    "augment={flip: true, mixup_alpha: 0.4, erasing: {probability: 1, area: [0.1, 0.2], aspect: [0.3, 1]}}",
    "batch={global_size: 10, per_rank: 5}",
]


def write_run(folder: Path, batch: int, optimizer: str = "kfac") -> Path:
    folder.mkdir()
    train = [
        {"kind": "train", "iteration": i, "epoch": (i + 1) / 2, "loss": 1.0, "learning_rate": 0.1 / (i + 1)}
        for i in range(4)
    ]
    evaluations = [
        {"kind": "eval", "iteration": 2 * epoch - 1, "epoch": epoch, "top1": 30.0 * epoch} for epoch in (1, 2)
    ]
    lines = "".join(json.dumps(record) + "\n" for record in train + evaluations)
    (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
    config = f"batch: {{global_size: {batch}}}\noptimizer: {{name: {optimizer}}}\n"
    (folder / "config.yaml").write_text(config, encoding="utf-8")
    return folder


def test_figure3_shows_the_recorded_values(tmp_path: Path) -> None:
    run = plots.read_run(write_run(tmp_path / "a", 4096), "A")
    other = plots.read_run(write_run(tmp_path / "b", 8192), "B")
    figure = plots.draw_figure3([run, other])
    top1_by_iteration, top1_by_epoch, rate_by_iteration, rate_by_epoch = figure.get_axes()
    for axes, expected in (
        (top1_by_iteration, [[2, 30], [4, 60]]),  # after two and four iterations
        (top1_by_epoch, [[1, 30], [2, 60]]),
        (rate_by_iteration, [[0, 0.1], [1, 0.05], [2, 0.1 / 3], [3, 0.025]]),
        (rate_by_epoch, [[0.5, 0.1], [1, 0.05], [1.5, 0.1 / 3], [2, 0.025]]),
    ):
        first, second = axes.get_lines()
        np.testing.assert_allclose(first.get_xydata(), expected)
        assert first.get_color() != second.get_color()
    assert [text.get_text() for text in top1_by_epoch.get_legend().get_texts()] == ["A: 60.0 %", "B: 60.0 %"]
    assert (rate_by_iteration.get_xlabel(), rate_by_epoch.get_xlabel()) == ("iteration", "epoch")


def test_figure3_names_runs_by_their_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(write_run(tmp_path / "a", 4096)), str(write_run(tmp_path / "b", 131072, "sgd"))]
    assert plots.main(["figure3", *runs, "--output", str(tmp_path / "figure3.svg")]) == 0
    text = (tmp_path / "figure3.svg").read_text(encoding="utf-8")
    assert "K-FAC batch 4,096: 60.0 %" in text
    assert "SGD batch 131,072: 60.0 %" in text
    assert plots.main(["figure3", str(tmp_path / "none"), "--output", str(tmp_path / "x.png")]) == 2
    assert "no readable metrics.jsonl" in capsys.readouterr().err


def shown(axes: Axes) -> np.ndarray:
    (image,) = axes.get_images()
    return np.asarray(image.get_array())


@pytest.fixture
def tree(tmp_path: Path) -> list[str]:
    root = write_tree(tmp_path / "tree")
    return [f"data={{name: imagenet, root: {root}, preprocessing: random_resized_crop, image_size: 32}}", *SCHEMES]


def test_batch_shows_each_step(tree: list[str]) -> None:
    config = load_config(QUICKSTART, tree)
    figure = plots.draw_batch(config, iteration=2, num_images=4)
    axes = np.array(figure.get_axes()).reshape(4, 4)

    dataset = create_dataset(config.data, config.augment, torch.device("cpu"), torch.float32, 0)
    assert isinstance(dataset, FolderDataset)
    sampler, mixup = SlotSampler(dataset.num_train, 5, 2, 0), RunningMixup(0.4, 0)
    for iteration, batch in enumerate(dataset.train_batches(sampler, 0, 2, 0, 3)):
        images = batch.images
        mixed, targets = mixup.mix(images, soft_labels(batch.labels, 3, torch.float32), iteration, 0)
    erased = RandomErasing(1, (0.1, 0.2), (0.3, 1), 0).apply(mixed, 2, 0)
    for row, expected in ((1, images), (2, mixed), (3, erased)):
        for column in range(4):
            pixels = dataset.to_pixels(expected)[column].permute(1, 2, 0).numpy()
            np.testing.assert_allclose(shown(axes[row, column]), pixels, atol=1e-6)
    # What is erased shows the mean colour.
    changed = np.abs(shown(axes[3, 0]) - shown(axes[2, 0])).max(axis=2) > 0
    assert 0.05 < changed.mean() < 0.25
    np.testing.assert_allclose(
        shown(axes[3, 0])[changed], np.tile([0.485, 0.456, 0.406], (changed.sum(), 1)), atol=1e-6
    )

    names = [dataset.class_names[label] for label in batch.labels[:4]]
    assert [axis.get_title() for axis in axes[1]] == names
    share, number = targets[0].max(dim=0)
    assert axes[2, 0].get_title().startswith(f"{share:.2f} n0{int(number) + 1}")


def test_batch_outlines_what_is_cut_out(tree: list[str]) -> None:
    axes = np.array(plots.draw_batch(load_config(QUICKSTART, tree), 0, 5).get_axes()).reshape(4, 5)
    for original, cropped in zip(axes[0], axes[1], strict=True):
        (outline,) = original.patches
        pixels = shown(original).astype(float) / 255
        left, top = (round(value + 0.5) for value in outline.get_xy())
        part = pixels[top : top + round(outline.get_height()), left : left + round(outline.get_width())]
        np.testing.assert_allclose(part.mean(axis=(0, 1)), shown(cropped).mean(axis=(0, 1)), atol=0.02)


def test_batch_of_a_data_set_in_memory(tmp_path: Path) -> None:
    output = tmp_path / "batch.png"
    assert plots.main(["batch", str(QUICKSTART), "augment.flip=true", "--images", "3", "--output", str(output)]) == 0
    assert output.read_bytes().startswith(b"\x89PNG")
    axes = plots.draw_batch(load_config(QUICKSTART), 0, 3).get_axes()
    assert len(axes) == 6
    np.testing.assert_allclose(shown(axes[3]) * 255, shown(axes[0]), atol=0.51)  # nothing changes them


def test_batch_of_the_synthetic_data_set() -> None:
    made = "data={name: synthetic, synthetic: {shape: [3, 8, 8], num_classes: 4, num_train: 100, num_eval: 5}}"
    axes = plots.draw_batch(load_config(QUICKSTART, [made]), 1, 2).get_axes()
    assert [shown(axis).shape for axis in axes] == [(8, 8, 3)] * 4


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--images", "0"], "--images >= 1"),
        (["--iteration", "-1"], "--iteration must be >= 0"),
        (["model.nam=x"], "model.nam is not a known key"),
    ],
)
def test_bad_calls(arguments: list[str], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plots.main(["batch", str(QUICKSTART), *arguments, "--output", str(tmp_path / "x.png")]) == 2
    assert problem in capsys.readouterr().err
