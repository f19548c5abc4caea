"""A list of names that a user chooses from is written once in the package."""

import ast
from collections import defaultdict

from tests.paths import ROOT


def test_no_list_of_names_is_written_twice() -> None:
    places: dict[frozenset[str], list[str]] = defaultdict(list)
    for path in sorted((ROOT / "kfac_dist").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "Literal":
                names = frozenset(part.value for part in ast.walk(node.slice) if isinstance(part, ast.Constant))
                if len(names) > 1:
                    places[names].append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert len(places) > 8
    assert {names: found for names, found in places.items() if len(found) > 1} == {}
