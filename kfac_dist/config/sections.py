"""What the sections of a configuration are made of: their base class and the types that several use."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, Strict


def _check_printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("must hold printable characters only")
    return text


def _check_ascending(values: tuple[float, float]) -> tuple[float, float]:
    if values[0] > values[1]:
        raise ValueError("must be [low, high] with low <= high")
    return values


# Strict(False) lets a YAML list stand for the tuple; what is in it stays strict.
Text = Annotated[str, Field(min_length=1), AfterValidator(_check_printable)]
Patterns = Annotated[tuple[Text, ...], Strict(False)]
Fraction = Annotated[float, Field(gt=0, le=1)]
FractionRange = Annotated[tuple[Fraction, Fraction], Strict(False), AfterValidator(_check_ascending)]
PositiveRange = Annotated[tuple[PositiveFloat, PositiveFloat], Strict(False), AfterValidator(_check_ascending)]
Shape = Annotated[tuple[PositiveInt, PositiveInt, PositiveInt], Strict(False)]


class Section(BaseModel):
    """A part of a configuration: frozen, strict, without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
