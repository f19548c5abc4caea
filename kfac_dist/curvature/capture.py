"""Hooks that turn a training step's forward and backward into the local Fisher factors (stages 1 and 2).

A forward hook keeps the layer's input and puts a *tensor* hook on its output; the matrices are built when the
output's gradient arrives. A tensor hook, unlike a full backward hook, allows in-place activations. Building A in the
backward, too, means that a forward without a backward (evaluation, a probe, recomputation under activation
checkpointing) leaves no trace; the input is alive until then anyway, since autograd needs it for the weight's gradient.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kfac_dist.curvature.blocks.base import Block, FactorKey
from kfac_dist.tensors.packing import pack_symmetric


class Capture:
    """Accumulates the blocks' factors, packed, where it is told to.

    Attributes:
        captured: Names of the blocks of which at least one call was captured since `begin`.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        """Hook the layers of all blocks that have Fisher matrices."""
        self.captured: set[str] = set()
        self._destinations: Mapping[FactorKey, Tensor] = {}
        self._weights: dict[FactorKey, float] = {}  # of what each factor has so far: positions for G, else calls
        self._accumulation_steps = 1
        self._loss_scale = 1.0
        self._handles = [
            block.module.register_forward_hook(self._forward_hook(block), with_kwargs=True)
            for block in blocks
            if block.factor_shapes
        ]

    def begin(self, destinations: Mapping[FactorKey, Tensor], accumulation_steps: int, loss_scale: float = 1.0) -> None:
        """Forget what was captured and start anew.

        Args:
            destinations: Where each factor that is wanted goes: a flat view for the packed upper triangles.
                A factor without a destination costs nothing.
            accumulation_steps: Micro-batches of one update. Each one's loss is expected divided by this number.
            loss_scale: What the loss is multiplied with besides (loss scaling); G and F are divided by its square.
        """
        self.captured = set()
        self._destinations = destinations
        self._weights = {}
        self._accumulation_steps = accumulation_steps
        self._loss_scale = loss_scale

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def _forward_hook(self, block: Block) -> Any:
        def forward_hook(
            module: nn.Module, inputs: tuple[Tensor, ...], keywords: Mapping[str, Tensor], output: Tensor
        ) -> None:
            wanted = [matrix for matrix in block.factor_shapes if (block.name, matrix) in self._destinations]
            is_original = module is block.module  # a deep copy of the model keeps the hooks, and must not count
            if wanted and is_original and module.training and output.requires_grad and output.numel():
                x = (inputs[0] if inputs else keywords["input"]).detach()
                output.register_hook(lambda g: self._accumulate(block, wanted, x, g))

        return forward_hook

    @torch.no_grad()
    def _accumulate(self, block: Block, wanted: Sequence[str], x: Tensor, g: Tensor) -> None:
        with torch.autocast(x.device.type, enabled=False):
            for matrix in wanted:
                dtype = self._destinations[block.name, matrix].dtype
                self._add(block, matrix, block.factor(matrix, x, g).to(dtype), g)
        self.captured.add(block.name)

    def _add(self, block: Block, matrix: str, factor: Tensor, g: Tensor) -> None:
        """Add one call's factor to what this update has so far.

        Calls of a layer in one forward are further positions, so A and F add up over them and are averaged over
        the micro-batches; G is the mean over all positions.
        """
        key = block.name, matrix
        scale = 1.0 if matrix == "A" else (self._accumulation_steps / self._loss_scale) ** 2
        if matrix != "G":
            scale /= self._accumulation_steps
        if scale != 1:
            factor *= scale
        destination = self._destinations[key]
        num_samples, num_features = g.shape[0], factor.shape[0] * factor.shape[-1]
        weight = g.numel() / (num_samples * num_features) if matrix == "G" else 1.0
        total = self._weights[key] = self._weights.get(key, 0.0) + weight
        if total == weight:
            pack_symmetric(factor, out=destination)
            return
        packed = torch.empty_like(destination)
        pack_symmetric(factor, out=packed)
        if matrix == "G":
            destination.lerp_(packed, weight / total)
        else:
            destination.add_(packed)
