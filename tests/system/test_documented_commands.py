"""The code blocks of README.md, CONTRIBUTING.md and docs/ are run, in a folder far from the checkout.

A shell block goes through bash, whose programs are stand-ins that note how they were called; the notes are then carried
out in this process, which saves the start of Python and torch. CONTRIBUTING.md says what the marks before blocks mean.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from kfac_dist.commands import table, train
from kfac_dist.communicator import launch
from kfac_dist.config.load import load_config
from kfac_dist.config.recipes import recipes
from kfac_dist.data import mean_image
from tests.documents import PAGES, Block, blocks
from tests.image_tree import write_tree
from tests.paths import CONFIGS, ROOT

pytestmark = pytest.mark.slow

ALL = [block for page in PAGES for block in blocks(page)]
STAND_IN = """#!{python}
import json, sys
from pathlib import Path
with open({notes!r}, "a") as file:
    file.write(json.dumps([Path(sys.argv[0]).name, *sys.argv[1:]]) + "\\n")
"""
PROGRAMS = ("kfac-dist", "python", "mpirun", "mpirun.sh", "torchrun", "pip", "quickstart.sh", "test.sh", "setup.sh")
LAUNCHERS = ("mpirun", "mpirun.sh")
FRAGMENTS = {"kfac": "cifar10/kfac_resnet20"}  # the recipe that a piece of YAML belongs into

Note = list[str]


def marked(language: str, mark: str) -> list[Any]:
    return [pytest.param(block, id=block.place) for block in ALL if block.language == language and block.mark == mark]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's: with a finished run, a few small images as ROOT, and programs that take notes."""
    place = tmp_path_factory.mktemp("user")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert train.main(["quickstart"]) == 0
        write_tree(place / "ROOT")
        (place / "data").mkdir()
        carry_out(["python", "-m", "kfac_dist.data.mean_image", "ROOT", "--output", "FILE"], patch)
        shutil.copy(place / "FILE", place / "data/imagenet-mean-224.safetensors")
    for name in ("imagenet-bs4k", "imagenet-bs32k"):
        shutil.copytree(place / "runs/quickstart", place / "runs" / name)
    (place / "configs").symlink_to(CONFIGS)
    for path in ("bin", ".venv/bin", "scripts"):
        (place / path).mkdir(parents=True)
        for program in PROGRAMS:
            stand_in = place / path / program
            stand_in.write_text(STAND_IN.format(python=sys.executable, notes=str(place / "notes")))
            stand_in.chmod(0o755)
    return place


def notes_of(block: Block, folder: Path) -> list[Note]:
    """How a shell block calls programs."""
    (folder / "notes").write_text("")
    env = os.environ | {"PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", "-euo", "pipefail", "-c", block.text]
    finished = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, f"{block.place}: {finished.stderr}"
    return [json.loads(line) for line in (folder / "notes").read_text(encoding="utf-8").splitlines()]


def without_launcher(note: Note) -> tuple[int, Note]:
    """The ranks that a note asks for, 0 without mpirun, and the program on each."""
    if note[0] not in LAUNCHERS:
        return 0, note
    assert note[1] == "-n", note
    return int(note[2]), [Path(note[3]).name, *note[4:]]


def carry_out(note: Note, patch: pytest.MonkeyPatch) -> int:
    """Do what a program would do; returns its exit code."""
    patch.setattr(launch, "run", lambda main: sys.exit(main()))
    program, *words = note
    try:
        if program == "kfac-dist":
            return table.main(words)
        assert program == "python", f"mark the block: no test runs {program}"
        match words:
            case ["train.py", *rest]:
                return train.main(rest)
            case ["-m", "kfac_dist.data.mean_image", *rest]:
                patch.setattr(sys, "argv", ["mean_image", *rest])
                return mean_image.main(mean_image.parse_arguments())
        raise AssertionError(f"mark the block: no test runs python {words}")
    except SystemExit as leaving:
        return int(leaving.code or 0)


def planned(ranks: int, note: Note) -> Note:
    """Training becomes its explanation; what else it is goes on one rank."""
    match note:
        case ["kfac-dist", "train", *rest]:
            rest = [word for word in rest if word not in ("--resume", "auto")]
        case ["python", "train.py", *rest]:
            pass
        case ["kfac-dist", "doctor", *rest]:
            kept = rest[: rest.index("--data")] if "/data/cifar10" in rest else rest
            return ["kfac-dist", "doctor", *kept]
        case _:
            return note
    looks_only = {"--explain", "--print-config"} & set(rest)
    return ["python", "train.py", *rest, *([] if looks_only else ["--explain", "--ranks", str(ranks or 1)])]


@pytest.mark.parametrize("block", [*marked("bash", ""), *marked("bash", "planned")])
def test_a_shell_block_works(
    block: Block, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    notes = notes_of(block, folder)
    assert notes, f"{block.place} calls no program of this project"
    for note in notes:
        ranks, program = without_launcher(note)
        if block.mark == "planned":
            program = planned(ranks, program)
        else:
            assert not ranks, f"{block.place}: this test has one rank; mark the block as planned"
        code = carry_out(program, monkeypatch)
        assert code == 0, f"{block.place}, {note}:\n{capsys.readouterr().err}"


@pytest.mark.parametrize("block", marked("bash", "not run"))
def test_a_shell_block_that_is_not_run_is_well_formed(block: Block) -> None:
    finished = subprocess.run(["bash", "-n", "-c", block.text], capture_output=True, text=True)
    assert finished.returncode == 0, f"{block.place}: {finished.stderr}"
    for path in [word for line in block.text.splitlines() for word in line.split() if word.startswith("scripts/")]:
        assert (ROOT / path).is_file(), f"{block.place}: {path}"


@pytest.mark.parametrize("block", [block for block in marked("python", "") if not block.values[0].is_file])
def test_a_python_block_works(block: Block, run_in_folder: Callable[[str], None]) -> None:
    run_in_folder(block.text)


@pytest.fixture
def run_in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    monkeypatch.chdir(folder)
    return lambda text: exec(compile(text, "documentation", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("block", marked("python", "not run"))
def test_a_python_block_that_is_not_run_imports_what_there_is(block: Block) -> None:
    tree = ast.parse(block.text)
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert imports, block.place
    exec(compile(ast.Module(imports, []), block.place, "exec"), {})


@pytest.mark.parametrize("block", [block for block in marked("yaml", "") if not block.values[0].is_file])
def test_a_yaml_block_is_valid(block: Block, tmp_path: Path) -> None:
    settings = yaml.safe_load(block.text)
    if "run" not in settings:
        (section,) = settings
        whole = yaml.safe_load(recipes()[FRAGMENTS[section]].read_text(encoding="utf-8"))
        settings = whole | {section: whole[section] | settings[section]}
    (tmp_path / "block.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    load_config(tmp_path / "block.yaml")


def test_every_block_is_of_a_language_and_marks_give_reasons() -> None:
    assert {block.language for block in ALL} <= {"bash", "python", "yaml", "toml", "text"}
    assert len(ALL) > 25
    for block in ALL:
        assert block.mark in ("", "planned", "not run")
        assert block.mark == "" or len(block.reason) > 8, block.place
        for word in block.reason.split():
            if word.startswith("tests/"):
                assert (ROOT / word.rstrip(",;")).is_file(), f"{block.place}: {word}"
    fences = sum(page.read_text(encoding="utf-8").count("```") for page in PAGES)
    assert fences == 2 * len(ALL), "a fence that the pattern of tests/documents.py misses"


def test_a_block_that_fails_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = partial(Block, ROOT / "README.md", 1, "bash", mark="", reason="", is_file=False)
    monkeypatch.chdir(folder)
    (note,) = notes_of(block(text="for name in a; do kfac-dist evaluate runs/$name; done"), folder)
    assert note == ["kfac-dist", "evaluate", "runs/a"]
    assert carry_out(note, monkeypatch) == 2
    with pytest.raises(AssertionError, match="nosuch"):
        notes_of(block(text="nosuch"), folder)
