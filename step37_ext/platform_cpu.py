"""Serving on a machine without a GPU: `SGLANG_PLATFORM=step37_cpu ... --device cpu`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform

if TYPE_CHECKING:
    import torch

NAME = "step37_cpu"

MAX_TOTAL_TOKENS = 65_536
"""Default size of the KV cache: SGLang would fill most of the machine's memory with it."""


def activate() -> str | None:
    """Entry point of `sglang.srt.platforms`: the platform's class, if the user selected it."""
    if not selected():
        return None
    # One thread a process: the operations are small, and a pool of threads costs 30 times more.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return f"{__name__}:{Step37CpuPlatform.__name__}"


def selected() -> bool:
    """Whether the user asked for this platform."""
    return os.environ.get("SGLANG_PLATFORM") == NAME


class Step37CpuPlatform(CpuDeviceMixin, SRTPlatform):
    """A plain CPU. SGLang takes a platform that claims nothing to have no graphs and no Triton."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"

    def apply_server_args_defaults(self, server_args: Any) -> None:
        bind_ranks(server_args.tp_size)
        if server_args.max_total_tokens is None:
            server_args.max_total_tokens = MAX_TOTAL_TOKENS
        server_args.sleep_on_idle = True  # an idle scheduler would keep a whole core busy

    def get_default_attention_backend(self) -> str:
        return "step37"

    def get_compile_backend(self, mode: str | None = None) -> str:
        return "eager"

    def supports_speculative_algorithm(self, algorithm: str) -> bool:
        return algorithm == "EAGLE"

    def get_speculative_cache_locs_fn(self) -> Callable[..., torch.Tensor]:
        from step37_ext.drafts_on_cpu import extend_cache_locs

        return extend_cache_locs

    def get_speculative_worker_cls(self, algorithm: str) -> None:
        """None is SGLang's own worker, whose operations get what they lack on a CPU."""
        from step37_ext.drafts_on_cpu import install

        install()

    def is_pin_memory_available(self, device: Any = None) -> bool:
        return False


def bind_ranks(tp_size: int) -> None:
    """Give each tensor-parallel rank a core, unless the user has said which.

    Without this SGLang asks for one NUMA node a rank and stops with an assertion. The first core
    differs from server to server, as two on one machine would else share it.
    """
    cores = sorted(os.sched_getaffinity(0))
    first = os.getpid()
    ranks = (str(cores[(first + rank) % len(cores)]) for rank in range(tp_size))
    os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", "|".join(ranks))
