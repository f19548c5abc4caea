"""The section `data`: a union by `name`, each data set with its own keys."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, get_args

from pydantic import Field, PositiveInt, ValidationInfo, field_validator

from kfac_dist.config.entry_points import DATASETS, load_registered, takes
from kfac_dist.config.sections import Kind, PathText, Section, Shape
from kfac_dist.vocabulary import Preprocessing


class DataSet(Kind):
    """A data set. Limits take its first images (of `imagenet`: evenly over classes).

    Each kind has a `name` of one possible value. The built-in kinds are those of this module; a kind of one's own is a
    class of an installed package, which also has a method `read` (see docs/own-data-and-models.md).
    """

    not_augmented: ClassVar[Mapping[str, str]] = {}
    """Keys of `augment` that the data set does not take, and why."""

    name: str


def check_divides_side(downsample: int, side: int) -> int:
    """The number, unless images of this side cannot be shrunk by it."""
    if side % downsample:
        raise ValueError(f"must divide {side}, the side of an image")
    return downsample


class DigitsConfig(DataSet):
    """Scikit-learn's digits: 1,438 training and 359 test images of 8x8 pixels."""

    left_out: ClassVar = {"root": "the digits come with scikit-learn"}

    name: Literal["digits"]
    train_limit: PositiveInt | None = None
    """Train on the first so many images."""
    eval_limit: PositiveInt | None = None
    """Evaluate on the first so many images."""


Downsample = Annotated[int, Field(ge=1, le=8)]


class Cifar10Config(DataSet):
    """CIFAR-10, in the files of its Python version."""

    name: Literal["cifar10"]
    root: Annotated[PathText, Field(description="must name the folder that holds cifar10 (cifar-10-batches-py)")]
    """Folder that holds `cifar-10-batches-py`."""
    train_limit: PositiveInt | None = None
    """Train on the first so many images."""
    eval_limit: PositiveInt | None = None
    """Evaluate on the first so many images."""
    downsample: Downsample = 1
    """Squares of so many pixels a side become one, their mean, when images are read; must divide the images' side."""

    @field_validator("downsample")
    @classmethod
    def _check_downsample(cls, downsample: int) -> int:
        return check_divides_side(downsample, 32)


class SvhnConfig(DataSet):
    """SVHN, cropped digits."""

    name: Literal["svhn"]
    root: Annotated[
        PathText, Field(description="must name the folder that holds svhn (train_32x32.mat, test_32x32.mat)")
    ]
    """Folder that holds `train_32x32.mat` and `test_32x32.mat`."""
    train_limit: PositiveInt | None = None
    """Train on the first so many images."""
    eval_limit: PositiveInt | None = None
    """Evaluate on the first so many images."""
    downsample: Downsample = 1
    """Squares of so many pixels a side become one, their mean, when images are read; must divide the images' side."""

    @field_validator("downsample")
    @classmethod
    def _check_downsample(cls, downsample: int) -> int:
        return check_divides_side(downsample, 32)


class ImagenetConfig(DataSet):
    """ImageNet, or any tree of its layout."""

    not_augmented: ClassVar = {"pad_crop": "data.preprocessing says how images are cropped"}

    name: Literal["imagenet"]
    root: Annotated[
        PathText, Field(description="must name the folder that holds imagenet (train/<class>/*, val/<class>/*)")
    ]
    """Folder that holds `train/CLASS/*` and `val/CLASS/*`."""
    train_limit: PositiveInt | None = None
    """Train on so many images, taken evenly over the classes."""
    eval_limit: PositiveInt | None = None
    """Evaluate on so many images, taken evenly over the classes."""
    loader: Literal["dali", "torchvision"] = "torchvision"
    """Threads that decode with Pillow, or NVIDIA DALI (an extra)."""
    preprocessing: Preprocessing = "paper"
    """The paper's, or today's usual random resized crop."""
    image_size: Annotated[int, Field(ge=8)] = 224
    """Height and width of what the network gets, in pixels."""
    mean_image: Annotated[PathText | None, Field(validate_default=True)] = None
    """File that `python -m kfac_dist.data.mean_image` makes; needed for the paper's preprocessing."""
    workers: PositiveInt = 4
    """Threads of each rank that read images."""
    on_error: Literal["raise", "skip"] = "raise"
    """What a damaged image does: end the run, or be replaced and counted."""

    @field_validator("mean_image")
    @classmethod
    def _check_mean_image(cls, mean_image: str | None, info: ValidationInfo) -> str | None:
        preprocessing = info.data.get("preprocessing")
        if preprocessing == "paper" and mean_image is None:
            size = info.data.get("image_size", 224)
            raise ValueError(
                "must name the mean image that data.preprocessing=paper subtracts; make it with: "
                f"python -m kfac_dist.data.mean_image {info.data.get('root', 'DATA_ROOT')} --output FILE"
                + (f" --image-size {size}" if size != 224 else "")
            )
        if preprocessing == "random_resized_crop" and mean_image is not None:
            raise ValueError("must be left out: it belongs to data.name=imagenet with data.preprocessing=paper")
        return mean_image


class SyntheticImages(Section):
    """How many images of which shape, (channels, height, width), are made up."""

    shape: Shape
    """Channels, height and width."""
    num_classes: PositiveInt
    """Number of classes."""
    num_train: PositiveInt
    """Number of training images."""
    num_eval: PositiveInt
    """Number of evaluation images."""


class SyntheticConfig(DataSet):
    """Images that are made up, to measure a step without input."""

    left_out: ClassVar = {
        "root": "its images are made up",
        "train_limit": "data.synthetic.num_train says it",
        "eval_limit": "data.synthetic.num_eval says it",
    }
    not_augmented: ClassVar = dict.fromkeys(("pad_crop", "flip"), "images that are made up are not augmented")

    name: Literal["synthetic"]
    synthetic: Annotated[
        SyntheticImages,
        Field(description="must be given for data.name synthetic: shape, num_classes, num_train, num_eval"),
    ]
    """How many, and of which shape."""


BUILT_IN: tuple[type[DataSet], ...] = (DigitsConfig, Cifar10Config, SvhnConfig, ImagenetConfig, SyntheticConfig)


def name_of(kind: type[DataSet]) -> str:
    """The one value that `data.name` has for a kind; empty if its class does not say."""
    names = get_args(kind.model_fields["name"].annotation)
    return names[0] if len(names) == 1 and isinstance(names[0], str) else ""


def own_data_set(name: str) -> type[DataSet] | None:
    """The section of a data set that an installed package registers; None where none does.

    Raises:
        InputError: If it cannot be loaded, or is not what a data set of one's own must be.
    """
    registered = load_registered(DATASETS, "data.name", name, map(name_of, BUILT_IN))
    if registered is None:
        return None
    kind = registered.value
    if not isinstance(kind, type) or not issubclass(kind, DataSet):
        raise registered.refuse("a class derived from kfac_dist.config.data.DataSet", repr(kind))
    if name_of(kind) != name:
        found = str(kind.model_fields["name"].annotation)
        raise registered.refuse(f'a class with the field name: Literal["{name}"]', found)
    if not takes(getattr(kind, "read", None), 1):
        raise registered.refuse("a class with a method read(self)", repr(getattr(kind, "read", None)))
    return kind
