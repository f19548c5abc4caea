"""What mkdocs.yml calls while it builds the site.

Links of a page are those of the checkout, so that they work where the code is read as well. A file outside of docs/
that a page links becomes a page of the site, or an image of it. README.md is the first page.
"""

import posixpath
import re
from pathlib import Path

from configuration_keys import markdown
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
DOCS = "docs/"
KEYS_MARK = "<!-- every key stands here on the site: scripts/docs/configuration_keys.py -->"
IN_NAV = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
IMAGES = (".png", ".svg")
LINK = re.compile(r"(?<=\]\()(?!https?://|mailto:|#)([^)\s#]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what pages link outside of docs/, and what is linked from there."""
    pending = [*IN_NAV, *(DOCS + file.src_uri for file in files.documentation_pages())]
    seen = set(pending)
    while pending:
        path = pending.pop()
        if not path.startswith(DOCS):
            files.append(_outside_file(path, config))
        if not path.endswith(".md"):
            continue
        for link in LINK.findall((ROOT / path).read_text(encoding="utf-8")):
            target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
            if target not in seen and (ROOT / target).is_file():  # mkdocs reports what is not there
                seen.add(target)
                pending += [] if target.startswith(DOCS) else [target]
    return files


def on_page_markdown(markdown_text: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the checkout's links into the site's, and put in the table of keys."""
    place = _checkout_path(page.file.src_uri)

    def replace(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(place), found[1]))
        return posixpath.relpath(_site_uri(target), posixpath.dirname(page.file.src_uri) or ".")

    text = LINK.sub(replace, markdown_text)
    return text.replace(KEYS_MARK, markdown()) if KEYS_MARK in text else text


def _site_uri(path: str) -> str:
    """Where a file of the checkout stands on the site."""
    if path.startswith(DOCS):
        return path.removeprefix(DOCS)
    if path.endswith((".md", *IMAGES)):
        return IN_NAV.get(path, f"checkout/{path}")
    return f"checkout/{path}.md"


def _checkout_path(uri: str) -> str:
    names = {site: path for path, site in IN_NAV.items()}
    return names.get(uri) or (uri.removeprefix("checkout/") if uri.startswith("checkout/") else DOCS + uri)


def _outside_file(path: str, config: MkDocsConfig) -> File:
    inclusion = InclusionLevel.INCLUDED if path in IN_NAV else InclusionLevel.NOT_IN_NAV
    uri, source = _site_uri(path), ROOT / path
    if path.endswith((".md", *IMAGES)):
        return File.generated(config, uri, abs_src_path=str(source), inclusion=inclusion)
    language = {".py": "python", ".yaml": "yaml", ".sh": "bash", ".json": "json"}.get(source.suffix, "text")
    text = f"# `{path}`\n\n````{language}\n{source.read_text(encoding='utf-8')}\n````\n"
    return File.generated(config, uri, content=text, inclusion=inclusion)
