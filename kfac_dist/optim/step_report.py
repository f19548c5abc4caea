"""What came of a step, from any optimizer to whoever reports it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from kfac_dist.curvature.blocks.base import FactorKey


@dataclass(frozen=True)
class StepReport:
    """What came of one `step`.

    Attributes:
        skipped: Whether gradients overflowed on some rank, so that no rank changed anything.
        retries: Factorisations on this rank that needed more damping.
        kept_inverses: Blocks of this rank whose factorisation failed for good and that kept the previous inverse.
        changes: Diff (Eq. 19) of each matrix that was refreshed, the same on every rank; empty if not tracked.
    """

    skipped: bool = False
    retries: int = 0
    kept_inverses: int = 0
    changes: Mapping[FactorKey, float] = field(default_factory=dict)
