"""The data set `imagenet` under mpirun: the same run on any number of ranks, damage, the mean image's command."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch

from tests.image_tree import NUM_TRAIN, write_tree

pytestmark = pytest.mark.mpi

Run = Callable[..., CompletedProcess[str]]

CONFIG = "tests/mpi/programs/imagenet.yaml"
SIX_ITERATIONS = [
    "data.image_size=64",
    "data.train_limit=100",
    "data.eval_limit=50",
    "batch.global_size=32",
    "batch.per_rank=16",
    "train.epochs=1.9",
    "train.evaluate_every=10",
    "train.precision=fp32",  # fp16 is emulated on a CPU
]


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def make_mean_image(mpirun: Run, num_ranks: int, root: Path, output: Path, side: int, *args: str) -> Any:
    command = ["-m", "kfac_dist.data.mean_image", str(root), "--output", str(output), "--image-size", str(side)]
    return mpirun(num_ranks, [*command, *args], timeout=120)


@pytest.fixture(scope="module")
def tree(mpirun: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree of generated images, and its mean image in the file `mean`."""
    root = write_tree(tmp_path_factory.mktemp("tree"))
    made = make_mean_image(mpirun, 2, root, root / "mean", 16)
    assert made.returncode == 0, made.stderr
    return root


def settings(root: Path, *overrides: str) -> list[str]:
    return [f"data.root={root}", f"data.mean_image={root / 'mean'}", *overrides]


def test_mean_image_is_the_same_from_any_number_of_ranks(mpirun: Run, tree: Path, tmp_path: Path) -> None:
    made = make_mean_image(mpirun, 3, tree, tmp_path / "mean", 16)
    assert made.returncode == 0, made.stderr
    assert made.stdout == f"{tmp_path / 'mean'}: mean of {NUM_TRAIN} images\n"
    assert (tmp_path / "mean").read_bytes() == (tree / "mean").read_bytes()


def test_mean_image_command_names_what_is_wrong_once(mpirun: Run, tmp_path: Path) -> None:
    missing = make_mean_image(mpirun, 2, tmp_path / "none", tmp_path / "mean", 16)
    assert missing.returncode == 2
    assert missing.stderr.count("error: data.root must contain the folder train") == 1
    root = write_tree(tmp_path)
    (root / "train/n03/020.JPEG").write_bytes(b"")  # the last one: an image of rank 1
    damaged = make_mean_image(mpirun, 2, root, tmp_path / "mean", 16)
    assert damaged.returncode == 2
    assert damaged.stderr.count("020.JPEG cannot be used (the file is empty)") == 1
    assert "Traceback" not in missing.stderr + damaged.stderr
    assert not (tmp_path / "mean").exists()


def has_dali() -> bool:
    return importlib.util.find_spec("nvidia.dali") is not None


def test_ranks_accumulation_and_loaders_give_the_same_parameters(run_program: Run, tree: Path, tmp_path: Path) -> None:
    parameters, losses = {}, {}
    for num_ranks, loader in ((1, "torchvision"), (4, "torchvision"), (3, "dali" if has_dali() else "torchvision")):
        folder = tmp_path / str(num_ranks)
        finished = run_program(
            num_ranks, "train_imagenet.py", folder, *settings(tree, f"data.loader={loader}"), timeout=120
        )
        assert finished.returncode == 0, finished.stdout + finished.stderr
        parameters[num_ranks] = torch.load(folder / "parameters.pt", weights_only=True)
        losses[num_ranks] = [
            record["loss"] for kind in ("train", "eval") for record in records(folder / "imagenet", kind)
        ]
    assert len(losses[1]) == 5 + 5
    for num_ranks in (3, 4):
        for name, alone in parameters[1].items():
            assert (parameters[num_ranks][name] - alone).norm() <= 1e-9 * alone.norm(), f"{name} on {num_ranks} ranks"
        assert losses[num_ranks] == pytest.approx(losses[1], rel=1e-9)


def test_one_rank_lists_for_all(run_program: Run, tree: Path) -> None:
    finished = run_program(3, "list_images.py", tree)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == f"{NUM_TRAIN} images, walked over by 1 of 3 ranks, 1 list\n"


def test_a_host_with_other_folders_is_refused(run_program: Run, tree: Path, tmp_path: Path) -> None:
    other = write_tree(tmp_path / "other")
    (other / "train/n03").rename(other / "train/n04")
    finished = run_program(3, "list_images.py", tree, other)
    assert finished.returncode == 2, finished.stdout
    assert f"but {other}/train differs from rank 0's in n03, n04, {other}/train/n03/020.JPEG" in finished.stderr
    assert "every host must hold the same data: compare the folders (on rank 2 of 3)" in finished.stderr


def test_a_damaged_image_ends_all_ranks(mpirun: Run, tree: Path, tmp_path: Path) -> None:
    root = write_tree(tmp_path / "tree")
    command = ["train.py", CONFIG, f"run.output_dir={tmp_path}"]
    path = root / "train/n02/007.JPEG"
    content = path.read_bytes()
    # Cut off, but of the same size: the mean image still belongs to the tree.
    path.write_bytes(content[: len(content) // 2].ljust(len(content), b"\0"))
    finished = mpirun(2, [*command, f"data.root={root}", f"data.mean_image={tree / 'mean'}"], timeout=90)
    assert finished.returncode == 3, finished.stderr
    assert finished.stderr.count("training failed: ") == 1
    assert "train/n02/007.JPEG cannot be used" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert not (tmp_path / "imagenet/DONE").exists()


def test_damaged_images_can_be_skipped(mpirun: Run, tree: Path, tmp_path: Path) -> None:
    root = write_tree(tmp_path / "tree")
    command = ["train.py", CONFIG, f"run.output_dir={tmp_path}"]
    skip = [f"data.root={root}", f"data.mean_image={tree / 'mean'}", "data.on_error=skip"]
    (root / "val/n01/000.JPEG").write_bytes(b"")
    finished = mpirun(2, [*command, *skip], timeout=90)
    assert finished.returncode == 0, finished.stderr
    (event,) = records(tmp_path / "imagenet", "event")
    assert (event["event"], event["iteration"]) == ("skipped_picture", 0)
    assert "val/n01/000.JPEG cannot be used (the file is empty)" in event["problem"]
    assert records(tmp_path / "imagenet", "summary")[0]["skipped_pictures"] == 1
    top1 = [record["top1"] for record in records(tmp_path / "imagenet", "eval")]
    assert all(9 * value / 100 == pytest.approx(round(9 * value / 100), abs=1e-9) for value in top1)  # of 9, not 10

    (root / "val/n02/001.JPEG").write_bytes(b"")  # a second one is more than 1 % of 31
    finished = mpirun(2, [*command, *skip], timeout=90)
    assert finished.returncode == 3, finished.stderr
    assert "2 of 31 images cannot be used, more than the 1 %" in finished.stderr


def test_a_wrong_mean_image_is_refused_once(mpirun: Run, tree: Path, tmp_path: Path) -> None:
    command = ["train.py", CONFIG, f"run.output_dir={tmp_path}"]
    finished = mpirun(2, [*command, *settings(tree, "data.image_size=40")], timeout=60)
    assert finished.returncode == 2, finished.stderr
    text = "is for images of 16x16, and data.image_size is 40: make it with: python -m kfac_dist.data.mean_image"
    assert finished.stderr.count(text) == 1
    assert "Traceback" not in finished.stderr


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_six_iterations_of_the_recipe_on_real_images(mpirun: Run, data_dir: Path, tmp_path: Path) -> None:
    """ResNet-50 with every scheme of bs4k.yaml on 2 ranks; only sizes are reduced. The loss falls."""
    root = data_dir / "imagenette-mini"
    if not root.is_dir():
        pytest.skip(f"needs {root}")
    made = make_mean_image(mpirun, 2, root, tmp_path / "mean", 64)
    assert made.returncode == 0, made.stderr
    places = [f"run.output_dir={tmp_path}", f"data.root={root}", f"data.mean_image={tmp_path / 'mean'}"]
    finished = mpirun(2, ["train.py", "configs/imagenet/bs4k.yaml", *places, *SIX_ITERATIONS], timeout=600)
    assert finished.returncode == 0, finished.stderr
    losses = [record["loss"] for record in records(tmp_path / "imagenet-bs4k", "train")]
    assert len(losses) == 6
    print(losses)
    assert sum(losses[-3:]) / 3 < sum(losses[:3]) / 3 - 0.1
