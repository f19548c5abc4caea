"""Mutated configurations: valid, or refused with a message, and never anything else."""

import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from kfac_dist.config.load import load_config
from kfac_dist.errors import InputError
from tests.paths import CONFIGS, QUICKSTART

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 3, 10**30, -(10**30), 0.0, 1e-30, 1e300, -2.5, float("nan"), float("inf"), "", " ",
    "kfac", "auto", "\u0000", "x" * 5000, "../../etc/passwd", "~nobody-here/x", "${HOME}", "!!python/object:os.system",
    "1e5", "ünï", [], [1], [0.5, 0.1], [[]], {}, {"a": 1}, {"schedule": "eq21"}, {"name": {}}, ["a"] * 50,
]  # fmt: skip
CORPUS = [QUICKSTART, CONFIGS / "imagenet" / "bs32k.yaml", CONFIGS / "cifar10" / "kfac_resnet20.yaml"]


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every key of nested mappings."""
    if not isinstance(node, dict):
        return [path]
    return [path, *(place for key, inner in node.items() for place in places(inner, (*path, key)))]


def mutate(settings: Any, rng: random.Random) -> Any:
    *path, last = rng.choice([place for place in places(settings) if place])
    section = settings
    for key in path:
        section = section[key]
    match rng.randrange(4):
        case 0:
            del section[last]
        case 1:
            section[rng.choice([f"{last}x", "", 3, None, "name"])] = section[last]
        case _:
            section[last] = rng.choice(VALUES)
    return settings


def mutate_text(text: str, rng: random.Random) -> str:
    at = rng.randrange(len(text))
    piece = rng.choice(["{", "}", "[", ":", "&a ", "*a", "\t", "- ", "#", "'", "\x00", "\ufeff", "!!binary x", "? "])
    return text[:at] + piece + text[at + rng.randrange(4) :]


def check(number: int, folder: Path) -> bool:
    """Whether the configuration of this number was valid."""
    rng = random.Random(number)
    text = rng.choice(CORPUS).read_text(encoding="utf-8")
    if rng.random() < 0.4:
        text = mutate_text(text, rng)
    else:
        settings = yaml.safe_load(text)
        for _ in range(rng.choice([1, 1, 2, 5])):
            if len(places(settings)) > 1:
                settings = mutate(settings, rng)
        text = yaml.safe_dump(settings, allow_unicode=True)
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    overrides = (
        [rng.choice(["train.epochs=2", "a=b=c", "run.name={", "kfac=null", "=", "x.y"])] if number % 5 == 0 else []
    )
    try:
        config = load_config(path, overrides)
    except InputError:
        return False
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(path) == config
    return True


def test_three_hundred(tmp_path: Path) -> None:
    valid = sum(check(number, tmp_path) for number in range(300))
    assert 20 < valid < 280, "both happen"


@pytest.mark.long
def test_two_thousand(tmp_path: Path) -> None:
    assert sum(check(number, tmp_path) for number in range(300, 2300)) > 100
