"""The text of HTML, mails, notebooks, and of the files of installed packages."""

import ast
import gc
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

from datatrove.data import Document

from .formats import Skipped
from .installed import package_root

LARGEST_FILE = 2_000_000  # bytes of an installed file that is read as text


def html_text(html: str) -> str | None:
    """The main text of a page, by trafilatura, without its deduplication across pages, so that a page always gives the
    same text.
    """
    from datatrove.pipeline.extractors import Trafilatura

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Trafilatura(favour_precision=False, deduplicate=False, favor_recall=True).extract(html)


def mail_text(raw: bytes) -> str | None:
    """Subject and text of a mail, without attachments. None where Python's parser fails on its headers or character
    set.
    """
    import email
    import email.policy

    try:
        message = email.message_from_bytes(raw, policy=email.policy.default)
        body = message.get_body(("plain", "html"))
        text = body.get_content() if body else ""
        text = (html_text(text) or "") if body and body.get_content_subtype() == "html" else text
        return f"{message['subject'] or ''}\n\n{text}".strip()
    except (LookupError, ValueError, AttributeError, TypeError):
        return None


def notebook_text(raw: str) -> str:
    """The cells of a Jupyter notebook, in order, without their output; the text as it is where it is not a notebook."""
    try:
        cells = json.loads(raw)["cells"]
        return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] in ("markdown", "code"))
    except (ValueError, KeyError, TypeError):
        return raw


def docstrings(name: str) -> Iterator[Document]:
    """The docstrings of one installed module, as written by its authors, without indentation; outer ones first."""
    level = [tree] if (tree := module_tree(name, ('"""', "'''"))) else []
    while level:
        for node in level:
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
                text := ast.get_docstring(node)
            ):
                yield Document(text=text, id=f"{name}:{getattr(node, 'lineno', 1)}")
        level = [inner for node in level for inner in _inner_statements(node)]


def _inner_statements(node: ast.AST) -> Iterator[ast.AST]:
    """The statements directly inside a statement; `ast.walk` would visit every expression too, and take as long as
    parsing.
    """
    for field in ("body", "handlers", "orelse", "finalbody", "cases"):
        inner = getattr(node, field, None)
        if isinstance(inner, list):
            yield from inner


def module_tree(name: str, quotes: tuple[str, ...]) -> ast.Module | None:
    """The syntax tree of an installed file `package/file`. None where it contains none of `quotes`, or cannot be parsed
    (templates, files that are broken on purpose).

    Disables the garbage collector meanwhile, which would spend half of the time on millions of new nodes.
    """
    package, _, inner = name.partition("/")
    collecting = gc.isenabled()
    gc.disable()
    try:
        text = Path(package_root(package), inner).read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text) if any(quote in text for quote in quotes) else None
    except (SyntaxError, ValueError, RecursionError):
        return None
    finally:
        if collecting:
            gc.enable()


def installed_file(name: str, skipped: Skipped) -> Iterator[Document]:
    """An installed file as it is, where it is text: code, licenses, change logs, test data."""
    package, _, inner = name.partition("/")
    path = Path(package_root(package), inner)
    raw = path.read_bytes() if path.stat().st_size <= LARGEST_FILE else b"\0"
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text or not text.strip():
        skipped.add("no text, or too large", name)
    else:
        yield Document(text=text, id=f"{name}:1")
