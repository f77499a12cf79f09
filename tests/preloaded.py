"""Python scripts in forks of one process that has imported SGLang.

Importing SGLang takes ten seconds of a core, in three processes of a server and in four of an
engine with two ranks. Nothing but the imports is saved: no plug-in is loaded before the fork, and
arguments, ports, process groups and the model are made in it. Workers that SGLang would spawn are
forks too; what it spawns is tested by the servers of tests/serving/conftest.py.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import IO

import pytest

from step37_ext.local_server import PLATFORM

_PRELOADED = (
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager",
)


class Popen:
    """Stands for `subprocess.Popen` of a Python script, for the arguments that are used here.

    Args:
        command: the script's path and its arguments; a script is run by this interpreter.
        env: the script's environment.
        stdout: file for what it writes.
        stderr: file for its errors, or `subprocess.STDOUT`.
        other: of `subprocess.Popen`; a session of its own and no input are what there is.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        env: Mapping[str, str],
        stdout: IO[bytes],
        stderr: IO[bytes] | int,
        **other: object,
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        with pytest.MonkeyPatch.context() as patch:
            # SGLang chooses a platform, and Triton its interpreter, as they are imported. On a CPU
            # an interpreter that nobody asks for is not used.
            for name, value in (PLATFORM | {"TRITON_INTERPRET": "1"}).items():
                patch.setenv(name, value)
            context.set_forkserver_preload(list(_PRELOADED))
            forkserver.ensure_running()
        errors = stdout.name if isinstance(stderr, int) else stderr.name
        outputs = (stdout.name, errors)
        arguments = ([str(word) for word in command], dict(env), os.getcwd(), outputs)
        self._process = context.Process(target=_run_script, args=arguments)
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """The exit status, or None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """The exit status.

        Raises:
            subprocess.TimeoutExpired: it has not ended within `timeout` seconds.
        """
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        return self._process.exitcode


def output(*command: str | Path, timeout: float = 300.0, **environment: str) -> str:
    """What a script that has to succeed within `timeout` seconds has written.

    Args:
        command: the script's path and its arguments.
        environment: variables beside this process's.
    """
    with tempfile.NamedTemporaryFile() as written, tempfile.NamedTemporaryFile() as errors:
        process = Popen(command, os.environ | environment, written, errors)
        try:
            code = process.wait(timeout)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, 9)
        assert code == 0, Path(errors.name).read_text(errors="replace")[-3000:]
        return Path(written.name).read_text()


def _run_script(
    command: list[str], env: dict[str, str], folder: str, outputs: tuple[str, str]
) -> None:
    """The fork: its environment, folder, process group and outputs, then the script."""
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    for standard, name in enumerate(outputs, 1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), standard)
    multiprocessing.set_start_method("fork", force=True)
    # SGLang asks for "spawn", whose processes would import everything again.
    multiprocessing.set_start_method = lambda *_, **__: None  # type: ignore[method-assign]
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))  # as Python does
    runpy.run_path(command[0], run_name="__main__")
