"""Programs that the tests start warm begin as programs of an interpreter of their own do."""

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess


def test_nothing_unseeded_agrees(tmp_path: Path, run_python: Callable[..., CompletedProcess[str]]) -> None:
    program = tmp_path / "draw.py"
    program.write_text(
        "import random, numpy, torch\nprint(random.random(), numpy.random.rand(), torch.rand(1, dtype=float).item())\n"
    )
    one, other = (run_python([program]).stdout.split() for _ in range(2))
    assert len(one) == len(other) == 3
    assert all(a != b for a, b in zip(one, other, strict=True))
