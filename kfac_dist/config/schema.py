"""Configuration: a YAML file and ``dotted.key=value`` overrides become one frozen, validated `Config`.

The attribute names are the YAML keys. A key has a default only where no paper states a value. All problems
of a configuration are reported at once, each as the dotted key, the rule and the value found.
"""

from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Union

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
from kfac_dist.config.schedule import ScheduleConfig
from kfac_dist.config.sections import FractionRange, KeyProblem, PathText, PositiveRange, Section, Text
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
    """The run's folder in `output_dir`; `NAME-2` and so on where there is one already."""
    output_dir: PathText = "runs"
    """Folder of the runs' folders; all ranks must see it."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of initial weights, order of the images and augmentation, whatever the number of ranks."""
    device: DeviceChoice = "auto"
    """`auto` takes a GPU where there is one."""
    deterministic: bool = False
    """Allow only kernels that give the same bits every time."""
    watchdog_minutes: PositiveFloat | None = 10.0
    """Minutes without progress after which the job is ended; null waits for ever."""


class ModelConfig(Section):
    """The network.

    `variant` says where bottleneck ResNets reduce the image: in the first 1x1 convolution of a stage (v1) or
    in its 3x3 convolution (v1.5, the default). `zero_init_last_gamma` starts each residual branch at zero.
    `initialization` draws the weights as the recipes do (HeNormal, biases zero), or leaves those that the network's own
    constructor gave (`own`); without it, only networks of installed packages keep their own. `pretrained` is a
    safetensors file of weights to begin with; a last layer of another shape begins as `initialization` says.
    """

    name: Text
    """`digits_cnn`, `resnet20` (32, 44, 56), `alexnet32`, torchvision's classifiers, installed packages' networks."""
    variant: BottleneckVariant | None = None
    """Where bottleneck ResNets reduce the image; null is v1.5."""
    zero_init_last_gamma: bool = False
    """Start each residual branch at zero."""
    initialization: Initialization | None = None
    """HeNormal weights and zero biases (`recipe`), or those of the network's own constructor (`own`)."""
    pretrained: PathText | None = None
    """Safetensors file of weights to begin with."""


class BatchConfig(Section):
    """The global batch, cut into slots of `per_rank` samples (see `batch_slots`)."""

    global_size: PositiveInt
    """Images of one iteration, over all ranks: a multiple of `per_rank` times the number of ranks."""
    per_rank: PositiveInt
    """Images of one slot, that is of one forward and backward; what does not fit at once is accumulated."""

    @field_validator("per_rank")
    @classmethod
    def _check_divides(cls, per_rank: int, info: ValidationInfo) -> int:
        global_size = info.data.get("global_size")
        if global_size is not None and global_size % per_rank:
            sizes = nearest_multiples(global_size, per_rank)
            raise ValueError(f"must divide batch.global_size = {global_size} (it divides {sizes})")
        return per_rank


class TrainConfig(Section):
    """How long to train, how often to evaluate (both in epochs), and in which precision.

    `fp16` and `bf16` compute forward, backward and the Fisher's products in half precision and keep the rest in fp32.
    An update whose loss is not finite is skipped; `max_nonfinite` of them in a row take the run back to its last
    checkpoint, with ten times the damping, at most `max_restores` times before it fails.
    """

    epochs: PositiveFloat
    """How long to train; parts of an epoch are fine."""
    evaluate_every: PositiveFloat = 1.0
    """Epochs between evaluations."""
    precision: PrecisionName = "fp32"
    """What forward, backward and the Fisher's products compute in."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of each label that is spread over all classes."""
    max_nonfinite: PositiveInt = 3
    """Updates in a row without a finite loss after which the run goes back to its last checkpoint."""
    max_restores: NonNegativeInt = 2
    """How often it does so before it fails."""


class CheckpointConfig(Section):
    """How often the run is saved, besides at its end and on a signal, and how many checkpoints stay.

    `keep` counts the newest; with `keep_best` the one of the best evaluation so far is made and stays besides.
    """

    every_minutes: PositiveFloat | None = 15.0
    """Minutes between checkpoints, by rank 0's clock."""
    every_epochs: PositiveFloat | None = None
    """Epochs between checkpoints."""
    keep: PositiveInt = 2
    """How many of the newest stay."""
    keep_best: bool = True
    """Whether the one of the best evaluation stays as well."""


class ErasingConfig(Section):
    """Random erasing: how often, and the ranges of the erased share of the area and of the aspect ratio."""

    probability: Annotated[float, Field(ge=0, le=1)]
    """That an image has a rectangle erased."""
    area: FractionRange
    """Lowest and highest share of the image's area."""
    aspect: PositiveRange
    """Lowest and highest aspect ratio; height and width are swapped at random."""


class AugmentConfig(Section):
    """Data augmentation; the defaults do nothing."""

    pad_crop: NonNegativeInt = 0
    """Pixels of padding on each side, out of which the image is cut at random."""
    flip: bool = False
    """Mirror half of the images."""
    mixup_alpha: NonNegativeFloat = 0.0
    """α of running mixup (Eq. 9 to 11); 0 does not mix."""
    erasing: ErasingConfig | None = None
    """Random erasing with zeros; null does not erase."""


class CommunicationConfig(Section):
    """How buffers travel between ranks.

    `auto` takes NCCL where each rank has a GPU of its own. `reduce_scatter` is MPI's algorithm. The precisions are
    those in which factors and gradients are on the wire; half precision halves the bytes and rounds each value once.
    """

    backend: BackendChoice = "auto"
    """NCCL, which needs a GPU for each rank, or MPI (gloo under torchrun)."""
    reduce_scatter: ReduceScatterChoice = "auto"
    """MPI's algorithm; `auto` measures them at the start."""
    factor_precision: WirePrecision = "fp32"
    """What the Fisher's matrices are sent in."""
    gradient_precision: WirePrecision = "fp32"
    """What gradients and preconditioned gradients are sent in."""


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
    """Eq. 18 after each update: always, only where the norm is above its target, or not."""
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
