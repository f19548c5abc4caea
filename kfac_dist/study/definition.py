"""A study as its YAML file defines it: recipe, models, batch sizes, budget, optimizers and grids, seeds, targets.

Validated as a configuration is: all problems at once, each as the dotted key, the rule and the value found.
"""

import math
from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    Field,
    PlainValidator,
    PositiveFloat,
    PositiveInt,
    Strict,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from kfac_dist.config import strict_yaml
from kfac_dist.config.load import apply_overrides_
from kfac_dist.config.messages import describe
from kfac_dist.config.recipes import recipes
from kfac_dist.config.sections import Kind, Section, Text
from kfac_dist.errors import InputError
from kfac_dist.vocabulary import FinalMetric

SMALLEST_BATCH = 128


_Sized = TypeVar("_Sized", bound=Sized)


def _check_batch_size(size: int) -> int:
    if size < SMALLEST_BATCH or size & (size - 1):
        raise ValueError(f"must be a power of two >= {SMALLEST_BATCH}")
    return size


def _check_distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise ValueError("must not hold a value twice")
    return _check_some(values)


def _check_some(values: _Sized) -> _Sized:
    if not len(values):
        raise ValueError("must not be empty")
    return values


def _check_number(value: object) -> int | float:
    """Of pydantic's own union of the two each problem would be told twice, under keys that the file does not have."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("must be a number")
    return value


# Strict(False) lets a YAML list stand for the tuple; what is in it stays strict.
Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")]
Number = Annotated[int | float, PlainValidator(_check_number)]
# An integer stays one, for keys such as kfac.refresh.interval.
Values = Annotated[tuple[Number, ...], Strict(False), AfterValidator(_check_distinct)]
Models = Annotated[tuple[Text, ...], Strict(False), AfterValidator(_check_distinct)]
BatchSize = Annotated[int, AfterValidator(_check_batch_size)]
BatchSizes = Annotated[tuple[BatchSize, ...], Strict(False), AfterValidator(_check_distinct)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Seeds = Annotated[tuple[Seed, ...], Strict(False), AfterValidator(_check_distinct)]


class Axis(Section):
    """One dimension of a grid: a dotted key and its values, listed, or evenly spaced in the logarithm."""

    key: Text
    values: Values | None = None
    lowest: PositiveFloat | None = None
    highest: PositiveFloat | None = None
    count: Annotated[PositiveInt | None, Field(validate_default=True)] = None

    @field_validator("count")
    @classmethod
    def _check_one_form(cls, count: int | None, info: ValidationInfo) -> int | None:
        if not {"values", "lowest", "highest"} <= info.data.keys():
            return count  # one of them is wrong, and told
        lowest, highest = info.data["lowest"], info.data["highest"]
        if info.data["values"] is not None:
            if (lowest, highest, count) != (None, None, None):
                raise ValueError("must be left out, with lowest and highest, where values are listed")
        elif lowest is None or highest is None or count is None or lowest >= highest or count < 2:
            raise ValueError("must be >= 2, with lowest < highest, where no values are listed")
        return count

    def points(self) -> tuple[int | float, ...]:
        """The values, to 6 significant digits where they are computed; integers where all that are listed are."""
        if self.values is not None:
            whole = all(isinstance(value, int) for value in self.values)
            return self.values if whole else tuple(map(float, self.values))
        assert self.lowest is not None
        assert self.highest is not None
        assert self.count is not None
        step = math.log(self.highest / self.lowest) / (self.count - 1)
        return tuple(float(f"{self.lowest * math.exp(step * number):.6g}") for number in range(self.count))


class Link(Section):
    """A key that follows another key of the trial, or `iterations`, the length of its run.

    `times` that number, at least `at_least`; a multiple of an integer is rounded to an integer.
    """

    of: Text
    times: PositiveFloat = 1.0
    at_least: PositiveFloat | None = None


class Budget(Kind):
    """How long a trial trains."""

    rule: str


class AdjustedEpochs(Budget):
    """(log2(batch / 128) + 1) times `base` epochs, as in the AAAI 2020 study."""

    rule: Literal["adjusted_epochs"]
    base: PositiveFloat


class FixedEpochs(Budget):
    """So many epochs, whatever the batch size."""

    rule: Literal["fixed_epochs"]
    epochs: PositiveFloat


class FixedIterations(Budget):
    """So many updates, whatever the batch size."""

    rule: Literal["fixed_iterations"]
    iterations: PositiveInt


class OptimizerStudy(Section):
    """A column of the study: what differs from the recipe, and the grid.

    `settings` are dotted keys of a configuration, or whole sections; `grid` names parameters.
    """

    settings: dict[str, Any] = Field(default_factory=dict)
    grid: Annotated[dict[Label, Axis], AfterValidator(_check_some)]
    linked: dict[str, Link] = Field(default_factory=dict)


class Best(Section):
    """More seeds for the best configuration of each model, optimizer and batch size: by final value, first seed."""

    seeds: Seeds
    by: FinalMetric = "test_top1"


class Target(Section):
    """A value to be reached: a mean training loss from above, or a test accuracy (a fraction) from below."""

    metric: FinalMetric
    value: PositiveFloat

    @field_validator("value")
    @classmethod
    def _check_fraction(cls, value: float, info: ValidationInfo) -> float:
        if info.data.get("metric") == "test_top1" and value > 1:
            raise ValueError("must be a fraction, at most 1, where metric is test_top1")
        return value

    @property
    def name(self) -> str:
        """Such as ``train_loss<=0.5``."""
        return f"{self.metric}{'<=' if self.metric == 'train_loss' else '>='}{self.value:g}"


class Study(Section):
    """A whole, valid study."""

    name: Label
    recipe: dict[str, Any]
    models: Models
    batch_sizes: BatchSizes
    budget: Annotated[AdjustedEpochs | FixedEpochs | FixedIterations, Field(discriminator="rule")]
    optimizers: Annotated[dict[Label, OptimizerStudy], AfterValidator(_check_some)]
    linked: dict[str, Link] = Field(default_factory=dict)
    seeds: Seeds = (0,)
    best: Best | None = None
    targets: Annotated[tuple[Target, ...], Strict(False)] = ()

    def to_yaml(self) -> str:
        """The whole study, its recipe included, as YAML that reads back as the same."""
        return strict_yaml.dump(self.model_dump(mode="json"))


def load_study(path: Path, overrides: Sequence[str] = ()) -> Study:
    """Read a study's file, put its recipe in, apply overrides, and validate the result.

    Args:
        path: YAML file. Its `recipe` is a mapping, the path of a configuration, from the file's folder, or the name
            of a recipe, such as ``quickstart``.
        overrides: ``dotted.key=value`` each, such as ``recipe.data.root=/data``.

    Raises:
        InputError: If a file cannot be read, or naming every other problem at once, one on a line.
    """
    settings = strict_yaml.read_mapping(path)
    recipe = settings.get("recipe")
    if isinstance(recipe, str):
        beside, named = path.parent / recipe, recipes().get(recipe)
        settings["recipe"] = strict_yaml.read_mapping(beside if named is None or beside.is_file() else named)
    problems = apply_overrides_(settings, overrides)
    try:
        study = Study.model_validate(settings)
    except ValidationError as error:
        problems += [describe(problem, Study) for problem in error.errors(include_url=False)]
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise InputError(f"{path}: {count} in this study:\n  " + "\n  ".join(problems))
    return study
