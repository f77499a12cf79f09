"""The tile policy of the BF16 and FP8 kernels and of the shared expert."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from step37_kernels.experts.split_k import MOST_TILES
from step37_kernels.experts.tiles import (
    GemmTile,
    bf16,
    fp8,
    fp8_bf16,
    shared,
    shared_fp8,
)

EXPERTS, HIDDEN, TOP_K = 288, 4096, 8
Policy = Callable[[int, int, int, int, int], tuple[GemmTile, GemmTile]]
SharedPolicy = Callable[[int, int, int, int], tuple[GemmTile, GemmTile]]
POLICIES = pytest.mark.parametrize(
    ("policy", "weight_bytes", "token_bytes"), [(bf16, 2, 2), (fp8, 1, 1), (fp8_bf16, 1, 2)]
)
ARCHITECTURES = (80, 89, 90, 100, 120)
SHARED_MEMORY = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}  # KB a block may have
TOKENS = (1, 64, 512, 768, 1536, 8192)


@POLICIES
def test_tiles_fit_the_shapes(policy: Policy, weight_bytes: int, token_bytes: int) -> None:
    for arch in ARCHITECTURES:
        for size in (1280, 640, 320, 160):
            for tokens in TOKENS:
                up, down = policy(tokens * TOP_K, EXPERTS, size, HIDDEN, arch)
                assert up.block_rows == down.block_rows  # one sort serves both
                # No tile is half empty, no step crosses a block of scales.
                assert 2 * size % up.block_n == 0 and HIDDEN % down.block_n == 0
                assert HIDDEN % up.block_k == 0 and 128 % up.block_k == 128 % down.block_k == 0
                for tile in (up, down):
                    step = tile.block_n * weight_bytes + tile.block_rows * token_bytes
                    buffers = tile.num_stages * step * tile.block_k
                    assert buffers <= SHARED_MEMORY[arch] * 1024


@POLICIES
def test_rows_follow_the_tokens(policy: Policy, weight_bytes: int, token_bytes: int) -> None:
    rows = [policy(t * TOP_K, EXPERTS, 320, HIDDEN, 90)[0].block_rows for t in TOKENS]
    assert rows == [16, 16, 32, 32, 64, 128]
    # The same tokens on an eighth of the experts are eight times the rows of each.
    assert policy(64 * TOP_K, EXPERTS // 8, 1280, HIDDEN, 90)[0].block_rows == 32


@POLICIES
def test_a_small_grid_takes_smaller_tiles(
    policy: Policy, weight_bytes: int, token_bytes: int
) -> None:
    """One token at TP=4 has 8 blocks: 40 tiles of 128 rows would leave most SMs idle."""
    assert policy(TOP_K, EXPERTS, 320, HIDDEN, 90)[0].block_n == 64
    assert policy(64 * TOP_K, EXPERTS, 320, HIDDEN, 90)[0].block_n == 128


@pytest.mark.parametrize(("policy", "weight_bytes"), [(shared, 2), (shared_fp8, 1)])
@pytest.mark.parametrize("size", [1280, 640, 320, 160, 128, 48])
def test_the_shared_expert_is_cut_evenly_and_only_where_it_is_small(
    size: int, policy: SharedPolicy, weight_bytes: int
) -> None:
    for arch in ARCHITECTURES:
        for tokens in (0, 1, 16, 17, 64, 65, 200, 512, 513, 8192):
            up, down = policy(tokens, size, HIDDEN, arch)
            assert HIDDEN % (up.splits * up.block_k) == 0
            assert down.splits == 1 or size % (down.splits * down.block_k) == 0
            if tokens > 512:
                assert up.splits == down.splits == 1
            # The parts are no more bytes than the weights.
            assert up.splits == 1 or 8 * up.splits * tokens <= HIDDEN * weight_bytes
            assert -(-2 * size // up.block_n) * -(-tokens // up.block_rows) <= MOST_TILES or (
                up.splits == 1
            )
    for tokens in (1, 64, 256):  # as many programs as half the SMs at the least, where K allows it
        up, down = policy(tokens, size, HIDDEN, 90)
        blocks = -(-tokens // up.block_rows)
        most = 8 * tokens * 2 * up.splits > HIDDEN * weight_bytes
        assert 2 * size // 64 * up.splits * blocks >= 66 or up.splits == 8 or most
        if size % 128 == 0:
            assert HIDDEN // down.block_n * down.splits * blocks >= 64


def test_unknown_sizes_still_get_a_tile() -> None:
    assert bf16(2, 1, 48, 272, 90)[1].block_k == 32
    assert shared(3, 48, 272, 90)[0].splits == 1
