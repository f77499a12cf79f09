"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from step37_ext.checkpoint.make import make_tiny
from step37_ext.checkpoint.weight_format import WeightFormat


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[WeightFormat], Path]:
    """Weight format -> folder of the trained small model, made once a session.

    The first session on a machine trains the model, for up to three minutes; later ones find it
    in the user's cache.
    """
    folders: dict[WeightFormat, Path] = {}

    def folder(weight_format: WeightFormat) -> Path:
        if weight_format not in folders:
            out = tmp_path_factory.mktemp("tiny") / weight_format
            make_tiny(out, weight_format, quiet=True)
            folders[weight_format] = out
        return folders[weight_format]

    return folder
