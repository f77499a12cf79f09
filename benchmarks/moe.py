"""The expert layer: time, bandwidth and arithmetic rate by format, shard, routing and batch.

    python -m benchmarks.moe [--budget 8m] [--only tokens=1,64] [--only format=nvfp4] [--plot FILE]

Without a GPU it prints what it would measure, the floors, and the kernels' static figures.
"""

from __future__ import annotations

from benchmarks import expert_cells, expert_peers
from benchmarks.expert_step37 import Step37Experts
from benchmarks.harness.cells import Subject
from benchmarks.harness.command import Suite, command


def subjects() -> list[Subject]:
    """This project's kernels, then the peers."""
    return [Step37Experts(), *expert_peers.peers()]


SUITE = Suite(
    name="moe",
    cells=expert_cells.cells,
    subjects=subjects,
    plotted_over="tokens",
    case_words=("gate-up", "down", "experts", "route", "sort", "combine", "shared", "quantise"),
)

main = command(SUITE)

if __name__ == "__main__":
    main()
