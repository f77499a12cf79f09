"""Read command lines with SGLang's own argument handling, on a machine without a GPU.

Standard input: a JSON list of [arguments of `sglang serve`, total memory of a GPU in MiB].
Last line of output: a JSON list of what SGLang made of each, or of what it said against it.
"""

import json
import sys
from unittest import mock

from sglang.srt.arg_groups import memory_hook
from sglang.srt.arg_groups.overrides import resolution_result
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import prepare_server_args

from step37_ext import hooks

FIELDS = (
    "tp_size ep_size nnodes quantization kv_cache_dtype attention_backend context_length "
    "max_running_requests chunked_prefill_size swa_full_tokens_ratio mem_fraction_static "
    "reasoning_parser tool_call_parser trust_remote_code model_impl speculative_algorithm "
    "enable_multi_layer_eagle"
).split()


def resolved(arguments: list[str], memory_mib: int) -> dict:
    """What a start with these arguments works with."""
    server_args = prepare_server_args(arguments)
    # The one thing that is asked of the GPU before a start's arguments are settled.
    with mock.patch.object(memory_hook, "get_device_memory_capacity", return_value=memory_mib):
        server_args.resolve_once()
    return {name: resolution_result(server_args, name) for name in FIELDS}


def main() -> None:
    load_plugins()
    results = []
    # The folders hold a config and no weights.
    with mock.patch.object(hooks, "check_tensors"):
        for arguments, memory_mib in json.load(sys.stdin):
            try:
                results.append(resolved(arguments, memory_mib))
            except (ValueError, SystemExit) as error:
                results.append(str(error))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
