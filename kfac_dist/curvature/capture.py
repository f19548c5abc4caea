"""Hooks that turn a training step's forward and backward into the local Fisher factors (stages 1 and 2).

A forward hook keeps the layer's input and puts a hook on the graph's node that made its output; the matrices are built
when that node gets the output's gradient, after all that hooks of others on the output make of it. Unlike a full
backward hook, it allows in-place activations. Building A in the backward, too, means that a forward without a backward
(evaluation, a probe, recomputation under activation checkpointing) leaves no trace.

The input is kept as autograd keeps what it saves: activation checkpointing frees it until it is recomputed, and a
change in place is found out. A copied or pickled model carries hooks that do nothing, and hooks go with the `Capture`.

A compiled model runs the hooks as plain Python between its graphs, which break there: at each covered layer. Under
torch.func's transforms and torch.jit.trace the hooks do nothing; torch.jit.script would compile them and is refused.

A backward pass counts if it computes the gradient of the layer's trained weight: one for the input only (adversarial
examples, saliency) leaves no trace.
"""

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from kfac_dist.curvature.blocks.base import Block, FactorKey
from kfac_dist.curvature.hooks import NO_GRAPH_TASK, Goes, GradientHook, LayerHook, Saved, gradient_goes
from kfac_dist.tensors.full_precision import full_fp32_products


class Capture:
    """Accumulates the blocks' factors, packed, where it is told to.

    Attributes:
        captured: Names of the blocks of which at least one call was captured since `begin`.
        num_samples: N of the forwards to come on this rank, where it is not the size of the first dimension; or None.
        sample_fraction: Of each call's samples, in (0, 1], that A and G are computed from.
    """

    def __init__(self) -> None:
        """Start without layers; see `follow`."""
        self.captured: set[str] = set()
        self.num_samples: int | None = None
        self.sample_fraction = 1.0
        self._blocks: dict[str, Block] = {}
        self._destinations: Mapping[FactorKey, Tensor] = {}
        self._weights: dict[FactorKey, float] = {}  # of what each factor has so far: positions for G, else calls
        self._passes: dict[str, set[int]] = {}  # by block the backward passes that reached it
        self._given: set[str] = set()  # blocks of which a pass captured something, or began to, and adds to `.grad`
        self._enclosing: dict[int, int] = {}  # of a backward pass within another one, that other one
        self._generation = 0
        self._handles: list[Any] = []
        weakref.finalize(self, _remove, self._handles)

    def follow(self, blocks: Sequence[Block]) -> None:
        """Hook the layers of all blocks that have Fisher matrices, and no others any more.

        What was captured of blocks that stay, stays; see `move`.
        """
        self.close()
        before, self._blocks = self._blocks, {block.name: block for block in blocks if block.factor_shapes}
        for name, block in before.items():
            if self._blocks.get(name) is not block:
                self._forget_block(name)
        self._handles += [
            # First of all, as the hooks of others may replace the layer's output.
            block.module.register_forward_hook(LayerHook(self, name), prepend=True, with_kwargs=True)
            for name, block in self._blocks.items()
        ]

    def begin(self, destinations: Mapping[FactorKey, Tensor]) -> None:
        """Forget what was captured and start anew; forwards until now count no more.

        Args:
            destinations: Where each factor that is wanted goes: a flat view for the packed upper triangles.
                A factor without a destination costs nothing.
        """
        self._destinations = destinations
        self._generation += 1  # a backward through a graph from before is none of this step's
        self.forget()

    def forget(self) -> None:
        """Forget what was captured; a forward whose backward is still to come counts."""
        self.captured = set()
        self._weights = {}
        self._passes = {}
        self._enclosing = {}
        self._given = set()

    def move(self, destinations: Mapping[FactorKey, Tensor]) -> None:
        """Go on at other places, with what was captured so far."""
        self._weights = {key: weight for key, weight in self._weights.items() if key in destinations}
        for key in self._weights:
            destinations[key].copy_(self._destinations[key])
        self._destinations = destinations

    def forget_dropped(self) -> None:
        """Forget each block whose parameters' gradients were all set to None since its backward, or never came.

        They do not where the pass ended in an exception, for want of memory say.
        """
        for name in list(self._given):
            self._forget_if_dropped(name)

    def _forget_if_dropped(self, name: str) -> None:
        # A gradient that torch.autograd.grad returned was never there, and is not gone.
        if name in self._given and all(parameter.grad is None for parameter in self._blocks[name].parameters):
            self._forget_block(name)

    def _forget_block(self, name: str) -> None:
        self.captured.discard(name)
        self._given.discard(name)
        self._passes.pop(name, None)
        self._weights = {key: weight for key, weight in self._weights.items() if key[0] != name}

    @property
    def num_passes(self) -> int:
        """Backward passes that were captured since `begin`; 0 if none was.

        A pass is counted where it reaches a layer. The passes that reentrant checkpointing runs within one call of
        `backward`, on what it computed again there, are that one.
        """
        return max((len(set(map(self._outermost, passes))) for passes in self._passes.values()), default=0)

    def _outermost(self, graph_task: int) -> int:
        while graph_task in self._enclosing:
            graph_task = self._enclosing[graph_task]
        return graph_task

    def finish(self, loss_scale: float) -> None:
        """Give the captured factors their scale: each loss was a mean, divided by the number of backward passes.

        Args:
            loss_scale: What the losses were multiplied with besides; G and F are divided by its square.
        """
        passes = max(1, self.num_passes)
        gradient_scale = (passes / loss_scale) ** 2
        scales = {"A": 1 / passes, "G": gradient_scale, "F": gradient_scale / passes}
        keys = [key for key in self._weights if scales[key[1]] != 1]
        if keys:
            torch._foreach_mul_([self._destinations[key] for key in keys], [scales[matrix] for _, matrix in keys])

    def close(self) -> None:
        """Take the hooks off the model."""
        _remove(self._handles)

    def on_forward(self, name: str, module: nn.Module, x: Tensor, output: Tensor) -> None:
        """Called by the layer's hook: keep the input, and wait for the output's gradient.

        Raises:
            ValueError: If the model was moved since.
        """
        if not self._destinations:  # nothing is due
            return
        if torch._C._current_graph_task_id() == NO_GRAPH_TASK:  # no recomputation amid a backward
            self._forget_if_dropped(name)
        block = self._blocks[name]
        wanted = [matrix for matrix in block.factor_shapes if (name, matrix) in self._destinations]
        weight, node = block.parameters[0], output.grad_fn
        if not module.training or node is None or not output.numel() or not weight.requires_grad:
            return
        place = next(iter(self._destinations.values())).device
        if output.device != place:
            raise ValueError(
                f"{name} computes on {output.device}, but the optimizer was made for a model on {place}: move the "
                "model first, then make the optimizer (its state_dict can be loaded into the new one)"
            )
        if not block.is_in_place:  # torch.func.functional_call has put something else there
            return
        node.register_prehook(
            GradientHook(
                self,
                self._generation,
                block,
                wanted,
                Saved.of(x) if wanted else None,  # else its passes are counted, on which the others' scale depends
                self.num_samples,
                get_gradient_edge(weight).node,
                output.output_nr,
            )
        )

    def on_gradient(self, hook: "GradientHook", g: Tensor) -> None:
        """Called by the output's hook: build the matrices of one call of the layer."""
        block = hook.block
        if hook.generation != self._generation or self._blocks.get(hook.name) is not block:
            return
        goes = gradient_goes(hook.accumulation)
        if goes is Goes.NOWHERE:
            hook.is_differentiated |= torch.is_grad_enabled()
            return
        if hook.wanted and (hook.saved is None or hook.is_differentiated):
            raise RuntimeError(
                f"{hook.name}: a second backward pass went through one forward pass. K-FAC needs the gradient of the "
                "whole loss at once: add the losses up and call backward once; where the loss holds a gradient itself "
                "(a gradient penalty), leave the layer out with skip"
            )
        graph_task = torch._C._current_graph_task_id()
        self._passes.setdefault(hook.name, set()).add(graph_task)
        if goes is Goes.TO_GRAD:
            self._given.add(hook.name)
        if hook.enclosing not in (NO_GRAPH_TASK, graph_task):
            self._enclosing[graph_task] = hook.enclosing
        if not hook.wanted:
            return
        x, g = block.batched(hook.take_input(), g)
        num_samples = hook.num_samples
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False), full_fp32_products():
            for matrix in hook.wanted:
                self._add(block, matrix, x, g, num_samples)
        self.captured.add(hook.name)

    def _add(self, block: Block, matrix: str, x: Tensor, g: Tensor, num_samples: int | None) -> None:
        """Add one call's factor to what this update has so far.

        Calls of a layer in one forward are further positions, so A and F add up over them and are averaged over
        the micro-batches; G is the mean over all positions.
        """
        key = block.name, matrix
        destination = self._destinations[key]
        count, size = block.factor_shapes[matrix]
        weight = g.numel() / ((num_samples or g.shape[0]) * count * size) if matrix == "G" else 1.0
        total = self._weights[key] = self._weights.get(key, 0.0) + weight
        if total == weight:
            block.pack_sampled_factor(matrix, x, g, num_samples, self.sample_fraction, out=destination)
            return
        packed = torch.empty_like(destination)
        block.pack_sampled_factor(matrix, x, g, num_samples, self.sample_fraction, out=packed)
        if matrix == "G":
            destination.lerp_(packed, weight / total)
        else:
            destination.add_(packed)


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()
