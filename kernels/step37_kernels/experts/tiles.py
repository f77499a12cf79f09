"""Which tile each grouped GEMM uses: plain Python, one function per format, with its reasons."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GemmTile:
    """The tile of one grouped GEMM; weights are its left operand.

    Args:
        block_rows: token rows (the matrix instruction's N; 16 fill a wgmma).
        block_n: rows of the weight matrix.
        block_k: columns of the weight matrix in one trip of the loop.
        num_warps, num_stages: as Triton takes them.
    """

    block_rows: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
