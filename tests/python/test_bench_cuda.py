# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""`oscar bench cuda`: cases and picture anywhere, rows where there is a GPU."""

import json

import pytest
import torch
from oscar_kv.bench.cuda import CudaCase, CudaRow, default_cases, parse_case
from oscar_kv.bench.plot import save_cuda_plot
from oscar_kv.bench.results import save_results
from oscar_kv.cli.app import app
from typer.testing import CliRunner

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def bench(*arguments):
    return CliRunner().invoke(app, ["bench", "cuda", *map(str, arguments)])


def row(kernel, batch, tokens, us):
    return CudaRow(
        kernel, "32/8/128", batch, tokens, False, 1, us, 1000, 1.0, 100 / us, 1.0, "read"
    )


def test_default_cases_are_distinct_and_have_names():
    cases = default_cases()
    assert len({case.name for case in cases}) == len(cases)
    assert any(case.ragged for case in cases)
    assert {case.head_dim for case in cases} == {64, 128, 256}
    assert {case.q_heads // case.kv_heads for case in cases} >= {1, 4, 8}
    assert parse_case("32/8/128", 3, 4096, 1) == CudaCase(32, 8, 128, (4096,) * 3)


def test_picture_and_results(tmp_path):
    rows = [
        row(kernel, batch, tokens, us)
        for kernel, us in (("torch flash", 100.0), ("oscar k2v2", 20.0), ("read k2v2 bytes", 9.0))
        for batch, tokens in ((1, 1024), (1, 8192), (8, 4096))
    ]
    save_cuda_plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    path = save_results(rows, tmp_path, "NVIDIA H200")
    assert path.name == "attention-NVIDIA-H200.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["us"] for line in lines] == [one.us for one in rows]
    assert lines[0]["gpu"] == "NVIDIA H200" and "cpu" not in lines[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a CUDA device")
def test_without_a_gpu_it_says_so():
    result = bench("--tokens", 64)
    assert result.exit_code == 2
    assert "needs a CUDA device" in result.stderr


@needs_gpu
@pytest.mark.parametrize(("queries", "flush"), [(1, "read"), (16, "read"), (1, "write")])
def test_rows_on_a_gpu(queries, flush):
    dirty = ["--dirty"] if flush == "write" else []
    options = ["--shape", "8/2/128", "--batch", 2, "--tokens", 1024, "--queries", queries]
    result = bench(*options, *dirty, "--repeats", 2, "--format", "k4v2", "--json")
    assert result.exit_code == 0, result.output
    rows = {row["kernel"]: row for row in json.loads(result.stdout.splitlines()[-1])}
    assert rows["oscar k4v2"]["cache_bytes"] == 2 * 2 * 32 * 3328
    assert rows["torch flash"]["speedup"] == 1.0
    assert rows["read k4v2 bytes"]["bound_fraction"] == 1.0
    assert all(row["us"] > 0 and row["batch"] == 2 for row in rows.values())
    assert {row["flush"] for row in rows.values()} == {flush}
