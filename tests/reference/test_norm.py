"""Gemma RMSNorm against transformers' Step3p7RMSNorm."""

import pytest
import torch
from transformers.models.step3p7.modeling_step3p7 import Step3p7RMSNorm

from step37_kernels.reference.norm import gemma_rms_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_is_transformers(dtype):
    oracle = Step3p7RMSNorm(96, eps=1e-2)  # large enough to matter for the small rows
    torch.nn.init.normal_(oracle.weight)
    x = (torch.randn(7, 3, 96) * torch.logspace(-3, 3, 7)[:, None, None]).to(dtype)
    got = gemma_rms_norm(x, oracle.weight, 1e-2)
    assert got.dtype == dtype
    # Six fp32 roundings a side; a bf16 result may fall on the other side of one rounding (2^-8).
    tolerance = 2**-20 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(got, oracle(x), rtol=tolerance, atol=0)


def test_a_weight_of_another_width_is_refused():
    with pytest.raises(ValueError, match=r"weight has shape \[8\], expected \[16\]"):
        gemma_rms_norm(torch.zeros(2, 16), torch.zeros(8), 1e-5)
