"""The ImageNet recipes against Tables 1 and 3 of the paper, typed in here on their own."""

import math

import pytest

from kfac_dist.config.load import load_config
from kfac_dist.data.create import describe_dataset
from kfac_dist.data.sampling import SlotSampler
from tests.paths import CONFIGS

FOLDER = CONFIGS / "imagenet"
NUM_TRAIN = 1_281_167

# batch: mixup alpha, initial and target damping, BatchNorm ratio, warm-up steps, power, start and end epoch, initial
# learning rate and momentum, epochs, iterations
TABLE = {
    4096: (0.4, 2.5e-2, 2.5e-4, 16, 313, 11.0, 1, 53, 8.18e-3, 0.997, 35, 10_948),
    8192: (0.4, 2.5e-2, 2.5e-4, 16, 157, 8.0, 1, 53.5, 1.25e-2, 0.993, 35, 5_474),  # the paper prints 5,434
    16384: (0.4, 2.5e-2, 2.5e-4, 32, 79, 8.0, 1, 53.5, 2.5e-2, 0.985, 35, 2_737),
    32768: (0.6, 2.0e-2, 2.0e-4, 16, 59, 3.5, 1.5, 49.5, 3.0e-2, 0.97, 45, 1_760),
    65536: (0.6, 1.5e-2, 1.5e-4, 16, 40, 2.9, 2, 64.5, 4.0e-2, 0.95, 60, 1_173),
    131072: (1.0, 1.0e-2, 1.0e-4, 8, 30, 2.9, 3, 107.6, 7.0e-2, 0.93, 100, 978),
}


def recipe(prefix: str, batch: int):
    return load_config(FOLDER / f"{prefix}bs{batch // 1024}k.yaml")


@pytest.mark.parametrize("batch", TABLE)
def test_recipe_has_the_values_of_table_3(batch: int) -> None:
    config = recipe("", batch)
    damping, schedule, optimizer = config.kfac.damping, config.schedule, config.optimizer
    assert (config.batch.global_size, config.batch.per_rank) == (batch, 32)
    assert TABLE[batch][:-1] == (
        config.augment.mixup_alpha, damping.initial, damping.target, damping.batchnorm_ratio, damping.warmup_steps,
        schedule.power, schedule.start_epoch, schedule.end_epoch, optimizer.learning_rate, optimizer.momentum,
        config.train.epochs,
    )  # fmt: skip
    assert schedule.kind == "polynomial"
    assert schedule.warmup_epochs == 0
    assert (config.model.name, optimizer.name, config.weight_rescaling) == ("resnet50", "kfac", "always")
    assert optimizer.weight_decay == config.train.label_smoothing == 0
    assert (config.data.name, config.data.preprocessing, config.data.image_size) == ("imagenet", "paper", 224)
    erasing = config.augment.erasing
    assert (erasing.probability, erasing.area, erasing.aspect) == (0.5, (0.02, 0.25), (0.3, 1.0))
    assert config.augment.flip
    assert config.kfac.batchnorm == "diagonal"
    assert config.kfac.ema_decay is None


@pytest.mark.parametrize("batch", TABLE)
def test_iterations_are_those_of_table_1(batch: int) -> None:
    config = recipe("", batch)
    assert describe_dataset(config.data).num_train == NUM_TRAIN
    sampler = SlotSampler(NUM_TRAIN, 32, batch // 32, seed=0)
    assert sampler.num_iterations(config.train.epochs) == TABLE[batch][-1]
    assert TABLE[batch][-1] == math.ceil(config.train.epochs * NUM_TRAIN / batch)


@pytest.mark.parametrize("batch", TABLE)
def test_sgd_baseline(batch: int) -> None:
    config = recipe("sgd_", batch)
    assert (config.batch.global_size, config.batch.per_rank) == (batch, 32)
    assert config.optimizer.learning_rate == pytest.approx(0.1 * batch / 256, rel=1e-12)
    assert (config.optimizer.name, config.optimizer.momentum, config.optimizer.weight_decay) == ("sgd", 0.9, 1e-4)
    assert (config.train.epochs, config.schedule.warmup_epochs, config.schedule.end_epoch) == (90, 5, 90)
    assert config.model.zero_init_last_gamma


def test_there_is_a_file_for_each_batch_size_and_no_other() -> None:
    expected = {f"{prefix}bs{batch // 1024}k.yaml" for batch in TABLE for prefix in ("", "sgd_")}
    assert {path.name for path in FOLDER.iterdir()} == expected
    names = [load_config(FOLDER / name).run.name for name in expected]
    assert len(set(names)) == len(names)
