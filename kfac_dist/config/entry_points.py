"""Data sets and models of installed packages: looked up by name among their entry points, so YAML names no code."""

import inspect
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import NamedTuple

from kfac_dist.errors import InputError

DATASETS = "kfac_dist.datasets"
MODELS = "kfac_dist.models"
GUIDE = "docs/own-data-and-models.md"


class Registered(NamedTuple):
    """What an installed package registers under a name; `place` introduces it in errors."""

    value: object
    place: str

    def refuse(self, rule: str, found: str) -> InputError:
        """The error for a registration that is not what its group asks for."""
        return InputError(f"{self.place} must be {rule}, got {found}: mend that package, see {GUIDE}")


def installed_names(group: str) -> list[str]:
    """Names that installed packages register in a group; loads none of them."""
    return sorted({entry.name for entry in entry_points(group=group)})


def load_registered(group: str, key: str, name: str, built_in: Iterable[str]) -> Registered | None:
    """Load what an installed package registers under a name.

    Args:
        group: `DATASETS` or `MODELS`.
        key: The configuration's key that gives the name, for messages.
        name: What to look for.
        built_in: Names that a package cannot take.

    Returns:
        None where no package registers the name.

    Raises:
        InputError: If several packages register it, it is built in as well, or it cannot be imported.
    """
    found = {
        (entry.dist.name if entry.dist else "", entry.value): entry for entry in entry_points(group=group, name=name)
    }
    if not found:
        return None
    places = [_place(key, entry) for entry in found.values()]
    if name in built_in:
        raise InputError(f"{places[0]} must have a name of its own, got one that is built in: rename or uninstall it")
    if len(found) > 1:
        raise InputError(
            f"{places[0]} must be registered once, got also {', '.join(places[1:])}: uninstall all but one"
        )
    (entry,) = found.values()
    try:
        return Registered(entry.load(), places[0])
    except Exception as error:  # another's code fails in any way while it is imported
        raise InputError(
            f"{places[0]} must be importable, got {type(error).__name__}: {error}: mend or uninstall that package"
        ) from error


def takes(function: object, num_arguments: int) -> bool:
    """Whether something can be called with so many positional arguments."""
    if not callable(function):
        return False
    try:
        inspect.signature(function).bind(*range(num_arguments))
    except TypeError:
        return False
    except ValueError:  # a function of an extension module tells no signature
        return True
    return True


def _place(key: str, entry: EntryPoint) -> str:
    package = f"package {entry.dist.name} {entry.dist.version}" if entry.dist else "an installed package"
    return f"{key} {entry.name}: {entry.value} of {package} (entry point group {entry.group})"
