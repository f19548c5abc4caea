"""A page as content, without a format; `render` gives it as HTML or Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from kfac_dist.report.findings import Finding


@dataclass(frozen=True)
class Paragraph:
    """Plain text; a notice stands out."""

    kind: ClassVar[str] = "paragraph"
    text: str
    is_notice: bool = False


@dataclass(frozen=True)
class Table:
    """Texts in rows.

    Attributes:
        columns: Headings.
        rows: As many texts each as there are columns.
        caption: Says what the numbers are.
        num_labels: How many of the first columns are names; the rest are numbers.
    """

    kind: ClassVar[str] = "table"
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    num_labels: int = 1


@dataclass(frozen=True)
class Panel:
    """One picture.

    Attributes:
        name: Of its file; letters, digits and dashes, once in a page.
        svg: The drawing, with `pictures.INK` for all that is text or axis.
        alt: What it shows.
    """

    name: str
    svg: str
    alt: str


@dataclass(frozen=True)
class Figure:
    """Pictures that stand side by side where the screen is wide enough."""

    kind: ClassVar[str] = "figure"
    panels: Sequence[Panel]
    caption: str


@dataclass(frozen=True)
class Findings:
    """Claims with what the data say of them."""

    kind: ClassVar[str] = "findings"
    findings: Sequence[Finding]


@dataclass(frozen=True)
class Tiles:
    """The numbers that are wanted first: label and value."""

    kind: ClassVar[str] = "tiles"
    tiles: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Listing:
    """A file's text, folded."""

    kind: ClassVar[str] = "listing"
    title: str
    text: str


Block = Paragraph | Table | Figure | Findings | Tiles | Listing


@dataclass(frozen=True)
class Section:
    """Blocks under a heading."""

    title: str
    blocks: Sequence[Block]

    @property
    def anchor(self) -> str:
        """For links."""
        return "-".join("".join(c if c.isalnum() else " " for c in self.title.lower()).split())


@dataclass(frozen=True)
class Page:
    """A whole page: what stands before the first heading, and the sections."""

    title: str
    lead: str
    blocks: Sequence[Block] = ()
    sections: Sequence[Section] = field(default_factory=list)

    @property
    def panels(self) -> list[Panel]:
        """All pictures, in order."""
        blocks = [*self.blocks, *(block for section in self.sections for block in section.blocks)]
        return [panel for block in blocks if isinstance(block, Figure) for panel in block.panels]
