"""A checkpoint that cannot be served is refused before a server starts, by name."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from sglang.srt.arg_groups.arg_utils import field_names
from sglang.srt.server_args import ServerArgs

from step37_ext import start_checks
from step37_ext.checkpoint.headers import INDEX_FILE
from step37_ext.checkpoint.spec import TINY
from step37_ext.start_checks import (
    Parallel,
    check_architecture,
    check_config,
    check_drafts,
    check_refused_arguments,
    check_tensors,
)

FORMATS = ("bf16", "fp8", "nvfp4")
ONE_RANK = Parallel()


@pytest.fixture
def copy(untrained, tmp_path):
    """A private copy of an untrained checkpoint of a format."""

    def make(weight_format: str) -> Path:
        return Path(shutil.copytree(untrained[weight_format], tmp_path / "copy"))

    return make


def file_with(folder: Path, tensor: str) -> Path:
    weight_map = json.loads((folder / INDEX_FILE).read_text())["weight_map"]
    return folder / weight_map[tensor]


def change(folder: Path, name: str, edit) -> None:
    """Rewrite the file that holds `name` after `edit(tensors)`."""
    path = file_with(folder, name)
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def rewrite(path: Path, edit) -> None:
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def check(
    folder: Path, parallel: Parallel = ONE_RANK, flag: str | None = None, drafts: int = 0
) -> None:
    check_tensors(folder, check_config(folder, parallel, flag, drafts))


def refusal(folder: Path, parallel: Parallel = ONE_RANK, flag: str | None = None) -> str:
    with pytest.raises(ValueError) as caught:
        check(folder, parallel, flag)
    return str(caught.value)


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("tp_size", [1, 2])
def test_good_checkpoints_pass(untrained, weight_format, tp_size):
    check(untrained[weight_format], Parallel(tp_size))


GATE = "model.layers.1.moe.gate_proj.weight"


def test_truncated_file(copy):
    folder = copy("bf16")
    path = file_with(folder, GATE)
    path.write_bytes(path.read_bytes()[:-100])
    assert path.name in (message := refusal(folder)) and "truncated" in message


def test_missing_shard(copy):
    folder = copy("fp8")
    path = file_with(folder, GATE)
    path.unlink()
    message = refusal(folder)
    assert path.name in message and INDEX_FILE in message and "missing" in message


def test_missing_tensor_names_shape_and_file(copy):
    folder = copy("bf16")
    path = file_with(folder, GATE)
    change(folder, GATE, lambda tensors: tensors.pop(GATE))
    rewrite(folder / INDEX_FILE, lambda index: index["weight_map"].pop(GATE))
    message = refusal(folder)
    assert GATE in message and "[8, 384, 256]" in message and path.name not in message
    rewrite(folder / INDEX_FILE, lambda index: index["weight_map"].update({GATE: path.name}))
    assert f"places {GATE} in {path.name}" in refusal(folder)


def test_wrong_shape(copy):
    folder = copy("bf16")
    change(folder, GATE, lambda tensors: tensors.update({GATE: tensors[GATE][:, :-1].clone()}))
    message = refusal(folder)
    assert GATE in message and "[8, 383, 256]" in message and "[8, 384, 256]" in message


def test_wrong_type(copy):
    folder = copy("nvfp4")
    name = "model.language_model.layers.2.moe.up_proj.weight_scale"
    change(folder, name, lambda tensors: tensors.update({name: tensors[name].float()}))
    message = refusal(folder)
    assert name in message and "F32" in message and "F8_E4M3" in message


def test_unknown_name_stops_unless_told(copy, monkeypatch, caplog):
    folder = copy("bf16")
    strange = "model.layers.1.moe.mystery.weight"
    change(folder, GATE, lambda tensors: tensors.update({strange: torch.zeros(2)}))
    assert strange in (message := refusal(folder)) and "STEP37_STRICT=0" in message
    monkeypatch.setenv("STEP37_STRICT", "0")
    check(folder)
    assert [strange in record.message for record in caplog.records] == [True]


@pytest.mark.parametrize("key, value", [("quant_algo", "W4A8_AWQ"), ("group_size", 32)])
def test_unsupported_nvfp4_variant(copy, key, value):
    folder = copy("nvfp4")
    rewrite(
        folder / "hf_quant_config.json", lambda quant: quant["quantization"].update({key: value})
    )
    message = refusal(folder)
    assert key in message and str(value) in message


def test_unsupported_fp8_block_and_method(copy):
    folder = copy("fp8")
    config = folder / "config.json"
    rewrite(config, lambda c: c["quantization_config"].update(weight_block_size=[64, 128]))
    assert "weight_block_size [64, 128]" in refusal(folder)
    rewrite(config, lambda c: c["quantization_config"].update(quant_method="awq"))
    assert "'awq'" in refusal(folder)


def test_flag_must_fit_the_checkpoint(untrained):
    check(untrained["nvfp4"], flag="modelopt_fp4")
    message = refusal(untrained["bf16"], flag="fp8")
    assert "--quantization 'fp8'" in message and "bf16" in message


@pytest.mark.parametrize(
    "weight_format, parallel, named",
    [
        ("bf16", Parallel(tp_size=3), "--tp 3"),
        ("bf16", Parallel(tp_size=4), "query heads"),
        ("bf16", Parallel(tp_size=2, ep_size=4), "--ep-size 4"),
    ],
)
def test_ranks_must_divide(untrained, weight_format, parallel, named):
    assert named in refusal(untrained[weight_format], parallel)


def test_experts_must_divide(copy):
    folder = copy("nvfp4")
    # Heads that divide by anything, so that the experts' 384 = 24 groups is what does not.
    spec = {"num_attention_heads": 64, "num_attention_groups": 64}
    other = spec | {"attention_type": "sliding_attention", "head_dim": 64}

    def widen(config):
        config["text_config"].update(spec, attention_other_setting=other)
        config["vision_config"]["heads"] = 64

    rewrite(folder / "config.json", widen)
    message = refusal(folder, Parallel(tp_size=64))
    assert "moe_intermediate_size 384" in message and "groups of 16" in message
    assert "--ep-size 16 does not divide the 8 experts" in refusal(
        folder, Parallel(tp_size=64, ep_size=16)
    )


def test_config_that_is_not_json(copy):
    folder = copy("bf16")
    (folder / "config.json").write_text("{")
    assert "config.json is not JSON" in refusal(folder)


def test_architecture():
    with pytest.raises(ValueError, match="LlamaForCausalLM"):
        check_architecture(["LlamaForCausalLM"])
    assert check_architecture(["Step3p5ForCausalLM"]) == "Step3p5ForCausalLM"


def arguments(**fields) -> SimpleNamespace:
    return SimpleNamespace(**({"device": "cpu", "attention_backend": None, "pp_size": 1} | fields))


def test_refused_arguments():
    check_refused_arguments(arguments(moe_a2a_backend="none"))
    with pytest.raises(ValueError, match="--moe-a2a-backend .here 'deepep'"):
        check_refused_arguments(arguments(moe_a2a_backend="deepep"))


@pytest.mark.parametrize(
    "name, value",
    [
        ("lora_paths", ["adapter"]),
        ("enable_deterministic_inference", True),
        ("rl_on_policy_target", "fsdp"),
        ("cpu_offload_gb", 4),
        ("offload_group_size", 2),
        ("enable_torch_compile", True),
    ],
)
def test_what_would_be_ignored_or_done_wrong_is_refused(name, value):
    with pytest.raises(ValueError, match=f"support --{name.replace('_', '-')} .here"):
        check_refused_arguments(arguments(**{name: value}))


def test_sglang_s_defaults_are_not_refused():
    """SGLang's own defaults, as its argument parser gives them; [] is no LoRA adapter too."""
    check_refused_arguments(ServerArgs(model_path="model"))
    check_refused_arguments(arguments(lora_paths=[]))


def test_refused_arguments_are_server_arguments():
    """A renamed one would be refused no more, without anyone noticing."""
    known = set(field_names(ServerArgs))
    names = {name for name, _, _ in start_checks._REFUSED_ARGUMENTS} - {"enable_dp_attention"}
    assert names - known == set()


def drafting(**fields) -> SimpleNamespace:
    defaults = {
        "device": "cuda",
        "model_path": "model",
        "attention_backend": None,
        "prefill_attention_backend": None,
        "decode_attention_backend": None,
        "speculative_algorithm": "EAGLE",
        "speculative_num_steps": None,
        "speculative_eagle_topk": None,
        "speculative_draft_model_path": None,
        "speculative_draft_attention_backend": None,
        "speculative_use_rejection_sampling": False,
    }
    return SimpleNamespace(**(defaults | fields))


def test_drafts_that_are_served():
    assert check_drafts(drafting(speculative_algorithm=None)) == 0
    assert check_drafts(drafting()) == check_drafts(drafting(device="cpu")) == 3
    assert check_drafts(drafting(speculative_algorithm="NEXTN", speculative_num_steps=2)) == 2
    assert check_drafts(drafting(speculative_algorithm="eagle")) == 3
    same = {"prefill_attention_backend": "fa3", "speculative_draft_attention_backend": "fa3"}
    assert check_drafts(drafting(attention_backend="fa3", **same)) == 3
    assert check_drafts(drafting(speculative_use_rejection_sampling=True)) == 3
    assert check_drafts(drafting(attention_backend="fa3", speculative_algorithm="NGRAM")) == 0


def test_drafts_that_are_refused_by_flag_and_value():
    for fields, said in (
        ({"speculative_algorithm": "NGRAM"}, "--speculative-algorithm is NGRAM;.* EAGLE or NEXTN"),
        ({"speculative_eagle_topk": 4}, "--speculative-eagle-topk is 4;.* or 1"),
        ({"speculative_draft_model_path": "other"}, "--speculative-draft-model-path is other;"),
        ({"speculative_draft_attention_backend": "fa3"}, "draft-attention-backend is fa3;.*step37"),
        ({"prefill_attention_backend": "fa3"}, r"one attention backend .* \(here fa3 apart\)"),
        ({"device": "cpu", "attention_backend": "torch_native"}, "on a CPU .* here torch_native"),
        ({"device": "cpu", "speculative_use_rejection_sampling": True}, "rejection-sampling is T"),
    ):
        with pytest.raises(ValueError, match=said):
            check_drafts(drafting(**fields))


def test_drafts_need_an_sglang_with_which_they_were_seen_to_work(monkeypatch):
    monkeypatch.setattr(start_checks, "version", lambda name: "0.5.22")
    assert check_drafts(drafting(speculative_algorithm=None)) == 0
    with pytest.raises(ValueError, match="needs SGLang 0.5.23 or later; this is SGLang 0.5.22"):
        check_drafts(drafting())


@pytest.mark.parametrize("weight_format", FORMATS)
def test_drafts_are_checked_with_the_checkpoint(copy, weight_format):
    folder = copy(weight_format)
    last = TINY.layers + TINY.mtp_layers - 1
    with pytest.raises(ValueError, match="has 3 MTP layers; there is none for draft step 3"):
        check(folder, drafts=4)
    check(folder, drafts=3)
    # The head's name is one of those that have `transformer.` in between.
    name = f"model.layers.{last}.transformer.shared_head.output.weight"
    change(folder, name, lambda tensors: tensors.pop(name))
    rewrite(folder / INDEX_FILE, lambda index: index["weight_map"].pop(name))
    check(folder, drafts=2)
    with pytest.raises(ValueError, match=f"model.layers.{last}.shared_head.output.weight is miss"):
        check(folder, drafts=3)


def test_a_checkpoint_without_mtp_layers(copy):
    folder = copy("bf16")
    index = json.loads((folder / INDEX_FILE).read_text())["weight_map"]
    decoder = tuple(f"model.layers.{layer}." for layer in range(TINY.layers))
    dropped = [n for n in index if n.startswith("model.layers.") and not n.startswith(decoder)]
    for name in dropped:
        change(folder, name, lambda tensors, name=name: tensors.pop(name))
    rewrite(folder / INDEX_FILE, lambda i: [i["weight_map"].pop(name) for name in dropped])
    check(folder)
    with pytest.raises(ValueError, match="the checkpoint carries no MTP layers"):
        check(folder, drafts=1)


def test_cache_scales_for_all_layers_or_none(copy):
    folder = copy("nvfp4")
    name = "model.language_model.layers.2.self_attn.v_proj.v_scale"
    change(folder, name, lambda tensors: tensors.pop(name))
    rewrite(folder / INDEX_FILE, lambda index: index["weight_map"].pop(name))
    assert "v_scale of layer 2 is missing" in refusal(folder)


def test_mtp_layers_are_known_by_the_lists_too(copy):
    folder = copy("bf16")
    config = folder / "config.json"
    rewrite(config, lambda c: c["text_config"].pop("num_nextn_predict_layers"))
    check(folder)

    def shorten(config):
        text = config["text_config"]
        text["layer_types"] = text["layer_types"][: text["num_hidden_layers"]]

    rewrite(config, shorten)
    assert f"model.layers.{TINY.layers}." in refusal(folder)
