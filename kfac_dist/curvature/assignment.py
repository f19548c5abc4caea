"""Which rank owns which layer: a cost model and a greedy assignment. Plain Python, no tensors, no ranks' state."""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Share of all bytes that copies for redundant owners may add: a thousand ranks that all joined the largest layers of
# ResNet-50 would make 0.5 GiB of buffers 31 GiB.
_LARGEST_REDUNDANCY = 0.25


@dataclass(frozen=True)
class LayerCost:
    """What one layer costs its owner each refresh.

    Attributes:
        flops: Floating-point operations of factorising its matrices and solving with them.
        num_bytes: Bytes of its matrices and gradients that travel; breaks ties.
    """

    flops: float
    num_bytes: int


def inversion_flops(sizes: Sequence[tuple[int, int]], num_values: int) -> float:
    """Operations of a layer's stages 4 and 5.

    Args:
        sizes: (count, n) of each stack: n³/3 operations for the Cholesky factor of each matrix.
        num_values: Gradient values of the layer; each takes 2n operations for a pair of triangular solves
            with each stack's matrices.

    Returns:
        Operations, as a float.
    """
    factorise = sum(count * n**3 / 3 for count, n in sizes)
    solve = sum(2 * n * num_values for _, n in sizes)
    return factorise + solve


def assign_owners(
    costs: Sequence[LayerCost], num_ranks: int, kept: Mapping[int, tuple[int, ...]] | None = None
) -> list[tuple[int, ...]]:
    """Owners of each layer: largest first onto the least loaded rank.

    With more ranks than layers each further rank joins the layer whose operations per owner are the most, and
    computes it redundantly (CVPR 2019, section 3.3), as long as the layer's matrices, which must reach each of its
    owners, add no more than a quarter to all that travels. Ranks beyond that own nothing.

    Args:
        costs: The layers' costs.
        num_ranks: Ranks to share them, ≥ 1.
        kept: Owners that layers, by number, have already and keep; no other joins them.

    Returns:
        For each layer the ranks that own it, ascending; one rank each unless there are more ranks than layers.
    """
    order = sorted(range(len(costs)), key=lambda index: (-costs[index].flops, -costs[index].num_bytes, index))
    owners: list[list[int]] = [list((kept or {}).get(index, ())) for index in range(len(costs))]
    loads = [(0.0, 0, rank) for rank in range(num_ranks)]
    for cost, ranks in zip(costs, owners, strict=True):
        for rank in ranks:
            loads[rank] = (loads[rank][0] + cost.flops, loads[rank][1] + cost.num_bytes, rank)
    heapq.heapify(loads)
    for index in order:
        if owners[index]:
            continue
        flops, num_bytes, rank = heapq.heappop(loads)
        owners[index].append(rank)
        heapq.heappush(loads, (flops + costs[index].flops, num_bytes + costs[index].num_bytes, rank))
    idle = sorted(set(range(num_ranks)) - {rank for ranks in owners for rank in ranks})
    budget = _LARGEST_REDUNDANCY * sum(cost.num_bytes for cost in costs)
    new = [index for index in order if index not in (kept or {})]  # nobody else has the Fisher of those kept
    shares = [(-costs[index].flops, position, index) for position, index in enumerate(new)]
    while idle and shares:
        _, position, index = heapq.heappop(shares)
        if costs[index].num_bytes > budget:
            continue  # nor will it fit later
        budget -= costs[index].num_bytes
        owners[index].append(idle.pop(0))
        heapq.heappush(shares, (-costs[index].flops / len(owners[index]), position, index))
    return [tuple(sorted(ranks)) for ranks in owners]
