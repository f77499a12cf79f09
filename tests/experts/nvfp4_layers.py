"""Small NVFP4 layers, their routing, and how far a kernel's result may be from the exact one."""

from __future__ import annotations

import torch
from torch import Tensor

from step37_kernels.expert_weights import ExpertWeights, NVFP4Experts
from step37_kernels.experts.routing import Routing, most_blocks
from step37_kernels.reference.activation import swiglu_step
from tests.experts.bounds import narrow_error

FINITE_SCALES = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F])
# Half the distance of neighbours with 8 significant bits, relative.
BF16 = 2.0**-8
# One fp32 addition; tensor cores may truncate, so a whole unit in the last place.
FP32 = 2.0**-23


def random_experts(num_experts: int, hidden: int, size: int) -> NVFP4Experts:
    """All elements and finite scales (zero, negative, subnormal); up's global scale is 8 x gate's.

    Outputs are of order one, so that limits bite.
    """

    def scales(rows: int, columns: int) -> Tensor:
        codes = torch.randint(0x20, 0x40, (num_experts, rows, columns // 16))
        rare = torch.rand(codes.shape) < 0.1
        codes[rare] = FINITE_SCALES[torch.randint(len(FINITE_SCALES), (int(rare.sum()),))]
        return codes.to(torch.uint8).view(torch.float8_e4m3fn)

    def elements(rows: int, columns: int) -> Tensor:
        return torch.randint(256, (num_experts, rows, columns // 2), dtype=torch.uint8)

    gate = (0.5 + torch.rand(num_experts)) * 0.02
    return NVFP4Experts(
        elements(2 * size, hidden), scales(2 * size, hidden), torch.stack([gate, 8 * gate], 1),
        elements(hidden, size), scales(hidden, size), 0.1 * torch.rand(num_experts),
    )  # fmt: skip


def routing_of(ids: Tensor, num_experts: int, block_rows: int) -> Routing:
    """What the sort launch makes of ids [T, top_k]."""
    slots, owners = [], []
    for e in range(num_experts):
        pairs = (ids.flatten() == e).nonzero().flatten()
        for part in pairs.split(block_rows) if len(pairs) else ():
            slots.append(torch.nn.functional.pad(part, (0, block_rows - len(part)), value=-1))
            owners.append(e)
    blocks = most_blocks(ids.numel(), num_experts, block_rows)
    slots += [ids.new_full((block_rows,), -1)] * (blocks - len(owners))
    owners += [-1] * (blocks - len(owners))
    pair_of_slot = torch.cat([ids.new_empty(0), *slots]).int()
    return Routing(
        pair_of_slot, torch.tensor(owners).int().to(ids.device), block_rows, ids.shape[1]
    )


def gate_up_reference(
    x: Tensor,
    weights: ExpertWeights,
    ids: Tensor,
    limit: float | None,
    loss: float = FP32,
    narrow: bool = False,
) -> tuple[Tensor, Tensor]:
    """swiglu_step(gate, up) of every pair in fp64 [P, N], and the bound of a kernel's error.

    The products are exact; K + 2 additions and multiplications each lose at most `loss` of the sum
    of magnitudes. silu's slope is below 1.1, its own evaluation is within 2^-18 (the
    exponential's argument is rounded, so its error grows with the argument), and the result is
    rounded to bf16 once. Clamps enlarge no error. `narrow` adds `bounds.narrow_error`.
    """
    x, out, bound, lost = x.double(), [], [], (x.shape[1] + 2) * loss
    for pair, e in enumerate(ids.flatten().tolist()):
        row = x[pair // ids.shape[1]]
        gate, up = weights.gate(e, torch.float64), weights.up(e, torch.float64)
        g, u = gate @ row, up @ row
        dg, du = lost * (gate.abs() @ row.abs()), lost * (up.abs() @ row.abs())
        if narrow:
            dg, du = dg + narrow_error(gate, row), du + narrow_error(up, row)
        silu = torch.nn.functional.silu(g).abs()
        da = 1.1 * dg + 2.0**-18 * silu
        exact = swiglu_step(torch.cat([g, u])[None], limit)[0].double()
        error = da * (u.abs() + du) + silu * du
        out.append(exact)
        bound.append(error + BF16 * (exact.abs() + error) + 2.0**-20)
    return torch.stack(out), torch.stack(bound)


def down_reference(
    intermediate: Tensor,
    weights: ExpertWeights,
    ids: Tensor,
    topk_weights: Tensor,
    loss: float = FP32,
    narrow: bool = False,
) -> tuple[Tensor, Tensor]:
    """Router weight times down of every pair's intermediate [P, N] in fp64, and the error bound."""
    rows, out, bound = intermediate.double(), [], []
    for pair, (e, weight) in enumerate(
        zip(ids.flatten().tolist(), topk_weights.flatten().double(), strict=True)
    ):
        down = weights.down(e, torch.float64)
        exact = down @ rows[pair] * weight
        error = (rows.shape[1] + 3) * loss * (down.abs() @ rows[pair].abs())
        if narrow:
            error = error + narrow_error(down, rows[pair], weights.intermediate_offset)
        error = error * weight.abs()
        out.append(exact)
        bound.append(error + BF16 * (exact.abs() + error))
    return torch.stack(out), torch.stack(bound)
