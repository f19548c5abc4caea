"""Distributed K-FAC for PyTorch: train image classifiers at very large batch under ``mpirun``.

The parts that other programs use are importable from here::

    from kfac_dist import KFAC, create_communicator
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kfac_dist.communicator import create_communicator as create_communicator
    from kfac_dist.communicator import local_device as local_device
    from kfac_dist.optim.baselines import LARS as LARS
    from kfac_dist.optim.baselines import AdamW as AdamW
    from kfac_dist.optim.baselines import Muon as Muon
    from kfac_dist.optim.kfac import KFAC as KFAC
    from kfac_dist.optim.loss_scale import LossScaler as LossScaler
    from kfac_dist.optim.sgd import SGD as SGD

__version__ = "0.1.0"
__all__ = ["KFAC", "LARS", "SGD", "AdamW", "LossScaler", "Muon", "__version__", "create_communicator", "local_device"]

_HOMES = {
    "KFAC": "kfac_dist.optim.kfac",
    "SGD": "kfac_dist.optim.sgd",
    "AdamW": "kfac_dist.optim.baselines",
    "LARS": "kfac_dist.optim.baselines",
    "Muon": "kfac_dist.optim.baselines",
    "LossScaler": "kfac_dist.optim.loss_scale",
    "create_communicator": "kfac_dist.communicator",
    "local_device": "kfac_dist.communicator",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> object:
    # Loaded on first use, so that reading a configuration or printing --help does not wait for torch and MPI.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
