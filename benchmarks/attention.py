"""Attention: decode, prefill and prologue by batch, context, kind, shard and cache type.

    python -m benchmarks.attention [--budget 8m] [--only operation=decode] [--plot FILE]

Without a GPU it prints what it would measure, the floors, and the kernels' static figures.
"""

from __future__ import annotations

from benchmarks import attention_cells, attention_peers
from benchmarks.attention_step37 import Step37Attention
from benchmarks.harness.cells import Subject
from benchmarks.harness.command import Suite, command


def subjects() -> list[Subject]:
    """This project's kernels, then the peers."""
    return [Step37Attention(), *attention_peers.peers()]


SUITE = Suite(
    name="attention",
    cells=attention_cells.cells,
    subjects=subjects,
    plotted_over="context",
    case_words=("decode", "extend", "prefill", "prologue", "verify", "attention"),
)

main = command(SUITE)

if __name__ == "__main__":
    main()
