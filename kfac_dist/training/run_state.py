"""A trainer's state as a checkpoint holds it, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from kfac_dist.optim.distributed_fisher import BLOCKS
from kfac_dist.optim.kfac import STATE_KEY
from kfac_dist.training.checkpoint import RankState

if TYPE_CHECKING:
    from kfac_dist.training.trainer import Trainer


def take_state(trainer: Trainer) -> RankState:
    """All that this rank's part of the rest of the run depends on; collective, copies little."""
    optimizer = trainer.optimizer.state_dict()
    blocks: dict[str, Any] = {}
    if STATE_KEY in optimizer:
        curvature = dict(optimizer[STATE_KEY])
        blocks = curvature.pop(BLOCKS)
        optimizer[STATE_KEY] = curvature
    names = {id(buffer): name for name, buffer in trainer.model.named_buffers()}
    averages = {}
    for buffer in trainer.batchnorm.running_buffers():
        averages[names[id(buffer)]] = trainer.communicator.all_reduce_(buffer.detach().clone(), "mean")
    scaler = trainer.loss_scaler
    return RankState(
        run={
            "iteration": trainer.iteration,
            "top1": trainer.top1,
            "best_top1": trainer.best_top1,
            "seconds": trainer.seconds(),
            "communication_bytes": trainer.communicator.payload_bytes,
            "optimizer": optimizer,
            "loss_scaler": scaler.state_dict() if scaler is not None else None,
        },
        weights={**trainer.model.state_dict(), **averages},
        buffers=dict(trainer.model.named_buffers()),
        blocks=blocks,
        mixup=trainer.augmentation.state_dict(),
    )


@torch.no_grad()
def restore_state(trainer: Trainer, state: RankState) -> None:
    """Go on where `take_state` was called, on this or another number of ranks.

    Raises:
        InputError, RuntimeError: If it is the state of another network.
    """
    run = state.run
    trainer.model.load_state_dict(dict(state.weights))
    for name, buffer in trainer.model.named_buffers():
        if name in state.buffers:
            buffer.copy_(state.buffers[name])
    optimizer = dict(run["optimizer"])
    if STATE_KEY in optimizer:
        optimizer[STATE_KEY] = {**optimizer[STATE_KEY], BLOCKS: dict(state.blocks)}
    trainer.optimizer.load_state_dict(optimizer)
    trainer.augmentation.load_state_dict(state.mixup)
    if trainer.loss_scaler is not None and run["loss_scaler"] is not None:
        trainer.loss_scaler.load_state_dict(run["loss_scaler"])
    trainer.iteration, trainer.top1, trainer.best_top1 = run["iteration"], run["top1"], run["best_top1"]
    trainer.seconds_before = run["seconds"]
    trainer.communicator.payload_bytes = run["communication_bytes"]
