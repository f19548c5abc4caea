"""A user's own data set and network: the package that docs/own-data-and-models.md shows, and broken ones."""

import json
import re
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from torch import nn

from kfac_dist.models import create_model
from kfac_dist.vocabulary import Initialization
from tests.paths import ROOT

PAGE = (ROOT / "docs/own-data-and-models.md").read_text(encoding="utf-8")
FILES: dict[str, str] = dict(re.findall(r"`([\w./]+)`:\n\n```\w+\n(.*?)```", PAGE, re.DOTALL))
GROUPS: dict[str, dict[str, str]] = tomllib.loads(FILES["pyproject.toml"])["project"]["entry-points"]

Run = Callable[..., CompletedProcess[str]]


class Package:
    """A package in a folder, installed as pip would do it: metadata beside the modules, the folder on the path."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, text in FILES.items():
            self.write(name, text)
        self.install("stripes", GROUPS)
        self.env = {"PYTHONPATH": f"{folder}:{ROOT}"}
        self.config = folder / "stripes.yaml"

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def replace(self, name: str, old: str, new: str) -> None:
        text = (self.folder / name).read_text(encoding="utf-8")
        assert old in text
        self.write(name, text.replace(old, new))

    def install(self, name: str, groups: Mapping[str, Mapping[str, str]]) -> None:
        metadata = f"{name}-1.0.dist-info"
        lines = [
            line
            for group, entries in groups.items()
            for line in (f"[{group}]", *(f"{key} = {value}" for key, value in entries.items()))
        ]
        self.write(f"{metadata}/entry_points.txt", "\n".join(lines))
        self.write(f"{metadata}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")


@pytest.fixture
def package(tmp_path: Path) -> Package:
    return Package(tmp_path / "stripes")


Train = Callable[..., Any]


@pytest.fixture
def train(package: Package, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[Train]:
    """``train(*overrides)`` is train.py with the package's configuration, in this process."""
    monkeypatch.syspath_prepend(str(package.folder))
    yield lambda *overrides: command(package.config, *overrides)
    for name in [name for name in sys.modules if name.partition(".")[0] == "stripes"]:
        del sys.modules[name]


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_page_shows_all_files() -> None:
    assert set(FILES) == {"pyproject.toml", "stripes/data.py", "stripes/model.py", "stripes.yaml"}


@pytest.mark.mpi
def test_the_package_of_the_page_trains_on_two_ranks(package: Package, mpirun: Run, tmp_path: Path) -> None:
    finished = mpirun(2, ["train.py", package.config, f"run.output_dir={tmp_path}"], env=package.env, timeout=120)
    assert finished.returncode == 0, finished.stderr
    run = tmp_path / "stripes"
    assert (run / "DONE").is_file()
    assert records(run)[-1]["top1"] > 90
    assert "size: 16" in (run / "config.yaml").read_text(encoding="utf-8")


@pytest.mark.mpi
def test_a_data_set_that_reads_otherwise_on_each_rank_is_refused(package: Package, mpirun: Run, tmp_path: Path) -> None:
    """Defect: each rank took its slots, and its share of the evaluation, from other images, without a word."""
    package.replace("stripes/data.py", "default_rng(seed)", "default_rng()")
    finished = mpirun(2, ["train.py", package.config, f"run.output_dir={tmp_path}"], env=package.env, timeout=120)
    assert finished.returncode == 2, finished.stderr
    assert "all ranks must have the same data, but rank 1 has 600 training and 150 test images" in finished.stderr
    assert "every rank must read the same images in the same order" in finished.stderr


def test_one_process_for_an_epoch(package: Package, run_python: Run, tmp_path: Path) -> None:
    overrides = ["train.epochs=1", "model.name=digits_cnn", "data.num_eval=9", f"run.output_dir={tmp_path}"]
    finished = run_python(["train.py", package.config, *overrides], env=package.env)
    assert finished.returncode == 0, finished.stderr
    assert "600 training and 9 test images, 3 classes; 10 iterations" in finished.stderr


def test_the_commands_before_training(package: Package, run_python: Run) -> None:
    printed = run_python(["train.py", package.config, "--print-config"], env=package.env)
    assert printed.returncode == 0, printed.stderr
    assert "{name: stripes, size: 16, num_train: 600, num_eval: 150}" in printed.stdout
    explained = run_python(["train.py", package.config, "--explain", "--ranks", "2"], env=package.env)
    assert explained.returncode == 0, explained.stderr
    assert "stripes: stripes_net on stripes with kfac, 2 ranks" in explained.stdout
    assert "A 257, G 3" in explained.stdout
    memory = ["-m", "kfac_dist.memory", "stripes_net", "--channels", "1", "--image-size", "16", "--classes", "3"]
    told = run_python(memory, env=package.env)
    assert told.returncode == 0, told.stderr
    assert told.stdout.startswith("stripes_net")


def assert_refused(finished: Any, *words: str) -> None:
    assert finished.code == 2, finished.err
    assert finished.err.count("error: ") == 1
    for word in words:
        assert word in finished.err


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        ("stripes/data.py", "import numpy as np", "import nunpy as np", ["importable", "No module named 'nunpy'"]),
        ("stripes/data.py", "class Stripes(DataSet)", "class Stripe(DataSet)", ["importable", "Stripes"]),
        ("stripes/data.py", "Stripes(DataSet)", "Stripes", ["derived from kfac_dist.config.data.DataSet"]),
        ("stripes/data.py", 'Literal["stripes"]', "str", ['name: Literal["stripes"]']),
        ("stripes/data.py", "def read(", "def reed(", ["a method read(self)", "got None"]),
        ("stripes/model.py", "from torch", "from torsch", ["model.name stripes_net", "importable", "torsch"]),
        ("stripes/model.py", "image_shape: tuple[int, int, int]", "*, image_shape", ["(num_classes, image_shape)"]),
        ("stripes/model.py", "return nn.Sequential(", "return (", ["returns a torch.nn.Module", "returns tuple"]),
    ],
)
def test_a_broken_registration_names_the_package(
    file: str, old: str, new: str, words: list[str], package: Package, train: Train, tmp_path: Path
) -> None:
    package.replace(file, old, new)
    finished = train(f"run.output_dir={tmp_path / 'runs'}")
    assert_refused(finished, "of package stripes 1.0 (entry point group kfac_dist.", "mend", *words)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (", labels  #", ", labels + 1  #", ["_labels must be in [0, 3)", "got 3 at 2"]),
        (", labels  #", ", labels / 1  #", ["must be class indices of an integer type, got float64"]),
        (", labels  #", ", labels[1:]  #", ["one label for each of the 600 train_images, got 599"]),
        ("astype(np.uint8)[:, None]", "astype(np.int32)[:, None]", ["must be of type uint8", "got int32"]),
        ("astype(np.uint8)[:, None]", "astype(np.uint8)", ["(images, channels, height, width)", "(600, 16, 16)"]),
        ("self._draw(self.num_eval", "self._draw(0", ["eval_images", "none zero"]),
        ('("lying", "standing", "slanting")', '"lss"', ["class_names must be a tuple"]),
        ("return ImageArrays(", "return (", ["read must return", "ImageArrays, got tuple"]),
        ("train_images, train_labels =", "open('/nonexistent/stripes'); _ =", ["No such file", "/nonexistent/stripes"]),
    ],
)
def test_arrays_are_checked(
    old: str, new: str, words: list[str], package: Package, train: Train, tmp_path: Path
) -> None:
    package.replace("stripes/data.py", old, new)
    finished = train(f"run.output_dir={tmp_path / 'runs'}")
    assert_refused(finished, "data.name stripes (stripes.data.Stripes): ", *words)


def test_its_keys_are_checked_with_all_others(train: Train) -> None:
    finished = train("data.size=0", "data.colour=red", "data.num_train=many", "train.epochs=-1")
    assert_refused(finished, "4 problems", "data.size must be > 0, got 0", "data.colour is not a known key")
    assert_refused(train("data={name: digits, size: 3}"), "data.size is not a known key")
    unknown = train("data.name=stripe")
    assert_refused(unknown, "data.name must be one of 'digits'", "or of an installed package: 'stripes', got 'stripe'")


def test_names_must_be_told_apart(package: Package, train: Train) -> None:
    package.install("copy", {"kfac_dist.datasets": {"stripes": "stripes.data:Other"}})
    package.install("shadow", {"kfac_dist.models": {"resnet18": "stripes.model:stripes_net"}})
    words = ("must be registered once", "package stripes 1.0", "package copy 1.0", "uninstall all but one")
    assert_refused(train(), *words)
    shadow = train("data={name: digits}", "model.name=resnet18", "--explain")
    assert_refused(shadow, "model.name resnet18", "package shadow 1.0", "built in")


def first_bias(name: str, initialization: Initialization | None) -> float:
    model = create_model(name, 3, (1, 16, 16), seed=0, initialization=initialization)
    assert isinstance(model, nn.Sequential)
    return float(model[-1].bias.detach()[0])


def test_a_network_keeps_its_own_initialization_unless_asked(package: Package, train: Train, tmp_path: Path) -> None:
    package.replace("stripes/model.py", "    return nn.Sequential(", "    head = nn.Linear(256, num_classes)\n"
                    "    nn.init.constant_(head.bias, -4.6)\n    return nn.Sequential(")  # fmt: skip
    package.replace("stripes/model.py", "        nn.Linear(256, num_classes),\n", "        head,\n")
    assert [first_bias("stripes_net", choice) for choice in (None, "own", "recipe")] == pytest.approx([-4.6, -4.6, 0.0])
    built_in = [first_bias("digits_cnn", choice) for choice in (None, "own", "recipe")]
    assert built_in[0] == built_in[2] == 0.0 != built_in[1]
    losses = {}
    for choice in ("own", "recipe", "null"):
        overrides = ["train.epochs=0.1", f"model.initialization={choice}", f"run.output_dir={tmp_path / choice}"]
        assert train(*overrides).code == 0
        losses[choice] = records(tmp_path / choice / "stripes")[0]["loss"]
    assert losses["null"] == losses["own"] != losses["recipe"]
