"""Machines of round figures, for cases that are calculated by hand."""

from typing import Any

from kfac_dist.planning.profile import Profile, create_profile

RATES: dict[str, Any] = {
    "description": "round figures",
    "device": "cuda",
    "devices_per_node": 4,
    "launch_seconds": 0.0,
    "half": {"teraflops": 4.0, "efficiency": 0.5, "half_size": 0.0, "source": "made up"},
    "single": {"teraflops": 1.0, "efficiency": 1.0, "half_size": 0.0, "source": "made up"},
    "factorise": {"teraflops": 0.5, "efficiency": 1.0, "row_seconds": 0.0, "source": "made up"},
    "solve": {"teraflops": 0.25, "efficiency": 1.0, "row_seconds": 0.0, "source": "made up"},
    "memory": {"gibibytes": 16, "gigabytes_per_second": 1e9, "efficiency": 1.0, "source": "made up"},
    "network": {
        "intra_node": {"latency_seconds": 1.0, "gigabytes_per_second": 2.0, "efficiency": 0.5, "source": "made up"},
        "inter_node": {"latency_seconds": 10.0, "gigabytes_per_second": 0.5, "efficiency": 1.0, "source": "made up"},
    },
    "training": {"ratio": 1.0, "source": "made up"},
    "factors": {"ratio": 1.0, "source": "made up"},
}


def machine(**changes: Any) -> Profile:
    """A profile of `RATES`; a dict given for a section changes those of its keys."""
    settings = {
        key: {**value, **changes[key]} if isinstance(changes.get(key), dict) else changes.get(key, value)
        for key, value in RATES.items()
    }
    return create_profile(settings | {key: changes[key] for key in changes.keys() - RATES.keys()}, "made up")
