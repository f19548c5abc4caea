"""Ranks that hold or do different things: prints what each says, and fails if a rank goes on alone.

differing_ranks.py
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from kfac_dist import KFAC, SGD, LossScaler, create_communicator
from kfac_dist.communicator import Communicator, launch
from kfac_dist.curvature.refresh_schedule import IntervalRefresh
from kfac_dist.errors import AgreedInputError
from kfac_dist.optim.baselines import LARS, AdamW
from kfac_dist.optim.kfac import CommDtypes

KINDS: dict[str, type[KFAC | SGD]] = {"kfac": KFAC, "sgd": SGD}
ALL_KINDS: dict[str, Callable[..., Any]] = KINDS | {"lars": LARS}


def in_another_order(rank: int) -> nn.Module:
    layers = {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}
    return nn.ModuleDict({name: layers[name] for name in sorted(layers, reverse=bool(rank))})


def with_one_frozen(rank: int) -> nn.Module:
    model = nn.Linear(4, 4)
    model.bias.requires_grad_(rank == 0)
    return model


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "depth": lambda rank: nn.Sequential(*[nn.Linear(4, 4) for _ in range(2 + rank)]),
    "width": lambda rank: nn.Linear(4, 4 + rank),
    "order": in_another_order,
    "dtype": lambda rank: nn.Linear(4, 4, dtype=(torch.float32, torch.bfloat16)[rank]),
    "frozen": with_one_frozen,
}


ARGUMENTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "kfac clips": lambda rank: {"max_grad_norm": (1.0, None)[rank]},
    "kfac refreshes": lambda rank: {"refresh": 1 + rank},
    "kfac averages": lambda rank: {"ema_decay": (None, 0.5)[rank]},
    "kfac sends": lambda rank: {"comm_dtypes": CommDtypes(factors=(None, torch.float16)[rank])},
    "kfac skips": lambda rank: {"skip": (["0", "2"], ["2", "0"])[rank]},
    "kfac tracks": lambda rank: {"track_changes": bool(rank)},
    "kfac scaled": lambda rank: {"loss_scaler": LossScaler() if rank else None},
    "sgd clips": lambda rank: {"max_grad_norm": 1.0 + rank},
    "lars trusts": lambda rank: {"trust_coefficient": 0.001 * (1 + rank)},
}


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 50), nn.Tanh(), nn.Linear(50, 30), nn.Tanh(), nn.Linear(30, 3))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, steps: int = 1) -> None:
    for step in range(steps):
        generator = torch.Generator().manual_seed(10 * step + rank)
        optimizer.zero_grad()
        x = torch.randn(16, 4, generator=generator)
        F.cross_entropy(model(x), torch.randint(3, (16,), generator=generator)).backward()
        optimizer.step()


def say(communicator: Communicator, case: str, action: Callable[[], Any]) -> None:
    """Print what every rank raises; it must be the same kind of error on all."""
    try:
        action()
        said = "nothing"
    except AgreedInputError as error:
        said = str(error)
    for rank, text in enumerate(communicator.gather_bytes(said.encode())):
        communicator.print_once(f"{case} | {rank} | {text.decode()}")


def check_one_rank_freezes(kind: str, communicator: Communicator) -> None:
    model = make_net()
    optimizer = KINDS[kind](model, communicator, lr=0.01)
    train(model, optimizer, communicator.rank)
    if communicator.rank:
        model[2].requires_grad_(False)
    say(communicator, f"{kind} freezes", lambda: train(model, optimizer, communicator.rank))


def check_one_rank_sets_another_rate(kind: str, communicator: Communicator) -> None:
    """As ReduceLROnPlateau does with a rank's own loss; hosts that round apart are no reason to stop."""
    model = make_net()
    optimizer = KINDS[kind](model, communicator, lr=0.01)
    group = optimizer.param_groups[0]
    group["lr"] *= 1 + 1e-12 * communicator.rank
    say(communicator, f"{kind} rounds", lambda: train(model, optimizer, communicator.rank))
    group["lr"] *= 10**-communicator.rank
    say(communicator, f"{kind} sets", lambda: train(model, optimizer, communicator.rank))


def check_one_rank_loads_weights(kind: str, communicator: Communicator) -> None:
    """After the optimizer was made; frozen layers count, too."""
    model = make_net()
    model[0].requires_grad_(False)
    optimizer = KINDS[kind](model, communicator, lr=0.01)
    if not communicator.rank:
        model.load_state_dict({name: value + 1e-3 for name, value in model.state_dict().items()})
    say(communicator, f"{kind} loads weights", lambda: train(model, optimizer, communicator.rank))


def check_one_rank_scales_losses_otherwise(kind: str, communicator: Communicator) -> None:
    """Averages of gradients that were scaled otherwise on each rank have no scale that could be undone."""
    model, scaler = make_net(), LossScaler(num_losses=2 + communicator.rank)
    optimizer = KINDS[kind](model, communicator, lr=0.01, loss_scaler=scaler)
    say(communicator, f"{kind} scales", lambda: train(model, optimizer, communicator.rank))


def check_a_schedule_that_decides_otherwise_on_one_rank(communicator: Communicator) -> None:
    model = make_net()
    schedule = IntervalRefresh(lambda iteration: 1 + communicator.rank)
    optimizer = KFAC(model, communicator, lr=0.01, refresh=schedule)
    say(communicator, "kfac decides", lambda: train(model, optimizer, communicator.rank, steps=2))


def check_settings_of_several_numbers_and_tensors(communicator: Communicator) -> None:
    """OneCycleLR sets betas, to which hosts may round apart."""
    rounded = 1 + 1e-12 * communicator.rank
    for name, rate in (("betas", 0.01), ("rates", torch.tensor(0.01 * 10**-communicator.rank))):
        model = make_net()
        optimizer = AdamW(model, communicator, lr=rate, betas=(0.85 * rounded, 0.99))
        say(communicator, name, lambda m=model, o=optimizer: train(m, o, communicator.rank))


def check_one_rank_loads(communicator: Communicator) -> None:
    model = make_net()
    optimizer = KFAC(model, communicator, lr=0.01)
    state = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, communicator.rank, steps=2)
    if communicator.rank:
        optimizer.load_state_dict(state)
    say(communicator, "loads", lambda: train(model, optimizer, communicator.rank))


def check_one_rank_adds_another_group(communicator: Communicator) -> None:
    model = make_net()
    optimizer = SGD(model, communicator, params=model[0].parameters())
    added = model[2 + 2 * communicator.rank].parameters()
    say(communicator, "adds", lambda: optimizer.add_param_group({"params": added}))


def check_one_rank_has_the_gradient(kind: str, communicator: Communicator) -> None:
    """The others move by it too; a layer that no rank used stays, decay or not."""
    model = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(3, 2)])
    optimizer = KINDS[kind](model, communicator, lr=0.1, weight_decay=0.1)
    before = [layer.weight.detach().clone() for layer in model]
    for _ in range(2):
        optimizer.zero_grad()
        loss = model[0](torch.ones(4, 3)).square().mean()
        if communicator.rank:
            loss = loss + model[1](torch.ones(4, 3)).square().mean()
        loss.backward()
        optimizer.step()
    moved = [not torch.equal(layer.weight, old) for layer, old in zip(model, before, strict=True)]
    first = communicator.broadcast_(model[1].weight.detach().clone())
    assert moved == [True, True, False], f"{kind}: {moved}"
    assert torch.equal(first, model[1].weight), f"{kind}: the ranks differ"
    assert model[2].weight.grad is None


def check_parameters_beside_the_models(communicator: Communicator) -> None:
    """Such as a learned temperature: every rank takes rank 0's, if they have the same shape."""
    temperature = nn.Parameter(torch.full((3,), float(communicator.rank)))
    model = make_net()
    SGD(model, communicator, [*model.parameters(), temperature])
    assert temperature.tolist() == [0.0, 0.0, 0.0], f"rank {communicator.rank} trains {temperature} of its own"
    other = nn.Parameter(torch.zeros(3 + communicator.rank))
    say(communicator, "beside", lambda: SGD(model, communicator, [*model.parameters(), other]))


def check_owners_are_adopted(communicator: Communicator) -> None:
    """A run that unfroze layers shares them out otherwise than a new process, which can yet go on with its state."""
    model = make_net()
    model[:4].requires_grad_(False)
    optimizer = KFAC(model, communicator, lr=0.01, ema_decay=0.9)
    train(model, optimizer, communicator.rank)
    model.requires_grad_(True)
    train(model, optimizer, communicator.rank, steps=2)

    resumed_model = make_net()
    resumed = KFAC(resumed_model, communicator, lr=0.01, ema_decay=0.9)
    assert resumed.owners != optimizer.owners, "history makes no difference: nothing is tested"
    resumed_model.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch shares momentum tensors else
    assert resumed.owners == optimizer.owners
    train(model, optimizer, communicator.rank, steps=2)
    train(resumed_model, resumed, communicator.rank, steps=2)
    for ours, theirs in zip(resumed_model.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def check_a_step_with_all_frozen(kind: str, communicator: Communicator) -> None:
    model = make_net()
    optimizer = KINDS[kind](model, communicator, lr=0.01)
    model.requires_grad_(False)
    optimizer.zero_grad()
    optimizer.step()
    model.requires_grad_(True)
    train(model, optimizer, communicator.rank)


def main() -> int:
    communicator = create_communicator("reduce", "mpi", torch.device("cpu"))
    for kind, optimizer in KINDS.items():
        for case, model_of in MODELS.items():
            say(communicator, f"{kind} {case}", lambda o=optimizer, m=model_of: o(m(communicator.rank), communicator))
        check_one_rank_freezes(kind, communicator)
        check_one_rank_sets_another_rate(kind, communicator)
        check_one_rank_scales_losses_otherwise(kind, communicator)
        check_one_rank_loads_weights(kind, communicator)
        check_one_rank_has_the_gradient(kind, communicator)
        check_a_step_with_all_frozen(kind, communicator)
    for case, arguments_of in ARGUMENTS.items():
        create, arguments = ALL_KINDS[case.split()[0]], arguments_of(communicator.rank)
        say(communicator, case, lambda c=create, a=arguments: c(make_net(), communicator, **a))
    check_a_schedule_that_decides_otherwise_on_one_rank(communicator)
    check_settings_of_several_numbers_and_tensors(communicator)
    check_one_rank_adds_another_group(communicator)
    check_one_rank_loads(communicator)
    check_parameters_beside_the_models(communicator)
    check_owners_are_adopted(communicator)
    return 0


if __name__ == "__main__":
    launch.run(main)
