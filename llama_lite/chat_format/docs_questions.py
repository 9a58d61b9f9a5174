"""Instruction rows derived from the documentation inside the installed packages."""

import ast
import hashlib
import re
from collections.abc import Iterator

from tqdm import tqdm

from ..data.extraction import module_tree
from ..processes import worker_pool
from . import template
from .conversation import Row

EMBEDDED_ROWS = 6000
LONGEST_INPUT, LONGEST_ANSWER, SHORTEST_ANSWER = 500, 320, 25  # characters of an embedded row
MODULE_ROWS = 6  # of each kind that a module gives at most, so that no package fills the set

# links, directives, code, rulers, templates: not plain sentences
MARKUP = re.compile(r"https?://|\.\. |>>>|::|\\|_{2,}|[=\-~]{3,}|\{|\}|TODO|auto_docstring")


# ---- the embedded rows ----


def embedded(modules: list[str], max_rows: int, workers: int) -> list[Row]:
    """At most `max_rows` questions about documented functions and classes, answered in the words of the documentation.

    modules: `package/file` of installed modules, in the corpus's own fixed order. Answers that repeat an earlier one
    (the same first ten words, or the same words) are left out: boilerplate would make the loss look better than the
    model is.
    """
    rows: list[Row] = []
    seen_words: set[str] = set()
    with (
        worker_pool(workers, _nothing) as pool,
        tqdm(total=max_rows, desc="making questions", unit="row", disable=None) as bar,
    ):
        candidates = modules[: 4 * max_rows]
        for module, questions in zip(candidates, pool.map(_module_rows, candidates, chunksize=16), strict=True):
            for number, (instruction, context, answer) in enumerate(questions):
                words = re.findall(r"[a-z]+", answer.lower())
                keys = {" ".join(words), " ".join(words[:10])}
                if keys & seen_words or len(rows) == max_rows:
                    continue
                seen_words |= keys
                rows.append(
                    Row(f"{module}:{number}", module, tuple(template.conversation(instruction, context, answer)))
                )
                bar.update()
            if len(rows) == max_rows:
                pool.shutdown(wait=False, cancel_futures=True)
                break
    return rows


def _nothing() -> None:
    """Workers need no preparation."""


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
        for kind, *row in (
            _questions(f"{module}.{qualified}", isinstance(node, ast.ClassDef), documentation) if documentation else ()
        ):
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
    short, digest = name.split(".")[-1], hashlib.sha256(name.encode()).digest()

    def choose(*choices: str) -> str:
        """One of several wordings."""
        return choices[digest[0] % len(choices)]

    first, _, rest = documentation.partition("\n\n")
    summary, described = _answer(first), _answer(rest, LONGEST_INPUT)
    if summary and described and digest[1] % 2:
        ask = choose(
            f"Summarise what is said about `{short}` in a sentence.", "Summarise this description in a sentence."
        )
        yield "summarise", ask, described, summary
    elif summary:
        kind = "class" if is_class else "function"
        yield (
            "summary",
            choose(f"What does the {kind} `{name}` do?", f"Describe `{name}` in a sentence.", f"What is `{name}` for?"),
            "",
            summary,
        )
    for parameter in parsed.params:
        if parameter.arg_name.isidentifier() and (answer := _answer(parameter.description)):
            ask = choose(
                f"What does the argument `{parameter.arg_name}` of `{name}` mean?",
                f"Explain the argument `{parameter.arg_name}` of `{short}`.",
                f"What should I pass as `{parameter.arg_name}` to `{name}`?",
            )
            yield "argument", ask, "", answer
    if parsed.returns and (answer := _answer(parsed.returns.description)):
        yield "returns", choose(f"What does `{name}` return?", f"What do I get back from `{short}`?"), "", answer
    for error in parsed.raises:
        if error.type_name and (answer := _answer(error.description)):
            yield "raises", f"When does `{name}` raise {error.type_name.strip('[`]')}?", "", answer


def _answer(text: str | None, longest: int = LONGEST_ANSWER) -> str | None:
    """The first paragraph of a description as one line that ends in a full stop, or None where it is not usable as an
    answer.
    """
    paragraph = " ".join((text or "").strip().split("\n\n")[0].split())
    paragraph = re.sub(r":[a-z:]+:`~?([^`<]+?)(?: <[^`]*>)?`", r"`\1`", paragraph).replace("``", "`")
    if not SHORTEST_ANSWER <= len(paragraph) <= longest or len(re.findall(r"[A-Za-z]{2,}", paragraph)) < 4:
        return None
    if MARKUP.search(paragraph) or not paragraph[0].isalpha():
        return None
    if paragraph[-1] in ":,;(" or re.match(
        r"\w+ ?\(|(Args|Arguments|Parameters|Returns|Raises|Examples?|Inputs?|class):", paragraph
    ):
        return None
    if re.fullmatch(r"[a-z][a-z-]*", paragraph.split()[0]):
        paragraph = paragraph[0].upper() + paragraph[1:]
    return paragraph + ("" if paragraph[-1] in ".!?" else ".")
