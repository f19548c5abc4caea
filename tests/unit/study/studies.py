"""A small study that its tests share: digits, two optimizers of two configurations, two batch sizes."""

import copy
from pathlib import Path
from typing import Any

from kfac_dist.config import strict_yaml

SMALL: dict[str, Any] = {
    "name": "small",
    "recipe": {
        "run": {"name": "small", "device": "cpu"},
        "data": {"name": "digits", "train_limit": 512, "eval_limit": 100},
        "model": {"name": "digits_cnn"},
        "batch": {"global_size": 128, "per_rank": 64},
        "train": {"epochs": 1},
        "schedule": {"kind": "one_cycle", "end_epoch": 1},
    },
    "models": ["digits_cnn"],
    "batch_sizes": [128, 256],
    "budget": {"rule": "fixed_epochs", "epochs": 2},
    "linked": {"batch.per_rank": {"of": "batch.global_size"}, "schedule.end_epoch": {"of": "train.epochs"}},
    "optimizers": {
        "sgd": {
            "settings": {"optimizer": {"name": "sgd", "momentum": 0.9}},
            "grid": {"learning_rate": {"key": "optimizer.learning_rate", "values": [0.1, 0.2]}},
        },
        "kfac": {
            "settings": {
                "optimizer": {"name": "kfac", "momentum": 0.9},
                "kfac.damping.batchnorm_ratio": 16,
                "weight_rescaling": "always",
            },
            "grid": {
                "learning_rate": {"key": "optimizer.learning_rate", "values": [0.03]},
                "damping": {"key": "kfac.damping.initial", "lowest": 0.01, "highest": 0.1, "count": 2},
            },
            "linked": {
                "kfac.damping.target": {"of": "kfac.damping.initial", "times": 0.01},
                "kfac.damping.warmup_steps": {"of": "iterations", "times": 0.3, "at_least": 4},
            },
        },
    },
    "seeds": [0],
    "targets": [{"metric": "train_loss", "value": 2.0}, {"metric": "test_top1", "value": 0.3}],
}


def write_study(folder: Path, changes: dict[str, Any] | None = None, source: dict[str, Any] = SMALL) -> Path:
    """The small study in a file; `changes` are values of dotted keys, where None takes a key out."""
    settings = copy.deepcopy(source)
    for dotted, value in (changes or {}).items():
        *sections, last = dotted.split("/")
        section = settings
        for name in sections:
            section = section[name]
        section[last] = value
        if value is None:
            del section[last]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "study.yaml"
    path.write_text(strict_yaml.dump(settings), encoding="utf-8")
    return path
