"""Instruction rows: where they come from, which are kept, which are held out, and which messages are trained on.

Three schemas: alpaca (instruction, input, output), messages, prompt/completion (or PAIRS). A system prompt and a
history are context; weight 0 and train false exclude a row or a message from training. The embedded default asks about
the documentation inside the installed packages, in the words of its authors. Nothing is dropped silently: rows that
cannot be used and columns that are not read are counted and named.
"""

import collections
import hashlib
from collections.abc import Iterator

from ..data.cutting import parts
from ..data.encodings import utf8_text
from ..data.formats import Skipped, Unreadable, skipped_lines
from ..data.row_formats import rows
from ..data.sources import inventory, resolve
from ..data.text_source import ReadOptions
from ..distributed import print_main
from ..errors import Refusal
from . import template
from .conversation import NoRow, Row
from .docs_questions import EMBEDDED_ROWS, embedded

# what `prompt` and `completion` are called elsewhere
PAIRS = (("prompt", "response"), ("question", "answer"), ("question", "response"))
SCHEMAS = (("messages",), ("prompt", "completion"), ("instruction", "output"), *PAIRS)  # alpaca's `input` may be absent
OPTIONAL_COLUMNS = {
    SCHEMAS[0]: (),
    **dict.fromkeys((SCHEMAS[1], *PAIRS), ("history",)),
    SCHEMAS[2]: ("input", "history"),
}
COMMON_COLUMNS = ("system", "weight", "train")
MESSAGE_KEYS = ("role", "content", "weight", "train")
ROLES = ("system", "user", "assistant")
EMPTY = (None, "", [], {})


# ---- reading ----


def load(
    dataset: str,
    config: str | None,
    split: str,
    revision: str | None,
    max_rows: int | None,
    workers: int,
    skip_held_out: bool = False,
    test_rows: int = 0,
) -> tuple[list[Row], dict, dict]:
    """(rows, record of their source, {reason: skipped rows}). Raises Refusal for another schema, and where no row can
    be read.

    config, split, revision: as for `data.sources.resolve`. max_rows: rows that are read (None: all). workers: processes
    that read installed-docs. skip_held_out: leave out the modules of installed-docs that the embedded evaluation tasks
    use. test_rows: rows of those read that are set aside, as `held_documents` chooses them. The record's
    `columns_not_read` counts the rows with a value in each column that has no meaning here; it has `max_rows` where
    that limit was reached.
    """
    skipped, unread = Skipped(), collections.Counter()
    source = resolve(dataset, config, split, revision, options=ReadOptions(only_rows=True))
    if source.kind == "installed-docs":
        modules = [file.name for file in source.files]
        if skip_held_out:
            from ..data.held_out import held_out_documents

            held_out = {document["document"] for document in held_out_documents()}
            modules = [module for module in modules if module not in held_out]
        max_rows = max_rows or EMBEDDED_ROWS
        loaded = embedded(modules, max_rows, workers)
        record = source.record | _limit_reached(loaded, max_rows)
        return _set_aside(loaded, test_rows, skipped), record, skipped.reasons
    limit = f"; of these the first {max_rows:,} rows (--max_rows)" if max_rows else ""
    print_main(f"rows      {inventory(source)}{limit}")
    if source.kind == "installed-files":
        raise Refusal(
            "--dataset installed-files holds no conversations. Use installed-docs, which makes questions from the"
            " documentation."
        )
    loaded = []
    for name, record, first in _records(source):
        if max_rows and len(loaded) == max_rows:
            break
        schema = _schema(record)
        if schema is None and first:
            raise Refusal(
                f"{name} has the columns {', '.join(sorted(record)) or 'none'}. Rows are needed with `instruction`,"
                " `output` (and `input`), or `messages`, or `prompt` and `completion`, or `question` and `answer`."
            )
        try:
            loaded.append(_row(name, record, schema, unread))
        except NoRow as reason:
            skipped.add(str(reason), name)
    if not loaded:
        why = "; ".join(skipped_lines(skipped.reasons)) or "it holds no rows"
        raise Refusal(f"--dataset {dataset}: no row is a conversation to learn from: {why}.")
    columns = {"columns_not_read": dict(unread.most_common())} if unread else {}
    record = source.record | columns | _limit_reached(loaded, max_rows)
    return _set_aside(loaded, test_rows, skipped), record, skipped.reasons


def _set_aside(rows: list[Row], test_rows: int, skipped: Skipped) -> list[Row]:
    """Rows without at least `test_rows` rows of whole documents, which are counted as skipped. Raises Refusal where no
    row is left.
    """
    documents = held_documents(rows, test_rows)
    kept = [row for row in rows if row.document not in documents]
    if not kept:
        raise Refusal(
            f"--test_rows {test_rows:,} sets all {len(rows):,} rows aside (by whole documents): lower it, or add rows."
        )
    for row in rows:
        if row.document in documents:
            skipped.add("set aside for a test (--test_rows)", row.document)
    return kept


def _limit_reached(rows: list[Row], max_rows: int | None) -> dict:
    """{max_rows} for the record of a source where so many rows were read."""
    return {"max_rows": max_rows} if len(rows) == max_rows else {}


def _records(source) -> Iterator[tuple[str, dict, bool]]:
    """(name, record, whether it is the first of its file) of all rows."""
    for file in source.files:
        first = True
        for part in parts(file):
            for number, record in rows(part):
                yield f"{part.name}:{number}", record, first
                first = False


def _schema(record: dict) -> tuple[str, ...] | None:
    """The first schema whose columns all have a value, else the first whose columns exist."""
    present = [schema for schema in SCHEMAS if all(column in record for column in schema)]
    return next(
        (schema for schema in present if all(record[column] is not None for column in schema)),
        present[0] if present else None,
    )


def _row(name: str, record: dict, schema: tuple[str, ...] | None, unread: collections.Counter) -> Row:
    """The Row of a record. Counts in `unread` its columns that hold something without a meaning here. Raises NoRow."""
    if schema is None:
        raise NoRow("columns of no schema")
    if not _is_trained(record, "the row's", unread):
        raise NoRow("weight 0 or train false")
    for column, value in record.items():
        if column not in (*schema, *OPTIONAL_COLUMNS[schema], *COMMON_COLUMNS) and not _is_empty(value):
            unread[column] += 1
    has_history = "history" in OPTIONAL_COLUMNS[schema] and not _is_empty(record.get("history"))
    context = _history(record["history"], unread) if has_history else []
    messages, prompt_length = _own_messages(record, schema, unread)
    question = next((message["content"] for message in messages if message["role"] == "user"), "")
    begins_with_system = bool(messages) and messages[0]["role"] == "system"
    system = _text(record.get("system"), "system")
    if system.strip() and begins_with_system:
        unread["system"] += 1  # the conversation has its own
    elif system.strip():
        context = [{"role": "system", "content": system}, *context]
    elif context and begins_with_system:
        context, messages, prompt_length = [messages[0], *context], messages[1:], max(0, prompt_length - 1)
    messages = [*context, *messages]
    untrained = tuple(
        index
        for index, message in enumerate(messages)
        if message.pop("trained", True) is False and message["role"] == "assistant"
    )
    _check_turns(messages)
    learn_from = len(context) + prompt_length
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if all(index < learn_from or index in untrained for index in answers):
        raise NoRow("weight 0 or train false")
    return Row(name, " ".join(question.lower().split()), tuple(messages), learn_from, untrained)


def _own_messages(record: dict, schema: tuple[str, ...], unread: collections.Counter) -> tuple[list[dict], int]:
    """(the messages of a record without its system prompt and history, how many of them are its prompt). Raises
    NoRow.
    """
    if schema == SCHEMAS[2]:
        texts = (_text(record.get(column), column) for column in ("instruction", "input", "output"))
        return template.conversation(*texts), 0
    if len(schema) == 2:
        asked, answered = schema
        prompt = _as_messages(record[asked], "user", unread)
        return [*prompt, *_as_messages(record[answered], "assistant", unread)], len(prompt)
    return _as_messages(record["messages"], None, unread), 0


def _check_turns(messages: list[dict]) -> None:
    """Raise NoRow unless user and assistant alternate, after at most one system message, and no message is empty."""
    turns = [message["role"] for message in messages if message["role"] != "system"]
    if unknown := next((role for role in turns if role not in ROLES), None):
        raise NoRow(f"a turn with the role {unknown!r}")
    if (
        turns != ["user", "assistant"] * (len(turns) // 2)
        or not turns
        or any(message["role"] == "system" for message in messages[1:])
    ):
        raise NoRow("turns do not alternate between user and assistant, ending with the assistant")
    if any(not message["content"].strip() for message in messages if message["role"] != "assistant"):
        raise NoRow("empty question")
    if any(not message["content"].strip() for message in messages if message["role"] == "assistant"):
        raise NoRow("empty answer")


def _is_empty(value) -> bool:
    return value in EMPTY or value != value  # NaN


def _is_trained(fields: dict, whose: str, unread: collections.Counter) -> bool:
    """Whether a row or a message is trained on, by `weight` (0 or 1, as OpenAI's) and `train` (false or true); other
    values are counted in `unread`.
    """
    trained = True
    for name, meanings in (("weight", {0: False, 1: True}), ("train", {False: False, True: True})):
        value = fields.get(name)
        # of a CSV file
        value = (
            {"0": 0, "1": 1, "false": False, "true": True}.get(value.lower(), value)
            if isinstance(value, str)
            else value
        )
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
    return _as_messages(value, None, unread, "history is not a list of {role, content} or of pairs")


def _as_messages(
    value, role: str | None, unread: collections.Counter, otherwise: str = "messages are not a list of {role, content}"
) -> list[dict]:
    """A text as one message of `role` (None: a text is not allowed); a list of messages as {role, content, trained}.
    Raises NoRow, with the message `otherwise` for neither.
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
        for column in (column for column in message if column not in MESSAGE_KEYS and not _is_empty(message[column])):
            unread[f"{column} of messages"] += 1
        found.append(
            {
                "role": _text(message["role"], "role"),
                "content": _text(message["content"], "content"),
                "trained": _is_trained(message, "a message's", unread),
            }
        )
    return found


def _text(value, name: str) -> str:
    """A text of a row: "" for None, the joined texts of a list of content parts. name: of the field. Raises NoRow."""
    if value is None:
        return ""
    if isinstance(value, list) and value and all(isinstance(part, dict) and "type" in part for part in value):
        if part_type := next((part["type"] for part in value if part["type"] != "text"), None):
            raise NoRow(f"{name} with a part of the type {part_type!r}")
        return "".join(_text(part.get("text"), name) for part in value)
    if isinstance(value, Unreadable):
        raise NoRow(str(value))
    if not isinstance(value, str | bytes):
        raise NoRow(f"{name} is {type(value).__name__} instead of text")
    text = utf8_text(value)
    if text is None:
        raise NoRow("not UTF-8")
    return text


def unread_lines(source: dict) -> list[str]:
    """The line that reports `columns_not_read` of a source's record, if there are any."""
    counts = source.get("columns_not_read")
    return (
        [f"columns not read: {', '.join(f'{name} (of {count:,} rows)' for name, count in counts.items())}"]
        if counts
        else []
    )


def held_documents(found: list[Row], count: int) -> set[str]:
    """Documents that are held out completely: in the order of a hash of their name, until they have `count` rows."""
    documents: dict[str, int] = {}
    for row in found:
        documents[row.document] = documents.get(row.document, 0) + 1
    held_out, total = set(), 0
    for document in sorted(documents, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if total >= count:
            break
        held_out.add(document)
        total += documents[document]
    return held_out
