"""Which plans exist: the deployment page's, this package's own, and what is said of others."""

import itertools
from dataclasses import replace

import pytest

from step37_ext.deploy.command import MODELS, environment, serve_command
from step37_ext.deploy.plans import Request, make_plan
from step37_ext.deploy.report import plan_command
from step37_ext.model.dense_format import dense_format

PAGE_GPUS = ("h200", "b200", "b300", "gb200", "gb300")  # four of each
QUANTS = ("bf16", "fp8", "nvfp4")
OPTIONS = tuple(itertools.product((False, True), repeat=2))
COMMON = "--model-impl step37 --trust-remote-code --attention-backend step37 --tp 4".split()
OF_FORMAT = {
    "bf16": [],
    "fp8": "--ep-size 4".split(),
    "nvfp4": "--ep-size 4 --quantization modelopt_fp4 --kv-cache-dtype fp8_e4m3".split(),
}


@pytest.mark.parametrize("reasoning, tools", OPTIONS)
@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("gpu", PAGE_GPUS)
def test_rows_of_the_deployment_page(gpu, quant, reasoning, tools):
    plan = make_plan(Request(gpu, 4, quant, reasoning=reasoning, tools=tools))
    assert plan.fits and plan.nearest == ()
    expected = ["sglang", "serve", "--model-path", MODELS[quant], *COMMON, *OF_FORMAT[quant]]
    expected += ["--reasoning-parser", "step3p5"] if reasoning else []
    expected += ["--tool-call-parser", "step3p5"] if tools else []
    assert serve_command(plan) == expected


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("gpu", PAGE_GPUS)
def test_drafts_take_memory_and_flags_in_every_format(gpu, quant):
    """Three layers more: weights, and cache in the sliding pool."""
    plain, drafting = (make_plan(Request(gpu, 4, quant, mtp=mtp)) for mtp in (False, True))
    assert drafting.fits
    flags = (
        "--speculative-algorithm EAGLE --speculative-num-steps 3 --speculative-eagle-topk 1 "
        "--speculative-num-draft-tokens 4 --enable-multi-layer-eagle"
    )
    assert serve_command(drafting) == serve_command(plain) + flags.split()
    assert drafting.memory.pool == plain.memory.pool - drafting.memory.weights["drafts"]
    assert drafting.memory.cost.sliding * 33 == plain.memory.cost.sliding * 36


def test_dense_weights_in_fp8_give_their_memory_to_the_cache(monkeypatch):
    request = Request("h200", 1, "nvfp4", context=98304, mtp=True)
    plain, fp8 = make_plan(request), make_plan(replace(request, dense_weights="fp8"))
    assert not plain.fits and fp8.fits
    assert plan_command(fp8.request)[-3:] == ["--mtp", "--dense-weights", "fp8"]
    plain, fp8 = (make_plan(replace(one.request, count=4)) for one in (plain, fp8))
    assert fp8.memory.pool - plain.memory.pool == sum(plain.memory.weights.values()) - sum(
        fp8.memory.weights.values()
    )
    assert environment(plain) == {}
    monkeypatch.delenv("STEP37_DENSE_WEIGHTS", raising=False)
    for name, value in environment(fp8).items():
        monkeypatch.setenv(name, value)
    assert dense_format() == "fp8"  # what the server reads


@pytest.mark.parametrize("gpu, count", [("h200", 1), ("h100", 2)])
def test_nvfp4_on_hopper(gpu, count):
    """What only this package makes possible; SGLang's own settings are enough for 32768 tokens."""
    plan = make_plan(Request(gpu, count, "nvfp4"))
    assert plan.fits
    flags = " ".join(serve_command(plan))
    assert "--quantization modelopt_fp4 --kv-cache-dtype fp8_e4m3" in flags
    assert "--chunked-prefill-size" not in flags and "--swa-full-tokens-ratio" not in flags


def test_settings_change_only_where_needed():
    """Longer contexts first take from the sliding pool, then from the activations."""
    plans = [
        make_plan(Request("h200", 1, "nvfp4", context=context))
        for context in (32768, 65536, 131072, 262144)
    ]
    assert [plan.fits for plan in plans] == [True, True, True, False]
    settings = [plan.memory.settings for plan in plans]
    assert [s.prefill_chunk for s in settings] == [8192, 8192, 4096, 4096]
    assert settings[0].sliding_ratio == 0.8 > settings[1].sliding_ratio > 0
    flags = serve_command(plans[2])
    assert flags[flags.index("--context-length") + 1] == "131072"
    assert flags[flags.index("--chunked-prefill-size") + 1] == "4096"
    assert float(flags[flags.index("--swa-full-tokens-ratio") + 1]) == settings[2].sliding_ratio


def test_limits_are_printed_only_if_asked_for():
    request = Request("b200", 4, "fp8")
    plain = serve_command(make_plan(request))
    assert "--context-length" not in plain and "--max-running-requests" not in plain
    limited = serve_command(make_plan(replace(request, context=65536, concurrency=16)))
    assert limited[len(plain) :] == "--context-length 65536 --max-running-requests 16".split()


@pytest.mark.parametrize(
    "request_, nearest",
    [
        (Request("h200", 2, "bf16"), [Request("h200", 4, "bf16"), Request("h200", 2, "fp8")]),
        (Request("h100", 1, "nvfp4"), [Request("h100", 2, "nvfp4")]),
        (Request("gb200", 2, "bf16"), [Request("gb200", 4, "bf16"), Request("gb200", 2, "fp8")]),
    ],
)
def test_nearest_plans_where_the_weights_do_not_fit(request_, nearest):
    plan = make_plan(request_)
    assert not plan.fits and list(plan.nearest) == nearest
    assert all(make_plan(request).fits for request in nearest)


def test_nearest_plan_with_less_work():
    asked = Request("h200", 1, "nvfp4", context=32768, concurrency=32)
    less, more, *_ = make_plan(asked).nearest
    assert less == replace(asked, concurrency=less.concurrency) and less.concurrency >= 1
    assert make_plan(less).fits
    assert not make_plan(replace(less, concurrency=less.concurrency + 1)).fits
    assert more == replace(asked, count=2) and make_plan(more).fits


def test_nearest_plan_with_a_shorter_context():
    less = make_plan(Request("h200", 1, "nvfp4", context=262144)).nearest[0]
    assert less.concurrency == 1 and make_plan(less).fits
    assert not make_plan(replace(less, context=less.context + 1)).fits


def test_nearest_plan_on_more_nodes():
    asked = Request("h100", 8, "bf16", context=262144, concurrency=24)
    assert replace(asked, nodes=2) in make_plan(asked).nearest


def test_nodes_share_the_model():
    plan = make_plan(Request("gb200", 4, "fp8", nodes=2))
    assert (plan.parallel.tp_size, plan.parallel.ep_size) == (8, 8)
    first, second = serve_command(plan, 0), serve_command(plan, 1)
    assert "--nnodes 2 --node-rank 0 --dist-init-addr HEAD_NODE:20000" in " ".join(first)
    rank = first.index("--node-rank") + 1
    assert second == [*first[:rank], "1", *first[rank + 1 :]]


def test_expert_parallelism_that_is_possible():
    """FP8 and NVFP4 at any --ep-size that divides --tp: no shard has to be whole blocks here."""
    for quant in QUANTS:
        assert make_plan(Request("b200", 8, quant)).expert_choices == (1, 2, 4, 8)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"gpu": "a100"}, "--gpu a100: allowed are h100, h200"),
        ({"quant": "int4"}, "--quant int4: allowed are bf16, fp8, nvfp4"),
        ({"dense_weights": "nvfp4"}, "--dense-weights nvfp4: allowed are bf16, fp8"),
        ({"count": 0}, "--count 0: a node of h200 has 1 to 8 GPUs"),
        ({"gpu": "gb200", "count": 8}, "--count 8: a node of gb200 has 1 to 4 GPUs; use --nodes"),
        ({"count": 3}, "--count 3 .*--tp 3 does not divide .*; possible are 1, 2, 4, 8, 16 GPUs"),
        ({"count": 8, "nodes": 4}, "vision encoder's 16 heads; possible are 1, 2, 4, 8, 16 GPUs"),
        ({"nodes": 0}, "--nodes 0: at least 1"),
        ({"context": 262145}, "--context 262145: the model reads 1 to 262144 tokens"),
        ({"context": 0}, "--context 0: the model reads 1 to"),
        ({"concurrency": 0}, "--concurrency 0: at least 1"),
    ],
)
def test_impossible_requests_name_option_value_and_what_is_allowed(change, said):
    with pytest.raises(ValueError, match=said):
        make_plan(replace(Request("h200", 4, "fp8"), **change))
