"""The layout: a module imports only from lines above it, and MPI and NCCL stay inside communicator/."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "kfac_dist"

# Top to bottom: what stands on a line may import from lines above it (and, in a sub-package, from its own).
LAYERS = (
    "errors",
    "timing",
    "devices",
    "transfer",
    "precision",
    "strict_yaml",
    "config_problems",
    "config_base",
    "config_data",
    "config_kfac",
    "config",
    "communicator",
    "loss_scale",
    "curvature",
    "schedules",
    "update",
    "exchange",
    "optimizer",
    "sgd",
    "optimizers",
    "augment",
    "data",
    "models",
    "metrics",
    "environment",
    "evaluation",
    "trainer",
    "plots",
    "explain",
    "memory",
    "doctor",
)
# What `from kfac_dist import KFAC, SGD, create_communicator` draws on, and what it must do without.
LIBRARY = ("kfac_dist.optimizer", "kfac_dist.sgd", "kfac_dist.communicator")
NOT_IN_LIBRARY = {"pydantic", "yaml", "tensorboard", "matplotlib", "sklearn", "scipy", "torchvision", "tqdm"}

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


def layer_problems(module: str, imported: set[str]) -> list[str]:
    layer = module.split(".")[1]
    problems = []
    for name in sorted(imported):
        if not within(name, "kfac_dist") or name == "kfac_dist.__version__":
            continue
        target = name.split(".")[1] if "." in name else ""
        if target not in LAYERS:
            problems.append(f"{module} imports {name}: import from the module that defines it")
        elif target != layer and LAYERS.index(target) > LAYERS.index(layer):
            problems.append(f"{module} imports {name}, which stands below it")
    return problems


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_from_above(module: str) -> None:
    assert module.split(".")[1] in LAYERS, f"{module} has no line in LAYERS: add one where it belongs"
    assert layer_problems(module, imports_of(module)) == []


@pytest.mark.parametrize("module", MODULES)
def test_only_the_communicator_knows_mpi(module: str) -> None:
    if within(module, "kfac_dist.communicator"):
        pytest.skip("the communicator may")
    found = {name for name in imports_of(module) if within(name, "mpi4py") or within(name, "torch.distributed")}
    assert not found, f"{module} imports {found}; only kfac_dist/communicator/ may"


def test_the_entry_point_does_not_know_mpi() -> None:
    found = imports((ROOT / "train.py").read_text(encoding="utf-8"), "train", is_package=False)
    assert not {name for name in found if within(name, "mpi4py") or within(name, "torch.distributed")}


def test_the_library_needs_none_of_the_trainers_packages() -> None:
    pending, seen = list(LIBRARY), set()
    while pending:
        module = pending.pop()
        seen.add(module)
        names = imports_of(module)
        assert not {name for name in names if name.split(".")[0] in NOT_IN_LIBRARY}, f"in {module}"
        pending += modules_of(names) - seen
    assert "kfac_dist.curvature.factors" in seen


def test_no_circular_imports() -> None:
    graph = {module: modules_of(imports_of(module)) - {module} for module in MODULES}
    assert set(graphlib.TopologicalSorter(graph).static_order()) == set(MODULES)


@pytest.mark.parametrize(
    ("module", "source", "imported"),
    [
        ("kfac_dist.sgd", "from kfac_dist import trainer", "kfac_dist.trainer"),
        ("kfac_dist.sgd", "import kfac_dist.trainer as t", "kfac_dist.trainer"),
        ("kfac_dist.sgd", "def f():\n    from .trainer import train", "kfac_dist.trainer.train"),
        ("kfac_dist.curvature.inverse", "from ..trainer import x", "kfac_dist.trainer.x"),
        ("kfac_dist.errors", "from kfac_dist import KFAC", "kfac_dist.KFAC"),
    ],
)
def test_the_check_finds_what_it_looks_for(module: str, source: str, imported: str) -> None:
    found = imports(source, module, is_package=False)
    assert found == {imported}
    assert len(layer_problems(module, found)) == 1
