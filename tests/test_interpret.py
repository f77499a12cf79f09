"""The mended interpreter against torch, over every code of the small types."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl

from step37_kernels import interpret
from step37_kernels.formats.e4m3 import to_e4m3

pytestmark = pytest.mark.skipif(not interpret.enabled(), reason="the interpreter is off")


@triton.jit
def _cast_kernel(source, target, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(target + at, tl.load(source + at).to(target.dtype.element_ty))


@triton.jit
def _dot_kernel(a, b, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    left = tl.load(a + m[:, None] * K + k[None, :])
    right = tl.load(b + k[:, None] * N + n[None, :])
    tl.store(out + m[:, None] * N + n[None, :], tl.dot(left, right))


@triton.jit
def _scaled_kernel(a, a_scale, b, b_scale, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k, g = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K // 2), tl.arange(0, K // 16)
    left = tl.load(a + m[:, None] * (K // 2) + k[None, :])
    right = tl.load(b + n[:, None] * (K // 2) + k[None, :])
    left_scale = tl.load(a_scale + m[:, None] * (K // 16) + g[None, :])
    right_scale = tl.load(b_scale + n[:, None] * (K // 16) + g[None, :])
    product = tl.dot_scaled(left, left_scale, "e2m1", tl.trans(right), right_scale, "e2m1")
    tl.store(out + m[:, None] * N + n[None, :], product)


@triton.jit
def _multiply_kernel(a, b, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, tl.load(a + at) * tl.load(b + at))


@triton.jit
def _remainder_kernel(a, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x = tl.load(a + at)
    tl.store(out + at, tl.fma(x, x, -(x * x)))


def _same_bits(ours: torch.Tensor, expected: torch.Tensor) -> bool:
    both_nan = ours.float().isnan() & expected.float().isnan()
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[ours.dtype.itemsize]
    return bool((both_nan | (ours.view(width) == expected.view(width))).all())


def test_every_e4m3_code_widens_as_in_torch() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        out = torch.empty(256, dtype=dtype)
        _cast_kernel[(1,)](codes, out, 256)
        assert _same_bits(out, codes.to(dtype))


def test_floats_narrow_to_e4m3_as_hardware_does() -> None:
    """Nearest even, saturating, NaN kept; over all bf16 values, so all ties are among them."""
    for source in (torch.bfloat16, torch.float32):
        x = torch.arange(65536, dtype=torch.int32).short().view(torch.bfloat16).to(source)
        out = torch.empty(65536, dtype=torch.float8_e4m3fn)
        _cast_kernel[(1,)](x, out, 65536)
        assert _same_bits(out, to_e4m3(x))


def test_floats_narrow_to_bf16_as_in_torch() -> None:
    bits = torch.randint(-(2**31), 2**31 - 1, (65536,), generator=torch.manual_seed(0))
    x = bits.int().view(torch.float32)
    out = torch.empty(65536, dtype=torch.bfloat16)
    _cast_kernel[(1,)](x, out, 65536)
    assert _same_bits(out, x.bfloat16())


def test_bf16_arithmetic_rounds_once_and_keeps_subnormals() -> None:
    a = torch.arange(65536, dtype=torch.int32).short().view(torch.bfloat16)
    b = torch.full_like(a, 1.5)
    out = torch.empty_like(a)
    _multiply_kernel[(1,)](a, b, out, 65536)
    assert _same_bits(out, (a.float() * 1.5).bfloat16())


def test_fma_rounds_once() -> None:
    a = torch.rand(1024, generator=torch.manual_seed(0)) + 1
    out = torch.empty_like(a)
    _remainder_kernel[(1,)](a, out, 1024)
    exact = a.double() * a.double() - (a * a).double()
    assert torch.equal(out, exact.float()) and (out != 0).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_dot_multiplies_exactly_and_sums_in_fp32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(32, 64).to(dtype), torch.randn(64, 16).to(dtype)
    out = torch.empty(32, 16)
    _dot_kernel[(1,)](a, b, out, 32, 16, 64)
    exact = a.double() @ b.double()
    # 64 roundings of fp32 at most, relative to the sum of magnitudes.
    assert ((out - exact).abs() <= 64 * 2.0**-24 * (a.double().abs() @ b.double().abs())).all()


def test_scaled_dot_reads_low_nibble_first_and_a_scale_per_16() -> None:
    torch.manual_seed(0)
    m, n, k = 16, 16, 64
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])

    def operand(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        nibble = torch.randint(16, (rows, k))
        packed = (nibble[:, ::2] | nibble[:, 1::2] << 4).to(torch.uint8)
        scale = (torch.rand(rows, k // 16) * 4).to(torch.float8_e4m3fn)
        return packed, scale, table[nibble] * scale.float().repeat_interleave(16, 1)

    (a, a_scale, left), (b, b_scale, right) = operand(m), operand(n)
    out = torch.empty(m, n)
    _scaled_kernel[(1,)](a, a_scale, b, b_scale, out, m, n, k)
    torch.testing.assert_close(out, left @ right.T, rtol=1e-6, atol=1e-5)


def test_assembly_without_a_stand_in_is_named() -> None:
    with pytest.raises(Exception, match="no stand-in for inline assembly: nonsense.b32"):
        _assembly_kernel[(1,)](torch.zeros(4, dtype=torch.int32), 4)


@triton.jit
def _assembly_kernel(x, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    value = tl.inline_asm_elementwise(
        "nonsense.b32 $0, $1;", "=r,r", [tl.load(x + at)], dtype=tl.int32, is_pure=True, pack=1
    )
    tl.store(x + at, value)


def test_enabling_after_triton_is_refused() -> None:
    code = "import triton; from step37_kernels import interpret; interpret.enable()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "triton was imported before" in done.stderr


def test_child_processes_do_not_inherit_it() -> None:
    code = "import triton; print(triton.knobs.runtime.interpret)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False"
