"""Records of an evaluation: what they say of an item."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_lite.evaluation import runner, store
from llama_lite.evaluation.lm import SharedContextLM, run
from llama_lite.evaluation.tasks import definition, registry
from llama_lite.evaluation.tasks.definition import gold_index


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


def samples_of(base, task: definition.EvalTask) -> list[dict]:
    lm = SharedContextLM(AutoModelForCausalLM.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(base))
    items = {name: list(range(len(leaf.eval_docs))) for name, leaf in task.leaves.items()}
    return store.samples_of(task, run(lm, task.leaves, items, 1, False, False))


def test_chance_counts_the_right_options_of_a_task_that_scores_its_answers_itself(base, tmp_path):
    """truthfulqa_mc2: the share of probability on the right options, whose `doc_to_target` says 0 of every item."""
    rows = []
    for question, labels in (("Is it so?", [1, 1, 0, 0]), ("Why?", [0, 0, 1]), ("When?", [1, 1, 1, 0, 0, 0])):
        targets = {"choices": [f"answer {n}" for n in range(len(labels))], "labels": labels}
        rows.append({"question": question, "mc1_targets": targets, "mc2_targets": targets})
    (tmp_path / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (task,) = registry.build(["truthfulqa_mc2"], {"truthfulqa_mc2": str(tmp_path)}, {}, False)
    samples = samples_of(base, task)
    assert task.counts_right_options
    assert [(one["options"], one.get("right", 1), one.get("gold")) for one in samples] == [
        (4, 2, None),
        (3, 1, 2),
        (6, 3, None),
    ]
    assert all(0 < one["metrics"]["acc"] < 1 for one in samples)
    assert runner._chance_level(samples) == pytest.approx((2 / 4 + 1 / 3 + 3 / 6) / 3)


def choices(answer, **config) -> definition.EvalTask:
    items = [{"question": "One, two,", "choices": ["three", "four", "five"], "answer": answer}] * 2
    listed = [{"metric": "acc", **definition.MEAN}]
    options = {"doc_to_text": "question", "doc_to_choice": "choices", "doc_to_target": "answer", "metric_list": listed}
    leaf = definition.make("t", items, "multiple_choice", **options, **config)
    return definition.EvalTask("t", {"t": leaf}, 0)


def test_chance_of_a_list_of_right_options_and_of_what_is_not_known(base):
    several = samples_of(base, task := choices([0, 2]))
    assert task.counts_right_options and several[0]["right"] == 2 and "gold" not in several[0]
    assert runner._chance_level(several) == pytest.approx(2 / 3)
    one = samples_of(base, task := choices(1))
    assert not task.counts_right_options and one[0]["gold"] == 1 and "right" not in one[0]
    assert runner._chance_level(one) == pytest.approx(1 / 3)
    smooth = samples_of(base, choices(1, process_results=lambda item, answers: {"acc": 0.25}))
    assert smooth[0]["right"] is None and runner._chance_level(smooth) is None


def test_only_accuracies_have_a_chance_level():
    record = {"chance": 0.25, "metrics": {name: {"value": 0.5} for name in ("acc", "acc_norm", "exact_match")}}
    assert [(row["metric"], row["chance"]) for row in store.rows_of(record)] == [
        ("acc", 0.25),
        ("acc_norm", 0.25),
        ("exact_match", None),
    ]
