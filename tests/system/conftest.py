"""The command line in this process, and small data sets in the original formats."""

import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import yaml
from PIL import Image

from kfac_dist.commands.train import main
from tests.paths import ROOT

LAUNCHER_VARIABLES = (
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
    "SLURM_NTASKS",
    "SLURM_STEP_NUM_TASKS",
    "KFAC_DIST_ALLOW_SIZE_MISMATCH",
)
CIFAR_FILES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]


@dataclass(frozen=True)
class Outcome:
    """What a command left: exit code and both streams."""

    code: int
    out: str
    err: str


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """``command(*args)`` does what ``python train.py *args`` does, without the seconds of starting.

    An exception that would be a traceback for the user is one here, too.
    """
    for variable in LAUNCHER_VARIABLES:
        monkeypatch.delenv(variable, raising=False)

    def run(*args: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, args)])
        code = main()
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[..., Path]:
    """``write_config({"train": {...}})`` writes the quickstart configuration with some sections replaced."""

    def write(changes: dict[str, object] | None = None) -> Path:
        settings = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text(encoding="utf-8"))
        settings |= {"run": {"name": "test", "output_dir": str(tmp_path / "runs")}} | (changes or {})
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(settings), encoding="utf-8")
        return path

    return write


@pytest.fixture
def cifar_folder(tmp_path: Path) -> Path:
    """CIFAR-10 with 4 images a batch."""
    folder = tmp_path / "cifar" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name in CIFAR_FILES:
        images = generator.integers(256, size=(4, 3072)).astype(np.uint8)
        with (folder / name).open("wb") as file:
            pickle.dump({b"data": images, b"labels": [0, 1, 2, 9]}, file, protocol=4)
    return folder.parent


@pytest.fixture
def svhn_folder(tmp_path: Path) -> Path:
    """SVHN with 16 images in either file."""
    folder = tmp_path / "svhn"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name in ("train_32x32.mat", "test_32x32.mat"):
        images = generator.integers(256, size=(32, 32, 3, 16)).astype(np.uint8)
        labels = np.arange(16, dtype=np.uint8)[:, None] % 10 + 1
        scipy.io.savemat(folder / name, {"X": images, "y": labels})
    return folder


@pytest.fixture
def imagenet_folder(tmp_path: Path) -> Path:
    """A tree in ImageNet's layout: two classes, 8 images for training and 2 for validation of each."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 2)):
        for wnid in ("n01440764", "n01443537"):
            folder = tmp_path / "imagenet" / split / wnid
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(256, size=(40, 48, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.JPEG")
    return tmp_path / "imagenet"
