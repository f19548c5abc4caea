"""scripts/gpu_check.py on the CPU with a tiny network, on a machine that lacks what a GPU machine may lack."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.paths import ROOT

NOT_NEEDED = ("pydantic", "sklearn", "scipy", "matplotlib", "tensorboard", "nvidia.dali", "pytest")


@pytest.fixture
def bare_python(tmp_path: Path, run_python: Callable[..., Any]) -> Callable[..., Any]:
    """``bare_python(args)`` runs python where the packages that the script must do without cannot be imported."""
    folder = tmp_path / "missing"
    folder.mkdir()
    blocker = f"""
from importlib.machinery import PathFinder

find_spec = PathFinder.find_spec

def find_others(name, path=None, target=None):
    if any(name == hidden or name.startswith(hidden + ".") for hidden in {NOT_NEEDED!r}):
        return None
    return find_spec(name, path, target)

PathFinder.find_spec = find_others
"""
    (folder / "sitecustomize.py").write_text(blocker, encoding="utf-8")
    return lambda args, timeout=200: run_python(args, env={"PYTHONPATH": str(folder)}, timeout=timeout)


@pytest.mark.slow
def test_every_part_on_a_bare_machine(bare_python: Callable[..., Any], tmp_path: Path) -> None:
    output = tmp_path / "out" / "2026-01-01-gpu"
    finished = bare_python([ROOT / "scripts/gpu_check.py", "--device", "cpu", "--small", "--output", output])
    report = json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))
    statuses = {part: result["status"] for part, result in report["parts"].items()}
    assert statuses == {
        "steps": "ok",
        "factors": "ok",
        "errors": "ok",
        "inverses": "ok",
        "tests": "not run: no pytest (give --wheels)",
    }, finished.stderr + json.dumps(report, indent=1)
    assert finished.returncode == 1, "tests were not run"
    (steps,) = report["parts"]["steps"]["results"].values()
    assert set(steps["seconds"]) == {"torch", "sgd", "kfac1", "kfac10", "kfac20"}
    assert all(value > 0 for value in steps["seconds"].values())
    assert min(steps["ratio_to_sgd"].values()) == pytest.approx(1.0)
    assert steps["stage_seconds"]["kfac1"]["inverse"] > 0
    (errors,) = report["parts"]["errors"]["results"].values()
    assert 0 < errors["sums"]["median"] < 1e-5 < errors["rounding"]["median"] < 1e-2
    (factors,) = report["parts"]["factors"]["results"].values()
    assert min(factors["tflops"].values()) > 0
    text = output.with_suffix(".md").read_text(encoding="utf-8")
    for heading in ("## steps", "## factors", "## errors", "## inverses"):
        assert heading in text
    assert str(tmp_path) not in text


def test_a_part_out_of_time_is_reported_and_the_rest_goes_on(run_python: Callable[..., Any], tmp_path: Path) -> None:
    output = tmp_path / "short"
    command = [ROOT / "scripts/gpu_check.py", "--device", "cpu", "--small", "--parts", "inverses", "errors"]
    finished = run_python([*command, "--limit", "5.5", "--output", output], timeout=100)
    assert finished.returncode == 1
    parts = json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))["parts"]
    assert parts["errors"]["status"].startswith(("not run: no time left", "stopped after"))


def test_a_folder_without_wheels_is_refused(run_python: Callable[..., Any], tmp_path: Path) -> None:
    command = [ROOT / "scripts/gpu_check.py", "--wheels", tmp_path, "--output", tmp_path / "x"]
    finished = run_python(command)
    assert finished.returncode == 1
    assert "--wheels must name a folder with *.whl files" in finished.stderr
