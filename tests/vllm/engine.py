# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Runs one vLLM engine in a process of its own and records what its model computed.

A job is ``{"engine": {...}, "calls": [[{"tokens": [...], "max_tokens": n}, ...], ...]}``: the
requests of a call run together, the calls one after the other. ``perturb`` among the engine's
options multiplies each embedding by 1 plus so much noise: what rounding alone may do.

The result holds, of each request, the tokens generated, the last hidden state of every position
that was computed and the first position computed (after a prefix hit not 0). With several ranks the
model is in other processes, and a CUDA graph runs no hooks: instead of hidden states there are the
log-probabilities of the prompt's tokens. Those of the tokens generated are always there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import engine_model
import oscar_kv
import torch
from engine_model import MODEL

# Neither question starts the driver: vLLM forks its workers where nobody has.
ON_CUDA = oscar_kv.cuda_built() and torch.cuda.device_count() > 0
# Rounding as it differs from run to run, relative: in float32, and in bfloat16 on CUDA devices.
NOISE = 2**-9 if ON_CUDA else 1e-6
# Little of a CUDA device: other engines may run beside.
_CUDA = {"dtype": "bfloat16", "kv_cache_memory_bytes": 1 << 30, "gpu_memory_utilization": 0.2}
_OF_DEVICE = _CUDA if ON_CUDA else {"dtype": "float32"}
_BACKEND = "OSCAR_KV"  # of packed caches on a CUDA device

# The overlay of vLLM (install.sh), and engine_model.
_PATH = (os.environ.get("PYTHONPATH"), str(Path(engine_model.__file__).parent))


def run(calls, timeout=900, **engine):
    """The result of a job, run by this file in a new process."""
    if ON_CUDA and engine.get("kv_cache_dtype", "auto") != "auto":
        engine.setdefault("attention_backend", _BACKEND)
    with tempfile.TemporaryDirectory() as folder:
        job, result, log = (Path(folder) / name for name in ("job.json", "result.pt", "log"))
        job.write_text(json.dumps({"engine": engine, "calls": calls}))
        with log.open("w") as out:
            done = subprocess.run(
                [sys.executable, __file__, str(job), str(result)],
                stdout=out,
                stderr=subprocess.STDOUT,
                timeout=timeout,
                env={
                    **os.environ,
                    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                    "PYTHONPATH": os.pathsep.join(x for x in _PATH if x),
                },
            )
        text = log.read_text()
        if done.returncode:
            raise RuntimeError(f"engine failed:\n{text[-4000:]}")
        return SimpleNamespace(log=text, **torch.load(result))


def kl(reference, other):
    """KL divergence of the next-token distributions of two runs of one request, a position each.

    Only positions that both computed.
    """
    return engine_model.kl(reference["hidden"], other["hidden"])


def logprobs(tokens, request):
    """Log-probabilities of the prompt's tokens from the second on."""
    if "logprobs" in request:
        return request["logprobs"]
    states = request["hidden"][: len(tokens) - 1]
    parts = [torch.log_softmax(rows @ engine_model.head().T, -1) for rows in states.split(256)]
    return torch.cat(parts).gather(1, torch.tensor(tokens[1:])[:, None]).squeeze(1)


class Recorder:
    """Collects hidden states by request and position from the model runner of this process."""

    def __init__(self, llm):
        worker = llm.llm_engine.model_executor.driver_worker
        self.runner = getattr(worker, "worker", worker).model_runner
        self.states = {}
        self.batch = None  # of the runner that most CUDA devices get, which does not keep it
        if hasattr(self.runner, "prepare_inputs"):
            prepare = self.runner.prepare_inputs

            def kept(*arguments, **options):
                self.batch = prepare(*arguments, **options)
                return self.batch

            self.runner.prepare_inputs = kept
        self.runner.model.model.norm.register_forward_hook(self.take)

    def order(self):
        """Names of the batch's requests, their first positions, and where their rows start."""
        if self.batch is not None:
            batch = self.batch
            return batch.req_ids, batch.num_computed_tokens_np, batch.query_start_loc_np
        batch = self.runner.input_batch
        return batch.req_ids, batch.num_computed_tokens_cpu, self.runner.query_start_loc.np

    def take(self, module, arguments, output):
        """One step: rows of the output belong to the requests in the order of the batch."""
        names, firsts, start = self.order()
        for i, name in enumerate(names):
            rows = output[0][int(start[i]) : int(start[i + 1])].detach().float().cpu()
            self.states.setdefault(name, []).append((int(firsts[i]), rows))

    def hidden(self, name):
        """[positions, hidden_size], NaN where nothing was computed, and the first position."""
        parts = next(v for k, v in self.states.items() if k == name or k.startswith(name + "-"))
        length = max(first + rows.shape[0] for first, rows in parts)
        result = torch.full((length, parts[0][1].shape[1]), torch.nan)
        for first, rows in parts:
            result[first : first + rows.shape[0]] = rows
        return result, min(first for first, _ in parts)


def main(job_path, result_path):
    """Runs the job in this process."""
    from vllm import LLM

    job = json.loads(Path(job_path).read_text())
    options = {"max_model_len": 8192, "enforce_eager": True, "seed": 0, **_OF_DEVICE}
    options |= job["engine"]
    perturb = options.pop("perturb", 0.0)
    llm = LLM(str(MODEL), disable_log_stats=False, **options)
    seen = options.get("tensor_parallel_size", 1) == 1 and options["enforce_eager"]
    recorder = Recorder(llm) if seen else None
    if perturb:
        weight = recorder.runner.model.model.embed_tokens.weight
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            weight.mul_(1 + perturb * noise.to(weight.device))
    core = llm.llm_engine.engine_core.engine_core
    pool = core.scheduler.kv_cache_manager.block_pool
    free, results = pool.get_num_free_blocks(), []
    for call in job["calls"]:
        results += generate(llm, call, recorder)
    preemptions = [m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions"]
    cache = llm.llm_engine.vllm_config.cache_config
    torch.save(
        {
            "requests": results,
            "preemptions": int(sum(preemptions)),
            "blocks": cache.num_gpu_blocks,
            "block_size": cache.block_size,
            "leaked": free - pool.get_num_free_blocks(),
        },
        result_path,
    )


def generate(llm, call, recorder):
    """One call: what is recorded of each request."""
    from vllm import SamplingParams, TokensPrompt

    settings = {"temperature": 0, "ignore_eos": True, "logprobs": 0}
    if recorder is None:
        settings["prompt_logprobs"] = 0
    outputs = llm.generate(
        [TokensPrompt(prompt_token_ids=request["tokens"]) for request in call],
        [SamplingParams(max_tokens=request["max_tokens"], **settings) for request in call],
        use_tqdm=False,
    )
    results = []
    for output in outputs:
        made = output.outputs[0]
        pairs = zip(made.token_ids, made.logprobs, strict=True)
        result = {"tokens": list(made.token_ids)}
        result["chosen"] = torch.tensor([at[token].logprob for token, at in pairs])
        if recorder is None:
            of_tokens = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
            result["logprobs"] = torch.tensor([at[token].logprob for token, at in of_tokens])
        else:
            result["hidden"], result["first"] = recorder.hidden(output.request_id)
        results.append(result)
    return results


if __name__ == "__main__":
    main(*sys.argv[1:])
