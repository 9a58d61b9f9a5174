"""What is nobody else's business: folders of this machine, tokens of its environment, its user and its name. Found in
what is published, kept out of what is written.

Vocabularies and documents are left alone: in them `root` and `/tmp` are words. In our own records and cards they are
this machine's.
"""

import contextlib
import csv
import functools
import getpass
import json
import os
import re
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TEXTS = (".json", ".jsonl", ".md", ".csv", ".txt", ".jinja", ".yaml", ".yml", ".html")
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json")
DOCUMENTS = ("before.json", "chat_template.jinja")  # answers of a model, and the user's own format
DOCUMENT_KEYS = ("samples", "prompt", "prompts", "sample_prompts", "answer", "text", "shown", "chat_template")
OF_LIBRARIES = (  # records in which a value can be called like a person or a machine: `llama`
    "config.json generation_config.json adapter_config.json tokenizer_config.json special_tokens_map.json"
    " model.safetensors.index.json"
).split()
SECRET_NAME = re.compile(r"(^|_)(TOKEN|KEY|APIKEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_|$)", re.IGNORECASE)
SHORTEST_SECRET, LONG_SECRET = 8, 16  # characters; in vocabularies and documents only long ones are no words
WORDS = set(  # values of our own records, whoever is called so
    "train test validation main default model models data user assistant system linux cpu cuda none auto all final"
    " shuffled sequential llama gpt2 demo tiny paper localhost".split()
)
QUOTED = re.compile(
    r"^(`{3,})(?:text|python)\n.*?^\1$|^\*\*[^\n]*\*\*$|<!-- yours: begin -->.*?<!-- yours: end -->",
    re.MULTILINE | re.DOTALL,
)


@functools.lru_cache(maxsize=8)
def _folders(*given: str | None) -> tuple[tuple[str, str], ...]:
    """(path, what to write instead) of working, home and temporary folder, the longest first."""
    shown = [".", ".", "~", "~", "$TMPDIR"]
    found = {}
    for path, instead in zip(given, shown, strict=True):
        for one in {path, os.path.realpath(path)} if path else ():
            one = one.rstrip("/")
            if one.startswith("/"):  # of `/` itself every path would be one
                found.setdefault(one, instead)
    return tuple(sorted(found.items(), key=lambda item: -len(item[0])))


def folders() -> tuple[tuple[str, str], ...]:
    """As `_folders`, of this process now."""
    return _folders(os.getcwd(), os.environ.get("PWD"), str(Path.home()), os.environ.get("HOME"), tempfile.gettempdir())


def secrets() -> list[str]:
    """Values of the environment's tokens, keys and passwords, and the Hub's token, the longest first."""
    from huggingface_hub import get_token

    found = {value for name, value in os.environ.items() if SECRET_NAME.search(name)} | {get_token() or ""}
    return sorted((value for value in found if len(value) >= SHORTEST_SECRET), key=len, reverse=True)


def names() -> set[str]:
    """The user's and the machine's names, lower case, without those that are words of our records."""
    found = {
        os.environ.get("USER", ""),
        os.environ.get("LOGNAME", ""),
        socket.gethostname(),
        socket.gethostname().split(".")[0],
    }
    with contextlib.suppress(KeyError, OSError):  # a user without a name, as in containers
        found.add(getpass.getuser())
    return {name.lower() for name in found if len(name) > 1} - WORDS


def _path(folder: str) -> re.Pattern:
    """A folder as a path: `/root/x` and `/root`, not `/roots`, `/srv/root` or `root`."""
    return _pattern(re.escape(folder))


@functools.lru_cache(maxsize=64)
def _pattern(folder: str) -> re.Pattern:
    return re.compile(rf"(?<![\w.~-]){folder}(?![\w-]|\.\w)")


def redact(value: Any) -> Any:
    """JSON, or a text, with `.` for the working folder, `~` for home, `$TMPDIR` for the temporary one, and no token."""
    if isinstance(value, dict):
        return {name: redact(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [redact(one) for one in value]
    if not isinstance(value, str):
        return value
    for secret in secrets():
        value = value.replace(secret, "…")
    for folder, instead in folders():
        value = _path(folder).sub(instead, value)
    return value


def found_in(name: str, path: Path) -> str | None:
    """What a file that is to be published under `name` holds of this machine, in words, or None."""
    path, base = Path(path), name.split("/")[-1]
    if path.suffix not in TEXTS:
        return None
    text, documents = path.read_text(encoding="utf-8", errors="replace"), base in VOCABULARIES or base in DOCUMENTS
    if any(secret in text for secret in secrets() if not documents or len(secret) >= LONG_SECRET):
        return "a token of this machine's environment"
    if documents:
        return None
    known = names() if base not in OF_LIBRARIES else set()
    for where, value in _values(base, text):
        for folder, _ in folders():
            if _path(folder).search(value):
                return f"a path of this machine{f' ({where})' if where else ''}"
        if where and value.lower() in known:
            return f"the name of this machine or its user ({where})"
    return None


def _values(base: str, text: str) -> Iterator[tuple[str, str]]:
    """(where, value) of a text's records; of a text that is none, ("", what of it is no quotation)."""
    if base.endswith(".json"):
        try:
            yield from _leaves(json.loads(text), "")
            return
        except ValueError:
            pass
    if base.endswith(".csv"):
        for line in csv.DictReader(text.splitlines()):
            yield from ((f"column {column}", value) for column, value in line.items() if isinstance(value, str))
        return
    yield "", QUOTED.sub("", text)


def _leaves(value, where: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for name, one in value.items():
            yield "", name
            if name not in DOCUMENT_KEYS:
                yield from _leaves(one, f"{where}.{name}".lstrip("."))
    elif isinstance(value, list):
        for one in value:
            yield from _leaves(one, where or "list")
    elif isinstance(value, str):
        yield where or "value", value
