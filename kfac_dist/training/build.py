"""The parts of a run as a configuration names them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from kfac_dist.communicator import Communicator
from kfac_dist.config.kfac import EveryRefresh, PaperRefresh, RefreshConfig
from kfac_dist.config.schema import Config
from kfac_dist.curvature.refresh_schedule import (
    AdaptiveRefresh,
    IntervalRefresh,
    RefreshSchedule,
    eq20_interval,
    eq21_interval,
)
from kfac_dist.optim.averaged import Averaging
from kfac_dist.optim.base import DistributedOptimizer
from kfac_dist.optim.baselines import LARS, AdamW, Muon
from kfac_dist.optim.kfac import KFAC, CommDtypes
from kfac_dist.optim.loss_scale import LossScaler
from kfac_dist.optim.sgd import SGD
from kfac_dist.optim.update import rescaled_weights
from kfac_dist.timing import StageTimer
from kfac_dist.training.precision import HALF_DTYPES
from kfac_dist.training.schedules import Schedules


@dataclass(frozen=True)
class Parts:
    """What an optimizer is made of besides the configuration.

    Attributes:
        model: The network, on its device.
        communicator: Collectives over the ranks.
        accumulation_steps: Backward passes for each step.
        schedules: Of the run; a refresh schedule may go by its epochs.
        timer: Charged with the stages' seconds.
        loss_scaler: What losses are scaled with, in fp16.
    """

    model: nn.Module
    communicator: Communicator
    accumulation_steps: int
    schedules: Schedules
    timer: StageTimer
    loss_scaler: LossScaler | None = None


def create_optimizer(config: Config, parts: Parts) -> DistributedOptimizer:
    """The optimizer that a configuration names; collective.

    Raises:
        InputError: If a pattern of kfac.skip matches no module.
    """
    return OPTIMIZERS[config.optimizer.name](config, parts)


def _create_sgd(config: Config, parts: Parts) -> SGD:
    settings = config.optimizer
    assert settings.name == "sgd"
    averaging = _averaging(config, parts)
    return SGD(
        parts.model,
        parts.communicator,
        _groups(config, parts),
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=settings.nesterov,
        weight_rescaling=averaging.weight_rescaling,
        loss_scaler=averaging.loss_scaler,
        gradient_comm_dtype=averaging.gradient_comm_dtype,
        timer=averaging.timer,
    )


def _create_muon(config: Config, parts: Parts) -> Muon:
    settings = config.optimizer
    assert settings.name == "muon"
    return Muon(
        parts.model,
        parts.communicator,
        _groups(config, parts),
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=settings.nesterov,
        newton_schulz_steps=settings.newton_schulz_steps,
        others_lr=settings.others_learning_rate,
        averaging=_averaging(config, parts),
    )


def _create_adamw(config: Config, parts: Parts) -> AdamW:
    settings = config.optimizer
    assert settings.name == "adamw"
    return AdamW(
        parts.model,
        parts.communicator,
        _groups(config, parts),
        lr=settings.learning_rate,
        betas=(settings.momentum, settings.beta2),
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
        averaging=_averaging(config, parts),
    )


def _create_lars(config: Config, parts: Parts) -> LARS:
    settings = config.optimizer
    assert settings.name == "lars"
    return LARS(
        parts.model,
        parts.communicator,
        _groups(config, parts),
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=settings.nesterov,
        trust_coefficient=settings.trust_coefficient,
        averaging=_averaging(config, parts),
    )


def _averaging(config: Config, parts: Parts) -> Averaging:
    return Averaging(
        weight_rescaling=config.weight_rescaling,
        loss_scaler=parts.loss_scaler,
        gradient_comm_dtype=HALF_DTYPES.get(config.communication.gradient_precision),
        timer=parts.timer,
    )


def _groups(config: Config, parts: Parts) -> list[dict[str, Any]] | None:
    """Parameter groups where the weight decay is not for all; None where it is."""
    if config.optimizer.decayed == "all":
        return None
    decayed = {id(weight) for weight in rescaled_weights(parts.model)}
    weights = [parameter for parameter in parts.model.parameters() if id(parameter) in decayed]
    others = [parameter for parameter in parts.model.parameters() if id(parameter) not in decayed]
    groups: list[dict[str, Any]] = [{"params": weights}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _create_kfac(config: Config, parts: Parts) -> KFAC:
    settings, kfac, communication = config.optimizer, config.kfac, config.communication
    assert kfac is not None, "the configuration has a kfac section where optimizer.name is kfac"
    return KFAC(
        parts.model,
        parts.communicator,
        _groups(config, parts),
        lr=settings.learning_rate,
        momentum=settings.momentum,
        damping=kfac.damping.initial,
        batchnorm_damping_ratio=kfac.damping.batchnorm_ratio,
        weight_decay=settings.weight_decay,
        weight_rescaling=config.weight_rescaling,
        batchnorm=kfac.batchnorm,
        ema_decay=kfac.ema_decay,
        sample_fraction=kfac.sample_fraction,
        refresh=create_refresh(kfac.refresh, parts.schedules.epoch_at),
        accumulation_steps=parts.accumulation_steps,
        skip=kfac.skip,
        track_changes=kfac.monitor.diff,
        loss_scaler=parts.loss_scaler,
        comm_dtypes=CommDtypes(
            HALF_DTYPES.get(communication.factor_precision), HALF_DTYPES.get(communication.gradient_precision)
        ),
        timer=parts.timer,
    )


OPTIMIZERS: dict[str, Callable[[Config, Parts], DistributedOptimizer]] = {
    "kfac": _create_kfac,
    "sgd": _create_sgd,
    "muon": _create_muon,
    "adamw": _create_adamw,
    "lars": _create_lars,
}
"""How each `optimizer.name` is made."""


def create_refresh(refresh: RefreshConfig, epoch_at: Callable[[int], float]) -> RefreshSchedule:
    """The refresh schedule of a `kfac.refresh` section."""
    if not isinstance(refresh, EveryRefresh | PaperRefresh):
        return AdaptiveRefresh(refresh.threshold, refresh.max_interval, refresh.after_iteration)
    interval_multiplier = {
        "A": refresh.interval_multiplier.input_factor,
        "G": refresh.interval_multiplier.output_factor,
        "F": refresh.interval_multiplier.batchnorm,
    }
    if isinstance(refresh, EveryRefresh):
        interval = refresh.interval
        return IntervalRefresh(lambda iteration: interval, interval_multiplier)
    rule = {"eq20": eq20_interval, "eq21": eq21_interval}[refresh.schedule]
    after = refresh.after_iteration
    return IntervalRefresh(
        lambda iteration: 1 if iteration <= after else rule(epoch_at(iteration)), interval_multiplier
    )
