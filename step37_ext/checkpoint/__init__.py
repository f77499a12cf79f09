"""The small model: its sizes, dialogues and training, written as a checkpoint of the release's."""

from step37_ext.checkpoint.make import make_tiny, random_checkpoint
from step37_ext.checkpoint.spec import FOUR_KV_HEADS, GROUPS_8_12, TINY, TinySpec
from step37_ext.checkpoint.weight_format import WeightFormat

__all__ = [
    "FOUR_KV_HEADS",
    "GROUPS_8_12",
    "TINY",
    "TinySpec",
    "WeightFormat",
    "make_tiny",
    "random_checkpoint",
]
