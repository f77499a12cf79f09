"""What launches are told apart by, held against what Triton compiles a kernel anew for."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
import triton
from triton._C.libtriton import native_specialize_impl
from triton.backends.nvidia.compiler import CUDABackend

from step37_kernels.compile_ahead import compile_all, on_meta
from step37_kernels.formats.fp8_words import FP8Words
from step37_kernels.launch import Launch

ARGUMENTS: tuple[Any, ...] = (
    0, 1, 2, 15, 16, 17, 32, -16, 2**31 - 1, 2**31, 2**31 + 16, -(2**31), True, None, 1.0, 2.5,
    torch.zeros(32), torch.zeros(32)[4:], torch.zeros(32)[1:], torch.zeros(32).bfloat16(),
    torch.zeros(32, device="meta"), torch.zeros(32).int(),
)  # fmt: skip


def two_numbers(specialised, unspecialised):
    """Never launched."""


def launch_of(specialised: Any = 0, unspecialised: Any = 0, **options: Any) -> Launch:
    kernel = triton.JITFunction(two_numbers, do_not_specialize=["unspecialised"])
    return Launch(kernel, (1,), (specialised, unspecialised), options)


@pytest.mark.parametrize("specialise", [True, False])
def test_launches_differ_where_triton_compiles_anew(specialise: bool) -> None:
    def of(value: Any) -> Any:
        called = launch_of(value) if specialise else launch_of(0, value)
        return called.variant()

    for one, other in combinations(ARGUMENTS, 2):
        apart = [
            native_specialize_impl(CUDABackend, v, False, specialise, True) for v in (one, other)
        ]
        assert (of(one) == of(other)) == (apart[0] == apart[1]), (one, other)


def test_options_are_part_of_a_variant() -> None:
    assert launch_of(BLOCK=16, num_warps=4).variant() == launch_of(num_warps=4, BLOCK=16).variant()
    assert launch_of(BLOCK=16).variant() != launch_of(BLOCK=32).variant()


def test_a_kernel_that_does_not_compile_is_named() -> None:
    class Broken:
        __name__ = "broken_kernel"

        def warmup(self, *args: Any, **options: Any) -> None:
            raise ValueError("no such instruction")

    with pytest.raises(RuntimeError, match="broken_kernel does not compile with .*BLOCK.*no such"):
        compile_all([Launch(Broken(), (1,), (), {"BLOCK": 16})])


def test_objects_of_tensors_lose_their_memory_and_nothing_else() -> None:
    weight = FP8Words(torch.zeros(64, 8, dtype=torch.int32), torch.zeros(64), torch.zeros(1).int())
    assert on_meta(weight).shape == (64, 32) and on_meta(weight).words.is_meta
    rows = on_meta(torch.zeros(4, 16)[:, :3])
    assert rows.stride() == (16, 1) and rows.is_meta
    assert on_meta(None) is None
