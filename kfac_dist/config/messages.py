"""Turns what pydantic found wrong into one line a problem: dotted key, rule, value, remedy."""

import difflib
import reprlib
from collections.abc import Iterator
from typing import get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
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


_NEW_NAMES = {"stretch": "interval_multiplier"}


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
    if kind == "missing":
        return f"{key} is required; it has no default"
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        tag = f"{key}.{context['discriminator'].strip(chr(39))}"
        if kind == "union_tag_not_found":
            return f"{tag} is required; it has no default"
        return f"{tag} must be one of {context['expected_tags']}, got {context['tag']!r}"
    rule = _RULES[kind].format(**context) if kind in _RULES else problem["msg"]
    return f"{key} {rule}, got {_show(problem['input'])}"


def _dotted(location: tuple[int | str, ...], model: type[BaseModel]) -> str:
    """The key as it stands in the file: pydantic's location without the tags that it puts in for unions."""
    text = ""
    sections = [model]
    parts = iter(location)
    for part in parts:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
        fields = [section.model_fields[str(part)] for section in sections if str(part) in section.model_fields]
        sections = [section for field in fields for section in _sections(field)]
        if fields and fields[0].discriminator:
            next(parts, None)
    return text.lstrip(".")


def _sections(field: FieldInfo) -> list[type[BaseModel]]:
    """The kinds of section that a field may hold; none for a plain value."""
    kinds = (field.annotation, *get_args(field.annotation))
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]


def _known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        for section in _sections(field):
            yield from _known_keys(section, f"{prefix}{name}.")


def _suggest(key: str, model: type[BaseModel]) -> str:
    known = list(dict.fromkeys(_known_keys(model)))
    section, _, name = key.rpartition(".")
    if name in _NEW_NAMES:
        return f"its name is now {section}.{_NEW_NAMES[name]}"
    if key in known:
        return f"it belongs to another kind of {section}"
    elsewhere = [candidate for candidate in known if candidate.rpartition(".")[2] == name]
    if elsewhere:
        return f"did you mean {min(elsewhere, key=lambda candidate: candidate.count('.'))}?"
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
