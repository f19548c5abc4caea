"""Ranks that would train something else are refused at the start."""

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.paths import QUICKSTART

pytestmark = pytest.mark.mpi


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("code", "rank 1 has 9.9 and rank 0 has "),
        ("data", "rank 1 has 1000 training and 359 test images of 1x8x8 in 10 classes"),
        ("model", "rank 1 has 14 parameters and buffers"),
    ],
)
def test_they_are_named(
    what: str, said: str, run_program: Callable[..., CompletedProcess[str]], tmp_path: Path
) -> None:
    refused = run_program(2, "disagreeing_ranks.py", what, QUICKSTART, f"run.output_dir={tmp_path}")
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert refused.stderr.count(f"error: all ranks must have the same {what}, but {said}") == 1
    assert "Traceback" not in refused.stderr
    assert not list(tmp_path.iterdir())
