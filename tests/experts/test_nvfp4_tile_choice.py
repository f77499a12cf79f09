"""Which tiles the NVFP4 GEMMs get, from one token to a prefill, for every shard."""

from __future__ import annotations

import pytest

from step37_kernels.experts import tiles
from step37_kernels.formats.nvfp4_tiles import padded_intermediate, w13_channels

EXPERTS, HIDDEN, TOP_K = 288, 4096, 8


@pytest.mark.parametrize("choose", [tiles.nvfp4, tiles.nvfp4_fp8])
@pytest.mark.parametrize("arch", [80, 89, 90, 100])
@pytest.mark.parametrize("size", [1280, 640, 320, 160, 96, 48])
def test_tiles_fit_the_layout_and_each_other(choose, arch: int, size: int) -> None:
    for experts in (EXPERTS, 72, 8):
        for tokens in (0, 1, 2, 16, 64, 257, 600, 1024, 8192):
            up, down = choose(tokens * TOP_K, experts, size, HIDDEN, arch)
            assert up.block_rows == down.block_rows  # one sort serves both
            assert 2 * w13_channels(size) % up.block_n == 0 and HIDDEN % up.block_k == 0
            assert HIDDEN % down.block_n == 0 and padded_intermediate(size) % down.block_k == 0


@pytest.mark.parametrize("choose", [tiles.nvfp4, tiles.nvfp4_fp8, tiles.nvfp4_nvfp4])
def test_blocks_grow_with_the_rows_of_an_expert(choose) -> None:
    rows = [choose(t * TOP_K, EXPERTS, 1280, HIDDEN, 90)[0].block_rows for t in range(1, 9000, 7)]
    assert rows == sorted(rows) and set(rows) == {16, 32, 64, 128}


def test_few_tokens_still_give_every_sm_a_tile() -> None:
    """One token at TP=4: 8 experts x 640 rows are 40 tiles of 128 and 80 of 64, on 132 SMs."""
    assert tiles.nvfp4(TOP_K, EXPERTS, 320, HIDDEN, 90)[0].block_n == 64
    assert tiles.nvfp4(4 * TOP_K, EXPERTS, 320, HIDDEN, 90)[0].block_n == 128
