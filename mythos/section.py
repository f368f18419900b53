"""Base class and field types of every configuration section."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

# Upper bounds keep sizes and times computed from a field within 64-bit integers, floats and Python's datetime. They are
# far above any real model or run. With them a slip such as 1e15 is reported with its field, not as an overflow later.
MOST = 10**15
PositiveInt = Annotated[int, Field(ge=1, le=MOST)]
NonNegativeInt = Annotated[int, Field(ge=0, le=MOST)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
"""The range that NumPy's generators accept."""
Small = Annotated[float, Field(ge=1e-30, le=1)]
"""A term added to a divisor: representable in float32."""
Weight = Annotated[float, Field(ge=0, le=1e6)]
Width = Annotated[int, Field(ge=1, le=2**20)]
WidthOrZero = Annotated[int, Field(ge=0, le=2**20)]
MOST_LOOPS = 2**16
Count = Annotated[int, Field(ge=1, le=MOST_LOOPS)]
"""A number of experts, heads or loops, small enough for a list with an entry for each."""
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
