"""Records of an evaluation, one per model and task, and the tables made from them."""

import hashlib
import json
import random
import re
from importlib.metadata import version
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from model_card.records import metric_and_filter, metric_key

from ..digests import digest_of, file_record, is_as_recorded
from ..distributed import print_main
from ..files import csv_text, read_json, read_jsonl, write_json, write_text
from . import estimates
from .lm import render_chat
from .resolve import Model
from .tasks.definition import EvalTask, clusters_of, gold_index

COLUMNS = (
    "model revision commit adapter base_model base_revision base_commit step tokens task variant factor version n_shot"
    " metric filter value stderr low high chance n clusters limit chat_template dtype seed prefix_id truncated harness"
    " sandbox date"
).split()


# ---- records ----


def chosen(task: EvalTask, limit: int | None, seed: int) -> dict[str, list[int]]:
    """{leaf: sorted indices of its items}: all, or a seeded sample of `limit` items over the whole task, the same for
    every variant of it.
    """
    sizes = {leaf: len(task.items(leaf)) for leaf in task.leaves}
    all_items = [(leaf_index, number) for leaf_index, size in enumerate(sizes.values()) for number in range(size)]
    if limit is not None and limit < len(all_items):
        all_items = random.Random(seed).sample(all_items, limit)
    numbers_of = {
        leaf: sorted(number for index, number in all_items if index == leaf_index)
        for leaf_index, leaf in enumerate(sizes)
    }
    return {leaf: numbers for leaf, numbers in numbers_of.items() if numbers}


IMPOSSIBLE = -1e4  # nats of an option whose probability is 0 in float64
ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # of a function in memory, in its repr


def prompts_digest(task: EvalTask, items: dict[str, list[int]], tokenizer: PreTrainedTokenizerBase, seed: int) -> str:
    """sha256 over every prompt and target as the model will see them, with few-shot examples and chat format."""
    digest = hashlib.sha256()

    def render(messages: list[dict], add_generation_prompt: bool = True) -> str:
        return render_chat(tokenizer, messages, add_generation_prompt)

    for leaf, numbers in items.items():
        leaf_task = task.leaves[leaf]
        leaf_task.set_fewshot_seed(seed)
        documents, rolling = leaf_task.eval_docs, leaf_task.OUTPUT_TYPE == "loglikelihood_rolling"
        for number in numbers:
            document = documents[number]
            text = (
                "" if rolling else leaf_task.fewshot_context(document, task.n_shot, None, task.chat, task.chat, render)
            )
            choices = leaf_task.doc_to_choice(document) if leaf_task.config.doc_to_choice is not None else None
            digest.update(json.dumps([leaf, text, choices, leaf_task.doc_to_target(document)], default=str).encode())
            if task.own:  # also what is not asked: other right answers, groups
                digest.update(json.dumps(document, sort_keys=True, default=str).encode())
        if task.own:
            fields = ("generation_kwargs", "filter_list", "metric_list", "target_delimiter", "gen_prefix")
            defined = {name: getattr(leaf_task.config, name, None) for name in fields}
            digest.update(ADDRESS.sub("", json.dumps(defined, sort_keys=True, default=repr)).encode())
    return digest.hexdigest()


class Store:
    """The results and samples in an evaluation's folder."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.digests: dict[tuple, str] = {}  # of prompts, so far

    @property
    def has_results(self) -> bool:
        """Whether any pair was computed before."""
        return any((self.folder / "results").glob("*.json"))

    def holds(self, key: str) -> bool:
        """Whether there is a record of a pair, which `result` may still find damaged."""
        return (self.folder / "results" / f"{key}.json").exists()

    def result(self, key: str) -> dict | None:
        """The record of a pair if it and its samples are as they were written, else None; a damaged one is reported,
        since it is computed again.
        """
        path, samples = self.folder / "results" / f"{key}.json", self.folder / "samples" / f"{key}.jsonl"
        if not path.exists():
            return None
        record = read_json(path)
        problem = None
        if not isinstance(record, dict):
            problem = "its record is not valid JSON"
        elif "digest" not in record:
            problem = "it has no digests, as in earlier versions"
        elif record["digest"] != digest_of(record) or record.get("key") != key:
            problem = "its record was altered"
        elif not samples.exists():
            problem = "its samples are missing"
        elif not is_as_recorded(samples, record["samples"]):
            problem = "its samples were altered"
        if problem:
            print_main(f"WARNING   results/{key}: {problem}, so it is computed again")
        return None if problem else record

    def samples(self, key: str) -> list[dict]:
        """The samples of a pair."""
        return read_jsonl(self.folder / "samples" / f"{key}.jsonl")

    def save(self, key: str, record: dict, samples: list[dict]) -> None:
        """Write the samples, then the record with their BLAKE3 and its own digest, so that a record exists only with
        its samples.
        """
        for subfolder in ("results", "samples"):
            (self.folder / subfolder).mkdir(parents=True, exist_ok=True)
        path = self.folder / "samples" / f"{key}.jsonl"
        write_text(path, "".join(json.dumps(sample, sort_keys=True, default=str) + "\n" for sample in samples))
        self.save_record(key, {**record, "samples": file_record(path)})

    def save_record(self, key: str, record: dict) -> None:
        """Write the record of a pair whose samples are written, with its digest."""
        write_json(self.folder / "results" / f"{key}.json", {**record, "digest": digest_of(record)})


def key_of(
    model: Model,
    tokenizer_sha: str,
    dtype: str,
    task: EvalTask,
    prompts: str,
    seed: int,
    limit: int | None,
    prefix: int,
) -> str:
    """Key of a pair: a readable prefix, and 16 hex digits of a digest over everything that decides its numbers."""
    parts = [
        *model.weights,
        tokenizer_sha,
        dtype,
        [task.name, task.version, task.n_shot, task.chat, prompts],
        seed,
        limit,
        prefix,
        harness_version(),
    ]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    name = re.sub(r"[^\w.-]+", "-", f"{model.name.strip('./')}--{task.name}").strip("-")
    return f"{name[:120]}--{digest}"


def where_from(model: Model) -> dict:
    """Columns that name a model's files: revision and commit of the model or adapter, and of an adapter's base."""
    located = model.adapter or model.base
    columns = {
        "revision": located.revision,
        "commit": located.commit,
        "adapter": None,
        "base_model": None,
        "base_revision": None,
        "base_commit": None,
    }
    if model.adapter:
        columns |= {
            "adapter": model.adapter.name,
            "base_model": model.base.name,
            "base_revision": model.base.revision,
            "base_commit": model.base.commit,
        }
    return columns


def harness_version() -> str:
    """Name and version of the evaluation library."""
    return f"lm-eval {version('lm-eval')}"


def _plain(value):
    """A metric of an item without numpy's types, which are no JSON."""
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return value.item() if isinstance(value, np.generic) else value


def samples_of(task: EvalTask, results: dict) -> list[dict]:
    """lm-eval's samples as records, one per item: its answer, its metrics, and the cluster of items that it belongs to.

    `meant` is the index of the chosen option in the original task's order; `gold` that of the right one in the order of
    `nats`, left out where several are right; `right` is their number, left out where it is 1. `subject` is the part of
    the task that an item says it belongs to. `pooled` holds what lm-eval makes a metric of all items from.
    """
    records, left_out = [], estimates.pooled(results)
    for leaf, rows in results["samples"].items():
        leaf_task = task.leaves[leaf]
        for row in rows:
            values = {name: _plain(row[name]) for name in row["metrics"]}
            metrics = {name: value for name, value in values.items() if name not in left_out}
            record = {
                "leaf": leaf.split("|")[0],
                "doc_id": row["doc_id"],
                "item": row["doc_hash"],
                "prompt": row["prompt_hash"],
                "filter": row["filter"],
                "cluster": clusters_of(row["doc"]),
                "metrics": metrics,
            }
            if len(metrics) < len(values):
                record["pooled"] = {name: value for name, value in values.items() if name in left_out}
            if isinstance(subject := row["doc"].get("subject"), str):
                record["subject"] = subject
            if leaf_task.OUTPUT_TYPE == "multiple_choice":
                record |= _choice(leaf_task, row, by_length="acc_norm" in metrics)
            elif leaf_task.OUTPUT_TYPE == "generate_until":
                record["answer"] = (
                    row["filtered_resps"][0]
                    if isinstance(row["filtered_resps"][0], str)
                    else row["filtered_resps"][0][0]
                )
            records.append(record)
    return records


def _choice(leaf_task, row: dict, by_length: bool) -> dict:
    """What a sample says of the options of an item. by_length: the chosen option is the likeliest per character."""
    nats = [answer[0] for answer in row["filtered_resps"]]
    options = [" "] * len(nats) if leaf_task.multiple_input else list(leaf_task.doc_to_choice(row["doc"]))
    # lm-eval's own tasks have none
    option_order = (
        leaf_task.option_order(row["doc"]) if hasattr(leaf_task, "option_order") else list(range(len(options)))
    )
    lengths = [len(option) for option in options] if by_length else [1] * len(options)
    best = int(np.argmax(np.array(nats[: len(options)]) / np.array(lengths)))
    count, gold = right_options(leaf_task, row, options)
    return {
        **{"nats": nats, "meant": option_order[best], "options": len(options)},
        **({} if count == 1 else {"right": count}),
        **({} if gold is None else {"gold": gold}),
    }


def right_options(leaf_task, row: dict, options: list[str]) -> tuple[int | None, int | None]:
    """(how many options of an item are right, the index of the one that is), None for what is not known.

    A task that scores its answers itself (`process_results`, as truthfulqa_mc2) is asked for the accuracy of a model
    that is certain of one option, for each of them.
    """
    score = leaf_task.config.process_results
    if callable(score):
        count = len(row["filtered_resps"])
        accuracies = [
            score(row["doc"], [(0.0 if index == option else IMPOSSIBLE, False) for index in range(count)]).get("acc")
            for option in range(len(options))
        ]
        if not all(accuracy in (0, 1) for accuracy in accuracies):
            return None, None
        right = [index for index, accuracy in enumerate(accuracies) if accuracy == 1]
    elif isinstance(row["target"], list):
        right = [index for index in row["target"] if isinstance(index, int) and index < len(options)]
    else:
        return 1, gold_index(row["target"], options)
    return len(right), right[0] if len(right) == 1 else None


def by_metric(samples: list[dict]) -> dict[str, list[dict]]:
    """{key of `metric_key`: its samples}, metrics by name and filters in the task's order."""
    found: dict[str, list[dict]] = {}
    for sample in samples:
        for name in sample["metrics"]:
            found.setdefault(metric_key(name, sample["filter"]), []).append(sample)
    return dict(sorted(found.items(), key=lambda entry: metric_and_filter(entry[0])[0]))


def metrics_of(samples: list[dict]) -> dict[str, dict]:
    """{key: {value, stderr, low, high, n, clusters, df}} of samples, a key for each metric and filter (`metric_key`).
    Metrics without values per item are left out.
    """
    metrics = {}
    for key, group in by_metric(samples).items():
        name = metric_and_filter(key)[0]
        values = [sample["metrics"][name] for sample in group]
        clusters, strata = ([sample[part] for sample in group] for part in ("cluster", "leaf"))
        if estimates.has_values(name, values):
            metrics[key] = estimates.estimate(name, values, clusters, strata)
    return metrics


# ---- tables ----


def rows_of(record: dict) -> list[dict]:
    """Rows of `scores.csv` of one record, one per metric and filter. Only accuracies have a chance level."""
    rows = []
    for key, values in record["metrics"].items():
        metric, filter_name = metric_and_filter(key)
        row = {name: record.get(name) for name in COLUMNS} | {"metric": metric, "filter": filter_name, **values}
        rows.append(row if metric.startswith("acc") else {**row, "chance": None})
    return rows


def write_scores(folder: Path, records: list[dict]) -> None:
    """Write `scores.csv` and `scores.json`, in the order of the records."""
    rows = [row for record in records for row in rows_of(record)]
    write_text(folder / "scores.csv", csv_text(COLUMNS, rows))
    write_json(folder / "scores.json", [{name: row[name] for name in COLUMNS} for row in rows])
