#!/usr/bin/env bash
# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
#
# usage: install.sh PYTHON FOLDER    SGLang in FOLDER/sglang-venv, to run on a CPU
#
# SGLang's wheel asks for CUDA libraries that a CPU has no use for: it is installed without its
# dependencies, and of these only what its engine imports. Its kernel library has no wheel for CPUs;
# tests/sglang/kernels stands for it. About 6 GiB, most of it torch.
set -euo pipefail

readonly SGLANG=sglang==0.5.23
# As in its metadata where a version is given there.
readonly PINNED=(torch==2.14.1 torchvision transformers==5.19.0 tokenizers==0.23.2
  apache-tvm-ffi==0.1.11 compressed-tensors==0.18.0 openai==2.8.0 sentencepiece==0.2.1)
readonly NEEDED=(triton numpy orjson msgspec pyzmq psutil pydantic fastapi uvicorn uvloop aiohttp
  requests pillow packaging setproctitle tqdm pybase64 python-multipart einops ipython
  partial_json_parser prometheus-client scipy xxhash zstandard interegular dill gguf safetensors)
readonly TOOLS=(pytest 'scikit-build-core>=0.11' 'nanobind>=2.9' 'cmake>=3.24' 'ninja>=1.11')
python=$1
venv=$2/sglang-venv
pip=("$venv/bin/python" -m pip --disable-pip-version-check)

"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' || {
  echo "error: SGLang needs Python 3.11 to 3.14, '$python' is another: make VLLM_PYTHON=..." >&2
  exit 1
}
[[ -x $venv/bin/pip ]] || "$python" -m venv "$venv"
"${pip[@]}" install "${PINNED[@]}" "${NEEDED[@]}" "${TOOLS[@]}"
"${pip[@]}" install --no-deps "$SGLANG" xgrammar==0.2.7
