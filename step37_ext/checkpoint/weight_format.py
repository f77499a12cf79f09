"""The number formats in which a checkpoint is written."""

from typing import Literal

WeightFormat = Literal["bf16", "fp8", "nvfp4"]
