# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Settings of the engines that the tests start."""

import importlib.util
import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "engines")]

for name, value in {
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}.items():
    os.environ.setdefault(name, value)

if importlib.util.find_spec("vllm") is None:
    import stubs

    stubs.install()
    # On a machine without vLLM the layer is what can be tested: test_layer.py.
    collect_ignore = ["test_engine.py", "test_parts.py", "test_server.py"]
