"""Configuration: a YAML file and ``dotted.key=value`` overrides become one frozen, validated `Config`.

The attribute names are the YAML keys. A key has a default only where no paper states a value. All problems
of a configuration are reported at once, each as the dotted key, the rule and the value found.
"""

from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    create_model,
    field_validator,
)

from kfac_dist.config import strict_yaml
from kfac_dist.config.data import BUILT_IN, DataSet
from kfac_dist.config.kfac import KfacConfig
from kfac_dist.config.optimizer import OptimizerConfig
from kfac_dist.config.sections import FractionRange, KeyProblem, Kind, PathText, PositiveRange, Section, Text
from kfac_dist.vocabulary import (
    BackendChoice,
    BottleneckVariant,
    DeviceChoice,
    Initialization,
    PrecisionName,
    ReduceScatterChoice,
    WeightRescaling,
    WirePrecision,
)


class RunConfig(Section):
    """What the run is called, where it writes, where it computes, and the seed of all its randomness.

    `deterministic` allows only kernels that give the same bits every time, at some cost on a GPU. After
    `watchdog_minutes` without progress every rank writes where it is, and the job ends; null waits for ever.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")]
    output_dir: PathText = "runs"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    device: DeviceChoice = "auto"
    deterministic: bool = False
    watchdog_minutes: PositiveFloat | None = 10.0


class ModelConfig(Section):
    """The network.

    `variant` says where bottleneck ResNets reduce the image: in the first 1x1 convolution of a stage (v1) or
    in its 3x3 convolution (v1.5, the default). `zero_init_last_gamma` starts each residual branch at zero.
    `initialization` draws the weights as the recipes do (HeNormal, biases zero), or leaves those that the network's own
    constructor gave (`own`); without it, only networks of installed packages keep their own. `pretrained` is a
    safetensors file of weights to begin with; a last layer of another shape begins as `initialization` says.
    """

    name: Text
    variant: BottleneckVariant | None = None
    zero_init_last_gamma: bool = False
    initialization: Initialization | None = None
    pretrained: PathText | None = None


class BatchConfig(Section):
    """The global batch, cut into slots of `per_rank` samples (see `batch_slots`)."""

    global_size: PositiveInt
    per_rank: PositiveInt

    @field_validator("per_rank")
    @classmethod
    def _check_divides(cls, per_rank: int, info: ValidationInfo) -> int:
        global_size = info.data.get("global_size")
        if global_size is not None and global_size % per_rank:
            sizes = nearest_multiples(global_size, per_rank)
            raise ValueError(f"must divide batch.global_size = {global_size} (nearest that work: {sizes})")
        return per_rank


class TrainConfig(Section):
    """How long to train, how often to evaluate (both in epochs), and in which precision.

    `fp16` and `bf16` compute forward, backward and the Fisher's products in half precision and keep the rest in fp32.
    An update whose loss is not finite is skipped; `max_nonfinite` of them in a row take the run back to its last
    checkpoint, with ten times the damping, at most `max_restores` times before it fails.
    """

    epochs: PositiveFloat
    evaluate_every: PositiveFloat = 1.0
    precision: PrecisionName = "fp32"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    max_nonfinite: PositiveInt = 3
    max_restores: NonNegativeInt = 2


class CheckpointConfig(Section):
    """How often the run is saved, besides at its end and on a signal, and how many checkpoints stay.

    `keep` counts the newest; with `keep_best` the one of the best evaluation so far is made and stays besides.
    """

    every_minutes: PositiveFloat | None = 15.0
    every_epochs: PositiveFloat | None = None
    keep: PositiveInt = 2
    keep_best: bool = True


class Schedule(Kind):
    """The learning rate over the epochs."""


class PolynomialSchedule(Schedule):
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


class CosineSchedule(Schedule):
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


class OneCycleSchedule(Schedule):
    """A triangle: from 1/25 of the learning rate linearly up to it, then linearly down to zero at `end_epoch`.

    `rising` is the share of the epochs up to `end_epoch` in which it rises. (1/25 is where torch's OneCycleLR starts.)
    """

    kind: Literal["one_cycle"]
    end_epoch: PositiveFloat
    rising: Annotated[float, Field(gt=0, lt=1)] = 0.25


class ConstantSchedule(Schedule):
    """The initial learning rate throughout."""

    kind: Literal["constant"]
    warmup_epochs: NonNegativeFloat = 0.0


ScheduleConfig = Annotated[
    PolynomialSchedule | CosineSchedule | OneCycleSchedule | ConstantSchedule, Field(discriminator="kind")
]


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

    backend: BackendChoice = "auto"
    reduce_scatter: ReduceScatterChoice = "auto"
    factor_precision: WirePrecision = "fp32"
    gradient_precision: WirePrecision = "fp32"


if TYPE_CHECKING:
    DataConfig = DataSet
else:
    DataConfig = Annotated[Union[(*BUILT_IN,)], Field(discriminator="name")]


class Config(Section):
    """A whole, valid configuration of a run."""

    run: RunConfig
    data: DataConfig
    model: ModelConfig
    batch: BatchConfig
    train: TrainConfig
    optimizer: OptimizerConfig
    kfac: Annotated[KfacConfig | None, Field(validate_default=True)] = None
    schedule: ScheduleConfig
    augment: AugmentConfig = AugmentConfig()
    weight_rescaling: WeightRescaling = "off"
    communication: CommunicationConfig = CommunicationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @field_validator("augment")
    @classmethod
    def _check_augment(cls, augment: AugmentConfig, info: ValidationInfo) -> AugmentConfig:
        data: DataConfig | None = info.data.get("data")
        if data is None:
            return augment
        for key, reason in data.not_augmented.items():
            value = getattr(augment, key)
            if value:
                raise KeyProblem(f"augment.{key}", f"must be left out when data.name is {data.name}: {reason}", value)
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
        return strict_yaml.dump(self.model_dump(mode="json", exclude={"data": {"root", "mean_image"}}))

    def to_yaml(self) -> str:
        """The whole configuration, defaults included, as YAML that `load_config` reads back as the same."""
        return strict_yaml.dump(self.model_dump(mode="json"))


@cache
def config_with(own: type[DataSet]) -> type[Config]:
    """The configuration whose section `data` may also be of a kind that is not built in."""
    kinds: Any = Union[(*BUILT_IN, own)]
    return create_model("Config", __base__=Config, data=(kinds, Field(discriminator="name")))


def nearest_multiples(size: int, unit: int) -> str:
    """The multiples of `unit` on either side of `size`, for a message."""
    below = size // unit * unit
    return f"{below} and {below + unit}" if below else f"{unit}"
