"""Perturbed questions: the same text everywhere, no more than what was asked for, and nothing else of the text."""

import argparse
import collections
import itertools
import json
import os
import random
import re
import statistics
import subprocess
import sys
import textwrap

import pytest
from helpers import ROOT

from llama_lite.evaluation import perturbations
from llama_lite.evaluation.perturbations import DISTRACTORS, OPERATIONS, edits, perturb

CHARACTERS = ("swap", "keyboard", "drop", "double")
WORDS = OPERATIONS[:-1]
QUESTION = "Question: Which planet in our Solar System has the largest number of known moons?\nAnswer:"
GOLDEN = {
    ("swap", 0.5): "Question: Wihch planet in our Solra System has the laregst number of known moosn?\nAnswer:",
    ("keyboard", 0.5): "Question: Whkch plamet in our Solzr Systen has the largest number of known moons?\nAnswer:",
    ("drop", 0.5): "Question: Which planet in our Solr System has the larget number of knwn mons?\nAnswer:",
    ("double", 0.5): "Question: Whichh pllanet in our Solar Systemm has the largest number of known moonss?\nAnswer:",
    ("case", 0.5): "Question: Which PLANET in our Solar system has the largest NUMBER of known MOONS?\nAnswer:",
    (
        "spacing",
        1,
    ): "Question: Wh ich pl anet in our  Solar  System has the la rgest num ber of  known mo ons?\nAnswer:",
    ("distractor", 2): (
        "Question: A chair can stand next to a table. Which planet in our Solar System has the largest number of known"
        " moons? Libraries lend books to their readers.\nAnswer:"
    ),
}


def documents() -> list[str]:
    """Docstrings of the standard library: prose with code, quotes, lists and several lines."""
    found = set()
    for module in (argparse, collections, json, os, random, re, statistics, subprocess, textwrap):
        owners = [module, *(member for member in vars(module).values() if isinstance(member, type))]
        found.update(
            member.__doc__
            for owner in owners
            for member in vars(owner).values()
            if isinstance(getattr(member, "__doc__", None), str)
        )
    return sorted(text for text in found if 100 < len(text) < 1500)


TEXTS = documents()
TICKS = re.compile(r"``[^`\n]+``|`[^`\n]+`")


def changed(text: str, found: str) -> list[tuple[str, str]]:
    """(before, after) of the blank-separated pieces that differ."""
    assert len(text.split()) == len(found.split())
    return [(a, b) for a, b in zip(text.split(), found.split(), strict=True) if a != b]


def core(piece: str) -> str:
    """A piece without the punctuation that may stand around a word."""
    return piece.lstrip("\"'(").rstrip(".,;:!?\"')")


def test_the_text_is_the_one_written_here():
    for (operation, strength), expected in GOLDEN.items():
        assert perturb(QUESTION, operation, strength, 7, "item-1") == expected


def test_another_process_with_another_hash_seed_gives_the_same():
    program = (
        "import json, sys; from llama_lite.evaluation.perturbations import perturb; json.dump([perturb(*a) for a in"
        " json.load(sys.stdin)], sys.stdout)"
    )
    asked = [(text, operation, 1, 3, str(i)) for i, text in enumerate(TEXTS[:20]) for operation in OPERATIONS]
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(asked),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "12345"},
    )
    assert json.loads(done.stdout) == [perturb(*a) for a in asked]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_strength_0_is_the_text_itself_and_seed_and_key_matter(operation):
    assert all(perturb(text, operation, 0, 1, "k") == text for text in TEXTS)
    long, strength = max(TEXTS, key=len), 4 if operation == "distractor" else 1
    assert len({perturb(long, operation, strength, seed, key) for seed in (1, 2, 11) for key in ("k", "1k", "l")}) == 9


@pytest.mark.parametrize("operation", WORDS)
def test_exactly_the_share_is_edited(operation):
    assert len(TEXTS) > 100 and sum(bool(edits(text, operation, 1, 0, "")) for text in TEXTS) > 0.95 * len(TEXTS)
    for number, text in enumerate(TEXTS):
        eligible = len(edits(text, operation, 1, 0, str(number)))
        for strength in (0.001, 0.05, 0.1, 0.2, 0.5, 0.9):
            assert len(edits(text, operation, strength, 0, str(number))) == (
                max(1, round(strength * eligible)) if eligible else 0
            )


@pytest.mark.parametrize("operation", WORDS)
def test_the_words_that_can_be_edited(operation):
    text = (
        'The "largest" city (of 1200 towns) is well-known: `some code`, x_name, a.name, max(some, values), don\'t,'
        " myName, Paris; see\nNote: CAPITAL words."
    )
    spans = [text[start:end].strip() for start, end, _ in edits(text, operation, 1, 5, "k")]
    assert spans == ["largest", "city", "towns", "Paris", "CAPITAL", "words"]


@pytest.mark.parametrize("operation", WORDS)
@pytest.mark.parametrize(
    "text",
    [
        "",
        "  \n",
        "It is a big old cat.",
        "1234 a1b2 x_name",
        "`every word here`",
        "Question:\nAnswer:",
        "```\nsome code\n```",
    ],
)
def test_nothing_to_edit_leaves_the_text(operation, text):
    assert perturb(text, operation, 1, 0, "k") == text


@pytest.mark.parametrize("operation", [*CHARACTERS, "case"])
def test_one_edit_a_word_and_nothing_else(operation):
    """The number of changed pieces is the number of edits; each is a plain word; the first letter, blanks and lines
    stay.
    """
    for number, text in enumerate(TEXTS):
        for strength in (0.2, 1):
            found = perturb(text, operation, strength, 0, str(number))
            pairs = changed(text, found)
            assert len(pairs) == len(edits(text, operation, strength, 0, str(number)))
            assert re.findall(r"\s+", found) == re.findall(r"\s+", text)
            assert TICKS.findall(found) == TICKS.findall(text)
            for before, after in pairs:
                assert core(before).isalpha() and len(core(before)) >= 4
                assert core(before)[0].lower() == core(after)[0].lower() and before.replace(
                    core(before), ""
                ) == after.replace(core(after), "")
            if operation != "case":
                assert edit_distance(text, found) <= (2 if operation == "swap" else 1) * len(pairs)


def test_each_operation_does_what_it_says():
    for number, text in enumerate(TEXTS):
        for a, b in changed(text, perturb(text, "swap", 1, 0, str(number))):
            i = next(i for i in range(len(a)) if a[i] != b[i])
            assert (b[i], b[i + 1]) == (a[i + 1], a[i]) and b[i + 2 :] == a[i + 2 :]
        for a, b in changed(text, perturb(text, "keyboard", 1, 0, str(number))):
            [(old, new)] = [(x, y) for x, y in zip(a, b, strict=True) if x != y]
            assert new in perturbations.NEAR[old] and old.isupper() == new.isupper()
        for a, b in changed(text, perturb(text, "drop", 1, 0, str(number))):
            assert b in [a[:i] + a[i + 1 :] for i in range(1, len(a))]
        for a, b in changed(text, perturb(text, "double", 1, 0, str(number))):
            assert a in [b[:i] + b[i + 1 :] for i in range(1, len(b)) if b[i] == b[i - 1]]
        for a, b in changed(text, perturb(text, "case", 1, 0, str(number))):
            assert core(b) in (core(a).upper(), core(a).lower(), core(a).title())


def test_the_keys_near_a_key():
    assert {key: "".join(sorted(perturbations.NEAR[key])) for key in "qgmP"} == {
        "q": "aw",
        "g": "bfhtvy",
        "m": "jkn",
        "P": "LO",
    }
    assert all(key in perturbations.NEAR[near] for key, nears in perturbations.NEAR.items() for near in nears)


def test_all_positions_and_all_forms_come_up():
    assert {perturb("word", "swap", 1, seed, "k") for seed in range(99)} == {"wrod", "wodr"}
    assert {perturb("word", "drop", 1, seed, "k") for seed in range(99)} == {"wrd", "wod", "wor"}
    assert {perturb("word", "double", 1, seed, "k") for seed in range(99)} == {"woord", "worrd", "wordd"}
    assert {perturb("Word", "case", 1, seed, "k") for seed in range(99)} == {"word", "WORD"}
    assert {perturb("a word", "spacing", 1, seed, "k") for seed in range(99)} == {
        "a  word",
        "aword",
        "a w ord",
        "a wo rd",
        "a wor d",
    }
    first = [perturb("some words stand here", "swap", 0.1, seed, "k") for seed in range(99)]
    assert {
        next(i for i, piece in enumerate(text.split()) if piece != "some words stand here".split()[i]) for text in first
    } == {0, 1, 2, 3}


def test_spacing_changes_only_blanks_within_lines():
    kinds = collections.Counter()
    for number, text in enumerate(TEXTS):
        found = perturb(text, "spacing", 1, 0, str(number))
        assert found.replace(" ", "") == text.replace(" ", "")
        assert [len(line) - len(line.lstrip()) for line in found.split("\n")] == [
            len(line) - len(line.lstrip()) for line in text.split("\n")
        ]
        made = edits(text, "spacing", 1, 0, str(number))
        assert edit_distance(text, found) <= len(made)
        kinds.update(
            (text[start:end].count(" "), new.count(" "), "  " in new) for start, end, new in made if text[start] == " "
        )
    assert set(kinds) == {(1, 2, True), (1, 0, False), (1, 2, False)}
    assert all(0.25 < count / kinds.total() < 0.42 for count in kinds.values())  # doubled, dropped, inside


def test_labels_and_code_keep_their_blanks():
    text = "Question: Paris `some code` Paris x_name Paris f(some, code) Paris\nAnswer: Paris"
    for seed in range(50):
        found = perturb(text, "spacing", 1, seed, "k")
        assert all(
            part in found for part in ("Question: P", " `some code` P", " x_name P", " f(some, code) P", "\nAnswer: P")
        )


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_lower_strength_has_a_subset_of_the_edits(operation):
    for number, text in enumerate(TEXTS):
        strengths = (0, 0.05, 0.1, 0.2, 0.5, 1) if operation in WORDS else range(len(DISTRACTORS) + 1)
        series = [edits(text, operation, strength, 9, str(number)) for strength in strengths]
        assert all(set(low) <= set(high) for low, high in itertools.pairwise(series))
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(series[-1]))


def test_distractors_stand_around_a_text_that_is_left_as_it_is():
    sides = collections.Counter()
    for number, text in enumerate(TEXTS):
        for strength in (1, 2, 5):
            found = perturb(text, "distractor", strength, 0, str(number))
            assert sum(found.count(sentence) for sentence in DISTRACTORS) == strength
            pattern = "|".join(rf"{re.escape(sentence)}[ \n]| {re.escape(sentence)}" for sentence in DISTRACTORS)
            assert re.sub(pattern, "", found) == text
        sides[perturb("Who is it?", "distractor", 1, 0, str(number)).startswith("Who")] += 1
    assert 0.3 < sides[True] / sides.total() < 0.7


def test_where_a_distractor_may_stand():
    labelled, open_end, fenced = (
        [perturb(text, "distractor", 1, seed, "k") for seed in range(40)]
        for text in (QUESTION, "The capital is", "```\na\n```")
    )
    assert all(
        text.startswith("Question: ") and text.endswith("\nAnswer:") and QUESTION[10:-8] in text for text in labelled
    )
    assert {text.endswith("moons?\nAnswer:") for text in labelled} == {True, False}
    assert all(text.endswith(". The capital is") for text in open_end)
    assert all(text.endswith(".\n```\na\n```") for text in fenced)
    assert (
        perturb("Question:\nAnswer:", "distractor", 3, 0, "k") == "Question:\nAnswer:"
        and perturb("", "distractor", 3, 0, "k") == ""
    )


@pytest.mark.parametrize(
    "operation, strength, message",
    [
        ("typo", 0.1, "operation 'typo' is not one of swap, keyboard"),
        ("swap", 1.1, "strength 1.1 of swap is not between 0 and 1"),
        ("case", -0.1, "not between 0 and 1"),
        ("drop", float("nan"), "not between 0 and 1"),
        ("distractor", 0.5, "strength 0.5 of distractor is not a whole number from 0 to 12"),
        ("distractor", 13, "not a whole number from 0 to 12"),
    ],
)
def test_a_wrong_request_is_refused(operation, strength, message):
    with pytest.raises(ValueError, match=message):
        perturb("Some text.", operation, strength, 0, "k")


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance in characters: the fewest insertions, deletions and replacements that turn `a` into `b`.

    A column of the table is two integers, of the bits where it rises and where it falls (Myers, "A fast bit-vector
    algorithm for approximate string matching based on dynamic programming", 1999): milliseconds for 2,000 characters.
    """
    if not a:
        return len(b)
    last_seen: dict[str, int] = {}
    for i, letter in enumerate(a):
        last_seen[letter] = last_seen.get(letter, 0) | 1 << i
    all_bits, last = (1 << len(a)) - 1, len(a) - 1
    increases, decreases, distance = all_bits, 0, len(a)
    for letter in b:
        same = last_seen.get(letter, 0)
        diagonal = (((same & increases) + increases) ^ increases) | same
        up, down = decreases | (all_bits & ~(diagonal | increases)), increases & diagonal
        distance += (up >> last) - (down >> last)
        up, down = up << 1 | 1, down << 1
        same |= decreases
        increases, decreases = (down | ~(same | up)) & all_bits, up & same & all_bits
    return distance


def test_the_edit_distance_of_these_tests():
    assert edit_distance("kitten", "sitting") == 3 and edit_distance("", "abc") == edit_distance("abc", "") == 3
