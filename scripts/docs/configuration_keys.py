"""Every key of a configuration as Markdown tables, from the classes that check it: what the site's page shows.

python scripts/docs/configuration_keys.py prints it.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from kfac_dist.config.schema import Config
from kfac_dist.config.sections import Section

_NAMES = {bool: "true or false", int: "integer", float: "number", str: "text"}
_SIGNS = {Gt: ("gt", ">"), Ge: ("ge", ">="), Lt: ("lt", "<"), Le: ("le", "<=")}


def markdown() -> str:
    """All sections, one heading and one table each, in the order of a configuration."""
    plain = [name for name, field in Config.model_fields.items() if not _sections(field)]
    parts = [f"## Without a section\n\n{_table('', Config, plain)}"]
    parts += [part for name, field in Config.model_fields.items() for part in _section_parts(name, field)]
    return "\n\n".join(dict.fromkeys(parts)) + "\n"  # a section that several kinds share stands once


def meanings(section: type[BaseModel]) -> dict[str, str]:
    """The text under each field of a class, its bases included."""
    found: dict[str, str] = {}
    for owner in reversed([base for base in section.__mro__ if issubclass(base, Section) and base is not Section]):
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                assert isinstance(field.target, ast.Name)
                found[field.target.id] = inspect.cleandoc(str(text.value.value))
    return found


def keys(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel], str]]:
    """Every key that has a value of its own: dotted, the class that has it, and its name there."""
    for name, field in section.model_fields.items():
        kinds = _sections(field)
        if not kinds:
            yield prefix + name, section, name
        for kind in kinds:
            yield from keys(kind, f"{prefix}{name}.")


def is_tag(section: type[BaseModel], name: str) -> bool:
    """Whether the key only tells which kind of section this is."""
    annotation = section.model_fields[name].annotation
    return get_origin(annotation) is Literal and len(get_args(annotation)) == 1


def _section_parts(key: str, field: FieldInfo) -> Iterator[str]:
    kinds = _sections(field)
    if len(kinds) == 1:
        yield from _one_section(f"`{key}`", key, kinds[0])
        return
    for kind in kinds:
        tag = str(field.discriminator)
        values = " or ".join(map(str, get_args(kind.model_fields[tag].annotation)))
        yield from _one_section(f"`{key}`, {tag} {values}", key, kind)


def _one_section(title: str, key: str, section: type[BaseModel]) -> Iterator[str]:
    names = [name for name, field in section.model_fields.items() if not _sections(field)]
    described = inspect.cleandoc(section.__doc__ or "").replace("(see docs/own-data-and-models.md)", "")
    yield f"## {title}\n\n{described}\n\n{_table(f'{key}.', section, names)}"
    for name, field in section.model_fields.items():
        if _sections(field):
            yield from _section_parts(f"{key}.{name}", field)


def _table(prefix: str, section: type[BaseModel], names: list[str]) -> str:
    told = meanings(section)
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name in names:
        field = section.model_fields[name]
        kind = _type(field.annotation, field.metadata).replace("|", "\\|")
        meaning = told.get(name, "Chooses this section." if is_tag(section, name) else "")
        lines.append(f"| `{prefix}{name}` | {kind} | {_default(field)} | {meaning} |")
    return "\n".join(lines)


def _sections(field: FieldInfo) -> list[type[BaseModel]]:
    kinds = (field.annotation, *get_args(field.annotation))
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    if field.default is None or isinstance(field.default, bool):
        return {None: "null", True: "true", False: "false"}[field.default]
    if isinstance(field.default, tuple):
        return str(list(field.default))
    return f"`{field.default}`" if isinstance(field.default, str) else f"{field.default:g}"


def _type(annotation: Any, metadata: list[Any]) -> str:
    """In words, with its bounds."""
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        return _type(inner, [*more, *metadata])
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) is tuple:
        inner, *others = get_args(annotation)
        what = _type(inner, [])
        return f"list of {what}" if Ellipsis in others else f"list of {1 + len(others)}: {what}"
    parts = get_args(annotation)
    if parts:
        return " or ".join("null" if part is type(None) else _type(part, metadata) for part in parts)
    is_path = any(getattr(getattr(part, "func", None), "__name__", "") == "_check_home" for part in metadata)
    bounds = [f"{sign} {getattr(part, name):g}" for part in _flat(metadata) for kind, (name, sign) in _SIGNS.items()
              if isinstance(part, kind) and getattr(part, name) < 2**63]  # fmt: skip
    return " ".join(["path" if is_path else _NAMES[annotation], ", ".join(bounds)]).strip()


def _flat(metadata: list[Any]) -> Iterator[Any]:
    for part in metadata:
        yield from part.metadata if isinstance(part, FieldInfo) else [part]


if __name__ == "__main__":
    print(markdown(), end="")
