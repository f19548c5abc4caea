"""Configuration: a YAML file and ``dotted.key=value`` overrides become one frozen, validated `Config`.

The attribute names are the YAML keys. A key has a default only where no paper states a value. All problems
of a configuration are reported at once, each as the dotted key, the rule and the value found.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from kfac_dist import strict_yaml
from kfac_dist.config_base import FractionRange, PositiveRange, Section, Text
from kfac_dist.config_data import DataConfig
from kfac_dist.config_kfac import KfacConfig
from kfac_dist.config_problems import describe
from kfac_dist.errors import InputError


class RunConfig(Section):
    """What the run is called, where it writes, where it computes, and the seed of all its randomness.

    `deterministic` allows only kernels that give the same bits every time, at some cost on a GPU.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")]
    output_dir: Text = "runs"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deterministic: bool = False


class ModelConfig(Section):
    """The network.

    `variant` says where bottleneck ResNets reduce the image: in the first 1x1 convolution of a stage (v1) or
    in its 3x3 convolution (v1.5, the default). `zero_init_last_gamma` starts each residual branch at zero.
    """

    name: Text
    variant: Literal["v1", "v1.5"] | None = None
    zero_init_last_gamma: bool = False


class BatchConfig(Section):
    """The global batch, cut into slots of `per_rank` samples (see `batch_slots`)."""

    global_size: PositiveInt
    per_rank: PositiveInt

    @field_validator("per_rank")
    @classmethod
    def _check_divides(cls, per_rank: int, info: ValidationInfo) -> int:
        global_size = info.data.get("global_size")
        if global_size is not None and global_size % per_rank:
            sizes = _nearest_multiples(global_size, per_rank)
            raise ValueError(f"must divide batch.global_size = {global_size} (nearest that work: {sizes})")
        return per_rank


class TrainConfig(Section):
    """How long to train, how often to evaluate (both in epochs), and in which precision.

    `fp16` and `bf16` compute forward, backward and the Fisher's products in half precision and keep the rest in fp32.
    """

    epochs: PositiveFloat
    evaluate_every: PositiveFloat = 1.0
    precision: Literal["fp32", "fp64", "fp16", "bf16"] = "fp32"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0


class OptimizerConfig(Section):
    """The optimizer and its initial learning rate and momentum."""

    name: Literal["kfac", "sgd"]
    learning_rate: PositiveFloat
    momentum: Annotated[float, Field(ge=0, lt=1)]
    weight_decay: NonNegativeFloat = 0.0


class PolynomialSchedule(Section):
    """Eq. 15: constant up to `start_epoch`, then a polynomial that is zero at `end_epoch`."""

    kind: Literal["polynomial"]
    power: PositiveFloat
    start_epoch: NonNegativeFloat
    end_epoch: PositiveFloat
    warmup_epochs: NonNegativeFloat = 0.0

    @field_validator("end_epoch")
    @classmethod
    def _check_end(cls, end_epoch: float, info: ValidationInfo) -> float:
        start_epoch = info.data.get("start_epoch")
        if start_epoch is not None and end_epoch <= start_epoch:
            raise ValueError(f"must be > schedule.start_epoch = {start_epoch}")
        return end_epoch


class CosineSchedule(Section):
    """Half a cosine that is zero at `end_epoch`."""

    kind: Literal["cosine"]
    end_epoch: PositiveFloat
    warmup_epochs: NonNegativeFloat = 0.0

    @field_validator("warmup_epochs")
    @classmethod
    def _check_warmup(cls, warmup_epochs: float, info: ValidationInfo) -> float:
        end_epoch = info.data.get("end_epoch")
        if end_epoch is not None and warmup_epochs >= end_epoch:
            raise ValueError(f"must be < schedule.end_epoch = {end_epoch}")
        return warmup_epochs


class ConstantSchedule(Section):
    """The initial learning rate throughout."""

    kind: Literal["constant"]
    warmup_epochs: NonNegativeFloat = 0.0


class ErasingConfig(Section):
    """Random erasing: how often, and the ranges of the erased share of the area and of the aspect ratio."""

    probability: Annotated[float, Field(ge=0, le=1)]
    area: FractionRange
    aspect: PositiveRange


class AugmentConfig(Section):
    """Data augmentation; the defaults do nothing."""

    pad_crop: NonNegativeInt = 0
    flip: bool = False
    mixup_alpha: NonNegativeFloat = 0.0
    erasing: ErasingConfig | None = None


class CommunicationConfig(Section):
    """How buffers travel between ranks.

    `auto` takes NCCL where each rank has a GPU of its own. `reduce_scatter` is MPI's algorithm. The precisions are
    those in which factors and gradients are on the wire; half precision halves the bytes and rounds each value once.
    """

    backend: Literal["auto", "mpi", "nccl"] = "auto"
    reduce_scatter: Literal["auto", "native", "reduce", "ireduce"] = "auto"
    factor_precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    gradient_precision: Literal["fp32", "fp16", "bf16"] = "fp32"


class Config(Section):
    """A whole, valid configuration of a run."""

    run: RunConfig
    data: DataConfig
    model: ModelConfig
    batch: BatchConfig
    train: TrainConfig
    optimizer: OptimizerConfig
    kfac: Annotated[KfacConfig | None, Field(validate_default=True)] = None
    schedule: Annotated[PolynomialSchedule | CosineSchedule | ConstantSchedule, Field(discriminator="kind")]
    augment: AugmentConfig = AugmentConfig()
    weight_rescaling: Literal["always", "cap", "off"] = "off"
    communication: CommunicationConfig = CommunicationConfig()

    @field_validator("augment")
    @classmethod
    def _check_augment(cls, augment: AugmentConfig, info: ValidationInfo) -> AugmentConfig:
        data = info.data.get("data")
        if data is not None and data.name == "imagenet" and augment.pad_crop:
            raise ValueError("must be without pad_crop for imagenet: data.preprocessing says how it is cropped")
        if data is not None and data.name == "synthetic" and (augment.pad_crop or augment.flip):
            raise ValueError("must be without pad_crop and flip for synthetic, which is not augmented")
        return augment

    @field_validator("kfac")
    @classmethod
    def _check_kfac(cls, kfac: KfacConfig | None, info: ValidationInfo) -> KfacConfig | None:
        optimizer = info.data.get("optimizer")
        if optimizer is not None and optimizer.name == "kfac" and kfac is None:
            raise ValueError("must be given when optimizer.name is kfac")
        if optimizer is not None and optimizer.name != "kfac" and kfac is not None:
            raise ValueError(f"must be left out (kfac=null) when optimizer.name is {optimizer.name}")
        return kfac

    def shared_yaml(self) -> str:
        """What all ranks must have alike: everything but the places of the data, which may differ between nodes."""
        data = self.data.model_copy(update={"root": None, "mean_image": None})
        return self.model_copy(update={"data": data}).to_yaml()

    def to_yaml(self) -> str:
        """The whole configuration, defaults included, as YAML that `load_config` reads back as the same."""
        return strict_yaml.dump(self.model_dump(mode="json"))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration file, apply overrides in order, and validate the result.

    Args:
        path: YAML file.
        overrides: ``dotted.key=value`` each, the value in YAML; absent sections are made.

    Returns:
        The validated configuration.

    Raises:
        InputError: If the file cannot be read, or naming every other problem at once, one on a line.
    """
    settings = strict_yaml.read_mapping(Path(path))
    problems = []
    for override in overrides:
        try:
            _apply_override_(settings, override)
        except InputError as error:
            problems.append(str(error))
    try:
        config = Config.model_validate(settings)
    except ValidationError as error:
        problems += [describe(problem, Config) for problem in error.errors(include_url=False)]
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise InputError(f"{path}: {count} in this configuration:\n  " + "\n  ".join(problems))
    return config


def check_same(texts: Sequence[bytes]) -> None:
    """Refuse to start where ranks would train differently, as when a node holds another copy of the file.

    Args:
        texts: Each rank's `Config.shared_yaml`, in rank order.

    Raises:
        InputError: Naming the first rank that differs from rank 0, and the lines.
    """
    for rank, text in enumerate(texts):
        if text != texts[0]:
            first, other = texts[0].decode().splitlines(), text.decode().splitlines()
            differences = list(difflib.unified_diff(first, other, n=0, lineterm=""))[2:]  # after two lines of header
            raise InputError(
                f"all ranks must have the same configuration, but rank {rank}'s (+) differs from rank 0's (-):\n  "
                + "\n  ".join(line for line in differences if not line.startswith("@@"))
                + "\ngive every rank the same file and the same overrides"
            )


def batch_slots(config: Config, num_ranks: int) -> int:
    """How many slots (micro-batches of ``batch.per_rank`` samples) each rank takes in one iteration.

    Args:
        config: A validated configuration.
        num_ranks: World size, >= 1.

    Returns:
        Slots a rank: global_size / (per_rank * num_ranks).

    Raises:
        InputError: If that is not a whole number; names the nearest global sizes for which it is.
    """
    batch = config.batch
    unit = batch.per_rank * num_ranks
    slots, remainder = divmod(batch.global_size, unit)
    if remainder:
        raise InputError(
            f"batch.global_size must be a multiple of batch.per_rank x ranks = {batch.per_rank} x {num_ranks}"
            f" = {unit}, got {batch.global_size}; nearest sizes that work:"
            f" {_nearest_multiples(batch.global_size, unit)}"
        )
    return slots


def _nearest_multiples(size: int, unit: int) -> str:
    below = size // unit * unit
    return f"{below} and {below + unit}" if below else f"{unit}"


def _apply_override_(settings: dict[str, object], override: str) -> None:
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise InputError(f"override {override!r} must be dotted.key=value, such as train.epochs=2")
    section = settings
    for depth, key in enumerate(keys[:-1], start=1):
        inner = section.get(key)
        if inner is None:
            inner = section[key] = {}
        if not isinstance(inner, dict):
            raise InputError(f"override {override!r}: {'.'.join(keys[:depth])} is a value, not a section")
        section = inner
    section[keys[-1]] = strict_yaml.parse(text, f"override {override!r}")
