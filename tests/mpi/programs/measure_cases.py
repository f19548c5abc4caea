"""The choice of ReduceScatterV's algorithm where measuring is slow; the argument names the case.

slow_call    one algorithm takes half a second a call, on the last rank only
slow_all     all of them do
slow_clock   rank 0's clock says that a second has passed at once; the other ranks' clocks do not
"""

import sys
import time
from typing import Any

from kfac_dist.communicator import MpiCommunicator, fastest, launch

SECONDS = 0.5


class SlowCommunicator(MpiCommunicator):
    """Counts the algorithms' calls; those that are named sleep on the last rank."""

    slow: tuple[str, ...] = ()

    def _algorithms(self) -> Any:
        self.calls: list[str] = getattr(self, "calls", [])
        return {name: self._slowed(name, algorithm) for name, algorithm in super()._algorithms().items()}

    def _slowed(self, name: str, algorithm: Any) -> Any:
        def call(*arguments: Any) -> Any:
            self.calls.append(name)
            if name in self.slow and self.rank == self.size - 1:
                time.sleep(SECONDS)
            return algorithm(*arguments)

        return call


def main() -> int:
    case = sys.argv[1]
    parent = MpiCommunicator("reduce")
    if case == "slow_clock" and parent.is_main:
        ticks = iter(range(10**6))
        fastest.time = type("Clock", (), {"perf_counter": staticmethod(lambda: 2.0 * next(ticks))})
    SlowCommunicator.slow = {"slow_call": ("native",), "slow_all": ("native", "reduce", "ireduce")}.get(case, ())
    parent.barrier()
    start = time.perf_counter()
    communicator = SlowCommunicator("auto")
    seconds = time.perf_counter() - start
    calls = ",".join(communicator.calls)
    chosen = f"{communicator.reduce_scatter_algorithm}; {calls}; {sorted(communicator.reduce_scatter_seconds.items())}"
    everywhere = communicator.gather_bytes(chosen.encode())
    assert len(set(everywhere)) == 1, everywhere
    communicator.print_once(f"{case}: {seconds:.2f} s, {communicator.reduce_scatter_algorithm} after {calls}")
    return 0


if __name__ == "__main__":
    launch.run(main)
