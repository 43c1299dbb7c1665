# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""The CUDA sources compile, where nvcc is: to PTX, which needs neither GPU nor assembler.

What they compute is tested where a GPU is (tests/cuda, tests/python/gpu).
"""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# The decode kernels of the other formats are the same templates.
SOURCES = ["append", "attend", "attend_call", "attend_k2v2", "attend_plan"]
SOURCES += ["extend", "extend_sm90", "read_bound"]
OPTIONS = ["-std=c++20", "-O1", "--expt-relaxed-constexpr", "-Werror=all-warnings", "-ptx"]
HOST_OPTIONS = "-Xcompiler=-Wall,-Wextra,-Wshadow,-Werror"


def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(home) / "bin"))


def _compile(nvcc: str, stem: str, folder: Path) -> str:
    """What the compiler says; empty if all is well."""
    target = "compute_90a" if stem == "extend_sm90" else "compute_90"
    command = [nvcc, *OPTIONS, HOST_OPTIONS, f"-gencode=arch={target},code={target}"]
    command += [f"-I{ROOT / 'include'}", f"-I{ROOT / 'src'}", str(ROOT / f"src/cuda/{stem}.cu")]
    command += ["-o", str(folder / f"{stem}.ptx")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout + result.stderr if result.returncode else ""


def test_cuda_sources_compile(tmp_path: Path) -> None:
    nvcc = _nvcc()
    if nvcc is None:
        pytest.skip("no nvcc")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        texts = list(pool.map(lambda stem: _compile(nvcc, stem, tmp_path), SOURCES))
    wrong = {stem: text[-2000:] for stem, text in zip(SOURCES, texts, strict=True) if text}
    assert not wrong, wrong
    assert all((tmp_path / f"{stem}.ptx").stat().st_size > 0 for stem in SOURCES)
