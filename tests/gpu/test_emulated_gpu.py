"""The tests that need a GPU, on an emulated one."""

import sys
from pathlib import Path

import pytest
import torch

from scripts.gpu_check import files_of_gpu_tests
from tests import emulated_gpu
from tests.conftest import DATA_VARIABLE, run_limited

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which these tests run themselves"),
    pytest.mark.skipif(bool(emulated_gpu.why_not()), reason=emulated_gpu.why_not()),
]

FILES = files_of_gpu_tests()
LONG = {"test_step.py": (1,), "test_half_precision.py": (1,), "test_nccl.py": (1, 3)}  # the last over NCCL's ranks
OTHERS = [file for file in FILES if Path(file).name not in LONG]


def run_gpu_tests(files: list[str], num_gpus: int) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files]
    finished = run_limited(command, emulated_gpu.environment(num_gpus), timeout=280)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert " passed" in finished.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("name", "num_gpus"), [(name, number) for name in LONG for number in LONG[name]])
def test_long_files(name: str, num_gpus: int) -> None:
    run_gpu_tests([file for file in FILES if Path(file).name == name], num_gpus)


def test_other_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DATA_VARIABLE, raising=False)  # a CPU would take hours for a training on real data
    run_gpu_tests(OTHERS, 1)
