"""Metrics from values per item: perplexities are exponentials, and what has no value per item is not called a mean."""

import math

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_lite.evaluation import analysis, estimates, statistics, store
from llama_lite.evaluation.lm import SharedContextLM, run
from llama_lite.evaluation.tasks import definition

ITEMS = [{"question": f"The number {n} is", "choices": ["even", "odd"], "answer": n % 2} for n in range(8)]


def asked(base, kind: str, metrics: list[tuple], **config) -> tuple[dict, list[dict]]:
    """(lm-eval's own numbers, our samples) of a task of 8 items. metrics: (name, aggregation)."""
    listed = [{"metric": name, "aggregation": made, "higher_is_better": True} for name, made in metrics]
    task = definition.make("t", ITEMS, kind, doc_to_text="question", metric_list=listed, **config)
    lm = SharedContextLM(AutoModelForCausalLM.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(base))
    results = run(lm, {"t": task}, {"t": list(range(8))}, 1, False, False)
    return results["results"]["t"], store.samples_of(definition.EvalTask("t", {"t": task}, 0), results)


def test_a_perplexity_is_the_exponential_of_a_mean_with_its_interval(base):
    ending = {"doc_to_target": lambda item: item["choices"][item["answer"]]}
    theirs, samples = asked(base, "loglikelihood", [("perplexity", "perplexity"), ("acc", "mean")], **ending)
    found = store.metrics_of(samples)
    assert found["perplexity"]["value"] == pytest.approx(theirs["perplexity,none"]) and found["acc"]["value"] == 0
    nats = statistics.ratio([-sample["metrics"]["perplexity"] for sample in samples])
    for bound in ("value", "low", "high"):
        assert found["perplexity"][bound] == pytest.approx(math.exp(nats[bound]))
    assert found["perplexity"]["stderr"] == pytest.approx(math.exp(nats["value"]) * nats["stderr"])
    better = [
        {**one, "metrics": {"perplexity": one["metrics"]["perplexity"] + 0.5 + number / 99, "acc": 0}}
        for number, one in enumerate(samples)
    ]
    records = [
        {"task": "t", "variant": "", "factor": "", "model": name, "key": name, "metrics": store.metrics_of(of_model)}
        for name, of_model in (("a", samples), ("b", better))
    ]
    row = analysis.pair(samples, better, "perplexity", ("a", "b"))
    values = [record["metrics"]["perplexity"]["value"] for record in records]
    assert row["difference"] == pytest.approx(values[1] - values[0]) and values[1] < values[0]
    assert row["low"] < row["difference"] < row["high"] < 0 and row["p"] < 0.05
    assert [pair["metric"] for pair in analysis.compare(records, {"a": samples, "b": better}.get)] == ["acc"]


def test_a_difference_of_perplexities_is_judged_by_their_logarithms():
    rng = np.random.default_rng(0)
    first = rng.normal(-2, 1, 200)  # models differ by far less than items
    second = first + rng.normal(0.1, 0.1, 200)
    values = [math.exp(-nats.mean()) for nats in (first, second)]
    nats = statistics.difference(-first, -second)
    for metric, one, other in (
        ("perplexity", first.tolist(), second.tolist()),
        ("word_perplexity", [(nats * 3, 3) for nats in first], [(nats * 3, 3) for nats in second]),
    ):
        found = estimates.difference(metric, one, other, [None] * 200, ["t"] * 200)
        assert found["value"] == pytest.approx(values[1] - values[0]) and found["p"] == pytest.approx(nats["p"])
        assert found["stderr"] == pytest.approx(values[1] * nats["stderr"])
        for bound in ("low", "high"):
            assert found[bound] == pytest.approx(values[0] * (math.exp(nats[bound]) - 1))


def test_texts_have_the_perplexities_of_lm_eval(base):
    names = ("word_perplexity", "byte_perplexity", "bits_per_byte")
    metrics = [(name, "bits_per_byte" if name == "bits_per_byte" else "weighted_perplexity") for name in names]
    theirs, samples = asked(base, "loglikelihood_rolling", metrics, doc_to_target="question")
    found = store.metrics_of(samples)
    assert {name: found[name]["value"] for name in names} == pytest.approx(
        {name: theirs[f"{name},none"] for name in names}
    )
    assert all(found[name]["low"] < found[name]["value"] < found[name]["high"] for name in names)


@pytest.mark.parametrize("name, made", [("f1", "f1"), ("mcc", "matthews_corrcoef"), ("acc_norm", "median")])
def test_a_metric_of_all_items_together_is_kept_apart(base, name, made):
    options = {"doc_to_choice": "choices", "doc_to_target": "answer"}
    _, samples = asked(base, "multiple_choice", [("acc", "mean"), (name, made)], **options)
    right = [sample["metrics"]["acc"] for sample in samples]
    assert 0 < sum(right) < 8  # so that the median is no mean
    assert list(store.metrics_of(samples)) == ["acc"]
    assert all(list(sample["pooled"]) == [name] for sample in samples)


def test_a_metric_without_a_number_for_an_item_is_kept_apart():
    rows = [{"metrics": ["acc", "r"], "filter": "none", "acc": 1.0, "r": value} for value in (0.5, float("nan"))]
    results = {"samples": {"t": rows}, "results": {"t": {"acc,none": 1.0, "r,none": 0.5}}}
    assert estimates.pooled(results) == {"r"}
