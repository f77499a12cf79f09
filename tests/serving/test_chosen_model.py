"""Which model class and config a start chooses, with remote code and without."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import preloaded

from step37_ext.checkpoint.weight_format import WeightFormat
from step37_ext.local_server import PLATFORM


def test_the_model_does_not_depend_on_remote_code(
    tiny: Callable[[WeightFormat], Path], with_auto_map: Path
) -> None:
    """What SGLang would start, in a process that goes no further than choosing the model class."""
    script = Path(__file__).with_name("chosen_model.py")
    output = preloaded.output(script, tiny("bf16"), with_auto_map, **PLATFORM)
    chosen = json.loads(output.splitlines()[-1])
    assert len(chosen) == 4
    assert chosen[0]["model"] == "step37_ext.model.multimodal.Step37ForConditionalGeneration"
    assert all(one == chosen[0] for one in chosen)
