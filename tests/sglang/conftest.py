# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""SGLang's own modules where it is installed, else the names that the plugin takes from it."""

import importlib.util
import os
import sys
from pathlib import Path

_HERE = Path(__file__).parent
sys.path[:0] = [str(_HERE), str(_HERE.parent / "engines")]

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # more of them wait for each other
if importlib.util.find_spec("sglang") is None:
    import sglang_stubs

    sglang_stubs.install()
    # A machine without SGLang has the backend and its pool, driven by sglang_harness.py.
    collect_ignore = ["test_sglang_engine.py", "test_sglang_hooks.py"]
elif importlib.util.find_spec("sgl_kernel") is None:
    sys.path.insert(0, str(_HERE / "kernels"))
