"""Variants ask the same items otherwise: the identity is the task itself, order means what it meant, disturbance spares
the options.
"""

import pytest
import torch
from helpers import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_lite.errors import Refusal
from llama_lite.evaluation import prompt_variants, store
from llama_lite.evaluation.lm import SharedContextLM, run
from llama_lite.evaluation.tasks import definition, registry


@pytest.fixture(scope="module")
def lm(base):
    return SharedContextLM(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(base)
    )


@pytest.fixture(scope="module", params=["embedded_mmlu", "embedded_mmlu_cloze"])
def task(request):
    return registry.build([request.param], {}, {}, False)[0]


def answers(lm, task, count=12, seed=0):
    items = {leaf: list(range(count)) for leaf in task.leaves}
    return store.samples_of(task, run(lm, task.leaves, items, seed, task.chat, False))


def test_the_identity_is_the_task_bit_for_bit(lm, task):
    for shots in (0, 2):
        (asked,) = registry.build([task.name], {}, {"": shots}, False)
        same = prompt_variants.sensitivity(asked, 0, False)[0]
        assert (same.factor, same.n_shot) == ("reference", shots)
        first, second = answers(lm, asked), answers(lm, same)
        assert [(s["nats"], s["meant"], s["metrics"], s["item"], s["prompt"]) for s in first] == [
            (s["nats"], s["meant"], s["metrics"], s["item"], s["prompt"]) for s in second
        ]


def test_a_task_keeps_the_examples_and_the_sampler_that_are_its_own():
    """ARC's come from its training split, by lm-eval's own configuration of few-shot examples."""
    (arc,) = registry.build(
        ["arc_easy"], {"arc_easy": str(ROOT / "tests/compatibility/inputs/arc_easy")}, {"arc_easy": 2}, False
    )
    (leaf,) = arc.leaves.values()
    for found in (prompt_variants.sensitivity(arc, 0, False), prompt_variants.robustness(arc, 0)):
        assert len(found) > 5
        for one in found:
            derived = next(iter(one.leaves.values()))
            assert (
                derived.fewshot_cfg.sampler == leaf.fewshot_cfg.sampler
                and len(list(derived.fewshot_docs())) == len(leaf.fewshot_docs()) > 2
            )


def test_variants_differ_in_one_thing_and_keep_the_items(lm, task):
    found = prompt_variants.sensitivity(task, 0, True)
    names = [one.name for one in found]
    assert len(set(names)) == len(names) and {one.base for one in found} == {task.name}
    factors = [one.factor for one in found]
    assert {"reference", "description", "casing", "option order", "examples", "chat format"} <= set(factors)
    items = [list(next(iter(one.leaves.values())).eval_docs) for one in found]
    assert all(one == items[0] for one in items)
    prompts = {one.name: _prompt(one) for one in found if one.factor not in ("chat format", "examples")}
    changed = [name for name, text in prompts.items() if text == prompts[names[0]]]
    cloze_orders = [name for name in names if "option order" in name] if "cloze" in task.name else []
    assert changed == [names[0], *cloze_orders]  # where options are not in the prompt, their order does not show


def _prompt(one):
    leaf = next(iter(one.leaves.values()))
    return leaf.fewshot_context(leaf.eval_docs[5], 0)


def test_order_changes_nothing_where_options_are_judged_by_their_text(lm):
    (task,) = registry.build(["embedded_mmlu_cloze"], {}, {}, False)
    plain = answers(lm, task)
    for one in [one for one in prompt_variants.robustness(task, 0) if one.factor == "option order"]:
        shuffled = answers(lm, one)
        assert [s["meant"] for s in shuffled] == [s["meant"] for s in plain] and [s["metrics"] for s in shuffled] == [
            s["metrics"] for s in plain
        ]
        assert any(s["nats"] != p["nats"] for s, p in zip(shuffled, plain, strict=True))


def test_a_lettered_answer_means_its_option():
    (task,) = registry.build(["embedded_mmlu"], {}, {}, False)
    for one in [
        one for one in prompt_variants.sensitivity(task, 3, False) if one.factor in ("option order", "enumerators")
    ]:
        leaf = next(iter(one.leaves.values()))
        for item in list(leaf.eval_docs)[:20]:
            lines = leaf.doc_to_text(item).split("\n")[-5:-1]
            shown = [line.split(" ", 1)[1] for line in lines]
            assert shown == [item["choices"][i] for i in leaf.option_order(item)]
            assert leaf.option_order(item)[leaf.doc_to_target(item)] == item["answer"]


def test_a_right_answer_that_is_a_number_is_the_option_with_that_text():
    """As lm-eval takes it, and not the option at that index."""
    items = [{"question": "Two and one?", "choices": ["3", "0", "2", "1"], "answer": answer} for answer in ("3", "1")]
    options = {"doc_to_text": "question", "doc_to_choice": "choices", "doc_to_target": "answer"}
    listed = [{"metric": "acc", **definition.MEAN}]

    def varied(items: list[dict]) -> list:
        leaf = definition.make("t", items, "multiple_choice", **options, metric_list=listed)
        found = prompt_variants.robustness(definition.EvalTask("t", {"t": leaf}, 0), 0)
        return [leaf for one in found for leaf in one.leaves.values()]

    for leaf in varied(items):
        right = [leaf.doc_to_choice(item)[leaf.doc_to_target(item)] for item in leaf.eval_docs]
        assert right == ["3", "1"]
    with pytest.raises(Refusal, match="--tasks t: the right answer '9' of an item is none of its options"):
        varied([{**items[0], "answer": "9"}])


def test_disturbed_questions_are_equal_for_every_model_and_spare_the_options(task):
    first, second = (
        prompt_variants.robustness(task, 5),
        prompt_variants.robustness(registry.build([task.name], {}, {}, False)[0], 5),
    )
    for one, other in zip(first, second, strict=True):
        leaf, again = (next(iter(t.leaves.values())) for t in (one, other))
        item = leaf.eval_docs[7]
        assert leaf.doc_to_text(item) == again.doc_to_text(item) and leaf.doc_to_choice(item) == again.doc_to_choice(
            item
        )
        if one.factor not in ("option order", "labels", "reference") and "cloze" not in task.name:
            assert all(f". {choice}\n" in leaf.doc_to_text(item) for choice in item["choices"])
    assert {one.factor for one in first} >= {
        "swap",
        "keyboard",
        "drop",
        "double",
        "case",
        "spacing",
        "distractor",
        "option order",
    }


def test_instructions_are_paraphrased():
    (task,) = registry.build(["embedded_instructions"], {}, {}, True)
    found = prompt_variants.sensitivity(task, 0, True)
    texts = [next(iter(one.leaves.values())).doc_to_text({"question": "What is `x`?", "answer": "y"}) for one in found]
    assert len(set(texts)) == len(texts) == 1 + len(prompt_variants.PARAPHRASES) and all(one.chat for one in found)


def test_what_cannot_be_varied_is_refused():
    (text,) = registry.build(["embedded_docs"], {}, {}, False)
    with pytest.raises(Refusal, match="embedded_docs is not asked as one question with options"):
        prompt_variants.sensitivity(text, 0, False)


def test_the_blank_before_an_answer_is_scored_with_it(base):
    """Vicuna's `ASSISTANT:` is followed by a blank that belongs to the answer."""
    from llama_lite.chat_format import template

    tokenizer = AutoTokenizer.from_pretrained(base)
    template.set_chat_template(tokenizer)
    lm = SharedContextLM(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval(), tokenizer)
    (task,) = registry.build(["embedded_mmlu_cloze"], {}, {}, True)
    seen = []
    original = lm._loglikelihood_tokens
    lm._loglikelihood_tokens = lambda requests, **how: (seen.extend(requests), original(requests, **how))[1]
    run(lm, task.leaves, {task.name: [0]}, 0, True, False)
    item = task.items(task.name)[0]
    whole = template.encode(
        tokenizer,
        [
            {"role": "user", "content": item["question"] + "\nAnswer:"},
            {"role": "assistant", "content": item["choices"][0]},
        ],
    )
    _, context, continuation = seen[0]
    assert [*context, *continuation] == whole.input_ids[:-1] and continuation == [
        label for label in whole.labels if label != -100
    ][:-1]
