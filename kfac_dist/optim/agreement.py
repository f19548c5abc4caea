"""What the ranks must hold alike before they send anything, and what all of them must know before a step."""

import hashlib
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from kfac_dist.communicator import Communicator
from kfac_dist.errors import AgreedInputError, InputError

DIGEST_LIMIT = 2**20
"""Digests are below it, so that sums of their squares are exact in fp64 on up to 2^13 ranks."""

_SAME_LAYERS = "Build the same on every rank: layers and parameters in the same order, of the same shapes, frozen alike"
_SAME_ARGUMENTS = "Give the same on every rank: what is drawn at random is drawn on one rank and sent to the others"
_SAME_WEIGHTS = (
    "What changes weights after the optimizer was made, as load_state_dict does, must do so on every rank; before it "
    "is made rank 0's are enough, which all take then"
)
_SAME_SETTINGS = (
    "Set the same on every rank: a scheduler that looks at a loss, as ReduceLROnPlateau does, needs the mean over the "
    "ranks, and a LossScaler the same num_losses"
)


def agree_on_model(model: nn.Module, trained: Sequence[Parameter], communicator: Communicator) -> None:
    """Refuse ranks whose models differ in names, order, shapes, dtypes or freezing, or that train other parameters.

    Collective; before anything is sent, since buffers of different lengths would wait for ever or cross weights.

    Args:
        model: This rank's model.
        trained: What its optimizer was given.
        communicator: The ranks.

    Raises:
        AgreedInputError: On every rank, naming the first difference.
    """
    _agree_on_lines([*_describe(model), *_describe_given(model, trained)], "models", communicator, _SAME_LAYERS)


def agree_on_arguments(arguments: Sequence[str], communicator: Communicator) -> None:
    """Refuse ranks whose optimizers were made with other arguments; collective.

    Args:
        arguments: A line for each argument that must be the same on every rank.
        communicator: The ranks.

    Raises:
        AgreedInputError: On every rank, naming the first difference.
    """
    _agree_on_lines(arguments, "optimizers", communicator, _SAME_ARGUMENTS)


def agree_on_group(names: Mapping[int, str], group: Sequence[Parameter], communicator: Communicator) -> None:
    """`agree_on_model` for a parameter group that is added later; `names` are the model's by id."""
    lines = [_line(names.get(id(p), "a parameter"), p) for p in group]
    _agree_on_lines(lines, "parameter groups", communicator, _SAME_LAYERS)


def agree_on_weights(parameters: Sequence[Parameter], names: Mapping[int, str], communicator: Communicator) -> None:
    """Refuse ranks whose parameters hold other values; collective, and waits for the GPU.

    Args:
        parameters: What the optimizer was given; the same on every rank.
        names: Of the parameters, by id.
        communicator: The ranks.

    Raises:
        AgreedInputError: On every rank, naming the first parameter that differs.
    """
    sums = torch.stack([_sum_of_bits(parameter) for parameter in parameters]).tolist()
    lines = [f"{names.get(id(p), 'a parameter')} (bits {total:x})" for p, total in zip(parameters, sums, strict=True)]
    _agree_on_lines(lines, "weights", communicator, _SAME_WEIGHTS)


def _sum_of_bits(values: Tensor) -> Tensor:
    """A number that is the same on every machine, whatever order it adds in, where the values are."""
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    return values.detach().view(integer).sum(dtype=torch.int64)


def _agree_on_lines(lines: Sequence[str], what: str, communicator: Communicator, remedy: str) -> None:
    text = "\n".join(lines).encode(errors="backslashreplace")
    if len(set(communicator.gather_bytes(hashlib.sha256(text).digest()))) == 1:
        return
    first = communicator.gather_bytes(text if communicator.is_main else b"")[0].decode().split("\n")
    with communicator.raise_on_all_ranks():
        for here, there in zip_longest(text.decode().split("\n"), first, fillvalue="nothing more"):
            if here != there:
                raise InputError(
                    f"the ranks' {what} differ: {here} on rank {communicator.rank}, {there} on rank 0. {remedy}"
                )


def _describe(model: nn.Module) -> Iterator[str]:
    yield from (_line(name, parameter) for name, parameter in model.named_parameters())
    yield from (f"buffer {name} {tuple(b.shape)} {b.dtype}" for name, b in model.named_buffers())


def _describe_given(model: nn.Module, trained: Sequence[Parameter]) -> Iterator[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return (f"params[{n}] {names.get(id(p)) or _line('not of the model', p)}" for n, p in enumerate(trained))


def _line(name: str, parameter: Parameter) -> str:
    return f"{name} {tuple(parameter.shape)} {parameter.dtype}{'' if parameter.requires_grad else ' frozen'}"


@dataclass(frozen=True)
class StepAgreement:
    """What every rank knows of all ranks at the start of a step.

    Attributes:
        with_gradient: Ids of the trained parameters that have a gradient on some rank.
        num_captured: By a parameter's id, the ranks on which its flag was set.
        num_kept: Sum over the ranks.
        all_sent: Whether every rank had sent its gradients before.
    """

    with_gradient: Collection[int]
    num_captured: Mapping[int, int]
    num_kept: int
    all_sent: bool


def agree_on_step(
    parameters: Sequence[Parameter],
    names: Mapping[int, str],
    communicator: Communicator,
    captured: Collection[int] = (),
    digest: int = 0,
    num_kept: int = 0,
    has_sent: bool = False,
    settings: Sequence[str] = (),
) -> StepAgreement:
    """Tell all ranks what each has; one small all-reduce on the host, in every step, for which no GPU waits.

    Its length does not depend on what is frozen, so that ranks which froze other parameters find out.

    Args:
        parameters: What the optimizer was given; the same on every rank.
        names: Of the parameters, by id.
        communicator: The ranks.
        captured: Ids of parameters whose layers' factors this rank captured.
        digest: Of what must be the same on every rank besides, in [0, 2^20).
        num_kept: To be added up.
        has_sent: Whether this rank has sent its gradients already.
        settings: Lines that must be the same on every rank.

    Raises:
        AgreedInputError: On every rank, if a parameter is frozen on some ranks only, or the digests or settings differ.
    """
    trained = [parameter.requires_grad for parameter in parameters]
    with_gradient = [p.grad is not None and is_trained for p, is_trained in zip(parameters, trained, strict=True)]
    flags = [*trained, *with_gradient, *(id(parameter) in captured for parameter in parameters)]
    of_settings = zlib.crc32("\n".join(settings).encode()) % DIGEST_LIMIT
    own = [*flags, digest, digest**2, of_settings, of_settings**2, num_kept, has_sent]
    total = communicator.all_reduce_(torch.tensor(own, dtype=torch.float64, device="cpu"))
    *sums, digests, squares, digests_of_settings, squares_of_settings, kept, sent = map(int, total.tolist())
    num_trained, num_with_gradient, num_captured = (
        sums[start : start + len(parameters)] for start in range(0, len(sums), len(parameters))
    )
    size = communicator.size
    for parameter, count in zip(parameters, num_trained, strict=True):
        if count not in (0, size):
            raise AgreedInputError(
                f"{names.get(id(parameter), 'a parameter')} is trained on {count} of {size} ranks and frozen on the "
                "others: freeze and unfreeze (requires_grad) on every rank alike"
            )
    if not _are_equal(digests, squares, size):
        raise AgreedInputError(
            "the ranks' optimizers differ in their iteration, in which rank owns which layer or in what they refresh: "
            "load_state_dict must be called on every rank, each with a state of the same iteration, step equally "
            "often, and a schedule of your own must decide alike on every rank"
        )
    if not _are_equal(digests_of_settings, squares_of_settings, size):
        _agree_on_lines(settings, "settings", communicator, _SAME_SETTINGS)
    return StepAgreement(
        {id(parameter) for parameter, count in zip(parameters, num_with_gradient, strict=True) if count},
        {id(parameter): count for parameter, count in zip(parameters, num_captured, strict=True) if count},
        kept,
        sent == size,
    )


def agree_on_digest(digest: int, communicator: Communicator, problem: str) -> None:
    """Refuse what differs on some ranks; one small all-reduce on the host.

    Args:
        digest: Of what must be the same on every rank, in [0, `DIGEST_LIMIT`).
        communicator: The ranks.
        problem: What to say.

    Raises:
        AgreedInputError: On every rank.
    """
    own = torch.tensor([digest, digest**2], dtype=torch.float64, device="cpu")
    digests, squares = map(int, communicator.all_reduce_(own).tolist())
    if not _are_equal(digests, squares, communicator.size):
        raise AgreedInputError(problem)


def _are_equal(digests: int, squares: int, size: int) -> bool:
    """Whether numbers are all equal, from their sum and that of their squares (Cauchy-Schwarz)."""
    return squares * size == digests**2
