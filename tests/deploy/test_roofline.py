"""The performance model against figures that were worked out without it."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

from step37_ext.cli import main
from step37_ext.deploy.data_sheets import DATA_SHEETS
from step37_ext.deploy.estimate import estimate
from step37_ext.deploy.expected_experts import chances, distinct
from step37_ext.deploy.memory import cache_cost, release, weights_per_gpu
from step37_ext.deploy.plans import Request, make_plan
from step37_ext.deploy.roofline import Formats, Step, decode_step, drafted_step, heads_of, prefill
from step37_ext.deploy.work import decode_attention
from step37_ext.model.parallel import Parallel

TEXT = release().text
TP4 = Parallel(4, 1)
H100, H200 = DATA_SHEETS["H100 80GB HBM3"], DATA_SHEETS["H200"]


def megabytes(step: Step, *names: str) -> float:
    """What the operations with these words in their names stream, in all layers."""
    found = [one for one in step.operations if any(name in one.name for name in names)]
    assert found
    return sum(one.times * one.work.stream_bytes for one in found) / 1e6


@pytest.mark.parametrize(
    ("batch", "context", "gpu", "experts", "expected_ms"),
    [  # a rank of TP=4 on the data sheet's bandwidth: (experts' share, all weights and cache)
        (1, 8192, H100, "nvfp4", (0.22, 1.18)),
        (8, 65536, H100, "fp8", (2.86, 4.79)),
        (64, 8192, H200, "nvfp4", (4.66, 6.10)),
        (64, 65536, H200, "bf16", (16.55, 22.69)),
        (256, 8192, DATA_SHEETS["B200"], "fp8", (5.94, 8.22)),
    ],
)
def test_whole_step_floors(batch, context, gpu, experts, expected_ms):
    """Derived by hand from the sizes alone: 288 (1 - (280/288)^B) experts of 3 x 320 x 4096 weights
    in 42 layers; 1.577e9 other weights of 2 bytes; 2 x 2 x 128 bytes a token in 12 full layers and,
    up to 512 tokens, in 33 sliding ones. FP8's block scales (0.02%) and the head gates (13 MB, 0.2%
    at the most) were left out there.
    """
    step = decode_step(TEXT, Formats(experts), TP4, batch, context)
    ms = 1e9 / gpu.bandwidth
    moe = megabytes(step, "routed") * ms
    weights = ("qkv", "o_proj", "dense gate", "dense down", "router", "shared", "lm_head")
    whole = moe + megabytes(step, *weights, "attention") * ms
    assert moe == pytest.approx(expected_ms[0], abs=0.006)
    assert whole == pytest.approx(expected_ms[1], abs=0.011)


def test_sums_are_those_of_the_checkpoint():
    """Every weight that a rank holds is streamed in a step that uses all experts, and no other."""
    for tp_size, form in itertools.product((1, 4, 8), ("bf16", "fp8")):
        parts = weights_per_gpu(release(), "bf16", tp_size, False, form)
        step = decode_step(TEXT, Formats("bf16", dense=form), Parallel(tp_size, 1), 4096, 1)
        attention = megabytes(step, "qkv", "head gate", "o_proj") * 1e6
        assert attention == pytest.approx(parts["attention"], rel=1e-4)  # without norms
        assert megabytes(step, "routed") * 1e6 == pytest.approx(parts["experts"])
        dense = megabytes(step, "dense gate-up", "dense down", "shared", "router") * 1e6
        norms_and_biases = 91 * 4096 * 2 + 42 * 288 * 2
        assert dense + norms_and_biases == pytest.approx(parts["dense"])
        assert megabytes(step, "lm_head") * 1e6 == pytest.approx(parts["embeddings"] / 2)


def test_cache_is_the_memory_plans():
    for kind, name in (("fp8", "fp8_e4m3"), ("bf16", "bf16")):
        cost = cache_cost(TEXT, name, 4, drafts=False)
        step = decode_step(TEXT, Formats("bf16", cache=kind), TP4, 3, 8192)
        assert megabytes(step, "attention, full") * 1e6 == 3 * 8192 * cost.full
        assert megabytes(step, "attention, sliding") * 1e6 == 3 * 512 * cost.sliding


def test_formats_and_ranks_change_what_they_name():
    shipped = decode_step(TEXT, Formats("nvfp4"), Parallel(), 1, 8192)
    dense = decode_step(TEXT, Formats("nvfp4", dense="fp8"), Parallel(), 1, 8192)
    for name, share in (("qkv", 0.5), ("shared", 0.5), ("lm_head", 1), ("head gate", 1),
                        ("routed", 1), ("attention", 1)):  # fmt: skip
        ratio = megabytes(dense, name) / megabytes(shipped, name)
        assert ratio == pytest.approx(share, rel=4e-3), name  # a scale of 4 bytes for each row
    whole = decode_step(TEXT, Formats("fp8"), TP4, 64, 8192)
    by_expert = decode_step(TEXT, Formats("fp8"), Parallel(4, 4), 64, 8192)
    assert megabytes(by_expert, "routed") == pytest.approx(megabytes(whole, "routed"))
    # 91 sums of 64 x 4096 bf16 numbers, of which a rank sends 3/4 twice; 3/4 of the logits' bytes.
    sent = 91 * 2 * 0.75 * 64 * 4096 * 2 + 0.75 * 64 * 128896 * 2
    assert (whole.all_reduces, whole.sent_bytes) == (91, sent)
    assert (shipped.all_reduces, shipped.sent_bytes) == (0, 0)


def test_a_long_prefill_is_bound_by_its_products():
    """Two operations a token and weight it meets, and the visible pairs' of attention."""
    step = prefill(TEXT, Formats("nvfp4"), Parallel(), 8192)
    met = 42 * (9 * 3 * 1280 * 4096 + 288 * 4096) + 3 * 3 * 11264 * 4096
    met += 12 * (2 * 64 + 16) * 128 * 4096 + 33 * (2 * 96 + 16) * 128 * 4096
    met += (12 * 64 + 33 * 96) * 4096
    pairs = 12 * 64 * 8192 * 8193 / 2 + 33 * 96 * (512 * 513 / 2 + 7680 * 512)
    flops = 2 * 8192 * met + 4 * 128 * pairs + 2 * 4096 * 128896
    assert step.total.flops == pytest.approx(flops, rel=1e-12)
    floor = step.floor(H100.bandwidth, H100.flops)
    assert flops / 989e12 * 1e6 < floor < 1.1 * flops / 989e12 * 1e6


def test_a_steps_floor_is_the_sum_of_its_operations():
    step = prefill(TEXT, Formats("nvfp4"), TP4, 2048)
    apart = [max(one.work.bytes / H100.bandwidth, one.work.flops / 989e12) * one.times * 1e6
             for one in step.operations]  # fmt: skip
    assert step.floor(H100.bandwidth, H100.flops) == pytest.approx(sum(apart), rel=1e-12)
    assert step.total.bytes / H100.bandwidth * 1e6 < sum(apart)  # some are bound by products


@pytest.mark.parametrize("skew", [0.0, 0.5, 1.0, 2.0])
def test_chances_add_up(skew):
    of = chances(288, 8, skew)
    assert sum(of) == pytest.approx(8, abs=1e-6) and list(of) == sorted(of, reverse=True)
    assert distinct(1, of) == pytest.approx(8, abs=1e-6)
    assert distinct(100000, of) == pytest.approx(288, rel=0.05)


def test_chances_of_three_by_hand():
    """Weights 6, 3, 2 of 11: one draw, and two draws without replacement."""
    assert chances(3, 1, 1.0) == pytest.approx([6 / 11, 3 / 11, 2 / 11], abs=1e-6)
    first = 6 / 11 + 3 / 11 * 6 / 8 + 2 / 11 * 6 / 9
    second = 3 / 11 + 6 / 11 * 3 / 5 + 2 / 11 * 3 / 9
    assert chances(3, 2, 1.0) == pytest.approx([first, second, 2 - first - second], abs=1e-6)


def test_chances_are_those_of_draws():
    """400 draws of 64 tokens: the mean of distinct experts to five standard errors."""
    generator = torch.Generator().manual_seed(1)
    keys = torch.rand(400, 64, 288, generator=generator, dtype=torch.float64)
    ranks = torch.arange(1, 289, dtype=torch.float64)
    ids = (-torch.log(-torch.log(keys)) - torch.log(ranks)).topk(8, dim=2).indices.flatten(1)
    counts = torch.tensor([float(one.unique().numel()) for one in ids])
    error = float(counts.std()) / 400**0.5
    assert distinct(64, chances(288, 8, 1.0)) == pytest.approx(float(counts.mean()), abs=5 * error)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((8, 9), "top_k is 9, expected 1 to the 8"), ((8, 2, -1.0), "skew is -1.0, expected 0")],
)
def test_impossible_routings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        chances(*arguments)


def test_an_estimate_is_the_floor_and_its_assumptions():
    plan = make_plan(Request("h200", 4, "nvfp4", context=8192, concurrency=64))
    found = estimate(plan)
    step = decode_step(TEXT, Formats("nvfp4"), plan.parallel, 64, 8192)
    floor = step.floor(4.8e12, {"bf16": 989e12})
    assert found.floor_us == pytest.approx(floor)
    sent = step.sent_bytes / 450e9 * 1e6
    # Of a layer with experts: norms 2, qkv, gate, prologue, attention 2, o_proj, router 2, shared
    # expert 2, sort, gate-up, down, combine; of a dense one 11; embedding, first norm and head.
    assert found.launches == 42 * 16 + 3 * 11 + 3
    slow, fast = floor / 0.5 + 2 * 708 + sent + 91 * 12, floor / 0.7 + 708 + sent + 91 * 5
    assert found.step_us == pytest.approx((slow, fast))
    assert found.tokens_per_s() == pytest.approx((64e6 / slow, 64e6 / fast))
    assert found.drafts == 0
    dense = estimate(make_plan(replace(plan.request, dense_weights="fp8")))
    # 5.58e9 numbers beside the experts lose a byte each, and are on four ranks.
    assert found.floor_us - dense.floor_us == pytest.approx(5.58e9 / 4 / 4.8e6, rel=0.01)
    assert dense.launches == found.launches
    over_network = estimate(make_plan(Request("h200", 4, "nvfp4", nodes=2)))
    assert over_network.all_reduce_us == (60.0, 25.0)
    rack = estimate(make_plan(Request("gb200", 4, "nvfp4", nodes=2)))
    assert rack.all_reduce_us == (12.0, 5.0)


def test_the_command_prints_the_estimate():
    arguments = "command --gpu h200 --count 1 --quant nvfp4 --context 8192".split()
    shown = CliRunner().invoke(main, arguments).output
    found = estimate(make_plan(Request("h200", 1, "nvfp4", context=8192)))
    low, high = found.tokens_per_s()
    assert f"Estimate, not measured: {low:.0f} to {high:.0f} tokens/s" in shown
    assert "50% to 70% are assumed to be reached, and 708 kernels to start in 1 to 2 us" in shown
    read = json.loads(CliRunner().invoke(main, [*arguments, "--json"]).output)
    assert read["estimate_not_measured"]["decode_tokens_per_s"] == [
        {"drafts_accepted": 0, "low": low, "high": high}
    ]
    assert read["estimate_not_measured"]["launches"] == 708
    lacking = CliRunner().invoke(main, "command --gpu h200 --count 1 --quant bf16 --json".split())
    assert json.loads(lacking.output)["estimate_not_measured"] is None


def test_several_new_tokens_see_what_the_last_ones_see():
    """Four tokens at the end of 600: the last sees 512 keys, the first begins three earlier."""
    sliding = heads_of(TEXT.layers[1].attention, 1)
    full = heads_of(TEXT.layers[0].attention, 1)
    row = 2 * 8 * 128  # keys and values of a token in e4m3
    work = decode_attention(sliding, 2, 600, "fp8", 4)
    assert work.stream_bytes == 2 * 515 * row and work.flops == 2 * 4 * 96 * 128 * 4 * 512
    work = decode_attention(full, 2, 600, "fp8", 4)
    assert work.stream_bytes == 2 * 600 * row
    assert work.flops == 2 * 4 * 64 * 128 * (600 + 599 + 598 + 597)
    assert work.bytes == work.stream_bytes + 2 * 2 * 4 * 64 * 128 * 2


def test_a_drafted_step_verifies_four_tokens_and_runs_every_mtp_layer():
    formats, model = Formats("nvfp4", dense="fp8"), release()
    step = drafted_step(TEXT, model.text_with_mtp, formats, TP4, 2, 8192)
    # Three layers with heads, all in BF16; norms are no stream of theirs.
    drafts = weights_per_gpu(model, "nvfp4", 4, drafts=True)["drafts"] / 1e6
    weights = ("qkv", "head gate", "o_proj", "dense gate-up", "dense down", "eh_proj", "lm_head")
    found = megabytes(step, *(f"draft {n}: {name}" for n in range(3) for name in weights))
    assert found == pytest.approx(drafts, rel=1e-4)
    # Eight tokens are verified, with logits of each; drafts need one row of logits a request.
    plain = decode_step(TEXT, formats, TP4, 8, 8192)
    assert step.tokens == 8
    assert megabytes(step, "routed") == megabytes(plain, "routed")
    assert (plain.all_reduces, step.all_reduces) == (91, 91 + 3 * 3)
    reduced = 3 * 3 * 2 * 8 * 4096 * 2 + 3 * 2 * 128896 * 2
    assert step.sent_bytes == pytest.approx(plain.sent_bytes + 0.75 * reduced)
    # Its norms 5, the join, eh_proj, embedding, a layer's 6 of attention and 3 of the MLP, head.
    assert step.launches == plain.launches + 3 * 18


def test_the_command_prints_what_each_number_of_accepted_drafts_gives():
    arguments = "command --gpu h200 --count 4 --quant fp8 --mtp".split()
    shown = CliRunner().invoke(main, arguments).output
    request = Request("h200", 4, "fp8", mtp=True)
    drafting, plain = (estimate(make_plan(replace(request, mtp=mtp))) for mtp in (True, False))
    speeds = [drafting.tokens_per_s(accepted) for accepted in range(4)]
    assert speeds[3] == pytest.approx([4 * speed for speed in speeds[0]])
    assert speeds[0][1] < plain.tokens_per_s()[1] < speeds[3][1]
    none, one, two, three = (f"{low:.0f} to {high:.0f}" for low, high in speeds)
    assert f"{none} tokens/s while decoding 1 x 32768 tokens if a step accepts none" in shown
    assert f"its 3 drafts, {one} if 1, {two} if 2, {three} if 3; how many are accepted" in shown
    assert "Without --mtp it is {:.0f} to {:.0f}".format(*plain.tokens_per_s()) in shown
    read = json.loads(CliRunner().invoke(main, [*arguments, "--json"]).output)
    told = read["estimate_not_measured"]["decode_tokens_per_s"]
    assert [(one["drafts_accepted"], one["low"], one["high"]) for one in told] == [
        (accepted, *speed) for accepted, speed in enumerate(speeds)
    ]


def test_more_of_anything_takes_longer():
    def floor(batch: int = 8, context: int = 8192, skew: float = 0.0, **changes: str) -> float:
        formats = replace(Formats("nvfp4"), **changes)
        step = decode_step(TEXT, formats, TP4, batch, context, skew)
        return step.floor(H200.bandwidth, H200.flops)

    base = floor()
    assert floor(batch=16) > base and floor(context=65536) > base
    assert floor(skew=1.0) < base < floor(experts="fp8") < floor(experts="bf16")
    assert floor(dense="fp8") < base < floor(cache="bf16")
