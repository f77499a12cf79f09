"""The call of FlashInfer: its arguments, against its real source and a stand-in that computes."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import sys
import zipfile
from collections.abc import Callable, Iterator
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from step37_kernels.dispatch import Target
from step37_kernels.expert_weights import BF16Experts, ExpertWeights, FP8Experts, NVFP4Experts
from step37_kernels.experts import flashinfer_cutlass
from step37_kernels.experts.flashinfer_cutlass import InputScales, prepare, swizzle_block_scales
from step37_kernels.formats import nvfp4
from step37_kernels.reference.experts import experts as reference
from tests.experts.bounds import expect

WHEEL_VARIABLE = "STEP37_FLASHINFER_WHEEL"
SM100 = Target("cuda", (10, 0), "nvfp4")
# 160 and 96: 10 and 6 scales a row, and 320 rows of w13, all of which the swizzle has to pad.
E, K, N, TOP_K = 3, 96, 160, 2
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]).double()


class ActivationType(IntEnum):
    Swiglu = 3
    SwigluStep = 7


class StandIn:
    """flashinfer.fused_moe in fp64, from the arrays that it is handed; remembers its arguments.

    It follows the order of the CUDA sources. `rounding` is what it does to activations where
    FlashInfer rounds them to NVFP4, after multiplying by their global scale.
    """

    ActivationType = ActivationType

    def __init__(self, rounding: Callable[[Tensor], Tensor]) -> None:
        self.rounding = rounding
        self.calls: list[dict[str, Any]] = []

    def cutlass_fused_moe(
        self, input: Tensor, token_selected_experts: Tensor, token_final_scales: Tensor,
        fc1_expert_weights: Tensor, fc2_expert_weights: Tensor, output_dtype: torch.dtype,
        quant_scales: list[Tensor] | None, swiglu_limit: Tensor | None, ep_size: int, ep_rank: int,
        output: Tensor, activation_type: ActivationType, use_fused_finalize: bool,
    ) -> list[Tensor]:  # fmt: skip
        names = inspect.signature(self.cutlass_fused_moe).parameters
        here = locals()
        self.calls.append({name: here[name] for name in names})
        count = len(fc1_expert_weights)
        assert 0 <= ep_rank < ep_size and token_selected_experts.dtype == torch.int32
        total = torch.zeros(output.shape, dtype=torch.float64)
        for token, choice in token_selected_experts.ge(0).nonzero().tolist():
            e = int(token_selected_experts[token, choice]) - ep_rank * count
            if not 0 <= e < count:
                continue
            x, scales = input[token].double(), quant_scales or []
            up, gate = self.product(fc1_expert_weights, scales[:3], e, x).chunk(2)
            gate = torch.nn.functional.silu(gate)
            if activation_type == ActivationType.SwigluStep:
                limit = 7.0 if swiglu_limit is None else float(swiglu_limit[e])
                gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            down = self.product(fc2_expert_weights, scales[3:], e, gate * up)
            total[token] += token_final_scales[token, choice].double() * down
        output.copy_(total.to(output_dtype))
        return [output]

    def product(self, weights: Tensor, scales: list[Tensor], e: int, x: Tensor) -> Tensor:
        if not scales:
            return weights[e].double() @ x
        act_global, blocks, factor = scales
        packed = weights[e].view(torch.uint8)
        elements = E2M1[torch.stack([packed & 15, packed >> 4], -1).flatten(1).long()]
        matrix = elements * read_scales(blocks, e, *elements.shape).repeat_interleave(16, 1)
        return matrix @ self.rounding(x * act_global[e].double()) * factor[e].double()


def read_scales(blocks: Tensor, e: int, rows: int, columns: int) -> Tensor:
    """Block scales of a matrix [rows, columns], by the offset that FlashInfer's source computes."""
    groups = columns // 16
    tiles = -(-groups // 4)
    assert blocks.shape[1:] == (-(-rows // 128) * 128, tiles) and blocks.dtype == torch.int32
    m, k = torch.arange(rows)[:, None], torch.arange(groups)
    offset = (m // 128 * tiles + k // 4) * 512 + m % 32 * 16 + m % 128 // 32 * 4 + k % 4
    return blocks[e].view(torch.uint8).flatten()[offset].view(torch.float8_e4m3fn).double()


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., StandIn]:
    """Puts a stand-in in flashinfer's place; by default activations are not rounded."""

    def put(rounding: Callable[[Tensor], Tensor] = lambda x: x) -> StandIn:
        stand_in = StandIn(rounding)
        monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace())
        monkeypatch.setitem(sys.modules, "flashinfer.fused_moe", stand_in)
        return stand_in

    return put


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def bf16_experts() -> BF16Experts:
    w13, w2 = torch.randn(E, 2 * N, K) * K**-0.5, torch.randn(E, K, N) * N**-0.5
    return BF16Experts(w13.bfloat16(), w2.bfloat16())


def nvfp4_experts(ratio: float) -> NVFP4Experts:
    """Gate and up of the same size, up's global scale `ratio` times gate's."""
    gate, up = torch.randn(2, E, N, K) * K**-0.5
    first = nvfp4.quantize(gate)
    second, third = (
        nvfp4.quantize(up, ratio * first.global_scale),
        nvfp4.quantize(0.1 * torch.randn(E, K, N)),
    )
    return NVFP4Experts(
        torch.cat([first.packed, second.packed], 1),
        torch.cat([first.block_scale, second.block_scale], 1),
        torch.stack([first.global_scale, second.global_scale], 1),
        third.packed, third.block_scale, third.global_scale,
    )  # fmt: skip


def input_scales() -> InputScales:
    """Different for every expert and projection, in the range that calibration gives: amax / 2688.

    Not powers of two, of which NVFP4's codes are independent; up's is the larger in expert 1.
    """
    w13 = torch.tensor([[0.0051, 0.0037], [0.0043, 0.0063], [0.0047, 0.0047]])
    return InputScales(w13, torch.tensor([0.013, 0.017, 0.011]))


def batch(tokens: int = 6, first_expert: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden, weights and ids; some ids are -1 or another rank's, token 1 has no expert here."""
    ids = torch.stack([torch.randperm(E)[:TOP_K] for _ in range(tokens)]).int() + first_expert
    if tokens > 2:
        ids[0, 0], ids[2, 1] = -1, first_expert + E
        ids[1] = torch.tensor([-1, first_expert - 1])
    return 3 * torch.randn(tokens, K).bfloat16(), torch.rand(tokens, TOP_K), ids


CASES = [
    # e4m3 scales take up a factor of 8 between gate and up; 3.7 only goes without a limit.
    ("bf16", 1.0, None), ("bf16", 1.0, 0.5), ("nvfp4", 1.0, 0.5), ("nvfp4", 3.7, None),
    ("nvfp4", 1 / 3.7, 0.0), ("nvfp4", 8.0, 0.5), ("nvfp4", 0.125, 0.5),
]  # fmt: skip


@pytest.mark.parametrize("first_expert", [0, 2 * E])
@pytest.mark.parametrize(("form", "ratio", "limit"), CASES)
def test_what_flashinfer_is_handed_is_the_layer(install, form, ratio, limit, first_expert) -> None:
    """`expect`'s bound is for fp32 sums and a bf16 intermediate; the stand-in computes in fp64."""
    stand_in = install()
    weights = bf16_experts() if form == "bf16" else nvfp4_experts(ratio)
    prepared = prepare(weights, limit, input_scales() if form == "nvfp4" else None)
    assert (prepared.format, prepared.num_experts) == (form, E)
    assert (prepared.hidden_size, prepared.intermediate_size) == (K, N)
    arguments = batch(first_expert=first_expert)
    options = {"limit": limit, "first_expert": first_expert}
    out = flashinfer_cutlass.experts(
        arguments[0], prepared, *arguments[1:], total_experts=4 * E, **options
    )
    want = expect(arguments[0], weights, *arguments[1:], **options)
    assert out.dtype == torch.bfloat16
    assert ((out.double() - want.output).abs() <= want.bound).all()
    assert not out[1].any() and out[3:].any(1).all()
    plain = reference(arguments[0].float(), weights, *arguments[1:], **options)
    assert ((plain.double() - want.output).abs() <= want.bound).all()
    call = stand_in.calls[0]
    assert (call["ep_size"], call["ep_rank"]) == (4, first_expert // E)
    assert not call["use_fused_finalize"]
    assert (call["activation_type"] == ActivationType.SwigluStep) == bool(limit)


def test_limits_bite() -> None:
    """Or else the cases above would not see a limit that is left out."""
    hidden, topk_weights, ids = batch()
    weights = nvfp4_experts(8.0)
    free, held = (reference(hidden, weights, topk_weights, ids, limit) for limit in (None, 0.5))
    assert (free != held)[3:].any(1).all()


@pytest.mark.parametrize("ratio", [3.7, 1.0])
def test_activations_are_rounded_on_the_checkpoints_grid(install, ratio) -> None:
    """Codes and block scales of hidden and intermediate are those that the input scales give.

    The stand-in rounds what was multiplied by the global scale, here it is divided by input_scale:
    they differ by a few 2^-24, so that the codes are the same unless a value is that near to a tie
    (none of this seed is). What remains is the result's rounding to bf16, 2^-9, allowed twice.
    """
    weights, scales = nvfp4_experts(ratio), input_scales()
    one = torch.tensor(1.0)
    install(lambda x: nvfp4.quantize(x[None], one).dequantize(torch.float64)[0])
    hidden, topk_weights, ids = batch(tokens=4)
    ids = torch.tensor([[0, 1], [2, 0], [1, 2], [1, 0]]).int()
    out = flashinfer_cutlass.experts(
        hidden, prepare(weights, None, scales), topk_weights, ids, None
    )
    for token in range(4):
        want = torch.zeros(K, dtype=torch.float64)
        for e, weight in zip(ids[token].tolist(), topk_weights[token].double(), strict=True):
            hidden_scale = scales.w13[e].max()
            x = nvfp4.quantize(hidden[token : token + 1], hidden_scale).dequantize(torch.float64)
            both = torch.cat([weights.gate(e, torch.float64), weights.up(e, torch.float64)])
            h = (x @ both.T).chunk(2, -1)
            h = torch.nn.functional.silu(h[0]) * h[1]
            h = nvfp4.quantize(h, scales.w2[e]).dequantize(torch.float64)
            want += weight * (h @ weights.down(e, torch.float64).T)[0]
        assert ((out[token].double() - want).abs() <= 2.0**-8 * want.abs()).all()


def test_shared_parts_are_added_in_fp32(install) -> None:
    install()
    hidden, topk_weights, ids = batch()
    weights = prepare(bf16_experts(), None)
    shared = torch.randn(2, *hidden.shape)
    routed = flashinfer_cutlass.experts(hidden, weights, topk_weights, ids, None)
    out = flashinfer_cutlass.experts(hidden, weights, topk_weights, ids, None, shared=shared)
    assert torch.equal(out, (routed.float() + (shared[0] + shared[1])).bfloat16())


def test_no_tokens_is_no_call(install) -> None:
    stand_in = install()
    hidden, topk_weights, ids = batch(tokens=1)
    out = flashinfer_cutlass.experts(
        hidden[:0], prepare(bf16_experts(), None), topk_weights[:0], ids[:0].long(), None
    )
    assert out.shape == (0, K) and not stand_in.calls


def test_swizzle_holds_every_scale_once_and_zeros() -> None:
    scale = torch.randint(1, 127, (2, 2 * N, N // 16), dtype=torch.uint8)
    blocks = swizzle_block_scales(scale.view(torch.float8_e4m3fn))
    assert blocks.shape == (2, 384, 3)
    for e in range(2):
        expected = scale[e].view(torch.float8_e4m3fn).double()
        assert torch.equal(read_scales(blocks, e, 2 * N, N), expected)
    assert int(blocks.view(torch.uint8).count_nonzero()) == scale.numel()


def test_prepare_refuses() -> None:
    e4m3 = torch.zeros(1, 64, 32, dtype=torch.float8_e4m3fn)
    fp8 = FP8Experts(
        e4m3, torch.ones(1, 2, 1, 1), e4m3[:, :32, :32].contiguous(), torch.ones(1, 1, 1)
    )
    narrow = BF16Experts(torch.zeros(1, 24, 16).bfloat16(), torch.zeros(1, 16, 12).bfloat16())
    plain = BF16Experts(torch.zeros(1, 32, 16), torch.zeros(1, 16, 16))
    odd = nvfp4_experts(3.7)
    bad = InputScales(input_scales().w13, torch.tensor([1.0, 0.0, torch.nan]))
    refusals: list[tuple[ExpertWeights, float | None, InputScales | None, str]] = [
        (fp8, None, None, "FP8 with block scales.*sm_90 only"),
        (narrow, None, None, "intermediate size is 12, expected a multiple of 8"),
        (plain, None, None, "w13 has dtype torch.float32, expected torch.bfloat16"),
        (bf16_experts(), -1.0, None, "limit is -1.0"),
        (bf16_experts(), float("nan"), None, "limit is nan"),
        (odd, None, None, "input_scales is None"),
        (odd, None, bad, r"input_scales.w2 of experts \[1, 2\]"),
        (odd, 7.0, input_scales(), r"gate and up differ in experts \[0, 1, 2\]"),
    ]
    for weights, limit, scales, message in refusals:
        with pytest.raises(ValueError, match=message):
            prepare(weights, limit, scales)


def test_one_factor_for_both_halves_is_exact_or_refused() -> None:
    """The smallest e4m3, 2^-9, has no half; 2^-8 has one."""
    weights = nvfp4_experts(1.0)
    weights.w13_global_scale[1, 0] *= 0.5
    weights.w13_scale[1, 0, 0] = 2.0**-8
    prepare(weights, 7.0, input_scales())
    weights.w13_scale[1, 0, 0] = 2.0**-9
    with pytest.raises(ValueError, match=r"differ in experts \[1\]"):
        prepare(weights, 7.0, input_scales())


def test_experts_refuses(install) -> None:
    stand_in = install()
    hidden, topk_weights, ids = batch()
    weights = prepare(bf16_experts(), 7.0)
    good = {"hidden": hidden, "topk_weights": topk_weights, "topk_ids": ids, "limit": 7.0}
    refusals = [
        ({"hidden": hidden.float()}, "hidden has dtype"),
        ({"hidden": hidden.T.contiguous().T}, "hidden has strides"),
        ({"topk_ids": ids[:, :1]}, "topk_ids has shape"),
        ({"topk_ids": ids.to("meta")}, "topk_ids is on meta, expected hidden's cpu"),
        ({"limit": None}, "limit is None, but the weights were prepared for 7.0"),
        ({"first_expert": 1}, "first_expert is 1, expected a multiple of this rank's 3"),
        ({"first_expert": E, "total_experts": E}, "total_experts is 3"),
        ({"total_experts": E + 1}, "total_experts is 4"),
        ({"shared": hidden}, "shared has shape"),
    ]
    for change, message in refusals:
        with pytest.raises(ValueError, match=message):
            flashinfer_cutlass.experts(weights=weights, **(good | change))
    assert not stand_in.calls
    flashinfer_cutlass.experts(weights=weights, **good)


def test_supports(install, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = install()
    assert flashinfer_cutlass.supports(SM100)[0]
    for target, reason in [
        (Target("cpu", None, "bf16"), "sm_100"),
        (Target("cuda", (9, 0), "bf16"), "sm_100"),
        (Target("cuda", (10, 0), "fp8"), "sm_90 only"),
    ]:
        usable, why = flashinfer_cutlass.supports(target)
        assert not usable and reason in why
    monkeypatch.setattr(stand_in, "cutlass_fused_moe", lambda input, output: None)
    assert "no activation_type, ep_rank" in flashinfer_cutlass.supports(SM100)[1]
    monkeypatch.setattr(stand_in, "ActivationType", IntEnum("Old", {"Swiglu": 3}))
    assert "no ActivationType.SwigluStep" in flashinfer_cutlass.supports(SM100)[1]
    monkeypatch.setitem(sys.modules, "flashinfer.fused_moe", None)
    assert "cannot be imported" in flashinfer_cutlass.supports(SM100)[1]


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Path]:
    """Flashinfer's package folder: the installed one, or a wheel's; it is read, never imported."""
    wheel = os.environ.get(WHEEL_VARIABLE)
    if wheel:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name in ("flashinfer/tllm_enums.py", "flashinfer/fused_moe/core.py",
                            "flashinfer/fused_moe/__init__.py"):  # fmt: skip
                    archive.extract(name, tmp_path)
        yield tmp_path / "flashinfer"
        return
    spec = importlib.util.find_spec("flashinfer")
    if spec is None or spec.origin is None:
        pytest.skip(f"flashinfer is not installed and {WHEEL_VARIABLE} names no wheel")
    yield Path(spec.origin).parent


def test_the_call_fits_flashinfers_source(install, source: Path) -> None:
    """Every argument exists and every one without a default is given; the enum's members too."""
    stand_in = install()
    hidden, topk_weights, ids = batch()
    prepared = prepare(bf16_experts(), 7.0)
    flashinfer_cutlass.experts(hidden, prepared, topk_weights, ids, 7.0)
    signature_of(source / "fused_moe" / "core.py", "cutlass_fused_moe").bind(**stand_in.calls[0])

    enum = definition(source / "tllm_enums.py", "ActivationType", ast.ClassDef)
    members = {
        target.id: ast.literal_eval(node.value)
        for node in enum.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    assert {name: members[name] for name in ActivationType.__members__} == {
        name: int(member) for name, member in ActivationType.__members__.items()
    }
    exported = {
        alias.asname or alias.name
        for node in ast.walk(ast.parse((source / "fused_moe" / "__init__.py").read_text()))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert {"cutlass_fused_moe", "ActivationType"} <= exported


def definition(path: Path, name: str, kind: type) -> Any:
    """The module-level definition of `name`."""
    tree = ast.parse(path.read_text())
    return next(n for n in tree.body if isinstance(n, kind) and getattr(n, "name", None) == name)


def signature_of(path: Path, name: str) -> inspect.Signature:
    """The signature of a function in a source file; defaults are not looked at."""
    arguments = definition(path, name, ast.FunctionDef).args
    plain = [*arguments.posonlyargs, *arguments.args]
    required = len(plain) - len(arguments.defaults)
    kind, empty = inspect.Parameter, inspect.Parameter.empty
    parameters = [
        kind(a.arg, kind.POSITIONAL_OR_KEYWORD, default=empty if i < required else None)
        for i, a in enumerate(plain)
    ]
    parameters += [
        kind(a.arg, kind.KEYWORD_ONLY, default=empty if default is None else None)
        for a, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    return inspect.Signature(parameters)
