# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Whether an answer follows a format instruction: MMAU-Pro's rules for "instruction following".

The checks are those of the official evaluate_mmau_pro_comprehensive.py, its quirks included: a
number that is missing counts as 0, and a highlight is anything between two asterisks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from .extras import need

Check = Callable[[str, Mapping[str, Any]], bool]


def _sentences(text: str) -> int:
    nltk = need("nltk")
    try:
        return len(nltk.tokenize.sent_tokenize(text))
    except LookupError as error:
        raise ValueError(
            "sentences are counted with nltk's punkt model, which is not installed: "
            "python -m nltk.downloader punkt_tab"
        ) from error


def _words(text: str) -> int:
    return len(text.split())


def _capital_words(text: str) -> int:
    return sum(word.isupper() for word in text.split())


def _paragraphs(text: str) -> int:
    return sum(bool(part.strip()) for part in text.split("***"))


def _letters(text: str, kept: str = "a-zA-Z") -> str:
    return re.sub(f"[^{kept}]", "", text).lower()


def _least(count: Callable[[str], int]) -> Check:
    return lambda text, given: count(text) >= given["N"]


def _most(count: Callable[[str], int]) -> Check:
    return lambda text, given: count(text) <= given["N"]


def _exactly(count: Callable[[str], int]) -> Check:
    return lambda text, given: count(text) == given["N"]


def _between(count: Callable[[str], int]) -> Check:
    return lambda text, given: given["N1"] <= count(text) <= given["N2"]


def _found(pattern: str) -> Callable[[str], int]:
    return lambda text: len(re.findall(pattern, text))


def _keyword_frequency(text: str, given: Mapping[str, Any]) -> bool:
    pattern = rf"\b{re.escape(given['keyword'].lower())}\b"
    return len(re.findall(pattern, text.lower())) == given["N"]


def _sections(text: str, given: Mapping[str, Any]) -> bool:
    parts = re.split(rf"\s*{re.escape(given['section_splitter'])}\s*", text.strip())
    return sum(bool(part.strip()) for part in parts) == given["N"]


def _two_responses(text: str, given: Mapping[str, Any]) -> bool:
    parts = text.split("******")
    return len(parts) == 2 and parts[0].lower().strip() != parts[1].lower().strip()


def _starts(text: str, given: Mapping[str, Any]) -> bool:
    return _letters(text, "a-zA-Z ").startswith(_letters(given["start_phrase"], "a-zA-Z "))


def _ends(text: str, given: Mapping[str, Any]) -> bool:
    return _letters(text, "a-zA-Z ").endswith(_letters(given["end_phrase"], "a-zA-Z "))


def _quoted(text: str, given: Mapping[str, Any]) -> bool:
    return text.strip().startswith('"') and text.strip().endswith('"')


#: task_identifier -> check of (answer, kwargs of the record and its question as "question").
CHECKS: dict[str, Check] = {
    "Include Keywords": lambda text, given: all(
        word.lower() in text.lower() for word in given["keywords"].split(", ")
    ),
    "Keyword Frequency": _keyword_frequency,
    "Forbidden Words": lambda text, given: (
        not any(word.lower() in text.lower() for word in given["forbidden_words"].split(", "))
    ),
    "Number Paragraphs": _exactly(_paragraphs),
    "Number Words (at least)": _least(_words),
    "Number Words (at most)": _most(_words),
    "Number Words (range)": _between(_words),
    "Number Sentences (at least)": _least(_sentences),
    "Number Sentences (at most)": _most(_sentences),
    "Number Sentences (range)": _between(_sentences),
    "Postscript": lambda text, given: _letters(given["postscript_marker"]) in _letters(text),
    "Number Placeholder": _least(_found(r"\[[^\]]+\]")),
    "Number Bullets": _exactly(_found(r"(?:^|\n)\s*\*\s+")),
    "Title": lambda text, given: re.search(r"<<[^>]+>>", text) is not None,
    "Minimum Number Highlighted Section": _least(_found(r"\*([^*]+)\*")),
    "Multiple Sections": _sections,
    "Repeat Prompt": lambda text, given: (
        text.strip().lower().startswith(given["question"].strip().lower())
    ),
    "Two Responses": _two_responses,
    "All Uppercase": lambda text, given: text.isupper(),
    "All Lowercase": lambda text, given: text.islower(),
    "All-capital Words (at least)": _least(_capital_words),
    "All-capital Words (at most)": _most(_capital_words),
    "All-capital Words (range)": _between(_capital_words),
    "Start Checker": _starts,
    "End Checker": _ends,
    "Quotation": _quoted,
    "No Commas": lambda text, given: "," not in text,
}
_DEFAULTS = {
    **{"N": 0, "N1": 0, "N2": 999},
    **dict.fromkeys(
        ("keywords", "keyword", "forbidden_words", "postscript_marker", "section_splitter"), ""
    ),
    **{"start_phrase": "", "end_phrase": ""},
}


def follows(text: str, task: str, given: Mapping[str, Any] | None, question: str) -> bool:
    """Whether `text` does what the instruction `task` asks, with its arguments `given`.

    An unknown task is not followed, as in the official script. Raises ValueError where nltk's
    sentence model is needed and missing.
    """
    known = {name: value for name, value in (given or {}).items() if value is not None}
    check = CHECKS.get(task)
    return check is not None and bool(check(text, {**_DEFAULTS, **known, "question": question}))
