# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""vLLM's own benchmarks with a packed cache and with its own, in the same memory.

    PYTHONPATH=build/vllm-python build/vllm-venv/bin/python bench/engines/bench_vllm.py \
        [--requests 40] [--input 1536] [--output 64] [--rounds 1] [--only throughput|serve]

in the environment of `make test-vllm`. The caches take turns (packed, stock, stock, packed for two
rounds): on a machine that does other work as well, read ratios. Each run is appended to
bench/results/vllm-CPU.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from oscar_kv.bench.results import commit, cpu_name, device_stem
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
VLLM = [sys.executable, "-m", "vllm.entrypoints.cli.main", "bench"]
SERVER = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
CACHES = {"packed": "oscar_k2v2", "stock": "auto"}
START_SECONDS = 900
FIGURES = {  # key of a row: what it is called in the table
    "cached_tokens": "tokens in the cache",
    "concurrent": "requests at once before preemption",
    "throughput_tokens": "bench throughput: tokens a second",
    "throughput_requests": "bench throughput: requests a minute",
    "throughput_cpu": "bench throughput: CPU seconds, start included",
    "serve_output": "bench serve: output tokens a second",
    "serve_first": "bench serve: mean seconds to first token",
    "serve_next": "bench serve: mean seconds of a token after it",
    "serve_preemptions": "bench serve: preemptions",
}


def environment(options):
    """One budget for both caches; two threads, wherever the system puts them."""
    fixed = {
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_CPU_KVCACHE_SPACE": str(options.gigabytes),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(options.threads),
    }
    return {**os.environ, **fixed}


def engine_options(options, cache):
    """Arguments of the engine; its greatest length is that of a request here."""
    return [
        *("--model", str(options.model), "--kv-cache-dtype", CACHES[cache]),
        *("--max-model-len", str(options.input + options.output), "--dtype", "bfloat16"),
        *("--enforce-eager", "--no-enable-prefix-caching"),
    ]


def capacity(log):
    """What the engine says about its cache."""
    tokens = re.search(r"KV cache size: ([\d,]+) tokens", log)
    at_once = re.search(r"Maximum concurrency for [\d,]+ tokens per request: ([\d.]+)x", log)
    return {
        "cached_tokens": int(tokens[1].replace(",", "")),
        "concurrent": float(at_once[1]),
    }


def throughput(options, cache):
    """`vllm bench throughput`: all requests at once, offline."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [
            *VLLM,
            *("throughput", "--dataset-name", "random", "--num-prompts", str(options.requests)),
            *("--input-len", str(options.input), "--output-len", str(options.output)),
            *("--output-json", str(result), *engine_options(options, cache)),
        ]
        before = _cpu_seconds()
        done = subprocess.run(
            command,
            env=environment(options),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        if done.returncode:
            raise RuntimeError(f"bench throughput failed:\n{done.stdout[-4000:]}")
        found = json.loads(result.read_text())
    return {
        **capacity(done.stdout),
        "throughput_tokens": found["tokens_per_second"],
        "throughput_requests": 60 * found["requests_per_second"],
        "throughput_cpu": _cpu_seconds() - before,
    }


def _cpu_seconds():
    """Of all processes that have ended: other work on the machine counts little here."""
    times = os.times()
    return times.children_user + times.children_system


@contextlib.contextmanager
def server(options, cache, log):
    """The OpenAI server; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [*SERVER, *engine_options(options, cache), "--host", "127.0.0.1"]
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            env=environment(options),
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + START_SECONDS
        while not _answers(url):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the server did not start:\n{log.read_text()[-4000:]}")
            time.sleep(1)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def _answers(url):
    with contextlib.suppress(OSError), urllib.request.urlopen(url + "/health") as reply:
        return reply.status == 200
    return False


def serve(options, cache):
    """`vllm bench serve`: all requests sent at once to the server."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with server(options, cache, log) as url:
            lengths = ("--random-input-len", str(options.input))
            lengths += ("--random-output-len", str(options.output))
            command = [
                *VLLM,
                *("serve", "--base-url", url, "--model", str(options.model), "--ignore-eos"),
                *("--dataset-name", "random", "--num-prompts", str(options.requests), *lengths),
                *("--save-result", "--result-dir", folder, "--result-filename", "result.json"),
            ]
            done = subprocess.run(command, env=environment(options), text=True, capture_output=True)
            if done.returncode:
                raise RuntimeError(f"bench serve failed:\n{(done.stdout + done.stderr)[-4000:]}")
            found = json.loads((Path(folder) / "result.json").read_text())
            with urllib.request.urlopen(url + "/metrics") as reply:
                lines = reply.read().decode().splitlines()
        name = "vllm:num_preemptions_total"
        preempted = sum(float(x.rsplit(" ", 1)[1]) for x in lines if x.startswith(name))
        return {
            **capacity(log.read_text()),
            "serve_output": found["output_throughput"],
            "serve_first": found["mean_ttft_ms"] / 1000,
            "serve_next": found["mean_tpot_ms"] / 1000,
            "serve_preemptions": preempted,
        }


def show(rows):
    """Means of both caches and their ratio."""
    table = Table(title="vLLM on a CPU, the same memory for both caches")
    for title in ("", "packed", "stock", "ratio"):
        table.add_column(title, justify="left" if title == "" else "right")
    for key, title in FIGURES.items():
        means = {}
        for cache in CACHES:
            values = [row[key] for row in rows if row["cache"] == cache and key in row]
            means[cache] = sum(values) / len(values) if values else None
        if None not in means.values():
            ratio = means["packed"] / means["stock"] if means["stock"] else float("nan")
            table.add_row(title, *(f"{means[cache]:,.2f}" for cache in CACHES), f"{ratio:.2f}")
    Console().print(table)


def main():
    """Runs both benchmarks with both caches in turns."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, default=ROOT / "build/engine-model")
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--input", type=int, default=1536)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--gigabytes", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", choices=["throughput", "serve"])
    options = parser.parse_args()
    file = ROOT / f"bench/results/vllm-{device_stem(cpu_name())}.jsonl"
    kinds = {"throughput": throughput, "serve": serve}
    rows = []
    for index, (kind, measure) in itertools.product(range(options.rounds), kinds.items()):
        if options.only in (None, kind):
            for cache in sorted(CACHES, reverse=index % 2 == 1):
                shape = {x: getattr(options, x) for x in ("requests", "input", "output")}
                about = {"gigabytes": options.gigabytes, "threads": options.threads}
                about |= {"model": options.model.name, "cpu": cpu_name(), "commit": commit()}
                figures = {k: round(v, 4) for k, v in measure(options, cache).items()}
                rows.append({"benchmark": kind, "cache": cache, **shape, **figures, **about})
                print(json.dumps(rows[-1]), flush=True)
                with file.open("a") as out:
                    out.write(json.dumps(rows[-1]) + "\n")
    show(rows)


if __name__ == "__main__":
    main()
