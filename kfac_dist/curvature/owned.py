"""Stages 4 and 5 for the blocks that one rank owns: running Fisher, damped inverses, preconditioned gradients."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kfac_dist.curvature.blocks.base import Block, FactorKey
from kfac_dist.curvature.inversion import InverseRefresh, InversionTask, RefreshReport
from kfac_dist.curvature.precondition import Preconditioner
from kfac_dist.curvature.running import BlockCurvature, update_running_averages
from kfac_dist.curvature.spectrum import spectrum


class OwnedFisher:
    """The running Fisher and the inverses of some blocks.

    Attributes:
        blocks: The blocks, in the model's order.
    """

    def __init__(self, ema_decay: float | None, device: torch.device) -> None:
        """Start without blocks; see `follow`.

        Args:
            ema_decay: Share of the old Fisher in its running average; None keeps the newest only.
            device: Of the matrices.
        """
        self.blocks: list[Block] = []
        self._curvatures: dict[str, BlockCurvature] = {}
        self._known: dict[str, BlockCurvature] = {}  # the newest of each name, of blocks that may return too
        self._ema_decay = ema_decay
        self._inverses = InverseRefresh(deferred=device.type == "cuda")
        self._preconditioner = Preconditioner()

    def follow(self, blocks: Sequence[Block]) -> None:
        """Take over these blocks; those that were there before keep what is known of them, others start anew."""
        before = self._known
        self.blocks = list(blocks)
        self._curvatures = {
            block.name: before[block.name]
            if block.name in before and before[block.name].block is block
            else BlockCurvature(block)
            for block in blocks
        }
        self._known |= self._curvatures
        for curvature in self._known.values():
            curvature.leave_shared_memory()
        self._preconditioner = Preconditioner()  # without memory for blocks that are gone
        self._inverses.forget_all_but(self._curvatures.values())

    def __getitem__(self, name: str) -> BlockCurvature:
        """What is kept of the block of this name."""
        return self._curvatures[name]

    def __contains__(self, name: object) -> bool:
        return name in self._curvatures

    def change(self, key: FactorKey, factor: Tensor) -> Tensor:
        """Diff (Eq. 19) that taking this factor into the running average will make, a scalar."""
        name, matrix = key
        return self._curvatures[name].averages[matrix].change(factor, self._ema_decay)

    def refresh(
        self,
        factors: dict[FactorKey, Tensor],
        damping_of: Callable[[Block], float],
        expected_interval: Callable[[FactorKey], int],
    ) -> RefreshReport:
        """Take new factors into the running averages and factorise what changed.

        Args:
            factors: New factors, (count, n, n) each; emptied, so that their memory is free for the rest. Without any,
                what failed last is tried again.
            damping_of: gamma of a block.
            expected_interval: Iterations that the inverse of a matrix will serve.

        Raises:
            ValueError: If a damping is not positive.
        """
        update_running_averages(
            [(self._curvatures[name].averages[matrix], factor) for (name, matrix), factor in factors.items()],
            self._ema_decay,
        )
        matrices: dict[str, list[str]] = {}
        for name, matrix in factors:
            matrices.setdefault(name, []).append(matrix)
        factors.clear()
        tasks = [
            InversionTask(self._curvatures[name], damping_of(self._curvatures[name].block), of_block)
            for name, of_block in matrices.items()
        ]
        return self._inverses.refresh(tasks, expected_interval)

    def precondition(self, gradients: Sequence[Tensor]) -> Iterator[list[tuple[Block, Tensor]]]:
        """𝒢 of each block, (num_values,), from its gradient; the plain gradient where there is no inverse yet.

        Args:
            gradients: Of `blocks`, (num_values,) each.

        Yields:
            Groups of blocks with their 𝒢, which stands until the next group is asked for.
        """
        curvatures = [self._curvatures[block.name] for block in self.blocks]
        for group in self._preconditioner.apply(curvatures, gradients):
            yield [(self.blocks[number], direction) for number, direction in group]

    def spectrum(self, key: FactorKey) -> Tensor | None:
        """Smallest and largest eigenvalue and effective rank of a running matrix, (3,) float64; None before any."""
        name, matrix = key
        running = self._curvatures[name].running
        return spectrum(running[matrix]).cpu() if matrix in running else None

    def state_dict(self) -> dict[str, Any]:
        """By block what is kept of it, and whether it is to be factorised again; nothing is copied."""
        retries = self._inverses.state_dict()
        return {
            name: {**curvature.state_dict(), "retry": retries.get(name)} for name, curvature in self._curvatures.items()
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> None:
        """Replace everything by copies of what `state_dict` returned, on this rank or, for other blocks, on others."""
        self._known = dict(self._curvatures)
        for name, curvature in self._curvatures.items():
            curvature.load_state_dict(state[name], device, dtype)
        retries = {name: state[name]["retry"] for name in self._curvatures if state[name]["retry"] is not None}
        self._inverses.load_state_dict(retries, self._curvatures)
