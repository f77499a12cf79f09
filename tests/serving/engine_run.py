"""Run SGLang's offline engine once: MODEL PROMPT_IDS ARGUMENTS [NEW_TOKENS] to greedy tokens.

Prompt, arguments (those of `sglang.Engine`) and what is printed, tokens and logprobs, are JSON.
"""

import json
import sys

import sglang


def main(model: str, prompt: str, arguments: str, new_tokens: str = "16") -> None:
    defaults = {
        "model_impl": "step37",
        "device": "cpu",
        "dtype": "float32",
        "max_total_tokens": 4096,
        "mem_fraction_static": 0.3,
        "skip_server_warmup": True,
        "log_level": "error",
    }
    engine = sglang.Engine(model_path=model, **(defaults | json.loads(arguments)))
    try:
        result = engine.generate(
            input_ids=json.loads(prompt),
            sampling_params={
                "temperature": 0,
                "max_new_tokens": int(new_tokens),
                "ignore_eos": True,
            },
            return_logprob=True,
        )
    finally:
        engine.shutdown()
    entries = result["meta_info"]["output_token_logprobs"]
    print(json.dumps({"tokens": [e[1] for e in entries], "logprobs": [e[0] for e in entries]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
