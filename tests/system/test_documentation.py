"""What the documentation names is there: files, links, anchors, messages, results, pictures; examples as they stand."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest
import yaml

import kfac_dist
from tests.documents import PAGES, blocks, without_blocks
from tests.paths import ROOT

EXAMPLE = ROOT / "examples/own_script.py"
FOLDERS = "kfac_dist|configs|scripts|docs|docker|benchmarks|examples|tests"
TROUBLES = ROOT / "docs/troubleshooting.md"


def test_the_page_shows_the_example_as_it_stands() -> None:
    (shown,) = [block.text for block in blocks(ROOT / "docs/own-script.md") if block.language == "python"]
    assert shown == EXAMPLE.read_text(encoding="utf-8")
    assert shown.count("\n") < 40


def test_the_citation_is_of_this_version_and_names_both_papers() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == kfac_dist.__version__
    titles = " ".join(reference["title"] for reference in citation["references"])
    assert "Using Kronecker-Factored Approximate Curvature" in titles
    assert "Inefficiency of K-FAC" in titles


def test_the_readme_is_short() -> None:
    assert (ROOT / "README.md").read_text(encoding="utf-8").count("\n") <= 90


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_exists(page: Path) -> None:
    named = set(re.findall(rf"`((?:{FOLDERS})/[\w./-]*)`", without_blocks(page)))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as code hosts and Python-Markdown make them where they agree."""
    headings = re.findall(r"^#+ (.*)$", without_blocks(page), re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    dead = []
    for link in re.findall(r"\]\((?!https?://)([^)\s]+)\)", without_blocks(page)):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.is_file() or ROOT not in target.parents or (anchor and anchor not in anchors(target)):
            dead.append(link)
    assert dead == []


def test_the_checks_find_what_they_look_for(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A heading, `code`\n\n```bash\n# no heading\n```\n\n[x](nowhere.md)\n")
    assert anchors(page) == {"a-heading-code"}
    with pytest.raises(AssertionError, match=r"nowhere\.md"):
        test_every_link_leads_somewhere(page)


def test_every_result_has_a_line() -> None:
    page = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    results = sorted(path.name for path in (ROOT / "benchmarks/results").glob("*.md"))
    assert [name for name in results if f"(../benchmarks/results/{name})" not in page] == []


def messages(folder: Path) -> list[str]:
    """All texts in the code's literals, `\0` where a value is put in."""
    found = []
    for path in sorted(folder.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if id(node) in docstrings:
                continue
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%(\.0)?[sdf]", "\0", node.value))
    return found


def quoted_messages() -> list[str]:
    return re.findall(r"^### `(.*)`$", TROUBLES.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.fixture(scope="module")
def code_messages() -> str:
    return "\n\0\n".join(messages(ROOT / "kfac_dist"))


@pytest.mark.parametrize("quoted", quoted_messages())
def test_a_quoted_message_is_one_of_the_codes(quoted: str, code_messages: str) -> None:
    """What stands between the `…` is in one message, in this order, with a value between."""
    parts = [re.escape(part) for part in quoted.split("…")]
    assert re.search("\0[^\n]{0,60}?".join(parts), code_messages), quoted


def test_all_headings_of_troubles_are_messages() -> None:
    headings = re.findall(r"^### (.*)$", TROUBLES.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(headings) == len(quoted_messages()) > 30


def test_the_picture_is_what_its_script_draws() -> None:
    spec = importlib.util.spec_from_file_location("draw_step", ROOT / "scripts/docs/draw_step.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs/images/step.svg").read_text(encoding="utf-8") == module.draw()


def test_marks_of_blocks(tmp_path: Path) -> None:
    fence = "```bash\nx\n```\n"
    page = tmp_path / "page.md"
    page.write_text(
        f"{fence}<!-- planned: a GPU -->\n{fence}<!-- not run: a GPU -->\n{fence}<!-- tests/x.py runs it -->\n{fence}"
        f"<!-- something else -->\n{fence}`a/b.py`:\n\n{fence}",
        encoding="utf-8",
    )
    found = blocks(page)
    assert [block.mark for block in found] == ["", "planned", "not run", "not run", "", ""]
    assert [block.reason for block in found][1:4] == ["a GPU", "a GPU", "tests/x.py runs it"]
    assert [block.is_file for block in found] == [False] * 5 + [True]
    assert [block.line for block in found][:2] == [1, 5]
