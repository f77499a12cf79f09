"""Which rows each expert's blocks work on: the result of sorting a batch's routing by expert."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """A batch's (token, choice) pairs, sorted by local expert and padded to whole blocks.

    Pair t * top_k + j is token t's j-th expert. Rows of the intermediate and of the down
    projection's output are pairs, so nothing is stored for padding.

    Args:
        pair_of_slot: int32 [max_blocks * block_rows]; -1 is padding.
        expert_of_block: int32 [max_blocks]; local expert, -1 where there is no block.
        block_rows: slots of a block, BLOCK_M of the GEMMs.
        top_k: choices per token.
        arrived: int32 [max_blocks, tiles], zeros: where a gate-up that splits K counts the parts of
            each tile that are done (`split_k`), and leaves zeros. None where it does not.
    """

    pair_of_slot: Tensor
    expert_of_block: Tensor
    block_rows: int
    top_k: int
    arrived: Tensor | None = None

    @property
    def max_blocks(self) -> int:
        """Blocks that the grids are made for."""
        return self.expert_of_block.shape[0]


def most_blocks(pairs: int, num_experts: int, block_rows: int) -> int:
    """The most blocks that `pairs` rows spread over `num_experts` experts can need.

    Every expert with rows adds at most one block that is not full; with a experts active the
    others' rows fill whole blocks: a + (pairs - a) // block_rows, largest at a = min(both).
    """
    active = min(pairs, num_experts)
    return active + (pairs - active) // block_rows
