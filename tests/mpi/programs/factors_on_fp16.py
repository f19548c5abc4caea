"""K-FAC whose factors travel as float16, beside K-FAC whose factors do not; the argument is the number of ranks.

Inputs of 1e2 and losses of 1e-3 set input factors of 1e4 beside output factors of about 1e-8, in one block of 1,024.
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_dist import KFAC
from kfac_dist.communicator import Communicator, create_communicator, launch
from kfac_dist.optim.kfac import CommDtypes


def owned_factors(communicator: Communicator, comm_dtypes: CommDtypes) -> dict[tuple[str, str], Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    optimizer = KFAC(model, communicator, comm_dtypes=comm_dtypes)
    generator = torch.Generator().manual_seed(communicator.rank)
    images = 1e2 * torch.randn(32, 6, generator=generator)
    labels = torch.randint(3, (32,), generator=generator)
    (1e-3 * F.cross_entropy(model(images), labels)).backward()
    optimizer.step()
    return {
        (block.name, matrix): optimizer._fisher.owned[block.name].averages[matrix].value
        for block in optimizer._fisher.owned.blocks
        for matrix in block.factor_shapes
    }


def main() -> int:
    communicator = create_communicator("reduce")
    assert communicator.size == int(sys.argv[1])
    exact = owned_factors(communicator, CommDtypes())
    rounded = owned_factors(communicator, CommDtypes(factors=torch.float16))
    errors = {key: float((rounded[key] - exact[key]).norm() / exact[key].norm()) for key in exact}
    norms = ", ".join(f"{name} {matrix} {value.norm():.0e}" for (name, matrix), value in exact.items())
    for text in communicator.gather_bytes(
        f"{norms}: largest relative error {max(errors.values(), default=0)}".encode()
    ):
        communicator.print_once(text.decode())
    return 0


if __name__ == "__main__":
    launch.run(main)
