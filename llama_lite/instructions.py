"""Instruction rows: where they come from, which are kept, which are held out, and what of them is learnt.

Three schemas: alpaca (instruction, input, output), messages, prompt/completion. A system prompt and a history beside them are context; weight 0 and
train false, of a row or a message, say what is not learnt. The embedded default asks about the documentation inside the installed packages, in the
words of its authors. Nothing is dropped or cut in silence: rows that are none and columns that are not read are counted and named.
"""

import ast
import collections
import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator

from tqdm import tqdm

from . import prompts
from .arguments import Refusal
from .formats import Skipped, Unreadable, module_tree, parts, rows, skipped_lines, utf8_text
from .rendering import NotRendered
from .runs import say, worker_pool
from .sources import inventory, resolve

SCHEMAS = (("messages",), ("prompt", "completion"), ("instruction", "output"))  # alpaca's `input` may be absent
BESIDE = {SCHEMAS[0]: (), SCHEMAS[1]: ("history",), SCHEMAS[2]: ("input", "history")}  # further columns that are read, and these of all three:
BESIDE_ALL = ("system", "weight", "train")
IN_MESSAGES = ("role", "content", "weight", "train")
ROLES = ("system", "user", "assistant")
EMPTY = (None, "", [], {})
EMBEDDED_ROWS = 6000
LONGEST_INPUT, LONGEST_ANSWER, SHORTEST_ANSWER = 500, 320, 25  # characters of an embedded row
MODULE_ROWS = 6  # of each kind that a module gives at most, so that no package fills the set
MARKUP = re.compile(
    r"https?://|\.\. |>>>|::|\\|_{2,}|[=\-~]{3,}|\{|\}|TODO|auto_docstring"
)  # links, directives, code, rulers, templates: no sentence to learn


@dataclasses.dataclass(frozen=True)
class Row:
    """One conversation. Answers before `learn_from`, and those of the messages `unlearnt`, are context.

    Rows of one `document` are never split between training and held-out.
    """

    name: str
    document: str
    messages: tuple[dict, ...]
    learn_from: int = 0
    unlearnt: tuple[int, ...] = ()


class NoRow(Exception):
    """Why a record is no conversation that can be learnt from: it is counted, and named."""


# ---- reading ----


def load(
    dataset: str, config: str | None, split: str, revision: str | None, most: int | None, workers: int, skip_held_out: bool = False
) -> tuple[list[Row], dict, dict]:
    """(rows, where they are from, what was skipped and why). Raises Refusal for another schema, and where nothing can be read.

    skip_held_out: of installed-docs, leave out the modules that the embedded evaluation tasks are made of. The record of where they are from says in
    `columns_not_read` how many rows have something in each column that has no meaning here.
    """
    skipped, unread = Skipped(), collections.Counter()
    source = resolve(dataset, config, split, revision, only_rows=True)
    if source.kind == "installed-docs":
        modules = [file.name for file in source.files]
        if skip_held_out:
            from .tasks import held_out_documents

            held = {document["document"] for document in held_out_documents()}
            modules = [module for module in modules if module not in held]
        return embedded(modules, most or EMBEDDED_ROWS, workers), source.record, skipped.reasons
    say(f"rows      {inventory(source)}")
    if source.kind == "installed-files":
        raise Refusal("--dataset installed-files holds no conversations: installed-docs makes questions of the documentation.")
    found: list[Row] = []
    for name, record, first in _records(source):
        if most and len(found) == most:
            break
        schema = _schema(record)
        if schema is None and first:
            raise Refusal(
                f"{name} has the columns {', '.join(sorted(record)) or 'none'}. Rows are needed with `instruction`, `output` (and `input`), "
                "or `messages`, or `prompt` and `completion`."
            )
        try:
            found.append(_row(name, record, schema, unread))
        except NoRow as reason:
            skipped.add(str(reason), name)
    if not found:
        why = "; ".join(skipped_lines(skipped.reasons)) or "it holds no rows"
        raise Refusal(f"--dataset {dataset}: none of its rows is a conversation to learn from: {why}.")
    return found, source.record | ({"columns_not_read": dict(unread.most_common())} if unread else {}), skipped.reasons


def _records(source) -> Iterator[tuple[str, dict, bool]]:
    """(name, record, whether it is the first of its file) of all rows."""
    for file in source.files:
        first = True
        for part in parts(file):
            for number, record in rows(part):
                yield f"{part.name}:{number}", record, first
                first = False


def _schema(record: dict) -> tuple[str, ...] | None:
    """The first schema whose columns all hold something, else the first whose columns are there."""
    there = [schema for schema in SCHEMAS if all(column in record for column in schema)]
    return next((schema for schema in there if all(record[column] is not None for column in schema)), there[0] if there else None)


def _row(name: str, record: dict, schema: tuple[str, ...] | None, unread: collections.Counter) -> Row:
    """The Row of a record. Counts in `unread` which of its columns hold something that has no meaning here. Raises NoRow."""
    if schema is None:
        raise NoRow("columns of no schema")
    if not _is_learnt(record, "the row's", unread):
        raise NoRow("weight 0 or train false")
    for column, value in record.items():
        if column not in (*schema, *BESIDE[schema], *BESIDE_ALL) and not _is_empty(value):
            unread[column] += 1
    before = _history(record["history"], unread) if "history" in BESIDE[schema] and not _is_empty(record.get("history")) else []
    given = []
    if schema == SCHEMAS[2]:
        messages = prompts.conversation(*(_text(record.get(column), column) for column in ("instruction", "input", "output")))
    elif schema == SCHEMAS[1]:
        given = _as_messages(record["prompt"], "user", unread)
        messages = [*given, *_as_messages(record["completion"], "assistant", unread)]
    else:
        messages = _as_messages(record["messages"], None, unread)
    asked = next((message["content"] for message in messages if message["role"] == "user"), "")
    if (system := _text(record.get("system"), "system")).strip():
        if messages and messages[0]["role"] == "system":
            unread["system"] += 1  # the conversation has its own
        else:
            before = [{"role": "system", "content": system}, *before]
    elif before and messages and messages[0]["role"] == "system":
        before, messages = [messages[0], *before], messages[1:]
        given = given[1:]
    messages = [*before, *messages]
    unlearnt = tuple(number for number, message in enumerate(messages) if message.pop("learnt", True) is False and message["role"] == "assistant")
    turns = [message["role"] for message in messages if message["role"] != "system"]
    if strange := next((role for role in turns if role not in ROLES), None):
        raise NoRow(f"a turn of the role {strange!r}")
    if turns != ["user", "assistant"] * (len(turns) // 2) or not turns or any(message["role"] == "system" for message in messages[1:]):
        raise NoRow("turns are not user and assistant in turn, ended by the assistant")
    if any(not message["content"].strip() for message in messages if message["role"] != "assistant"):
        raise NoRow("empty question")
    if any(not message["content"].strip() for message in messages if message["role"] == "assistant"):
        raise NoRow("empty answer")
    learn_from = len(before) + len(given)
    if all(number < learn_from or number in unlearnt for number, message in enumerate(messages) if message["role"] == "assistant"):
        raise NoRow("weight 0 or train false")
    return Row(name, " ".join(asked.lower().split()), tuple(messages), learn_from, unlearnt)


def _is_empty(value) -> bool:
    return value in EMPTY or value != value  # NaN


def _is_learnt(fields: dict, whose: str, unread: collections.Counter) -> bool:
    """Whether `weight` (0 or 1, as OpenAI's) and `train` (false or true) of a row or a message let it be learnt; other values are counted."""
    learnt = True
    for name, meant in (("weight", {0: False, 1: True}), ("train", {False: False, True: True})):
        value = fields.get(name)
        value = {"0": 0, "1": 1, "false": False, "true": True}.get(value.lower(), value) if isinstance(value, str) else value  # of a CSV file
        if _is_empty(value):
            continue
        if isinstance(value, bool | int | float) and value in meant:
            learnt = learnt and meant[value]
        else:
            unread[f"{whose} {name} other than {' and '.join(map(str, meant))}"] += 1
    return learnt


def _history(value, unread: collections.Counter) -> list[dict]:
    """Earlier turns as messages: a list of messages, or of pairs of question and answer. Raises NoRow."""
    if isinstance(value, list | tuple) and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in value):
        return [{"role": role, "content": _text(text, "history")} for pair in value for role, text in zip(("user", "assistant"), pair, strict=True)]
    return _as_messages(value, None, unread, "history is no list of {role, content} or of pairs")


def _as_messages(value, role: str | None, unread: collections.Counter, otherwise: str = "messages are no list of {role, content}") -> list[dict]:
    """A text as one message of `role` (None: a text is none); a list of messages as {role, content, learnt}. Raises NoRow, `otherwise` for neither."""
    if isinstance(value, Unreadable) or (role and isinstance(value, str | bytes)):
        return [{"role": role, "content": _text(value, "a text")}]
    value = () if value is None else value
    if not isinstance(value, list | tuple) or not all(isinstance(message, dict) and {"role", "content"} <= set(message) for message in value):
        raise NoRow(otherwise)
    found = []
    for message in value:
        for column in (column for column in message if column not in IN_MESSAGES and not _is_empty(message[column])):
            unread[f"{column} of messages"] += 1
        found.append(
            {
                "role": _text(message["role"], "role"),
                "content": _text(message["content"], "content"),
                "learnt": _is_learnt(message, "a message's", unread),
            }
        )
    return found


def _text(value, what: str) -> str:
    """A text of a row: "" for none, the texts of a list of parts one behind the other. Raises NoRow."""
    if value is None:
        return ""
    if isinstance(value, list) and value and all(isinstance(part, dict) and "type" in part for part in value):
        if strange := next((part["type"] for part in value if part["type"] != "text"), None):
            raise NoRow(f"{what} with a part of the type {strange!r}")
        return "".join(_text(part.get("text"), what) for part in value)
    if isinstance(value, Unreadable):
        raise NoRow(str(value))
    if not isinstance(value, str | bytes):
        raise NoRow(f"{what} is {type(value).__name__} instead of text")
    text = utf8_text(value)
    if text is None:
        raise NoRow("not UTF-8")
    return text


def unread_lines(source: dict) -> list[str]:
    """What a person reads of `columns_not_read`, if there are any."""
    counts = source.get("columns_not_read")
    return [f"columns not read: {', '.join(f'{name} (of {count:,} rows)' for name, count in counts.items())}"] if counts else []


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
    """Examples of any length; `skipped` counts the rows that hold the text of a special token, or that the chat template refuses."""
    examples, counts = [], Skipped()
    for row in tqdm(found, desc="encoding rows", unit="row", disable=None):
        messages = list(row.messages)
        if special := prompts.special_text(tokenizer, messages):
            counts.add(f"contains the text {special}", row.name)
            continue
        try:
            encoded = prompts.encode(tokenizer, messages, row.learn_from, row.unlearnt)
        except NotRendered as error:
            counts.add(str(error).partition(". ")[0], row.name)
            continue
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


def need_rows(learnt: list[Example], held: list[Example], least: int, skipped: dict, documents: int | None = None) -> None:
    """Raise Refusal when nothing is left to learn from, or fewer than `least` held-out rows. `documents`: how many all rows make, once some are held out."""
    why = "; ".join(f"{entry['rows']:,} {reason}" for reason, entry in skipped.items()) or "none were skipped"
    if not learnt and held and documents:
        told = "one document" if documents == 1 else f"{documents:,} documents"
        raise Refusal(
            f"no row is left to learn from ({why}): all {len(held):,} are held out, because they are {told} (rows whose first question is the same), and "
            f"documents are held out whole. {'Bring rows with other questions' if documents == 1 else 'Lower --eval_rows, or bring more rows'}."
        )
    if not learnt:
        long = "raise --max_length, choose --long_rows truncate, " if any("tokens" in reason for reason in skipped) else ""
        raise Refusal(f"no row is left to learn from ({why}): {long}lower --eval_rows, or bring more rows.")
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
