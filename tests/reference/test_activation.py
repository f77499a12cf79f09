"""The clamped SwiGLU against transformers' experts."""

import pytest
import torch
from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

from step37_kernels.reference.activation import swiglu_step


@pytest.mark.parametrize("limit", [None, 0.0, 0.2, 0.7, 7.0])
def test_activation_is_transformers(text_config, limit):
    oracle = Step3p7Experts(text_config, swiglu_limit=limit or None)
    gate_up = torch.randn(50, 32) * 8
    got = swiglu_step(gate_up, limit)
    # silu (a few roundings of 2^-24, exp included) and one product.
    torch.testing.assert_close(got, oracle._apply_gate(gate_up), rtol=2**-20, atol=1e-30)


def test_the_clamp_comes_after_silu_and_bounds_the_gate_only_above():
    gate_up = torch.tensor([[9.0, 1.0], [-1.5, -9.0], [1.05, 1.0]])
    gate, up = torch.nn.functional.silu(gate_up[:, 0]), gate_up[:, 1]
    got = swiglu_step(gate_up, 1.0)[:, 0]
    assert got[0] == 1.0  # before SiLU it would be silu(1) = 0.73
    assert got[1] == -gate[1]  # the negative gate passes, the up is bounded below
    assert got[2] == gate[2] * up[2]  # silu(1.05) = 0.78 is inside: not touched


def test_bf16_is_computed_in_fp32():
    gate_up = torch.randn(20, 64).bfloat16()
    assert torch.equal(swiglu_step(gate_up, 0.7), swiglu_step(gate_up.float(), 0.7).bfloat16())


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="limit is -7.0"):
        swiglu_step(torch.zeros(1, 2), -7.0)
    with pytest.raises(ValueError, match="gate_up has 3 columns"):
        swiglu_step(torch.zeros(1, 3), None)
