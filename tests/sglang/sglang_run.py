# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Runs one SGLang engine in a process of its own and records what its model computed.

A job is ``{"engine": {...}, "calls": [[{"tokens": [...], "max_tokens": n}, ...], ...]}``: the
requests of a call run together, the calls one after the other. The result holds, of each request,
the tokens generated, how many tokens came from the prefix cache, and the last hidden states of the
prompt's last chunk, NaN at the positions before.
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
import torch
from engine_model import MODEL

ENGINE = {
    "device": "cpu",
    "dtype": "float32",
    "page_size": 128,
    "context_length": 2048,
    "max_total_tokens": 16384,
    "max_running_requests": 8,
    "mem_fraction_static": 0.3,
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "disable_cuda_graph": True,
    "skip_server_warmup": True,
    "random_seed": 0,
    "log_level": "info",
}


def run(calls, backend="oscar_k2v2", timeout=900, environment=None, **engine):
    """The result of a job, run by this file in a new process."""
    engine = {**ENGINE, "attention_backend": backend, **engine}
    with tempfile.TemporaryDirectory() as folder:
        job, result, log = (Path(folder) / name for name in ("job.json", "result.pt", "log"))
        job.write_text(json.dumps({"engine": engine, "calls": calls}))
        paths = [str(Path(__file__).parent / "kernels"), str(Path(engine_model.__file__).parent)]
        given = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
        with log.open("w") as out:
            done = subprocess.run(
                [sys.executable, __file__, str(job), str(result)],
                stdout=out,
                stderr=subprocess.STDOUT,
                timeout=timeout,
                env={
                    **os.environ,
                    "SGLANG_USE_CPU_ENGINE": "1",
                    "PYTHONPATH": os.pathsep.join(given + paths),
                    **(environment or {}),
                },
                start_new_session=True,  # a failing engine kills its whole session
            )
        text = log.read_text()
        if done.returncode or not result.exists():
            raise RuntimeError(f"engine failed:\n{text[-6000:]}")
        return SimpleNamespace(log=text, requests=torch.load(result))


def main(job_path, result_path):
    """Runs the job in this process."""
    import sglang

    job = json.loads(Path(job_path).read_text())
    llm = sglang.Engine(model_path=str(MODEL), enable_return_hidden_states=True, **job["engine"])
    results = []
    for call in job["calls"]:
        outputs = llm.generate(
            input_ids=[request["tokens"] for request in call],
            sampling_params=[
                {"temperature": 0, "ignore_eos": True, "max_new_tokens": request["max_tokens"]}
                for request in call
            ],
            return_hidden_states=True,
        )
        for request, output in zip(call, outputs, strict=True):
            results.append(recorded(request["tokens"], output))
    torch.save(results, result_path)
    llm.shutdown()


def recorded(tokens, output):
    """Of one request. Hidden states: first those of the prompt's last chunk, then a token each."""
    info = output["meta_info"]
    first = torch.tensor(info["hidden_states"][0], dtype=torch.float32)
    hidden = torch.full((len(tokens), first.shape[-1]), torch.nan)
    hidden[len(tokens) - first.shape[0] :] = first
    return {
        "tokens": list(output["output_ids"]),
        "cached": int(info["cached_tokens"]),
        "hidden": hidden,
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
