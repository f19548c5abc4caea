"""The `kfac` section of a configuration: damping, form of the Fisher, and when it is refreshed."""

import math
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationInfo, field_validator

from kfac_dist.config.sections import KeyProblem, Kind, Patterns, Section
from kfac_dist.vocabulary import BatchNormForm


def damping_decay_rate(initial: float, target: float, warmup_steps: int) -> float:
    """Share of the way to its target that the damping goes in each iteration (alpha of Eq. 13-14).

    Args:
        initial: gamma(0), > 0.
        target: gamma_target, > 0, at most `initial`.
        warmup_steps: t_warmup in iterations, at least 2 log10(initial / target). Thus 0 goes only with constant
            damping, `initial` equal to `target`.

    Returns:
        2 log10(initial / target) / warmup_steps, in [0, 1]. Outside of these bounds the damping would grow without
        bound or turn negative.

    Raises:
        KeyProblem: If the settings are outside these ranges.
    """
    if target > initial:
        raise KeyProblem("target", f"must be <= kfac.damping.initial = {initial}", target)
    least = 2.0 * (math.log10(initial) - math.log10(target))
    if warmup_steps < least:
        rule = (
            f"must be >= {math.ceil(least)} for a damping that goes from {initial} to {target}"
            " (to keep it constant: 0, and target equal to initial)"
        )
        raise KeyProblem("warmup_steps", rule, warmup_steps)
    return least / warmup_steps if least else 0.0


class DampingConfig(Section):
    """Eq. 13: damping falls from `initial` towards `target`, at a rate set by `warmup_steps` iterations.

    With `warmup_steps` 0 the damping is constant.
    """

    initial: PositiveFloat
    """γ of the first iteration."""
    target: PositiveFloat
    """γ that it falls towards; at most `initial`."""
    warmup_steps: NonNegativeInt
    """t_warmup of Eq. 13, in iterations: how fast it falls."""
    batchnorm_ratio: Annotated[float, Field(ge=1)]
    """ρ_BN: BatchNorm is damped with this times γ."""

    @field_validator("warmup_steps")
    @classmethod
    def _check_rate(cls, warmup_steps: int, info: ValidationInfo) -> int:
        if "initial" in info.data and "target" in info.data:
            damping_decay_rate(info.data["initial"], info.data["target"], warmup_steps)
        return warmup_steps


class IntervalMultiplierConfig(Section):
    """Factors on the refresh interval of a kind of matrix; A changes less than G and may be refreshed less often."""

    input_factor: PositiveInt = 1
    """On the interval of A."""
    output_factor: PositiveInt = 1
    """On the interval of G."""
    batchnorm: PositiveInt = 1
    """On the interval of BatchNorm's F."""


class Refresh(Kind):
    """When the Fisher's matrices are refreshed."""


class EveryRefresh(Refresh):
    """Refresh every `interval` iterations."""

    schedule: Literal["every"]
    interval: PositiveInt = 1
    """Iterations from one refresh to the next."""
    interval_multiplier: IntervalMultiplierConfig = IntervalMultiplierConfig()
    """Factors on it for each kind of matrix."""


class PaperRefresh(Refresh):
    """Eq. 20 or 21, by epoch, after so many iterations with a refresh each."""

    schedule: Literal["eq20", "eq21"]
    """Eq. 20 or Eq. 21 of the paper."""
    after_iteration: NonNegativeInt = 500
    """Until here every iteration refreshes."""
    interval_multiplier: IntervalMultiplierConfig = IntervalMultiplierConfig()
    """Factors on the interval for each kind of matrix."""


class AdaptiveRefresh(Refresh):
    """Each matrix at its own interval, which grows while its relative change stays under a threshold."""

    schedule: Literal["adaptive"]
    threshold: PositiveFloat
    """Diff (Eq. 19) up to which a matrix's interval grows; above, it is halved."""
    max_interval: PositiveInt = 20
    """Longest interval, in iterations."""
    after_iteration: NonNegativeInt = 0
    """Until here every iteration refreshes."""


RefreshConfig = EveryRefresh | PaperRefresh | AdaptiveRefresh


class MonitorConfig(Section):
    """What `fisher` records tell: Diff at each refresh; eigenvalue range and effective rank at each evaluation."""

    diff: bool = False
    """Record Diff (Eq. 19) of each refreshed matrix."""
    spectrum: bool = False
    """Record eigenvalue range and effective rank at each evaluation."""


class KfacConfig(Section):
    """What K-FAC needs beyond the `optimizer` section."""

    damping: DampingConfig
    batchnorm: BatchNormForm = "diagonal"
    """Which entries of BatchNorm's Fisher are kept."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the old Fisher in its running average; null keeps the newest only, as the paper does."""
    sample_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of each slot's samples, rounded up, that A and G are computed from; all serve BatchNorm's F."""
    refresh: Annotated[RefreshConfig, Field(discriminator="schedule")] = EveryRefresh(schedule="every")
    skip: Patterns = ()
    """Shell-style patterns of module names that get the plain gradient."""
    monitor: MonitorConfig = MonitorConfig()
