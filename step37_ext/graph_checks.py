"""Which CUDA graphs a start gets, and which it may not ask for."""

from __future__ import annotations

import os
from typing import Any

from sglang.srt.environ import envs

from step37_ext.start_checks import ATTENTION_BACKEND, FP8_CAPABILITY, chosen_attention_backends
from step37_kernels.checks import debugging
from step37_kernels.dispatch import ENVIRONMENT_VARIABLE


def can_be_recorded(config: Any, capability: tuple[int, int] | None) -> bool:
    """Whether every operation of a decode step can be in a CUDA graph.

    The kernels can; some reference operations read numbers on the host, which no graph can. They
    run in another type than bfloat16, before sm_89 with FP8, and for the cache of a server whose
    attention backends differ. STEP37_DEBUG=1 reads numbers back in every operation.
    """
    chosen = set(chosen_attention_backends(config))
    return (
        config.device == "cuda"
        and not debugging()
        and os.environ.get(ENVIRONMENT_VARIABLE) in (None, "", "triton")
        and config.dtype in ("auto", "bfloat16")
        and (capability is None or capability >= FP8_CAPABILITY)
        and (ATTENTION_BACKEND not in chosen or len(chosen) == 1)
    )


def graph_defaults(config: Any, capability: tuple[int, int] | None) -> dict[str, Any]:
    """Decode's graphs where they can be; prefill's would need tables that ours does not keep.

    Raises:
        ValueError: the user asks for others.
    """
    recorded = can_be_recorded(config, capability)
    _check_asked(config, recorded)
    return {"disable_prefill_cuda_graph": True} if recorded else {"disable_cuda_graph": True}


def _check_asked(config: Any, recorded: bool) -> None:
    # SGLang's order: the JSON wins over the flag, and both over what a default turns off.
    given = config.cuda_graph_config
    given = given.to_dict() if hasattr(given, "to_dict") else given or {}
    for phase, allowed in (
        ("decode", ("full", "disabled") if recorded else ("disabled",)),
        ("prefill", ("disabled",)),
    ):
        for flag, asked in (
            ("--cuda-graph-config", (given.get(phase) or {}).get("backend")),
            (f"--cuda-graph-backend-{phase}", getattr(config, f"cuda_graph_backend_{phase}")),
        ):
            if asked is not None and asked not in allowed:
                raise ValueError(
                    f"{flag} asks for {asked!r} in {phase}; this start of --model-impl step37 "
                    f"allows {' or '.join(repr(name) for name in allowed)}"
                )
    if envs.SGLANG_ENABLE_METADATA_GLUE_GRAPH.get():
        raise ValueError(
            "SGLANG_ENABLE_METADATA_GLUE_GRAPH is set; --model-impl step37 makes its page tables "
            "outside of graphs, so it has to be unset"
        )
