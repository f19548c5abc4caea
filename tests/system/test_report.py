"""The commands of the reports, and their pages in a browser."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from kfac_dist.report.command import main
from tests.unit.report.synthetic_run import write_run
from tests.unit.report.synthetic_study import make_results, write_study

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars", "--enable-logging=stderr",
    "--virtual-time-budget=2000",
)  # fmt: skip
PHONE, DESKTOP = 390, 1200

# Runs inside the page and tells the frame around it what a reader would see.
PROBE = """<script>
const pictures = [...document.querySelectorAll("svg, img")].map(picture => {
  const box = picture.getBoundingClientRect();
  return picture.tagName == "IMG" ? picture.complete && picture.naturalWidth > 0
    : box.width >= 200 && box.height >= 60 && box.right <= innerWidth && picture.querySelectorAll("path").length > 3;
});
const style = element => getComputedStyle(element);
parent.postMessage(JSON.stringify({
  width: innerWidth, overflow: document.documentElement.scrollWidth - innerWidth, pictures,
  page: style(document.body).backgroundColor, text: style(document.body).color,
  axes: [...document.querySelectorAll("svg text")].map(text => style(text).fill),
}), "*");
</script>"""
FRAME = """<!DOCTYPE html><meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">
<body style="margin:0"><iframe src="page.html" style="border:0;width:{width}px;height:3000px"></iframe>
<script>addEventListener("message", event => {{ document.body.dataset.seen = event.data; }});</script>"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A page of each kind: of a study, of its unfinished copy, of a run, of two groups of runs, of a study's."""
    folder = tmp_path_factory.mktemp("reports")
    results = make_results(("kfac", "sgd"), ("net",), (128, 256, 512), points=4)
    write_study(folder / "study", results, missing=[("net", "kfac", 512)])
    for seed in (0, 1):
        write_run(folder / f"kfac{seed}", "kfac", seed=seed, final=0.9 + 0.01 * seed)
        write_run(folder / f"sgd{seed}", "sgd", seed=seed, final=0.8 + 0.02 * seed)
    runs = [f"K-FAC={folder}/kfac*", f"SGD={folder}/sgd*"]
    best = [f"{folder}/study:kfac", f"{folder}/study:sgd", "--batch-size", "256"]
    for arguments in (
        ["study", folder / "study"],
        ["card", folder / "kfac0", "--output", folder / "card.html"],
        ["pair", *runs, "--output", folder / "pair.html"],
        ["pair", *best, "--output", folder / "best.html"],
    ):
        assert main([str(argument) for argument in arguments]) == 0
    return folder


def test_the_study_s_page_says_what_there_is(pages):
    text = (pages / "study" / "report.html").read_text()
    assert "1 of 103 trials have no result yet" in text  # 3 batch sizes × 2 optimizers × (16 + another seed), and 1
    assert re.findall(r'class="finding (\w+)"', text) == re.findall(r"</span> (\w+)</p>", text)
    assert len(re.findall(r'class="finding', text)) == 5
    assert text.count('role="img"') == text.count("<svg") > 20
    markdown = (pages / "study" / "report.md").read_text()
    for picture in re.findall(r"\]\((.*?\.svg)\)", markdown):
        assert (pages / "study" / picture).exists()
    assert len((pages / "study" / "report.csv").read_text().splitlines()) == 102 + 1


def test_the_numbers_of_the_study_are_on_its_page(pages):
    results = [json.loads(path.read_text()) for path in (pages / "study" / "results").iterdir()]
    best = {}
    for one in results:
        if one["status"] == "done" and one["seed"] == 0:
            key = one["optimizer"], one["batch_size"]
            best[key] = max(best.get(key, one), one, key=lambda one: one["final"]["test_top1"])
    text = (pages / "study" / "report.html").read_text()
    for (optimizer, size), one in best.items():
        finals = [
            100 * other["final"]["test_top1"]
            for other in results
            if (other["optimizer"], other["batch_size"], other["parameters"]) == (optimizer, size, one["parameters"])
        ]
        assert len(finals) == 2
        assert f"{sum(finals) / 2:.2f} ({min(finals):.2f} … {max(finals):.2f}, n = 2)" in text


def test_a_card_tells_of_curvature_and_events(pages):
    text = (pages / "card.html").read_text()
    for part in ("Staleness", "largest eigenvalue", "factorisations repeated", "damping beside the curvature", "2.14"):
        assert part in text
    assert "Curvature" not in (pages / "pair.html").read_text()


def test_a_comparison_pairs_the_seeds_and_names_the_tuning(pages):
    text = (pages / "pair.md").read_text()
    # Finals 78.75 and 79.625 % against 70.0 and 71.75 %: differences 8.75 and 7.875.
    assert "| K-FAC | 79.19 (78.75 … 79.62, n = 2) | +8.31 ± 5.56 (paired, n = 2) |" in text
    assert "| SGD | 70.88 (70.00 … 71.75, n = 2) | – |" in text
    assert "| K-FAC | 3.0 (1.00 ×) | 12.0 (1.00 ×) | 0.8 (1.00 ×) |" in text
    assert "| tuning | best of 16 configurations by final test accuracy |" in (pages / "best.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["study", "{}"], "study.yaml: cannot be read"),
        (["card", "{}"], "no readable metrics.jsonl there; give the folder of a run"),
        (["pair", "{}/kfac0", "--output", "x.html"], "GROUP must be given at least twice"),
        (["pair", "{}/nothing*", "{}/sgd*", "--output", "x.html"], "no run's folder there"),
        (["pair", "{}/kfac0", "{}/kfac0", "--output", "x.html"], "labels of groups must differ"),
        (
            ["pair", "{}/study:kfac", "{}/study:sgd", "--output", "x.html"],
            "--batch-size must be given, one of 128, 256",
        ),
        (["pair", "{}/study:adam", "{}/kfac0", "--batch-size", "128", "--output", "x.html"], "it has kfac, sgd"),
        (["pair", "{}/study:kfca", "{}/study:sgd", "--output", "x.html"], "has no optimizer 'kfca', it has kfac, sgd"),
        (["card", "{}/kfac0", "--output", "x.png"], "--output must end in .html, got 'x.png'"),
    ],
)
def test_what_cannot_be_reported_is_said(pages, capsys, arguments, problem):
    assert main([argument.format(pages) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert problem in error


def look(page: Path, folder: Path, width: int, dark: bool) -> tuple[dict, list[str]]:
    """What the page looks like in a browser, and what its console says."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser here ({', '.join(BROWSERS)})")
    folder.mkdir()
    (folder / "page.html").write_text(page.read_text().replace("</body>", f"{PROBE}</body>"))
    (folder / "frame.html").write_text(FRAME.format(width=width))
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    command = [browser, *FLAGS, *scheme, f"--user-data-dir={folder}/profile", "--window-size=1300,3000", "--dump-dom"]
    done = subprocess.run([*command, (folder / "frame.html").as_uri()], capture_output=True, text=True, timeout=120)
    seen = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert seen, done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(html.unescape(seen[1])), console


def brightness(colour: str) -> float:
    return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / (3 * 255)


@pytest.mark.parametrize(
    ("name", "width", "dark"),
    [("study/report.html", PHONE, True), ("card.html", PHONE, False), ("pair.html", DESKTOP, True)],
)
def test_a_page_in_a_browser(pages, tmp_path, name, width, dark):
    seen, console = look(pages / name, tmp_path / "browser", width, dark)
    assert console == []
    assert seen["width"] == width
    assert seen["overflow"] <= 0
    assert seen["pictures"]
    assert all(seen["pictures"])
    assert (brightness(seen["page"]) < 0.2) == dark
    assert abs(brightness(seen["text"]) - brightness(seen["page"])) > 0.7
    assert seen["text"] in seen["axes"]  # of the pictures, that is


def test_the_browser_s_check_finds_what_it_looks_for(tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        '<html><body><img src="missing.png"><svg width="900" height="100"></svg><div style="width:800px">wide</div>'
        "<script>undefined_function()</script></body></html>"
    )
    seen, console = look(page, tmp_path / "browser", PHONE, dark=False)
    assert len(console) == 1
    assert seen["overflow"] > 300
    assert seen["pictures"] == [False, False]
