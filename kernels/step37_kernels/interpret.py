"""Triton's interpreter made numerically right, so that the kernels run on a machine with no GPU.

As shipped (Triton 3.6 to 3.9) the interpreter multiplies bf16 as raw bit patterns in `tl.dot`,
loses bf16 subnormals, rounds and overflows e4m3 wrongly, reads e4m3's NaN as 480, and has no
inline assembly and no right `tl.dot_scaled`. `enable` replaces those parts. bf16 blocks become
NumPy arrays of ml_dtypes' bfloat16; e4m3 blocks stay bytes, as the interpreter has them. What
hardware does is the aim: `cvt.rn.satfinite` for e4m3, products exact and sums in fp32 for `tl.dot`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

_VARIABLE = "TRITON_INTERPRET"
Assembly = Callable[..., tuple[np.ndarray, ...]]
_assembly: dict[str, Assembly] = {}
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_enabled = False


def enable() -> None:
    """Switch this process to the mended interpreter; calling it again does nothing.

    Triton decides when its functions are decorated, so this comes before the first import of
    `triton`. The switch does not reach child processes.

    Raises:
        RuntimeError: triton was imported before with the interpreter off, or ml_dtypes is missing.
    """
    global _enabled
    if _enabled:
        return
    if "triton" in sys.modules and os.environ.get(_VARIABLE) != "1":
        raise RuntimeError("triton was imported before the interpreter was enabled in this process")
    try:
        import ml_dtypes
    except ImportError as error:
        raise RuntimeError("the Triton interpreter needs the package ml_dtypes") from error
    inherited = os.environ.get(_VARIABLE)
    os.environ[_VARIABLE] = "1"
    import triton

    triton.knobs.runtime.interpret = True
    if inherited is None:
        del os.environ[_VARIABLE]
    _mend(ml_dtypes)
    _enabled = True


def enabled() -> bool:
    """Whether `enable` was called in this process."""
    return _enabled


def assembly(text: str) -> Callable[[Assembly], Assembly]:
    """Decorate the NumPy function that plays the inline assembly `text` in the interpreter.

    It takes the operands' arrays and returns a tuple of result arrays, in the asm's order.
    """

    def register(function: Assembly) -> Assembly:
        _assembly[text] = function
        return function

    return register


def _mend(ml_dtypes: Any) -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    bf16 = np.dtype(ml_dtypes.bfloat16)
    numpy_type = {
        tl.bfloat16: bf16,
        tl.float16: np.dtype(np.float16),
        tl.float32: np.dtype(np.float32),
        tl.float64: np.dtype(np.float64),
        tl.float8e4nv: np.dtype(ml_dtypes.float8_e4m3fn),
        tl.float8e5: np.dtype(ml_dtypes.float8_e5m2),
    }
    largest = {tl.float8e4nv: 448.0, tl.float8e5: 57344.0}
    handle, shipped_type = interpreter.TensorHandle, interpreter._get_np_dtype

    def storage_type(dtype: Any) -> np.dtype:
        """What the interpreter keeps a Triton type in: bf16 as itself, fp8 as bytes."""
        element = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        return bf16 if element == tl.bfloat16 else shipped_type(dtype)

    def values(block: Any) -> np.ndarray:
        """A block as numbers: fp8 bytes and bf16 become fp32, anything else stays."""
        kind = block.dtype.scalar
        if kind in (tl.bfloat16, *largest):
            return np.ascontiguousarray(block.data).view(numpy_type[kind]).astype(np.float32)
        return block.data

    def convert(data: np.ndarray, source: Any, target: Any, rounding_mode: Any = None) -> Any:
        """Round to nearest even between float types; fp8 saturates, NaN stays NaN."""
        with np.errstate(over="ignore", invalid="ignore"):
            number = np.ascontiguousarray(data).view(numpy_type[source])
            if target in largest:
                number = np.clip(number.astype(np.float32), -largest[target], largest[target])
                return number.astype(numpy_type[target]).view(np.uint8)
            return number.astype(numpy_type[target])

    def cast(self: Any, source: Any, target: Any) -> Any:
        have, want = source.dtype.scalar, target.scalar
        if have in numpy_type and want in numpy_type:
            return handle(convert(source.data, have, want), want)
        with np.errstate(invalid="ignore"):
            if want in numpy_type and want != tl.float64:
                exact = values(source).astype(np.float32)
                return handle(convert(exact, tl.float32, want), want)
            return handle(values(source).astype(storage_type(target)), want)

    def dot(self: Any, a: Any, b: Any, accumulator: Any, *_: Any) -> Any:
        kind = accumulator.data.dtype
        with np.errstate(over="ignore", invalid="ignore"):
            product = np.matmul(values(a).astype(kind), values(b).astype(kind))
            return handle(product + accumulator.data, accumulator.dtype.scalar)

    def fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        # The product of two fp32 numbers is exact in fp64, so that all but one rounding is spared.
        wide = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data
        return handle(wide.astype(x.data.dtype), x.dtype.scalar)

    def scaled(block: Any, scale: Any, kind: Any, axis: int) -> np.ndarray:
        """An operand of dot_scaled with K last: e2m1 pairs unpacked, block scales applied."""
        if str(kind).upper().endswith("E2M1"):
            pairs = np.moveaxis(block.data.view(np.uint8), axis, -1)
            number = _E2M1[np.stack([pairs & 15, pairs >> 4], -1)].reshape(*pairs.shape[:-1], -1)
        else:
            number = np.moveaxis(values(block), axis, -1)
        if scale is None:
            return number
        if scale.dtype.scalar in numpy_type:
            factor = values(scale)
        else:  # bytes are e8m0
            factor = np.exp2(scale.data.astype(np.float32) - 127)
        return number * np.repeat(factor, number.shape[-1] // factor.shape[-1], -1)

    def dot_scaled(
        self: Any, a: Any, a_scale: Any, a_kind: Any, b: Any, b_scale: Any, b_kind: Any, *rest: Any
    ) -> Any:
        accumulator = rest[-1]
        left, right = scaled(a, a_scale, a_kind, -1), scaled(b, b_scale, b_kind, -2)
        product = left @ np.swapaxes(right, -1, -2)
        return handle(product + accumulator.data, tl.float32)

    def inline_assembly(
        self: Any, text: str, constraints: str, operands: Any, types: Any, pure: bool, pack: int
    ) -> Any:
        if text not in _assembly:
            raise NotImplementedError(f"no stand-in for inline assembly: {text}")
        results = _assembly[text](*[operand.data for operand in operands])
        return _Results([handle(r, kind.scalar) for r, kind in zip(results, types, strict=True)])

    builder = interpreter.InterpreterBuilder
    interpreter._get_np_dtype = storage_type
    interpreter._convert_float = convert
    builder.cast_impl = cast
    builder.create_fp_to_fp = lambda self, source, target, mode=None: cast(self, source, target)
    builder.create_dot = dot
    builder.create_fma = fma
    builder.create_dot_scaled = dot_scaled
    builder.create_inline_asm = inline_assembly
    builder.get_bf16 = lambda self, value: handle(np.array([value], bf16), tl.bfloat16)
    interpreter._interpreter = _Memory(interpreter._interpreter, bf16)
    _accept_plain_format_names(tl)
    _take_scalars_from_arrays(interpreter)
    _patch_once_a_launch(interpreter)


def _take_scalars_from_arrays(interpreter: Any) -> None:
    """Triton 3.6 asks NumPy for the int of an array of one element, which NumPy 2.4 refuses."""
    shipped = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        shipped(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch


def _patch_once_a_launch(interpreter: Any) -> None:
    """As shipped every call of a nested function replaces all of `tl` anew: a third of the time."""
    shipped_launch = interpreter.GridExecutor.__call__
    patched: set[int] = set()

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return shipped_launch(self, *args, **kwargs)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        names = id(self.fn.__globals__)
        if names not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(names)
        return self.rewrite()(*args, **kwargs)

    interpreter.GridExecutor.__call__ = launch
    interpreter.InterpretedFunction.__call__ = call


class _Results:
    """What the caller of create_inline_asm expects: results by number."""

    def __init__(self, results: list[Any]) -> None:
        self._results = results

    def get_result(self, index: int) -> Any:
        return self._results[index]


class _Memory:
    """The interpreter's loads and stores; its C++ side knows bf16 only as 16-bit integers."""

    def __init__(self, shipped: Any, bf16: np.dtype) -> None:
        self._shipped, self._bf16 = shipped, bf16

    def load(self, pointers: Any, mask: Any, other: Any, dtype: np.dtype) -> Any:
        if dtype != self._bf16:
            return self._shipped.load(pointers, mask, other, dtype)
        half = np.dtype(np.uint16)
        return self._shipped.load(pointers, mask, other.view(half), half).view(self._bf16)

    def store(self, pointers: Any, value: Any, mask: Any) -> Any:
        raw = value.view(np.uint16) if value.dtype == self._bf16 else value
        return self._shipped.store(pointers, raw, mask)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._shipped, name)


def _accept_plain_format_names(tl: Any) -> None:
    """The shipped dot_scaled asks its format names for `.value`, which only the compiler wraps."""
    from triton.language.semantic import TritonSemantic

    shipped = TritonSemantic.dot_scaled

    def wrapped(name: Any) -> Any:
        return name if hasattr(name, "value") else tl.constexpr(name)

    def dot_scaled(
        self: Any, a: Any, a_scale: Any, a_kind: Any, b: Any, b_scale: Any, b_kind: Any, *rest: Any
    ) -> Any:
        return shipped(self, a, a_scale, wrapped(a_kind), b, b_scale, wrapped(b_kind), *rest)

    TritonSemantic.dot_scaled = dot_scaled
