"""How fast a machine is: the rates that a prediction is made with, each with its source, from a YAML file."""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Literal

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, ValidationError

from kfac_dist.config import strict_yaml
from kfac_dist.config.messages import describe
from kfac_dist.config.sections import Fraction, Section, Text
from kfac_dist.errors import InputError
from kfac_dist.planning.operations import Operation, Operations

_PROFILES = resources.files("kfac_dist.planning") / "profiles"


class ProductRate(Section):
    """Matrix products and convolutions."""

    teraflops: PositiveFloat
    """Peak, in 10^12 operations a second."""
    efficiency: Fraction
    """Share of the peak that large products reach."""
    half_size: NonNegativeFloat
    """Smallest dimension of a product that runs at half of that (Hockney's n1/2)."""
    source: Text
    """Where the figures are from."""


class FactorisationRate(Section):
    """Cholesky factorisations, or triangular solves, in fp32."""

    teraflops: PositiveFloat
    """Peak, in 10^12 operations a second."""
    efficiency: Fraction
    """Share of the peak that large matrices reach."""
    row_seconds: NonNegativeFloat
    """What each row of a matrix takes besides, as rows depend on one another."""
    source: Text
    """Where the figures are from."""


class MemoryRate(Section):
    """The memory of a device."""

    gibibytes: PositiveFloat
    """How much there is for one rank."""
    gigabytes_per_second: PositiveFloat
    """Peak of reading and writing together."""
    efficiency: Fraction
    """Share of the peak that is reached."""
    source: Text
    """Where the figures are from."""


class Link(Section):
    """What connects ranks of a node, or nodes."""

    latency_seconds: NonNegativeFloat
    """Of a message to the next rank."""
    gigabytes_per_second: PositiveFloat
    """Peak in each direction: of a rank within a node; of a whole node, all its adapters, between nodes."""
    efficiency: Fraction
    """Share of the peak that is reached."""
    source: Text
    """Where the figures are from."""

    @property
    def bytes_per_second(self) -> float:
        """What is reached."""
        return 1e9 * self.gigabytes_per_second * self.efficiency


class Network(Section):
    """Within a node and between nodes."""

    intra_node: Link
    inter_node: Link


class Calibration(Section):
    """How far a stage is from what the rates give."""

    ratio: PositiveFloat
    """Seconds that it takes, for each second that the rates give."""
    source: Text
    """Where the figure is from."""


class Profile(Section):
    """The rates of a machine.

    Attributes:
        description: What it is, in a line.
        device: What computes: a GPU, with NCCL, or a CPU, with MPI.
        devices_per_node: GPUs of a node, or shares of a CPU that a rank was measured on.
        num_nodes: Nodes that there are; null for as many as it takes. More ranks than devices share them.
        launch_seconds: What each operation takes at least.
        half: Products with inputs in fp16 or bf16 and sums in fp32.
        single: Products in fp32; fp64 is taken to be half as fast.
        factorise: Cholesky factorisations.
        solve: Solves with triangular matrices.
        memory: Of one device.
        network: Between the ranks.
        training: Forward and backward against the rates above.
        factors: Construction of the factors against them.
    """

    description: Text
    device: Literal["cuda", "cpu"]
    devices_per_node: PositiveInt
    num_nodes: PositiveInt | None = None
    launch_seconds: NonNegativeFloat
    half: ProductRate
    single: ProductRate
    factorise: FactorisationRate
    solve: FactorisationRate
    memory: MemoryRate
    network: Network
    training: Calibration
    factors: Calibration

    def seconds(self, operations: Operations, value_bytes: int) -> float:
        """Seconds that a device needs, alone: each operation is limited by arithmetic, by memory or by its launch.

        Args:
            operations: One after another.
            value_bytes: 2 for products in half precision, else 4 or 8.
        """
        return sum(self._seconds(operation, value_bytes) for operation in operations)

    def _seconds(self, operation: Operation, value_bytes: int) -> float:
        memory = 1e9 * self.memory.gigabytes_per_second * self.memory.efficiency
        moving = operation.values * value_bytes / memory
        return self.launch_seconds + max(moving, self._arithmetic_seconds(operation, value_bytes))

    def _arithmetic_seconds(self, operation: Operation, value_bytes: int) -> float:
        slowdown = 2.0 if value_bytes == 8 else 1.0
        if operation.kind == "memory":
            return 0.0
        if operation.kind == "product":
            product = self.half if value_bytes == 2 else self.single
            rate = 1e12 * product.teraflops * product.efficiency
            return slowdown * operation.flops / rate * (1.0 + product.half_size / operation.size)
        kind = self.factorise if operation.kind == "factorise" else self.solve
        in_turn = operation.matrices if self.device == "cpu" else 1
        rows = in_turn * operation.size * kind.row_seconds
        # A GPU inverts by solving for the whole identity, without use of its zeros.
        flops = operation.flops * (3.0 if operation.kind == "invert" and self.device == "cuda" else 1.0)
        return slowdown * (rows + flops / (1e12 * kind.teraflops * kind.efficiency))

    def to_yaml(self) -> str:
        """As `load_profile` reads it."""
        return strict_yaml.dump(self.model_dump(mode="json"))


def known_profiles() -> list[str]:
    """Names of the profiles that come with the package."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _PROFILES.iterdir() if entry.name.endswith(".yaml"))


def load_profile(name: str) -> Profile:
    """Read a profile.

    Args:
        name: One of `known_profiles()`, or a YAML file.

    Raises:
        InputError: If there is none, or naming every problem at once, one on a line.
    """
    if name in known_profiles():
        with resources.as_file(_PROFILES / f"{name}.yaml") as path:
            return create_profile(strict_yaml.read_mapping(path), name)
    if not Path(name).expanduser().exists():
        raise InputError(
            f"--profile must be one of {', '.join(known_profiles())}, or a file that --measure wrote, got {name!r}"
        )
    return create_profile(strict_yaml.read_mapping(Path(name).expanduser()), name)


def create_profile(settings: dict[str, object], source: str) -> Profile:
    """Validate a profile.

    Args:
        settings: As a YAML file gives them.
        source: What to call them in an error.

    Raises:
        InputError: Naming every problem at once, one on a line.
    """
    try:
        return Profile.model_validate(settings)
    except ValidationError as error:
        problems: Sequence[str] = [describe(problem, Profile) for problem in error.errors(include_url=False)]
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    raise InputError(f"{source}: {count} in this profile:\n  " + "\n  ".join(problems))
