"""Records of an evaluation: what they say of an item."""

import pytest

from llama_lite.evaluation.store import gold_index


@pytest.mark.parametrize(
    ("target", "options", "index"),
    [
        (2, ["a", "b", "c"], 2),
        ("c", ["a", "b", "c"], 2),
        ("1", ["a", "b"], 1),
        ("1", ["2", "1"], 1),
        (3, ["a", "b"], None),
        ([0, 1], ["a", "b"], None),
        ("a text of its own", [" ", " "], None),
        (True, ["a", "b"], None),
        (-100, ["a", "b"], None),
    ],
)
def test_the_right_option_is_found_by_its_index_or_its_text(target, options, index):
    assert gold_index(target, options) == index
