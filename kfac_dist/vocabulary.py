"""Names that a user chooses from, in a configuration or in a call: each list of them stands here, once; and counts.

This module imports nothing, so that the configuration need not load torch, nor the library the configuration.
"""

from typing import Literal

DeviceChoice = Literal["auto", "cpu", "cuda"]

PrecisionName = Literal["fp32", "fp64", "fp16", "bf16"]
"""What a run computes in; see `kfac_dist.training.precision`."""

WirePrecision = Literal["fp32", "fp16", "bf16"]
"""What buffers are sent in."""

Backend = Literal["mpi", "nccl"]
BackendChoice = Literal["auto", Backend]

ReduceScatterAlgorithm = Literal["native", "reduce", "ireduce"]
"""ReduceScatterV over MPI; see `kfac_dist.communicator.mpi`."""
ReduceScatterChoice = Literal["auto", ReduceScatterAlgorithm]

BatchNormForm = Literal["full", "unit", "diagonal"]
"""Which entries of BatchNorm's Fisher are kept; see `kfac_dist.curvature.batchnorm`."""

WeightRescaling = Literal["always", "cap", "off"]
"""When Eq. 18 is applied; see `kfac_dist.optim.update`."""

Decayed = Literal["all", "weights"]
"""What the weight decay applies to; see `kfac_dist.config.optimizer`."""

BottleneckVariant = Literal["v1", "v1.5"]
"""Where a bottleneck ResNet reduces the image; see `kfac_dist.models.residual`."""

Initialization = Literal["recipe", "own"]
"""Whose initial weights a network has; see `kfac_dist.models`."""

Preprocessing = Literal["paper", "random_resized_crop"]
"""How ImageNet's images are cut out; see `kfac_dist.data.imagenet.crops`."""
FinalMetric = Literal["train_loss", "test_top1"]
"""What a study's trial ends with; see `kfac_dist.study.results`."""


def counted(number: int, noun: str) -> str:
    """For texts: ``1 layer``, ``2 layers``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
