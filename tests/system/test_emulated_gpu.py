"""The tests that need a GPU, on an emulated one, and that it refuses what a GPU refuses."""

import sys
from pathlib import Path

import pytest
import torch

from scripts.gpu_check import files_of_gpu_tests
from tests import emulated_gpu
from tests.conftest import DATA_VARIABLE, Completed, run_limited

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which these tests run themselves"),
    pytest.mark.skipif(bool(emulated_gpu.why_not()), reason=emulated_gpu.why_not()),
]

# On several GPUs, over NCCL, where a test takes as many as there are.
NUM_GPUS = {"test_nccl.py": (1, 3)}
FILES = {Path(file).name: file for file in files_of_gpu_tests()}


def run(*command: str | Path, num_gpus: int = 1, timeout: float = 60) -> Completed:
    return run_limited([sys.executable, *command], emulated_gpu.environment(num_gpus), timeout)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "num_gpus"), [(name, n) for name in FILES for n in NUM_GPUS.get(name, (1,))])
def test_gpu_tests(name: str, num_gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DATA_VARIABLE, raising=False)  # a CPU would take hours for a training on real data
    finished = run(
        "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", FILES[name], num_gpus=num_gpus, timeout=280
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
