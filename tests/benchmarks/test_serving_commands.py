"""The serving benchmark's commands, by SGLang's own parsers, and its handling of servers."""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import time
from types import SimpleNamespace

import click
import pytest
from click.testing import CliRunner

from benchmarks import serving
from benchmarks.serving import Server, bench_command, comparison, read_results, running, servers
from step37_ext.deploy.plans import Request, make_plan

PORT = 30037
REQUESTS = [Request("h200", 4, "fp8"), Request("b200", 4, "nvfp4"), Request("h200", 4, "nvfp4")]


def test_sglang_reads_the_benchmarks_arguments(tmp_path, monkeypatch):
    # Its readers of named datasets import Hugging Face's library, which this one does not use.
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=None))
    from sglang.benchmark import serving as sglangs

    command = bench_command("a/model", PORT, 8, (8192, 1024), "stock", tmp_path / "r.jsonl")
    assert command[:3] == [sys.executable, "-m", "sglang.bench_serving"]
    read: list[argparse.Namespace] = []
    monkeypatch.setattr(sys, "argv", ["bench_serving", *command[3:]])
    monkeypatch.setattr(sglangs, "run_benchmark", read.append)
    sglangs.cli_main()
    expected = {
        "backend": "sglang", "host": "127.0.0.1", "port": PORT, "model": "a/model",
        "dataset_name": "random-ids", "random_input_len": 8192, "random_output_len": 1024,
        "random_range_ratio": 1.0, "seed": 37, "num_prompts": 32, "max_concurrency": 8,
        "warmup_requests": 8, "flush_cache": True, "tokenize_prompt": True, "tag": "stock",
        "output_file": str(tmp_path / "r.jsonl"), "disable_ignore_eos": False,
    }  # fmt: skip
    assert {name: getattr(read[0], name) for name in expected} == expected


def test_stock_and_ours_differ_in_the_kernels_alone():
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    for request in REQUESTS:
        stock, ours = servers(make_plan(request), PORT)
        assert (stock.environment, ours.environment) == ({"SGLANG_PLUGINS": "none"}, {})
        # "step37" is a choice only where the plug-in is loaded, so that only stock is parsed.
        read = parser.parse_args(stock.command[2:])
        assert (read.port, read.tp_size, read.model_impl) == (PORT, 4, "auto")
        blackwell = request.gpu == "b200"
        assert read.attention_backend == ("trtllm_mha" if blackwell else None)
        assert read.moe_runner_backend == ("flashinfer_trtllm" if blackwell else "auto")
        kernels = {"--model-impl", "step37", "--attention-backend"}
        assert set(ours.command) - set(stock.command) == kernels - (
            {"--attention-backend"} if blackwell else set()
        )


def test_dry_run_prints_and_starts_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(serving.subprocess, "Popen", lambda *a, **k: pytest.fail("started"))
    arguments = "--gpu h200 --count 4 --quant fp8 --concurrency 3 --dry-run --output"
    done = CliRunner().invoke(serving.main, [*arguments.split(), str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    first, bench, *_ = done.output.splitlines()
    assert first.startswith("SGLANG_PLUGINS=none sglang serve --model-path stepfun-ai/Step-3.7")
    assert "--max-running-requests 3" in first and "--context-length 9280" in first
    assert "--max-concurrency 3" in bench and "--model-impl step37" in done.output
    assert not (tmp_path / "out").exists()


def test_a_plan_that_does_not_fit_is_refused():
    done = CliRunner().invoke(serving.main, "--gpu h200 --count 2 --quant bf16".split())
    assert done.exit_code == 1 and "does not fit" in done.output


ANSWERING = """
import http.server, os, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
print("pid", os.getpid(), os.environ["MARK"], flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_a_server_runs_until_the_block_ends(tmp_path, unused_port, monkeypatch):
    monkeypatch.setattr(serving, "_POLL", 0.1)
    log = tmp_path / "log"
    command = [sys.executable, "-c", ANSWERING, str(unused_port)]
    with running(Server("stock", command, {"MARK": "marked"}), unused_port, log, 30):
        _, pid, mark = log.read_text().split()[:3]
        os.kill(int(pid), 0)
        assert mark == "marked"
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


def test_a_port_that_is_taken_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(serving.subprocess, "Popen", lambda *a, **k: pytest.fail("started"))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with (
            pytest.raises(click.ClickException, match=f"on port {port} already: give --port"),
            running(Server("stock", [], {}), port, tmp_path / "log", 1),
        ):
            pass


@pytest.mark.parametrize(
    ("code", "said"),
    [("raise SystemExit(3)", "ended"), ("import time; time.sleep(60)", "does not answer")],
)
def test_a_server_that_does_not_start_is_said_so(tmp_path, unused_port, code, said, monkeypatch):
    monkeypatch.setattr(serving, "_POLL", 0.1)
    server = Server("stock", [sys.executable, "-c", code], {})
    begun = time.monotonic()
    with (
        pytest.raises(click.ClickException, match=f"the stock server ({said}): see"),
        running(server, unused_port, tmp_path / "log", 1),
    ):
        pass
    assert time.monotonic() - begun < 20


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_results_are_compared_side_by_side(tmp_path):
    def line(tag: str, concurrency: int, **changes: float) -> str:
        found = dict.fromkeys(serving._METRICS, 100.0) | changes
        return json.dumps({"tag": tag, "max_concurrency": concurrency, "more": 1} | found)

    path = tmp_path / "r.jsonl"
    path.write_text("\n".join([
        line("stock", 1, median_tpot_ms=99.0), line("stock", 1, median_tpot_ms=12.0),
        line("step37", 1, median_tpot_ms=8.0, output_throughput=150.0), line("stock", 8),
    ]))  # fmt: skip
    results = read_results(path)
    assert results["stock", 1]["median_tpot_ms"] == 12.0  # the last one counts
    columns = [list(column.cells) for column in comparison(results).columns]
    rows = {(at, what): found for at, what, *found in zip(*columns, strict=True)}
    assert rows["1", "output tokens/s"] == ["100.0", "150.0", "1.50 x"]
    assert rows["1", "time per output token, median ms"] == ["12.0", "8.0", "1.50 x"]
    assert rows["8", "output tokens/s"] == ["100.0", "not measured", "not measured"]
