"""Measures the rates of this machine, for a `Profile`: short, on all ranks at once, of which the mean counts.

Ranks that run at the same time share memory, caches and clock rates as they will in training.
"""

import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_dist.communicator import Communicator
from kfac_dist.config.schema import Config
from kfac_dist.curvature.blocks.create import create_blocks
from kfac_dist.curvature.capture import Capture
from kfac_dist.curvature.solvers import Solver
from kfac_dist.data.create import describe_dataset
from kfac_dist.models import create_model
from kfac_dist.optim.buffers import StageBuffers, all_factor_keys
from kfac_dist.planning.profile import Profile, create_profile
from kfac_dist.planning.simulate import Simulation
from kfac_dist.training.precision import Precision, configure_backends

_SECONDS = 0.3  # of a figure, at least
_PRODUCT_ROWS = 1 << 14
_PRODUCT_SIZES = {"cpu": (16, 32, 64, 128, 512), "cuda": (64, 256, 1024, 4096)}
_MATRIX_SIZES = {"cpu": (64, 144, 288, 576, 1152), "cuda": (256, 1024, 4096)}
_COPIED_VALUES = {"cpu": 1 << 23, "cuda": 1 << 28}
_MESSAGE_VALUES = {"cpu": (1 << 18, 1 << 21), "cuda": (1 << 22, 1 << 26)}


def measure_profile(config: Config, communicator: Communicator, device: torch.device) -> Profile:
    """Measure; collective.

    Args:
        config: Its network, slot and precision are those of the forward and backward that are measured.
        communicator: The ranks.
        device: Of this rank.

    Raises:
        InputError: If the network and the data do not go together.
    """
    clock = Clock(communicator, device)
    memory = clock.bytes_per_second()
    settings: dict[str, object] = {
        "description": f"measured on {communicator.size} ranks, {communicator.local_size} on a host",
        "device": device.type,
        "devices_per_node": communicator.local_size,
        "num_nodes": 1 if communicator.size == communicator.local_size else None,
        "launch_seconds": clock.launch_seconds(),
        "half": clock.product_rate(torch.bfloat16),
        "single": clock.product_rate(torch.float32),
        "factorise": clock.factorisation_rate(),
        "solve": clock.solve_rate(),
        "memory": {
            "gibibytes": _memory_bytes(device) / 2**30 / (1 if device.type == "cuda" else communicator.local_size),
            "gigabytes_per_second": memory / 1e9,
            "efficiency": 1.0,
            "source": "measured: a copy",
        },
        "network": clock.network(memory),
        "training": {"ratio": 1.0, "source": "not measured yet"},
        "factors": {"ratio": 1.0, "source": "not measured yet"},
    }
    rates = create_profile(settings, "--measure")
    return rates.model_copy(update=_calibrations(config, rates, clock))


def _calibrations(config: Config, rates: Profile, clock: "Clock") -> dict[str, object]:
    """Forward and backward, and the factors, of the configuration's slot against the rates."""
    training, factors = clock.slot_seconds(config)
    simulation = Simulation(config, rates)
    slot = simulation.slot(config.batch.per_rank)
    expected = rates.seconds([*slot.forward, *slot.backward], simulation.training_bytes)
    source = f"measured: {config.model.name}, {config.batch.per_rank} images, {config.train.precision}"
    found: dict[str, object] = {
        "training": rates.training.model_copy(update={"ratio": training / expected, "source": source})
    }
    operations = [operation for of_matrix in slot.factors.values() for operation in of_matrix]
    if operations:
        if config.kfac is not None and config.kfac.sample_fraction < 1:  # one ratio serves A, G and F, which takes all
            source += f", sample_fraction {config.kfac.sample_fraction:g}"
        if factors > 0:
            ratio = factors / rates.seconds(operations, simulation.factor_bytes)
        else:  # other programs slowed the forward and backward without factors down
            ratio, source = training / expected, f"{source}: less than the noise, and taken from forward and backward"
        found["factors"] = rates.factors.model_copy(update={"ratio": ratio, "source": source})
    return found


@dataclass(frozen=True)
class Clock:
    """Seconds of calls that all ranks make at once.

    Attributes:
        communicator: The ranks.
        device: Of this rank.
    """

    communicator: Communicator
    device: torch.device

    def seconds(self, function: Callable[[], object]) -> float:
        """Median of several calls, the mean over the ranks; collective."""
        function()
        start = time.perf_counter()
        self._wait(function)
        # The same number of calls on every rank, since they may be collectives.
        once = self._mean(time.perf_counter() - start)
        calls = min(200, max(5, math.ceil(_SECONDS / max(once, 1e-9))))
        inner = max(1, round(1e-3 / max(once, 1e-9)))  # a clock and a wait cost something, too
        taken = []
        for _ in range(min(calls, 30) if inner > 1 else calls):
            start = time.perf_counter()
            self._wait(function, inner)
            taken.append((time.perf_counter() - start) / inner)
        return self._mean(statistics.median(taken))

    def bytes_per_second(self) -> float:
        """Of memory, reading and writing together."""
        source = torch.zeros(_COPIED_VALUES[self.device.type], device=self.device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / self.seconds(lambda: target.copy_(source))

    def launch_seconds(self) -> float:
        """Of an operation that does nothing."""
        value = torch.zeros(1, device=self.device)
        return self.seconds(lambda: [value.add_(1.0) for _ in range(100)]) / 100

    def product_rate(self, dtype: torch.dtype) -> dict[str, object]:
        """Of products as factors are made of."""
        seconds = {}
        sizes = _PRODUCT_SIZES[self.device.type]
        for size in sizes:
            rows = torch.randn(_PRODUCT_ROWS, size, device=self.device).to(dtype)
            seconds[size] = self.seconds(lambda rows=rows: rows.T @ rows) / (2 * size**2 * _PRODUCT_ROWS)  # type: ignore[misc]
        per_flop, slope = _fit([1.0 / size for size in sizes], list(seconds.values()))
        return {
            "teraflops": 1e-12 / per_flop,
            "efficiency": 1.0,
            "half_size": slope / per_flop,
            "source": f"measured: n x {_PRODUCT_ROWS} x n for n in {', '.join(map(str, sizes))}",
        }

    def factorisation_rate(self) -> dict[str, object]:
        """Of Cholesky factorisations."""

        def prepare(matrix: Tensor) -> Callable[[], object]:
            return lambda: torch.linalg.cholesky_ex(matrix)

        return self._matrix_rate(prepare, lambda size: size**3 / 3, "Cholesky")

    def solve_rate(self) -> dict[str, object]:
        """Of solves with a Cholesky factor, for a quarter as many columns as rows."""

        def prepare(matrix: Tensor) -> Callable[[], object]:
            solver, left = Solver.restored(matrix, is_inverse=False), matrix[:, : matrix.shape[-1] // 4]
            return lambda: solver.solve_right(left)

        return self._matrix_rate(prepare, lambda size: size**3 / 2, "solves for n/4 columns")

    def _matrix_rate(
        self, prepare: Callable[[Tensor], Callable[[], object]], flops: Callable[[int], float], what: str
    ) -> dict[str, object]:
        """Of what `prepare` makes of a matrix, whose layout is brought about once and not in each call."""
        sizes, seconds = _MATRIX_SIZES[self.device.type], []
        for size in sizes:
            matrix = torch.eye(size, device=self.device)[None].add(0.1 / size)
            seconds.append(self.seconds(prepare(matrix)) / flops(size))
        per_flop, slope = _fit([size / flops(size) for size in sizes], seconds)
        return {
            "teraflops": 1e-12 / per_flop,
            "efficiency": 1.0,
            "row_seconds": slope,
            "source": f"measured: {what}, n in {', '.join(map(str, sizes))}",
        }

    def network(self, memory_bytes_per_second: float) -> dict[str, object]:
        """Latency and bandwidth over all ranks; assumed where there is one."""
        size = self.communicator.size
        if size == 1:
            link: dict[str, object] = {
                "latency_seconds": 1e-5,
                "gigabytes_per_second": memory_bytes_per_second / 4e9,
                "efficiency": 1.0,
                "source": "assumed, of one rank: a quarter of its memory's bandwidth; measure under mpirun",
            }
            return {"intra_node": link, "inter_node": link}
        flag = torch.zeros(1, device=self.device)
        steps = 2 * math.ceil(math.log2(size))
        latency = self.seconds(lambda: self.communicator.all_reduce_(flag)) / steps
        small, large = (self._collective_seconds(numel) for numel in _MESSAGE_VALUES[self.device.type])
        first, second = _MESSAGE_VALUES[self.device.type]
        moved = 2 * 4 * (second - first) * (size - 1) / size
        # On a busy machine the large one may take no longer than the small one; no message outruns a copy in memory.
        taken = max(large - small, 2 * moved / memory_bytes_per_second)
        one_host = size == self.communicator.local_size
        measured = {
            "latency_seconds": latency,
            "gigabytes_per_second": moved / taken / 1e9,
            "efficiency": 1.0,
            "source": f"measured: all-reduce, ReduceScatterV and AllGatherV over {size} ranks",
        }
        other = measured | ({"source": "not measured: all ranks were on one host"} if one_host else {})
        return {"intra_node": measured, "inter_node": other}

    def _collective_seconds(self, numel: int) -> float:
        """A ReduceScatterV and an AllGatherV."""
        communicator = self.communicator
        counts = [numel // communicator.size] * communicator.size
        buffer = torch.zeros(sum(counts), device=self.device)

        def both() -> None:
            communicator.reduce_scatter_v(buffer, counts)
            communicator.all_gather_v(buffer, counts)

        return self.seconds(both)

    def slot_seconds(self, config: Config) -> tuple[float, float]:
        """Forward and backward of a slot, and what factors add to it."""
        data, precision = describe_dataset(config.data), Precision(config.train.precision)
        configure_backends(config.run.deterministic)
        layout = torch.channels_last if self.device.type == "cuda" else torch.contiguous_format
        model: nn.Module = create_model(
            config.model.name, data.num_classes, data.image_shape, config.run.seed, config.model.variant,
            config.model.zero_init_last_gamma, config.model.initialization,
        )  # fmt: skip
        model = model.to(self.device, precision.weights).to(memory_format=layout).train()
        images = torch.randn(config.batch.per_rank, *data.image_shape, dtype=precision.weights)
        images = images.to(self.device, memory_format=layout)
        labels = torch.zeros(len(images), dtype=torch.int64, device=self.device)

        def train() -> None:
            model.zero_grad()
            with precision.autocast(self.device):
                loss = F.cross_entropy(model(images), labels)
            loss.backward()

        plain = self.seconds(train)
        if config.kfac is None:
            return plain, 0.0
        blocks = create_blocks(model, list(model.parameters()), config.kfac.batchnorm, config.kfac.skip)
        buffers = StageBuffers(blocks, [(0,)] * len(blocks), 1, precision.weights, self.device)
        keys = all_factor_keys(blocks)
        factors = buffers.factors(keys)
        capture = Capture()
        capture.sample_fraction = config.kfac.sample_fraction
        capture.follow(blocks)

        def train_and_capture() -> None:
            capture.begin({key: factors.part(key, 0) for key in keys})
            train()

        both = self.seconds(train_and_capture)
        capture.close()
        return plain, both - plain

    def _wait(self, function: Callable[[], object], calls: int = 1) -> None:
        for _ in range(calls):
            function()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _mean(self, seconds: float) -> float:
        return float(self.communicator.all_reduce_(torch.tensor(seconds, dtype=torch.float64), "mean"))


def _fit(places: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Non-negative c and d of c + d·x ≈ value, by least squares of relative errors; c > 0."""
    x, y = np.array(places), np.array(values)
    constant, slope = np.linalg.lstsq(np.stack([1 / y, x / y], axis=1), np.ones_like(y), rcond=None)[0].tolist()
    if slope < 0:
        return float(y.mean()), 0.0
    if constant <= 0:
        return float(y.min()), 0.0
    return constant, slope


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
