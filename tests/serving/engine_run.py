"""Run SGLang's offline engine once: MODEL TP PROMPT_IDS (JSON) to greedy tokens and logprobs."""

import json
import sys

import sglang


def main(model: str, tp_size: str, prompt: str) -> None:
    engine = sglang.Engine(
        model_path=model,
        model_impl="step37",
        device="cpu",
        dtype="float32",
        tp_size=int(tp_size),
        max_total_tokens=4096,
        mem_fraction_static=0.3,
        skip_server_warmup=True,
        log_level="error",
    )
    try:
        result = engine.generate(
            input_ids=json.loads(prompt),
            sampling_params={"temperature": 0, "max_new_tokens": 16, "ignore_eos": True},
            return_logprob=True,
        )
    finally:
        engine.shutdown()
    entries = result["meta_info"]["output_token_logprobs"]
    print(json.dumps({"tokens": [e[1] for e in entries], "logprobs": [e[0] for e in entries]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
