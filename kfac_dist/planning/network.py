"""Seconds of the collectives by the alpha-beta model: a latency for each step, and bytes over a bandwidth.

    P    ranks, on nodes of g devices each
    S    bytes of the whole buffer on each rank
    a    latency of a step, within a node or between two
    B    bandwidth of the slowest link of a ring: of a rank within a node, or of a node

A ring passes through all ranks, node by node. An all-reduce is NCCL's ring or its tree over nodes with a chain in each,
whichever is faster, as NCCL chooses. The V-collectives have unequal segments, which NCCL reduces to (or broadcasts
from) each owner along the ring, one call a rank in one group; MPI does so in turn, by trees.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kfac_dist.planning.profile import Link, Profile


@dataclass(frozen=True)
class Fabric:
    """The ranks of a job on a machine.

    Attributes:
        profile: The machine.
        num_ranks: P.
    """

    profile: Profile
    num_ranks: int

    @property
    def num_nodes(self) -> int:
        """Nodes that the job takes."""
        wanted = -(-self.num_ranks // self.profile.devices_per_node)
        return min(wanted, self.profile.num_nodes or wanted)

    @property
    def sharing(self) -> float:
        """Ranks that share a device, which makes all that they do slower by so much; 1 where each has its own."""
        return max(1.0, self.num_ranks / (self.num_nodes * self.profile.devices_per_node))

    def v_collective(self, segment_bytes: Sequence[int]) -> float:
        """ReduceScatterV or AllGatherV of unequal segments, one a rank: (P−1)/P·S/B and the steps."""
        if self.num_ranks == 1:
            return 0.0
        moved = sum(segment_bytes) * (self.num_ranks - 1) / self.num_ranks
        if self.profile.device == "cpu":
            used = sum(size > 0 for size in segment_bytes)
            steps = used * self._tree_seconds()
        else:  # the first segment goes through the whole ring, each further one follows a step behind
            steps = self._ring_seconds() + (self.num_ranks - 1) * self._intra.latency_seconds
        return self.sharing * (steps + moved / self._ring_bytes_per_second)

    def exchange(self, segment_bytes: Sequence[int]) -> float:
        """ReduceScatterV of encoded segments: each owner receives its segment from every rank, and adds them up."""
        if self.num_ranks == 1:
            return 0.0
        others = self.num_ranks - 1
        largest = max(max(segment_bytes) * others, sum(segment_bytes) * others / self.num_ranks)
        if self.num_nodes > 1:  # a rank's share of its node's adapters
            rate = min(self._intra.bytes_per_second, self._inter.bytes_per_second / self.profile.devices_per_node)
        else:
            rate = self._intra.bytes_per_second
        return self.sharing * (others * self._intra.latency_seconds + largest / rate)

    def all_reduce(self, num_bytes: int) -> float:
        """NCCL's ring, 2(P−1)/P·S/B and 2(P−1) steps, or its tree, 2S/B and 2·log2 steps, whichever is faster."""
        if self.num_ranks == 1:
            return 0.0
        moved = 2 * num_bytes / self._ring_bytes_per_second
        ring = 2 * self._ring_seconds() + moved * (self.num_ranks - 1) / self.num_ranks
        tree = 2 * self._tree_seconds() + moved
        return self.sharing * min(ring, tree)

    @property
    def _intra(self) -> Link:
        return self.profile.network.intra_node

    @property
    def _inter(self) -> Link:
        return self.profile.network.inter_node

    @property
    def _ring_bytes_per_second(self) -> float:
        if self.num_nodes == 1:
            return self._intra.bytes_per_second
        return min(self._intra.bytes_per_second, self._inter.bytes_per_second)

    def _ring_seconds(self) -> float:
        """Latency of P−1 steps, of which one leaves each node but the last."""
        between = self.num_nodes - 1
        return between * self._inter.latency_seconds + (self.num_ranks - 1 - between) * self._intra.latency_seconds

    def _tree_seconds(self) -> float:
        """Latency from a leaf of the tree over nodes to its root, and of the way through a node."""
        if self.profile.device == "cpu":
            within = math.ceil(math.log2(min(self.num_ranks, -(-self.num_ranks // self.num_nodes))))
        else:
            within = min(self.num_ranks, self.profile.devices_per_node) - 1
        return math.ceil(math.log2(self.num_nodes)) * self._inter.latency_seconds + within * self._intra.latency_seconds
