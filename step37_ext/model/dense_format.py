"""Which format the weights beside the routed experts are kept in; no SGLang is needed to ask."""

from __future__ import annotations

import os
from typing import Literal, get_args

DenseFormat = Literal["bf16", "fp8"]
DENSE_VARIABLE = "STEP37_DENSE_WEIGHTS"
DENSE_FORMATS: tuple[DenseFormat, ...] = get_args(DenseFormat)


def dense_format() -> str:
    """What STEP37_DENSE_WEIGHTS asks for: "bf16" if nothing, or "fp8".

    Raises:
        ValueError: it asks for something else.
    """
    asked = os.environ.get(DENSE_VARIABLE) or DENSE_FORMATS[0]
    if asked not in DENSE_FORMATS:
        raise ValueError(f"{DENSE_VARIABLE} is {asked!r}, expected {' or '.join(DENSE_FORMATS)}")
    return asked


def has_to_be_named(dense: str) -> bool:
    """Whether a server or command started from here uses another format, unless told `dense`."""
    return dense != DENSE_FORMATS[0] or dense != (os.environ.get(DENSE_VARIABLE) or dense)
