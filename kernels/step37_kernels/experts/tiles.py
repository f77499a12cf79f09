"""Which tile each grouped GEMM uses: plain Python, one function per format, with its reasons."""

from __future__ import annotations

from dataclasses import dataclass, replace

from step37_kernels.checks import ceil_div
from step37_kernels.experts.routing import most_blocks


@dataclass(frozen=True)
class GemmTile:
    """The tile of one grouped GEMM; weights are its left operand.

    Args:
        block_rows: token rows (the matrix instruction's N; 16 fill a wgmma).
        block_n: rows of the weight matrix.
        block_k: columns of the weight matrix in one trip of the loop.
        num_warps, num_stages: as Triton takes them.
        splits: into how many parts the summed dimension is cut; a routed expert's down takes 1.
    """

    block_rows: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    splits: int = 1


SM_COUNT = {80: 108, 89: 142, 90: 132, 100: 148}


def sm_count(arch: int) -> int:
    """SMs of an architecture's usual GPU, of a B200 where it is not known."""
    return SM_COUNT.get(arch, SM_COUNT[100])


def _rows_for(rows_per_expert: float) -> int:
    """block_rows that holds most experts' rows in one block, their number varying as routed.

    A second block of an expert expands its weights again, which costs more than padding while the
    memory is the bound. With Poisson's spread one expert in 10 overflows 16 rows at 12 expected,
    one in 20 overflows 32 at 24, one in 40 overflows 64 at 48. From there on the products are the
    bound, and a block as large as registers hold does least work beside them.
    """
    for expected, block_rows in ((12, 16), (24, 32), (48, 64)):
        if rows_per_expert <= expected:
            return block_rows
    return 128


def _split(tile: GemmTile, rows: int, columns: int, step: int, blocks: int, arch: int) -> GemmTile:
    """The tile of a gate-up, K cut where there are fewer than two programs for each SM.

    One program an SM gives each scheduler a single warp, which mostly waits: for its loads, then
    for what it expands. At TP=4 a token has 80 tiles, at TP=8 40. The parts, written and read in
    fp32, are 8 * splits bytes a row beside K / 2 of its weights. A part has two steps at the least,
    of `step` columns: of a single one the compiler makes loads that wait in registers.
    """
    if tile.block_rows > 16:
        return tile
    programs = ceil_div(rows, tile.block_n) * blocks
    fitting = [s for s in (1, 2, 4, 8) if s == 1 or columns % (2 * step * s) == 0]
    enough = [s for s in fitting if programs * s >= 2 * sm_count(arch)]
    return replace(tile, splits=(enough or fitting[-1:])[0])


def nvfp4(
    pairs: int, num_experts: int, intermediate_size: int, hidden_size: int, arch: int
) -> tuple[GemmTile, GemmTile]:
    """Tiles of gate-up and down for NVFP4 weights and bf16 activations.

    Args:
        pairs: T * top_k, or as many of them as this rank has on average.
        num_experts: of this rank.
        intermediate_size, hidden_size: N and K of this rank.
        arch: 90 for sm_90 and so on.
    """
    block_rows = _rows_for(pairs / num_experts)
    if not warpgroup_products(arch):
        # The expanded weights pass through shared memory there, which is smaller as well.
        block_rows = min(block_rows, 64)
    columns = -(-intermediate_size // 64) * 64
    up_rows = 2 * (-(-intermediate_size // 32) * 32)
    blocks = most_blocks(pairs, num_experts, block_rows)
    up = _nvfp4_tile(block_rows, up_rows, hidden_size, blocks, arch)
    return (
        _split(up, up_rows, hidden_size, up.block_k, blocks, arch),
        _nvfp4_tile(block_rows, hidden_size, columns, blocks, arch),
    )


def nvfp4_fp8(
    pairs: int, num_experts: int, intermediate_size: int, hidden_size: int, arch: int
) -> tuple[GemmTile, GemmTile]:
    """Tiles of gate-up and down for NVFP4 weights and FP8 activations; arguments as for `nvfp4`.

    The same tiles but at 128 rows: sums over 128 columns take registers beside the accumulator, so
    a tile of 64 columns has 128 rows of weights, its scales copied synchronously, since 256 spill;
    and tokens are half as large, so a stage more fits. It is for prefill, and does not split K.
    """
    up, down = nvfp4(pairs, num_experts, intermediate_size, hidden_size, arch)
    if up.block_rows < 128:
        return replace(up, splits=1), down
    up, down = (replace(t, block_n=min(t.block_n, 128), num_stages=4) for t in (up, down))
    return up, down


def nvfp4_nvfp4(
    pairs: int, num_experts: int, intermediate_size: int, hidden_size: int, arch: int
) -> tuple[GemmTile, GemmTile]:
    """Tiles of gate-up and down for NVFP4 weights and activations; arguments as for `nvfp4`.

    The scaled product takes 128 rows of weights, no fewer. 256 columns are 18 KB of weights and
    scales, and halve what a trip costs beside them; widths that do not divide are masked.
    """
    block_rows = _rows_for(pairs / num_experts)

    def tile(columns: int) -> GemmTile:
        block_k = next((k for k in (256, 128) if columns % k == 0), 64)
        if block_rows < 128:
            return GemmTile(block_rows, 128, block_k, num_warps=4, num_stages=4)
        # An accumulator of 128 x 128 takes 8 warps; the tokens' part of a stage is as large then.
        return GemmTile(128, 128, block_k, num_warps=8, num_stages=3 if block_k == 256 else 5)

    up, blocks = tile(hidden_size), most_blocks(pairs, num_experts, block_rows)
    up = _split(up, 2 * intermediate_size, hidden_size, up.block_k, blocks, arch)
    return up, tile(intermediate_size)


def warpgroup_products(arch: int) -> bool:
    """Whether there are wgmma or tcgen05, which take weights from where they were expanded."""
    return 90 <= arch < 120


def _nvfp4_tile(block_rows: int, rows: int, columns: int, blocks: int, arch: int) -> GemmTile:
    """The tile for a matrix of `rows` by `columns`, both multiples of 64."""
    # 128 columns where they divide: half the loop's fixed cost of a slab.
    block_k = 128 if columns % 128 == 0 else 64
    # 128 rows take 2.8 instructions a weight, 64 rows 3.3; but every SM has to have work.
    fills = rows // 128 * blocks >= sm_count(arch)
    block_n = 128 if rows % 128 == 0 and fills else 64
    if not warpgroup_products(arch):
        # Tokens are an operand in registers as well: 64 of them beside 128 x 128 weights spill.
        block_n = 64 if block_rows == 64 and block_k == 128 else block_n
        return GemmTile(block_rows, block_n, block_k, num_warps=4, num_stages=3)
    if arch >= 100 and block_k == 64:
        block_n = 64  # no Triton from 3.6 to 3.8 compiles 128 x 64 for sm_100
    if block_rows < 128:
        # stages - 2 tiles are on their way: with 16 or 32 rows 4 of 7 to 17 KB, 3 blocks an SM.
        stages = {16: 6, 32: 5, 64: 4}[block_rows]
        if arch >= 100 and block_n == 64:
            stages = min(stages, 5)  # with 6 Triton 3.6 spills where K is split
        return GemmTile(block_rows, block_n, block_k, num_warps=4, num_stages=stages)
    # An accumulator of 128 x 128 takes 8 warps. Of a 64-column tile these copy scales in units of
    # less than 4 bytes, synchronously, unless it has 256 rows.
    if block_n == 128 and block_k == 64:
        block_n = 256 if rows % 256 == 0 else 64
    return GemmTile(block_rows, block_n, block_k, 4 if block_n == 64 else 8, num_stages=3)


def bf16(
    pairs: int, num_experts: int, intermediate_size: int, hidden_size: int, arch: int
) -> tuple[GemmTile, GemmTile]:
    """Tiles of gate-up and down for bf16 weights and activations; arguments as for `nvfp4`."""
    block_rows, blocks = _dense_rows(pairs, num_experts, arch)

    def tile(rows: int, columns: int) -> GemmTile:
        # 64 columns of bf16 are one line of the swizzled shared memory; 160 are no multiple of it.
        block_k = 64 if columns % 64 == 0 else 32
        if not warpgroup_products(arch):
            return GemmTile(block_rows, 64, block_k, num_warps=4, num_stages=3)
        if block_rows == 128 and arch == 90 and rows % 256 == 0:
            # Twice the products for each byte that leaves shared memory.
            return GemmTile(128, 256, block_k, num_warps=8, num_stages=3)
        block_n = _dense_block_n(rows, blocks * (2 if block_rows == 128 else 1), arch)
        if arch >= 100 and (block_rows, block_k) == (128, 32) and rows % 128 == 0:
            block_n = 128  # the epilogue of 128 x 64 spills there
        # On sm_100 the epilogue of 128 x 128 spills with 4 warps.
        warps = 8 if arch >= 100 and (block_rows, block_n) == (128, 128) else 4
        # stages - 1 tiles are on their way, 50 KB or more even with one block on an SM.
        stages = 6 if block_n * block_k < 2**13 and block_rows <= 32 else 4
        return GemmTile(block_rows, block_n, block_k, warps, stages)

    up = tile(2 * intermediate_size, hidden_size)
    up = _split(up, 2 * intermediate_size, hidden_size, up.block_k, blocks, arch)
    return up, tile(hidden_size, intermediate_size)


def shared(
    tokens: int, intermediate_size: int, hidden_size: int, arch: int
) -> tuple[GemmTile, GemmTile]:
    """Tiles of the shared expert's gate-up and down, both of which may be split.

    Args:
        tokens: T.
        intermediate_size, hidden_size: N and K of this rank.
        arch: 90 for sm_90 and so on.
    """
    if not _few_tiles(tokens, arch):
        return bf16(tokens, 1, intermediate_size, hidden_size, arch)
    # On sm_100 adding the parts spills beside a tile of 64 columns.
    up = _shared_tile(tokens, 128 if arch >= 100 and hidden_size % 128 == 0 else 64, arch)
    return (
        _split_shared_up(up, tokens, intermediate_size, hidden_size, 2, arch),
        _shared_down(tokens, intermediate_size, hidden_size, arch),
    )


def shared_fp8(
    tokens: int, intermediate_size: int, hidden_size: int, arch: int
) -> tuple[GemmTile, GemmTile]:
    """Tiles of the shared expert with FP8 weights; arguments as for `shared`.

    Cut as with BF16 weights, but in longer steps where they divide: half the bytes, fewer
    instructions a weight.
    """
    if not _few_tiles(tokens, arch):
        up, down = bf16(tokens, 1, intermediate_size, hidden_size, arch)
        if not warpgroup_products(arch):
            return up, down
        # Weights pass through registers: 8 warps for 128 x 128, and two programs an SM, of which
        # one expands while the other multiplies.
        up, down = (
            GemmTile(128, min(t.block_n, 128), t.block_k, 8 if t.block_n >= 128 else 4, 4)
            for t in (up, down)
        )
        return up, down
    wide = hidden_size % 128 == 0 and warpgroup_products(arch) and tokens <= 64
    up = _shared_tile(tokens, 128 if wide else 64, arch)
    return (
        _split_shared_up(up, tokens, intermediate_size, hidden_size, 1, arch),
        _shared_down(tokens, intermediate_size, hidden_size, arch),
    )


def _few_tiles(tokens: int, arch: int) -> bool:
    """Whether the shared expert has fewer tiles than there are SMs, or hardly more.

    On sm_100 the epilogues of 128 x 64 spill with 4 warps and with 8.
    """
    return tokens <= (512 if arch < 100 else 64)


def _shared_tile(tokens: int, block_k: int, arch: int) -> GemmTile:
    """64 rows of weights a program, the fewest that a wgmma takes: the most programs."""
    block_rows = next((rows for rows in (16, 32, 64) if tokens <= rows), 128)
    if not warpgroup_products(arch):
        return GemmTile(min(block_rows, 64), 64, block_k, num_warps=4, num_stages=3)
    stages = 6 if block_rows <= 32 and arch < 100 else 4
    return GemmTile(block_rows, 64, block_k, num_warps=4, num_stages=stages)


def _wanted(tokens: int, arch: int) -> int:
    """Programs that a shared expert's launch should have: three for two SMs, or nearly one each."""
    sms = sm_count(arch)
    return 3 * sms // 2 if tokens <= 16 else 7 * sms // 8


def _split_shared_up(
    tile: GemmTile, tokens: int, size: int, columns: int, weight_bytes: int, arch: int
) -> GemmTile:
    """Cut K. A part is written and read again in fp32: together at most the bytes of the weights.

    A part has two steps at the least: of a single one the compiler makes loads that wait in
    registers. The program that is last reads all parts.
    """
    programs = ceil_div(2 * size, tile.block_n) * ceil_div(max(tokens, 1), tile.block_rows)
    most = columns * weight_bytes // (8 * max(tokens, 1))
    fitting = [
        s for s in (1, 2, 4, 8) if s == 1 or (s <= most and columns % (2 * tile.block_k * s) == 0)
    ]
    enough = [s for s in fitting if programs * s >= _wanted(tokens, arch)]
    return replace(tile, splits=(enough or fitting[-1:])[0])


def _shared_down(tokens: int, size: int, rows: int, arch: int) -> GemmTile:
    """Cut N. A part of the output is written and read again in fp32: 2 * splits * T * K * 4 bytes
    stay below the 6 * N * K of the weights."""
    tile = _shared_tile(tokens, 32, arch)
    programs = ceil_div(rows, tile.block_n) * ceil_div(max(tokens, 1), tile.block_rows)
    steps, uneven = divmod(size, tile.block_k)
    most = 1 if uneven else min(steps // 2, 3 * size // (4 * max(tokens, 1)))
    fitting = [s for s in range(1, max(most, 1) + 1) if s == 1 or steps % s == 0]
    enough = [s for s in fitting if programs * s >= _wanted(tokens, arch)]
    splits = (enough or fitting[-1:])[0]
    # 64 columns are a line of the swizzled shared memory, where two steps remain.
    wide = size % (64 * splits) == 0 and size // splits >= 128
    return replace(tile, block_k=64 if wide else 32, splits=splits)


def fp8(
    pairs: int, num_experts: int, intermediate_size: int, hidden_size: int, arch: int
) -> tuple[GemmTile, GemmTile]:
    """Tiles of gate-up and down for FP8 weights and activations; arguments as for `nvfp4`."""
    block_rows, blocks = _dense_rows(pairs, num_experts, arch)

    def tile(rows: int, block_k: int, is_down: bool) -> GemmTile:
        if not warpgroup_products(arch):
            return GemmTile(block_rows, 64, block_k, num_warps=4, num_stages=3)
        block_n = _dense_block_n(rows, blocks, arch)
        if block_rows <= 32:
            # stages - 1 tiles are on their way, 50 KB or more even with one block on an SM.
            return GemmTile(block_rows, block_n, block_k, 4, 6 if block_n * block_k < 2**14 else 4)
        if block_n == 64 or (arch >= 100 and block_rows == 128 and is_down):
            # On sm_100 a thread holds whole rows, and down's epilogue of 128 x 128 spills.
            return GemmTile(block_rows, 64, block_k, 4, 4 if block_rows == 64 else 3)
        if block_rows == 64:
            # The block's sum and the sum of all blocks: 128 registers of a thread with 4 warps.
            return GemmTile(64, 128, block_k, *((4, 3) if arch == 90 else (8, 4)))
        return GemmTile(128, 128, block_k, num_warps=8, num_stages=3)

    up = tile(2 * intermediate_size, 128, False)
    up = _split(up, 2 * intermediate_size, hidden_size, 128, blocks, arch)
    return up, tile(hidden_size, _down_block_k(intermediate_size), True)


def fp8_bf16(
    pairs: int, num_experts: int, intermediate_size: int, hidden_size: int, arch: int
) -> tuple[GemmTile, GemmTile]:
    """Tiles of gate-up and down for FP8 weights and bf16 activations; arguments as for `nvfp4`."""
    block_rows, blocks = _dense_rows(pairs, num_experts, arch)

    def tile(rows: int, block_k: int) -> GemmTile:
        if not warpgroup_products(arch):
            return GemmTile(block_rows, 64, 64, num_warps=4, num_stages=3)
        block_n = _dense_block_n(rows, blocks, arch)
        if block_rows <= 32:
            # Weights pass through registers, which costs a buffer: stages - 2 tiles on their way.
            return GemmTile(block_rows, block_n, block_k, 4, 6 if block_n * block_k < 2**14 else 4)
        # 4 warps would hold both sums and the widened weights in 255 registers, and spill.
        if block_n == 64:
            return GemmTile(block_rows, 64, 64, num_warps=4, num_stages=4)
        return GemmTile(block_rows, 128, block_k, num_warps=8, num_stages=3)

    up = tile(2 * intermediate_size, 128)
    up = _split(up, 2 * intermediate_size, hidden_size, 128, blocks, arch)
    return up, tile(hidden_size, _down_block_k(intermediate_size))


def _dense_rows(pairs: int, num_experts: int, arch: int) -> tuple[int, int]:
    """block_rows, and the most blocks that the batch can need."""
    block_rows = _rows_for(pairs / num_experts)
    if not warpgroup_products(arch):
        block_rows = min(block_rows, 64)  # sm_89 and sm_120 have 99 KB of shared memory
    return block_rows, most_blocks(pairs, num_experts, block_rows)


def _dense_block_n(rows: int, blocks: int, arch: int) -> int:
    """128 rows of weights share a token tile; 64 where they are left over or SMs would idle."""
    fills = rows // 128 * blocks >= sm_count(arch)
    return 128 if rows % 128 == 0 and fills else 64


def _down_block_k(intermediate_size: int) -> int:
    """Columns of a step of down, whose steps are cut with the shard's blocks.

    160 columns touch two blocks but only three half blocks, wherever the shard begins.
    """
    return 64 if intermediate_size < 256 else 128
