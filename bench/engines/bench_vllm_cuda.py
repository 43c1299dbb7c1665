# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Decoding in vLLM on a CUDA device, with a packed cache and with its own, in the same memory.

    python bench/engines/bench_vllm_cuda.py [--input 8192] [--output 256] [--rounds 1]
        [--packed 48,128] [--stock 48] [--device-memory 0.9]

A model of Llama-3.1-8B's shape with random weights in bfloat16: what it says is noise, what it
costs is not. Each batch is generated twice. The first time fills the cache and makes one token a
request; the second time finds the prompts in it, so that its time is that of decoding (and of the
few tokens that either cache computes again). Decode steps are CUDA graphs, without torch.compile.
Rows are appended to bench/results/vllm-<device>.jsonl.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from oscar_kv.bench.decode import llama_31_8b
from oscar_kv.bench.results import commit, device_stem
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
ENGINE = {
    "packed": {"kv_cache_dtype": "oscar_k2v2", "attention_backend": "OSCAR_KV"},
    "stock": {"attention_backend": "FLASH_ATTN"},
}


def measure(options, cache, batches):
    """One engine; a row for each batch."""
    from vllm import LLM

    model = llama_31_8b()
    model.architectures, model.dtype = ["LlamaForCausalLM"], "bfloat16"
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        llm = LLM(
            folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=options.input + options.output + 128,
            max_num_seqs=max(batches),
            max_num_batched_tokens=8192,
            gpu_memory_utilization=options.device_memory,
            compilation_config={"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
            disable_log_stats=False,
            seed=0,
            **ENGINE[cache],
        )
    config = llm.llm_engine.vllm_config.cache_config
    pick = random.Random(0)
    for batch in batches:
        prompts = [
            {"prompt_token_ids": [pick.randrange(model.vocab_size) for _ in range(options.input)]}
            for _ in range(batch)
        ]
        fill = _seconds(llm, prompts, 1)
        before = _preemptions(llm)
        decode = _seconds(llm, prompts, options.output)
        yield {
            "cache": cache,
            "batch": batch,
            "input": options.input,
            "output": options.output,
            "block_tokens": config.block_size * config.num_gpu_blocks,
            "fill_s": round(fill, 3),
            "decode_s": round(decode, 3),
            "decode_tokens_per_s": round(batch * options.output / decode, 1),
            "preemptions": _preemptions(llm) - before,
        }


def _seconds(llm, prompts, count):
    from vllm import SamplingParams

    settings = SamplingParams(
        temperature=0, ignore_eos=True, max_tokens=count, min_tokens=count, detokenize=False
    )
    start = time.perf_counter()
    llm.generate(prompts, settings, use_tqdm=False)
    return time.perf_counter() - start


def _preemptions(llm):
    return int(sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions"))


def child(options):
    """In a process of its own: prints rows."""
    import torch

    about = {"device": torch.cuda.get_device_name(), "commit": commit()}
    batches = [int(x) for x in getattr(options, options.child).split(",")]
    for row in measure(options, options.child, batches):
        print(json.dumps({"benchmark": "decode", **row, **about}), flush=True)


def run_child(cache):
    """Rows of one engine."""
    command = [sys.executable, __file__, *sys.argv[1:], "--child", cache]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE)
    rows = [json.loads(x) for x in done.stdout.splitlines() if x.startswith('{"benchmark"')]
    if done.returncode or not rows:
        raise RuntimeError(f"the {cache} engine failed:\n{done.stdout[-4000:]}")
    return rows


def show(rows):
    """All rows as a table."""
    table = Table(title=f"vLLM on {rows[0]['device']}, Llama-3.1-8B's shape")
    for title in (
        "cache",
        "batch",
        "tokens in all blocks",
        "fill s",
        "decode tokens/s",
        "preempted",
    ):
        table.add_column(title, justify="left" if title == "cache" else "right")
    for row in rows:
        speed = f"{row['decode_tokens_per_s']:,.0f}"
        cells = (row["block_tokens"], row["fill_s"], speed, row["preemptions"])
        table.add_row(row["cache"], str(row["batch"]), *map(str, cells))
    Console().print(table)


def main():
    """Both caches in turns."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--input", type=int, default=8192)
    parser.add_argument("--output", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--packed", default="48,128", help="batches of the packed cache")
    parser.add_argument("--stock", default="48", help="batches of vLLM's own cache")
    parser.add_argument("--device-memory", type=float, default=0.9)
    parser.add_argument("--child", choices=list(ENGINE), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    rows = []
    for _ in range(options.rounds):
        for cache in ENGINE:
            rows += run_child(cache)
    file = ROOT / f"bench/results/vllm-{device_stem(rows[0]['device'])}.jsonl"
    with file.open("a") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)
    show(rows)


if __name__ == "__main__":
    main()
