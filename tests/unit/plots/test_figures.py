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
from kfac_dist.data.digits import read_digits
from kfac_dist.data.imagenet.dataset import FolderDataset
from kfac_dist.data.sampling import SlotSampler
from kfac_dist.models import create_model
from kfac_dist.planning.memory import FisherMemory, fisher_memory
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
    figure = plots.draw_top1_and_learning_rate([run, other])
    top1_by_iteration, top1_by_epoch, rate_by_iteration, rate_by_epoch = figure.get_axes()
    for axes, expected in (
        (top1_by_iteration, [[2, 30], [4, 60]]),  # after two and four iterations
        (top1_by_epoch, [[1, 30], [2, 60]]),
        (rate_by_iteration, [[0, 0.1], [1, 0.05], [2, 0.1 / 3], [3, 0.025]]),
        (rate_by_epoch, [[0, 0.1], [0.5, 0.05], [1, 0.1 / 3], [1.5, 0.025]]),  # at the start of an iteration
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


def test_figure3_tells_runs_of_one_batch_size_apart_by_their_folders(tmp_path: Path) -> None:
    runs = [str(write_run(tmp_path / name, size)) for name, size in (("a", 512), ("b", 512), ("c", 1024))]
    assert plots.main(["figure3", *runs, "--output", str(tmp_path / "figure3.svg")]) == 0
    text = (tmp_path / "figure3.svg").read_text(encoding="utf-8")
    for label in ("K-FAC batch 512, a: 60.0 %", "K-FAC batch 512, b: 60.0 %", "K-FAC batch 1,024: 60.0 %"):
        assert label in text


def test_no_legend_lies_on_axes(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", 4096)
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"kind": "fisher", "iteration": 1, "layer": "a", "matrix": "A", "diff": 0.5}\n')
        file.write('{"kind": "train", "iteration": 4, "epoch": 2.5, "stage_seconds": {"forward": 0.5}}\n')
    run = plots.read_run(folder)
    for figure in (
        plots.draw_top1_and_learning_rate([run]),
        plots.draw_curves([run], "title"),
        plots.draw_fisher_change(folder),
        plots.draw_fisher_memory("net", FisherMemory(2, 1, {"full": 4}, {"full": 2})),
    ):
        figure.draw_without_rendering()
        legends = [axes.get_legend().get_window_extent() for axes in figure.get_axes() if axes.get_legend()]
        assert legends
        for axes in figure.get_axes():
            assert not any(legend.overlaps(axes.get_window_extent()) for legend in legends)


def test_figure4_is_the_papers(tmp_path: Path) -> None:
    model = create_model("resnet50", 1000, (3, 224, 224), seed=0)
    (axes,) = plots.draw_fisher_memory("resnet50", fisher_memory(model)).get_axes()
    kronecker, batchnorm = axes.containers
    assert [text.get_text() for text in axes.get_yticklabels()] == ["full", "unit", "diagonal"]
    np.testing.assert_allclose([bar.get_width() for bar in kronecker], 586.9, atol=0.3)
    np.testing.assert_allclose([bar.get_x() for bar in batchnorm], [bar.get_width() for bar in kronecker])
    ends = [bar.get_x() + bar.get_width() for bar in batchnorm]
    np.testing.assert_allclose(ends, [1017, 587, 587], atol=0.5)
    assert [text.get_text() for text in axes.texts] == ["1,017 MiB", "587.3 MiB", "587.1 MiB"]


def test_figure4_of_other_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "memory.svg"
    small = ["--image-size", "32", "--classes", "10", "--output", str(output)]
    assert plots.main(["figure4", "resnet20", *small]) == 0
    assert "resnet20: Fisher matrices" in output.read_text(encoding="utf-8")
    assert plots.main(["figure4", "resnet2", *small]) == 2
    assert "model.name must be a known model, got 'resnet2'" in capsys.readouterr().err
    assert plots.main(["figure4", "resnet20", "--classes", "0", "--output", str(output)]) == 2
    assert "--classes must be >= 1, got 224 and 0" in capsys.readouterr().err


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


def test_batch_outlines_a_padded_crop() -> None:
    config = load_config(QUICKSTART, ["augment.pad_crop=2", "augment.flip=true"])
    axes = np.array(plots.draw_batch(config, 0, 8).get_axes()).reshape(2, 8)
    mean = read_digits().train_images.mean() / 16
    beyond = 0
    for original, cropped in zip(axes[0], axes[1], strict=True):
        (outline,) = original.patches
        left, top = (round(value + 0.5) for value in outline.get_xy())
        padded = np.full((12, 12, 1), mean)
        padded[2:10, 2:10] = shown(original)[:, :, None] / 255
        crop = padded[top + 2 : top + 10, left + 2 : left + 10, 0]
        assert min(np.abs(crop - way).max() for way in (shown(cropped), shown(cropped)[:, ::-1])) < 0.01
        (right, bottom), (xlim, ylim) = (left + 8, top + 8), (original.get_xlim(), original.get_ylim())
        assert xlim[0] <= left - 0.5 < right - 0.5 <= xlim[1]  # the whole outline is in sight
        assert ylim[1] <= top - 0.5 < bottom - 0.5 <= ylim[0]
        np.testing.assert_allclose(original.get_facecolor(), [mean, mean, mean, 1], atol=0.003)
        beyond += left < 0 or top < 0 or right > 8 or bottom > 8
    assert beyond > 0


def test_many_images_go_on_below() -> None:
    config = load_config(QUICKSTART)
    figure = plots.draw_batch(config, 0, 20)
    assert figure.get_size_inches()[0] == plots.draw_batch(config, 0, 16).get_size_inches()[0]
    first, second = figure.get_axes()[:32], figure.get_axes()[32:]
    assert len(second) == 2 * 4
    dataset = create_dataset(config.data, config.augment, torch.device("cpu"), torch.float32, config.run.seed)
    slot = SlotSampler(dataset.num_train, config.batch.per_rank, 1, config.run.seed)
    batch = next(dataset.train_batches(slot, 0, 1, 0, 1))
    for axes, image, label in zip(first[16:] + second[4:], batch.images, batch.labels, strict=False):
        np.testing.assert_allclose(shown(axes), dataset.to_pixels(image[None])[0, 0], atol=1e-6)
        assert axes.get_title() == str(int(label))
    figure.draw_without_rendering()
    bottom = min(axes.get_window_extent().y0 for axes in first)
    assert all(axes.get_window_extent().y1 < bottom for axes in second)


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
    axes = plots.draw_batch(load_config(QUICKSTART, [made.replace("[3,", "[2,")]), 1, 2).get_axes()
    assert [shown(axis).shape for axis in axes] == [(8, 8)] * 4  # no colours: the mean of the channels
    assert [axis.get_images()[0].get_clim() for axis in axes] == [(0, 255)] * 2 + [(0, 1)] * 2  # and not stretched


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--images", "0"], "--images in 1 ... 256, got 3 and 0"),
        (["--images", "257"], "--images in 1 ... 256, got 3 and 257"),
        (["--iteration", "-1"], "--iteration must be >= 0"),
        (["model.nam=x"], "model.nam is not a known key"),
    ],
)
def test_bad_calls(arguments: list[str], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plots.main(["batch", str(QUICKSTART), *arguments, "--output", str(tmp_path / "x.png")]) == 2
    assert problem in capsys.readouterr().err
