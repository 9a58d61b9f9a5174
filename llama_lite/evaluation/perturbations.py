"""Seeded perturbations of a question's text, for robustness: a seed, item and strength give every model the same text.

A word is the text between whitespace, without the quotes, parentheses and sentence marks around it. It can be edited if
it has four or more Latin letters in lower, upper or title case. Words with a digit, apostrophe, hyphen, underscore, dot
or inner capital are not edited, nor is text in backticks, a call with its arguments, or a label such as "Question:" at
the start of a line. Line breaks stay. A program without backticks is treated as prose. Callers must not pass answer
options.
"""

import hashlib
import random
import re

OPERATIONS = ("swap", "keyboard", "drop", "double", "case", "spacing", "distractor")

SHORTEST_WORD = (
    4  # letters; below, most edits give another word, and `us` and `US`, or the names of variables, are not one word
)

DISTRACTORS = (  # true anywhere and at any time, without numbers, and no help with any question
    "Many umbrellas can be folded.",
    "Some people drink tea in the morning.",
    "A door can be opened and closed.",
    "Most bicycles have a saddle.",
    "Libraries lend books to their readers.",
    "Pillows are softer than bricks.",
    "Some shops are closed on Sundays.",
    "A chair can stand next to a table.",
    "Letters are often put into envelopes.",
    "Children sometimes play in parks.",
    "Many coats have buttons.",
    "Gardens are often watered in summer.",
)


# Where the keys of a QWERTY keyboard lie, in widths of a key: neighbours are at most one apart in both directions.
ROWS = (("qwertyuiop", 0), ("asdfghjkl", 0.25), ("zxcvbnm", 0.75))
KEYS = {key: (column + shift, row) for row, (keys, shift) in enumerate(ROWS) for column, key in enumerate(keys)}

NEAR = {
    a: "".join(b for b, (u, v) in KEYS.items() if b != a and abs(x - u) <= 1 and abs(y - v) <= 1)
    for a, (x, y) in KEYS.items()
}

NEAR |= {key.upper(): near.upper() for key, near in NEAR.items()}


FENCED = r"```[\s\S]*?(?:```|\Z)"
QUOTED = r"(?P<ticks>`{1,2})[^`\n]+(?P=ticks)"
CALL = r"(?<![^\s(])[^\s()]+\((?:[^()\n]|\([^()\n]*\))*\)"
LABEL = r"^[ \t]*(?:#+ *)?[A-Z][A-Za-z0-9]*(?: [A-Za-z0-9]+)?:(?!\S)"

# Letters are listed (ASCII, Latin-1, Latin Extended-A), since what counts as one in Unicode grows with Python's
# version.
LETTERS = r"A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u017f"
WORD = rf"(?<!\S)[\"'(\u201c\u2018]*(?P<word>[{LETTERS}]+)[.,;:!?\"')\u2026\u201d\u2019]*(?!\S)"
TOKEN = re.compile("|".join((FENCED, QUOTED, CALL, LABEL, WORD)), re.MULTILINE)
FRAME = re.compile(rf"(\s*(?:{LABEL}\s*)?)(.*?)(\s*(?:{LABEL}\s*)?)", re.MULTILINE | re.DOTALL)
SENTENCE_END = re.compile(r"[.?!][\"')\u201d\u2019]*$")


def perturb(text: str, operation: str, strength: float, seed: int, key: str) -> str:
    """The text after `edits`. key: identifies the item, e.g. its hash. Strength 0 returns the text unchanged. Raises
    ValueError as `edits`.
    """
    pieces, position = [], 0
    for start, end, new in edits(text, operation, strength, seed, key):
        pieces += [text[position:start], new]
        position = end
    return "".join(pieces) + text[position:]


def edits(text: str, operation: str, strength: float, seed: int, key: str) -> list[tuple[int, int, str]]:
    """The edits of `perturb`: (start, end, new) for each text[start:end] that becomes `new`, in order, without overlap.

    strength: the fraction of editable words that get one edit each, 0 to 1 (rounded to whole words, at least one above
    0); for `distractor` the number of sentences. The random draws do not depend on it, so a lower strength has a subset
    of the edits of a higher one. Raises ValueError for an unknown operation or a strength out of its range.
    """
    if operation not in OPERATIONS:
        raise ValueError(f"operation {operation!r} is not one of {', '.join(OPERATIONS)}")
    if operation == "distractor" and strength not in range(len(DISTRACTORS) + 1):
        raise ValueError(f"strength {strength} of distractor is not a whole number from 0 to {len(DISTRACTORS)}")
    if operation != "distractor" and not 0 <= strength <= 1:
        raise ValueError(f"strength {strength} of {operation} is not between 0 and 1")
    # `random()` of an integer seed is the one sequence that Python promises to keep.
    draw = random.Random(int.from_bytes(hashlib.sha256(f"{seed}|{operation}|{key}".encode()).digest(), "big")).random
    if operation == "distractor":
        return sorted(_distractor_edits(text, draw)[: int(strength)], key=lambda edit: edit[0])
    spans = _editable_spans(text, operation)
    draws = [(draw(), draw()) for _ in spans]  # (priority of the word, which edit)
    count = max(1, round(strength * len(spans))) if strength > 0 else 0
    chosen = set(sorted(range(len(spans)), key=draws.__getitem__)[:count])
    return [
        (start, end, forms[int(draws[i][1] * len(forms))]) for i, (start, end, forms) in enumerate(spans) if i in chosen
    ]


def _editable_spans(text: str, operation: str) -> list[tuple[int, int, list[str]]]:
    """(start, end, possible replacements) of each word that the operation can edit; for `spacing` with the space before
    it.
    """
    spans, last_end = [], len(text)
    for match in TOKEN.finditer(text):
        if not (word := match["word"]):
            continue
        start = match.start("word")
        # one blank, after another plain word
        leading_space = " " if operation == "spacing" and text[last_end:start] == " " else ""
        last_end = match.end()
        if (
            len(word) >= SHORTEST_WORD
            and word in (word.lower(), word.upper(), word.title())
            and (forms := _edited_forms(operation, word, leading_space))
        ):
            spans.append((start - len(leading_space), start + len(word), forms))
    return spans


def _edited_forms(operation: str, word: str, gap: str) -> list[str]:
    """Every result of one edit of a word that keeps its first letter. For spacing, doubled, dropped and inserted spaces
    are equally many.
    """
    inner = range(1, len(word))
    if operation == "swap":
        return [word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in inner[:-1] if word[i] != word[i + 1]]
    if operation == "keyboard":
        return [word[:i] + near + word[i + 1 :] for i in inner for near in NEAR.get(word[i], "")]
    if operation == "drop":
        return [word[:i] + word[i + 1 :] for i in inner]
    if operation == "double":
        return [word[: i + 1] + word[i:] for i in inner]
    if operation == "case":
        return [form for form in (word.upper(), word.lower(), word.title()) if form != word]
    inside = [gap + word[:i] + " " + word[i:] for i in inner]
    return inside + ["  " + word, word] * len(inside) if gap else inside


def _distractor_edits(text: str, draw) -> list[tuple[int, int, str]]:
    """Every distractor as an insertion, in the order in which they are used. Empty if there is no question between the
    labels.

    A distractor before the question comes after its label, on its own line where the question begins with code, a list
    or a quotation. One after the question comes before a final label such as "Answer:", and only where the question
    ends as a sentence does: a text to be continued must stay last.
    """
    prefix, body, _ = FRAME.fullmatch(text).groups()
    before = (len(prefix), len(prefix), "{}\n" if body.startswith(tuple("`#-*>|")) else "{} ")
    after = (len(prefix + body), len(prefix + body), " {}") if SENTENCE_END.search(body) else before
    draws = sorted((draw(), draw() < 0.5, sentence) for sentence in DISTRACTORS)
    sides = [(before if first else after, sentence) for _, first, sentence in draws if body]
    return [(start, end, form.format(sentence)) for (start, end, form), sentence in sides]
