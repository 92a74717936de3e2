"""What the schema is made of: types with their units and limits, and the section that all parts of a config are."""

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


@dataclass(frozen=True)
class Unit:
    """What a number of this type counts or measures."""

    name: str


@dataclass(frozen=True)
class Accepts:
    """What may be given, where the type and its limits do not say it in words that a user reads."""

    words: str


@dataclass(frozen=True)
class Private:
    """What is given may be secret: no message repeats it."""


PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
ProperFraction = Annotated[float, Field(gt=0, lt=1)]
FractionBelowOne = Annotated[float, Field(ge=0, lt=1)]
Location = Annotated[str, Field(min_length=1), Accepts("a folder, a file or a URL")]

Steps = Annotated[PositiveInt, Unit("steps")]
Sequences = Annotated[PositiveInt, Unit("sequences")]
Tokens = Annotated[PositiveInt, Unit("tokens")]
Documents = Annotated[PositiveInt, Unit("documents")]
Nodes = Annotated[PositiveInt, Unit("nodes")]
Ranks = Annotated[PositiveInt, Unit("ranks")]
Layers = Annotated[PositiveInt, Unit("layers")]
Heads = Annotated[PositiveInt, Unit("heads")]
Features = Annotated[PositiveInt, Unit("features")]
Checkpoints = Annotated[PositiveInt, Unit("checkpoints")]
Failures = Annotated[NonNegativeInt, Unit("failures")]
Seconds = Annotated[PositiveFloat, Unit("seconds")]
Bytes = Annotated[PositiveInt, Unit("bytes")]
Identity = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$"), Accepts("an identity, 64 hex digits")]


def _listed(value: Any) -> Any:
    # What comes out of here is judged as Python values are, to which a list is no tuple.
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


Columns = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...],
    BeforeValidator(_listed),
    Field(min_length=1),
    Accepts("a column's name, or a list of such"),
]


class Section(BaseModel):
    """A frozen part of the config; unknown keys are refused."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        protected_namespaces=(),
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        # Our messages repeat what was given, unless it may be secret; pydantic's know no difference.
        hide_input_in_errors=True,
    )
