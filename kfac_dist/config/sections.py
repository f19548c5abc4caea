"""What the sections of a configuration are made of: their base classes and the types that several use."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, Strict, model_validator

from kfac_dist.errors import InputError


class KeyProblem(InputError):
    """A rule between several keys of a section, and the key that breaks it.

    Args:
        key: Dotted, from the section on whose field the validator stands, such as ``augment.pad_crop``.
        rule: What must hold, to be read after the key, such as ``must be left out``.
        value: What was found.
    """

    def __init__(self, key: str, rule: str, value: object) -> None:
        super().__init__(f"{key} {rule}, got {value!r}")
        self.key, self.rule, self.value = key, rule, value


def _check_printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("must hold printable characters only")
    return text


def _check_home(path: str) -> str:
    try:
        Path(path).expanduser()
    except RuntimeError:
        raise ValueError("must not start with the home folder of a user whom this machine does not know") from None
    return path


def _check_ascending(values: tuple[float, float]) -> tuple[float, float]:
    if values[0] > values[1]:
        raise ValueError("must be [low, high] with low <= high")
    return values


# Strict(False) lets a YAML list stand for the tuple; what is in it stays strict.
Text = Annotated[str, Field(min_length=1), AfterValidator(_check_printable)]
PathText = Annotated[Text, AfterValidator(_check_home)]  # as it was written: whoever opens it expands ~
Patterns = Annotated[tuple[Text, ...], Strict(False)]
Fraction = Annotated[float, Field(gt=0, le=1)]
FractionRange = Annotated[tuple[Fraction, Fraction], Strict(False), AfterValidator(_check_ascending)]
PositiveRange = Annotated[tuple[PositiveFloat, PositiveFloat], Strict(False), AfterValidator(_check_ascending)]
Shape = Annotated[tuple[PositiveInt, PositiveInt, PositiveInt], Strict(False)]


class Section(BaseModel):
    """A part of a configuration: frozen, strict, without unknown keys.

    The description of a required field is what the error says where it is missing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Kind(Section):
    """One of several kinds of a section, told apart by one key; all kinds of a section derive directly from one class.

    A key of another kind may be null, which leaves it out: so ``data.root=null`` takes back what a file says.
    """

    left_out: ClassVar[Mapping[str, str]] = {}
    """Why a key of other kinds is out of place here, where there is more to say than to whom it belongs."""

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nulls(cls, given: object) -> object:
        if not isinstance(given, dict):
            return given
        family = next(parent for parent in cls.__mro__ if Kind in parent.__bases__)
        kinds: Sequence[type[BaseModel]] = family.__subclasses__()
        others = {key for kind in kinds for key in kind.model_fields} - set(cls.model_fields)
        return {key: value for key, value in given.items() if value is not None or key not in others}
