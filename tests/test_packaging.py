"""Installing changes nothing in an SGLang image; what is shipped, under which names; hygiene."""

import ast
import json
import os
import re
import subprocess
import sys
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import setuptools
import tomllib
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# What `pip install sglang==VERSION` pins of our dependencies (its METADATA and PyTorch's); 0.5.21
# pins the same as 0.5.20, and 0.5.22 as 0.5.23.
IMAGES = {
    "0.5.20": {"torch": "2.13.0", "triton": "3.7.1", "transformers": "5.12.1"},
    "0.5.23": {"torch": "2.14.1", "triton": "3.8.0", "transformers": "5.19.0"},
}


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    """Standard output of a command that has to succeed."""
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip(*arguments: str | Path) -> str:
    return run(sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments)


def planned(report: Path) -> set[str]:
    """The names of what pip would install."""
    plan = json.loads(report.read_text())["install"]
    return {entry["metadata"]["name"] for entry in plan}


def test_editable_install_replaces_nothing_here(tmp_path):
    report = tmp_path / "report.json"
    # No index: the plan may only be made of what is installed already.
    plan = ["install", "--dry-run", "--no-index", "--no-build-isolation", "--report", report]
    pip(*plan, "-e", ROOT)
    assert planned(report) == {"step37-ext"}


def image(folder: Path, pins: dict[str, str]) -> Path:
    """An environment that has, by its metadata, this one's packages at an SGLang image's pins."""
    venv.create(folder, with_pip=False)
    site = next(folder.glob("lib/python*/site-packages"))
    versions = {d.metadata["Name"].lower(): d.version for d in metadata.distributions()}
    for name, version in (versions | pins).items():
        if name == "step37-ext":
            continue
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        header = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (info / "METADATA").write_text(header)
    return folder / "bin" / "python"


@pytest.mark.parametrize("version", IMAGES)
def test_dependencies_change_nothing_in_an_sglang_image(tmp_path, version):
    python = image(tmp_path / "image", IMAGES[version])
    report = tmp_path / "report.json"
    plan = ["install", "--dry-run", "--no-index", "--report", report]
    pip("--python", python, *plan, *PROJECT["dependencies"])
    assert planned(report) == set()


def test_dependencies_have_no_upper_bound():
    operators = {
        (requirement.name, specifier.operator)
        for requirement in map(Requirement, PROJECT["dependencies"])
        for specifier in requirement.specifier
    }
    assert {operator for _, operator in operators} == {">="}, operators


def test_cpu_extra_has_the_pins_of_sglang():
    """Where SGLang pins a package that the [cpu] extra lists, the extra has that version."""
    theirs = {
        requirement.name.lower(): requirement.specifier
        for requirement in map(Requirement, metadata.requires("sglang") or ())
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    }
    for ours in map(Requirement, PROJECT["optional-dependencies"]["cpu"]):
        pinned = theirs.get(ours.name.lower(), "")
        # torch is the exception that pyproject.toml gives a reason for.
        if "==" in str(pinned) and ours.name != "torch":
            assert ours.specifier == pinned, f"SGLang: {ours.name}{pinned}"


def sources() -> list[str]:
    """The repository's files, those not yet added to git included, by their path in it."""
    names = git("ls-files", "--cached", "--others", "--exclude-standard")
    return [name for name in names if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of what is packaged, so that building leaves nothing behind in the repository."""
    source = tmp_path_factory.mktemp("source")
    for name in sources():
        if name.startswith(("kernels/", "step37_ext/")) or "/" not in name:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    return source


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Time of change and size of every file under `folder`, by its path in it."""
    stats = {p.relative_to(folder): p.stat() for p in folder.rglob("*") if p.is_file()}
    return {str(name): (stat.st_mtime_ns, stat.st_size) for name, stat in stats.items()}


def test_editable_install_into_an_image_adds_itself_and_nothing_else(source, tmp_path):
    python = image(tmp_path / "image", IMAGES["0.5.23"])
    # The image has no more than the metadata of setuptools, which builds.
    tools = tmp_path / "tools"
    tools.mkdir()
    site = Path(setuptools.__file__).parents[1]
    for folder in (*site.glob("setuptools*"), *site.glob("_distutils_hack")):
        (tools / folder.name).symlink_to(folder)
    before = files(python.parents[1])
    command = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
    install = ("install", "--no-index", "--no-build-isolation", "-e", source)
    run(*command, *install, PYTHONPATH=str(tools), PYTHONDONTWRITEBYTECODE="1")
    after = files(python.parents[1])
    assert {name: after.get(name) for name in before} == before
    site_packages = r"lib/.*/site-packages/((__pycache__/)?__editable__.*)?step37_ext.*"
    own = re.compile(rf"bin/step37|{site_packages}")
    added = after.keys() - before.keys()
    assert len(added) > 3 and [name for name in added if not own.fullmatch(name)] == []


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", out, source)
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_wheel_has_the_two_packages_and_nothing_called_kernels(wheel):
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {
        "step37_ext",
        "step37_kernels",
    }


def test_wheel_has_every_file_of_the_packages(wheel):
    files = {
        name.removeprefix("kernels/")
        for name in sources()
        if name.startswith(("kernels/", "step37_ext/"))
    }
    assert files - set(wheel.namelist()) == set()


def test_wheel_names_its_license_as_spdx_does(wheel):
    folder = next(name for name in wheel.namelist() if name.endswith("METADATA")).split("/")[0]
    assert "License-Expression: Apache-2.0\n" in wheel.read(f"{folder}/METADATA").decode()
    assert wheel.read(f"{folder}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()


def test_entry_points_are_there_and_load():
    found = {
        (point.dist.name, group, point.name): point.load()
        for group in ("sglang.srt.plugins", "sglang.srt.platforms", "console_scripts")
        for point in metadata.entry_points(group=group)
        if point.dist is not None and point.dist.name.startswith("step37")
    }
    assert set(found) == {
        ("step37-ext", "sglang.srt.plugins", "step37"),
        ("step37-ext", "console_scripts", "step37"),
        ("step37-cpu", "sglang.srt.platforms", "step37_cpu"),
    }
    assert all(map(callable, found.values()))


def imported(file: Path) -> set[str]:
    """Top-level names of everything that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").split(".")[0])
    return names


def test_kernels_import_torch_triton_numpy_and_nothing_else():
    """But for what is not there when they run on a GPU, or may be missing there."""
    allowed = sys.stdlib_module_names | {"step37_kernels", "torch", "triton", "numpy"}
    beside = {
        "interpret.py": {"ml_dtypes"},  # the interpreter's numbers
        "e4m3_words.py": {"ml_dtypes"},
        "grouped_nvfp4.py": {"ml_dtypes"},
        "grouped_nvfp4_fp8.py": {"ml_dtypes"},
        "__main__.py": {"click", "rich"},  # the command that shows machine code
        "flashinfer_cutlass.py": {"flashinfer"},  # used where it is installed
    }
    files = list((ROOT / "kernels").rglob("*.py"))
    assert files
    foreign = {
        str(file.relative_to(ROOT)): imported(file) - allowed - beside.get(file.name, set())
        for file in files
    }
    assert {file: names for file, names in foreign.items() if names} == {}


def test_the_folder_kernels_does_not_hide_the_package_kernels(tmp_path):
    """SGLang does `from kernels import get_kernel, load_kernel`, also when started from here."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("get_kernel = load_kernel = 'the package'\n")
    # `python -c` puts the current folder, the repository's root, before PYTHONPATH.
    command = "from kernels import get_kernel, load_kernel; print(get_kernel)"
    assert run(sys.executable, "-c", command, PYTHONPATH=str(tmp_path)) == "the package\n"


def git(*arguments: str) -> list[str]:
    return run("git", *arguments).splitlines()


def tracked() -> list[Path]:
    files = (ROOT / name for name in git("ls-files"))
    return [file for file in files if file.is_file()]


def test_no_tracked_file_is_larger_than_one_megabyte():
    sizes = {str(file.relative_to(ROOT)): file.stat().st_size for file in tracked()}
    assert {name: size for name, size in sizes.items() if size > 1_000_000} == {}


def test_no_registry_host_and_no_path_of_a_machine_in_the_text():
    # Put together here, so that this file does not contain what it looks for.
    hosts = ["py" + r"pi\.", "python" + "hosted", "download" + r"\.pytorch", "npm" + "js"]
    folders = ["work", "root", "home", "Users"]
    forbidden = re.compile("|".join(hosts + [rf"(?<![\w.\-]){'/' + f}/" for f in folders]))
    found = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in tracked()
        for number, line in enumerate(file.read_text(errors="replace").splitlines(), 1)
        if forbidden.search(line)
    ]
    assert not found


def test_ruff_and_mypy_find_nothing():
    for check in (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]):
        run(sys.executable, "-m", *check)
