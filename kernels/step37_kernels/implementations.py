"""The Triton kernels as implementations of `dispatch`: import this module to make them known.

On a GPU they are called "triton". On a CPU the very same kernels run in the interpreter under the
name "interpret": very slowly, and only where STEP37_IMPL asks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from step37_kernels import interpret
from step37_kernels.activation import activation
from step37_kernels.attention.attend import attend
from step37_kernels.attention.page_tables import page_tables
from step37_kernels.attention.prologue import prologue
from step37_kernels.dispatch import Target, register
from step37_kernels.experts.formats import least_arch
from step37_kernels.experts.layer import experts, prepare
from step37_kernels.experts.shared_expert import prepare as prepare_matrix
from step37_kernels.experts.shared_expert import shared_expert
from step37_kernels.formats.fp8_words import FP8Words
from step37_kernels.linear import linear
from step37_kernels.route import route


def _on_a_gpu(target: Target) -> tuple[bool, str]:
    if target.device_type != "cuda" or target.capability is None:
        return False, "needs an NVIDIA GPU"
    if target.dtype != torch.bfloat16:
        return False, f"computes in bfloat16, the model in {target.dtype}"
    least = divmod(least_arch(target.weight_format, "same"), 10)
    have = f"sm_{target.capability[0]}{target.capability[1]}"
    if target.capability < least:
        return False, f"needs sm_{least[0]}{least[1]} or later, this is {have}"
    return True, f"Triton kernel on {have}"


def _in_the_interpreter(target: Target) -> tuple[bool, str]:
    if target.device_type != "cpu":
        return False, "the interpreter is for a CPU"
    if not interpret.enabled():
        return False, "the interpreter is off: set TRITON_INTERPRET=1 before the start"
    if target.dtype != torch.bfloat16:
        return False, f"computes in bfloat16, the model in {target.dtype}"
    return True, "Triton kernel in the interpreter"


def _register(
    operation: str,
    function: Callable[..., Any],
    prepare: Callable[[Any], Any] = lambda weights: weights,
) -> None:
    register(operation, "triton", function, _on_a_gpu, priority=10, prepare=prepare)
    register(operation, "interpret", function, _in_the_interpreter, priority=-10, prepare=prepare)


_register("linear", linear, FP8Words.pack)
_register("route", route)
_register("experts", experts, prepare)
_register("shared_expert", shared_expert, prepare_matrix)
_register("activation", activation)
_register("page_tables", page_tables)
_register("prologue", prologue)
_register("attend", attend)
