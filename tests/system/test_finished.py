"""scripts/slurm/finished.py: what an exit code of 0 of mpirun's is worth."""

import importlib.util
from pathlib import Path

import pytest

from tests.paths import QUICKSTART, ROOT


@pytest.fixture
def finished(monkeypatch: pytest.MonkeyPatch):
    spec = importlib.util.spec_from_file_location("finished", ROOT / "scripts/slurm/finished.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments: str | Path) -> int:
        monkeypatch.setattr("sys.argv", ["finished.py", *map(str, arguments)])
        return module.main()

    return run


def test_the_last_run_of_the_name_counts(finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = (QUICKSTART, f"run.output_dir={tmp_path}")
    assert finished(*place) == 75, "there is none"
    for name in ("quickstart", "quickstart-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").touch()
    (tmp_path / "quickstart/DONE").touch()
    assert finished(*place, "--resume", "auto") == 75
    assert f"{tmp_path}/quickstart-2 has no DONE: a host was lost?" in capsys.readouterr().out
    checkpoint = tmp_path / "quickstart/checkpoints/iteration-00000008"
    checkpoint.mkdir(parents=True)
    for path in (tmp_path / "quickstart", checkpoint):
        assert finished(*place, "--resume", path) == 0
    (tmp_path / "quickstart-2/DONE").touch()
    assert finished(*place) == 0


def test_another_jobs_run_of_the_name_does_not_count(finished, tmp_path: Path, monkeypatch) -> None:
    for name, job in (("quickstart", "7"), ("quickstart-2", "8")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").touch()
        (tmp_path / name / "environment.json").write_text(f'{{"variables": {{"SLURM_JOB_ID": "{job}"}}}}')
    (tmp_path / "quickstart-2/DONE").touch()
    for job, resume, code in (("7", (), 75), ("8", (), 0), ("7", ("--resume", "job"), 75), ("9", (), 0)):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        assert finished(QUICKSTART, f"run.output_dir={tmp_path}", *resume) == code


@pytest.mark.parametrize("option", [("--help",), ("--print-config",), ("--explain",), ("--evaluate", "runs/x")])
def test_what_does_not_train_leaves_no_marker(finished, tmp_path: Path, option: tuple[str, ...]) -> None:
    assert finished(QUICKSTART, f"run.output_dir={tmp_path}", *option) == 0
