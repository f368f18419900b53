"""Base class and field types of every configuration section."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

# The upper bounds are far above any real model or run. They keep sizes and times computed from these numbers within
# 64-bit integers and floats, so that a slip such as 1e15 is reported with its field instead of as an overflow later.
MOST = 10**15
PositiveInt = Annotated[int, Field(ge=1, le=MOST)]
NonNegativeInt = Annotated[int, Field(ge=0, le=MOST)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
"""The range of NumPy's seeds."""
Small = Annotated[float, Field(ge=1e-30, le=1)]
"""An epsilon added to a divisor: above float32's smallest normal number (1e-38) with room to spare."""
Weight = Annotated[float, Field(ge=0, le=1e6)]
Width = Annotated[int, Field(ge=1, le=2**20)]
WidthOrZero = Annotated[int, Field(ge=0, le=2**20)]
MOST_LOOPS = 2**16
Count = Annotated[int, Field(ge=1, le=MOST_LOOPS)]
"""Number of experts, heads or loops: small enough for a list with an entry for each."""
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
