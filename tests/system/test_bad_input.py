"""Bad input: one clear error, exit code 2, no traceback (an exception here), and no run directory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.paths import ROOT

QUICKSTART = ROOT / "configs" / "quickstart.yaml"

Command = Callable[..., Any]


def assert_refused(finished: Any, *words: str) -> None:
    """Exit code 2 and one error on stderr that has all the words."""
    assert finished.code == 2, finished
    assert finished.out == ""
    assert finished.err.startswith("error: ")
    assert finished.err.count("error: ") == 1
    for word in words:
        assert word in finished.err


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.name=cifar10", "data.root=/nonexistent/cifar"], ["data.root", "/nonexistent/cifar", "https://"]),
        (["data.name=svhn", "data.root=/nonexistent/svhn"], ["data.root", "/nonexistent/svhn", "http://"]),
        (
            ["data.name=imagenet", "data.root=/nonexistent/in", "data.preprocessing=random_resized_crop"],
            ["data.root", "/nonexistent/in"],
        ),
        (["data.name=cifar10"], ["data.root must name the folder that holds cifar10"]),
        (["data.name=cifar11"], ["data.name must be", "'digits'", "got 'cifar11'"]),
        (["data.train_limit=5000"], ["data.train_limit must be <= 1438", "got 5000"]),
        (["model.name=digits_cmm"], ["model.name", "'digits_cmm'", "digits_cnn"]),
        (["model.name=alexnet32"], ["model.name alexnet32", "1x8x8"]),
        (["batch.global_size=130"], ["batch.per_rank must divide batch.global_size = 130", "128 and 192"]),
        (["kfac.damping.target=-0.1"], ["kfac.damping.target must be > 0, got -0.1"]),
        (["optimizer.learning_rat=0.1"], ["optimizer.learning_rat is not a known key", "learning_rate"]),
        (["optimiser.name=sgd"], ["optimiser", "not a known key"]),
        (
            ["train.epochs=many", "run.seed=-1"],
            ["2 problems", "train.epochs must be a number", "run.seed must be >= 0"],
        ),
        (["train.epochs=2", "train.epochs=3"], ["'train.epochs=3' undoes an earlier one, 'train.epochs=2'"]),
        (["run.name=2026"], ["run.name must be text, got the number 2026; quotes make it text"]),
        (["data.loader=dali"], ["data.loader must be left out", "data.name is digits", "belongs to imagenet"]),
        (["augment.pad_crop=100"], ["augment.pad_crop must be < 8", "got 100"]),
        (["train.epochs"], ["'train.epochs' must be dotted.key=value"]),
        (["--frobnicate"], ["unrecognized arguments: --frobnicate", "usage: train.py"]),
        (["--resum", "auto"], ["unrecognized arguments: --resum", "did you mean --resume?"]),
        (["--explain", "--ranks=0"], ["--ranks", ">= 1", "got 0"]),
        (["--explain", "--ranks=two"], ["--ranks", "'two'"]),
        (
            ["--explain", "--ranks=3"],
            ["batch.per_rank x ranks = 64 x 3 = 192, got 128", "192", "numbers of ranks that work with 128: 2"],
        ),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_refused(overrides: list[str], words: list[str], command: Command, tmp_path: Path) -> None:
    output_dir = tmp_path / "runs"
    assert_refused(command(QUICKSTART, f"run.output_dir={output_dir}", *overrides), *words)
    assert not output_dir.exists()


def test_no_arguments(command: Command) -> None:
    assert_refused(command(), "config", "usage: train.py")


@pytest.mark.parametrize(("name", "shown"), [("nowhere.yaml", "nowhere.yaml"), ("\udcff.yaml", "\\udcff.yaml")])
def test_missing_configuration(name: str, shown: str, command: Command, tmp_path: Path) -> None:
    assert_refused(command(tmp_path / name), shown)


@pytest.mark.parametrize("content", [b"run: {name: x", b"just words", b"\xff\xfe\x00", b""])
def test_configuration_that_is_not_yaml(content: bytes, command: Command, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    assert_refused(command(path), str(path))


def test_truncated_cifar_batch(command: Command, cifar_folder: Path, tmp_path: Path) -> None:
    batch = cifar_folder / "cifar-10-batches-py" / "data_batch_3"
    batch.write_bytes(batch.read_bytes()[:5000])
    finished = command(
        QUICKSTART, "data.name=cifar10", f"data.root={cifar_folder}", f"run.output_dir={tmp_path / 'runs'}"
    )
    assert_refused(finished, str(batch), "truncated, damaged or of another program", "https://")


def test_output_folder_that_is_a_file(command: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    finished = command(QUICKSTART, f"run.output_dir={tmp_path / 'file' / 'runs'}")
    assert_refused(finished, "run.output_dir", str(tmp_path / "file"))


def test_run_name_that_is_too_long(command: Command, tmp_path: Path) -> None:
    finished = command(QUICKSTART, f"run.output_dir={tmp_path}", "run.name=" + 300 * "x")
    assert_refused(finished, "run.name: cannot use", "File name too long")


def test_unknown_progress_style(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KFAC_DIST_PROGRESS", "fancy")
    finished = command(QUICKSTART, f"run.output_dir={tmp_path / 'runs'}")
    assert_refused(finished, "KFAC_DIST_PROGRESS must be bar, lines or off, got 'fancy'")
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there(command: Command, tmp_path: Path) -> None:
    finished = command(QUICKSTART, f"run.output_dir={tmp_path}/runs", "run.device=cuda")
    assert_refused(finished, "run.device must be cpu or auto", "got cuda")


def test_exit_code_of_the_real_command(run_python: Callable[..., Any]) -> None:
    """Once as a user sees it: the process's exit code, and stderr without a traceback."""
    finished = run_python(["train.py", QUICKSTART, "kfac.damping.initial=-1"])
    assert finished.returncode == 2
    assert "kfac.damping.initial must be > 0, got -1" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert finished.stdout == ""
