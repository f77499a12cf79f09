"""The whole of `step37 quantize`: checks, plan, calibration, shards, report."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import save_file

from step37_ext.checkpoint.files import fp8_config, nvfp4_config, nvfp4_legacy_config
from step37_ext.checkpoint.headers import read_json
from step37_ext.checkpoint.location import local_folder
from step37_ext.checkpoint.release_layout import static_scales
from step37_ext.model.config import TextShape
from step37_ext.model.tensors import cache_scale, canonical_name
from step37_ext.quantize.calibrate import calibrate, token_sequences
from step37_ext.quantize.convert import Places
from step37_ext.quantize.destination import Destination, small_files
from step37_ext.quantize.durable import replaced_at_end, write_json_durably
from step37_ext.quantize.plan import ModelDepth, Shard, TargetFormat, plan_shards
from step37_ext.quantize.report import REPORT_FILE, error_report
from step37_ext.quantize.source import Source
from step37_ext.quantize.workers import convert_all

_SOURCES = {"fp8": ("bf16",), "nvfp4": ("bf16", "fp8")}
_MULTIMODAL = "Step3p7ForConditionalGeneration"


@dataclass(frozen=True)
class Checked:
    """A source that can be quantised, and the format of its experts."""

    source: Source
    text: TextShape
    weights: str


def quantize(
    src: str,
    out: Path,
    target: TargetFormat,
    *,
    calibration_text: Path | None = None,
    jobs: int = 1,
    console: Console,
) -> dict[str, Any]:
    """Write the checkpoint `src` to the folder `out` with its routed experts in `target`.

    A run that was stopped goes on when called again with the same arguments.

    Args:
        src: a folder, or a repository in the hub's cache.
        calibration_text: a text to take the static scales from: those of the KV cache and, for
            NVFP4, the experts' `input_scale`. Without it there are none.
        jobs: processes.
        console: for what is being done, and a progress bar where it is a terminal.

    Returns:
        What is in the report beside the checkpoint.

    Raises:
        ValueError: an argument or the source is not usable, `out` is not free, or the disk is too
            full.
        OSError: reading or writing failed.
        RuntimeError: a worker process was killed.
    """
    if target not in get_args(TargetFormat):
        raise ValueError(f"--format {target!r}: must be one of {', '.join(get_args(TargetFormat))}")
    if jobs < 1:
        raise ValueError(f"--jobs {jobs}: must be at least 1")
    checked = _check_source(src, target)
    source = checked.source
    shards = plan_shards(source.headers, checked.text, target, calibration_text is not None)
    destination = Destination(out, _plan(checked, target, calibration_text, shards))
    destination.check()
    others = small_files(source.folder)
    _check_space(destination, shards, others, console)
    with destination.claimed():
        calibration = None
        if calibration_text is not None:
            calibration = _calibrated(destination, checked, target, calibration_text, console)
        scales = destination.scales if calibration_text else None
        places = Places(source.folder, out, destination.records, scales, target)
        total = sum(task.nbytes for shard in shards for task in shard.tasks)
        with _progress(console, "quantising", total) as advance:
            records = convert_all(places, shards, jobs, advance)
        _tell_about_shards(records, console)
        report = {
            "source": str(source.folder.resolve()),
            "source_format": checked.weights,
            "format": target,
            "calibration": calibration,
            "errors": error_report(records.values()),
        }
        configs = _configs(checked, target, shards)
        destination.finish(shards, {REPORT_FILE: report} | configs, others)
    return report


def _check_source(src: str, target: TargetFormat) -> Checked:
    # Here, because it brings all of SGLang with it, which the worker processes need not import.
    from step37_ext.model.parallel import Parallel
    from step37_ext.start_checks import check_config, check_tensors

    folder = local_folder(src)
    if folder is None:
        raise ValueError(f"source {src}: is neither a folder nor a repository in the hub's cache")
    architectures = read_json(folder / "config.json").get("architectures") or []
    if architectures[:1] != [_MULTIMODAL]:
        raise ValueError(f"source {src}: is {architectures}; only {_MULTIMODAL} can be quantised")
    config = check_config(folder, Parallel(), None)
    weights = config.checkpoint.weights
    if weights not in _SOURCES[target]:
        raise ValueError(
            f"source {src}: its experts are in {weights}; {target} is made from "
            f"{' or '.join(_SOURCES[target])}"
        )
    check_tensors(folder, config)
    return Checked(Source(folder), config.text, weights)


def _plan(
    checked: Checked, target: TargetFormat, text: Path | None, shards: list[Shard]
) -> dict[str, Any]:
    """What must be equal for a stopped run to be gone on with."""
    folder = checked.source.folder
    stats = {
        file: (folder / file).stat()
        for file in sorted({header.file for header in checked.source.headers.values()})
    }
    return {
        "source": str(folder.resolve()),
        "format": target,
        "calibration text": hashlib.sha256(text.read_bytes()).hexdigest() if text else "none",
        "source files": {file: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()},
        "shards": {shard.file: [tensor.name for tensor in shard.outputs] for shard in shards},
    }


def _check_space(
    destination: Destination, shards: list[Shard], others: list[Path], console: Console
) -> None:
    needed, free = destination.bytes_to_write(shards, others), destination.free_bytes(shards)
    console.print(
        f"{destination.out}: {len(shards)} files, {_gigabytes(needed)} still to be written, "
        f"{_gigabytes(free)} free",
        highlight=False,
        soft_wrap=True,
    )
    if needed > free:
        raise ValueError(
            f"output {destination.out}: needs {_gigabytes(needed)}, {_gigabytes(free)} are free"
        )


def _calibrated(
    destination: Destination,
    checked: Checked,
    target: TargetFormat,
    text: Path,
    console: Console,
) -> dict[str, Any]:
    """Make the scales' file, unless a run before has; what the report says about it."""
    summary_path = destination.state / "calibration.json"
    if summary_path.is_file():  # written after the scales
        return read_json(summary_path)
    sequences = token_sequences(checked.source.folder, text)
    layers = len(checked.text.layers)
    with _progress(console, "calibrating", layers) as advance:
        result, unrouted = calibrate(checked.source, checked.text, sequences, partial(advance, 1))
    depth = ModelDepth.of(checked.text)
    scales = {
        name: scale
        for name, scale in static_scales(depth, result).items()
        if target == "nvfp4" or cache_scale(name, checked.text)
    }
    with replaced_at_end(destination.scales) as path:
        save_file(scales, path)
    summary = {
        "text": text.name,
        "sequences": len(sequences),
        "tokens": sum(len(ids) for ids in sequences),
        "experts_without_a_token": {
            str(layer): count for layer, count in zip(depth.moe_layers, unrouted, strict=True)
        },
    }
    write_json_durably(summary_path, summary)
    return summary


def _configs(
    checked: Checked, target: TargetFormat, shards: list[Shard]
) -> dict[str, dict[str, Any]]:
    """The JSON files that name the format, config.json last."""
    config = read_json(checked.source.folder / "config.json")
    config.pop("quantization_config", None)
    if target == "fp8":
        shapes = {name: header.shape for name, header in checked.source.headers.items()}
        return {"config.json": config | {"quantization_config": fp8_config(shapes)}}
    names = (canonical_name(tensor.name) for shard in shards for tensor in shard.outputs)
    fp8_cache = any(cache_scale(name, checked.text) for name in names)
    depth = ModelDepth.of(checked.text)
    quantization = nvfp4_config(depth, fp8_cache=fp8_cache)
    return {
        "hf_quant_config.json": nvfp4_legacy_config(depth, fp8_cache=fp8_cache),
        "config.json": config | {"quantization_config": quantization},
    }


def _tell_about_shards(records: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    kept = sum(record["state"] == "kept" for record in records.values())
    if kept:
        console.print(f"{kept} files of an earlier run were verified and kept", highlight=False)
    for file, record in records.items():
        if record["state"] == "damaged":
            console.print(f"{file} of an earlier run was damaged: written again", highlight=False)


@contextmanager
def _progress(console: Console, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar, on a terminal only; yields what is called with each step."""
    columns = (
        TextColumn(what),
        BarColumn(),
        TextColumn("{task.percentage:.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        yield lambda count: progress.update(task, advance=count)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.3f} GB" if count < 10**9 else f"{count / 1e9:.1f} GB"
