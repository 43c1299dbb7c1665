# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""OCRBench and MMAU-Pro: official scores, files as they are published, runs on tiny models."""

from __future__ import annotations

import io
import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import oscar_kv
import pytest
import torch
from audio_models import qwen2_audio
from oscar_kv.cli.app import app
from oscar_kv.eval.tasks import lmms
from oscar_kv.eval.tasks.instructions import CHECKS, follows
from oscar_kv.eval.tasks.media import prompt_text, read_sound
from oscar_kv.eval.tasks.media_runner import MediaRunner
from oscar_kv.eval.tasks.mmau_pro import read_items
from oscar_kv.eval.tasks.ocrbench import PARTS, is_hit, read_questions, score
from oscar_kv.hf.install import attention_installed
from processors import picture, tone
from typer.testing import CliRunner, Result
from vision_models import llava

KINDS = [kind for kinds in PARTS.values() for kind in kinds]


def oscar(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["eval", *(str(argument) for argument in arguments)])


def saved(made: tuple[Any, Any], folder: Path) -> Path:
    torch.manual_seed(0)
    for part in made:
        part.save_pretrained(folder)
    return folder


# -- OCRBench --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "answers", "dataset", "hit"),
    [
        ("It says CENTRE.", ("centre",), "IIIT5K", True),
        ("It says cen tre.", ("centre",), "IIIT5K", False),
        ("red\nsign", ("no", "Red Sign"), "svt", True),
        ("", ("a",), "svt", False),
        ("x ^ { 2 }+1", ("x^{2} + 1",), "HME100k", True),
        ("X^{2}", ("x^{2}",), "HME100k", False),  # case counts there
    ],
)
def test_ocrbench_hits(prediction: str, answers: Any, dataset: str, hit: bool) -> None:
    assert is_hit(prediction, answers, dataset) is hit


def test_ocrbench_score_has_the_official_parts() -> None:
    assert len(KINDS) == 10 and len(PARTS["text recognition"]) == 6
    records = [{"type": kind, "result": n % 2, "bits": 3.0} for n, kind in enumerate(KINDS)]
    found = score("k2v2", records)
    assert found.questions == {name: len(kinds) for name, kinds in PARTS.items()}
    assert found.hits["text recognition"] == 3 and sum(found.hits.values()) == 5
    assert found.score == 500 and found.bits == 3.0


def ocr_record(number: int, **changes: Any) -> dict[str, Any]:
    record = {
        "dataset_name": "IIIT5K",
        "id": number,
        "question": "what is written in the image?",
        "answers": ["centre"],
        "type": KINDS[number % len(KINDS)],
        "image_path": f"IIIT5K/{number}.png",
    }
    return record | changes


def ocrbench_folder(folder: Path, records: list[dict[str, Any]]) -> Path:
    images = folder / "OCRBench_Images" / "IIIT5K"
    images.mkdir(parents=True)
    for number in range(len(records)):
        picture(number).save(images / f"{number}.png")
    (folder / "OCRBench.json").write_text(json.dumps(records), encoding="utf-8")
    return folder


def test_ocrbench_official_files(tmp_path: Path) -> None:
    records = [ocr_record(n) for n in range(12)] + [ocr_record(12, answers="one string")]
    found = read_questions(ocrbench_folder(tmp_path, records))
    assert [one.kind for one in found[:10]] == KINDS
    assert found[0].image().size == (64, 48) and found[12].answers == ("one string",)
    assert len(read_questions(tmp_path, limit=1)) == len(PARTS)


def test_ocrbench_parquet_files(tmp_path: Path) -> None:
    pyarrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    buffer = io.BytesIO()
    picture(3).save(buffer, "PNG")
    rows = [
        {
            "dataset": "HME100k",
            "question": "formula?",
            "question_type": KINDS[-1],
            "answer": ["x"],
            "image": {"bytes": buffer.getvalue(), "path": None},
        }
    ]
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / "test-00000-of-00001.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    (one,) = read_questions(tmp_path)
    assert (one.dataset, one.part, one.answers) == ("HME100k", "handwritten math", ("x",))
    assert one.image().size == (64, 48)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "Riddles"}, "'Riddles' is not a question type"),
        ({"image_path": "no.png"}, "image no.png is in none of"),
        ({"answers": None}, ""),
    ],
)
def test_ocrbench_bad_records(tmp_path: Path, change: Any, message: str) -> None:
    record = ocr_record(0, **change)
    if not message:
        del record["answers"]
        message = "record 0 lacks answers"
    with pytest.raises(ValueError, match=message):
        read_questions(ocrbench_folder(tmp_path, [record]))


def test_ocrbench_command(tmp_path: Path) -> None:
    model = saved(llava(), tmp_path / "model")
    data = ocrbench_folder(tmp_path / "data", [ocr_record(n, answers=["", "x"]) for n in (0, 1)])
    output = tmp_path / "answers"
    arguments = ("ocrbench", "--data", data, "--model", model, "--output", output)
    result = oscar(*arguments, "--json")
    assert result.exit_code == 0, result.output
    exact, ours = json.loads(result.stdout)
    assert exact["format"] == "16bit" and exact["bits"] > ours["bits"] > 2
    assert exact["score"] == ours["score"] == 1000  # "" is in every answer
    lines = (output / "k2v2" / "ocrbench.jsonl").read_text().splitlines()
    assert len(lines) == 2 and "predict" in json.loads(lines[0])
    changed = [json.dumps(json.loads(line) | {"result": 0}) for line in lines]
    (output / "k2v2" / "ocrbench.jsonl").write_text("\n".join(changed) + "\n")
    again = json.loads(oscar(*arguments, "--json").stdout)
    assert [one["score"] for one in again] == [1000, 0]  # nothing was asked again
    shown = oscar(*arguments).stdout
    assert "2 questions: no official score" in shown and "519" in shown


def test_runner_answers_as_generate_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, maker = llava()
    model.eval()
    runner = MediaRunner(model, maker, ["16bit", "k4v4", "k2v2"])
    question, image = "What is it? " * 12, picture(1)
    with attention_installed(model):
        answers = runner.run(question, 40, images=[image])
    inputs = maker(text=[f"<image>\n{question}"], images=[image], return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=40, do_sample=False, pad_token_id=0)
    prompt = inputs["input_ids"].shape[1]
    assert answers["16bit"][1].tokens == out[0, prompt:].tolist()
    oscar_kv.enable(model, format="k2v2")
    out = model.generate(**inputs, max_new_tokens=40, do_sample=False, pad_token_id=0)
    assert answers["k2v2"][1].tokens == out[0, prompt:].tolist()
    assert answers["16bit"][1].bits == 32 > answers["k4v4"][1].bits > answers["k2v2"][1].bits
    with pytest.raises(ValueError, match="format is 'q4'"):
        MediaRunner(model, maker, ["q4"])
    with pytest.raises(ValueError, match="takes no sounds"):
        runner.run(question, 1, sounds=[tone(0.1)])


def test_prompts_use_the_chat_template() -> None:
    _, maker = llava()
    assert prompt_text(maker, "Why?", images=2) == "<image><image>\nWhy?"
    maker.chat_template = (
        "{% for part in messages[0]['content'] %}"
        "{% if part['type'] == 'image' %}[image]{% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}"
    )
    assert prompt_text(maker, "Why?", images=2) == "[image][image]Why?"


# -- MMAU-Pro --------------------------------------------------------------------------------------

# task, arguments, an answer that follows it, one that does not
INSTRUCTIONS: list[tuple[str, dict[str, Any], str, str]] = [
    ("Include Keywords", {"keywords": "drum, bass"}, "Bass and DRUM.", "Bass alone."),
    ("Keyword Frequency", {"keyword": "cat", "N": 2}, "Cat, cats, cat.", "Cat."),
    ("Forbidden Words", {"forbidden_words": "loud, soft"}, "Quiet.", "Very Loud."),
    ("Number Paragraphs", {"N": 2}, "a *** b", "a"),
    ("Number Words (at least)", {"N": 3}, "one two three", "one two"),
    ("Number Words (at most)", {"N": 2}, "one two", "one two three"),
    ("Number Words (range)", {"N1": 2, "N2": 3}, "one two", "one"),
    ("Postscript", {"postscript_marker": "P.S."}, "Bye. p.s. more", "Bye."),
    ("Number Placeholder", {"N": 1}, "Dear [name]", "Dear you"),
    ("Number Bullets", {"N": 2}, "* a\n* b", "* a"),
    ("Title", {}, "<<Song>> a", "Song"),
    ("Minimum Number Highlighted Section", {"N": 1}, "so *loud* here", "so loud"),
    ("Multiple Sections", {"N": 2, "section_splitter": "Part"}, "Part a Part b", "a"),
    ("Repeat Prompt", {}, "what plays? A horn.", "A horn."),
    ("Two Responses", {}, "a ****** b", "a ****** A"),
    ("All Uppercase", {}, "LOUD!", "Loud!"),
    ("All Lowercase", {}, "soft.", "Soft."),
    ("All-capital Words (at least)", {"N": 1}, "so LOUD", "so loud"),
    ("All-capital Words (at most)", {"N": 0}, "so loud", "so LOUD"),
    ("All-capital Words (range)", {"N1": 1, "N2": 2}, "A B c", "a b c"),
    ("Start Checker", {"start_phrase": "In short,"}, "In short, yes", "Yes, in short,"),
    ("End Checker", {"end_phrase": "That is all."}, "Yes. That is all!", "That is all I know"),
    ("Quotation", {}, ' "yes" ', "yes"),
    ("No Commas", {}, "a b", "a, b"),
]


@pytest.mark.parametrize(("task", "given", "good", "bad"), INSTRUCTIONS)
def test_instructions(task: str, given: dict[str, Any], good: str, bad: str) -> None:
    padded = {"N": None, "keyword": None} | given  # a Parquet row has all arguments
    assert follows(good, task, padded, "What plays?")
    assert not follows(bad, task, padded, "What plays?")


def test_every_instruction_is_known() -> None:
    sentences = {name for name in CHECKS if "Sentences" in name}
    assert len(sentences) == 3
    assert {task for task, *_ in INSTRUCTIONS} == set(CHECKS) - sentences
    assert not follows("yes", "Sing", None, "What plays?")


def test_sentences_are_counted_by_nltk(monkeypatch: pytest.MonkeyPatch) -> None:
    nltk = pytest.importorskip("nltk")

    def missing(text: str) -> list[str]:
        raise LookupError("punkt")

    monkeypatch.setattr(nltk.tokenize, "sent_tokenize", lambda text: text.split(". "))
    assert follows("One. Two. Three.", "Number Sentences (range)", {"N1": 3, "N2": 3}, "")
    assert not follows("One.", "Number Sentences (at least)", {"N": 2}, "")
    monkeypatch.setattr(nltk.tokenize, "sent_tokenize", missing)
    with pytest.raises(ValueError, match=r"nltk\.downloader punkt_tab"):
        follows("One.", "Number Sentences (at most)", {"N": 2}, "")


def write_wav(path: Path, rate: int = 16000, channels: int = 1) -> np.ndarray:
    samples = (tone(0.5, rate=rate) * 32767).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.repeat(channels).tobytes())
    return samples / 32768


def test_sounds_are_read_and_resampled(tmp_path: Path) -> None:
    file = tmp_path / "a.wav"
    samples = write_wav(file, channels=2)
    np.testing.assert_allclose(read_sound(file, 16000), samples, atol=1e-6)
    pytest.importorskip("scipy")
    write_wav(file, rate=32000)
    resampled = read_sound(file, 16000)
    assert resampled.shape == samples.shape and resampled.dtype == np.float32
    assert np.abs(resampled - samples)[200:-200].max() < 0.01


def mmau_folder(folder: Path) -> Path:
    folder.mkdir()
    rows = []
    for number, (task, given, *_) in enumerate(INSTRUCTIONS[:2]):
        write_wav(folder / f"{number}.wav")
        row = {
            "id": f"i{number}",
            "audio_path": [f"{number}.wav"],
            "question": "Say it.",
            "answer": "-",
        }
        rows.append(
            row | {"category": "instruction following", "task_identifier": task, "kwargs": given}
        )
    row = {"id": "o0", "audio_path": "0.wav", "question": "What plays?", "answer": "A horn."}
    rows.append(row | {"category": "open"})
    closed = {"id": "c0", "category": "music", "choices": ["a horn", "a drum"]}
    rows.append(row | closed)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "test.jsonl").write_text(lines, encoding="utf-8")
    return folder


def test_mmau_items(tmp_path: Path) -> None:
    folder = mmau_folder(tmp_path / "data")
    items = read_items(folder, [])
    assert [item.id for item in items] == ["i0", "i1", "o0", "c0"]
    assert items[2].prompt == "What plays?" and items[2].sounds == (folder / "0.wav",)
    assert items[3].prompt.endswith("(A) a horn\n(B) a drum")
    assert len(read_items(folder, ["instruction following"], limit=1)) == 1
    with pytest.raises(ValueError, match="no records of speech; it has instruction following"):
        read_items(folder, ["speech"])
    (folder / "1.wav").unlink()
    with pytest.raises(ValueError, match=r"record i1: audio file .*1\.wav does not exist"):
        read_items(folder, [])
    with pytest.raises(ValueError, match=r"neither test\.parquet nor test\.jsonl"):
        read_items(tmp_path, [])


def test_mmau_command_writes_what_the_official_script_reads(tmp_path: Path) -> None:
    model, data = saved(qwen2_audio(), tmp_path / "model"), mmau_folder(tmp_path / "data")
    pyarrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    rows = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    for row in rows:
        row["audio_path"] = row["audio_path"] if isinstance(row["audio_path"], list) else ["0.wav"]
    parquet.write_table(pyarrow.Table.from_pylist(rows), data / "test.parquet")
    output = tmp_path / "answers"
    arguments = ("mmau-pro", "--data", data, "--model", model, "--output", output)
    result = oscar(*arguments, "--new-tokens", 40, "--json")
    assert result.exit_code == 0, result.output
    exact, ours = json.loads(result.stdout)
    assert exact["items"] == 3 and exact["aif_items"] == ours["aif_items"] == 2
    assert exact["tokens"] == 40 and exact["bits"] > ours["bits"]
    table = parquet.read_table(output / "k2v2" / "test.parquet").to_pylist()
    assert [row["id"] for row in table] == ["i0", "i1", "o0"]
    assert all(isinstance(row["model_output"], str) for row in table)
    shown = oscar(*arguments, "--new-tokens", 40).stdout
    assert "AIF items" in shown and "88.5" in shown
    refused = oscar(*arguments, "--new-tokens", 20)
    assert refused.exit_code == 2 and "answers of other settings" in refused.stderr


def test_lmms_models_are_packed() -> None:
    """With a stand-in for lmms-eval's registry of model classes."""

    class Wrapper:
        """As lmms-eval's: loads a model, calls its generate."""

        def __init__(self, made: Any) -> None:
            self.model = made

    get_packed = lmms.packed_models(
        lambda name, force_simple=False: Wrapper, format="k4v2", window=64
    )
    kind = get_packed("llava_hf", force_simple=True)
    assert kind.__name__ == "PackedWrapper" and issubclass(kind, Wrapper)
    model = llava()[0].eval()
    ids = torch.arange(40)[None]
    out = kind(model).model.generate(ids, max_new_tokens=2, return_dict_in_generate=True)
    shared = out.past_key_values.shared
    assert (shared.format, shared.window) == ("k4v2", 64)
    with pytest.raises(TypeError, match="got NoneType"):
        kind(None)


def test_lmms_eval_must_be_installed(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(lmms.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["lmms", "--oscar-format", "k4v4", "--model", "llava_hf"])
    with pytest.raises(SystemExit):
        lmms.main()
    assert "pip install lmms-eval" in capsys.readouterr().err
