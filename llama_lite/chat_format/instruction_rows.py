"""Instruction rows: where they come from, which are kept, which are held out, and what of them is learnt.

Three schemas: alpaca (instruction, input, output), messages, prompt/completion. A system prompt and a history beside
them are context; weight 0 and train false, of a row or a message, say what is not learnt. The embedded default asks
about the documentation inside the installed packages, in the words of its authors. Nothing is dropped or cut in
silence: rows that are none and columns that are not read are counted and named.
"""

import collections
import hashlib
from collections.abc import Iterator

from ..data.formats import Skipped, Unreadable, parts, rows, skipped_lines, utf8_text
from ..data.sources import inventory, resolve
from ..distributed import print_main
from ..errors import Refusal
from . import template
from .conversation import NoRow, Row
from .docs_questions import EMBEDDED_ROWS, embedded

SCHEMAS = (("messages",), ("prompt", "completion"), ("instruction", "output"))  # alpaca's `input` may be absent

BESIDE = {
    SCHEMAS[0]: (),
    SCHEMAS[1]: ("history",),
    SCHEMAS[2]: ("input", "history"),
}  # further columns that are read, and these of all three:

BESIDE_ALL = ("system", "weight", "train")

IN_MESSAGES = ("role", "content", "weight", "train")

ROLES = ("system", "user", "assistant")

EMPTY = (None, "", [], {})


# ---- reading ----


def load(
    dataset: str,
    config: str | None,
    split: str,
    revision: str | None,
    most: int | None,
    workers: int,
    skip_held_out: bool = False,
) -> tuple[list[Row], dict, dict]:
    """(rows, where they are from, what was skipped and why). Raises Refusal for another schema, and where nothing can
    be read.

    most: rows that are taken at most. skip_held_out: of installed-docs, leave out the modules that the embedded
    evaluation tasks are made of. The record of where they are from says in `columns_not_read` how many rows have
    something in each column that has no meaning here, and has `max_rows` where as many rows as that were taken.
    """
    skipped, unread = Skipped(), collections.Counter()
    source = resolve(dataset, config, split, revision, only_rows=True)
    if source.kind == "installed-docs":
        modules = [file.name for file in source.files]
        if skip_held_out:
            from ..data.held_out import held_out_documents

            held = {document["document"] for document in held_out_documents()}
            modules = [module for module in modules if module not in held]
        most = most or EMBEDDED_ROWS
        found = embedded(modules, most, workers)
        return found, source.record | _limit_reached(found, most), skipped.reasons
    print_main(f"rows      {inventory(source)}{f'; of these the first {most:,} rows (--max_rows)' if most else ''}")
    if source.kind == "installed-files":
        raise Refusal(
            "--dataset installed-files holds no conversations: installed-docs makes questions of the documentation."
        )
    found = []
    for name, record, first in _records(source):
        if most and len(found) == most:
            break
        schema = _schema(record)
        if schema is None and first:
            raise Refusal(
                f"{name} has the columns {', '.join(sorted(record)) or 'none'}. Rows are needed with `instruction`,"
                " `output` (and `input`), or `messages`, or `prompt` and `completion`."
            )
        try:
            found.append(_row(name, record, schema, unread))
        except NoRow as reason:
            skipped.add(str(reason), name)
    if not found:
        why = "; ".join(skipped_lines(skipped.reasons)) or "it holds no rows"
        raise Refusal(f"--dataset {dataset}: none of its rows is a conversation to learn from: {why}.")
    counted = {"columns_not_read": dict(unread.most_common())} if unread else {}
    return found, source.record | counted | _limit_reached(found, most), skipped.reasons


def _limit_reached(found: list[Row], most: int | None) -> dict:
    return {"max_rows": most} if len(found) == most else {}


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
    return next(
        (schema for schema in there if all(record[column] is not None for column in schema)),
        there[0] if there else None,
    )


def _row(name: str, record: dict, schema: tuple[str, ...] | None, unread: collections.Counter) -> Row:
    """The Row of a record. Counts in `unread` which of its columns hold something that has no meaning here. Raises
    NoRow.
    """
    if schema is None:
        raise NoRow("columns of no schema")
    if not _is_learnt(record, "the row's", unread):
        raise NoRow("weight 0 or train false")
    for column, value in record.items():
        if column not in (*schema, *BESIDE[schema], *BESIDE_ALL) and not _is_empty(value):
            unread[column] += 1
    before = (
        _history(record["history"], unread)
        if "history" in BESIDE[schema] and not _is_empty(record.get("history"))
        else []
    )
    given = []
    if schema == SCHEMAS[2]:
        messages = template.conversation(
            *(_text(record.get(column), column) for column in ("instruction", "input", "output"))
        )
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
    unlearnt = tuple(
        number
        for number, message in enumerate(messages)
        if message.pop("learnt", True) is False and message["role"] == "assistant"
    )
    turns = [message["role"] for message in messages if message["role"] != "system"]
    if strange := next((role for role in turns if role not in ROLES), None):
        raise NoRow(f"a turn of the role {strange!r}")
    if (
        turns != ["user", "assistant"] * (len(turns) // 2)
        or not turns
        or any(message["role"] == "system" for message in messages[1:])
    ):
        raise NoRow("turns are not user and assistant in turn, ended by the assistant")
    if any(not message["content"].strip() for message in messages if message["role"] != "assistant"):
        raise NoRow("empty question")
    if any(not message["content"].strip() for message in messages if message["role"] == "assistant"):
        raise NoRow("empty answer")
    learn_from = len(before) + len(given)
    if all(
        number < learn_from or number in unlearnt
        for number, message in enumerate(messages)
        if message["role"] == "assistant"
    ):
        raise NoRow("weight 0 or train false")
    return Row(name, " ".join(asked.lower().split()), tuple(messages), learn_from, unlearnt)


def _is_empty(value) -> bool:
    return value in EMPTY or value != value  # NaN


def _is_learnt(fields: dict, whose: str, unread: collections.Counter) -> bool:
    """Whether `weight` (0 or 1, as OpenAI's) and `train` (false or true) of a row or a message let it be learnt; other
    values are counted.
    """
    trained = True
    for name, meanings in (("weight", {0: False, 1: True}), ("train", {False: False, True: True})):
        value = fields.get(name)
        value = (
            {"0": 0, "1": 1, "false": False, "true": True}.get(value.lower(), value)
            if isinstance(value, str)
            else value
        )  # of a CSV file
        if _is_empty(value):
            continue
        if isinstance(value, bool | int | float) and value in meanings:
            trained = trained and meanings[value]
        else:
            unread[f"{whose} {name} other than {' and '.join(map(str, meanings))}"] += 1
    return trained


def _history(value, unread: collections.Counter) -> list[dict]:
    """Earlier turns as messages: a list of messages, or of pairs of question and answer. Raises NoRow."""
    if isinstance(value, list | tuple) and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in value):
        return [
            {"role": role, "content": _text(text, "history")}
            for pair in value
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
    return _as_messages(value, None, unread, "history is no list of {role, content} or of pairs")


def _as_messages(
    value, role: str | None, unread: collections.Counter, otherwise: str = "messages are no list of {role, content}"
) -> list[dict]:
    """A text as one message of `role` (None: a text is none); a list of messages as {role, content, learnt}. Raises
    NoRow, `otherwise` for neither.
    """
    if isinstance(value, Unreadable) or (role and isinstance(value, str | bytes)):
        return [{"role": role, "content": _text(value, "a text")}]
    value = () if value is None else value
    if not isinstance(value, list | tuple) or not all(
        isinstance(message, dict) and {"role", "content"} <= set(message) for message in value
    ):
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
    return (
        [f"columns not read: {', '.join(f'{name} (of {count:,} rows)' for name, count in counts.items())}"]
        if counts
        else []
    )


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
