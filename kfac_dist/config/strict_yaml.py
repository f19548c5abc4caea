"""YAML without its surprises: the reader and the writer of configuration files.

Scalars follow YAML 1.2 (``1e-3`` is a number; ``on``, ``off``, ``yes`` and ``no`` are text). Anything that
could expand, hide or run something is refused: aliases, tags, repeated keys, several documents, large files.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from kfac_dist.errors import InputError

MAX_FILE_BYTES = 1_000_000
MAX_DEPTH = 20

# Kinds of plain scalars: what they match, and how they are read. Every other scalar is text.
_SCALARS: dict[str, tuple[str, Callable[[str], object]]] = {
    "null": (r"~|null|Null|NULL|", lambda text: None),
    "bool": (r"true|True|TRUE|false|False|FALSE", lambda text: text.lower() == "true"),
    "int": (r"[-+]?[0-9]+", int),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        lambda text: float(text.lower().replace(".inf", "inf").replace(".nan", "nan")),
    ),
}


class _Loader(yaml.SafeLoader):
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise _refusal("anchors (&) and aliases (*) are not accepted; write the value out", event)
        if getattr(event, "tag", None) is not None:
            raise _refusal("tags (!) are not accepted; put text that starts with ! in quotes", event)
        if self.depth >= MAX_DEPTH:
            raise _refusal(f"nested more than {MAX_DEPTH} levels deep", event)
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True


# The dumper gets the scalars of the loader, so that it quotes exactly the text that the loader would misread.
for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {}
    for _kind, (_pattern, _) in _SCALARS.items():
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"(?:{_pattern})\Z"), None)


def _value(node: yaml.Node) -> object:
    if isinstance(node, yaml.SequenceNode):
        return [_value(item) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, object] = {}
        for key_node, value_node in node.value:
            key = _value(key_node)
            if not isinstance(key, str):
                raise _refusal("a key must be text", key_node)
            if key in mapping:
                raise _refusal(f"the key {key!r} is given twice", key_node)
            mapping[key] = _value(value_node)
        return mapping
    kind, text = node.tag.rpartition(":")[2], str(node.value)
    try:
        text.encode("utf-8")
        return _SCALARS[kind][1](text) if kind in _SCALARS else text
    except UnicodeEncodeError:
        raise _refusal("an escape that is half a character (a lone surrogate)", node) from None
    except ValueError:  # Python refuses to read integers of thousands of digits
        raise _refusal(f"an integer of {len(text)} digits", node) from None


def _refusal(problem: str, place: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=place.start_mark)


def parse(text: str, source: str) -> object:
    """Read one YAML document.

    Args:
        text: The document.
        source: What to call it in an error, such as its file name.

    Returns:
        None, bool, int, float, str, list or dict with text keys, nested.

    Raises:
        InputError: If it is not YAML, or uses a feature that is refused; with line and column.
    """
    try:
        node = yaml.compose(text, _Loader)
        return None if node is None else _value(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        raise InputError(f"{source}{place}: cannot be read as YAML: {problem}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        character = f"{error.character!r}" if isinstance(error.character, bytes) else f"U+{error.character:04X}"
        raise InputError(f"{source}, line {line}: cannot be read as YAML: the character {character}") from None
    except (ValueError, OverflowError) as error:  # such as the escape "\UFFFFFFFF"
        raise InputError(f"{source}: cannot be read as YAML: {error}") from None


def read_mapping(path: Path) -> dict[str, object]:
    """Read a YAML file whose root is a mapping.

    Args:
        path: The file: UTF-8, at most `MAX_FILE_BYTES`.

    Returns:
        The root mapping.

    Raises:
        InputError: If the file is missing, a directory, too large, not UTF-8, not YAML, or not a mapping.
    """
    try:
        if path.is_dir():
            raise InputError(f"{path}: is a directory; give a YAML file")
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file (the current directory is {Path.cwd()})") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    if len(content) > MAX_FILE_BYTES:
        raise InputError(f"{path}: is larger than {MAX_FILE_BYTES} bytes, so not a configuration file")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text (byte 0x{content[error.start]:02x} at {error.start})") from None
    root = parse(text, str(path))
    if not isinstance(root, dict):
        found = "is empty" if root is None else f"holds no mapping but {str(root)[:40]!r}"
        raise InputError(f"{path}: {found}; a configuration is a mapping of sections such as `run:` and `data:`")
    return root


def dump(mapping: Mapping[str, object]) -> str:
    """Write a mapping, whose text is printable, as YAML that `parse` reads back as the same values."""
    return yaml.dump(
        dict(mapping), Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110
    )
