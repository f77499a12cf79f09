"""A real `sglang serve` on this machine's CPU, stopped again whatever happens."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType

import httpx
from rich.console import Console

PLATFORM = {"SGLANG_PLATFORM": "step37_cpu"}

_MODEL_ARGUMENTS = (
    *("--device", "cpu", "--model-impl", "step37"),
    *("--reasoning-parser", "step3p5", "--tool-call-parser", "step3p5"),
)
# A cache that fits any machine, and room for 32 requests at once.
_SMALL_MACHINE = (
    *("--max-total-tokens", "8192", "--max-running-requests", "32"),
    *("--mem-fraction-static", "0.3", "--skip-server-warmup", "--random-seed", "1"),
)
_TABLE_TITLE, _TABLE_END = "step37: operations", "\N{BOX DRAWINGS LIGHT UP AND RIGHT}"
_GRACE = 20.0  # seconds between asking the processes to end and ending them


class ServerDied(RuntimeError):
    """The server ended, or did not answer in time; the message ends with its last log lines."""


class LocalServer:
    """SGLang's own command line in a process group of its own; use it in a `with` statement.

    Args:
        checkpoint: folder of the checkpoint.
        arguments: further arguments of `sglang serve`.
        environment: variables set for the server, by default those that select this platform.
    """

    def __init__(
        self, checkpoint: Path, *arguments: str, environment: dict[str, str] | None = None
    ) -> None:
        self._environment = PLATFORM if environment is None else environment
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._arguments = ("serve", "--model-path", str(checkpoint), *_MODEL_ARGUMENTS, *arguments)
        self._log = tempfile.NamedTemporaryFile(prefix="sglang-", suffix=".log")
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0

    @property
    def pid(self) -> int:
        """Process id of the server, which is also its process group's."""
        assert self._process is not None, "LocalServer outside its with statement"
        return self._process.pid

    @property
    def command(self) -> str:
        """What a user would type for this server, less the limits for a small machine."""
        variables = " ".join(f"{key}={value}" for key, value in self._environment.items())
        return f"{variables} sglang {shlex.join(self._arguments)} --port {self.port}".strip()

    def __enter__(self) -> LocalServer:
        # The console script beside this interpreter. `python -m` would put the current folder on
        # the path, and SGLang would take a folder called `kernels` there for a package it uses.
        script = Path(sys.executable).with_name("sglang")
        inherited = {key: value for key, value in os.environ.items() if key not in PLATFORM}
        self._started = time.monotonic()
        self._process = subprocess.Popen(
            [
                *(str(script), *self._arguments, *_SMALL_MACHINE),
                *("--host", "127.0.0.1", "--port", str(self.port)),
            ],
            # The checkpoint is a folder, so that there is nothing to ask a model hub for.
            env=inherited | self._environment | {"HF_HUB_OFFLINE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C here reaches the server only through __exit__
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        process = self._process
        assert process is not None
        try:
            _signal_group(process.pid, signal.SIGTERM)
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            pass
        finally:  # also on a second Ctrl-C, and for workers that outlive the main process
            _signal_group(process.pid, signal.SIGKILL)
            process.wait()
            self._log.close()

    def wait_ready(self, console: Console, timeout: float = 300.0) -> float:
        """Wait until the server answers, with a progress line; returns seconds since its start.

        Raises:
            ServerDied: it ended, or `timeout` seconds went by since its start.
        """
        assert self._process is not None, "wait_ready outside the with statement"
        last_line = time.monotonic()
        with (
            httpx.Client(trust_env=False, timeout=10.0) as client,
            console.status("SGLang starts") as status,
        ):
            while not self._answers(client):
                now = time.monotonic()
                if (code := self._process.poll()) is not None:
                    raise ServerDied(f"sglang ended with status {code}:\n{self.log_tail()}")
                if now - self._started > timeout:
                    raise ServerDied(f"no answer for {timeout:.0f} s:\n{self.log_tail()}")
                line = f"SGLang starts, {now - self._started:.0f} s (usually 30 to 60) ..."
                status.update(line)
                if not console.is_terminal and now - last_line >= 10:  # no moving line in a file
                    console.print(line)
                    last_line = now
                time.sleep(0.5)
        return time.monotonic() - self._started

    def operations(self) -> str:
        """The table of operations and their implementations that the server logged at its start."""
        lines = iter(self.log_tail(100_000).splitlines())
        table: list[str] = []
        for line in lines:
            if table or line.startswith(_TABLE_TITLE):
                table.append(line)
            if table and line.startswith(_TABLE_END):
                break
        return "\n".join(table)

    def log_tail(self, lines: int = 30) -> str:
        """The last `lines` lines that the server wrote."""
        text = Path(self._log.name).read_text(encoding="utf-8", errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def _answers(self, client: httpx.Client) -> bool:
        try:
            return client.get(f"{self.url}/health").status_code == 200
        except httpx.TransportError:
            return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _signal_group(group: int, number: signal.Signals) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        pass
