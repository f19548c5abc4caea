"""The examples run on the CPU, and what they print shows that they learn."""

import re
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch

from tests.paths import ROOT

EXAMPLES = ROOT / "examples"

Run = Callable[..., CompletedProcess[str]]


@pytest.fixture
def example(mpirun: Run) -> Callable[..., str]:
    """``example(n, name, *args)`` runs an example on n ranks and returns what it printed."""

    def run(num_ranks: int, name: str, *args: str | Path) -> str:
        finished = mpirun(num_ranks, [EXAMPLES / name, *args], env={"PYTHONPATH": str(ROOT)}, timeout=200)
        assert finished.returncode == 0, finished.stderr
        return finished.stdout

    return run


def numbers(pattern: str, text: str) -> list[float]:
    """What the pattern's groups matched, of all matches, one behind the other."""
    found = re.findall(pattern, text)
    return [float(value) for groups in found for value in (groups if isinstance(groups, tuple) else (groups,))]


def test_every_example_is_short_and_tested() -> None:
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests/system").glob("*.py"))
    for path in EXAMPLES.glob("*.py"):
        assert path.read_text(encoding="utf-8").count("\n") < 60, path.name
        assert path.name in tests


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_own_script(num_ranks: int, example: Callable[..., str]) -> None:
    (accuracy,) = numbers(r"accuracy on rank 0's share: ([\d.]+) %", example(num_ranks, "own_script.py"))
    assert accuracy > 97


@pytest.mark.slow
def test_fine_tuning(example: Callable[..., str]) -> None:
    out = example(1, "fine_tuning.py")
    assert re.findall(r"K-FAC covers (\d+) layers?", out) == ["1", "41"]
    head_first, head_last, all_first, all_last = numbers(r"loss ([\d.]+) -> ([\d.]+)", out)
    assert head_last < 0.7 * head_first
    assert all_last < 0.5 * all_first < 0.5 * head_last


@pytest.mark.slow
def test_vision_transformer(example: Callable[..., str]) -> None:
    out = example(1, "vision_transformer.py")
    losses = numbers(r"epoch \d: loss ([\d.]+)", out)
    assert losses[-1] < 0.4 * losses[0]
    assert "K-FAC covers 6 layers" in out  # embedding, two of each encoder layer's MLP, head
    reasons = dict(re.findall(r"plain gradient for (\S+) \(\d+ values\): (.*)", out))
    assert reasons["encoder.layers.0.norm1"] == "LayerNorm has no K-FAC form here"
    assert reasons["encoder.layers.0.self_attn"] == "MultiheadAttention has no K-FAC form here"
    assert reasons["(root)"] == "VisionTransformer has no K-FAC form here"
    assert len(reasons) == 1 + 2 * 4


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_clipping_and_accumulation(num_ranks: int, example: Callable[..., str]) -> None:
    first, last = numbers(r"loss ([\d.]+) -> ([\d.]+) in 35 steps", example(num_ranks, "clipping_and_accumulation.py"))
    assert last < 0.1 * first


def test_bf16_autocast(example: Callable[..., str]) -> None:
    losses = numbers(r"epoch \d: loss ([\d.]+)", example(1, "bf16_autocast.py"))
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_resumed_run_equals_the_uninterrupted_one(
    num_ranks: int, example: Callable[..., str], tmp_path: Path
) -> None:
    whole = example(num_ranks, "scheduler_and_resume.py", tmp_path / "whole", "24")
    example(num_ranks, "scheduler_and_resume.py", tmp_path / "cut", "13")  # between two refreshes
    resumed = example(num_ranks, "scheduler_and_resume.py", tmp_path / "cut", "24")
    assert "step 13:" in resumed
    assert whole.splitlines()[-1] == resumed.splitlines()[-1]
    first, last = numbers(r"step \d+: loss ([\d.]+)", whole)
    assert last < 0.2 * first
    for rank in range(num_ranks):
        one, other = (torch.load(tmp_path / f"{name}.rank{rank}", weights_only=True) for name in ("whole", "cut"))
        assert_same(one, other)


def assert_same(one: object, other: object) -> None:
    """Bit for bit, in nested dictionaries and lists."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict) and isinstance(other, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert_same(value, other[key])
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple):
        for ours, theirs in zip(one, other, strict=True):
            assert_same(ours, theirs)
    else:
        assert one == other


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_torch_distributed(num_ranks: int, run_python: Run) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    finished = run_python([*torchrun, EXAMPLES / "torch_distributed.py"], env={"PYTHONPATH": str(ROOT)}, timeout=120)
    assert finished.returncode == 0, finished.stderr
    losses = numbers(r"epoch \d: loss ([\d.]+)", finished.stdout)
    assert len(losses) == 4, "printed once"
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.slow
def test_lightning_module(run_python: Run, tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="Lightning is not installed: pip install lightning")
    finished = run_python([EXAMPLES / "lightning_module.py", tmp_path], env={"PYTHONPATH": str(ROOT)}, timeout=200)
    assert finished.returncode == 0, finished.stderr
    first, cut, resumed, last = numbers(r"epochs up to \d: loss ([\d.]+) -> ([\d.]+)", finished.stdout)
    assert max(cut, resumed, last) < 0.1 * first
    assert "got no factors" not in finished.stderr
