"""For the tests of the curvature."""

import pytest
import torch


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks' sizes are those of one thread."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
