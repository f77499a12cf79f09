"""The router's kernels against the reference, which is checked against transformers."""

from __future__ import annotations

import pytest
import torch

from step37_kernels.launch import counted
from step37_kernels.reference.route import route as reference
from step37_kernels.route import route

E, TOP_K, SCALING = 288, 8, 3.0


@pytest.mark.parametrize("gate_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 17, 100])
def test_router_is_the_reference(
    device: torch.device, gate_dtype: torch.dtype, tokens: int
) -> None:
    torch.manual_seed(tokens)
    size = 640  # not a whole number of splits
    hidden = torch.randn(tokens, size, device=device).bfloat16()
    gate = (torch.randn(E, size, device=device) * size**-0.5).to(gate_dtype)
    bias = torch.randn(E, device=device) * 0.1
    with counted() as launches:
        weights, ids = route(hidden, gate, bias, TOP_K, SCALING)
    assert len(launches) <= 2
    assert weights.dtype == torch.float32 and ids.dtype == torch.int32

    # Products are exact, so a logit is off by the roundings of at most `size` sums, a score by a
    # quarter of that (the slope of the sigmoid) and the roundings of exp, 1 + and 1 / (2^-21).
    spread = hidden.double().abs() @ gate.double().abs().T
    error = size * 2.0**-24 * spread / 4 + 2.0**-21
    score = (hidden.double() @ gate.double().T).sigmoid()
    choice = score + bias.double()
    taken = choice.gather(1, ids.long())
    left = choice.scatter(1, ids.long(), float("-inf")).amax(1, keepdim=True)
    most = 2 * error.amax(1, keepdim=True) + 2.0**-23
    assert (taken >= left - most).all()  # the eight best, up to ties within the error
    assert (taken[:, :-1] >= taken[:, 1:] - most).all()  # best first
    picked = score.gather(1, ids.long())
    expected = SCALING * picked / picked.sum(1, keepdim=True)
    # A quotient of scores: the relative errors of the numerator and of the sum add up.
    relative = 2 * (error.gather(1, ids.long()) / picked).amax(1, keepdim=True) + 2.0**-20
    assert ((weights - expected).abs() <= relative * expected).all()
    assert spread.max() * size * 2.0**-24 < 0.01  # the bound says something


def test_a_float_gate_is_not_rounded_to_bf16(device: torch.device) -> None:
    """Two experts differ in the 20th bit only: a bf16 or tf32 product would tie them."""
    gate = torch.ones(4, 128, device=device)
    gate[2] += 2.0**-18
    hidden = torch.full((1, 128), 2.0**-7, device=device).bfloat16()
    _, ids = route(hidden, gate, None, 2, 1.0)
    assert ids.tolist() == [[2, 0]]


def test_ties_go_to_the_lower_id(device: torch.device) -> None:
    hidden = torch.zeros(5, 256, device=device).bfloat16()
    gate = torch.randn(E, 256, device=device).bfloat16()
    _, ids = route(hidden, gate, None, TOP_K, 1.0)
    assert (ids.cpu() == torch.arange(TOP_K)).all()
    bias = torch.zeros(E, device=device)
    bias[[280, 17, 100]] = 1.0
    _, ids = route(hidden[:2], gate, bias, 5, 1.0)
    assert ids.tolist() == [[17, 100, 280, 0, 1]] * 2


def test_nan_and_infinity_stay_in_their_token(device: torch.device) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(4, 256, device=device).bfloat16()
    gate = torch.randn(16, 256, device=device).bfloat16() / 16
    clean = route(hidden, gate, None, 4, 1.0)
    dirty = hidden.clone()
    dirty[1, 3], dirty[2, 5] = float("nan"), float("inf")
    weights, ids = route(dirty, gate, None, 4, 1.0)
    for row in (0, 3):
        assert torch.equal(weights[row], clean[0][row]) and torch.equal(ids[row], clean[1][row])
    assert weights[1].isnan().all() and ids[1].tolist() == [0, 1, 2, 3]
    assert ((ids >= 0) & (ids < 16)).all()


def test_scores_that_underflow_and_no_renormalising(device: torch.device) -> None:
    hidden = torch.full((1, 16), -200.0, device=device).bfloat16()
    weights, ids = route(hidden, torch.ones(4, 16, device=device), None, 2, 3.0)
    assert weights.tolist() == [[0.0, 0.0]] and ids.tolist() == [[0, 1]]
    hidden = torch.zeros(3, 16, device=device).bfloat16()
    weights, _ = route(hidden, torch.ones(4, 16, device=device), None, 2, 3.0, renormalize=False)
    assert (weights == 1.5).all()


def test_no_tokens(device: torch.device) -> None:
    hidden = torch.zeros(0, 64, device=device).bfloat16()
    weights, ids = route(hidden, torch.zeros(6, 64, device=device), None, 2, 3.0)
    assert weights.shape == ids.shape == (0, 2)


def test_a_token_does_not_feel_its_batch_mates(device: torch.device) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(20, 512, device=device).bfloat16()
    gate = torch.randn(E, 512, device=device).bfloat16() / 16
    order = torch.randperm(20, device=device)
    weights, ids = route(hidden, gate, None, TOP_K, 1.0)
    shuffled_weights, shuffled_ids = route(hidden[order], gate, None, TOP_K, 1.0)
    assert torch.equal(weights[order], shuffled_weights) and torch.equal(ids[order], shuffled_ids)


def test_bad_input_is_refused_before_a_launch(device: torch.device) -> None:
    hidden = torch.zeros(1, 64, device=device).bfloat16()
    gate = torch.zeros(6, 64, device=device)
    with counted() as launches:
        with pytest.raises(ValueError, match="top_k is 7, expected 1 to the number of experts 6"):
            route(hidden, gate, None, 7, 1.0)
        with pytest.raises(ValueError, match="hidden has dtype torch.float32"):
            route(hidden.float(), gate, None, 2, 1.0)
        with pytest.raises(ValueError, match=r"gate_weight has strides \(1, 6\)"):
            route(hidden, gate.T.contiguous().T, None, 2, 1.0)
        with pytest.raises(ValueError, match=r"bias has shape \[5\], expected \[6\]"):
            route(hidden, gate, torch.zeros(5, device=device), 2, 1.0)
    assert not launches


def test_the_reference_agrees_on_ids_where_scores_are_apart(device: torch.device) -> None:
    torch.manual_seed(3)
    hidden = torch.randn(9, 256, device=device).bfloat16()
    gate = torch.randn(32, 256, device=device).bfloat16() / 16
    weights, ids = route(hidden, gate, None, 4, SCALING)
    expected_weights, expected_ids = reference(hidden, gate, None, 4, SCALING)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-5, atol=0)
