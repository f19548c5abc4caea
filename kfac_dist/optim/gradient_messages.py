"""The gradients' way to the ranks that own them (stage 3): in one message, or in several beside the backward pass.

Where collectives run beside the computation (`Communicator.in_background`) gradients need not wait for the end of the
backward pass: a message is sent as soon as the pass has added up the last gradient in it. All ranks send the same
messages in the same order, whatever each rank's pass leaves out, because a message waits for its predecessors, and what
is left is sent at the end of the pass.
"""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple
from zlib import crc32

import torch
from torch import Tensor
from torch.nn import Parameter

from kfac_dist.communicator import Communicator, Pending
from kfac_dist.optim.agreement import DIGEST_LIMIT, agree_on_digest
from kfac_dist.optim.guards import refuse_sparse
from kfac_dist.tensors.foreach import copy_all_
from kfac_dist.tensors.packing import FlatBuffer

# Of the gradients in a message, at least; what torch's DistributedDataParallel takes, whose trade-off is the same.
MESSAGE_BYTES = 25 << 20
# Also at least, for each rank: a message passes through all of them, and at some 5 us a step and 50 GB/s (the profiles
# of `kfac_dist.planning`) that takes as long as the bytes do. So there are fewer messages the more ranks there are.
MESSAGE_BYTES_PER_RANK = 256 << 10


@dataclass(frozen=True)
class Message:
    """Gradients that travel together.

    Attributes:
        buffer: What travels.
        views: Where in it each parameter's gradient goes, several times where several ranks own it.
    """

    buffer: FlatBuffer
    views: Sequence[tuple[Parameter, Tensor]]

    def fill(self) -> None:
        """Write this rank's gradients, zeros where there is none."""
        copy_all_([view for _, view in self.views], [parameter.grad for parameter, _ in self.views])


def cut_for_backward(num_bytes: Sequence[int], num_ranks: int, in_background: bool) -> list[range]:
    """Which items go together: in the order of a backward pass, last items first, few enough messages to pay.

    Args:
        num_bytes: Of each item, in the order of the forward pass.
        num_ranks: That a message passes through.
        in_background: Whether messages can be sent beside the backward pass; else all items are one.
    """
    if not in_background:
        return [range(len(num_bytes))]
    at_least = max(MESSAGE_BYTES, MESSAGE_BYTES_PER_RANK * num_ranks)
    cuts, size = [len(num_bytes)], 0
    for number in reversed(range(len(num_bytes))):
        size += num_bytes[number]
        if size >= at_least:
            cuts.append(number)
            size = 0
    if cuts[-1] != 0 or len(cuts) == 1:
        cuts.append(0)
    return [range(begin, end) for end, begin in pairwise(cuts)]


class GradientMessages:
    """This rank's gradients, from `.grad` to the segments with the averages that it owns.

    `fill`, `start` and `wait` take what the backward pass has left of them; each may be all there is.

    Attributes:
        messages: In the order in which they are sent.
        was_overlapped: Whether they were sent in a backward pass since the last step.
    """

    def __init__(
        self,
        messages: Sequence[Message],
        communicator: Communicator,
        comm_dtype: torch.dtype | None,
        names: Mapping[int, str],
        watch_overflow: bool,
    ) -> None:
        """Hook the parameters, where messages can be sent beside the backward pass.

        Args:
            messages: In the order in which a backward pass completes them; the same on every rank.
            communicator: The ranks.
            comm_dtype: Half precision in which they are sent, or None.
            names: Of the parameters, by id.
            watch_overflow: Keep for `largest` what a message held before it was sent.
        """
        self.messages = messages
        self._communicator = communicator
        self._comm_dtype = comm_dtype
        self._names = names
        self._watch_overflow = watch_overflow
        self._message_of = {id(p): number for number, message in enumerate(messages) for p, _ in message.views}
        self._digest = crc32(repr([message.buffer.part_numels for message in messages]).encode()) % DIGEST_LIMIT
        self._is_open = False
        self.was_overlapped = False
        self._missing: list[set[int]] = []  # of each message the parameters, by id, whose gradients are to come
        self._filled: list[_Filled] = []
        self._pending: list[Pending[Tensor]] = []
        self._handles: list[Any] = []
        weakref.finalize(self, _remove, self._handles)
        if communicator.in_background:
            hook = _GradientHook(self)
            parameters = {id(p): p for message in messages for p, _ in message.views}
            self._handles += [p.register_post_accumulate_grad_hook(hook) for p in parameters.values()]

    @contextmanager
    def sent_in_backward(self) -> Iterator[None]:
        """The backward pass within sends each message when it is complete; what is left is sent at the end.

        It is sent after an exception, too, as the other ranks wait for it.

        Raises:
            AgreedInputError: On every rank, if the ranks' messages differ.
            RuntimeError: If something of an earlier pass has been sent and not been used, or another optimizer's
                context is open.
        """
        if not self._communicator.in_background:
            yield
            return
        if any(gradient is not None and p.grad is gradient for p, gradient in self._sent()):
            raise RuntimeError(
                "overlap_backward() was entered again before step(): it is for the last backward pass before each "
                "step only. After a pass that is not to count call zero_grad() of the optimizer"
            )
        if self._communicator.is_overlapping:
            raise RuntimeError(
                "overlap_backward() was entered within another optimizer's, whose messages ranks would send in other "
                "orders: give all parameters to one optimizer (groups), or enter it for one of the two only"
            )
        self.discard()  # what a step left that failed, or what was sent of gradients that were set to None since
        agree_on_digest(
            self._digest,
            self._communicator,
            "the ranks' optimizers differ in what they train or in which rank owns which layer: freeze and unfreeze "
            "(requires_grad) on every rank alike, and call load_state_dict on every rank",
        )
        self._missing = [{id(parameter) for parameter, _ in message.views} for message in self.messages]
        self._is_open = self.was_overlapped = self._communicator.is_overlapping = True
        try:
            yield
        finally:
            self._is_open = self._communicator.is_overlapping = False
            self.fill()
            self.start()

    def _sent(self) -> Iterator[tuple[Parameter, Tensor | None]]:
        """The parameters and what their gradients were when they were sent in a backward pass since the last step."""
        for message, filled in zip(self.messages, self._filled if self.was_overlapped else (), strict=False):
            yield from ((parameter, sent) for (parameter, _), sent in zip(message.views, filled.gradients, strict=True))

    def on_gradient(self, parameter: Tensor) -> None:
        """Called by the parameter's hook: its `.grad` has been added up."""
        if not self._is_open:
            return
        number = self._message_of[id(parameter)]
        if number < len(self._filled):
            raise RuntimeError(
                f"a gradient of {self._name(parameter)} came after the first had been sent: overlap_backward() is for "
                "one backward pass that gives each parameter its gradient once. Call backward without it"
            )
        self._missing[number].discard(id(parameter))
        while len(self._filled) < len(self.messages) and not self._missing[len(self._filled)]:
            self._fill_next()
            self.start()

    def fill(self) -> None:
        """Write what is not written yet into the messages.

        Raises:
            ValueError: If a gradient is sparse.
        """
        while len(self._filled) < len(self.messages):
            self._fill_next()

    def _fill_next(self) -> None:
        message = self.messages[len(self._filled)]
        for parameter, _ in message.views:
            if parameter.grad is not None:
                refuse_sparse(self._name(parameter), parameter.grad)
        with torch.no_grad():
            message.fill()
            data = message.buffer.data
            watched = self._watch_overflow and data.numel()
            largest = torch.linalg.vector_norm(data, ord=float("inf")) if watched else None
        gradients = [parameter.grad for parameter, _ in message.views]
        self._filled.append(_Filled(gradients, [_version(gradient) for gradient in gradients], largest))

    @property
    def largest(self) -> list[Tensor]:
        """The largest absolute value of each message on this rank, where they are watched; scalars, on the device."""
        return [filled.largest for filled in self._filled if filled.largest is not None]

    def start(self) -> None:
        """Send what is written and not sent yet."""
        for message in self.messages[len(self._pending) : len(self._filled)]:
            buffer = message.buffer
            self._pending.append(
                self._communicator.start_reduce_scatter_v(
                    buffer.data, buffer.counts, self._comm_dtype, buffer.part_numels
                )
            )

    def begin_step(self) -> None:
        """Refuse gradients that were changed after they had been sent; drop what a step left that failed.

        Raises:
            RuntimeError: Naming the first that was changed, or if the context is still open.
        """
        if self._is_open:
            raise RuntimeError("step() was called within overlap_backward(): only backward belongs there")
        if not self.was_overlapped:
            self.discard()
        for message, filled in zip(self.messages, self._filled, strict=False):
            for (parameter, _), sent, version in zip(message.views, filled.gradients, filled.versions, strict=True):
                if parameter.grad is not sent or _version(sent) != version:
                    raise RuntimeError(
                        f"the gradient of {self._name(parameter)} was changed after overlap_backward() had sent it, so "
                        "the change would be lost: clip with max_grad_norm, change gradients in hooks of "
                        "Tensor.register_hook, call DistributedDataParallel within its no_sync(), or call backward "
                        "without overlap_backward()"
                    )

    def wait(self) -> list[Tensor]:
        """Complete what was sent: this rank's segment of each message, the averages; then begin anew."""
        segments = [pending.wait() for pending in self._pending]
        self._pending, self._filled, self.was_overlapped = [], [], False
        return segments

    def discard(self) -> None:
        """Forget what was written or sent; all ranks must."""
        self.wait()

    def close(self) -> None:
        """Take the hooks off the parameters, and `discard`."""
        _remove(self._handles)
        self.discard()

    def _name(self, parameter: Tensor) -> str:
        return self._names.get(id(parameter), "a parameter")


class _Filled(NamedTuple):
    """Of a message that was filled: the gradients then, how often each had been changed, the largest absolute value."""

    gradients: Sequence[Tensor | None]
    versions: Sequence[int]
    largest: Tensor | None


class _GradientHook:
    """The hook on every parameter; holds the messages weakly."""

    def __init__(self, messages: GradientMessages) -> None:
        self._messages = weakref.ref(messages)

    def __call__(self, parameter: Tensor) -> None:
        messages = self._messages()
        if messages is not None:
            messages.on_gradient(parameter)


def _version(gradient: Tensor | None) -> int:
    return 0 if gradient is None else gradient._version


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()
