"""What the benchmarks ask of SGLang: ROWS_FILE WORD... to its settings as JSON, and kernels.

Kernels of ours and of SGLang's whose names have all the words are compiled for sm_90, and what
their machine code says is written to the file.
"""

import json
import sys

from sglang.srt.runtime_context import get_exec, get_parallel

from benchmarks import static_comparison
from benchmarks.expert_peers import sglang_context

if __name__ == "__main__":
    output, *words = sys.argv[1:]
    chosen = [argument for word in words for argument in ("--only", word)]
    static_comparison.main(["--arch", "90", *chosen, "--output", output], standalone_mode=False)
    sglang_context()
    settings = {
        "sum_all_reduce": get_exec().moe.enable_fused_moe_sum_all_reduce,
        "deterministic": get_exec().deterministic.enable_deterministic_inference,
        "ranks": get_parallel().tp_group.world_size,
    }
    print(json.dumps(settings))
