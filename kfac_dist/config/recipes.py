"""The recipes that come with the package, by name: `imagenet/bs4k`, in any folder, is configs/imagenet/bs4k.yaml."""

import difflib
import stat
from pathlib import Path

from kfac_dist.errors import InputError

_PACKAGE = Path(__file__).resolve().parents[1]
# Beside the other rooms in an installed package (setup.py puts it there), beside the package in a checkout.
_FOLDERS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")


def recipes() -> dict[str, Path]:
    """The recipes' files by name, sorted; a study (configs/study/) is no configuration of a run."""
    folder = next(folder for folder in _FOLDERS if (folder / "quickstart.yaml").is_file())
    files = {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}
    return {name: path.resolve() for name, path in files.items() if not name.startswith("study/")}


def find_configuration(given: str | Path) -> Path:
    """The file that a user means: one that is there, or else the recipe of this name.

    Args:
        given: Path of a YAML file, or a recipe's name such as ``quickstart``.

    Raises:
        InputError: If it is neither; names the nearest recipe, and lists those that there are.
    """
    path, found = Path(given), recipes()
    try:
        is_folder = stat.S_ISDIR(path.stat().st_mode)
    except FileNotFoundError:
        is_there = False
    except (OSError, ValueError):  # such as a null character: reading it says what is wrong
        return path
    else:
        is_there = not (is_folder and str(given) in found)
    if is_there:
        return path
    if str(given) in found:
        return found[str(given)]
    close = difflib.get_close_matches(str(given), found, n=1)
    raise InputError(
        f"{path}: no such file (the current directory is {Path.cwd()}) and no recipe of this name; "
        + (f"did you mean {close[0]}? " if close else "")
        + f"recipes: {', '.join(found)}"
    )
