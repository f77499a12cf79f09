"""`make compat` finds what a new SGLang no longer has, and the list of seams is complete."""

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest
from click.testing import CliRunner
from packaging.version import Version

from step37_ext import compat
from step37_ext.seam import Seam
from step37_ext.seams import SEAMS
from step37_ext.sglang_source import SglangSource

PACKAGE = Path(compat.__file__).parent
SRT = "sglang.srt"


@pytest.fixture(scope="module")
def installed() -> SglangSource:
    return SglangSource.installed()


def test_installed_sglang_has_every_seam(installed):
    failures = {seam.target: why for seam, why in compat.check(installed).items() if why}
    assert failures == {}


def overlay(root: Path, installed: Path, changed: Path) -> Path:
    """A site-packages of links to the installed SGLang, with real folders down to one file."""
    here, there = root, installed
    for part in changed.parts:
        here.mkdir()
        for entry in there.iterdir() if there != installed else ():
            if entry.name != part:
                (here / entry.name).symlink_to(entry)
        here, there = here / part, there / part
    return here


@pytest.mark.parametrize(
    "file, old, new, target, said",
    [
        pytest.param(
            "sglang/srt/model_loader/utils.py",
            "def get_model_architecture(",
            "def model_architecture(",
            f"{SRT}.model_loader.utils.get_model_architecture",
            "has no get_model_architecture",
            id="function renamed",
        ),
        pytest.param(
            "sglang/srt/layers/rotary_embedding/factory.py",
            "    rope_scaling: Optional[Dict[str, Any]] = None,\n",
            "",
            f"{SRT}.layers.rotary_embedding.get_rope",
            "rope_scaling",
            id="parameter removed",
        ),
        pytest.param(
            "sglang/srt/layers/radix_attention.py",
            "        head_dim: int,\n        scaling: float,\n",
            "        scaling: float,\n        head_dim: int,\n",
            f"{SRT}.layers.radix_attention.RadixAttention",
            "head_dim of our call is now scaling",
            id="parameters swapped",
        ),
        pytest.param(
            "sglang/srt/configs/update_config.py",
            "load_config: LoadConfig, tp_size: int\n) -> ModelConfig",
            "load_config: LoadConfig, tp_size: int, ep_size: int\n) -> ModelConfig",
            f"{SRT}.configs.update_config.adjust_config_with_unaligned_cpu_tp",
            "ep_size",
            id="hooked function gets one more",
        ),
        pytest.param(
            "sglang/srt/mem_cache/swa_memory_pool.py",
            "class SWAKVPool(",
            "class SlidingKVPool(",
            f"{SRT}.mem_cache.swa_memory_pool.SWAKVPool.full_to_swa_index_mapping",
            "has no SWAKVPool",
            id="class renamed",
        ),
        pytest.param(
            "sglang/srt/model_executor/forward_batch_info.py",
            "    out_cache_loc: torch.Tensor",
            "    cache_loc: torch.Tensor",
            f"{SRT}.model_executor.forward_batch_info.ForwardBatch.out_cache_loc",
            "has no out_cache_loc",
            id="field renamed",
        ),
    ],
)
def test_a_change_in_sglang_is_named(installed, tmp_path, file, old, new, target, said):
    site = Path(find_spec("sglang").origin).parents[1]
    source = (site / file).read_text()
    assert old in source, "the installed SGLang no longer has the text that this test changes"
    doctored = overlay(tmp_path / "site", site, Path(file))
    doctored.write_text(source.replace(old, new))

    results = compat.check(SglangSource(tmp_path / "site", installed.version))
    failures = {seam.target: why for seam, why in results.items() if why}
    assert said in failures.pop(target)
    # Whatever else fails is in the changed file: nothing unrelated is blamed.
    module = file.removesuffix(".py").replace("/", ".")
    assert all(name.startswith(module) for name in failures)


def test_exit_status_and_report_of_a_failure(monkeypatch):
    gone = Seam(f"{SRT}.server_args.no_such_name", "a test")
    monkeypatch.setattr(compat, "SEAMS", (gone,))
    outcome = CliRunner().invoke(compat.main, [])
    assert outcome.exit_code == 1
    assert "FAILS" in outcome.output
    assert f"{gone.target}\n    module {SRT}.server_args has no no_such_name" in outcome.output
    assert "compat: 0/1" in outcome.output


def test_a_file_that_is_no_wheel_is_refused(tmp_path):
    file = tmp_path / "sglang.txt"
    file.touch()
    outcome = CliRunner().invoke(compat.main, [str(file)])
    assert outcome.exit_code == 1
    assert "sglang.txt is not a wheel" in outcome.output


def test_every_sglang_import_of_the_package_is_a_seam():
    targets = {seam.target for seam in SEAMS}
    listed = targets | {target.rpartition(".")[0] for target in targets}
    missing = {
        f"{file.relative_to(PACKAGE)}: {name}"
        for file in PACKAGE.rglob("*.py")
        for name in sglang_imports(ast.parse(file.read_text()))
        if name not in listed
    }
    assert not missing, "add to step37_ext/seams.py, with the call made on it"


def sglang_imports(tree: ast.Module) -> set[str]:
    """Full dotted names of everything that a file imports from SGLang."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sglang":
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.name for a in node.names if a.name.split(".")[0] == "sglang"}
    return names


@pytest.mark.parametrize("version", ["0.5.20", "0.5.23", "0.5.23.post1", "0.6.0"])
def test_supported_versions(version):
    assert compat.supported_version(version) is None


@pytest.mark.parametrize("version", ["0.5.19", "0.5.20rc1", "0.0.0.dev0", "unknown"])
def test_older_versions_are_refused_by_name(version):
    sentence = compat.supported_version(version)
    assert sentence is not None
    assert version in sentence and "0.5.20" in sentence


def test_a_newer_version_is_warned_about():
    assert compat.unchecked_version("0.5.23") is None
    warning = compat.unchecked_version("0.5.24")
    assert warning is not None
    assert "0.5.24" in warning and "0.5.23" in warning


def test_seams_of_some_versions_only():
    seam = Seam("sglang", "a test", since="0.5.21", before="0.5.23")
    used = [v for v in ("0.5.20", "0.5.21", "0.5.22", "0.5.23") if seam.applies_to(Version(v))]
    assert used == ["0.5.21", "0.5.22"]
