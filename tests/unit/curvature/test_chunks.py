"""A batch is cut for a CPU's cache, and nowhere else."""

import pytest
import torch

from kfac_dist.curvature import chunks
from kfac_dist.curvature.chunks import sample_chunks, sum_over


@pytest.mark.parametrize(
    ("numel", "sizes"), [(1, [1, 1, 1, 1, 1]), (11, [1, 1, 1, 1, 1]), (12, [2, 2, 1]), (29, [4, 1]), (30, [5])]
)
def test_chunks_have_up_to_so_many_values_or_one_sample(numel, sizes, one_thread):
    samples = torch.arange(30.0).view(5, 3, 2)
    parts = sample_chunks(samples, numel)
    assert [len(part) for part in parts] == sizes
    assert torch.equal(torch.cat(parts), samples)


def test_each_thread_gets_its_share(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert [len(part) for part in sample_chunks(torch.zeros(8, 4), 4)] == [3, 3, 2]
    monkeypatch.setattr(chunks, "CACHED_NUMEL", 8)
    assert [len(part) for part in sample_chunks(torch.zeros(8, 4))] == [6, 2]


def test_no_chunk_is_smaller_than_what_it_adds_to(one_thread):
    samples = torch.zeros(8, 4)
    assert [len(part) for part in sample_chunks(samples, 4, sum_numel=12)] == [3, 3, 2]
    assert [len(part) for part in sample_chunks(samples, 16, sum_numel=12)] == [4, 4]


def test_other_devices_take_the_batch_whole():
    samples = torch.zeros(8, 4, device="meta")
    (whole,) = sample_chunks(samples, 1)
    assert whole is samples


def test_a_sum_changes_nothing_that_it_is_given():
    parts = (torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([4.0]))
    assert sum_over(parts, torch.Tensor.clone).item() == 7
    assert [part.item() for part in parts] == [1, 2, 4]
