"""A long run neither opens more files, nor starts more threads, nor takes more memory."""

import os
import threading
from pathlib import Path

import pytest
import torch

from kfac_dist import create_communicator
from kfac_dist.config.load import load_config
from kfac_dist.training.trainer import Trainer
from tests.paths import QUICKSTART

WARM_UP = 60


def soak(epochs: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Open files, threads and resident bytes after each iteration; a checkpoint and an evaluation every epoch."""
    monkeypatch.setenv("KFAC_DIST_PROGRESS", "off")
    length = (f"train.epochs={epochs}", f"schedule.end_epoch={epochs}", "train.evaluate_every=1")
    settings = ("augment={pad_crop: 1, mixup_alpha: 0.4}", "kfac.ema_decay=0.9", "checkpoint={every_epochs: 1}")
    config = load_config(QUICKSTART, [*length, *settings, f"run.output_dir={folder}"])
    communicator = create_communicator("reduce", "mpi", torch.device("cpu"))
    trainer = Trainer(config, communicator, torch.device("cpu"))
    found = []
    train_iteration = Trainer._train_iteration

    def look(self: Trainer, *arguments: object) -> object:
        result = train_iteration(self, *arguments)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        found.append((len(os.listdir("/proc/self/fd")), threading.active_count(), pages * os.sysconf("SC_PAGE_SIZE")))
        return result

    monkeypatch.setattr(Trainer, "_train_iteration", look)
    trainer.train()
    return found


def check(found: list[tuple[int, int, int]], growth: float) -> None:
    files, threads, memory = ([row[column] for row in found[WARM_UP:]] for column in range(3))
    last = slice(-len(files) // 4, None)
    # The least: some iterations find a checkpoint being written.
    assert min(files[last]) <= min(files[: len(files) // 4])
    assert min(threads[last]) <= min(threads[: len(threads) // 4])
    early, late = max(memory[: len(memory) // 4]), max(memory[last])
    print(f"{len(found)} iterations: files {files[0]} to {files[-1]}, memory {early / 1e6:.1f} to {late / 1e6:.1f} MB")
    assert late - early < growth


def test_300_iterations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = soak(27, tmp_path, monkeypatch)
    assert len(found) == 304
    check(found, 8e6)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.timeout(1800)
def test_5000_iterations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(soak(450, tmp_path, monkeypatch), 16e6)
