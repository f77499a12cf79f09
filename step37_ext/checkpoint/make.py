"""Making small checkpoints: the trained one, and untrained ones of any size for tests."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from step37_ext.checkpoint.files import write_files
from step37_ext.checkpoint.init import initial_weights
from step37_ext.checkpoint.release_layout import Calibration, in_format
from step37_ext.checkpoint.spec import TINY, TinySpec
from step37_ext.checkpoint.weight_format import WeightFormat
from step37_ext.checkpoint.write import folder_at_once, require_free, write_tensors


def make_tiny(out: Path, weight_format: WeightFormat, *, quiet: bool = False) -> None:
    """Write the trained small model to the folder `out` in `weight_format`.

    The first call trains it, for two to three minutes on two cores, and caches the weights; later
    ones take seconds. `quiet` hides the progress bar.

    Raises:
        ValueError: `weight_format` is unknown, or `out` is a file or a folder that is not empty.
        RuntimeError: training ended with a wrong answer.
    """
    from step37_ext.checkpoint.cache import trained_weights

    _check(out, weight_format)
    weights, calibration = trained_weights(quiet=quiet)
    with folder_at_once(out) as folder:
        write_files(folder, TINY, weight_format)
        write_tensors(folder, in_format(TINY, weights, weight_format, calibration))


def random_checkpoint(
    out: Path, weight_format: WeightFormat, spec: TinySpec, seed: int = 0
) -> None:
    """Write an untrained model of any sizes to the folder `out`; same seed, same bytes.

    Raises:
        ValueError: as `make_tiny`.
    """
    _check(out, weight_format)
    weights = initial_weights(spec, seed)
    calibration: Calibration | None = None
    if weight_format == "nvfp4":
        from step37_ext.checkpoint.calibrate import calibrate
        from step37_ext.checkpoint.dialogues import DIALOGUES
        from step37_ext.checkpoint.oracle import encode, load_model

        model = load_model(spec, weights)
        calibration = calibrate(spec, model, encode(spec, model, DIALOGUES[:4]))
    with folder_at_once(out) as folder:
        write_files(folder, spec, weight_format)
        write_tensors(folder, in_format(spec, weights, weight_format, calibration))


def _check(out: Path, weight_format: WeightFormat) -> None:
    if weight_format not in get_args(WeightFormat):
        allowed = ", ".join(get_args(WeightFormat))
        raise ValueError(f"weight format {weight_format!r}: must be one of {allowed}")
    require_free(out)
