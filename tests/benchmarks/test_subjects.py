"""Ours and the peers as the benchmarks call them: on a CPU, and against the peers' signatures."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import attention_data, expert_cells, expert_peers, expert_step37
from benchmarks.attention_cells import heads, stored_pages
from benchmarks.attention_data import AttentionSubject, Problem, make_problem
from benchmarks.attention_peers import FlexAttention
from benchmarks.attention_peers import SGLangTriton as SGLangAttention
from benchmarks.attention_step37 import Step37Attention
from benchmarks.expert_cells import Shard, routed_cell
from benchmarks.expert_data import ExpertSubject, raw_weights
from benchmarks.expert_peers import SGLangMarlin, SGLangTriton, TorchGroupedMM
from benchmarks.expert_step37 import Step37Experts
from benchmarks.harness.cells import Cell, Work
from step37_kernels.launch import counted
from step37_kernels.reference.attention import attend
from step37_kernels.reference.experts import experts

SMALL = Shard("small", 288, 0, 16)
WHOLE = Shard("whole", 16, 0, 128)  # FP8 blocks that are not cut
FEW = Shard("few", 4, 100, 64)
PART = Shard("part", 6, 100, 160)  # begins inside an FP8 block, as rank 1 of TP=8 does


class Called(Exception):
    """Raised where a library would go to work; holds the arguments by name."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__(", ".join(arguments))
        self.arguments = arguments


def only_bound(function: Callable[..., Any]) -> Callable[..., Any]:
    """Something that takes exactly the arguments of `function`, and does nothing."""
    signature = inspect.signature(function)

    def bound(*args: Any, **kwargs: Any) -> Any:
        raise Called(signature.bind(*args, **kwargs).arguments)

    return bound


@pytest.fixture(autouse=True)
def _no_sglang_settings(monkeypatch):
    """SGLang's settings are the whole process's: other tests have their own."""
    monkeypatch.setattr(expert_peers, "sglang_context", lambda: None)


@pytest.fixture
def shards(monkeypatch, single_copies):
    for shard in (SMALL, WHOLE, FEW, PART):
        monkeypatch.setitem(expert_cells.SHARDS, shard.name, shard)


class PlainExperts(ExpertSubject):
    """The reference itself as an implementation, off by a factor."""

    name = library = "plain"

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def convert(self, raw, cell):
        return raw

    def run(self, weights, batch, cell):
        out = experts(
            batch.hidden, weights, batch.topk_weights, batch.topk_ids, None,
            expert_cells.SHARDS[cell.settings["parallel"]].first_expert, self.multiplies(cell),
        )  # fmt: skip
        return out * self.factor


@pytest.mark.parametrize("weight_format", ["bf16", "fp8", "nvfp4"])
def test_expert_check_passes_what_is_right_and_no_more(shards, weight_format):
    cell = routed_cell("experts", weight_format, "bf16", PART, "uniform", 100)
    for factor, holds in ((1.0, True), (1.05, False), (float("nan"), False)):
        subject = PlainExperts(factor)
        trial = subject.trial(subject.prepare(cell), cell)
        assert trial.check().holds == holds
        # 6 of 288 experts at 100 tokens: nearly all of them are used, by about 17 pairs.
        assert 0.6 * cell.work.flops < trial.work.flops < 1.4 * cell.work.flops
        assert trial.work.stream_bytes <= PART.bytes_of(weight_format)


@pytest.mark.parametrize("operation", ["experts", "layer", "route"])
def test_our_expert_kernels_pass_their_check(shards, monkeypatch, operation):
    """Interpreted where there is no GPU: the calls that would be timed are right."""
    monkeypatch.setattr(expert_step37, "GATES", 1)
    subject = Step37Experts()
    usable, reason = subject.available()
    assert usable, reason
    if operation == "route":
        cell = next(cell for cell in expert_cells.cells() if cell.operation == "route")
    else:
        cell = routed_cell(operation, "bf16", "bf16", FEW, "uniform", 12)
    trial = subject.trial(subject.prepare(cell), cell)
    with counted() as names:
        accuracy = trial.check()
    assert accuracy.holds, accuracy
    # Routed: sort, gate-up, down, combine; shared and router at most two each.
    assert 0 < len(names) <= {"route": 2, "experts": 4, "layer": 8}[operation]


def test_raw_weights_have_layers_of_realistic_size(shards):
    """Unit hidden values give outputs of about unit size, in every format."""
    for weight_format in ("bf16", "fp8", "nvfp4"):
        raw = raw_weights(weight_format, PART, 0)
        gate = raw.gate(0, torch.float32)
        assert gate.std().item() == pytest.approx(4096**-0.5, rel=0.3), weight_format
        assert torch.equal(gate, raw_weights(weight_format, PART, 0).gate(0, torch.float32))
        assert not torch.equal(gate, raw_weights(weight_format, PART, 1).gate(0, torch.float32))


def test_torch_grouped_mm_agrees_with_the_reference(shards):
    subject = TorchGroupedMM()
    if not subject.available()[0]:
        pytest.skip(subject.available()[1])
    cell = routed_cell("experts", "bf16", "bf16", SMALL, "uniform", 3)
    accuracy = subject.trial(subject.prepare(cell), cell).check()
    assert accuracy.holds, accuracy


@pytest.mark.parametrize("weight_format", ["bf16", "fp8"])
def test_sglang_triton_takes_our_arguments(shards, weight_format):
    subject = SGLangTriton()
    if not subject.available()[0]:
        pytest.skip(subject.available()[1])
    cell = routed_cell("experts", weight_format, weight_format, WHOLE, "uniform", 2)
    assert subject.refuses(cell) is None
    subject._experts = only_bound(subject._experts)
    trial = subject.trial(subject.prepare(cell), cell)
    with pytest.raises(Called) as called:
        trial.calls[0]()
    assert called.value.arguments["moe_runner_config"].inplace is False
    if weight_format == "fp8":
        scale = called.value.arguments["w1_scale"]
        assert scale.shape == (16, 2, 32)


def test_sglang_marlin_takes_our_arguments(shards):
    subject = SGLangMarlin()
    if not subject.available()[0]:
        pytest.skip(subject.available()[1])
    cell = routed_cell("experts", "nvfp4", "bf16", Shard("TP4", 288, 0, 320), "uniform", 2)
    assert subject.refuses(cell) is None
    subject._moe, subject._prepare = only_bound(subject._moe), only_bound(subject._prepare)
    small = routed_cell("experts", "nvfp4", "bf16", SMALL, "uniform", 2)
    raw = raw_weights("nvfp4", SMALL, 0)
    with pytest.raises(Called) as called:
        subject.convert(raw, small)
    layer = called.value.arguments["layer"]
    subject._workspace = only_bound(subject._workspace)
    with pytest.raises(Called):
        subject.run(layer, _batch(), small)
    subject._workspace = lambda device, blocks: None
    with pytest.raises(Called):
        subject.run(layer, _batch(), small)


def _batch():
    from benchmarks.expert_data import Batch

    ids = torch.zeros(2, 8, dtype=torch.int32)
    return Batch(torch.zeros(2, 4096).bfloat16(), torch.ones(2, 8), ids)


def test_sglang_refuses_what_its_kernels_cannot_do():
    def refused(subject: ExpertSubject, *settings: str) -> str | None:
        weights, activations, parallel = settings
        shard = expert_cells.SHARDS[parallel]
        return subject.refuses(routed_cell("experts", weights, activations, shard, "uniform", 1))

    assert "whole blocks" in str(refused(SGLangTriton(), "fp8", "fp8", "TP4"))
    assert refused(SGLangTriton(), "fp8", "fp8", "TP2") is None
    assert "160 columns" in str(refused(SGLangMarlin(), "nvfp4", "bf16", "TP8"))
    assert refused(SGLangMarlin(), "nvfp4", "bf16", "TP4") is None
    assert refused(SGLangMarlin(), "bf16", "bf16", "TP1") == "only nvfp4 x bf16"


def attention_cell(operation: str, kind: str, cache: str, **sizes: int) -> Cell:
    settings = {"kind": kind, "parallel": "TP4", "cache": cache, **sizes}
    return Cell("attention", operation, settings, 0, "group", Work(1, 1, 1, "bf16"), 1)


DECODE = {"batch": 2, "context": 700}
PREFILL = {"new": 100, "prefix": 500}


class PlainAttention(AttentionSubject):
    """The reference itself as an implementation, off by a factor."""

    name = library = "plain"
    gated = True

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def bind(self, problem: Problem, cell: Cell):
        slots = problem.slots(range(problem.seq_lens.shape[0]))
        return lambda k, v: self.factor * attend(
            problem.q, k, v, slots, problem.seq_lens, problem.query_lens,
            attention_data.SOFTMAX_SCALE, problem.heads.window, problem.k_scale,
            problem.v_scale, problem.head_gate,
        )  # fmt: skip


@pytest.mark.parametrize("cache", ["fp8", "bf16"])
@pytest.mark.parametrize("kind", ["full", "sliding"])
@pytest.mark.parametrize(("operation", "sizes"), [("decode", DECODE), ("prefill", PREFILL)])
def test_attention_check_passes_what_is_right_and_no_more(
    single_copies, operation, sizes, kind, cache
):
    cell = attention_cell(operation, kind, cache, **sizes)
    for factor, holds in ((1.0, True), (1.05, False), (float("nan"), False)):
        subject = PlainAttention(factor)
        trial = subject.trial(subject.prepare(cell), cell)
        assert trial.check().holds == holds


@pytest.mark.parametrize(
    ("operation", "sizes"), [("decode", DECODE), ("prefill", PREFILL), ("prologue", {"tokens": 9})]
)
def test_our_attention_kernels_pass_their_check(single_copies, operation, sizes):
    """Interpreted where there is no GPU: the calls that would be timed are right."""
    subject = Step37Attention()
    usable, reason = subject.available()
    assert usable, reason
    cell = attention_cell(operation, "sliding", "fp8", **sizes)
    trial = subject.trial(subject.prepare(cell), cell)
    with counted() as names:
        accuracy = trial.check()
    assert accuracy.holds, accuracy
    assert len(names) == {"decode": 2, "prefill": 1, "prologue": 1}[operation]


def test_sliding_problems_hold_only_the_window(single_copies):
    problem = make_problem(attention_cell("decode", "sliding", "fp8", **DECODE), 1)
    first, end = stored_pages(heads("sliding", 4), 700)
    assert (first, end) == (2, 11)  # keys 188..699 are in pages 2..10
    assert problem.k.shape == (1, 2 * 9 * 64, 2, 128)
    used = problem.page_table[:, first:].flatten().sort().values
    assert used.tolist() == list(range(18))


@pytest.mark.parametrize("cache", ["fp8", "bf16"])
@pytest.mark.parametrize(("operation", "sizes"), [("decode", DECODE), ("prefill", PREFILL)])
@pytest.mark.parametrize("kind", ["full", "sliding"])
def test_sglang_attention_takes_our_arguments(single_copies, operation, sizes, kind, cache):
    subject = SGLangAttention()
    if not subject.available()[0]:
        pytest.skip(subject.available()[1])
    subject._decode, subject._extend = only_bound(subject._decode), only_bound(subject._extend)
    cell = attention_cell(operation, kind, cache, **sizes)
    problem = make_problem(cell, 1)
    with pytest.raises(Called) as called:
        subject.bind(problem, cell)(problem.k[0], problem.v[0])
    given = called.value.arguments
    seen = min(700, 512) if kind == "sliding" else 700
    if operation == "decode":
        assert given["kv_indptr"].tolist() == [0, seen, 2 * seen]
        assert given["kv_indices"].shape == (2 * seen,)
    else:
        assert given["kv_indptr"].tolist() == [0, 500] and given["kv_indices"].shape == (500,)
        assert given["sliding_window_size"] == (511 if kind == "sliding" else -1)
        assert given["max_len_extend"] == 100


@pytest.mark.parametrize("kind", ["full", "sliding"])
def test_flex_attention_agrees_with_the_reference(single_copies, kind):
    from torch.nn.attention.flex_attention import flex_attention

    subject = FlexAttention()
    subject.load()
    subject._flex = flex_attention  # uncompiled: the compiler needs minutes and a C++ compiler
    cell = attention_cell("prefill", kind, "bf16", **PREFILL)
    assert subject.refuses(cell) is None
    accuracy = subject.trial(make_problem(cell, 1), cell).check()
    assert accuracy.holds, accuracy
