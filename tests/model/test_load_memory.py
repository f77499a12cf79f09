"""What loading holds at once: never the experts of the whole model twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from harness import Worker

from step37_ext.checkpoint.make import random_checkpoint
from step37_ext.checkpoint.spec import FULL, SLIDING, TINY

# Eight layers of experts, and little beside them.
SPEC = replace(
    TINY,
    hidden_size=128,
    layer_types=(FULL, *(SLIDING,) * 8),
    dense_intermediate=128,
    experts=16,
    expert_intermediate=256,
    vision_layers=1,
)


def test_one_layer_is_held_twice_at_the_most(worker: Worker, tmp_path: Path) -> None:
    """NVFP4, the format whose layout is another one than the checkpoint's."""
    random_checkpoint(tmp_path / "nvfp4", "nvfp4", SPEC)
    memory = worker.load_memory(tmp_path / "nvfp4", "--dtype bfloat16", "interpret")
    experts = len(SPEC.moe_layers) * memory.layer
    assert memory.before > experts and memory.tensor > memory.layer / 2, "sizes that tell"
    # The kernels' form has an exponent a row beside the words: 2 % here.
    assert abs(memory.after - memory.before) < 0.02 * experts
    # The layer at hand, and a sixteenth of it in the making, in a few forms at once.
    assert memory.before < memory.peak < memory.after + 1.25 * memory.layer
