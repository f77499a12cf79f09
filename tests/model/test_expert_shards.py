"""Shards of the routed experts: exactly the checkpoint's values, wherever they begin."""

import pytest
import torch
from expert_shards import EXPERTS, INTERMEDIATE, rank_experts


@pytest.mark.parametrize("weight_format", ["bf16", "fp8", "nvfp4"])
@pytest.mark.parametrize("tp_size", [2, 4, 8])
def test_shards_are_slices_of_the_whole(weight_format, tp_size):
    whole = rank_experts(weight_format).weights
    rows = INTERMEDIATE // tp_size
    for rank in range(tp_size):
        part = rank_experts(weight_format, tp_rank=rank, tp_size=tp_size).weights
        here = slice(rank * rows, (rank + 1) * rows)
        for expert in (0, EXPERTS - 1):
            for matrix in ("gate", "up"):
                expected = getattr(whole, matrix)(expert, torch.float32)[here]
                assert torch.equal(getattr(part, matrix)(expert, torch.float32), expected)
            expected = whole.down(expert, torch.float32)[:, here]
            assert torch.equal(part.down(expert, torch.float32), expected)


def test_fp8_shards_begin_inside_blocks():
    """The case that stock SGLang refuses is among those above."""
    offsets = [
        rank_experts("fp8", tp_rank=rank, tp_size=4).weights.intermediate_offset
        for rank in range(4)
    ]
    assert offsets == [0, 96, 64, 32]
