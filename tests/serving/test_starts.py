"""Starting and stopping: with remote code, without the plug-in, and in the middle."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from rich.console import Console

from step37_ext.chat import ask, connect
from step37_ext.checkpoint.dialogues import DIALOGUES
from step37_ext.checkpoint.weight_format import WeightFormat
from step37_ext.local_server import LocalServer, ServerDied

Tiny = Callable[[WeightFormat], Path]
ASKED = [dialogue for dialogue in DIALOGUES if dialogue.name in ("hello", "picture_ticket")]


def test_remote_code_starts_the_same_model_and_a_killed_worker_ends_it(with_auto_map: Path) -> None:
    """And the server logs once which implementation runs each operation."""
    with LocalServer(with_auto_map, "--trust-remote-code") as server:
        server.wait_ready(Console())
        with connect(server.url) as client:
            assert [ask(client, asked).difference(asked) for asked in ASKED] == [None, None]
        operations = server.operations()
        check_end_by_a_killed_worker(server)
    rows = [line.split("\u2502")[1:-1] for line in operations.splitlines() if "reference" in line]
    table = {cells[0].strip(): [cell.strip() for cell in cells[1:4]] for cells in rows}
    assert table["attend"] == ["0-3", "-", "reference"]
    assert table["experts"] == ["1-3", "bf16", "reference"]


def check_end_by_a_killed_worker(server: LocalServer) -> None:
    """A killed worker: a request in flight fails, the server says why it ends, its port is free."""
    parent = psutil.Process(server.pid)
    processes = [parent, *parent.children(recursive=True)]
    (worker,) = [process for process in processes if "scheduler" in process.name()]
    endless = {"text": "Hello!", "sampling_params": {"max_new_tokens": 3900, "ignore_eos": True}}
    with ThreadPoolExecutor(1) as pool:
        url = f"{server.url}/generate"
        request = pool.submit(httpx.post, url, json=endless, timeout=60, trust_env=False)
        while not httpx.get(f"{server.url}/v1/loads", trust_env=False).json()["loads"][0][
            "num_running_reqs"
        ]:
            time.sleep(0.1)
        worker.kill()
        with pytest.raises(httpx.TransportError):
            request.result()
    deadline = time.monotonic() + 20
    while any(map(runs, processes)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(runs, processes))
    assert f"scheduler_0 (pid={worker.pid}) crashed with exit code -9" in server.log_tail()
    with socket.socket() as port:
        port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as every server does
        port.bind(("127.0.0.1", server.port))


def test_without_the_plugin_the_start_fails(tiny: Tiny) -> None:
    # SGLang loads the plug-ins that this variable names, and none has this name.
    without = {"SGLANG_PLUGINS": "none"}
    with (
        pytest.raises(ServerDied, match="AmbiguousGlobalPerLayerAttributeError"),
        LocalServer(tiny("bf16"), environment=without) as server,
    ):
        server.wait_ready(Console())


def test_ctrl_c_leaves_no_process(tiny: Tiny) -> None:
    processes: list[psutil.Process] = []
    with pytest.raises(KeyboardInterrupt), LocalServer(tiny("bf16")) as server:
        while len(processes) < 3:  # the server, and two of its workers
            time.sleep(0.2)
            parent = psutil.Process(server.pid)
            processes = [parent, *parent.children(recursive=True)]
        raise KeyboardInterrupt
    deadline = time.monotonic() + 5  # a killed process takes a moment to give back its memory
    while any(map(runs, processes)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(runs, processes))


def runs(process: psutil.Process) -> bool:
    """Whether a process is there and not merely waiting to be reaped by its new parent."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
