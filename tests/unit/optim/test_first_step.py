"""What the first step of an optimizer loads."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("name", ["SGD", "AdamW", "LARS", "KFAC"])  # Muon makes one of torch's
def test_the_first_step_does_not_load_the_compiler(name: str) -> None:
    """Defect: a wrapper of torch's did, for more than a second, and a study counted it as training."""
    program = (
        "import sys, torch, kfac_dist\n"
        "net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))\n"
        f"optimizer = kfac_dist.{name}(net, lr=0.1)\n"
        "net(torch.ones(5, 4)).sum().backward()\n"
        "before = [parameter.clone() for parameter in net.parameters()]\n"
        "optimizer.step()\n"
        "assert not all(map(torch.equal, net.parameters(), before))\n"
        "print(any(module.startswith('torch._dynamo') for module in sys.modules))"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (finished.stdout, finished.stderr) == ("False\n", "")
