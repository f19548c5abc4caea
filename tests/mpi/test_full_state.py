"""`KFAC.full_state_dict()`: any rank of any number of ranks goes on from it."""

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch

from kfac_dist.tensors.nested_state import decode

pytestmark = pytest.mark.mpi


def test_other_ranks_go_on_from_it(run_program: Callable[..., CompletedProcess[str]], tmp_path: Path) -> None:
    for num_ranks in (2, 1):
        finished = run_program(num_ranks, "full_state.py", tmp_path)
        assert finished.returncode == 0, finished.stdout + finished.stderr
    two, one = (decode((tmp_path / f"weights-{num_ranks}").read_bytes()) for num_ranks in (2, 1))
    for name, value in two.items():
        torch.testing.assert_close(one[name], value, rtol=1e-10, atol=1e-12)
    states = [decode((tmp_path / f"state-{rank}").read_bytes()) for rank in (0, 1)]
    blocks = [state["optimizer"]["kfac"]["blocks"] for state in states]
    assert list(blocks[0]) == list(blocks[1])
    for name, block in blocks[0].items():
        for matrix, value in block["running"].items():
            assert torch.equal(value, blocks[1][name]["running"][matrix])
