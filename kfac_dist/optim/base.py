"""What the trainer asks of an optimizer, what all of them do with gradients, and what every optimizer here refuses."""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from kfac_dist.communicator import Communicator
from kfac_dist.communicator.local import LocalCommunicator
from kfac_dist.curvature.blocks.base import FactorKey
from kfac_dist.optim.agreement import agree_on_weights
from kfac_dist.optim.gradient_messages import GradientMessages, Message
from kfac_dist.optim.guards import broadcast_model, clip_
from kfac_dist.optim.loss_scale import LossScaler
from kfac_dist.optim.step_report import StepReport

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _without_compiler(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """A method of torch's optimizer without the wrapper that keeps `torch.compile` out of it.

    That one loads the compiler at the first call, which takes about a second, for a wish that only a loaded compiler
    can hear. Where it is loaded, or the wrapper is of another kind, the method as it is.
    """
    is_wrapper = getattr(method, "__globals__", {}).get("__name__") == "torch._compile"
    if not is_wrapper or "torch._dynamo" in sys.modules:
        return method
    wrapped: Callable[_P, _R] = getattr(method, "__wrapped__", method)
    return wrapped


def _shown(value: object) -> str:
    """A setting, to six digits because hosts may round apart; no GPU's, for which the host would wait."""
    if isinstance(value, float):  # almost all are, in every step
        return f"{value:.6g}"
    if isinstance(value, Tensor):
        return _shown(value.tolist()) if value.device.type == "cpu" else "a tensor"
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_shown, value))})"
    return str(value)


class DistributedOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose `step` is collective: it averages over the ranks by itself.

    An object that decides on each rank alone, or a copy that is not tied to the model's layers, would compute something
    else: a `torch.amp.GradScaler`, a deep copy and a pickle are refused by name.

    A subclass reads its settings from `param_groups` at every step, since the trainer sets them there, changes nothing
    and says so in `report` where losses overflowed, and keeps in `state_dict` all that the next steps depend on.

    Attributes:
        report: What came of the last step.
    """

    communicator: Communicator
    report: StepReport
    _messages = GradientMessages((), LocalCommunicator(), None, {}, watch_overflow=False)  # a subclass may have none
    _loss_scaler: LossScaler | None = None
    _max_grad_norm: float | None = None
    _is_closed = False
    _has_stepped = False

    # A GradScaler then leaves the gradients alone and hands its scale over, by which it is recognised.
    _step_supports_amp_scaling = True

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            f"{type(self).__name__} cannot be copied or pickled: it is tied to its model's layers and to the other "
            "ranks. Save its state_dict(), make a new one for the copied model, and load the state into that"
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        _without_compiler(torch.optim.Optimizer.add_param_group)(self, param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        _without_compiler(torch.optim.Optimizer.zero_grad)(self, set_to_none)
        self._messages.discard()

    def state_dict(self) -> dict[str, Any]:
        return _without_compiler(torch.optim.Optimizer.state_dict)(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        _without_compiler(torch.optim.Optimizer.load_state_dict)(self, state_dict)

    def refuse_grad_scaler(self) -> None:
        """Refuse a step that a GradScaler drives.

        Raises:
            TypeError: If one does.
        """
        if hasattr(self, "found_inf") or hasattr(self, "grad_scale"):
            raise TypeError(
                f"torch.amp.GradScaler cannot drive {type(self).__name__}: it decides on each rank alone whether to "
                "skip, and K-FAC's factors would keep its scale. Use kfac_dist.LossScaler: "
                "loss_scaler=scaler in the constructor, scaler.scale_loss(loss).backward(), optimizer.step()"
            )

    def overlap_backward(self) -> AbstractContextManager[None]:
        """Send gradients while the backward pass within computes further ones; collective, at most once for each step.

            with optimizer.overlap_backward():
                loss.backward()
            optimizer.step()

        For the last backward pass before `step`: with micro-batches call `backward` for the others outside. Every rank
        enters, also one that has nothing to call within. The step's result is the same. Where collectives make no
        progress while a rank computes, as MPI's do not, it does nothing; see `Communicator.in_background`.

        Gradients must not be changed after it: clip with `max_grad_norm`. Changes through `.data`, which torch does not
        note, would be lost without a word; others are refused by `step`.

        Raises:
            AgreedInputError: On every rank, if other parameters are frozen, or other states loaded, on other ranks.
            RuntimeError: If it is entered twice before `step` or `zero_grad`, or within another optimizer's, or if a
                parameter gets its gradient twice within (reentrant checkpointing of a layer that is used twice).
        """
        self.refuse_closed()
        self._follow_freezing()
        return self._messages.sent_in_backward()

    def _hook_gradients(
        self, messages: Sequence[Message], comm_dtype: torch.dtype | None, names: Mapping[int, str]
    ) -> None:
        """Send gradients in these messages from now on, in that precision; names are by id of the parameter."""
        self._messages.close()
        self._messages = GradientMessages(
            messages, self.communicator, comm_dtype, names, watch_overflow=self._loss_scaler is not None
        )

    def _start_alike(self, model: nn.Module, trained: Sequence[Parameter], **arguments: object) -> None:
        """`broadcast_model`, where every rank gave these arguments alike; collective."""
        lines = [type(self).__name__, *(f"{name}={_shown(value)}" for name, value in arguments.items())]
        broadcast_model(model, self.communicator, trained, lines)

    def _agree_on_first_weights(self, trained: Sequence[Parameter], names: Mapping[int, str]) -> None:
        """In the first step `agree_on_weights`: one rank alone may have loaded others since the optimizer was made."""
        if not self._has_stepped:
            agree_on_weights(trained, names, self.communicator)
            self._has_stepped = True

    def _settings(self) -> list[str]:
        """A line for each parameter group with what `step` takes from it, and what undoes the loss scale."""
        return [
            *(
                f"parameter group {number}: "
                + ", ".join(f"{name}={_shown(group[name])}" for name in self.defaults if name in group)
                for number, group in enumerate(self.param_groups)
            ),
            f"losses scaled by {_shown(self._loss_scale)}",
        ]

    @property
    def _loss_scale(self) -> float:
        return self._loss_scaler.factor if self._loss_scaler is not None else 1.0

    def _overflowed(self, *factors: Tensor) -> bool:
        """Whether gradients or factors overflowed on any rank; collective. Nothing that lasts has been changed yet."""
        values = [*factors, *self._messages.largest]
        return self._loss_scaler is not None and self._loss_scaler.overflowed(values, self.communicator)

    def _receive_averages(self, loss_scale: float, own: Callable[[], Sequence[Tensor]] | None = None) -> None:
        """The end of stage 3: wait for the averaged gradients, undo the loss scale, clip.

        Args:
            loss_scale: What the losses were scaled with.
            own: Gives what this rank alone answers for in the gradient's norm; all that it receives if None.
        """
        averages = self._messages.wait()
        if loss_scale != 1:
            for average in averages:
                average.mul_(1.0 / loss_scale)
        if self._max_grad_norm is not None:
            zero = torch.zeros((), dtype=torch.float64, device=averages[0].device)
            squared = sum((part.double().square().sum() for part in (own() if own else averages)), zero)
            clip_(averages, squared, self._max_grad_norm, self.communicator)

    def _follow_freezing(self) -> None:
        """Lay out what depends on which parameters are trained, if that has changed; here there is nothing."""

    def skip_step(self) -> None:
        """In place of a `step`: change nothing, and drop what was captured or sent for it. Every rank must do so."""
        self._messages.discard()
        self.report = StepReport(skipped=True)

    def close(self) -> None:
        """Let go of the model and the loss scaler; the optimizer cannot take a step any more."""
        self._is_closed = True
        self._messages.close()
        if self._loss_scaler is not None:
            self._loss_scaler.release()

    def refuse_closed(self) -> None:
        """Refuse what needs the model after `close`.

        Raises:
            RuntimeError: If it was called.
        """
        if self._is_closed:
            raise RuntimeError(f"this {type(self).__name__} was closed: make a new one for the model")

    def describe(self) -> list[str]:
        """What a run's log should say of it, a line each."""
        return []

    def owned_blocks(self, first_only: bool) -> list[str]:
        """Names of the blocks whose state this rank keeps; of several owners only the first, if so wanted."""
        del first_only
        return []

    def spectra(self) -> dict[FactorKey, tuple[float, float, float]]:
        """Smallest and largest eigenvalue and effective rank of each matrix that it keeps, if any; collective."""
        return {}
