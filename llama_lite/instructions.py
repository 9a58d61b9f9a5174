"""Instruction rows: where they come from, which are kept, which are held out, and what of them is learnt.

Three schemas: alpaca (instruction, input, output), messages, prompt/completion. The embedded default asks about the
documentation inside the installed packages, in the words of its authors. Nothing is dropped or cut in silence.
"""

import ast
import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator

from tqdm import tqdm

from . import prompts
from .arguments import Refusal
from .formats import Skipped, module_tree, parts, rows
from .runs import worker_pool
from .sources import resolve

SCHEMAS = (("messages",), ("prompt", "completion"), ("instruction", "output"))  # alpaca's `input` may be absent
EMBEDDED_ROWS = 6000
LONGEST_INPUT, LONGEST_ANSWER, SHORTEST_ANSWER = 500, 320, 25  # characters of an embedded row
MODULE_ROWS = 6  # of each kind that a module gives at most, so that no package fills the set
MARKUP = re.compile(
    r"https?://|\.\. |>>>|::|\\|_{2,}|[=\-~]{3,}|\{|\}|TODO|auto_docstring"
)  # links, directives, code, rulers, templates: no sentence to learn


@dataclasses.dataclass(frozen=True)
class Row:
    """One conversation. Answers before `learn_from` are context. Rows of one `document` are never split between training and held-out."""

    name: str
    document: str
    messages: tuple[dict, ...]
    learn_from: int = 0


# ---- reading ----


def load(
    dataset: str, config: str | None, split: str, revision: str | None, most: int | None, workers: int, skip_held_out: bool = False
) -> tuple[list[Row], dict, dict]:
    """(rows, where they are from, what was skipped and why). Raises Refusal for another schema, and where nothing can be read.

    skip_held_out: of installed-docs, leave out the modules that the embedded evaluation tasks are made of.
    """
    skipped = Skipped()
    source = resolve(dataset, config, split, revision, only_rows=True)
    if source.kind == "installed-docs":
        modules = [file.name for file in source.files]
        if skip_held_out:
            from .tasks import held_out_documents

            held = {document["document"] for document in held_out_documents()}
            modules = [module for module in modules if module not in held]
        return embedded(modules, most or EMBEDDED_ROWS, workers), source.record, skipped.reasons
    if source.kind == "installed-files":
        raise Refusal("--dataset installed-files holds no conversations: installed-docs makes questions of the documentation.")
    found: list[Row] = []
    for file in source.files:
        for part in parts(file):
            for number, record in rows(part):
                name = f"{part.name}:{number}"
                row = None if isinstance(record, bytes) else _row(name, record)
                if isinstance(row, Row):
                    found.append(row)
                else:
                    skipped.add(row or "not UTF-8", name)
                if most and len(found) == most:
                    return found, source.record, skipped.reasons
    return found, source.record, skipped.reasons


def _row(name: str, record: dict) -> Row | str:
    """The Row of a record, or why it is none."""
    schema = next((schema for schema in SCHEMAS if all(column in record for column in schema)), None)
    if schema is None:
        raise Refusal(
            f"{name} has the columns {', '.join(sorted(record)) or 'none'}. Rows are needed with `instruction`, `output` (and `input`), "
            "or `messages`, or `prompt` and `completion`."
        )
    learn_from = 0
    if schema == SCHEMAS[2]:
        messages = prompts.conversation(record["instruction"] or "", record.get("input") or "", record["output"] or "")
    elif schema == SCHEMAS[1]:
        given, answer = _as_messages(name, record["prompt"], "user"), _as_messages(name, record["completion"], "assistant")
        messages, learn_from = [*given, *answer], len(given)
    else:
        messages = _as_messages(name, record["messages"], "user")
    turns = [message["role"] for message in messages if message["role"] != "system"]
    if turns != ["user", "assistant"] * (len(turns) // 2) or not turns or any(message["role"] == "system" for message in messages[1:]):
        return "turns are not user and assistant in turn, ended by the assistant"
    if any(not message["content"].strip() for message in messages if message["role"] != "assistant"):
        return "empty question"
    if any(not message["content"].strip() for message in messages if message["role"] == "assistant"):
        return "empty answer"
    asked = next(message["content"] for message in messages if message["role"] == "user")
    return Row(name, " ".join(asked.lower().split()), tuple(messages), learn_from)


def _as_messages(name: str, value, role: str) -> list[dict]:
    """A text as one message of `role`; a list of messages as it is."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    try:
        return [{"role": str(message["role"]), "content": message["content"] or ""} for message in value or ()]
    except (TypeError, KeyError):
        raise Refusal(f"{name}: messages are a list of {{role, content}}, not {json.dumps(value, default=str)[:80]}.") from None


def held_documents(found: list[Row], count: int) -> set[str]:
    """Documents that are held out, whole: in the order of a hash of their name, until they have `count` rows."""
    documents: dict[str, int] = {}
    for row in found:
        documents[row.document] = documents.get(row.document, 0) + 1
    held, total = set(), 0
    for document in sorted(documents, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if total >= count:
            break
        held.add(document)
        total += documents[document]
    return held


# ---- ids ----


@dataclasses.dataclass(frozen=True)
class Example:
    """A Row as ids and labels, -100 where nothing is learnt. `cut`: its answer was too long and has no end."""

    row: Row
    input_ids: list[int]
    labels: list[int]
    cut: bool = False

    @property
    def learnt(self) -> int:
        return sum(label != -100 for label in self.labels)


def encode(found: list[Row], tokenizer, skipped: dict) -> list[Example]:
    """Examples of any length; `skipped` counts the rows that hold the text of a special token."""
    examples, counts = [], Skipped()
    for row in tqdm(found, desc="encoding rows", unit="row", disable=None):
        messages = list(row.messages)
        if special := prompts.special_text(tokenizer, messages):
            counts.add(f"contains the text {special}", row.name)
            continue
        encoded = prompts.encode(tokenizer, messages, row.learn_from)
        examples.append(Example(row, encoded.input_ids, encoded.labels))
    skipped.update(counts.reasons)
    return examples


def limit(examples: list[Example], max_length: int, long_rows: str, skipped: dict) -> list[Example]:
    """Examples of at most `max_length` ids. `long_rows` says whether longer ones are dropped or truncated; `skipped` counts what went."""
    kept, counts = [], Skipped()
    for example in examples:
        if len(example.input_ids) <= max_length:
            kept.append(example)
        elif long_rows == "drop":
            counts.add(f"longer than {max_length} tokens: dropped", example.row.name)
        elif all(label == -100 for label in example.labels[:max_length]):
            counts.add(f"no answer within {max_length} tokens: dropped", example.row.name)
        else:
            counts.add(f"longer than {max_length} tokens: answer cut, no end-of-text", example.row.name)
            kept.append(Example(example.row, example.input_ids[:max_length], example.labels[:max_length], True))
    skipped.update(counts.reasons)
    return kept


def need_rows(learnt: list[Example], held: list[Example], least: int, skipped: dict) -> None:
    """Raise Refusal when nothing is left to learn from, or fewer than `least` held-out rows."""
    why = "; ".join(f"{entry['rows']:,} {reason}" for reason, entry in skipped.items()) or "none were skipped"
    if not learnt:
        raise Refusal(
            f"no row is left to learn from ({why}): raise --max_length, choose --long_rows truncate, lower --eval_rows, or bring more rows."
        )
    if len(held) < max(least, 1):
        raise Refusal(f"{len(held)} rows are held out and {max(least, 1)} are needed ({why}): raise --eval_rows, or bring more rows.")


def fingerprint(examples: list[Example]) -> str:
    """sha256 over ids and labels, in order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.input_ids, example.labels]).encode())
    return digest.hexdigest()


def pack(examples: list[Example], max_length: int, packing: bool):
    """A `datasets.Dataset` of ids and labels; with `packing`, whole rows side by side up to `max_length` (TRL's best fit decreasing)."""
    from datasets import Dataset
    from datasets.utils.logging import disable_progress_bar
    from trl import pack_dataset

    disable_progress_bar()
    data = Dataset.from_dict({name: [getattr(example, name) for example in examples] for name in ("input_ids", "labels")})
    return pack_dataset(data, max_length, "bfd") if packing else data


def show(tokenizer, example: Example, colour: bool) -> str:
    """An example as text, what is learnt in colour, or between »« where there is none."""
    on, off = ("\x1b[1;32m", "\x1b[0m") if colour else ("»", "«")
    text, ids, learnt = "", [], False
    for token, label in [*zip(example.input_ids, example.labels, strict=True), (None, None)]:
        if token is None or (label != -100) != learnt:
            part = tokenizer.decode(ids)
            text += f"{on}{part}{off}" if learnt and part else part
            ids, learnt = [], label != -100
        ids.append(token)
    return text


# ---- the embedded rows ----


def embedded(modules: list[str], most: int, workers: int) -> list[Row]:
    """Questions about documented functions and classes, answered in the words of the documentation.

    Modules come in the corpus's own fixed order. Answers that say what an earlier one said (the same first ten words, or
    the same words throughout) are left out: boilerplate would make the loss look better than the model is.
    """
    found: list[Row] = []
    seen: set[str] = set()
    with worker_pool(workers, _nothing) as pool, tqdm(total=most, desc="asking about the documentation", unit="row", disable=None) as bar:
        first = modules[: 4 * most]
        for module, asked in zip(first, pool.map(_module_rows, first, chunksize=16), strict=True):
            for number, (instruction, given, answer) in enumerate(asked):
                words = re.findall(r"[a-z]+", answer.lower())
                keys = {" ".join(words), " ".join(words[:10])}
                if keys & seen or len(found) == most:
                    continue
                seen |= keys
                found.append(Row(f"{module}:{number}", module, tuple(prompts.conversation(instruction, given, answer))))
                bar.update()
            if len(found) == most:
                pool.shutdown(wait=False, cancel_futures=True)
                break
    return found


def _nothing() -> None:
    pass


def _module_rows(name: str) -> list[tuple[str, str, str]]:
    """(instruction, input, answer) about one installed module."""
    tree = module_tree(name, ('"""',))
    if tree is None:
        return []
    module = re.sub(r"/__init__$", "", name.removesuffix(".py").removeprefix("python/")).replace("/", ".")
    kept: dict[str, int] = {}
    found = []
    for qualified, node in _public(tree, ""):
        documentation = ast.get_docstring(node)
        for kind, *row in _questions(f"{module}.{qualified}", isinstance(node, ast.ClassDef), documentation) if documentation else ():
            if kept.get(kind, 0) < MODULE_ROWS:
                kept[kind] = kept.get(kind, 0) + 1
                found.append(tuple(row))
    return found


def _public(tree, prefix: str) -> Iterator[tuple[str, ast.AST]]:
    """(qualified name, node) of the public classes and functions of a module, in order."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from _public(node, f"{prefix}{node.name}.")


def _questions(name: str, is_class: bool, documentation: str) -> Iterator[tuple[str, str, str, str]]:
    """(kind, instruction, input, answer) that a docstring gives. Which wording is used depends on the name alone."""
    import docstring_parser

    try:
        parsed = docstring_parser.parse(documentation)
    except docstring_parser.ParseError:
        return
    short, chance = name.split(".")[-1], hashlib.sha256(name.encode()).digest()

    def worded(*choices):
        return choices[chance[0] % len(choices)]

    first, _, rest = documentation.partition("\n\n")
    summary, described = _answer(first), _answer(rest, LONGEST_INPUT)
    if summary and described and chance[1] % 2:
        ask = worded(f"Summarise what is said about `{short}` in a sentence.", "Summarise this description in a sentence.")
        yield "summarise", ask, described, summary
    elif summary:
        what = "class" if is_class else "function"
        yield "summary", worded(f"What does the {what} `{name}` do?", f"Describe `{name}` in a sentence.", f"What is `{name}` for?"), "", summary
    for parameter in parsed.params:
        if parameter.arg_name.isidentifier() and (answer := _answer(parameter.description)):
            ask = worded(
                f"What does the argument `{parameter.arg_name}` of `{name}` mean?",
                f"Explain the argument `{parameter.arg_name}` of `{short}`.",
                f"What should I pass as `{parameter.arg_name}` to `{name}`?",
            )
            yield "argument", ask, "", answer
    if parsed.returns and (answer := _answer(parsed.returns.description)):
        yield "returns", worded(f"What does `{name}` return?", f"What do I get back from `{short}`?"), "", answer
    for error in parsed.raises:
        if error.type_name and (answer := _answer(error.description)):
            yield "raises", f"When does `{name}` raise {error.type_name.strip('[`]')}?", "", answer


def _answer(text: str | None, longest: int = LONGEST_ANSWER) -> str | None:
    """The first paragraph of a description as one line that ends in a full stop, or None where it is none to learn from."""
    paragraph = " ".join((text or "").strip().split("\n\n")[0].split())
    paragraph = re.sub(r":[a-z:]+:`~?([^`<]+?)(?: <[^`]*>)?`", r"`\1`", paragraph).replace("``", "`")
    if not SHORTEST_ANSWER <= len(paragraph) <= longest or len(re.findall(r"[A-Za-z]{2,}", paragraph)) < 4:
        return None
    if MARKUP.search(paragraph) or not paragraph[0].isalpha():
        return None
    if paragraph[-1] in ":,;(" or re.match(r"\w+ ?\(|(Args|Arguments|Parameters|Returns|Raises|Examples?|Inputs?|class):", paragraph):
        return None
    if re.fullmatch(r"[a-z][a-z-]*", paragraph.split()[0]):
        paragraph = paragraph[0].upper() + paragraph[1:]
    return paragraph + ("" if paragraph[-1] in ".!?" else ".")
