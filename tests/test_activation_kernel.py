"""The dense layers' activation: one rounding of the exact value, and what is refused."""

from __future__ import annotations

import pytest
import torch

from step37_kernels.activation import activation
from step37_kernels.launch import counted
from step37_kernels.reference.activation import swiglu_step

BF16 = 2.0**-8  # half the distance of neighbours, relative
EXP = 2.0**-18  # of silu in fp32: the exponential's argument, a sum and a quotient


@pytest.mark.parametrize("limit", [None, 0.5])
@pytest.mark.parametrize(("tokens", "size"), [(3, 1408), (1, 48), (0, 64)])
def test_against_fp64(device: torch.device, tokens: int, size: int, limit: float | None) -> None:
    """1408 is TP=8's share of a dense layer: two blocks, of which the second is cut."""
    gate_up = (3 * torch.randn(tokens, 2 * size)).bfloat16()
    with counted() as names:
        found = activation(gate_up.to(device), limit).cpu().double()
    gate, up = gate_up.double().chunk(2, 1)
    silu = torch.nn.functional.silu(gate)
    if limit is not None:
        silu, up = silu.clamp(max=limit), up.clamp(-limit, limit)
    assert names == ["activation_kernel"] * bool(tokens)
    assert found.shape == (tokens, size)
    assert bool(((found - silu * up).abs() <= (BF16 + EXP) * (silu * up).abs() + 1e-38).all())


def test_nan_stays_where_it_is(device: torch.device) -> None:
    gate_up = torch.ones(2, 32, dtype=torch.bfloat16)
    gate_up[0, 3], gate_up[1, 16 + 5] = float("nan"), float("nan")
    found = activation(gate_up.to(device), 7.0).cpu()
    assert found.isnan().nonzero().tolist() == [[0, 3], [1, 5]]
    assert swiglu_step(gate_up, 7.0).isnan().nonzero().tolist() == [[0, 3], [1, 5]]


def test_bad_input_is_refused() -> None:
    rows = torch.zeros(2, 6, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="gate_up has 5 columns"):
        activation(rows[:, :5].contiguous(), None)
    with pytest.raises(ValueError, match="limit is -1"):
        activation(rows, -1.0)
    with pytest.raises(ValueError, match="gate_up"):
        activation(rows.float(), None)
