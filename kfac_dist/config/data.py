"""The section `data`: which keys belong to which data set."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, ValidationInfo, field_validator

from kfac_dist.config.sections import Section, Shape, Text


class SyntheticConfig(Section):
    """The data set `synthetic`: how many images of which shape, (channels, height, width)."""

    shape: Shape
    num_classes: PositiveInt
    num_train: PositiveInt
    num_eval: PositiveInt


# Keys of one data set only, and what they are there when left out.
_IMAGENET_DEFAULTS = {
    "loader": "torchvision",
    "preprocessing": "paper",
    "image_size": 224,
    "workers": 4,
    "on_error": "raise",
}


class DataConfig(Section):
    """The data set, and how much of it; a limit takes the first images (of `imagenet`: evenly over classes).

    From `loader` on, keys belong to `imagenet` (any tree of its layout) and are null for others.
    """

    name: Literal["digits", "cifar10", "svhn", "imagenet", "synthetic"]
    root: Annotated[Text | None, Field(validate_default=True)] = None
    train_limit: PositiveInt | None = None
    eval_limit: PositiveInt | None = None
    synthetic: Annotated[SyntheticConfig | None, Field(validate_default=True)] = None
    loader: Annotated[Literal["dali", "torchvision"] | None, Field(validate_default=True)] = None
    preprocessing: Annotated[Literal["paper", "random_resized_crop"] | None, Field(validate_default=True)] = None
    mean_image: Annotated[Text | None, Field(validate_default=True)] = None
    image_size: Annotated[Annotated[int, Field(ge=8)] | None, Field(validate_default=True)] = None
    workers: Annotated[PositiveInt | None, Field(validate_default=True)] = None
    on_error: Annotated[Literal["raise", "skip"] | None, Field(validate_default=True)] = None

    @field_validator("root")
    @classmethod
    def _check_root(cls, root: str | None, info: ValidationInfo) -> str | None:
        name = info.data.get("name")
        if name in ("cifar10", "svhn", "imagenet") and root is None:
            raise ValueError(f"must name the folder that holds {name}")
        if name == "digits" and root is not None:
            raise ValueError("must be left out for digits, which come with scikit-learn")
        if name == "synthetic" and root is not None:
            raise ValueError("must be left out for synthetic, which is made up")
        return root

    @field_validator("train_limit", "eval_limit")
    @classmethod
    def _check_limit(cls, limit: int | None, info: ValidationInfo) -> int | None:
        if limit is not None and info.data.get("name") == "synthetic":
            split = str(info.field_name).removesuffix("_limit")
            raise ValueError(f"must be left out for synthetic: data.synthetic.num_{split} says it")
        return limit

    @field_validator("synthetic")
    @classmethod
    def _check_synthetic(cls, made: SyntheticConfig | None, info: ValidationInfo) -> SyntheticConfig | None:
        name = info.data.get("name")
        if name == "synthetic" and made is None:
            raise ValueError("must be given for data.name synthetic: shape, num_classes, num_train, num_eval")
        if made is not None and name not in ("synthetic", None):
            raise ValueError(f"must be left out for {name}: it belongs to synthetic")
        return made

    @field_validator(*_IMAGENET_DEFAULTS)
    @classmethod
    def _check_imagenet(cls, value: object, info: ValidationInfo) -> object:
        name = info.data.get("name")
        if name == "imagenet" and value is None:
            return _IMAGENET_DEFAULTS[str(info.field_name)]
        if value is not None and name not in ("imagenet", None):
            raise ValueError(f"must be left out for {name}: it belongs to imagenet")
        return value

    @field_validator("mean_image")
    @classmethod
    def _check_mean_image(cls, mean_image: str | None, info: ValidationInfo) -> str | None:
        name, preprocessing = info.data.get("name"), info.data.get("preprocessing")
        if name == "imagenet" and preprocessing == "paper" and mean_image is None:
            raise ValueError(
                "must name the mean image that data.preprocessing=paper subtracts; make it with: "
                f"python -m kfac_dist.data.mean_image {info.data.get('root', 'DATA_ROOT')} --output FILE"
            )
        if mean_image is not None and preprocessing != "paper" and "preprocessing" in info.data:
            raise ValueError("must be left out: it belongs to data.name=imagenet with data.preprocessing=paper")
        return mean_image
