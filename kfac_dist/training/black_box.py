"""The last iterations before training failed, for whoever looks for the cause: black_box.json in the run's folder."""

import json
import logging
import math
import shlex
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kfac_dist.communicator import Communicator
from kfac_dist.data.sampling import SlotSampler
from kfac_dist.optim.base import DistributedOptimizer
from kfac_dist.optim.distributed_fisher import BLOCKS
from kfac_dist.optim.kfac import STATE_KEY
from kfac_dist.runs.reader import CONFIG_FILE
from kfac_dist.training.schedules import Settings

BLACK_BOX_FILE = "black_box.json"
_ITERATIONS = 6
_MOST_RANKS = 16  # that tell of their slots; where weights are spoilt all ranks could

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Iteration:
    """What is kept of an iteration; tensors stay where they are until somebody asks."""

    iteration: int
    settings: Settings
    losses: Tensor  # of each slot of this rank
    weights: Tensor  # norm of each parameter
    gradients: Tensor  # likewise, of this rank's gradient before it is averaged


class BlackBox:
    """Norms of weights and gradients and the slots' losses of the last iterations, kept on the device."""

    def __init__(self, model: nn.Module, communicator: Communicator, sampler: SlotSampler) -> None:
        """Keep nothing yet."""
        self._names = [name for name, _ in model.named_parameters()]
        self._parameters: list[Tensor] = list(model.parameters())
        self._communicator, self._sampler = communicator, sampler
        self._kept: deque[_Iteration] = deque(maxlen=_ITERATIONS)

    @torch.no_grad()
    def record(self, iteration: int, settings: Settings, losses: Sequence[Tensor]) -> None:
        """Keep an iteration, after its backward passes; nobody waits for a GPU.

        Args:
            iteration: Its number.
            settings: What the optimizer uses.
            losses: Mean loss of each of this rank's slots, scalars.
        """
        weights = torch.stack(torch._foreach_norm(self._parameters))
        zero = weights.new_zeros(())
        given = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        norms = iter(torch._foreach_norm(given) if given else ())
        gradients = torch.stack([zero if p.grad is None else next(norms).to(zero) for p in self._parameters])
        self._kept.append(_Iteration(iteration, settings, torch.stack(list(losses)), weights, gradients))

    def forget(self) -> None:
        """Drop what was kept, as it is not what led to the state after a restart."""
        self._kept.clear()

    def write(
        self, run: Path, facts: Mapping[str, Any], checkpoint: Path | None, optimizer: DistributedOptimizer
    ) -> None:
        """Write the file, on rank 0; collective.

        Args:
            run: The run's folder.
            facts: What to say besides.
            checkpoint: Where a replay begins; None for the beginning of the run.
            optimizer: Whose Fisher is looked at, if it keeps any.
        """
        own = json.dumps({"slots": self._own_slots(), "factors": _factor_statistics(optimizer)})
        parts = [json.loads(part) for part in self._communicator.gather_bytes(own.encode())]
        if not self._communicator.is_main:
            return
        ranks = [(rank, part["slots"]) for rank, part in enumerate(parts) if part["slots"]]
        content = {
            **facts,
            "replay": self._command(run, checkpoint),
            "iterations": [self._describe(kept) for kept in self._kept],
            "factors": {name: value for part in parts for name, value in part["factors"].items()},
            "nonfinite_slots": [{"rank": rank, "slots": slots} for rank, slots in ranks[:_MOST_RANKS]],
            "num_ranks_with_nonfinite_slots": len(ranks),
        }
        path = run / BLACK_BOX_FILE
        try:
            path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            logger.warning("%s has the last iterations before this", path)
        except OSError as error:
            logger.warning("%s: cannot be written (%s)", path, error.strerror)

    def _describe(self, kept: _Iteration) -> dict[str, Any]:
        return {
            "iteration": kept.iteration,
            **asdict(kept.settings),
            "rank_0_slot_losses": _plain(kept.losses),
            "weight_norms": dict(zip(self._names, _plain(kept.weights), strict=True)),
            "rank_0_gradient_norms": dict(zip(self._names, _plain(kept.gradients), strict=True)),
        }

    def _own_slots(self) -> list[dict[str, Any]]:
        """This rank's slots whose loss was not finite, with the training images in them."""
        slots = self._sampler.local_slots(self._communicator.rank, self._communicator.size)
        return [
            {
                "iteration": kept.iteration,
                "slot": slot,
                "loss": _plain(loss),
                "images": self._sampler.indices(kept.iteration, slot).tolist(),
                "gradient_norms": dict(zip(self._names, _plain(kept.gradients), strict=True)),
            }
            for kept in self._kept
            for slot, loss in zip(slots, kept.losses, strict=True)
            if not bool(loss.isfinite())
        ]

    def _command(self, run: Path, checkpoint: Path | None) -> str:
        size = self._communicator.size
        launcher = ["mpirun", "-n", str(size)] if size > 1 else []
        resume = ["--resume", str(checkpoint)] if checkpoint is not None else []
        installed = Path(sys.argv[0]).name == "kfac-dist"
        program = ["kfac-dist", "train"] if installed else ["python", "train.py"]
        return shlex.join([*launcher, *program, str(run / CONFIG_FILE), *resume])


def _factor_statistics(optimizer: DistributedOptimizer) -> dict[str, Any]:
    """Norm, largest value and mean of the diagonal of each running matrix that this rank keeps."""
    blocks = optimizer.state_dict().get(STATE_KEY, {}).get(BLOCKS, {})
    return {
        f"{name} {matrix}": {
            "norm": _plain(value.norm()),
            "largest": _plain(value.abs().max()),
            "mean_diagonal": _plain(value.diagonal(dim1=-2, dim2=-1).mean()),
        }
        for name, block in blocks.items()
        for matrix, value in block["running"].items()
    }


def _plain(values: Tensor) -> Any:
    """As JSON has it: what is not finite as text."""
    found = values.detach().double().cpu().tolist()
    numbers = found if isinstance(found, list) else [found]
    told = [number if math.isfinite(number) else str(number) for number in numbers]
    return told if isinstance(found, list) else told[0]
