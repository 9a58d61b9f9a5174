"""Tasks of one's own questions: a JSONL file, or a folder of them, whose lines say what is asked.

    {"question": "...", "choices": ["...", "..."], "answer": 0}   the likelihood of each choice; answer: index or text
    {"prompt": "...", "answer": "..."}                            a greedy answer; answer: one text, or a list of them;
                                                                  also the keys of GENERATED, which rows of tuning have
    {"text": "..."}                                               bits per byte

Lines of one task have one of these forms. `group` is optional: items of one group are not independent of each other.
"""

import json
from collections.abc import Callable
from pathlib import Path

from ...chat_format.instruction_rows import PAIRS
from ...errors import Refusal
from .definition import ANSWERED, MEAN, bits_per_byte, cloze, make

GENERATED = (("prompt", "answer"), ("prompt", "completion"), *PAIRS)
FORMS = {("question", "choices", "answer"): "choices", **dict.fromkeys(GENERATED, "generated"), ("text",): "text"}
ANSWER_TOKENS = 64


def load(name: str, path: str) -> dict:
    """{leaf: lm-eval task} of the questions in a JSONL file, or in the JSONL files of a folder, one leaf per file.
    Raises Refusal for what is no question, naming file and line.
    """
    location, flag = Path(path).expanduser(), f"--questions {name}={path}"
    files = sorted(location.glob("*.jsonl")) if location.is_dir() else [location]
    if not files or not all(file.is_file() for file in files):
        raise Refusal(f"{flag}: a .jsonl file, or a folder with such files, is wanted.")
    read = {name if file == location else f"{name}_{file.stem}": _read(flag, file) for file in files}
    if len(forms := {form for form, _ in read.values()}) > 1:
        raise Refusal(f"{flag}: its files have different forms ({', '.join(sorted(forms))}): give each its own NAME.")
    makers = {"choices": choices_task, "generated": generated_task, "text": bits_per_byte}
    return {leaf: makers[form](leaf, items) for leaf, (form, items) in read.items()}


def choices_task(leaf: str, items: list[dict]):
    """An lm-eval task of multiple choice by the likelihood of each option's text: acc and acc_norm."""
    return cloze(leaf, items, "\nAnswer:")


def generated_task(leaf: str, items: list[dict], reword: Callable[[str], str] = str):
    """An lm-eval task of greedy answers: exact_match of the first line with one of the right answers, without regard to
    case, blanks and a final period. reword: changes each prompt.
    """

    def score_answers(item: dict, answers: list[str]) -> dict[str, float]:
        given = _normalized(answers[0].strip().split("\n")[0])
        return {"exact_match": float(given in [_normalized(answer) for answer in item["answers"]])}

    task = make(
        leaf,
        items,
        "generate_until",
        doc_to_text=lambda item: reword(item["question"]),
        generation_kwargs={"until": ["\n\n"], "max_gen_toks": ANSWER_TOKENS, "do_sample": False},
        process_results=score_answers,
        metric_list=[{"metric": "exact_match", **MEAN}],
        **ANSWERED,
    )
    task.reworded = lambda other, change: generated_task(other, items, change)
    return task


def _normalized(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(". ")


def _read(flag: str, file: Path) -> tuple[str, list[dict]]:
    """(form, items) of a file. Raises Refusal."""
    items, forms = [], set()
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # JSON may hold other line ends, as U+2028
    except UnicodeDecodeError as error:
        raise Refusal(f"{flag}: {file.name} is not UTF-8 (byte {error.start}).") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{flag}: {file.name}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise Refusal(f"{where} is no JSON ({error}).") from None
        form, item = _item(where, record)
        forms.add(form)
        items.append(item)
        if len(forms) > 1:
            raise Refusal(f"{where} has another form than the lines before it: one form per task.")
    if not items:
        raise Refusal(f"{flag}: {file.name} has no lines.")
    return forms.pop(), items


def _item(where: str, record: object) -> tuple[str, dict]:
    """(form, item of an lm-eval task) of a line. Raises Refusal."""
    keys = next((keys for keys in FORMS if isinstance(record, dict) and record.keys() >= set(keys)), None)
    if keys is None:
        wanted = "; or ".join(", ".join(keys) for keys in FORMS)
        found = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise Refusal(f"{where} has {found}: it needs {wanted}.")
    form = FORMS[keys]
    item = {} if record.get("group") in (None, "") else {"document": str(record["group"])}
    texts = [record[key] for key in ("question", "prompt", "text") if key in record]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise Refusal(f"{where}: question, prompt and text are strings that are not empty.")
    if form == "text":
        return form, {"text": record["text"], **item}
    answer = record[keys[-1]]
    if form == "generated":
        answers = answer if isinstance(answer, list) else [answer]
        if not answers or not all(isinstance(one, str) and one.strip() for one in answers):
            raise Refusal(f"{where}: {keys[-1]} is a text that is not empty, or a list of them.")
        return form, {"question": record[keys[0]], "answer": answers[0], "answers": answers, **item}
    choices = record["choices"]
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise Refusal(f"{where}: choices is a list of two or more texts that are not empty.")
    index = choices.index(answer) if answer in choices else answer
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(choices):
        raise Refusal(f"{where}: answer is one of the choices, or its index from 0 to {len(choices) - 1}.")
    return form, {"question": record["question"], "choices": choices, "answer": index, **item}
