"""What both optimizers check at their borders: arguments, habits that would go wrong silently, the model's start.

Both average over ranks by themselves, so an object that decides on each rank alone, or a copy that is not tied to the
model's layers, would compute something else; it is refused by name.
"""

import torch
from torch import Tensor, nn

from kfac_dist.communicator import Communicator, create_communicator


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
    if communicator is None:
        return create_communicator()
    if not isinstance(communicator, Communicator):
        raise TypeError(
            f"{name} takes a communicator second, from create_communicator(), or None, got {communicator!r}: {call}. "
            "Settings such as the learning rate are keywords"
        )
    return communicator


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


def broadcast_model(model: nn.Module, communicator: Communicator) -> None:
    """Give every rank rank 0's parameters and buffers; collective."""
    for tensor in (*model.parameters(), *model.buffers()):
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
