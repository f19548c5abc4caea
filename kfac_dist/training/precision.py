"""Numeric precision of a run: what weights are kept in, and what forward and backward compute in.

    fp32, fp64    everything in one precision
    fp16, bf16    forward and backward by autocast in half precision; weights, Fisher and updates in fp32

In fp16 the loss is scaled (`kfac_dist.optim.loss_scale`); bf16 has fp32's range and needs no scale.
"""

import os
from dataclasses import dataclass

import torch

from kfac_dist.vocabulary import PrecisionName

HALF_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Precision:
    """The precision that a configuration names."""

    name: PrecisionName

    @property
    def weights(self) -> torch.dtype:
        """Of weights, input images, Fisher and updates."""
        return torch.float64 if self.name == "fp64" else torch.float32

    @property
    def needs_loss_scale(self) -> bool:
        """Whether small gradients would be lost without one."""
        return self.name == "fp16"

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context of a forward pass."""
        dtype = HALF_DTYPES.get(self.name)
        return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def configure_backends(deterministic: bool) -> None:
    """Choose torch's kernels for the whole process.

    Args:
        deterministic: Only kernels that give the same bits every time, which are slower; otherwise cuDNN tries which
            of its convolutions is fastest for each shape.
    """
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic != torch.are_deterministic_algorithms_enabled():  # the call imports torch's compiler: seconds
        torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
