"""The router against transformers' Step3p7TopKRouter, and where that leaves ties open."""

import pytest
import torch
from transformers.models.step3p7.modeling_step3p7 import Step3p7TopKRouter

from step37_kernels.reference.route import route


def test_router_is_transformers(text_config, randomize):
    oracle = Step3p7TopKRouter(text_config)
    randomize(oracle)  # the bias too, as large as the scores: it changes what is selected
    hidden = torch.randn(40, 64)
    _, expected, expected_ids = oracle(hidden)
    weights, ids = route(hidden, oracle.weight, oracle.e_score_correction_bias, 3, 3.0)
    assert weights.dtype == torch.float32 and ids.dtype == torch.int32
    by_id, expected_by_id = ids.sort(-1), expected_ids.sort(-1)
    assert torch.equal(by_id.values, expected_by_id.values.int())
    # Products of 64 terms, sigmoid and quotient: relative errors near 64 * 2^-24 at most.
    torch.testing.assert_close(
        weights.gather(1, by_id.indices),
        3.0 * expected.gather(1, expected_by_id.indices),
        rtol=128 * 2**-24,
        atol=0,
    )
    unbiased = route(hidden, oracle.weight, None, 3, 3.0)[1]
    assert not torch.equal(unbiased.sort(-1).values, by_id.values)


def test_the_bias_selects_and_does_not_weigh():
    hidden, gate_weight = torch.ones(1, 1), torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    bias = torch.tensor([5.0, 4.0, 0.0, 0.0])
    score = torch.sigmoid(torch.tensor([0.0, 1.0]))
    weights, ids = route(hidden, gate_weight, bias, 2, 3.0)
    assert ids.tolist() == [[0, 1]]
    torch.testing.assert_close(weights[0], 3.0 * score / score.sum())
    weights, _ = route(hidden, gate_weight, bias, 2, 3.0, renormalize=False)
    torch.testing.assert_close(weights[0], 3.0 * score)


def test_ties_go_to_the_lower_id():
    _, ids = route(torch.zeros(5, 4), torch.randn(288, 4), None, 8, 1.0)
    assert (ids == torch.arange(8)).all()
    bias = torch.zeros(288)
    bias[[280, 17, 100]] = 1.0
    _, ids = route(torch.zeros(2, 4), torch.randn(288, 4), bias, 5, 1.0)
    assert ids.tolist() == [[17, 100, 280, 0, 1]] * 2


def test_bf16_inputs_are_multiplied_and_summed_in_fp32():
    hidden, gate_weight = torch.randn(6, 512).bfloat16(), (torch.randn(9, 512) / 16).bfloat16()
    weights, ids = route(hidden, gate_weight, None, 9, 1.0, renormalize=False)
    logits = hidden.double() @ gate_weight.double().T
    # Products of bf16 are exact in fp32; 512 sums of at most 2^-24 of the absolute sum, a quarter
    # of it after sigmoid, and the sigmoid's own roundings. bf16 logits would be off by 2^-9.
    bound = 512 * 2**-24 * (hidden.double().abs() @ gate_weight.double().abs().T) / 4 + 2**-22
    error = (weights - logits.sigmoid().gather(1, ids.long())).abs()
    assert (error <= bound.gather(1, ids.long())).all() and bound.max() < 2**-9


def test_scores_that_underflow_weigh_nothing():
    weights, ids = route(torch.full((1, 1), -200.0), torch.ones(4, 1), None, 2, 3.0)
    assert weights.tolist() == [[0.0, 0.0]] and ids.tolist() == [[0, 1]]


def test_no_tokens():
    weights, ids = route(torch.zeros(0, 4), torch.zeros(6, 4), torch.zeros(6), 2, 3.0)
    assert weights.shape == ids.shape == (0, 2)


def test_errors_name_what_is_wrong():
    hidden, gate_weight = torch.zeros(1, 4), torch.zeros(6, 4)
    with pytest.raises(ValueError, match="top_k is 7, expected 1 to the number of experts 6"):
        route(hidden, gate_weight, None, 7, 1.0)
    with pytest.raises(ValueError, match=r"bias has shape \[5\], expected \[6\]"):
        route(hidden, gate_weight, torch.zeros(5), 2, 1.0)
    with pytest.raises(ValueError, match="gate_weight has dtype torch.float16"):
        route(hidden, gate_weight.half(), None, 2, 1.0)
