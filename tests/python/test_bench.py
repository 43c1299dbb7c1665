# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""`oscar bench`: its rows are complete and refer to each other rightly."""

import json

import pytest
from oscar_kv.bench.attention import BASELINE, Case
from oscar_kv.cli.app import app
from typer.testing import CliRunner

KEYS = [
    "kernel",
    "shape",
    "batch",
    "tokens",
    "threads",
    "us",
    "cache_bytes",
    "speedup",
    "bound_fraction",
]


def bench(*arguments):
    return CliRunner().invoke(app, ["bench", "attention", *map(str, arguments)])


def test_rows_and_files(tmp_path):
    options = ["--shape", "4/2/64", "--batch", 2, "--tokens", 96, "--threads", 1, "--repeats", 2]
    picture = tmp_path / "plot.png"
    result = bench(*options, "--format", "k4v2", "--json", "--plot", picture, "--save", tmp_path)
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout.splitlines()[-1])
    assert all(list(row) == KEYS for row in rows)
    by_name = {row["kernel"]: row for row in rows}
    assert by_name[BASELINE]["speedup"] == 1.0
    assert by_name["read k4v2 bytes"]["bound_fraction"] == 1.0
    ours = [row for name, row in by_name.items() if name.startswith("oscar k4v2")]
    assert ours
    for row in ours:
        assert row["cache_bytes"] == 2 * 2 * 3 * 1696  # batch, KV heads, tiles, bytes a tile
        read = by_name["read k4v2 bytes"]["us"]
        assert row["bound_fraction"] == pytest.approx(read / row["us"], abs=2e-3)
    assert by_name["torch fp32 folded"]["cache_bytes"] == 2 * 2 * 2 * 96 * 64 * 4
    assert picture.read_bytes().startswith(b"\x89PNG")
    (kept,) = tmp_path.glob("attention-*.jsonl")
    lines = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [line["kernel"] for line in lines] == [row["kernel"] for row in rows]
    assert lines[0]["cpu"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shape", "32/8"], "shape is '32/8', must be q_heads/kv_heads/head_dim"),
        (["--shape", "9/2/64"], "q_heads must be a multiple of kv_heads"),
        (["--shape", "2/2/40", "--repeats", 1], "head_dim is 40"),
        (["--tokens", 33], "--tokens must be a multiple of 32"),
        (["--backend", "mmx", "--tokens", 32], "backend is 'mmx'"),
    ],
)
def test_bad_input_exits_with_2(options, message):
    result = bench(*options, "--threads", 1)
    assert result.exit_code == 2
    assert message in result.stderr


def test_append_rows():
    options = ["--shape", "4/2/64", "--tokens", "96", "--repeats", "2", "--json"]
    result = CliRunner().invoke(app, ["bench", "append", *options])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout.splitlines()[-1])
    assert rows[-1]["kernel"] == "copy 16 bit"
    assert rows[-1]["copy_fraction"] == 1.0
    for row in rows:
        assert row["gigabytes_per_s"] == pytest.approx(2 * 96 * 2 * 64 * 2 / row["us"] / 1e3, 0.2)


def test_shape_is_printed_as_it_was_given():
    assert Case(*Case.parse_shape("9/3/64"), 1, 32, 1).shape == "9/3/64"
