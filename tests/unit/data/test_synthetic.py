"""The data set `synthetic`: shapes, and that an image depends on its index alone."""

import pytest
import torch

from kfac_dist.config.data import SyntheticConfig
from kfac_dist.config.schema import AugmentConfig
from kfac_dist.data.create import create_dataset, describe_dataset
from kfac_dist.data.sampling import SlotSampler
from kfac_dist.data.synthetic import SyntheticDataset

CONFIG = SyntheticConfig.model_validate(
    {"name": "synthetic", "synthetic": {"shape": [2, 5, 7], "num_classes": 4, "num_train": 30, "num_eval": 11}}
)


def make(seed: int = 0) -> SyntheticDataset:
    made = create_dataset(CONFIG, AugmentConfig(), torch.device("cpu"), torch.float64, seed)
    assert isinstance(made, SyntheticDataset)
    return made


def test_sizes() -> None:
    made = make()
    assert (made.num_train, made.num_eval, made.num_classes, made.image_shape) == (30, 11, 4, (2, 5, 7))
    described = describe_dataset(CONFIG)
    assert (described.num_train, described.num_classes, described.image_shape) == (30, 4, (2, 5, 7))


def test_an_image_depends_on_its_index_and_the_seed() -> None:
    made, sampler = make(), SlotSampler(30, 6, 5, seed=3)
    seen: dict[int, torch.Tensor] = {}
    for num_ranks in (1, 5):
        for rank in range(num_ranks):
            batches = made.train_batches(sampler, rank, num_ranks, 0, 3)
            for iteration in range(3):
                for slot in sampler.local_slots(rank, num_ranks):
                    batch = next(batches)
                    images, labels = batch.images, batch.labels
                    assert (batch.iteration, batch.slot) == (iteration, slot)
                    assert (images.dtype, images.shape) == (torch.float64, (6, 2, 5, 7))
                    for index, image, label in zip(sampler.indices(iteration, slot), images, labels, strict=True):
                        assert label == index % 4
                        assert torch.equal(image, seen.setdefault(int(index), image))
    assert len(seen) == 30
    assert len(torch.stack(list(seen.values())).flatten(1).unique(dim=0)) == 30
    first = next(make(1).train_batches(sampler, 0, 1, 0, 1)).images[0]
    assert not torch.equal(first, seen[int(sampler.indices(0, 0)[0])])


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 20])
def test_evaluation_covers_all_once(num_ranks: int) -> None:
    batches = [batch for rank in range(num_ranks) for batch in make().eval_batches(rank, num_ranks, 4)]
    images, labels = (torch.cat([batch[part] for batch in batches]) for part in (0, 1))
    assert labels.tolist() == [(30 + index) % 4 for index in range(11)]
    assert torch.equal(images, torch.cat([batch[0] for batch in make().eval_batches(0, 1, 100)]))
