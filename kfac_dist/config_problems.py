"""Turns what pydantic found wrong into one line a problem: dotted key, rule, value, remedy."""

import difflib
import reprlib
from collections.abc import Iterator
from typing import get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

_RULES = {
    "greater_than": "must be > {gt:g}",
    "greater_than_equal": "must be >= {ge:g}",
    "less_than": "must be < {lt:g}",
    "less_than_equal": "must be <= {le:g}",
    "finite_number": "must be a finite number",
    "int_type": "must be an integer",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "string_too_short": "must not be empty",
    "string_pattern_mismatch": "must start with a letter or digit, and hold only letters, digits and . _ + -",
    "tuple_type": "must be a list",
    "too_long": "must be a list of {max_length}",
    "literal_error": "must be {expected}",
    "model_type": "must be a section",
    "model_attributes_type": "must be a section",
    "value_error": "{error}",
}


def describe(problem: ErrorDetails, model: type[BaseModel]) -> str:
    """One line that says what is wrong, such as ``kfac.damping.target must be > 0, got -0.1``.

    Args:
        problem: One entry of ``ValidationError.errors()``.
        model: The model that was validated; its fields are the known keys.

    Returns:
        The line, without a full stop.
    """
    key = _dotted(problem["loc"], model)
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        return f"{key} is not a known key; {_suggest(key, model)}"
    if kind == "missing" and key.endswith("]"):
        return f"{key} is missing from the list"
    if kind in ("missing", "union_tag_not_found"):
        return f"{key}{'.kind' if kind != 'missing' else ''} is required; it has no default"
    if kind == "union_tag_invalid":
        return f"{key}.kind must be one of {context['expected_tags']}, got {context['tag']!r}"
    rule = _RULES[kind].format(**context) if kind in _RULES else problem["msg"]
    return f"{key} {rule}, got {_show(problem['input'])}"


def _dotted(location: tuple[int | str, ...], model: type[BaseModel]) -> str:
    parts = list(location)
    field = model.model_fields.get(str(parts[0]))
    if len(parts) > 1 and field is not None and field.discriminator:
        del parts[1]  # the tag of a union, which pydantic names and the file does not
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).lstrip(".")


def _known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        for section in (field.annotation, *get_args(field.annotation)):
            if isinstance(section, type) and issubclass(section, BaseModel):
                yield from _known_keys(section, f"{prefix}{name}.")


def _suggest(key: str, model: type[BaseModel]) -> str:
    known = list(dict.fromkeys(_known_keys(model)))
    section, _, name = key.rpartition(".")
    if key in known:
        return f"it belongs to another {section}.kind"
    elsewhere = [candidate for candidate in known if candidate.rpartition(".")[2] == name]
    if len(elsewhere) == 1:
        return f"did you mean {elsewhere[0]}?"
    siblings = [candidate.rpartition(".")[2] for candidate in known if candidate.rpartition(".")[0] == section]
    close = difflib.get_close_matches(name, siblings, n=1, cutoff=0.6)
    if close:
        return f"did you mean {section}{'.' if section else ''}{close[0]}?"
    return f"known keys of {section or 'a configuration'}: {', '.join(siblings)}"


def _show(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    shortener = reprlib.Repr()
    shortener.maxstring = shortener.maxother = 60
    return shortener.repr(value)
