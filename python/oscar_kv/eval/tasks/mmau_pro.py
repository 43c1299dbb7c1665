# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""MMAU-Pro (Kumar et al., arXiv 2508.13992): reads its files, asks, scores what needs no judge.

Instruction following is scored here. Open-ended answers are judged by Qwen2.5-7B-Instruct and
multiple choice by NV-Embed-v2 in the official script: `fill_column` writes the file that it reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .extras import need
from .instructions import follows
from .media import read_sound, sampling_rate
from .media_runner import MediaRunner
from .store import Store

NAME = "mmau_pro"
COLUMN = "model_output"  # what the official script reads
OPEN, INSTRUCTIONS = "open", "instruction following"
_FIELDS = ("id", "audio_path", "question", "answer", "category")
#: Method, bits as published, then open-ended, good rate and AIF of Qwen3-Omni-30B-A3B.
PAPER: tuple[tuple[str, float | None, float, float, float], ...] = (
    ("16 bit", 16.0, 66.2, 27.8, 87.4),
    ("KIVI INT2", 3.0, 65.8, 27.0, 78.2),
    ("OTT INT2", None, 65.8, 26.9, 83.9),
    ("TurboQuant+", 2.5, 66.6, 27.0, 79.3),
    ("OScaR INT2", 3.016, 67.4, 29.8, 88.5),
)


@dataclass(frozen=True)
class Item:
    """A record of the data set; sounds: its audio files; row: all of its fields."""

    id: str
    category: str
    question: str
    choices: tuple[str, ...]
    sounds: tuple[Path, ...]
    row: dict[str, Any]

    @property
    def prompt(self) -> str:
        """The question, with the choices of a closed one."""
        if not self.choices:
            return self.question
        listed = "\n".join(f"({chr(65 + i)}) {choice}" for i, choice in enumerate(self.choices))
        return f"{self.question}\nChoose one of these and answer with its text:\n{listed}"


def read_items(source: Path, categories: list[str], limit: int | None = None) -> list[Item]:
    """Items of the given categories (none: all), the first `limit` of each.

    source: a folder with test.parquet (needs pyarrow) or test.jsonl and the audio files that the
    records name. Raises ValueError naming what is missing: file, field, or audio file.
    """
    items: list[Item] = []
    counts: dict[str, int] = {}
    for number, row in enumerate(_rows(source)):
        missing = [name for name in _FIELDS if row.get(name) is None]
        if missing:
            raise ValueError(f"{source}, record {number} lacks {', '.join(missing)}")
        category = row["category"]
        counts[category] = counts.get(category, 0) + 1
        if (categories and category not in categories) or (limit and counts[category] > limit):
            continue
        items.append(_item(row, source))
    if not items:
        known = ", ".join(sorted(counts))
        raise ValueError(f"{source} holds no records of {', '.join(categories)}; it has {known}")
    return items


def _rows(source: Path) -> list[dict[str, Any]]:
    for file in (source / "test.parquet", source / "test.jsonl"):
        if not file.is_file():
            continue
        if file.suffix == ".parquet":
            rows: list[dict[str, Any]] = need("pyarrow.parquet").read_table(file).to_pylist()
            return rows
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
            return [json.loads(line) for line in lines if line.strip()]
        except ValueError as error:
            raise ValueError(f"{file} is not JSON lines: {error}") from error
    raise ValueError(f"{source} has neither test.parquet nor test.jsonl")


def _item(row: dict[str, Any], source: Path) -> Item:
    named = row["audio_path"]
    paths = [source / name for name in (named if isinstance(named, list) else [named])]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"record {row['id']}: audio file {path} does not exist")
    choices = tuple(str(one) for one in row.get("choices") or ())
    choices = choices if len(choices) > 1 else ()
    return Item(str(row["id"]), row["category"], row["question"], choices, tuple(paths), row)


def ask(
    runner: MediaRunner,
    items: list[Item],
    store: Store,
    new_tokens: int,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, list[dict[str, Any]]]:
    """Records by format, one an item; what `store` holds is not asked again.

    A record's "followed" is 0 or 1 for instruction following, else None.
    """
    rate = sampling_rate(runner.processor)
    for item in items:
        known = store.records
        missing = [one for one in runner.formats if item.id not in known(one, NAME)]
        if missing:
            sounds = [read_sound(path, rate) for path in item.sounds]
            said = runner.run(item.prompt, new_tokens, sounds=sounds, formats=missing)
            for format, (text, answer) in said.items():
                record = {
                    "category": item.category,
                    COLUMN: text,
                    "followed": _followed(item, text),
                    "bits": answer.bits,
                    "tokens": len(answer.tokens),
                }
                store.add(format, NAME, item.id, record)
        advance()
    return {
        format: [store.records(format, NAME)[item.id] for item in items]
        for format in runner.formats
    }


def _followed(item: Item, text: str) -> int | None:
    if item.category != INSTRUCTIONS:
        return None
    arguments = item.row.get("kwargs")
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    task = str(item.row.get("task_identifier"))
    return int(follows(text, task, arguments, item.question))


def followed_rate(records: list[dict[str, Any]]) -> tuple[int, float | None]:
    """(items, percentage followed) of the instruction-following records; None without any."""
    marks = [record["followed"] for record in records if record["followed"] is not None]
    return len(marks), 100 * sum(marks) / len(marks) if marks else None


def fill_column(items: list[Item], records: list[dict[str, Any]], path: Path) -> None:
    """Writes the items with the column that the official script reads, as Parquet or JSON lines.

    By the ending of `path`; Parquet needs pyarrow.
    """
    rows = [{**item.row, COLUMN: one[COLUMN]} for item, one in zip(items, records, strict=True)]
    if path.suffix == ".parquet":
        table = need("pyarrow").Table.from_pylist(rows)
        need("pyarrow.parquet").write_table(table, path)
        return
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(lines, encoding="utf-8")
