"""The `kfac` section of a configuration: damping, form of the Fisher, and when it is refreshed."""

import math
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationInfo, field_validator

from kfac_dist.config.sections import Patterns, Section


class DampingConfig(Section):
    """Eq. 13: damping falls from `initial` towards `target`, at a rate set by `warmup_steps` iterations.

    With `warmup_steps` 0 the damping is constant.
    """

    initial: PositiveFloat
    target: PositiveFloat
    warmup_steps: NonNegativeInt
    batchnorm_ratio: Annotated[float, Field(ge=1)]

    @field_validator("target")
    @classmethod
    def _check_target(cls, target: float, info: ValidationInfo) -> float:
        initial = info.data.get("initial")
        if initial is not None and target > initial:
            raise ValueError(f"must be <= kfac.damping.initial = {initial}")
        return target

    @field_validator("warmup_steps")
    @classmethod
    def _check_rate(cls, warmup_steps: int, info: ValidationInfo) -> int:
        initial, target = info.data.get("initial"), info.data.get("target")
        if initial is None or target is None:
            return warmup_steps
        # alpha = total / warmup_steps is the share of the way to the target that one step takes: at most all of it.
        total = 2 * (math.log10(initial) - math.log10(target))
        if total > warmup_steps:
            raise ValueError(
                f"must be >= {math.ceil(total)} for a damping that goes from {initial} to {target}"
                " (to keep it constant: 0, and target equal to initial)"
            )
        return warmup_steps


class IntervalMultiplierConfig(Section):
    """Factors on the refresh interval of a kind of matrix; A changes less than G and may be refreshed less often."""

    input_factor: PositiveInt = 1
    output_factor: PositiveInt = 1
    batchnorm: PositiveInt = 1


class EveryRefresh(Section):
    """Refresh every `interval` iterations."""

    schedule: Literal["every"]
    interval: PositiveInt = 1
    interval_multiplier: IntervalMultiplierConfig = IntervalMultiplierConfig()


class PaperRefresh(Section):
    """Eq. 20 or 21, by epoch, after so many iterations with a refresh each."""

    schedule: Literal["eq20", "eq21"]
    after_iteration: NonNegativeInt = 500
    interval_multiplier: IntervalMultiplierConfig = IntervalMultiplierConfig()


class AdaptiveRefresh(Section):
    """Each matrix at its own interval, which grows while its relative change stays under a threshold."""

    schedule: Literal["adaptive"]
    threshold: PositiveFloat
    max_interval: PositiveInt = 20
    after_iteration: NonNegativeInt = 0


RefreshConfig = EveryRefresh | PaperRefresh | AdaptiveRefresh


class MonitorConfig(Section):
    """What `fisher` records tell: Diff at each refresh; eigenvalue range and effective rank at each evaluation."""

    diff: bool = False
    spectrum: bool = False


class KfacConfig(Section):
    """What K-FAC needs beyond the `optimizer` section."""

    damping: DampingConfig
    batchnorm: Literal["full", "unit", "diagonal"] = "diagonal"
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    refresh: Annotated[RefreshConfig, Field(discriminator="schedule")] = EveryRefresh(schedule="every")
    skip: Patterns = ()
    monitor: MonitorConfig = MonitorConfig()
