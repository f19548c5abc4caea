"""What changes over a run: learning rate, momentum and damping by epoch or step (Eq. 13-16), and when to evaluate.

An epoch is fractional: iteration t of a run over N samples with a global batch of B is at epoch t*B/N.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, assert_never

from kfac_dist.config.kfac import damping_decay_rate
from kfac_dist.config.schedule import ScheduleConfig
from kfac_dist.config.schema import Config
from kfac_dist.data.sampling import SlotSampler


def polynomial_decay(epoch: float, initial: float, power: float, start: float, end: float) -> float:
    """Polynomial decay from `initial` to 0 between two epochs (Eq. 15).

    Args:
        epoch: Fractional epoch, >= 0.
        initial: Value up to and including `start`.
        power: Exponent p_decay, > 0.
        start: Epoch at which the decay starts.
        end: Epoch from which the value is 0, > `start`.

    Returns:
        initial * (1 - (epoch - start) / (end - start)) ** power, held constant outside [start, end].
    """
    progress = min(max((epoch - start) / (end - start), 0.0), 1.0)
    return initial * math.pow(1.0 - progress, power)


def cosine_decay(epoch: float, initial: float, end: float) -> float:
    """Half a cosine from `initial` at epoch 0 to 0 at epoch `end`, and 0 after it.

    Args:
        epoch: Fractional epoch, >= 0.
        initial: Value at epoch 0.
        end: Epoch from which the value is 0, > 0.
    """
    return 0.5 * initial * (1.0 + math.cos(math.pi * min(epoch / end, 1.0)))


ONE_CYCLE_START = 1 / 25
"""Share of its peak at which a one-cycle schedule starts."""


def one_cycle(epoch: float, peak: float, rising: float, end: float) -> float:
    """A triangle: linear from `peak` / 25 at epoch 0 to `peak`, then linear to 0 at epoch `end`, and 0 after it.

    Args:
        epoch: Fractional epoch, >= 0.
        peak: Largest value.
        rising: Share of the epochs up to `end` in which the value rises, in (0, 1).
        end: Epoch from which the value is 0, > 0.
    """
    progress = min(epoch / end, 1.0)
    if progress < rising:
        return peak * (ONE_CYCLE_START + (1.0 - ONE_CYCLE_START) * progress / rising)
    return peak * (1.0 - progress) / (1.0 - rising)


def warmup_factor(epoch: float, warmup_epochs: float) -> float:
    """Linear warm-up: a factor that rises from 0 at epoch 0 to 1 at epoch `warmup_epochs`.

    Args:
        epoch: Fractional epoch, >= 0.
        warmup_epochs: Length of the warm-up in epochs; 0 means none.
    """
    return min(epoch / warmup_epochs, 1.0) if warmup_epochs > 0 else 1.0


def coupled_momentum(learning_rate: float, initial_learning_rate: float, initial_momentum: float) -> float:
    """Momentum in a fixed ratio to the learning rate (Eq. 16).

    Args:
        learning_rate: eta(e), the learning rate of this step.
        initial_learning_rate: eta(0), > 0.
        initial_momentum: m(0).

    Returns:
        m(e) = m(0) / eta(0) * eta(e); exactly m(0) while the learning rate is the initial one.
    """
    return initial_momentum * (learning_rate / initial_learning_rate)


def damping_at(step: int, initial: float, target: float, warmup_steps: int) -> float:
    """Damping at an optimizer step (Eq. 13-14 iterated `step` times, in closed form).

    The recurrence gamma(t+1) = (1 - alpha) gamma(t) + alpha * target, with alpha from `damping_decay_rate`, multiplies
    the distance to the target by 1 - alpha at each step.

    Args:
        step: Number of updates made before this one, >= 0.
        initial: gamma(0), > 0.
        target: gamma_target, > 0, at most `initial`.
        warmup_steps: t_warmup, in updates, at least 2 log10(initial / target). Thus 0 goes only with constant
            damping, `initial` equal to `target`.

    Raises:
        KeyProblem: If the settings are outside these ranges.
    """
    rate = damping_decay_rate(initial, target, warmup_steps)
    return target + (initial - target) * (1.0 - rate) ** step


@dataclass(frozen=True)
class LearningRateSchedule:
    """Learning rate as a function of the fractional epoch.

    Attributes:
        decay: The learning rate without warm-up at an epoch.
        warmup_epochs: Length of the linear warm-up that multiplies it, in epochs; 0 means none.
    """

    decay: Callable[[float], float]
    warmup_epochs: float = 0.0

    @classmethod
    def from_config(cls, schedule: ScheduleConfig, initial_learning_rate: float) -> LearningRateSchedule:
        """The schedule that the `schedule` section of a configuration describes.

        Args:
            schedule: The `schedule` section.
            initial_learning_rate: eta(0), > 0; of a one-cycle schedule the peak.
        """
        decay: Callable[[float], float]
        if schedule.kind == "one_cycle":
            return cls(partial(one_cycle, peak=initial_learning_rate, rising=schedule.rising, end=schedule.end_epoch))
        if schedule.kind == "polynomial":
            decay = partial(
                polynomial_decay,
                initial=initial_learning_rate,
                power=schedule.power,
                start=schedule.start_epoch,
                end=schedule.end_epoch,
            )
        elif schedule.kind == "cosine":
            decay = partial(cosine_decay, initial=initial_learning_rate, end=schedule.end_epoch)
        elif schedule.kind == "constant":
            decay = partial(_constant, value=initial_learning_rate)
        else:
            assert_never(schedule)
        return cls(decay, schedule.warmup_epochs)

    def at(self, epoch: float) -> float:
        """Learning rate at a fractional epoch, >= 0."""
        return self.decay(epoch) * warmup_factor(epoch, self.warmup_epochs)


def _constant(epoch: float, value: float) -> float:
    del epoch  # every schedule is called with the epoch
    return value


@dataclass(frozen=True)
class Settings:
    """What an optimizer uses in one iteration.

    Attributes:
        learning_rate: eta of Eq. 15 and 17.
        momentum: m of Eq. 16 and 17; constant for other optimizers than K-FAC.
        damping: gamma of Eq. 12-14; 0 for other optimizers, which have none.
    """

    learning_rate: float
    momentum: float
    damping: float

    def apply_to(self, param_groups: Sequence[dict[str, Any]]) -> None:
        """Set those that a parameter group has; one with an `lr_ratio` gets so much of the learning rate."""
        for group in param_groups:
            learning_rate = self.learning_rate * group.get("lr_ratio", 1.0)
            settings = {"lr": learning_rate, "momentum": self.momentum, "damping": self.damping}
            group |= {name: value for name, value in settings.items() if name in group}


class Schedules:
    """A run's settings by iteration.

    Attributes:
        num_iterations: Length of the run.
    """

    def __init__(self, config: Config, sampler: SlotSampler) -> None:
        """Set up.

        Args:
            config: A validated configuration.
            sampler: Which samples make an iteration; gives the fractional epoch.

        Raises:
            KeyProblem: If the damping cannot fall as configured.
        """
        self.num_iterations = sampler.num_iterations(config.train.epochs)
        self.epoch_at = sampler.epoch_at
        self._config = config
        self._learning_rate = LearningRateSchedule.from_config(config.schedule, config.optimizer.learning_rate)
        self.settings(0)  # refuses what no iteration could use

    def settings(self, iteration: int) -> Settings:
        """Learning rate, momentum and damping of an iteration."""
        optimizer, kfac = self._config.optimizer, self._config.kfac
        learning_rate = self._learning_rate.at(self.epoch_at(iteration))
        if kfac is None:
            return Settings(learning_rate, optimizer.momentum, 0.0)
        damping = kfac.damping
        return Settings(
            learning_rate,
            coupled_momentum(learning_rate, optimizer.learning_rate, optimizer.momentum),
            damping_at(iteration, damping.initial, damping.target, damping.warmup_steps),
        )

    def evaluation_is_due(self, iteration: int) -> bool:
        """Whether to evaluate after an iteration: each `train.evaluate_every` epochs, and at the end."""
        return self._passes(iteration, self._config.train.evaluate_every) or iteration == self.num_iterations - 1

    def checkpoint_is_due(self, iteration: int) -> bool:
        """Whether to save after an iteration: each `checkpoint.every_epochs` epochs, and at the end."""
        every = self._config.checkpoint.every_epochs
        return (every is not None and self._passes(iteration, every)) or iteration == self.num_iterations - 1

    def _passes(self, iteration: int, every: float) -> bool:
        """Whether an iteration completes a multiple of so many epochs."""
        return math.floor(self.epoch_at(iteration + 1) / every) > math.floor(self.epoch_at(iteration) / every)
