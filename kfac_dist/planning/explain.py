"""What a configuration will do, before it does it: layers, owners, bytes and schedules."""

from collections.abc import Sequence

import torch

from kfac_dist.communicator.base import ranks_in_words
from kfac_dist.config.load import batch_slots, warnings_of
from kfac_dist.config.schema import Config
from kfac_dist.curvature.assignment import assign_owners
from kfac_dist.curvature.blocks.base import Block
from kfac_dist.curvature.blocks.create import block_cost, create_blocks
from kfac_dist.curvature.blocks.kronecker import num_taken
from kfac_dist.data.create import describe_dataset
from kfac_dist.data.sampling import SlotSampler
from kfac_dist.models import create_model
from kfac_dist.optim.buffers import StageBuffers, all_factor_keys
from kfac_dist.tensors.packing import triangle_numel
from kfac_dist.training.schedules import Schedules
from kfac_dist.vocabulary import counted


def explain(config: Config, num_ranks: int) -> str:
    """Describe a run on a number of ranks, without data, training or other ranks.

    Args:
        config: A validated configuration.
        num_ranks: Ranks to plan for, ≥ 1.

    Returns:
        Text of several tables.

    Raises:
        InputError: If the batch does not divide over the ranks, or there is no such model.
    """
    data = describe_dataset(config.data)
    slots = batch_slots(config, num_ranks)
    batch = config.batch
    sampler = SlotSampler(data.num_train, batch.per_rank, batch.global_size // batch.per_rank, config.run.seed)
    schedules = Schedules(config, sampler)
    lines = [
        f"{config.run.name}: {config.model.name} on {config.data.name} with {config.optimizer.name}, "
        f"{ranks_in_words(num_ranks)}",
        f"{counted(schedules.num_iterations, 'iteration')} ({config.train.epochs:g} epochs of {data.num_train} images) "
        f"of {batch.global_size} images: {counted(slots, 'slot')} of {batch.per_rank} a rank",
    ]
    lines += [f"warning: {warning}" for warning in warnings_of(config, data.num_train)]
    model = create_model(
        config.model.name, data.num_classes, data.image_shape, config.run.seed, config.model.variant,
        config.model.zero_init_last_gamma, config.model.initialization,
    )  # fmt: skip
    if config.kfac is not None:
        blocks = create_blocks(model, list(model.parameters()), config.kfac.batchnorm, config.kfac.skip)
        if config.kfac.sample_fraction < 1:
            count = num_taken(config.kfac.sample_fraction, batch.per_rank)
            lines.append(f"A and G from the first {count} of the {batch.per_rank} images of each slot")
        lines += ["", *_layer_table(blocks, num_ranks, 8 if config.train.precision == "fp64" else 4)]
    lines += ["", *_schedule_table(schedules)]
    return "\n".join(lines)


def _layer_table(blocks: list[Block], num_ranks: int, value_bytes: int) -> list[str]:
    """A line for each layer, the ranks' loads, the bytes of both collectives, and what is not covered."""
    costs = [block_cost(block) for block in blocks]
    owners = assign_owners(costs, num_ranks)
    rows = [("layer", "form", "matrices", "packed", "gradient", "operations", "owner")]
    for block, cost, ranks in zip(blocks, costs, owners, strict=True):
        matrices = ", ".join(
            f"{name} {'' if count == 1 else f'{count}x'}{size}" for name, (count, size) in block.factor_shapes.items()
        )
        packed = sum(count * triangle_numel(size) for count, size in block.factor_shapes.values())
        rows.append(
            (block.name, block.form, matrices or "-", _mib(value_bytes * packed),
             _mib(value_bytes * block.num_values), f"{cost.flops:.2g}", ",".join(map(str, ranks)))
        )  # fmt: skip
    exchange = StageBuffers(blocks, owners, num_ranks, torch.float32, torch.device("meta"))
    gradients = [message.buffer for message in exchange.messages]
    refresh, stale, updates = (
        _mib(value_bytes * sum(buffer.data.numel() for buffer in buffers), exact=True)
        for buffers in (
            (exchange.factors(all_factor_keys(blocks)), *gradients),
            gradients,
            (exchange.updates(),),
        )
    )
    loads = [
        sum(cost.flops for cost, ranks in zip(costs, owners, strict=True) if rank in ranks) for rank in range(num_ranks)
    ]
    lines = _aligned(rows)
    num_idle = num_ranks - len({rank for ranks in owners for rank in ranks})
    if num_idle:
        lines += ["", f"{num_idle} of {num_ranks} ranks own no layer: more copies would only add to what travels"]
    lines += [
        "",
        f"stages 4 and 5, operations of a refresh: largest rank {max(loads):.3g}, all ranks {sum(loads):.3g}",
        f"stage 3 (ReduceScatterV): {refresh} with a refresh, {stale} without",
        f"stage 6 (AllGatherV): {updates}",
        "",
    ]
    plain = [block for block in blocks if not block.is_preconditioned]
    if not plain:
        return [*lines, "every trained parameter is covered by K-FAC"]
    return [*lines, "not covered, plain gradient:", *(f"  {block.name}: {block.reason}" for block in plain)]


def _schedule_table(schedules: Schedules) -> list[str]:
    """First, middle and last values of what changes over the run."""
    rows = [("iteration", "epoch", "learning rate", "momentum", "damping")]
    for iteration in (0, schedules.num_iterations // 2, schedules.num_iterations - 1):
        settings = schedules.settings(iteration)
        damping = f"{settings.damping:.3g}" if settings.damping else "-"
        rates = (f"{settings.learning_rate:.4g}", f"{settings.momentum:.4g}")
        rows.append((str(iteration), f"{schedules.epoch_at(iteration):.2f}", *rates, damping))
    return _aligned(rows)


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _mib(num_bytes: int, exact: bool = False) -> str:
    return f"{num_bytes / 2**20:.3f} MiB" + (f" ({num_bytes:,} bytes)" if exact else "")
