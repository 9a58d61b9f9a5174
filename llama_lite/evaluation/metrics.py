"""Local metrics for lm-eval's tasks in place of those that `evaluate` would download as code and run; others are
refused by name.

The `evaluate` package contains no metrics. Those here call the same packages as the Hub's metrics.
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
    scores = [
        (
            scorer.score_multi(reference, prediction)
            if isinstance(reference, list)
            else scorer.score(reference, prediction)
        )
        for reference, prediction in zip(references, predictions, strict=True)
    ]
    if not use_aggregator:
        return {name: [score[name].fmeasure for score in scores] for name in scores[0]}
    aggregator = scoring.BootstrapAggregator()
    for score in scores:
        aggregator.add_scores(score)
    return {name: score.mid.fmeasure for name, score in aggregator.aggregate().items()}


LOCAL = {"accuracy": _accuracy, "f1": _f1, "rouge": _rouge}
refused: list[str] = []  # metrics that tasks requested since `local_metrics` and that LOCAL lacks


class Metric:
    """A metric as `evaluate.load` returns it, as far as lm-eval's tasks use it."""

    def __init__(self, name: str):
        self.name = name

    def compute(self, *, predictions: list, references: list, **kwargs) -> dict:
        """{metric: value} of predictions against references; `kwargs` as the Hub's metric takes them."""
        return LOCAL[self.name](predictions, references, **kwargs)


def load(name: str, *args, **kwargs) -> Metric:
    """Replacement of `evaluate.load`. Raises Refusal for a metric that LOCAL lacks."""
    if name not in LOCAL:
        refused.append(str(name))
        raise Refusal(_describe_refusal([str(name)]))
    return Metric(name)


def local_metrics() -> None:
    """Replace `evaluate.load` in this process by `load`, and clear `refused`."""
    import evaluate

    evaluate.load = evaluate.loading.load = load
    refused.clear()


def check(name: str, leaves: dict) -> None:
    """Raise Refusal where tasks ({leaf: task} of the task `name`) need a metric, or code of a model, that would be
    downloaded from the Hub and run.
    """
    needed = {*refused, *(metric for task in leaves.values() for metric in _metrics_of(task))}
    if missing := sorted(needed - LOCAL.keys()):
        raise Refusal(f"--tasks {name}: {_describe_refusal(missing)}")


def _describe_refusal(names: list[str]) -> str:
    return (
        f"the code of its metric {', '.join(names)} would be downloaded from the Hub and run, which this project never"
        f" does. Available metrics: {', '.join(LOCAL)}, and lm-eval's own."
    )


def _metrics_of(task) -> set[str]:
    """Names of the metrics that a task takes from `evaluate`, by its config or in the functions that it uses."""
    from lm_eval.api import registry

    config = getattr(task, "config", None)
    listed = getattr(config, "metric_list", None) or []
    names = {
        entry["metric"]
        for entry in listed
        if isinstance(entry.get("metric"), str)
        and (entry.get("hf_evaluate") or entry["metric"] not in registry.metric_registry)
    }
    functions = [value for value in vars(config).values() if inspect.isfunction(value)] if config else []
    functions += [value for entry in listed for value in entry.values() if inspect.isfunction(value)]
    if not functions or type(task).__module__ != "lm_eval.api.task":
        names |= (
            _loaded_by(inspect.getsourcefile(type(task)), None)
            if not type(task).__module__.startswith("lm_eval.api")
            else set()
        )
    for function in functions:
        function = inspect.unwrap(function)
        if (file := inspect.getsourcefile(function)) and "lm_eval" in file:
            names |= _loaded_by(file, function.__name__)
    return names


@functools.cache
def _loaded_by(file: str, function: str | None) -> frozenset[str]:
    """Names that a file loads with `evaluate.load` at module level, in `function`, and in the file's functions that it
    uses; in the whole file for None.
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
    reached, pending = set(), set(defined) if function is None else {function} & set(defined)
    while pending:
        reached |= pending
        named = {node.id for name in pending for node in ast.walk(defined[name]) if isinstance(node, ast.Name)}
        pending = (named & set(defined)) - reached
    nodes = [node for node in tree.body if node not in defined.values()] + [defined[name] for name in reached]
    names = set()
    for node in (node for definition in nodes for node in ast.walk(definition) if isinstance(node, ast.Call)):
        called = node.func
        by_module = (
            isinstance(called, ast.Attribute)
            and called.attr == "load"
            and isinstance(called.value, ast.Name)
            and called.value.id in modules
        )
        if by_module or (isinstance(called, ast.Name) and called.id in loads):
            first = node.args[0] if node.args else None
            names.add(first.value if isinstance(first, ast.Constant) else "of its own")
        if any(
            keyword.arg == "trust_remote_code"
            and isinstance(keyword.value, ast.Constant)
            and keyword.value.value is True
            for keyword in node.keywords
        ):
            names.add("(code of a model or data set: trust_remote_code=True)")
    return frozenset(names)
