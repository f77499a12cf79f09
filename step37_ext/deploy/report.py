"""A plan as a person reads it, and as JSON."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from step37_ext.deploy.command import HEAD_NODE, environment
from step37_ext.deploy.estimate import LAUNCH_US, REACHED, Estimate, estimate
from step37_ext.deploy.hardware import GIB
from step37_ext.deploy.memory import DEFAULT_SLIDING_RATIO, release
from step37_ext.deploy.plans import Plan, Request
from step37_ext.model.dense_format import has_to_be_named

_PARTS = {
    "experts": "routed experts",
    "attention": "attention",
    "dense": "dense and shared MLPs, routers",
    "embeddings": "embedding and head",
    "vision": "vision encoder",
    "drafts": "MTP layers",
}
Row = tuple[str, int, str]


def print_plan(plan: Plan, commands: list[str]) -> None:
    """Print memory, reasons and commands of a shell; a table with rules only on a terminal."""
    fits = "fits" if plan.fits else "does not fit"
    print(f"{_title(plan.request)}: {fits}\n")
    print_rows(list(memory_rows(plan)))
    print()
    for sentence in reasons(plan):
        print(f"- {sentence}")
    print(f"\n{speed(plan) if plan.fits else no_fit(plan)}")
    for command in commands:
        print(f"\n{command}")


def print_rows(rows: list[Row]) -> None:
    """Rows of label, bytes and note, in GiB."""
    if not sys.stdout.isatty():
        for label, size, note in rows:
            print(f"{label:<36}{size / GIB:>8.2f}  {note}".rstrip())
        return
    table = Table("", Column("GiB", justify="right"), "")
    for label, size, note in rows:
        table.add_row(label, f"{size / GIB:.2f}", note)
    Console().print(table)


def memory_rows(plan: Plan) -> Iterator[Row]:
    """Where each GPU's memory goes: label, bytes, note."""
    memory, workload = plan.memory, plan.request.workload
    chunk = memory.settings.prefill_chunk
    yield "memory of each GPU", memory.total, ""
    yield "driver, CUDA context, NCCL", memory.outside, "assumed"
    reserve = f"SGLang's reserve for prefill chunks of {chunk} tokens"
    yield "activations, CUDA graphs, images", memory.reserve, reserve
    yield "cache of image features", memory.image_cache, ""
    yield "weights", sum(memory.weights.values()), ""
    for part, size in memory.weights.items():
        yield f"  {_PARTS[part]}", size, ""
    yield "for the KV cache", memory.pool, f"holds {memory.capacity} tokens of context"
    load = f"{workload.concurrency} x {workload.context} tokens"
    yield "  asked for", memory.needed, load
    yield "  left" if plan.fits else "  missing", abs(memory.left), ""


def reasons(plan: Plan) -> Iterator[str]:
    """Why the plan is as it is, one sentence each."""
    cost, settings, text = plan.memory.cost, plan.memory.settings, release().text
    full = sum(layer.attention.window is None for layer in text.layers)
    sliding = len(text.layers) - full + plan.request.mtp * text.num_mtp_layers
    yield (
        f"KV cache ({plan.cache}): {cost.full / 1024:g} KiB a token in the {full} full layers; "
        f"{cost.sliding / 1024:g} KiB in the {sliding} sliding ones, which need the last "
        f"{text.window} tokens of a request and get {settings.sliding_ratio:g} of the full "
        "layers' tokens"
    )
    if plan.fits and settings.sliding_ratio != DEFAULT_SLIDING_RATIO:
        yield (
            "--swa-full-tokens-ratio: SGLang's default of "
            f"{DEFAULT_SLIDING_RATIO} would leave too little for this; fewer shared prefixes stay "
            "cached"
        )
    if plan.fits and settings.prefill_chunk != plan.gpu.prefill_chunk:
        yield "--chunked-prefill-size: smaller chunks need less memory for activations"
    if plan.request.dense_weights == "fp8":
        yield (
            "--dense-weights fp8: projections of the attention, the dense MLPs and the shared "
            "expert are loaded in BF16 and made FP8 one by one, before the KV cache is allocated; "
            "their rounding is in docs/numerics.md"
        )
    yield from _parallel_reasons(plan)
    if plan.request.quant == "nvfp4" and plan.gpu.family == "Hopper":
        yield (
            "NVFP4 on Hopper: stock SGLang drops the activation's bound in layers 43 and 44 there; "
            "this needs --model-impl step37"
        )
    if plan.request.nodes > 1:
        yield f"one command for each node; put the first node's address for {HEAD_NODE}"


def _parallel_reasons(plan: Plan) -> Iterator[str]:
    text, tp, ep = release().text, plan.parallel.tp_size, plan.parallel.ep_size
    if tp == 1:
        return
    heads = {layer.attention.num_heads // tp for layer in text.layers}
    kv = text.layers[0].attention.num_kv_heads
    repeated = f", each of the {kv} KV heads on {tp // kv} GPUs" if tp > kv else ""
    yield f"--tp {tp}: {' and '.join(map(str, sorted(heads)))} query heads on each GPU{repeated}"
    others = ", ".join(str(n) for n in plan.expert_choices if n != ep)
    held = f"{text.num_experts // ep} experts"
    width = text.moe_intermediate // (tp // ep)
    part = "whole" if tp == ep else f"{width} of {text.moe_intermediate} columns each"
    yield (
        f"--ep-size {ep}: {held} on each GPU, {part}, as on the deployment page; "
        f"{others} would do too: the more ranks share an expert, the more evenly few requests "
        "are spread, and the narrower the matrices"
    )


def speed(plan: Plan) -> str:
    """The estimate of a plan's speed, with what it rests on."""
    found, load = estimate(plan), plan.request.workload
    shares = f"{REACHED[0]:.0%} to {REACHED[1]:.0%}"
    text = (
        f"Estimate, not measured: {_tokens(found)} tokens/s while decoding "
        f"{load.concurrency} x {load.context} tokens{_with_drafts(plan, found)}. "
        f"{plan.gpu.sheet.name}'s data sheet allows a step of {found.floor_us / 1e3:.2f} ms, of "
        f"which {shares} are assumed to be reached, and {found.launches} kernels to start in "
        f"{LAUNCH_US[1]:g} to {LAUNCH_US[0]:g} us each"
    )
    if found.all_reduces:
        slow, fast = found.all_reduce_us
        text += f", with {found.all_reduces} all-reduces of {fast:g} to {slow:g} us each"
    return text


def _tokens(found: Estimate, accepted: int = 0) -> str:
    low, high = found.tokens_per_s(accepted)
    return f"{low:.0f} to {high:.0f}"


def _with_drafts(plan: Plan, found: Estimate) -> str:
    """What each number of accepted drafts gives, and what there would be without any."""
    if not found.drafts:
        return ""
    others = [f"{_tokens(found, n)} if {n}" for n in range(1, found.drafts + 1)]
    plain = estimate(replace(plan, request=replace(plan.request, mtp=False)))
    return (
        f" if a step accepts none of its {found.drafts} drafts, {', '.join(others)}; how many are "
        f"accepted is not known. Without --mtp it is {_tokens(plain)}"
    )


def no_fit(plan: Plan) -> str:
    """What is missing, and which plans fit."""
    text = f"Each GPU lacks {-plan.memory.left / GIB:.2f} GiB. "
    if not plan.nearest:
        return text + "No plan of this format on these GPUs fits."
    lines = "".join(f"\n    {shlex.join(plan_command(request))}" for request in plan.nearest)
    return text + f"These fit, the nearest first:{lines}"


def plan_command(request: Request) -> list[str]:
    """`step37 command` with the options of a request."""
    command = ["step37", "command", "--gpu", request.gpu, "--count", str(request.count)]
    if request.nodes > 1:
        command += ["--nodes", str(request.nodes)]
    command += ["--quant", request.quant]
    for name in ("context", "concurrency"):
        if (value := getattr(request, name)) is not None:
            command += [f"--{name}", str(value)]
    command += [f"--{x}" for x in ("reasoning", "tools", "mtp") if getattr(request, x)]
    if has_to_be_named(request.dense_weights):
        command += ["--dense-weights", request.dense_weights]
    return command


def _title(request: Request) -> str:
    nodes = f"{request.nodes} nodes of " if request.nodes > 1 else ""
    return f"{request.quant.upper()} on {nodes}{request.count} x {request.gpu.upper()}"


def as_json(plan: Plan, commands: list[list[str]]) -> dict[str, Any]:
    """Everything that `print_plan` says, sizes in bytes."""
    memory = plan.memory
    return {
        "request": asdict(plan.request),
        "fits": plan.fits,
        "tp_size": plan.parallel.tp_size,
        "ep_size": plan.parallel.ep_size,
        "possible_ep_sizes": list(plan.expert_choices),
        "memory_per_gpu": {
            "total": memory.total,
            "outside_sglang": memory.outside,
            "activations_and_graphs": memory.reserve,
            "image_cache": memory.image_cache,
            "weights": memory.weights,
            "kv_cache_available": memory.pool,
            "kv_cache_needed": memory.needed,
            "left": memory.left,
        },
        "kv_cache": {
            "dtype": plan.cache,
            "bytes_per_token_full_layers": memory.cost.full,
            "bytes_per_token_sliding_layers": memory.cost.sliding,
            "sliding_tokens_per_full_token": memory.settings.sliding_ratio,
            "capacity_tokens": memory.capacity,
            "context": plan.request.workload.context,
            "concurrency": plan.request.workload.concurrency,
        },
        "estimate_not_measured": _speed_json(estimate(plan)) if plan.fits else None,
        "reasons": list(reasons(plan)),
        "environment": environment(plan),
        "commands": commands,
        "nearest": [plan_command(request) for request in plan.nearest],
    }


def _speed_json(found: Estimate) -> dict[str, Any]:
    return {
        "decode_tokens_per_s": [
            {"drafts_accepted": n, "low": low, "high": high}
            for n in range(found.drafts + 1)
            for low, high in [found.tokens_per_s(n)]
        ],
        "step_us": {"slow": found.step_us[0], "fast": found.step_us[1]},
        "floor_us": found.floor_us,
        "assumed_share_of_floor": {"low": REACHED[0], "high": REACHED[1]},
        "launches": found.launches,
        "assumed_launch_us": {"slow": LAUNCH_US[0], "fast": LAUNCH_US[1]},
        "all_reduces": found.all_reduces,
        "assumed_all_reduce_us": {"slow": found.all_reduce_us[0], "fast": found.all_reduce_us[1]},
        "sending_us": found.sent_us,
    }
