"""Read command lines with SGLang's own argument handling, as on a GPU that is not here.

Standard input: a JSON list of [arguments of `sglang serve`, total memory of a GPU in MiB, its
architecture, 90 for sm_90]. Last line of output: a JSON list of what SGLang made of each, or of
what it said against it.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from sglang.srt import platforms
from sglang.srt.arg_groups import memory_hook, serving_hook
from sglang.srt.arg_groups.overrides import resolution_result
from sglang.srt.platforms.cuda import CudaSRTPlatform
from sglang.srt.plugins import load_plugins
from sglang.srt.runtime_context import override_platform
from sglang.srt.server_args import prepare_server_args

from step37_ext import hooks

FIELDS = (
    "tp_size ep_size nnodes quantization kv_cache_dtype attention_backend context_length "
    "max_running_requests chunked_prefill_size swa_full_tokens_ratio mem_fraction_static "
    "reasoning_parser tool_call_parser trust_remote_code model_impl speculative_algorithm "
    "enable_multi_layer_eagle device moe_runner_backend disable_flashinfer_autotune"
).split()


@contextmanager
def gpu(memory_mib: int, arch: int) -> Iterator[None]:
    """What SGLang and this package ask of a GPU while a start's arguments are settled."""
    hopper, blackwell = arch == 90, arch == 100
    facts = override_platform(
        is_cuda=True, is_hip=False, is_sm90=hopper, is_sm100=blackwell,
        is_sm100_or_sm110=blackwell, is_blackwell=blackwell, is_sm110=False, is_sm120=False,
        is_hopper_with_cuda_12_3=hopper, has_flashinfer=True, device_sm=arch,
        device_capability=divmod(arch, 10),
    )  # fmt: skip
    with ExitStack() as stack:
        stack.enter_context(facts)
        for owner, name, value in (
            (torch.version, "cuda", "13.0"),
            (platforms, "_current_platform", CudaSRTPlatform()),
            (memory_hook, "get_device_memory_capacity", lambda *_: memory_mib),
            (serving_hook, "get_device", lambda *_: "cuda"),
            (hooks, "get_device", lambda *_: "cuda"),
            (hooks, "get_device_sm", lambda: arch),
            (hooks, "check_tensors", lambda *_: None),  # the folders hold a config and no weights
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def resolved(arguments: list[str], memory_mib: int, arch: int) -> dict:
    """What a start with these arguments works with."""
    with gpu(memory_mib, arch):
        server_args = prepare_server_args(arguments)
        server_args.resolve_once()
        found = {name: resolution_result(server_args, name) for name in FIELDS}
        graphs = resolution_result(server_args, "cuda_graph_config")
    for phase in ("decode", "prefill"):
        found[f"{phase}_graphs"] = getattr(graphs, phase).backend
    return found


def main() -> None:
    load_plugins()
    results = []
    for arguments, memory_mib, arch in json.load(sys.stdin):
        try:
            results.append(resolved(arguments, memory_mib, arch))
        except (ValueError, SystemExit) as error:
            results.append(str(error))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
