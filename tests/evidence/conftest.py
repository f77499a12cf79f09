"""A child process compiles one configuration of every kernel: the interpreter is on in this one.

All of them take several minutes; `make evidence` compiles them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def findings(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What `python -m step37_kernels.evidence` finds, kernel by kernel."""
    path: Path = tmp_path_factory.mktemp("evidence") / "findings.json"
    command = [sys.executable, "-m", "step37_kernels.evidence", "--quick", "--json", str(path)]
    done = subprocess.run(
        [*command, "--jobs", str(os.cpu_count() or 1)], capture_output=True, text=True
    )
    assert path.exists(), done.stdout + done.stderr
    return json.loads(path.read_text())["findings"]
