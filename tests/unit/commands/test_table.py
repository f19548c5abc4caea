"""The table of commands: every row can be called, and the choice is made before anything heavy is imported."""

from collections.abc import Callable
from importlib import import_module
from subprocess import CompletedProcess

import pytest

import kfac_dist
from kfac_dist.commands.table import COMMANDS, main

Run = Callable[..., CompletedProcess[str]]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_row_names_a_function(name: str) -> None:
    module, _, function = COMMANDS[name].function.partition(":")
    assert callable(getattr(import_module(module), function))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "error: a command is missing\n"),
        (["trian"], "error: no command 'trian'; did you mean train?\n"),
        (["xyz"], "error: no command 'xyz'\n"),
        (["--frobnicate"], "error: no command '--frobnicate'\n"),
    ],
)
@pytest.mark.parametrize("typed", [False, True])
def test_no_or_a_wrong_command_shows_one_screen(
    words: list[str], said: str, typed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["kfac-dist", *words])
    assert main(None if typed else words) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(said)
    assert shown.err.count("\n") < 24
    assert max(map(len, shown.err.splitlines())) <= 80
    for name in COMMANDS:
        assert f"\n  {name} " in shown.err


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == main(["-h"]) == main(["--version"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert shown.out.count("usage: ") == 2
    assert shown.out.endswith(f"kfac_dist {kfac_dist.__version__}\n")


def test_other_ranks_keep_silent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    monkeypatch.setattr("kfac_dist.commands.table.PATIENCE_SECONDS", 0.0)
    assert main(["trian"]) == 2
    assert main(["--version"]) == 0
    assert capsys.readouterr() == ("", "")


def test_only_the_chosen_command_is_imported(run_python: Run) -> None:
    code = (
        "import sys; from kfac_dist.commands.table import main; main(['--help']); main(['trian'])\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'torch', 'mpi4py', 'pydantic', 'numpy'}))"
    )
    assert run_python(["-c", code]).stdout.splitlines()[-1] == "[]"


def test_memory_and_plots_take_their_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", "digits_cnn", "--channels", "1", "--image-size", "8", "--classes", "10"]) == 0
    assert capsys.readouterr().out.startswith("digits_cnn")
    with pytest.raises(SystemExit, match="2"):
        main(["plots", "nosuch"])
    assert "usage: kfac-dist plots" in capsys.readouterr().err


def test_the_package_is_the_command(run_python: Run) -> None:
    shown = run_python(["-m", "kfac_dist", "--help"])
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith("usage: [mpirun -n P] python -m kfac_dist COMMAND …\n")
    assert "kfac-dist" not in shown.stdout
    assert run_python(["-m", "kfac_dist", "trian"]).returncode == 2
    shown = run_python(["-m", "kfac_dist", "train", "quickstart", "--print-config"])
    assert shown.stdout.startswith("run:"), shown.stderr
