import errno
import functools
import re
from pathlib import Path

import numpy as np
import pytest

from kfac_dist.errors import InputError
from kfac_dist.report.document import Figure, Findings, Listing, Page, Paragraph, Section, Table, Tiles
from kfac_dist.report.findings import Finding, Vote
from kfac_dist.report.pictures import INK, draw, log_axis, looks_of, plain, short, slug
from kfac_dist.report.render import check_output, to_html, to_markdown, write_page
from kfac_dist.report.scaling import readable_target
from kfac_dist.report.sensitivity import Grid
from kfac_dist.report.study_pictures import draw_heat_map


def line(axes):
    axes.plot([1, 2], [3, 4], label="a < b")
    axes.set_title("<title>")


@functools.cache
def make_page():
    finding = Finding("a & b", "contradicted", "0 of 1.", "a rule", (Vote("x<y", "1.5", -1, 1.5),))
    blocks = [
        Paragraph("one < two"), Paragraph("careful", is_notice=True), Tiles([("steps", "68")]),
        Table(["name", "value"], [["a|b", "1"]], "numbers"), Findings([finding]), Listing("settings", "lr: <0.1>"),
        Figure([draw("first", "a line", line), draw("second", "another line", line)], "two lines"),
    ]  # fmt: skip
    return Page("A <page>", "what it is", [], [Section("All of it", blocks)])


def test_the_page_needs_nothing_else():
    html = to_html(make_page())
    assert html.count("<svg") == 2
    for outside in ("<script", "@import", "src=", "<!DOCTYPE svg", "<?xml", "<metadata"):
        assert outside not in html
    assert re.findall(r'<link[^>]*href="([^"]*)"', html) == ["data:,"]
    assert not [url for url in re.findall(r"url\(([^)]*)\)", html) if not url.startswith("#")]


def test_texts_are_escaped_and_pictures_are_not():
    html = to_html(make_page())
    assert "<title>A &lt;page&gt;</title>" in html
    assert "one &lt; two" in html
    assert "lr: &lt;0.1&gt;" in html
    assert "&lt;svg" not in html
    assert html.count("<title>") == 1  # the pictures' texts are escaped, too


def test_ids_are_unique_and_references_find_them():
    html = to_html(make_page())
    ids = re.findall(r'\bid="([^"]*)"', html)
    assert len(ids) == len(set(ids))
    references = re.findall(r"url\(#([^)]*)\)", html) + re.findall(r'xlink:href="#([^"]*)"', html)
    assert references
    assert set(references) <= set(ids)


def test_text_and_axes_take_the_page_s_colour():
    page = make_page()
    assert all(INK in panel.svg for panel in page.panels)
    html = to_html(page)
    assert INK not in html
    assert "currentColor" in html
    assert "prefers-color-scheme: dark" in html


def test_markdown_says_the_same():
    text = to_markdown(make_page(), "figures")
    assert "# A <page>" in text
    assert "> careful" in text
    assert "| name | value |\n| --- | ---: |\n| a\\|b | 1 |\n" in text
    assert "1. ✗ **contradicted**: a & b" in text
    assert "- (against) x<y: 1.5" in text
    assert "![a line](figures/first.svg)" in text
    assert "```text\nlr: <0.1>\n```" in text


def test_files_of_a_page_and_none_of_an_older_one(tmp_path):
    (tmp_path / "report-figures").mkdir()
    (tmp_path / "report-figures" / "old.svg").write_text("<svg/>")
    written = write_page(make_page(), tmp_path / "report.html")
    assert [path.name for path in written] == ["report.html", "report.md"]
    assert sorted(path.name for path in (tmp_path / "report-figures").iterdir()) == ["first.svg", "second.svg"]
    assert (tmp_path / "report-figures" / "first.svg").read_text().startswith("<svg ")


def test_the_same_drawing_is_the_same_file():
    assert draw("first", "a line", line) == draw("first", "a line", line)


def test_outputs_that_cannot_be(tmp_path, monkeypatch):
    def full_disk(path, *_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")  # which, as of a write, names no file

    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        write_page(make_page(), tmp_path / "file" / "x.html")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full_disk)
        with pytest.raises(InputError, match=r"cannot write \S+x.html \(No space left"):
            write_page(make_page(), tmp_path / "x.html")
    with pytest.raises(InputError, match=r"--output must end in .html, got 'report.pdf'"):
        check_output("report.pdf")
    assert check_output("a/report.HTML") == Path("a/report.HTML")


def test_an_optimizer_has_its_colour_in_every_figure():
    first = looks_of({"kfac": "kfac", "sgd": "sgd"})
    second = looks_of({"mine": "sgd", "muon": "muon", "K-FAC": "kfac"})
    assert first["kfac"].colour == second["K-FAC"].colour
    assert first["sgd"].colour == second["mine"].colour


def test_optimizers_differ_in_colour_and_marker():
    kinds = {"a": "kfac", "b": "kfac", "c": "sgd", "d": "soap", "e": "muon", "f": "adamw", "g": "lars"}
    looks = looks_of(kinds)
    assert len({look.colour for look in looks.values()}) == len(kinds)
    assert len({look.marker for look in looks.values()}) == len(kinds)
    assert looks["a"].colour == looks_of({"kfac": "kfac"})["kfac"].colour


def test_a_heat_map_shows_every_number():
    top1 = np.array([[0.81, 0.0], [0.5, np.nan]])
    grid = Grid("damping", np.array([0.01, 0.1]), np.array([0.001, 0.3]), top1[None])
    svg = draw_heat_map("map", "title", grid, 0.81).svg
    texts = re.findall(r">([^<>]+)</text>", svg)
    assert texts.count("81.0") == texts.count("50.0") == texts.count("×") == 1
    assert "nan" not in svg.lower().replace("unan", "")
    assert {"0.01", "0.1", "1e-3", "0.001", "0.3", "damping", "learning rate"} >= set(texts) - {
        "81.0",
        "50.0",
        "×",
        "title",
    }


def test_a_wide_heat_map_has_whole_numbers():
    top1 = np.array([[0.814, 0.7, 0.6, 0.5, 0.4, 0.3]])
    grid = Grid("", np.arange(1.0, 7.0), np.array([0.0]), top1[None])
    texts = re.findall(r">([^<>]+)</text>", draw_heat_map("map", "title", grid, 0.814).svg)
    assert {"81", "70", "60", "50", "40", "30"} <= set(texts)


def test_a_heat_map_of_one_parameter_has_no_second_axis():
    panel = draw_heat_map(
        "map", "title", Grid("", np.array([0.01, 0.1]), np.array([0.0]), np.array([[[0.8, 0.7]]])), 0.8
    )
    assert set(re.findall(r">([^<>]+)</text>", panel.svg)) == {"title", "learning rate", "0.01", "0.1", "80.0", "70.0"}
    assert panel.alt == "title: test accuracy over learning rate"


def test_a_logarithmic_axis_has_readable_ticks_within_a_decade():
    seen = []

    def fill(axes):
        axes.plot([1, 2], [15, 40])
        log_axis(axes, "y")
        seen.extend(axes.get_yticks())

    draw("ticks", "ticks", fill)
    assert seen == pytest.approx([20, 30])


@pytest.mark.parametrize(
    ("value", "text"), [(0.001, "0.001"), (0.00003, "3e-5"), (0.2187, "0.219"), (20, "20"), (1500, "1,500"), (0, "0")]
)
def test_numbers_are_short(value, text):
    assert plain(value) == text


def test_names():
    assert [short(size) for size in (128, 1024, 65536, 1500)] == ["128", "1k", "64k", "1500"]
    assert slug("scaling net train_loss<=0.5") == "scaling-net-train-loss-0-5"
    assert readable_target("train_loss<=0.5") == "training loss ≤ 0.5"
    assert readable_target("test_top1>=0.6") == "test accuracy ≥ 0.6"
