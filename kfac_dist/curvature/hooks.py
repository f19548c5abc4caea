"""The hooks on a layer and on its output. What comes of them is up to the `Capture` that they tell."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from enum import Enum, auto
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from kfac_dist.curvature.blocks.base import Block
from kfac_dist.curvature.hook_classes import not_compiled

NO_GRAPH_TASK = -1  # what PyTorch says outside a backward pass


class Listener(Protocol):
    """What is told of forwards and gradients: a `Capture`."""

    def on_forward(self, name: str, module: nn.Module, x: Tensor, output: Tensor) -> None:
        """A layer was called."""

    def on_gradient(self, hook: "GradientHook", g: Tensor) -> None:
        """The gradient of a layer's output is there."""


@not_compiled
class LayerHook:
    """A layer's forward hook; holds the capture weakly. A copy of it, as in a copied model, does nothing."""

    def __init__(self, capture: Listener, name: str) -> None:
        self._capture: weakref.ref[Listener] | None = weakref.ref(capture)
        self._name = name

    def __call__(
        self, module: nn.Module, inputs: tuple[Tensor, ...], keywords: Mapping[str, Tensor], output: Tensor
    ) -> None:
        if torch.compiler.is_compiling():
            from kfac_dist.curvature.uncompiled import call  # see `not_compiled`

            call(self, module, inputs, keywords, output)
            return
        capture = self._capture() if self._capture is not None else None
        if capture is not None and not torch._C._are_functorch_transforms_active() and not torch._C._is_tracing():
            capture.on_forward(self._name, module, inputs[0] if inputs else keywords["input"], output)

    def __getstate__(self) -> dict[str, Any]:
        return {"_capture": None, "_name": self._name}

    def __getattr__(self, attribute: str) -> Any:
        if attribute == "__name__":  # which TorchScript's compiler asks each hook for first
            raise AttributeError(
                f"torch.jit.script cannot compile K-FAC's hook on layer {self._name}: script the model before making "
                "KFAC or after its close(), or use torch.jit.trace or torch.export",
                name=attribute,
                obj=self,
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {attribute!r}", name=attribute, obj=self)


class GradientHook:
    """The hook on the node that made a layer's output, with what belongs to that call of the layer.

    Attributes:
        block: The layer's block then.
        saved: The input, until it is taken, where a matrix is wanted.
        num_samples: N of the call, or None.
        accumulation: The node of the graph that adds to the weight's `.grad`.
        output_number: Which of the node's outputs is the layer's.
        enclosing: The backward pass in which the call was computed again, if one.
        is_differentiated: Whether a backward pass that did not count can itself be differentiated.
    """

    def __init__(
        self,
        capture: Listener,
        generation: int,
        block: Block,
        wanted: Sequence[str],
        saved: Tensor | None,
        num_samples: int | None,
        accumulation: Node,
        output_number: int,
    ) -> None:
        self._capture = weakref.ref(capture)
        self.generation = generation
        self.block = block
        self.name = block.name
        self.wanted = wanted
        self.saved: Tensor | None = saved
        self.num_samples = num_samples
        self.accumulation = accumulation
        self.output_number = output_number
        self.enclosing = torch._C._current_graph_task_id()
        self.is_differentiated = False

    def __call__(self, gradients: tuple[Tensor | None, ...]) -> None:
        capture, g = self._capture(), gradients[self.output_number]
        if capture is not None and g is not None:
            capture.on_gradient(self, g)

    def take_input(self) -> Tensor:
        """The layer's input, once.

        Raises:
            RuntimeError: If it was changed in place since.
        """
        assert self.saved is not None
        saved, self.saved = self.saved, None
        try:
            x: Tensor = saved.grad_fn.saved_tensors[0]  # type: ignore[union-attr]
        except RuntimeError as error:
            if "inplace" not in str(error):
                raise
            raise RuntimeError(
                f"the input of {self.name} was changed in place after the layer had used it; K-FAC needs it as it was: "
                "use an operation that is not in place, or leave the layer out with skip"
            ) from error
        return x


class Saved(torch.autograd.Function):
    """Keeps a tensor the way autograd keeps what a layer saves: hooks on saved tensors apply, versions are checked."""

    @staticmethod
    def of(x: Tensor) -> Tensor:
        """An empty tensor whose `grad_fn` has saved `x`."""
        kept: Tensor = Saved.apply(torch.empty(0, requires_grad=True), x.detach())
        return kept

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return anchor.view_as(anchor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return None, None


class Goes(Enum):
    """What becomes of a weight's gradient in the backward pass that is running."""

    NOWHERE = auto()
    TO_GRAD = auto()
    TO_CALLER = auto()


def gradient_goes(accumulation: Node) -> Goes:
    """What becomes of the gradient that this node of the graph adds to a weight's `.grad`."""
    will_run: Callable[[Node], bool] | None = getattr(torch._C, "_will_engine_execute_node", None)
    try:
        return Goes.TO_GRAD if will_run is None or will_run(accumulation) else Goes.NOWHERE
    except RuntimeError:  # `autograd.grad` for the weight returns the gradient in place of adding it
        return Goes.TO_CALLER
