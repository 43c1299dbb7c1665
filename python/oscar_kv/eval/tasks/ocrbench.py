# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""OCRBench (Liu et al., arXiv 2305.07895): reads its files, asks, scores as its example.py does."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .extras import need
from .media import read_image
from .media_runner import MediaRunner
from .store import Store

if TYPE_CHECKING:
    from PIL.Image import Image

NAME = "ocrbench"
NEW_TOKENS = 128  # as lmms-eval; the official example has 100
#: The five parts of the score, with the question types in each.
PARTS: dict[str, tuple[str, ...]] = {
    "text recognition": (
        "Regular Text Recognition",
        "Irregular Text Recognition",
        "Artistic Text Recognition",
        "Handwriting Recognition",
        "Digit String Recognition",
        "Non-Semantic Text Recognition",
    ),
    "scene text VQA": ("Scene Text-centric VQA",),
    "document VQA": ("Doc-oriented VQA",),
    "key information": ("Key Information Extraction",),
    "handwritten math": ("Handwritten Mathematical Expression Recognition",),
}
_PART_OF = {kind: part for part, kinds in PARTS.items() for kind in kinds}
_FORMULAS = "HME100k"  # the data set whose answers are compared without blanks
#: Score of 1000: method, bits an element as published, LLaVA-v1.6-7B, Qwen3-VL-8B, Qwen3-VL-4B.
PAPER_MODELS = ("LLaVA-v1.6-7B", "Qwen3-VL-8B", "Qwen3-VL-4B")
PAPER: tuple[tuple[str, float | None, int, int, int], ...] = (
    ("16 bit", 16.0, 536, 858, 852),
    ("QuaRot INT2", None, 481, 722, 773),
    ("RotateKV INT2", None, 473, 754, 638),
    ("KIVI INT2", 3.0, 488, 851, 813),
    ("OTT INT2", None, 513, 850, 831),
    ("TurboQuant+", 2.5, 501, 847, 828),
    ("OScaR INT2", 3.016, 519, 856, 838),
)


@dataclass(frozen=True)
class Question:
    """A record: kind is its question type, dataset where it comes from; image: reads it."""

    id: str
    dataset: str
    kind: str
    text: str
    answers: tuple[str, ...]
    image: Callable[[], Image]

    @property
    def part(self) -> str:
        """The part of the score that it counts for."""
        return _PART_OF[self.kind]


def is_hit(prediction: str, answers: tuple[str, ...], dataset: str) -> bool:
    """Whether an answer is contained in the prediction: case and line breaks ignored, for
    handwritten formulas blanks ignored and case kept."""
    if dataset == _FORMULAS:
        said = prediction.strip().replace("\n", " ").replace(" ", "")
        return any(one.strip().replace("\n", " ").replace(" ", "") in said for one in answers)
    said = prediction.lower().strip().replace("\n", " ")
    return any(one.lower().strip().replace("\n", " ") in said for one in answers)


def read_questions(source: Path, limit: int | None = None) -> list[Question]:
    """Questions from a user's folder, the first `limit` of each part.

    Either the official files, OCRBench.json beside its folder of images, or the Parquet files of
    the data set echo840/OCRBench (which need pyarrow). Raises ValueError naming the file, the
    record and the field for anything else.
    """
    found: list[Question] = []
    counts = dict.fromkeys(PARTS, 0)
    for question in _questions(source):
        if limit is None or counts[question.part] < limit:
            counts[question.part] += 1
            found.append(question)
    if not found:
        raise ValueError(f"{source} holds no questions")
    return found


def _questions(source: Path) -> Iterator[Question]:
    if not source.is_dir():
        raise ValueError(f"{source} is not a folder")
    for file in (source / "OCRBench.json", source / "OCRBench" / "OCRBench.json"):
        if file.is_file():
            yield from _official(file, source)
            return
    files = sorted(source.glob("**/*.parquet"))
    if not files:
        raise ValueError(f"{source} has neither OCRBench.json nor Parquet files")
    number = 0
    for file in files:
        for batch in need("pyarrow.parquet").ParquetFile(file).iter_batches(batch_size=16):
            for row in batch.to_pylist():
                yield _from_row(row, number, file.name)
                number += 1


def _official(file: Path, source: Path) -> Iterator[Question]:
    try:
        records = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    folders = [source / "OCRBench_Images", file.parent / "OCRBench_Images", source]
    for number, record in enumerate(records):
        where = f"{file.name}, record {number}"
        fields = ("dataset_name", "type", "question", "answers", "image_path")
        dataset, kind, text, answers, name = _fields(record, fields, where)
        paths = [folder / name for folder in folders]
        path = next((one for one in paths if one.is_file()), None)
        if path is None:
            raise ValueError(f"{where}: image {name} is in none of {', '.join(map(str, folders))}")
        yield _question(number, dataset, kind, text, answers, functools.partial(read_image, path))


def _from_row(row: dict[str, Any], number: int, file: str) -> Question:
    fields = ("dataset", "question_type", "question", "answer", "image")
    dataset, kind, text, answers, image = _fields(row, fields, f"{file}, row {number}")

    def opened() -> Image:
        from PIL import Image as Images

        return Images.open(io.BytesIO(image["bytes"])).convert("RGB")

    return _question(number, dataset, kind, text, answers, opened)


def _fields(record: Any, names: tuple[str, ...], where: str) -> list[Any]:
    missing = [name for name in names if not isinstance(record, dict) or name not in record]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    if record[names[1]] not in _PART_OF:
        raise ValueError(f"{where}: {record[names[1]]!r} is not a question type of OCRBench")
    return [record[name] for name in names]


def _question(
    number: int, dataset: str, kind: str, text: str, answers: Any, image: Callable[[], Image]
) -> Question:
    listed = tuple(str(one) for one in (answers if isinstance(answers, list) else [answers]))
    return Question(str(number), dataset, kind, text.strip(), listed, image)


def ask(
    runner: MediaRunner,
    questions: list[Question],
    store: Store,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, list[dict[str, Any]]]:
    """Records by format, one a question, those that `store` holds already not asked again."""
    for question in questions:
        known = store.records
        missing = [one for one in runner.formats if question.id not in known(one, NAME)]
        if missing:
            image = [question.image()]
            said = runner.run(question.text, NEW_TOKENS, images=image, formats=missing)
            for format, (text, answer) in said.items():
                record = {
                    "dataset_name": question.dataset,
                    "type": question.kind,
                    "predict": text,
                    "answers": list(question.answers),
                    "result": int(is_hit(text, question.answers, question.dataset)),
                    "bits": answer.bits,
                }
                store.add(format, NAME, question.id, record)
        advance()
    return {
        format: [store.records(format, NAME)[question.id] for question in questions]
        for format in runner.formats
    }


@dataclass(frozen=True)
class Score:
    """hits of questions by part, and in all; score: of 1000, as far as all were asked."""

    format: str
    hits: dict[str, int]
    questions: dict[str, int]
    bits: float

    @property
    def score(self) -> float:
        """Hits per 1000 questions: the official score where all 1000 were asked."""
        return 1000 * sum(self.hits.values()) / sum(self.questions.values())


def score(format: str, records: list[dict[str, Any]]) -> Score:
    """The score of a format's records."""
    hits, count = dict.fromkeys(PARTS, 0), dict.fromkeys(PARTS, 0)
    for record in records:
        part = _PART_OF[record["type"]]
        hits[part] += record["result"]
        count[part] += 1
    return Score(format, hits, count, sum(record["bits"] for record in records) / len(records))
