"""A page as one self-contained HTML file, and as Markdown with its pictures in a folder beside it."""

import re
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from kfac_dist import __version__
from kfac_dist.errors import InputError
from kfac_dist.report.document import Page, Panel
from kfac_dist.report.pictures import INK

MARKS = {"confirmed": "✓", "contradicted": "✗", "undecided": "?"}

_TAG = re.compile(r"<[^>]*>")


def to_html(page: Page) -> str:
    """The page with all its pictures inside; it needs no other file and no network."""
    template = _environment(autoescape=True).get_template("page.html.j2")
    return template.render(page=page, marks=MARKS, version=__version__)


def to_markdown(page: Page, pictures: str) -> str:
    """The same, with its pictures as files in the folder `pictures`."""
    template = _environment(autoescape=False).get_template("page.md.j2")
    text = template.render(page=page, marks=MARKS, version=__version__, pictures=pictures)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def check_output(output: str | Path) -> Path:
    """The output, before anything is drawn for it.

    Raises:
        InputError: If it does not end in .html.
    """
    if Path(output).suffix.lower() != ".html":
        raise InputError(f"--output must end in .html, got {str(output)!r}")
    return Path(output)


def write_page(page: Page, output: Path) -> list[Path]:
    """Write OUTPUT.html, OUTPUT.md and OUTPUT-figures/*.svg.

    Returns:
        The HTML and the Markdown file.

    Raises:
        InputError: If the output cannot be written.
    """
    markdown, folder = output.with_suffix(".md"), output.with_name(f"{output.stem}-figures")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob("*.svg"):
            stale.unlink()
        for panel in page.panels:
            (folder / f"{panel.name}.svg").write_text(panel.svg + "\n", encoding="utf-8")
        output.write_text(to_html(page), encoding="utf-8")
        markdown.write_text(to_markdown(page, folder.name), encoding="utf-8")
    except OSError as error:
        raise InputError(f"--output: cannot write {error.filename or output} ({error.strerror})") from error
    return [output, markdown]


def _environment(autoescape: bool) -> Environment:
    environment = Environment(
        loader=PackageLoader("kfac_dist.report"),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["inline"] = _inline
    environment.filters["cell"] = lambda text: str(text).replace("|", "\\|").replace("\n", " ")
    return environment


def _inline(panel: Panel) -> Markup:
    """The picture inside a page: in the page's text colour, and its ids unlike those of other pictures."""

    def own(tag: re.Match[str]) -> str:
        text = re.sub(r'\b(id|xlink:href)="(#?)', rf'\1="\2{panel.name}-', tag[0])
        return text.replace("url(#", f"url(#{panel.name}-").replace(INK, "currentColor")

    return Markup(_TAG.sub(own, panel.svg))
