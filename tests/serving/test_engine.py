"""SGLang's offline engine with real ranks, and with the text model alone, gives the same tokens."""

import json
import shutil
from pathlib import Path

import preloaded
import pytest
import torch
from safetensors.torch import load_file, save_file

from step37_ext.checkpoint.headers import INDEX_FILE
from step37_ext.checkpoint.make import random_checkpoint
from step37_ext.checkpoint.oracle import transformers_model
from step37_ext.checkpoint.spec import FOUR_KV_HEADS, TINY
from step37_ext.local_server import PLATFORM

SCRIPT = Path(__file__).with_name("engine_run.py")
PROMPT = [20 + 37 * i % 500 for i in range(3 * TINY.sliding_window + 7)]
NEW_TOKENS = 16


def run_engine(model: Path, **arguments: object) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens and their logprobs of SGLang's offline engine."""
    output = preloaded.output(
        SCRIPT,
        model,
        json.dumps(PROMPT),
        json.dumps(arguments),
        **PLATFORM,
    )
    result = json.loads(output.splitlines()[-1])
    return result["tokens"], torch.tensor(result["logprobs"])


def check_against_transformers(model: Path, tokens: list[int], logprobs: torch.Tensor) -> None:
    """Teacher-forced: every token is transformers' greedy one, with its logprob."""
    oracle = transformers_model(model)
    with torch.no_grad():
        logits = oracle(input_ids=torch.tensor([PROMPT + tokens])).logits[0]
    expected = logits[len(PROMPT) - 1 : -1].log_softmax(-1)
    assert len(tokens) == NEW_TOKENS
    assert expected.argmax(-1).tolist() == tokens
    chosen = expected.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    torch.testing.assert_close(logprobs, chosen, rtol=0, atol=1e-3)


def unquantise_cache(model: Path) -> None:
    """Have the checkpoint ask for no FP8 cache, so that the cache is float32 as transformers'."""
    for file, keys in (
        ("config.json", ("quantization_config", "kv_cache_scheme")),
        ("hf_quant_config.json", ("quantization", "kv_cache_quant_algo")),
    ):
        value = json.loads((model / file).read_text())
        value[keys[0]].pop(keys[1], None)
        (model / file).write_text(json.dumps(value))


# The FP8 experts' 384 intermediate is three blocks: rank 1 begins in the middle of the second.
@pytest.mark.parametrize("weight_format", ["fp8", "nvfp4"])
def test_two_ranks(tmp_path, weight_format):
    """bf16 is what the four ranks below have."""
    random_checkpoint(tmp_path / "model", weight_format, TINY)
    if weight_format == "nvfp4":
        unquantise_cache(tmp_path / "model")
    check_against_transformers(tmp_path / "model", *run_engine(tmp_path / "model", tp_size=2))


def test_four_ranks(tmp_path):
    random_checkpoint(tmp_path / "model", "bf16", FOUR_KV_HEADS)
    check_against_transformers(tmp_path / "model", *run_engine(tmp_path / "model", tp_size=4))


def test_two_ranks_with_whole_experts(tmp_path):
    """Expert parallelism: each rank holds half of the experts, and all of each."""
    random_checkpoint(tmp_path / "model", "fp8", TINY)
    answer = run_engine(tmp_path / "model", tp_size=2, ep_size=2)
    check_against_transformers(tmp_path / "model", *answer)


def test_text_model_alone(tmp_path):
    """`Step3p5ForCausalLM`: the text model's config and tensors, without encoder and projector."""
    random_checkpoint(tmp_path / "whole", "bf16", TINY)
    text = shutil.copytree(tmp_path / "whole", tmp_path / "text")
    config = json.loads((text / "config.json").read_text())
    config["text_config"]["architectures"] = ["Step3p5ForCausalLM"]
    (text / "config.json").write_text(json.dumps(config["text_config"]))
    (text / "preprocessor_config.json").unlink()
    (text / INDEX_FILE).unlink()
    for path in text.glob("*.safetensors"):
        tensors = {n: t for n, t in load_file(path).items() if not n.startswith("vi")}
        path.unlink()
        if tensors:
            save_file(tensors, path, metadata={"format": "pt"})
    check_against_transformers(tmp_path / "whole", *run_engine(text))
