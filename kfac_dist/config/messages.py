"""Turns what pydantic found wrong into one line a problem: dotted key, rule, value, remedy."""

import difflib
import reprlib
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from kfac_dist.config.entry_points import DATASETS, installed_names
from kfac_dist.config.sections import KeyProblem, Kind

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
    "dict_type": "must be a section",
    "literal_error": "must be {expected}",
    "model_type": "must be a section",
    "model_attributes_type": "must be a section",
    "value_error": "{error}",
}
_NEW_NAMES = {"stretch": "interval_multiplier"}
_NOT_TEXT = {bool: "the truth value", int: "the number", float: "the number"}


class _Place(NamedTuple):
    """A dotted key, the class of its section, and of a section that comes in several kinds: which it is, of which."""

    key: str
    section: type[BaseModel]
    choice: str = ""  # such as "data.name is digits"
    kinds: Mapping[str, type[BaseModel]] = MappingProxyType({})


def describe(problem: ErrorDetails, model: type[BaseModel]) -> str:
    """One line that says what is wrong, such as ``kfac.damping.target must be > 0, got -0.1``.

    Args:
        problem: One entry of ``ValidationError.errors()``.
        model: The model that was validated; its fields are the known keys.

    Returns:
        The line, without a full stop.
    """
    place = _locate(problem["loc"], model)
    key, kind, found, context = place.key, problem["type"], problem["input"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        return _describe_unknown(place, found, model)
    if kind == "missing" and key.endswith("]"):
        return f"{key} is missing from the list"
    if kind == "missing":
        rule = place.section.model_fields[str(problem["loc"][-1])].description
        return f"{key} {rule}, got null" if rule else f"{key} is required; it has no default"
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        tag = f"{key}.{context['discriminator'].strip(chr(39))}"
        if kind == "union_tag_not_found":
            return f"{tag} is required; it has no default"
        own = installed_names(DATASETS) if tag == "data.name" else []
        others = f", or of an installed package: {', '.join(map(repr, own))}" if own else ""
        return f"{tag} must be one of {context['expected_tags']}{others}, got {context['tag']!r}"
    if kind == "string_type" and type(found) in _NOT_TEXT:
        shell = "" if key.endswith("]") else f" (on a command line: \"{key}='...'\")"
        return f"{key} must be text, got {_NOT_TEXT[type(found)]} {_show(found)}; quotes make it text{shell}"
    rule, error = _RULES[kind].format(**context) if kind in _RULES else problem["msg"], context.get("error")
    if isinstance(error, KeyProblem):
        key, rule, found = _join(key.rpartition(".")[0], error.key), error.rule, error.value
    return f"{key} {rule}, got {_show(found)}"


def _locate(location: tuple[int | str, ...], model: type[BaseModel]) -> _Place:
    """Where pydantic's location is, in which a tag follows each key whose section comes in several kinds."""
    place = inner = _Place("", model)
    parts = iter(location)
    for part in parts:
        key = f"{inner.key}[{part}]" if isinstance(part, int) else _join(inner.key, part)
        place = inner._replace(key=key)
        field = inner.section.model_fields.get(str(part))
        sections = _sections(field) if field is not None else []
        if field is not None and isinstance(field.discriminator, str):
            chooser, tag = field.discriminator, str(next(parts, ""))
            kinds = {tag: kind for kind in sections for tag in get_args(kind.model_fields[chooser].annotation)}
            inner = _Place(key, kinds.get(tag, model), f"{key}.{chooser} is {tag}", kinds)
        else:
            inner = _Place(key, sections[0] if sections else inner.section)
    return place


def _join(section: str, key: str) -> str:
    return f"{section}.{key}" if section else key


def _sections(field: FieldInfo) -> list[type[BaseModel]]:
    """The kinds of section that a field may hold; none for a plain value."""
    kinds = (field.annotation, *get_args(field.annotation))
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]


def _known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        for section in _sections(field):
            yield from _known_keys(section, f"{prefix}{name}.")


def _describe_unknown(place: _Place, value: object, model: type[BaseModel]) -> str:
    """A key that its section does not have: another kind of the section may have it, or it is not known at all."""
    section, _, name = place.key.rpartition(".")
    owners = [tag for tag, kind in place.kinds.items() if name in kind.model_fields]
    if owners:
        reason = f"it belongs to {', '.join(owners)}"
        if issubclass(place.section, Kind):
            reason = place.section.left_out.get(name, reason)
        return f"{place.key} must be left out ({place.key}=null) when {place.choice}: {reason}, got {_show(value)}"
    return f"{place.key} is not a known key; {_suggest(section, name, place.section, model)}"


def _suggest(section: str, name: str, section_class: type[BaseModel], model: type[BaseModel]) -> str:
    if name in _NEW_NAMES:
        return f"its name is now {_join(section, _NEW_NAMES[name])}"
    elsewhere = [key for key in _known_keys(model) if key.rpartition(".")[2] == name]
    if elsewhere:
        return f"did you mean {min(elsewhere, key=lambda key: key.count('.'))}?"
    siblings = list(section_class.model_fields)
    close = difflib.get_close_matches(name, siblings, n=1, cutoff=0.6)
    if close:
        return f"did you mean {_join(section, close[0])}?"
    return f"known keys of {section or 'a configuration'}: {', '.join(siblings)}"


def _show(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    shortener = reprlib.Repr()
    shortener.maxstring = shortener.maxother = 60
    return shortener.repr(value)
