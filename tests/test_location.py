"""A checkpoint given by a repository's name is checked by what the hub's cache holds of it."""

import shutil
from types import SimpleNamespace

import huggingface_hub.constants
import pytest

from step37_ext import hooks, server_facts
from step37_ext.checkpoint.headers import INDEX_FILE, SINGLE_FILE
from step37_ext.checkpoint.location import folder_with_configs, local_folder, weights_folder

REPOSITORY = "step37-tests/untrained-nvfp4"


@pytest.fixture
def cached(untrained, tmp_path, monkeypatch):
    """The snapshot folder of a repository whose config files were fetched, and nothing else."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / f"models--{REPOSITORY.replace('/', '--')}"
    snapshot = repository / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    for file in ("config.json", "hf_quant_config.json"):
        shutil.copy(untrained["nvfp4"] / file, snapshot)
    return snapshot


def test_where_a_checkpoint_is(cached, untrained):
    assert local_folder(REPOSITORY) == folder_with_configs(REPOSITORY) == cached
    assert local_folder(str(untrained["bf16"])) == untrained["bf16"]
    for absent in ("step37-tests/nothing", "no repository's name"):
        assert local_folder(absent) is None and folder_with_configs(absent) is None


def test_weights_are_where_they_were_downloaded_to(cached, untrained, tmp_path, monkeypatch):
    """SGLang keeps config files in the hub's cache, and puts weights under --download-dir."""
    assert weights_folder(REPOSITORY) is None  # configs alone are no weights
    there = tmp_path / "there"
    snapshot = there.joinpath(*cached.relative_to(tmp_path).parts)
    shutil.copytree(untrained["nvfp4"], snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(snapshot.name)
    server = SimpleNamespace(model_path=REPOSITORY, revision=None, download_dir=str(there))
    monkeypatch.setattr(server_facts, "get_model", lambda: server)
    assert server_facts.checkpoint_folder() == snapshot
    (snapshot / INDEX_FILE).rename(snapshot / SINGLE_FILE)  # a checkpoint of one file
    assert server_facts.checkpoint_folder() == snapshot
    server.download_dir = None
    assert server_facts.checkpoint_folder() is None


def test_a_repository_is_checked_before_its_weights_are_there(cached, monkeypatch):
    monkeypatch.setattr(hooks, "resolving_view", lambda arguments: arguments)
    monkeypatch.setattr(hooks, "declare_resolution", lambda *args, **fields: None)

    def start(**fields):
        arguments = {
            "model_impl": "step37",
            "model_path": REPOSITORY,
            "revision": None,
            "device": "cuda",
            "attention_backend": None,
            "prefill_attention_backend": None,
            "decode_attention_backend": None,
            "moe_runner_backend": "auto",
            "load_format": "auto",
            "cuda_graph_config": None,
            "cuda_graph_backend_decode": None,
            "cuda_graph_backend_prefill": None,
            "speculative_draft_kv_cache_dtype": None,
            "speculative_algorithm": None,
            "max_running_requests": None,
            "kv_cache_dtype": "auto",
            "dtype": "auto",
            "model_loader_extra_config": "{}",
            "tp_size": 2,
            "ep_size": 1,
            "quantization": None,
        }
        hooks.check_start(SimpleNamespace(**(arguments | fields)), lambda server_args: None)

    start()
    with pytest.raises(ValueError, match="--tp 3 does not divide"):
        start(tp_size=3)
    with pytest.raises(ValueError, match="--quantization 'fp8' does not fit"):
        start(quantization="fp8")


def test_format_from_the_cached_config_files(cached):
    """An NVFP4 repository may say so in hf_quant_config.json alone."""
    config = SimpleNamespace(
        model_impl="step37",
        model_path=REPOSITORY,
        revision=None,
        quantization="modelopt_fp4",
        hf_config=SimpleNamespace(architectures=["Step3p7ForConditionalGeneration"]),
    )
    chosen = hooks.quantization_config(lambda *_: None, config, None)
    assert (chosen.weights, chosen.kv_cache_quant_algo) == ("nvfp4", "FP8")
