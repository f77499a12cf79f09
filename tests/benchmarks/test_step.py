"""The step benchmark: its model is the model, its check finds mistakes, its plan adds up."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from torch import Tensor

from benchmarks import step, step_check, step_report, step_step37, step_tiny
from benchmarks.harness.cells import GIB, Accuracy
from benchmarks.harness.hardware import Machine
from benchmarks.harness.limits import Measured
from benchmarks.harness.results import MEASURED, TOO_BIG, WRONG, Result, Store
from benchmarks.harness.run import Run, ordered
from benchmarks.shapes import TEXT
from benchmarks.step_breakdown import OUTSIDE, Span, divided, short
from benchmarks.step_cells import (
    Settings,
    cell,
    cells,
    chosen_layers,
    described,
    scaled_time,
    step_of,
)
from benchmarks.step_check import check, checked_layers, checked_tokens
from benchmarks.step_data import distinct_experts, prefill_batch, selection_bias, skew_routing
from benchmarks.step_model import Batch, MoEBlock, StepModel
from benchmarks.step_norm import Norm
from benchmarks.step_weights import Maker, Spec, reference
from step37_ext.checkpoint.init import initial_weights
from step37_ext.checkpoint.oracle import load_model
from step37_ext.checkpoint.spec import TINY
from step37_ext.deploy.expected_experts import chances
from step37_ext.deploy.memory import release, weights_per_gpu
from step37_ext.model.config import TextShape
from step37_ext.model.forward import LayerCache, Paging
from step37_kernels.launch import counted
from step37_kernels.reference.norm import gemma_rms_norm

CPU = torch.device("cpu")
TINY_TEXT = TextShape.from_config(SimpleNamespace(**TINY.text_config([1])))
ALL = tuple(range(TINY.layers))
DATA_SHEET = {"bandwidth": 4.8e12, "flops": {"bf16": 989e12}}  # an H200's


def tiny_spec(dense: str = "bf16", ranks: int = 1) -> Spec:
    return Spec(TINY_TEXT, ALL, ranks, "nvfp4", dense, CPU)


# ---- the model


def test_step_is_transformers_model():
    """With a checkpoint's weights, prefill and then decode give transformers' logits."""
    weights = initial_weights(TINY)
    tokens = torch.randint(
        20, TINY.vocab_size, (2 * TINY.sliding_window + 21,),
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    with torch.no_grad():
        expected = load_model(TINY, weights)(input_ids=tokens[None]).logits[0]
    model = Maker(Spec(TINY_TEXT, ALL, 1, "bf16", "bf16", CPU), reference, exact=True).model()
    load(model, weights)
    whole = with_plain_cache(prefill_batch(TINY_TEXT, 1, len(tokens), CPU))
    *prompt, last = range(len(tokens))
    found = model(replace(whole.beginning(len(prompt)), input_ids=tokens[:-1]))
    newest = [replace(one, query_lens=None, paging=newest_slot(one)) for one in whole.caches]
    decoded = model(Batch(tokens[last:], torch.tensor([last]), newest))
    # fp32 against fp32: sums in another order, as tests/model/expected.py explains its bound.
    torch.testing.assert_close(torch.cat([found, decoded]), expected, rtol=0, atol=1e-3)


def newest_slot(cache: LayerCache) -> Paging:
    return replace(cache.paging, new_slots=cache.paging.new_slots[-1:])


def load(model: StepModel, weights: dict[str, Tensor]) -> None:
    """Put a checkpoint's tensors in the place of the random ones."""
    model.embedding = weights["model.embed_tokens.weight"]
    model.norm.weight = weights["model.norm.weight"]
    model.head.weight = weights["lm_head.weight"]
    for layer in model.layers:
        prefix = f"model.layers.{layer.index}."
        own = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        layer.input_layernorm.weight = own["input_layernorm.weight"]
        layer.post_attention_layernorm.weight = own["post_attention_layernorm.weight"]
        block = layer.self_attn
        parts = [own[f"self_attn.{name}_proj.weight"] for name in "qkv"]
        block.qkv_proj.weight = torch.cat(parts)
        block.o_proj.weight = own["self_attn.o_proj.weight"]
        block.g_proj.weight = own["self_attn.g_proj.weight"]
        block.q_norm, block.k_norm = (own[f"self_attn.{name}_norm.weight"] for name in "qk")
        feed = layer.feed_forward
        name = "share_expert" if isinstance(feed, MoEBlock) else "mlp"
        up = torch.cat([own[f"{name}.{half}_proj.weight"] for half in ("gate", "up")])
        down = own[f"{name}.down_proj.weight"]
        if isinstance(feed, MoEBlock):
            feed.gate, feed.router_bias = own["moe.gate.weight"], own["moe.router_bias"]
            feed.share_expert = replace(
                feed.share_expert,
                gate_up_proj=SimpleNamespace(weight=up),
                down_proj=SimpleNamespace(weight=down),
            )
            for key, put in feed.experts.loaders().items():
                put(own[f"moe.{key}"])
        else:
            feed.gate_up_proj.weight, feed.down_proj.weight = up, down


def with_plain_cache(batch: Batch) -> Batch:
    """In fp32, so that nothing is rounded."""

    def plain(cache: LayerCache) -> LayerCache:
        k, v = (torch.zeros(cache.k_cache.shape) for _ in "kv")
        return replace(cache, k_cache=k, v_cache=v)

    return replace(batch, caches=[plain(cache) for cache in batch.caches], last=None)


def test_kernels_pass_the_check_and_a_mistake_does_not(monkeypatch: pytest.MonkeyPatch):
    """Interpreted, FP8 dense weights included, as one rank of two."""
    monkeypatch.setenv("STEP37_IMPL", "interpret")
    spec = tiny_spec("fp8", ranks=2)
    settings = Settings("decode", "nvfp4", "fp8", 2, "zipf", len(ALL), batch=2, context=150)
    prepared = step_step37.made(spec)
    assert set(prepared.implementations.values()) == {"interpret", "benchmarks/step_norm.py"}
    batch = step_step37.inputs(spec, prepared.model, settings)
    with counted() as names:
        found = check(spec, prepared.model, batch)
    assert 0 < found.relative_l2 <= found.allowed
    few = replace(spec.part, layers=tuple(spec.part.layers[n] for n in checked_layers(spec)))
    torchs = 2 + len(few.layers)  # embedding and head, and each layer's head gate
    assert len(names) == step_of(few, settings).launches - torchs, Counter(names)
    prepared.model.layers[0].self_attn.scaling *= 1.25
    assert not check(spec, prepared.model, batch).holds


def test_prefill_passes_the_check_and_a_mistake_does_not(monkeypatch: pytest.MonkeyPatch):
    """With the references in bf16 in the kernels' place, which round as they do."""
    monkeypatch.setenv("STEP37_IMPL", "reference")
    settings = Settings("prefill", "nvfp4", "bf16", 1, "uniform", len(ALL), new=150)
    prepared = step_step37.made(tiny_spec())
    batch = step_step37.inputs(prepared.spec, prepared.model, settings)
    found = check(prepared.spec, prepared.model, batch)
    assert 0 < found.relative_l2 <= found.allowed
    block = prepared.model.layers[-1].feed_forward
    block.limit = None
    block.share_expert = replace(block.share_expert, limit=None)
    assert not check(prepared.spec, prepared.model, batch).holds


def test_prefill_is_checked_behind_the_window():
    tokens = checked_tokens(TEXT)
    assert tokens - tokens // 4 >= (TEXT.window or 0) == 512


def eager(calls):
    """A graph's replay that is the call itself."""
    calls[0]()
    return calls[0]


def test_a_graph_that_does_less_than_its_step_is_found(monkeypatch: pytest.MonkeyPatch):
    step = torch.randn(3, 200, generator=torch.Generator().manual_seed(0))
    for replay, right in ((eager, True), (lambda calls: calls[0]() or (lambda: None), False)):
        monkeypatch.setattr(step_check, "captured", replay)
        assert step_check.check_graph(step.clone, 45).holds == right


def test_norm_is_the_references(device: torch.device):
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(3, 200, generator=generator).bfloat16().to(device) for _ in "xr")
    weight = torch.randn(200, generator=generator).bfloat16().to(device)
    norm = Norm(weight, 1e-5)
    torch.testing.assert_close(norm(x), gemma_rms_norm(x, weight, 1e-5), rtol=2**-7, atol=0)
    added = x.float() + residual.float()
    out, total = norm(x.clone(), residual.clone())
    assert torch.equal(total, added.bfloat16())
    expected = gemma_rms_norm(added, weight, 1e-5).bfloat16()
    torch.testing.assert_close(out, expected, rtol=2**-7, atol=0)


def test_a_run_keeps_what_a_step_says(tmp_path, monkeypatch, fixed_timing):
    """From cell to results file with the tiny model; only what needs a GPU is replaced."""
    monkeypatch.setenv("STEP37_IMPL", "reference")
    monkeypatch.setattr(step_step37, "TEXT", TINY_TEXT)
    monkeypatch.setattr(step_step37, "time_calls", fixed_timing)
    for module in (step_step37, step_check):
        monkeypatch.setattr(module, "captured", eager)
    rows = divided(list(steps(5)), 5)
    monkeypatch.setattr(step_step37.step_breakdown, "profiled", lambda run: run() is None or rows)
    settings = Settings("decode", "fp8", "bf16", 1, "zipf", 3, batch=3, context=100)
    asked = cell(TINY_TEXT, chosen_layers(TINY_TEXT, 3), settings)
    machine, limits = Machine("cpu", 0, 0, 0, {}, {}, None, "s"), Measured(1e12, 1e12, {})
    store = Store(tmp_path / "r.json")
    run = Run(store, machine, limits, 1e9, timer=fixed_timing, kernels=lambda call: 5)
    ((_, result),) = run.over(ordered([asked], [step_step37.Step37Step()]))
    assert result is not None and result.status == MEASURED, result
    (kept,) = Store(tmp_path / "r.json")
    assert kept.details is not None and kept.details == result.details
    assert kept.details["tokens_per_s"] == 3 / 100e-6
    assert kept.details["breakdown"][0] == {"name": "cutlass::gemm", "launches": 2, "us": 70.0}
    assert kept.details["scaled"]["how"].startswith("scaled from 3 of 4 layers")
    assert kept.details["implementations"]["norm"] == "benchmarks/step_norm.py"
    assert TINY.top_k <= kept.details["distinct_experts"] <= TINY.experts
    assert kept.launches == ["add_rms_norm_kernel"] * 7  # two a layer and the last
    monkeypatch.setattr(step_step37, "check_graph", lambda run, layers: Accuracy(1.0, layers / 9))
    again = replace(run, store=Store(tmp_path / "another.json"))
    ((_, result),) = again.over(ordered([asked], [step_step37.Step37Step()]))
    assert result is not None and (result.status, result.time_us) == (WRONG, None)


# ---- routing


@pytest.mark.parametrize("skew", [0.0, 1.0])
def test_router_bias_gives_the_chances_of_the_skew(skew: float):
    """Top-8 of sigmoid(normal) + bias, drawn often, beside the chances that were asked for."""
    wanted = torch.tensor(chances(288, 8, skew))
    draws = torch.randn(20000, 288, generator=torch.Generator().manual_seed(0)).sigmoid()
    ids = (draws + selection_bias(288, 8, skew)).topk(8).indices
    found = ids.flatten().bincount(minlength=288) / len(ids)
    # A threshold that is the same for all tokens is what the bias supposes and only nearly so.
    assert (found - wanted).abs().max() < 0.02
    assert (found - wanted).abs().sum() < 0.05 * 8


def test_skewed_model_uses_fewer_experts():
    model = Maker(tiny_spec(), reference, exact=True).model()
    model.embedding = model.embedding.float()
    batch = prefill_batch(TINY_TEXT, 1, 8, CPU)
    used = []
    for skew in (0.0, 6.0):
        skew_routing(model, skew)
        used.append(distinct_experts(model, batch))
    assert used[1] < used[0] <= TINY.experts


# ---- the plan


def test_weights_are_what_the_release_needs():
    """vLLM's recipe asks for 119 GB with NVFP4: 42 * 288 * 3 * 1280 * 4096 = 190.3e9 weights of
    experts at 9/16 byte and 6.3e9 others at 2 bytes are 119.6e9."""
    parts = weights_per_gpu(release(), "nvfp4", 1, drafts=False)
    weights = sum(parts.values()) - parts["vision"]
    assert weights == pytest.approx(119.6e9, rel=0.01)
    # Beside them: one layer's experts and an fp32 head for the check, and a GiB.
    assert weights < decode(batch=1, context=1024).memory < weights + 7.5e9


def decode(**sizes: int):
    settings = Settings("decode", "nvfp4", "bf16", 1, "uniform", len(TEXT.layers), **sizes)
    return cell(TEXT, range(len(TEXT.layers)), settings)


def test_cache_counts_what_a_server_would_hold():
    """24 KiB a token in the 12 full layers; sliding layers hold a window and part of a page."""
    grown = decode(batch=64, context=65536).memory - decode(batch=64, context=8192).memory
    checked = 4 * 4 * 8 * 128 * (65536 - 8192)  # four times in fp32 for the check
    assert grown == 64 * (65536 - 8192) * 24576 + checked


def test_cells_that_do_not_fit_say_so(tmp_path):
    machine = Machine("NVIDIA H200", 90, 132, 150_100_000_000, {}, {}, None, "s")
    clocks = {"clock": lambda: 0.0, "free": lambda: 149.5e9}
    run = Run(Store(tmp_path / "r.json"), machine, Measured(4e12, 4e12, {}), 1e9, **clocks)
    sizes = [(1, 262144), (64, 8192), (64, 65536)]
    fits = [decode(batch=b, context=c).memory < 149.5e9 for b, c in sizes]
    assert fits == [True, True, False]
    ((_, result),) = run.over(
        ordered([decode(batch=64, context=65536)], [step_step37.Step37Step()])
    )
    assert (result.status, result.time_us) == (TOO_BIG, None)
    needed = decode(batch=64, context=65536).memory / GIB
    assert result.reason == f"{needed:.1f} GiB of 139.2 free"


def test_most_telling_cells_come_first():
    first = sorted(cells(), key=lambda one: one.priority)[:2]
    assert [(one.settings["batch"], one.settings["context"]) for one in first] == [
        (1, 8192),
        (64, 8192),
    ]
    common = ("nvfp4", "bf16", "TP1", "uniform")
    for one in first:
        assert tuple(one.settings[k] for k in ("format", "dense", "parallel", "routing")) == common
    assert [Settings.of(one).shown() for one in first] == [one.settings for one in first]


def test_layers_keep_the_shares_of_their_kinds():
    assert chosen_layers(TEXT, 45) == tuple(range(45))
    assert described(TEXT, chosen_layers(TEXT, 15)) == (
        "0 of 1 dense full, 1 of 2 dense sliding, 10 of 31 experts sliding, 4 of 11 experts full"
    )
    for count in range(1, 46):
        chosen = chosen_layers(TEXT, count)
        assert len(set(chosen)) == count
    with pytest.raises(ValueError, match="--layers is 46, expected 1 to the model's 45 layers"):
        chosen_layers(TEXT, 46)


def test_scaled_time_of_an_ideal_machine_is_its_time():
    """A machine that does every operation at 80% of its floor: the scaled figure is exact."""
    settings = Settings("decode", "nvfp4", "bf16", 1, "uniform", 10, batch=64, context=8192)
    part = replace(TEXT, layers=tuple(TEXT.layers[i] for i in chosen_layers(TEXT, 10)))
    run, whole = step_of(part, settings), step_of(TEXT, settings)
    head = sum(
        one.floor(**DATA_SHEET) for one in run.operations
        if one.name in ("embedding", "first norm", "lm_head")
    )  # fmt: skip
    time = scaled_time(run.floor(**DATA_SHEET) / 0.8, head / 0.8, run, whole, **DATA_SHEET)
    assert time == pytest.approx(whole.floor(**DATA_SHEET) / 0.8)


# ---- the breakdown and the tables


def steps(count: int) -> Iterator[Span]:
    """Steps of 100 us: a, b that begins before its end, 8 us of nothing, a again, 10 of nothing."""
    for number in range(count):
        start = 100.0 * number
        yield Span("void cutlass::gemm<bf16>(int)", start, start + 30)
        yield Span("b_kernel", start + 25, start + 42)
        yield Span("void cutlass::gemm<bf16>(float)", start + 50, start + 90)


def test_breakdown_adds_up_to_the_step():
    rows = divided(list(steps(5)), 5)
    assert [(row.name, row.launches, row.us) for row in rows] == [
        ("cutlass::gemm", 2, 70.0), ("b_kernel", 1, 12.0), (OUTSIDE, 0, 18.0)
    ]  # fmt: skip
    assert sum(row.us for row in rows) == 100.0
    assert short("route_topk_kernel") == "route_topk_kernel"


def test_breakdown_of_unlike_steps_is_refused():
    with pytest.raises(RuntimeError, match="14 launches in 5 steps"):
        divided(list(steps(5))[:-1], 5)
    unlike = [*list(steps(5))[:-1], Span("another", 450.0, 490.0)]
    with pytest.raises(RuntimeError, match="15 launches in 5 steps, not the same in each"):
        divided(unlike, 5)
    with pytest.raises(RuntimeError, match="0 launches"):
        divided([], 5)


def test_tables_show_speed_scaling_and_where_the_time_went():
    spec = Spec(TEXT, chosen_layers(TEXT, 15), 1, "nvfp4", "bf16", CPU)
    settings = Settings("decode", "nvfp4", "bf16", 1, "uniform", 15, batch=8, context=8192)
    limits = Measured(4e12, 4e12, {"bf16": 7e14})
    prepared = step_step37.Prepared(spec, None, {})
    details = step_step37.said(prepared, settings, 60.0, 5000.0, limits)
    details["scaled"] = step_step37.scaled(spec, settings, 60.0, 5000.0, 500.0, limits)
    details["breakdown"] = [
        {"name": row.name, "launches": row.launches, "us": row.us}
        for row in divided(list(steps(5)), 5)
    ]
    assert details["tokens_per_s"] == 1600.0
    found = cell(TEXT, spec.chosen, settings)
    result = Result(
        "step", "decode", found.settings, "step37", "", MEASURED, {}, {},
        time_us={"median": 5000.0}, details=details,
    )  # fmt: skip
    printed = io.StringIO()
    for table in step_report.tables([result]):
        Console(width=300, file=printed).print(table)
    text = printed.getvalue()
    assert "1600.0" in text and "measured, without sampling" in text
    assert "scaled from 15 of 45 layers (0 of 1 dense full" in text and "not measured" in text
    assert "outside kernels" in text and "100.0%" in text


def test_command_without_a_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(step_tiny, "table", lambda: "the tiny model")
    only = ["--only", "batch=1", "--only", "context=8192", "--only", "routing=uniform"]
    done = CliRunner().invoke(step.main, [*only, "--layers", "20"], env={"COLUMNS": "220"})
    assert done.exit_code == 0, done.output
    assert "nothing is measured" in done.output
    assert "decode format=nvfp4 dense=fp8 parallel=TP1 routing=uniform layers=20" in done.output
    refused = CliRunner().invoke(step.main, ["--layers", "46"])
    assert refused.exit_code == 2 and "46 is not in the range 1<=x<=45" in refused.output
