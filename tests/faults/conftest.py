"""Runs that are stopped or damaged on purpose, and what is compared afterwards."""

import json
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import CHECKOUT_PATH
from tests.paths import QUICKSTART, ROOT

EVERYTHING = (
    "train.precision=fp64",
    "train.epochs=2",
    "schedule.end_epoch=2",
    "batch={global_size: 144, per_rank: 18}",
    "augment={pad_crop: 1, flip: true, mixup_alpha: 0.4}",
    "kfac.ema_decay=0.9",
    "kfac.refresh={schedule: adaptive, threshold: 0.3, max_interval: 6}",
    "checkpoint={every_epochs: 0.2, keep: 3}",
)
"""20 iterations in 8 slots of 18, all that a state can hold but a loss scale; a checkpoint every other iteration."""

Run = Callable[..., CompletedProcess[str]]


def without(overrides: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """The overrides but for those that the arguments replace."""
    keys = {argument.partition("=")[0] for argument in arguments}
    sections = {key.partition(".")[0] for key in keys if "." not in key}
    return [
        text
        for text in overrides
        if text.partition("=")[0] not in keys and text.partition(".")[0].partition("=")[0] not in sections
    ]


def start(
    mpirun: Run, folder: Path, num_ranks: int, name: str, *arguments: str, fault: str = "", timeout: float = 120
) -> CompletedProcess[str]:
    program = ROOT / "tests/faults/programs/train_with_fault.py"
    overrides = without([f"run.output_dir={folder}", f"run.name={name}", *EVERYTHING], arguments)
    env = {"PYTHONPATH": CHECKOUT_PATH, "KFAC_DIST_PROGRESS": "off", "FAULT": fault}
    return mpirun(num_ranks, [program, QUICKSTART, *overrides, *arguments], env=env, timeout=timeout)


@pytest.fixture
def train(mpirun: Run, tmp_path: Path) -> Run:
    """``train(ranks, name, *arguments, fault="", timeout=120)`` trains into ``tmp_path/name``, with a fault perhaps."""
    return partial(start, mpirun, tmp_path)


@pytest.fixture(scope="session")
def whole_run(mpirun: Run, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """``whole_run(ranks)``: the folder of a run that nothing disturbed; made once."""

    @cache
    def make(num_ranks: int) -> Path:
        folder = tmp_path_factory.mktemp("whole")
        finished = start(mpirun, folder, num_ranks, "whole")
        assert finished.returncode == 0, finished.stderr
        return folder / "whole"

    return make


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Of the last checkpoint."""
    last = max((run / "checkpoints").glob("iteration-*"))
    return {name: value.double() for name, value in load_file(last / "model.safetensors").items()}


def records(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    """Records of a kind, without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    drop = {"images_per_second", "stage_seconds", "seconds", "checkpoint_seconds_blocked", "failed_checkpoints"}
    return [{key: value for key, value in line.items() if key not in drop} for line in lines if line["kind"] == kind]


def assert_same(run: Path, other: Path) -> None:
    """Weights and records are equal bit for bit."""
    one, two = weights(run), weights(other)
    assert list(one) == list(two)
    for name, value in one.items():
        assert torch.equal(value, two[name]), name
    for kind in ("train", "eval", "summary"):
        assert records(run, kind) == records(other, kind), kind
    assert (run / "DONE").exists()
