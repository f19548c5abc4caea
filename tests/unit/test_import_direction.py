"""The layout: a room imports only from rooms above it, and MPI and NCCL stay inside communicator/."""

import ast
import graphlib
from collections.abc import Callable
from subprocess import CompletedProcess

import pytest

from tests.paths import ROOT

PACKAGE = ROOT / "kfac_dist"

# Top to bottom: a room imports only from rooms above it, and from itself.
ROOMS = (
    "errors",
    "vocabulary",
    "timing",
    "config",
    "tensors",
    "communicator",
    "curvature",
    "optim",
    "data",
    "models",
    "runs",
    "checkpoints",
    "training",
    "planning",
    "plots",
    "report",
    "study",
    "doctor",
    "memory",
    "commands",
    "__main__",
)
# What a room must do without, whether it imports it itself or through others.
NEVER = {
    "config": {"torch", "mpi4py", "kfac_dist.communicator"},
    "tensors": {"mpi4py", "torch.distributed", "kfac_dist.communicator"},
    "curvature": {"mpi4py", "torch.distributed", "kfac_dist.communicator", "kfac_dist.config"},
    # What `from kfac_dist import KFAC, SGD, create_communicator` draws on.
    "optim": {"pydantic", "yaml", "tensorboard", "matplotlib", "sklearn", "scipy", "torchvision", "tqdm"},
    "communicator": {"pydantic", "yaml", "tensorboard", "matplotlib", "sklearn", "scipy", "torchvision", "tqdm"},
}

MODULES = {
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "__init__.py"  # exports lazily from everywhere
}


def imports(source: str, module: str, is_package: bool) -> set[str]:
    """All that the source imports, as absolute dotted names; of `from a import b` it gives `a.b`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".") if is_package else module.split(".")[:-1]
            prefix = base[: len(base) - node.level + 1] if node.level else []
            parts = [*prefix, *(node.module.split(".") if node.module else [])]
            found |= {".".join([*parts, alias.name]) for alias in node.names}
    return found


def imports_of(module: str) -> set[str]:
    path = MODULES[module]
    return imports(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")


def modules_of(names: set[str]) -> set[str]:
    """Those of the package's modules that define the names: the longest prefix of each that is a module."""
    found = set()
    for name in names:
        while name and name not in MODULES:
            name = name.rpartition(".")[0]
        found.add(name)
    return found - {""}


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def room_problems(module: str, imported: set[str]) -> list[str]:
    room = module.split(".")[1]
    problems = []
    for name in sorted(imported):
        if not within(name, "kfac_dist") or name == "kfac_dist.__version__":
            continue
        target = name.split(".")[1] if "." in name else ""
        if target not in ROOMS:
            problems.append(f"{module} imports {name}: import from the module that defines it")
        elif target != room and ROOMS.index(target) > ROOMS.index(room):
            problems.append(f"{module} imports {name}, which stands below it")
    return problems


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_from_above(module: str) -> None:
    assert module.split(".")[1] in ROOMS, f"{module} has no line in ROOMS: add one where it belongs"
    assert room_problems(module, imports_of(module)) == []


@pytest.mark.parametrize("module", MODULES)
def test_only_the_communicator_knows_mpi(module: str) -> None:
    if within(module, "kfac_dist.communicator"):
        pytest.skip("the communicator may")
    found = {name for name in imports_of(module) if within(name, "mpi4py") or within(name, "torch.distributed")}
    assert not found, f"{module} imports {found}; only kfac_dist/communicator/ may"


def test_the_entry_point_does_not_know_mpi() -> None:
    found = imports((ROOT / "train.py").read_text(encoding="utf-8"), "train", is_package=False)
    assert not {name for name in found if within(name, "mpi4py") or within(name, "torch.distributed")}


def closure(module: str) -> set[str]:
    """All names that a module imports, itself or through others of the package, their packages' `__init__` included."""
    pending, seen, names = [module], set(), set()
    while pending:
        current = pending.pop()
        seen.add(current)
        found = imports_of(current)
        names |= found
        parents = {current.rpartition(".")[0]} & set(MODULES)
        pending += (modules_of(found) | parents) - seen
    return names | seen


@pytest.mark.parametrize("room", NEVER)
def test_rooms_do_without_some_packages_even_through_others(room: str) -> None:
    for module in [module for module in MODULES if within(module, f"kfac_dist.{room}")]:
        names = closure(module)
        found = {name for name in names if any(within(name, never) for never in NEVER[room])}
        assert not found, f"{module} reaches {found}"
    assert len(names) > 3


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("kfac_dist.tensors.packing, kfac_dist.curvature.capture, kfac_dist.curvature.precondition", ("mpi4py",)),
        ("kfac_dist.config.load", ("torch", "mpi4py")),
    ],
)
def test_a_fresh_interpreter_does_not_load_them(
    run_python: Callable[..., CompletedProcess[str]], modules: str, absent: tuple[str, ...]
) -> None:
    completed = run_python(["-c", f"import sys, {modules}; print([m for m in {absent} if m in sys.modules])"])
    assert completed.returncode == 0, completed.stderr
    assert completed.stdout.strip() == "[]"


def test_no_circular_imports() -> None:
    graph = {module: modules_of(imports_of(module)) - {module} for module in MODULES}
    assert set(graphlib.TopologicalSorter(graph).static_order()) == set(MODULES)


@pytest.mark.parametrize(
    ("module", "source", "imported"),
    [
        ("kfac_dist.optim.sgd", "from kfac_dist import training", "kfac_dist.training"),
        ("kfac_dist.optim.sgd", "import kfac_dist.training.trainer as t", "kfac_dist.training.trainer"),
        ("kfac_dist.optim.sgd", "def f():\n    from ..training import train", "kfac_dist.training.train"),
        ("kfac_dist.curvature.blocks.base", "from ...optim import x", "kfac_dist.optim.x"),
        ("kfac_dist.errors", "from kfac_dist import KFAC", "kfac_dist.KFAC"),
    ],
)
def test_the_check_finds_what_it_looks_for(module: str, source: str, imported: str) -> None:
    found = imports(source, module, is_package=False)
    assert found == {imported}
    assert len(room_problems(module, found)) == 1
