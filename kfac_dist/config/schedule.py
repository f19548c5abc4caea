"""The section `schedule`: a union by `kind`, each schedule of the learning rate with its own keys."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, ValidationInfo, field_validator

from kfac_dist.config.sections import Kind


class Schedule(Kind):
    """The learning rate over the epochs."""


class PolynomialSchedule(Schedule):
    """Eq. 15: constant up to `start_epoch`, then a polynomial that is zero at `end_epoch`."""

    kind: Literal["polynomial"]
    power: PositiveFloat
    """Of the polynomial: p_decay of Eq. 15."""
    start_epoch: NonNegativeFloat
    """Where the learning rate begins to fall."""
    end_epoch: PositiveFloat
    """Where it is zero."""
    warmup_epochs: NonNegativeFloat = 0.0
    """Epochs over which it rises from zero first."""

    @field_validator("end_epoch")
    @classmethod
    def _check_end(cls, end_epoch: float, info: ValidationInfo) -> float:
        start_epoch = info.data.get("start_epoch")
        if start_epoch is not None and end_epoch <= start_epoch:
            raise ValueError(f"must be > schedule.start_epoch = {start_epoch}")
        return end_epoch


class CosineSchedule(Schedule):
    """Half a cosine that is zero at `end_epoch`."""

    kind: Literal["cosine"]
    end_epoch: PositiveFloat
    """Where the learning rate is zero."""
    warmup_epochs: NonNegativeFloat = 0.0
    """Epochs over which it rises from zero first."""

    @field_validator("warmup_epochs")
    @classmethod
    def _check_warmup(cls, warmup_epochs: float, info: ValidationInfo) -> float:
        end_epoch = info.data.get("end_epoch")
        if end_epoch is not None and warmup_epochs >= end_epoch:
            raise ValueError(f"must be < schedule.end_epoch = {end_epoch}")
        return warmup_epochs


class OneCycleSchedule(Schedule):
    """A triangle: from 1/25 of the learning rate linearly up to it, then linearly down to zero at `end_epoch`.

    1/25 is where torch's OneCycleLR starts.
    """

    kind: Literal["one_cycle"]
    end_epoch: PositiveFloat
    """Epoch at which the learning rate is zero."""
    rising: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Share of the epochs up to `end_epoch` in which it rises."""


class ConstantSchedule(Schedule):
    """The initial learning rate throughout."""

    kind: Literal["constant"]
    warmup_epochs: NonNegativeFloat = 0.0
    """Epochs over which the learning rate rises from zero first."""


ScheduleConfig = Annotated[
    PolynomialSchedule | CosineSchedule | OneCycleSchedule | ConstantSchedule, Field(discriminator="kind")
]
