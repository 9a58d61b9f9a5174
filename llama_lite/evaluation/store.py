"""Records of an evaluation: one per model and task, kept as it ends, never mixed with another's; the tables made of
them.
"""

import hashlib
import json
import random
import re
from importlib.metadata import version
from pathlib import Path

import numpy as np

from ..checkpoint.verify import digest_of
from ..distributed import print_main
from ..files import csv_text, read_json, read_jsonl, sha256, write_json, write_text
from . import statistics
from .lm import render_chat
from .resolve import Model
from .tasks.definition import EvalTask, clusters_of

COLUMNS = (
    "model revision commit adapter base_model base_revision base_commit step tokens task variant factor version n_shot"
    " metric value stderr low high chance n limit chat_template dtype seed prefix_id truncated harness sandbox date"
).split()


# ---- records ----


def chosen(task: EvalTask, limit: int | None, seed: int) -> dict[str, list[int]]:
    """Numbers of the items of each leaf: all, or a seeded sample of `limit` over the whole task, which any variant of
    it shares.
    """
    sizes = {leaf: len(task.items(leaf)) for leaf in task.leaves}
    items = [(leaf_index, number) for leaf_index, size in enumerate(sizes.values()) for number in range(size)]
    if limit is not None and limit < len(items):
        items = random.Random(seed).sample(items, limit)
    found = {leaf: sorted(number for at, number in items if at == leaf_index) for leaf_index, leaf in enumerate(sizes)}
    return {leaf: numbers for leaf, numbers in found.items() if numbers}


def prompts_digest(task: EvalTask, items: dict[str, list[int]], tokenizer, seed: int) -> str:
    """sha256 over every prompt and target as the model will see them, few-shot examples and chat format included."""
    digest = hashlib.sha256()

    def render(messages, add_generation_prompt=True):
        return render_chat(tokenizer, messages, add_generation_prompt)

    for leaf, numbers in items.items():
        asked = task.leaves[leaf]
        asked.set_fewshot_seed(seed)
        documents, rolling = asked.eval_docs, asked.OUTPUT_TYPE == "loglikelihood_rolling"
        for number in numbers:
            document = documents[number]
            text = "" if rolling else asked.fewshot_context(document, task.n_shot, None, task.chat, task.chat, render)
            choices = asked.doc_to_choice(document) if asked.config.doc_to_choice is not None else None
            digest.update(json.dumps([leaf, text, choices, asked.doc_to_target(document)], default=str).encode())
    return digest.hexdigest()


class Store:
    """The results and samples of an evaluation's folder."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.digests: dict[tuple, str] = {}  # of prompts, so far
        for part in ("results", "samples"):
            (self.folder / part).mkdir(parents=True, exist_ok=True)

    def result(self, key: str) -> dict | None:
        """The record of a pair that is there and as it was written, samples and all; else None, and why is said, for it
        is computed again.
        """
        path, samples = self.folder / "results" / f"{key}.json", self.folder / "samples" / f"{key}.jsonl"
        if not path.exists():
            return None
        record = read_json(path)
        wrong = None
        if not isinstance(record, dict):
            wrong = "its record is no whole JSON"
        elif "digest" not in record:
            wrong = "it was kept without a seal, as earlier versions did"
        elif record["digest"] != digest_of(record) or record.get("key") != key:
            wrong = "its record was altered"
        elif not samples.exists():
            wrong = "its samples are missing"
        elif record["samples"] != {"size": samples.stat().st_size, "sha256": sha256(samples)}:
            wrong = "its samples were altered"
        if wrong:
            print_main(f"WARNING   results/{key}: {wrong}, so it is computed again")
        return None if wrong else record

    def samples(self, key: str) -> list[dict]:
        return read_jsonl(self.folder / "samples" / f"{key}.jsonl")

    def save(self, key: str, record: dict, samples: list[dict]) -> None:
        """Samples first: a result is there only when they are, and it is sealed like a checkpoint, by their sha256 and
        its own.
        """
        path = self.folder / "samples" / f"{key}.jsonl"
        write_text(path, "".join(json.dumps(sample, sort_keys=True, default=str) + "\n" for sample in samples))
        record = {**record, "samples": {"size": path.stat().st_size, "sha256": sha256(path)}}
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
    """What two evaluations must agree in to be one: 16 hex digits and a readable beginning."""
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
    """Which files a model is: revision and commit of what was asked for, an adapter where there is one, and of its base
    in columns of their own.
    """
    own = model.adapter or model.base
    found = {
        "revision": own.revision,
        "commit": own.commit,
        "adapter": None,
        "base_model": None,
        "base_revision": None,
        "base_commit": None,
    }
    if model.adapter:
        found |= {
            "adapter": model.adapter.name,
            "base_model": model.base.name,
            "base_revision": model.base.revision,
            "base_commit": model.base.commit,
        }
    return found


def harness_version() -> str:
    """Name and version of what computed the numbers."""
    return f"lm-eval {version('lm-eval')}"


def samples_of(task: EvalTask, found: dict) -> list[dict]:
    """lm-eval's samples as records: one an item, what it was answered and what that is worth, and what it shares with
    others.
    """
    kept = []
    for leaf, rows in found["samples"].items():
        asked = task.leaves[leaf]
        for row in rows:
            metrics = {name: row[name] for name in row["metrics"]}
            record = {
                "leaf": leaf.split("|")[0],
                "doc_id": row["doc_id"],
                "item": row["doc_hash"],
                "prompt": row["prompt_hash"],
                "filter": row["filter"],
                "cluster": clusters_of(row["doc"]),
                "metrics": {
                    name: list(value) if isinstance(value, tuple) else value for name, value in metrics.items()
                },
            }
            if asked.OUTPUT_TYPE == "multiple_choice":
                nats = [answer[0] for answer in row["filtered_resps"]]
                options = list(asked.doc_to_choice(row["doc"])) if not asked.multiple_input else [" "] * len(nats)
                placed = (
                    asked.option_order(row["doc"]) if hasattr(asked, "option_order") else list(range(len(options)))
                )  # lm-eval's own tasks have none
                lengths = [len(option) for option in options] if "acc_norm" in metrics else [1] * len(options)
                best = int(np.argmax(np.array(nats[: len(options)]) / np.array(lengths)))
                record |= {"nats": nats, "meant": placed[best], "options": len(options)}
            elif asked.OUTPUT_TYPE == "generate_until":
                record["answer"] = (
                    row["filtered_resps"][0]
                    if isinstance(row["filtered_resps"][0], str)
                    else row["filtered_resps"][0][0]
                )
            kept.append(record)
    return kept


def metrics_of(samples: list[dict]) -> dict[str, dict]:
    """{metric: value, error, interval, n} of samples: means, and bits per byte as a ratio of sums; others have no
    per-item value.
    """
    found = {}
    strata = [sample["leaf"] for sample in samples]
    clusters = [sample["cluster"] for sample in samples]
    for name in {metric for sample in samples for metric in sample["metrics"]}:
        values = [sample["metrics"][name] for sample in samples]
        if name == "bits_per_byte":
            found[name] = statistics.ratio(
                [-nats / np.log(2) for nats, _ in values], [count for _, count in values], clusters
            )
        elif all(isinstance(value, int | float) for value in values):
            found[name] = statistics.ratio(values, None, clusters, strata)
    return dict(sorted(found.items()))


# ---- tables ----


def rows_of(record: dict) -> list[dict]:
    """Rows of `scores.csv` of one result."""
    return [
        {**{name: record.get(name) for name in COLUMNS}, "metric": metric, **found}
        for metric, found in record["metrics"].items()
    ]


def write_scores(folder: Path, records: list[dict]) -> None:
    """`scores.csv` and `scores.json`, in the order in which models and tasks were asked for."""
    rows = [row for record in records for row in rows_of(record)]
    write_text(folder / "scores.csv", csv_text(COLUMNS, rows))
    write_json(folder / "scores.json", [{name: row[name] for name in COLUMNS} for row in rows])
