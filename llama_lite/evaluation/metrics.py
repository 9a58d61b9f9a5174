"""Metrics that lm-eval's tasks take from `evaluate`, which would fetch their code from the Hub and run it: local
equals, or a refusal by name.

The `evaluate` package brings no metric of its own. Those here are computed by the packages that the Hub's metrics call
themselves.
"""

import ast
import functools
import inspect

import numpy as np

from ..errors import Refusal


def _accuracy(predictions, references, normalize=True, sample_weight=None):
    from sklearn.metrics import accuracy_score

    return {
        "accuracy": float(accuracy_score(references, predictions, normalize=normalize, sample_weight=sample_weight))
    }


def _f1(predictions, references, labels=None, pos_label=1, average="binary", sample_weight=None):
    from sklearn.metrics import f1_score

    score = f1_score(
        references, predictions, labels=labels, pos_label=pos_label, average=average, sample_weight=sample_weight
    )
    return {"f1": float(score) if np.size(score) == 1 else score}


def _rouge(
    predictions,
    references,
    rouge_types=("rouge1", "rouge2", "rougeL", "rougeLsum"),
    use_aggregator=True,
    use_stemmer=False,
    tokenizer=None,
):
    from rouge_score import rouge_scorer, scoring

    scorer = rouge_scorer.RougeScorer(rouge_types=list(rouge_types), use_stemmer=use_stemmer, tokenizer=tokenizer)
    found = [
        (
            scorer.score_multi(reference, prediction)
            if isinstance(reference, list)
            else scorer.score(reference, prediction)
        )
        for reference, prediction in zip(references, predictions, strict=True)
    ]
    if not use_aggregator:
        return {name: [score[name].fmeasure for score in found] for name in found[0]}
    aggregator = scoring.BootstrapAggregator()
    for score in found:
        aggregator.add_scores(score)
    return {name: score.mid.fmeasure for name, score in aggregator.aggregate().items()}


LOCAL = {"accuracy": _accuracy, "f1": _f1, "rouge": _rouge}

refused: list[str] = []  # metrics that were asked for since `local_metrics` and are not here


class Metric:
    """A metric as `evaluate.load` returns it, as far as lm-eval's tasks use it."""

    def __init__(self, name: str):
        self.name = name

    def compute(self, *, predictions, references, **how):
        return LOCAL[self.name](predictions, references, **how)


def load(name, *args, **kwargs) -> Metric:
    """In the place of `evaluate.load`. Raises Refusal for a metric that is not here."""
    if name not in LOCAL:
        refused.append(str(name))
        raise Refusal(_why([str(name)]))
    return Metric(name)


def local_metrics() -> None:
    """Let every `evaluate.load` of this process be this module's, from now on; `refused` begins anew."""
    import evaluate

    evaluate.load = evaluate.loading.load = load
    refused.clear()


def check(name: str, leaves: dict) -> None:
    """Raise Refusal where the tasks of a name need a metric, or code of a model, that would be fetched from the Hub and
    run.
    """
    wanted = {*refused, *(metric for task in leaves.values() for metric in _wanted(task))}
    if other := sorted(wanted - LOCAL.keys()):
        raise Refusal(f"--tasks {name}: {_why(other)}")


def _why(names: list[str]) -> str:
    return (
        f"the code of its metric {', '.join(names)} would be fetched from the Hub and run, which is never done here."
        f" Metrics that are here: {', '.join(LOCAL)}, and lm-eval's own."
    )


def _wanted(task) -> set[str]:
    """Names of the metrics that a task's config takes from `evaluate`, and that the functions it uses load."""
    from lm_eval.api import registry

    config = getattr(task, "config", None)
    listed = getattr(config, "metric_list", None) or []
    found = {
        m["metric"]
        for m in listed
        if isinstance(m.get("metric"), str) and (m.get("hf_evaluate") or m["metric"] not in registry.metric_registry)
    }
    functions = [value for value in vars(config).values() if inspect.isfunction(value)] if config else []
    functions += [value for m in listed for value in m.values() if inspect.isfunction(value)]
    if not functions or type(task).__module__ != "lm_eval.api.task":
        found |= (
            _loaded(inspect.getsourcefile(type(task)), None)
            if not type(task).__module__.startswith("lm_eval.api")
            else set()
        )
    for function in functions:
        function = inspect.unwrap(function)
        if (file := inspect.getsourcefile(function)) and "lm_eval" in file:
            found |= _loaded(file, function.__name__)
    return found


@functools.cache
def _loaded(file: str, function: str | None) -> frozenset[str]:
    """What a file loads by `evaluate.load` at its top, and in a function and those of the file that it names; in all of
    it for None.
    """
    with open(file, encoding="utf-8") as source:
        tree = ast.parse(source.read())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {
        alias.asname or alias.name
        for node in imports
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name == "evaluate"
    }
    loads = {
        alias.asname or alias.name
        for node in imports
        if isinstance(node, ast.ImportFrom) and node.module == "evaluate"
        for alias in node.names
        if alias.name == "load"
    }
    defined = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    reached, new = set(), set(defined) if function is None else {function} & set(defined)
    while new:
        reached |= new
        named = {node.id for name in new for node in ast.walk(defined[name]) if isinstance(node, ast.Name)}
        new = (named & set(defined)) - reached
    parts = [node for node in tree.body if node not in defined.values()] + [defined[name] for name in reached]
    found = set()
    for node in (node for part in parts for node in ast.walk(part) if isinstance(node, ast.Call)):
        called = node.func
        by_module = (
            isinstance(called, ast.Attribute)
            and called.attr == "load"
            and isinstance(called.value, ast.Name)
            and called.value.id in modules
        )
        if by_module or (isinstance(called, ast.Name) and called.id in loads):
            first = node.args[0] if node.args else None
            found.add(first.value if isinstance(first, ast.Constant) else "of its own")
        if any(
            word.arg == "trust_remote_code" and isinstance(word.value, ast.Constant) and word.value.value is True
            for word in node.keywords
        ):
            found.add("(code of a model or data set: trust_remote_code=True)")
    return frozenset(found)
