"""Base class and field types of every configuration section."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

# Maxima keep sizes and times that are computed from a number within 64-bit integers, floats and seconds of Python: no
# model or run comes near them, and a slip such as 1e15 is told with its field instead of by an overflow somewhere.
MOST = 10**15
PositiveInt = Annotated[int, Field(ge=1, le=MOST)]
NonNegativeInt = Annotated[int, Field(ge=0, le=MOST)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
"""Of NumPy's generator too."""
Small = Annotated[float, Field(ge=1e-30, le=1)]
"""What is added to a divisor: of float32, and no more than what it is added to."""
Weight = Annotated[float, Field(ge=0, le=1e6)]
Width = Annotated[int, Field(ge=1, le=2**20)]
WidthOrZero = Annotated[int, Field(ge=0, le=2**20)]
MOST_LOOPS = 2**16
Count = Annotated[int, Field(ge=1, le=MOST_LOOPS)]
"""Of experts, heads or loops: what a list may have an entry for."""
Rows = Annotated[int, Field(ge=1, le=2**24)]
CountOrZero = Annotated[int, Field(ge=0, le=2**16)]
Layers = Annotated[int, Field(ge=1, le=2**10)]
LayersOrZero = Annotated[int, Field(ge=0, le=2**10)]
Positions = Annotated[int, Field(ge=1, le=2 * 10**9)]
Identifiers = Annotated[int, Field(ge=1, le=2 * 10**9)]


class Section(BaseModel):
    """Base of every configuration section: frozen, strict about names and types, documented at each field."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        validate_default=True,
        protected_namespaces=(),
    )
