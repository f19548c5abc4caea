"""The Fisher over all ranks: captured on each, averaged (stage 3), kept and factorised by its owners (stage 4)."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from zlib import crc32

import torch
from torch import Tensor
from torch.nn import Parameter

from kfac_dist.communicator import Communicator, Pending
from kfac_dist.curvature.blocks.base import Block, FactorKey
from kfac_dist.curvature.blocks.create import refresh_costs
from kfac_dist.curvature.capture import Capture
from kfac_dist.curvature.inversion import RefreshReport
from kfac_dist.curvature.owned import OwnedFisher
from kfac_dist.curvature.refresh_schedule import RefreshSchedule
from kfac_dist.optim.agreement import DIGEST_LIMIT, StepAgreement, agree_on_step
from kfac_dist.optim.buffers import all_factor_keys
from kfac_dist.optim.shared_blocks import SharedBlocks
from kfac_dist.tensors.nested_state import decode, encode
from kfac_dist.tensors.packing import FlatBuffer, unpack_symmetric
from kfac_dist.vocabulary import counted

BLOCKS = "blocks"
"""Key of a state under which each owner's part stands, by name of the block; all else is alike on every rank."""
_MANY_BYTES = 1 << 30  # received at once, beside all else that is in memory

logger = logging.getLogger(__name__)


class DistributedFisher:
    """What is due, captured, sent, kept and factorised of the Fisher, iteration by iteration.

    Attributes:
        capture: The hooks that write this rank's factors.
        owned: Running Fisher and inverses of the blocks that this rank owns.
        factors: Stage 3's buffer in this iteration; its keys are those of the factors that are due.
    """

    def __init__(
        self,
        communicator: Communicator,
        shared: SharedBlocks,
        owned: OwnedFisher,
        refresh: RefreshSchedule,
        track_changes: bool,
    ) -> None:
        """Start without blocks; see `follow`.

        Args:
            communicator: Collectives over the ranks.
            shared: The blocks and their owners.
            owned: Keeps what this rank owns.
            refresh: When a factor is due.
            track_changes: Compute Diff (Eq. 19) of each refreshed matrix; done for a schedule that needs it anyway.
        """
        self.capture = Capture()
        self.owned = owned
        self._communicator = communicator
        self._shared = shared
        self._refresh = refresh
        self._track_changes = track_changes or refresh.needs_changes
        self._iteration = 0
        self._due: Sequence[FactorKey] = []
        self._warned = self._warned_of_kept = False
        self._num_kept = 0  # in the last step, on this rank

    def follow(self) -> None:
        """Take over the blocks as they are shared now; what was captured of those that stay is kept."""
        self.owned.follow(self._shared.owned)
        self._refresh.plan_for(refresh_costs(self._shared.blocks))
        self._refresh.forget(all_factor_keys(self._shared.added))
        self.capture.follow(self._shared.blocks)
        self._plan()
        self.capture.move(self._destinations())

    def begin_iteration(self) -> None:
        """Drop what was captured, and capture what the next step refreshes."""
        self._plan()
        self.begin_capture()

    def _plan(self) -> None:
        """Decide from the iteration alone, as every rank does alike, which factors the next step refreshes."""
        self._due = self._refresh.due(all_factor_keys(self._shared.blocks), self._iteration)
        self.factors: FlatBuffer = self._shared.buffers.factors(self._due)

    def _destinations(self) -> dict[FactorKey, Tensor]:
        return {key: self.factors.copies(key)[0] for key in self._due}

    def begin_capture(self) -> None:
        """Drop what was captured, and capture what is due from the next backward pass on."""
        self.capture.begin(self._destinations())

    @property
    def is_due(self) -> bool:
        """Whether this iteration refreshes any factor."""
        return bool(self._due)

    # One step -----------------------------------------------------------------------------------------

    @property
    def digest(self) -> int:
        """A number in [0, `DIGEST_LIMIT`) that differs, but for chance, where iterations, owners or what is due do."""
        due = crc32("".join([name + matrix for name, matrix in self._due]).encode())
        return (self._iteration + self._shared.digest + due) % DIGEST_LIMIT

    def agree(
        self, parameters: Sequence[Parameter], names: Mapping[int, str], has_sent: bool, settings: Sequence[str]
    ) -> tuple[StepAgreement, dict[str, int]]:
        """`agree_on_step`, and how many ranks captured factors of each block that is due, less those that none did.

        Args:
            parameters: What the optimizer was given.
            names: Of the parameters, by id.
            has_sent: Whether this rank has sent its gradients already.
            settings: Lines that must be the same on every rank.
        """
        self.capture.forget_dropped()
        first = {block.name: id(block.parameters[0]) for block in self._shared.blocks}
        captured = {first[name] for name in self.capture.captured}
        agreed = agree_on_step(
            parameters, names, self._communicator, captured, self.digest, self._num_kept, has_sent, settings
        )
        self._warn_of_kept(agreed.num_kept)
        due = dict.fromkeys(name for name, _ in self._due)
        return agreed, {name: agreed.num_captured[first[name]] for name in due if first[name] in agreed.num_captured}

    def _warn_of_kept(self, num_kept: int) -> None:
        """Say once, on rank 0, that factorising failed for good somewhere in the last step."""
        if num_kept and not self._warned_of_kept:
            self._warned_of_kept = True
            if self._communicator.is_main:
                logger.warning(
                    "K-FAC could not factorise the Fisher of %s even with more damping, so they go on with "
                    "their previous inverse: larger damping, or a look at the loss for values that are not finite, "
                    "helps. report.kept_inverses counts them in every step",
                    counted(num_kept, "block"),
                )

    def warn_of_absent(self, present: Mapping[str, int]) -> None:
        """Say once, on rank 0, which layers gave nothing although their factors are due."""
        absent = list(dict.fromkeys(name for name, _ in self._due if name not in present))
        if absent and not self._warned:
            self._warned = True
            if self._communicator.is_main:
                logger.warning(
                    "K-FAC got no factors from %s: in eval mode, unused in this step, replaced since the optimizer was "
                    "made, its weights used without calling it, or compiled and run before? Until it gives some it "
                    "takes the plain gradient; skip=[…] leaves it to that for good",
                    ", ".join(absent),
                )

    def finish_capture(self, loss_scale: float) -> None:
        """Complete this rank's part of stage 3's buffer, the loss scale taken out."""
        self.capture.finish(loss_scale)
        for key in self._due:
            first, *others = self.factors.copies(key)
            if key[0] not in self.capture.captured:
                first.zero_()  # what it held before is not this rank's share
            for other in others:
                other.copy_(first)

    def start_reduction(self, comm_dtype: torch.dtype | None) -> Pending[Tensor]:
        """Begin stage 3 of the factors: `wait` of what is returned leaves each rank with the averages of what it owns.

        Args:
            comm_dtype: Half precision to send them in; None sends them as they are.
        """
        factors = self.factors
        if not factors.data.numel():
            return Pending(lambda: factors.data)
        return self._communicator.start_reduce_scatter_v(factors.data, factors.counts, comm_dtype, factors.part_numels)

    def refresh(
        self, present: Mapping[str, int], damping_of: Callable[[Block], float]
    ) -> tuple[RefreshReport, dict[FactorKey, Tensor]]:
        """Stage 4: take the averages, when they have arrived, into the running Fisher and factorise it.

        Args:
            present: From `agree`.
            damping_of: γ of a block.

        Returns:
            What went wrong, and Diff of the matrices of which this rank is the first owner, if it is tracked.
        """
        rank, size = self._communicator.rank, self._communicator.size
        factors: dict[FactorKey, Tensor] = {}
        changes: dict[FactorKey, Tensor] = {}
        for key in self._due:
            name, matrix = key
            if name not in self.owned or name not in present:
                continue
            shape = self.owned[name].block.factor_shapes[matrix]
            factors[key] = factor = unpack_symmetric(self.factors.part(key, rank), *shape)
            if present[name] < size:  # the average was taken over all ranks, some of which had nothing to give
                factor *= size / present[name]
            if self._track_changes and self._shared.is_first_owner(name):
                changes[key] = self.owned.change(key, factor)
        report = self.owned.refresh(
            factors, damping_of, lambda key: self._refresh.expected_interval(key, self._iteration)
        )
        self._num_kept = report.num_kept
        return report, changes

    def gather_changes(self, present: Mapping[str, int], own: Mapping[FactorKey, Tensor]) -> dict[FactorKey, float]:
        """Diff of all that was refreshed, the same on every rank; empty if it is not tracked."""
        keys = self._refreshed(present) if self._track_changes else []
        if not keys:
            return {}
        zero = self.factors.data.new_zeros(())
        values = self._communicator.all_reduce_(torch.stack([own.get(key, zero) for key in keys]))
        return dict(zip(keys, values.tolist(), strict=True))  # one copy from the device

    def end_iteration(self, present: Mapping[str, int], changes: Mapping[FactorKey, float]) -> None:
        """Tell the schedule what was refreshed, and begin the next iteration."""
        self._refresh.record(self._iteration, dict.fromkeys(self._refreshed(present), float("inf")) | dict(changes))
        self._iteration += 1
        self.begin_iteration()

    def _refreshed(self, present: Mapping[str, int]) -> Sequence[FactorKey]:
        """Factors that are due but that no rank captured stay due."""
        return [key for key in self._due if key[0] in present]

    # Looking and keeping ------------------------------------------------------------------------------

    def spectra(self) -> dict[FactorKey, tuple[float, float, float]]:
        """Smallest and largest eigenvalue and effective rank of each running matrix; collective, and not fast."""
        keys = all_factor_keys(self._shared.blocks)
        values = torch.zeros(len(keys), 3, dtype=torch.float64)
        for number, key in enumerate(keys):
            spectrum = self.owned.spectrum(key) if self._shared.is_first_owner(key[0]) else None
            if spectrum is not None:
                values[number] = spectrum
        self._communicator.all_reduce_(values)
        return {key: (low, high, rank) for key, (low, high, rank) in zip(keys, values.tolist(), strict=True)}

    def warnings_of_size(self) -> list[str]:
        """What to say where factors travel in half precision: the owner of the most receives a copy from each rank."""
        everything = self._shared.buffers.factors(all_factor_keys(self._shared.blocks))
        received = 2 * self._communicator.size * max(everything.counts)
        if received <= _MANY_BYTES:
            return []
        return [
            f"warning: factors in half precision: one rank receives {received / 2**30:.1f} GiB at each refresh, "
            f"a copy from each of {self._communicator.size} ranks; in fp32 (communication.factor_precision, "
            "comm_dtypes) they are summed on the way"
        ]

    def state_dict(self) -> dict[str, Any]:
        """The iteration, the schedule's state and, by block, what this rank owns; nothing is copied."""
        return {
            "iteration": self._iteration,
            "refresh": self._refresh.state_dict(),
            BLOCKS: self.owned.state_dict(),
            **self._shared.state_dict(),
        }

    def full_state_dict(self) -> dict[str, Any]:
        """`state_dict` with the blocks of all ranks, on every rank; collective."""
        state = self.state_dict()
        own = {name: block for name, block in state[BLOCKS].items() if self._shared.is_first_owner(name)}
        parts = self._communicator.gather_bytes(encode(own))
        merged = {name: block for part in parts for name, block in decode(part).items()}
        state[BLOCKS] = {block.name: merged[block.name] for block in self._shared.blocks if block.name in merged}
        return state

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Refuse a state that cannot be loaded; changes nothing.

        Raises:
            ValueError: If it is of another model, or of one frozen otherwise, or lacks a block that this rank owns.
        """
        rank = self._communicator.rank
        owners = zip(self._shared.blocks, self._shared.owners_in(state), strict=True)
        missing = sorted({block.name for block, ranks in owners if rank in ranks} - set(state[BLOCKS]))
        if missing:
            raise ValueError(
                f"the state lacks the Fisher of {counted(len(missing), 'block')} that rank {rank} owns "
                f"({missing[0]}, …): it was saved by another rank, number of ranks or model. A state of "
                "full_state_dict() has all blocks"
            )

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> None:
        """Replace everything by copies of what `state_dict` returned, and begin the iteration that it was saved in."""
        self._shared.adopt(self._shared.owners_in(state))
        self.follow()
        self.owned.load_state_dict(state[BLOCKS], device, dtype)
        self._iteration = int(state["iteration"])
        self._refresh.load_state_dict(state["refresh"])
        self.begin_iteration()
