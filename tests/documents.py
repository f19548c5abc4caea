"""The documentation's pages, and the code blocks in them."""

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

from tests.paths import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

_BLOCK = re.compile(
    r"(?:^ *<!-- (?P<mark>planned: |not run: |(?=tests/))(?P<reason>[^>]+) -->\n)?"
    r"^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block of code.

    Attributes:
        page: Where it stands.
        line: Of its first fence, from 1.
        language: As the fence says.
        mark: `planned` or `not run`, or empty.
        reason: Of the mark.
        is_file: Whether the page shows the content of a file that it names before.
    """

    page: Path
    line: int
    language: str
    text: str
    mark: str
    reason: str
    is_file: bool

    @property
    def place(self) -> str:
        """For messages."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """All code blocks of a page, in order."""
    content = page.read_text(encoding="utf-8")
    found = []
    for match in _BLOCK.finditer(content):
        before = content[: match.start()].rstrip().rpartition("\n")[2]
        is_file = re.fullmatch(r".*`[\w./]+\.\w+`:", before) is not None
        line = content.count("\n", 0, match.start("indent")) + 1
        text, mark, reason = textwrap.dedent(match["text"]), _mark(match["mark"]), match["reason"] or ""
        found.append(Block(page, line, match["language"], text, mark, reason, is_file))
    return found


def _mark(found: str | None) -> str:
    """A comment that begins with the test that runs a block says by that that it is not run here."""
    return "" if found is None else found.removesuffix(": ") or "not run"


def without_blocks(page: Path) -> str:
    """A page's text alone."""
    return _BLOCK.sub("", page.read_text(encoding="utf-8"))
