"""Weights of an earlier training as the beginning of another."""

import logging
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from kfac_dist.errors import InputError

logger = logging.getLogger(__name__)


@torch.no_grad()
def load_pretrained(model: nn.Module, path: str) -> None:
    """Take over the weights and buffers of a safetensors file, such as a checkpoint's model.safetensors.

    The last layer, the head, is left as it is where its shape is another: that of other classes.

    Args:
        model: On the CPU.
        path: Names of the tensors are those of the model's `state_dict`.

    Raises:
        InputError: If the file is none, or something in it or in the model has no counterpart of its shape.
    """
    place = Path(path).expanduser()
    if not place.is_file():
        raise InputError(f"model.pretrained must be a safetensors file, got {path}, which is no file")
    state = model.state_dict()
    head = _head(model)
    try:
        with safe_open(place, framework="pt", device="cpu") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            left = {name for name in head if name in shapes and shapes[name] != tuple(state[name].shape)}
            left = head if left else set()
            _check(path, {name: tuple(value.shape) for name, value in state.items()}, shapes, left)
            for name, value in state.items():
                if name not in left:
                    value.copy_(file.get_tensor(name))
    except (SafetensorError, OSError) as error:
        raise InputError(f"model.pretrained: {path} is not a readable safetensors file ({error})") from error
    if left:
        logger.info("%s: its %s is of another shape and begins anew", path, " and ".join(sorted(left)))


def _check(path: str, wanted: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], left: set[str]) -> None:
    problems = [f"{name} is missing" for name in sorted(wanted.keys() - found.keys() - left)]
    problems += [f"{name} is unknown to the model" for name in sorted(found.keys() - wanted.keys())]
    problems += [
        f"{name} has the shape {list(found[name])}, the model's {list(wanted[name])}"
        for name in sorted(wanted.keys() & found.keys() - left)
        if found[name] != wanted[name]
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise InputError(
            f"model.pretrained: {path} must hold the weights of this model.name: {'; '.join(problems[:5])}{more}"
        )


def _head(model: nn.Module) -> set[str]:
    """Names of the parameters of the last layer that has any."""
    last: set[str] = set()
    for name, module in model.named_modules():
        own = {f"{name}.{key}" if name else key for key, _ in module.named_parameters(recurse=False)}
        last = own or last
    return last
