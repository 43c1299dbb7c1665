# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""The OpenAI server under load: cancellations, preemption, hits, and then the same answers."""

import asyncio
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import time

import engine
import httpx
import pytest
from engine_model import prompts

REQUESTS = 200
IN_FLIGHT = 16
# About 110 blocks are wanted at a time: some requests have to wait for others, and start again.
BLOCKS = 72
START_SECONDS = 600
STREAM = {
    "stream": True,
    "stream_options": {"include_usage": True, "continuous_usage_stats": True},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    options = {
        "--model": str(engine.MODEL),
        "--served-model-name": "demo",
        "--kv-cache-dtype": "oscar_k2v2",
        "--max-model-len": "1024",
        "--max-num-seqs": str(IN_FLIGHT),
        "--num-gpu-blocks-override": str(BLOCKS),
        "--port": str(port),
        "--host": "127.0.0.1",
    }
    if engine.ON_CUDA:  # with torch.compile and CUDA graphs, as by default
        options |= {"--attention-backend": "OSCAR_KV", "--gpu-memory-utilization": "0.2"}
        options["--kv-cache-memory-bytes"] = str(1 << 30)
    command += [x for pair in options.items() for x in pair]
    command += [] if engine.ON_CUDA else ["--enforce-eager"]
    with log.open("w") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(url, process, log)
        yield url
        assert process.poll() is None, f"the server died:\n{log.read_text()[-4000:]}"
    finally:
        process.terminate()
        process.wait(60)


def _wait(url, process, log):
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"the server did not start:\n{log.read_text()[-4000:]}")
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url + "/health").status_code == 200:
                return
        time.sleep(1)
    raise TimeoutError(log.read_text()[-4000:])


def body(tokens, count, **more):
    return {
        "model": "demo",
        "prompt": tokens,
        "max_tokens": count,
        "temperature": 0,
        "ignore_eos": True,
        **more,
    }


def answers(url):
    """Greedy answers to prompts that are shorter than a block, so that no prefix can be found."""
    texts = []
    for tokens in prompts([100, 60, 127], start=50_000):
        reply = httpx.post(url + "/v1/completions", json=body(tokens, 40), timeout=300)
        texts.append(reply.raise_for_status().json()["choices"][0]["text"])
    return texts


def metric(url, name):
    lines = httpx.get(url + "/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


async def one(client, url, limit, tokens, count, cancel_after):
    """The number of tokens that came; the request is dropped after `cancel_after` of them."""
    came = 0
    async with (
        limit,
        client.stream("POST", url + "/v1/completions", json=body(tokens, count, **STREAM)) as reply,
    ):
        reply.raise_for_status()
        async for line in reply.aiter_lines():
            if line.startswith("data: {"):
                # An event may carry several tokens where the client is slower than the engine.
                event = json.loads(line.removeprefix("data: "))
                assert "usage" in event, event  # an error, say
                came = event["usage"]["completion_tokens"]
            if cancel_after is not None and came >= cancel_after:
                break
    return came


async def load(url):
    pick = random.Random(0)
    texts = prompts([600] * 12)
    limit = asyncio.Semaphore(IN_FLIGHT)
    jobs = []
    async with httpx.AsyncClient(timeout=900, limits=httpx.Limits(max_connections=64)) as client:
        for i in range(REQUESTS):
            count = pick.randint(8, 60)
            tokens = pick.choice(texts)[: pick.randint(40, 600)]
            cancel = pick.randint(0, count // 2) if i % 3 == 0 else None
            jobs.append((count, cancel, one(client, url, limit, tokens, count, cancel)))
        came = await asyncio.gather(*(job[2] for job in jobs))
    return [(count, cancel, n) for (count, cancel, _), n in zip(jobs, came, strict=True)]


def test_load_with_cancellations(server):
    before = answers(server)
    for count, cancel, came in asyncio.run(load(server)):
        assert came >= cancel if cancel is not None else came == count, (count, cancel, came)
    assert metric(server, "vllm:num_preemptions_total") > 0
    assert metric(server, "vllm:prefix_cache_hits_total") > 0
    end = time.monotonic() + 60
    while metric(server, "vllm:num_requests_running") and time.monotonic() < end:
        time.sleep(0.5)
    assert answers(server) == before
    assert metric(server, "vllm:num_requests_waiting") == 0
    assert metric(server, "vllm:kv_cache_usage_perc") == 0
