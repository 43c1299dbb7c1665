# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Settings of the engines that the tests start: on a CUDA device where there is one."""

import importlib.util
import os
import sys
from pathlib import Path

import oscar_kv

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "engines")]

CPU = {
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}
for name, value in {
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    **({} if oscar_kv.cuda_available() else CPU),
}.items():
    os.environ.setdefault(name, value)

if importlib.util.find_spec("vllm") is None:
    import stubs

    stubs.install()
    # On a machine without vLLM the layer is what can be tested: test_layer.py.
    collect_ignore = ["test_engine.py", "test_parts.py", "test_server.py"]
