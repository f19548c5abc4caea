"""What all optimizers check at their borders: arguments, gradients, conversions; and the model's start."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from kfac_dist.communicator import Communicator, create_communicator
from kfac_dist.optim.agreement import agree_on_arguments, agree_on_model

_SHARDED = {"FullyShardedDataParallel", "FSDPModule"}  # by name: torch.distributed is the communicator's alone
Placement = tuple[torch.dtype, torch.device]


def check_arguments(name: str, model: object, communicator: object) -> Communicator:
    """The communicator to use, after a look at both arguments.

    Args:
        name: The optimizer's name.
        model: What was given as the model.
        communicator: What was given as the communicator; None makes one.

    Raises:
        TypeError: If one is something else.
    """
    call = f"{name}(model, communicator=None, params=None, *, lr=…)"
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{name} takes the model itself first, not {type(model).__name__}: {call}. "
            "What to train goes into params; all of the model's parameters if left out"
        )
    if isinstance(model, nn.DataParallel):
        raise TypeError(f"{name} cannot see inside DataParallel's replicas: use one process for each GPU (mpirun -n N)")
    _refuse_sharded(name, model)
    if communicator is None:
        return create_communicator()
    if not isinstance(communicator, Communicator):
        raise TypeError(
            f"{name} takes a communicator second, from create_communicator(), or None, got {communicator!r}: {call}. "
            "Settings such as the learning rate are keywords"
        )
    return communicator


def _refuse_sharded(name: str, model: nn.Module) -> None:
    wrapped = any(base.__name__ in _SHARDED for module in model.modules() for base in type(module).__mro__)
    if wrapped or any(type(parameter.data).__name__ == "DTensor" for parameter in model.parameters()):
        raise TypeError(
            f"{name} cannot train a sharded model (FullyShardedDataParallel, fully_shard, DTensor): every rank must "
            "hold whole layers. Give it the model unwrapped; it averages the gradients and shares out the work itself"
        )


def placements(parameters: Sequence[Parameter], names: Mapping[int, str]) -> list[Placement]:
    """Dtype and device of each parameter that an optimizer is given.

    Args:
        parameters: What it is given.
        names: Of the parameters, by id.

    Raises:
        TypeError: If one is complex.
    """
    for parameter in parameters:
        if parameter.is_complex():
            raise TypeError(
                f"{names.get(id(parameter), 'a parameter')} is complex, but the buffers between ranks are real: make "
                "it a real parameter (torch.view_as_complex in the forward), or leave it to another optimizer (params)"
            )
    return [(parameter.dtype, parameter.device) for parameter in parameters]


def refuse_converted(parameters: Sequence[Parameter], made_for: Sequence[Placement], names: Mapping[int, str]) -> None:
    """Refuse a model that was converted or moved after its optimizer was made: buffers would round, or lie elsewhere.

    Args:
        parameters: What the optimizer was given.
        made_for: `placements` of them then.
        names: Of the parameters, by id.

    Raises:
        ValueError: Naming the parameter.
    """
    for parameter, before in zip(parameters, made_for, strict=True):
        if (parameter.dtype, parameter.device) != before:
            raise ValueError(
                f"{names.get(id(parameter), 'a parameter')} was {before[0]} on {before[1]} when the optimizer was made "
                f"and is {parameter.dtype} on {parameter.device} now: convert or move the model first, then make the "
                "optimizer (its state_dict can be loaded into the new one)"
            )


def refuse_replaced(name: str) -> None:
    """Refuse to train what the model uses no longer, or otherwise than when the optimizer was made.

    Args:
        name: Of the layer or parameter.

    Raises:
        ValueError: Always.
    """
    raise ValueError(
        f"{name} was replaced (load_state_dict(assign=True), an assigned Parameter, …), pruned or parametrized since "
        "the optimizer was made: do that first, then make the optimizer"
    )


def refuse_sparse(name: str, gradient: Tensor) -> None:
    """Refuse a sparse gradient.

    Raises:
        ValueError: Naming the parameter.
    """
    if gradient.is_sparse:
        raise ValueError(
            f"the gradient of {name} is sparse, which buffers between ranks cannot hold: use sparse=False in its "
            "Embedding, or leave the parameter to another optimizer"
        )


def broadcast_model(
    model: nn.Module, communicator: Communicator, trained: Sequence[Parameter] = (), arguments: Sequence[str] = ()
) -> None:
    """Give every rank rank 0's parameters and buffers; collective.

    Args:
        model: This rank's model.
        communicator: The ranks.
        trained: What its optimizer was given, to be compared too, and sent where it is not the model's.
        arguments: Lines with what else it was given, to be compared too.

    Raises:
        AgreedInputError: On every rank, before anything is sent, if the ranks' models differ in more than values, or
            their optimizers' arguments.
    """
    agree_on_model(model, trained, communicator)
    agree_on_arguments(arguments, communicator)
    own = {id(parameter) for parameter in model.parameters()}
    others = (parameter for parameter in trained if id(parameter) not in own)
    for tensor in (*model.parameters(), *model.buffers(), *others):
        values = tensor.data
        for dimension, stride in enumerate(values.stride()):
            if stride == 0 and values.shape[dimension] > 1:  # an expanded tensor holds each value once
                values = values.narrow(dimension, 0, 1)
        flat = torch.empty(values.numel(), dtype=values.dtype, device=values.device)
        values.copy_(communicator.broadcast_(flat.copy_(values.reshape(-1))).view(values.shape))


def clip_(gradients: list[Tensor], squared_norm: Tensor, max_norm: float, communicator: Communicator) -> None:
    """Scale averaged gradients down to a norm over all ranks, in place; collective.

    The factor is that of `torch.nn.utils.clip_grad_norm_`, min(1, max_norm / (norm + 1e-6)).

    Args:
        gradients: What this rank holds of the averaged gradient.
        squared_norm: Squared norm of what this rank alone answers for, a scalar; its sum over ranks is the whole's.
        max_norm: Largest norm of the whole, > 0.
        communicator: Collectives over the ranks.
    """
    norm = communicator.all_reduce_(squared_norm.double().reshape(1)).sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factor.to(gradient.dtype))
