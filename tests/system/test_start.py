"""What a start loads: nothing slow that this run, or this command, does not use. By modules, not by seconds."""

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.paths import ROOT

Run = Callable[..., CompletedProcess[str]]

QUICKSTART = ROOT / "configs/quickstart.yaml"
# Of those that somewhere in the package, or in torch, are a line away; each takes 20 ms to 2 s.
SLOW = (
    "PIL", "jinja2", "matplotlib", "nvidia.dali", "scipy", "sklearn", "torch._dynamo", "torch._inductor", "torchvision",
)  # fmt: skip

END = """
import json, sys
print("\\n" + json.dumps(sorted(sys.modules)))
"""


@pytest.fixture
def modules_of(run_python: Run) -> Callable[[str], set[str]]:
    """``modules_of(code)``: what an interpreter has loaded when it has run the code."""

    def run(code: str) -> set[str]:
        finished = run_python(["-c", code + END], env={"KFAC_DIST_PROGRESS": "off", "PYTHONPATH": str(ROOT)})
        assert finished.returncode == 0, finished.stderr
        return set(json.loads(finished.stdout.splitlines()[-1]))

    return run


def ends(call: str, code: int) -> str:
    """Code for a call that ends the process."""
    return f"try:\n    {call}\nexcept SystemExit as end:\n    assert end.code == {code}\nelse:\n    raise SystemError\n"


def test_a_run_on_the_digits(modules_of: Callable[[str], set[str]], tmp_path: Path) -> None:
    words = ["train.py", str(QUICKSTART), f"run.output_dir={tmp_path}", "train.epochs=1", "schedule.end_epoch=1"]
    loaded = modules_of(
        f"import runpy, sys\nsys.argv = {words}\n" + ends("runpy.run_path('train.py', {}, '__main__')", 0)
    )
    assert (tmp_path / "quickstart/DONE").exists()
    assert list((tmp_path / "quickstart/checkpoints").glob("iteration-*")), "a checkpoint's state is asked for, too"
    assert loaded & {*SLOW, "mpi4py"} == set(), "which one rank without a launcher does without"
    assert {"torch", "pydantic", "kfac_dist.training.trainer"} <= loaded


def test_kfac_in_a_script(modules_of: Callable[[str], set[str]]) -> None:
    """Beside torch's own optimizers, whose first step loads its compiler."""
    loaded = modules_of("""
import torch
from kfac_dist import KFAC, create_communicator
net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
groups = [{"params": [*layer.parameters()]} for layer in net]
optimizer = KFAC(net, create_communicator(), groups, lr=0.1)
schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
for _ in range(2):
    optimizer.zero_grad()
    net(torch.randn(5, 3)).square().mean().backward()
    optimizer.step()
    schedule.step()
optimizer.load_state_dict(optimizer.state_dict())
""")
    assert loaded & {*SLOW, "mpi4py", "pydantic", "tensorboard", "yaml"} == set()


@pytest.mark.parametrize(
    "code",
    [
        "import kfac_dist",
        "import kfac_dist.communicator",
        "from kfac_dist.commands.table import main; assert main(['--help']) == main(['--version']) == 0",
        "from kfac_dist.commands.table import main; assert main(['trian']) == 2",
    ],
)
def test_nothing_at_all(code: str, modules_of: Callable[[str], set[str]]) -> None:
    assert modules_of(code) & {*SLOW, "mpi4py", "numpy", "pydantic", "torch", "yaml"} == set()


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["train", "--help"], 0),
        (["explain", "--help"], 0),
        (["train", "--epoch", "quickstart"], 2),
        (["train", "quickstart", "--print-config"], 0),
        (["train", "quickstart", "train.epoch=3"], 2),
        (["explain", "quickstart", "optimizer.momentum=2"], 2),
        (["evaluate", "no/run"], 2),
    ],
    ids=str,
)
def test_answers_that_take_no_torch(words: list[str], code: int, modules_of: Callable[[str], set[str]]) -> None:
    loaded = modules_of("from kfac_dist.commands.table import main\n" + ends(f"main({words})", code))
    assert loaded & {*SLOW, "mpi4py", "numpy", "torch"} == set()


def test_a_configuration_comes_through_a_pipe(run_python: Run) -> None:
    """As of a shell's `<(…)`: what answers early must leave it to what trains, since it can be read once."""
    code = f"""
import os, sys
from kfac_dist.commands.table import main
end, other = os.pipe()
os.write(other, open({str(QUICKSTART)!r}, "rb").read())
os.close(other)
main([sys.argv[1], f"/dev/fd/{{end}}"] + sys.argv[2:])
"""
    for words, expected in ((["explain"], "digits_cnn on digits"), (["train", "--print-config"], "name: digits_cnn")):
        finished = run_python(["-c", code, *words], env={"PYTHONPATH": str(ROOT)})
        assert finished.returncode == 0, finished.stderr
        assert expected in finished.stdout
