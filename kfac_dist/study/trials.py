"""From a study to its trials: every configuration in full, in the order in which they are run."""

import copy
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from kfac_dist.config.dotted import leaves, section_of_, value_at
from kfac_dist.config.load import create_config
from kfac_dist.config.schema import Config
from kfac_dist.data.create import describe_dataset
from kfac_dist.data.sampling import SlotSampler
from kfac_dist.errors import InputError
from kfac_dist.models import create_model
from kfac_dist.study.definition import SMALLEST_BATCH, AdjustedEpochs, FixedEpochs, Link, OptimizerStudy, Study

ITERATIONS = "iterations"
"""What a link may follow besides keys: the length of the trial's run."""

_DEFAULTS = {
    # A trial that diverged is a result, nothing to be repaired; and one checkpoint is enough to go on from.
    "train.max_restores": 0,
    "checkpoint": {"every_minutes": 2.0, "keep": 1, "keep_best": False},
}

_OWN_KEYS = {
    "run.seed": "seeds and best.seeds",
    "model.name": "models",
    "batch.global_size": "batch_sizes",
    "train.epochs": "budget",
}
"""What the study itself sets in every trial, and by which of its keys."""


@dataclass(frozen=True)
class Trial:
    """A line of the manifest.

    Attributes:
        index: Its number, from 0.
        model: Of `Study.models`.
        optimizer: The study's label.
        batch_size: Of `Study.batch_sizes`.
        seed: Of the run.
        parameters: Value of each axis of the grid; None for the best of others.
        config: The configuration, a mapping that `create_config` takes; likewise.
        best_of: Of which trials the best configuration is run again with this seed; None where it is in `config`.
    """

    index: int
    model: str
    optimizer: str
    batch_size: int
    seed: int
    parameters: dict[str, float] | None
    config: dict[str, Any] | None
    best_of: list[int] | None

    def to_dict(self) -> dict[str, Any]:
        """As the manifest holds it."""
        return asdict(self)


def plan_trials(study: Study) -> list[Trial]:
    """All trials of a study.

    Raises:
        InputError: If there is no such model, or columns give keys that are not theirs; or naming each problem of the
            trials' configurations once an optimizer, with the first trial that has it, and how many have any.
    """
    trials: list[Trial] = []
    problems: dict[tuple[str, str], list[str]] = {}
    _check_keys(study)
    data = describe_dataset(create_config(_minimal(study.recipe), "the study's recipe").data)
    for name in study.models:
        create_model(name, data.num_classes, data.image_shape, seed=0)
    num_train = data.num_train
    cells = itertools.product(study.models, study.batch_sizes, study.optimizers)
    for model, batch_size, label in cells:
        first_seed: list[int] = []
        for seed, parameters in itertools.product(study.seeds, _grid(study.optimizers[label])):
            index = len(trials)
            config: dict[str, Any] = {}
            try:
                valid = trial_config(study, model, batch_size, label, parameters, seed, num_train)
                config = valid.model_dump(mode="json")
            except InputError as error:
                trial = f"model {model}, batch {batch_size}, {label}, {parameters}, seed {seed}"
                problems.setdefault((label, str(error)), []).append(trial)
            if seed == study.seeds[0]:
                first_seed.append(index)
            trials.append(Trial(index, model, label, batch_size, seed, parameters, config, None))
        if study.best is not None:
            for seed in study.best.seeds:
                if seed in study.seeds:
                    raise InputError(f"best.seeds must not hold a seed of seeds = {study.seeds}, got {seed}")
                trials.append(Trial(len(trials), model, label, batch_size, seed, None, None, first_seed))
    if problems:
        count = sum(map(len, problems.values()))
        each = "\n".join(f"{affected[0]}: {problem}" for (_, problem), affected in problems.items())
        raise InputError(f"{count} of {len(trials)} trials cannot be run; the first:\n{each}")
    return trials


def trial_config(
    study: Study, model: str, batch_size: int, label: str, parameters: Mapping[str, float], seed: int, num_train: int
) -> Config:
    """The configuration of a trial, whose data have so many training images.

    Raises:
        InputError: If it is not valid.
    """
    optimizer = study.optimizers[label]
    settings = copy.deepcopy(study.recipe)
    for key, value in _DEFAULTS.items():
        if value_at(settings, key) is None:
            _set_(settings, key, copy.deepcopy(value))
    for key, value in optimizer.settings.items():
        _set_(settings, key, copy.deepcopy(value))
    for name, value in parameters.items():
        _set_(settings, optimizer.grid[name].key, value)
    for key, value in {
        "run.name": "run", "run.seed": seed, "model.name": model, "batch.global_size": batch_size,
    }.items():  # fmt: skip
        _set_(settings, key, value)
    epochs = budget_epochs(study, batch_size, num_train)
    _set_(settings, "train.epochs", epochs)
    num_iterations = SlotSampler(num_train, batch_size, 1, seed=0).num_iterations(epochs)
    for key, link in {**study.linked, **optimizer.linked}.items():
        _set_(settings, key, _follow(link, settings, num_iterations))
    return create_config(settings, "its configuration")


def budget_epochs(study: Study, batch_size: int, num_train: int) -> float:
    """Epochs of a trial by the study's budget rule.

    Args:
        study: The study.
        batch_size: Of the trial.
        num_train: Training images.
    """
    budget = study.budget
    if isinstance(budget, AdjustedEpochs):
        return (math.log2(batch_size / SMALLEST_BATCH) + 1) * budget.base
    if isinstance(budget, FixedEpochs):
        return budget.epochs
    epochs = budget.iterations * batch_size / num_train
    sampler = SlotSampler(num_train, batch_size, 1, seed=0)
    while sampler.num_iterations(epochs) > budget.iterations:  # the nearest decimal may be a little more
        epochs = math.nextafter(epochs, 0.0)
    return epochs


def _grid(optimizer: OptimizerStudy) -> Iterator[dict[str, float]]:
    names = list(optimizer.grid)
    for values in itertools.product(*(axis.points() for axis in optimizer.grid.values())):
        yield dict(zip(names, values, strict=True))


def _follow(link: Link, settings: Mapping[str, Any], num_iterations: int) -> float:
    source = num_iterations if link.of == ITERATIONS else value_at(settings, link.of)
    if isinstance(source, bool) or not isinstance(source, int | float):
        raise InputError(f"linked: of must be {ITERATIONS} or a key that is a number, got {link.of} = {source!r}")
    value = source * link.times
    value = max(value, link.at_least) if link.at_least is not None else value
    return round(value) if isinstance(source, int) else value


def _set_(settings: dict[str, Any], key: str, value: object) -> None:
    section_of_(settings, key, key)[key.rpartition(".")[2]] = value


def _check_keys(study: Study) -> None:
    """All columns train on the same images, and each key of a column has one source: no value is silently lost."""
    problems = []
    for label, optimizer in study.optimizers.items():
        links = {**study.linked, **optimizer.linked}
        settings, grid = list(leaves(optimizer.settings)), [axis.key for axis in optimizer.grid.values()]
        for key in dict.fromkeys([*settings, *grid, *links]):
            if key.partition(".")[0] == "data":
                problems.append(f"optimizers.{label} must leave the data as they are in recipe.data, got {key}")
            elif key in _OWN_KEYS:
                problems.append(f"optimizers.{label} must leave {key} to {_OWN_KEYS[key]} of the study, which sets it")
            elif key in links and (key in settings or key in grid):
                problems.append(f"optimizers.{label} must have {key} in settings, in grid or in linked, not in two")
            elif grid.count(key) > 1:
                problems.append(f"optimizers.{label}.grid must not have {key} twice")
        later = list(links)
        for key, link in links.items():
            later.remove(key)
            if link.of in later:
                problems.append(f"linked: {key} must come after {link.of}, which it follows and which is linked too")
    if problems:
        raise InputError("\n".join(dict.fromkeys(problems)))


def _minimal(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A valid configuration with the data of these settings."""
    return {
        "run": {"name": "run"},
        "data": settings.get("data"),
        "model": {"name": "any"},
        "batch": {"global_size": 1, "per_rank": 1},
        "train": {"epochs": 1},
        "optimizer": {"name": "sgd", "learning_rate": 1.0, "momentum": 0.0},
        "schedule": {"kind": "constant"},
    }
