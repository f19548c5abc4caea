"""Every key that a configuration accepts is used: some code outside the configuration reads it."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel

from kfac_dist.config.schema import Config

PACKAGE = Path(sys.modules["kfac_dist"].__file__ or "").parent
SECTION = Config.__mro__[1]  # the base class of all sections

Key = tuple[str, str]  # (class of the section, key)

CONSTANT = {"kind": "constant", "warmup_epochs": 0.5}
COSINE = {"kind": "cosine", "end_epoch": 2}
ONE_CYCLE = {"kind": "one_cycle", "end_epoch": 1}
SGD: dict[str, Any] = {"optimizer": {"name": "sgd", "learning_rate": 0.01, "momentum": 0.9}, "kfac": None}


def kfac(**refresh: Any) -> dict[str, Any]:
    damping = {"initial": 0.1, "target": 0.01, "warmup_steps": 4, "batchnorm_ratio": 16}
    return {"kfac": {"damping": damping, "refresh": refresh}}


def baseline(name: str) -> dict[str, Any]:
    return {"optimizer": {"name": name, "learning_rate": 0.01, "momentum": 0.9}, "kfac": None}


def leaf_keys(section: type[BaseModel]) -> Iterator[Key]:
    """Every key below a section that is a value and not a section.

    Left out are those with one possible value: they choose the section's class, and so need no reader.
    """
    for name, field in section.model_fields.items():
        inner = [part for part in _parts(field.annotation) if isinstance(part, type) and issubclass(part, BaseModel)]
        if not inner and not (get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1):
            yield section.__name__, name
        for part in inner:
            yield from leaf_keys(part)


def _parts(annotation: Any) -> Iterator[Any]:
    yield annotation
    for argument in get_args(annotation):
        yield from _parts(argument)


def is_user_code(file: str) -> bool:
    """Whether a file is one that ought to use the configuration rather than define it."""
    path = Path(file)
    return path.name == "train.py" or (path.is_relative_to(PACKAGE) and not path.is_relative_to(PACKAGE / "config"))


@pytest.fixture
def keys_read(monkeypatch: pytest.MonkeyPatch) -> set[Key]:
    """Fills while sections of a configuration are read."""
    read: set[Key] = set()

    def recording(self: BaseModel, name: str) -> Any:
        if name in type(self).__pydantic_fields__ and is_user_code(sys._getframe(1).f_code.co_filename):
            read.add((type(self).__name__, name))
        return object.__getattribute__(self, name)

    monkeypatch.setattr(SECTION, "__getattribute__", recording, raising=False)
    return read


@pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")  # torchvision, of its own reader
def test_every_key_is_used(
    keys_read: set[Key],
    command: Callable[..., Any],
    write_config: Callable[..., Path],
    cifar_folder: Path,
    svhn_folder: Path,
    imagenet_folder: Path,
) -> None:
    batch = {"batch": {"global_size": 8, "per_rank": 4}, "train": {"epochs": 1}}
    digits = {"data": {"name": "digits", "train_limit": 16, "eval_limit": 10}}
    erasing = {"probability": 1.0, "area": [0.1, 0.2], "aspect": [0.5, 2.0]}
    made = {"shape": [1, 8, 8], "num_classes": 3, "num_train": 16, "num_eval": 4}
    for name, changes in {
        "kfac": {**digits, **kfac(schedule="every"), "augment": {"mixup_alpha": 0.4, "erasing": erasing}},
        "eq21": {**digits, **kfac(schedule="eq21")},
        "adaptive": {**digits, **kfac(schedule="adaptive", threshold=0.1)},
        "sgd": {**digits, **SGD, "schedule": COSINE},
        **{name: {**digits, **baseline(name), "schedule": ONE_CYCLE} for name in ("muon", "adamw", "lars")},
        "cifar10": {"data": {"name": "cifar10", "root": str(cifar_folder)}, **SGD, "schedule": CONSTANT},
        "svhn": {"data": {"name": "svhn", "root": str(svhn_folder)}, **SGD},
        "synthetic": {"data": {"name": "synthetic", "synthetic": made}, **SGD},
        "imagenet": {
            "data": {
                "name": "imagenet",
                "root": str(imagenet_folder),
                "preprocessing": "random_resized_crop",
                "image_size": 16,
            },
            **SGD,
        },
    }.items():
        finished = command(write_config({**batch, **changes}))
        assert finished.code == 0, f"{name}: {finished.err}"
    assert command(write_config(), "--explain").code == 0
    keys = set(leaf_keys(Config))
    assert sorted(keys - keys_read) == []
    assert len(keys) > 40  # the walk found the sections
