"""Speed of the kernels, measured beside their floors and their peers."""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("step37_kernels") is None:  # a bare checkout, nothing installed
    sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
