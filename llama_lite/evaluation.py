"""Evaluations as records: each (model, task) is kept as it ends, is never computed twice, and never mixed with another.

`results/KEY.json` holds the scores of one pair and what they are of, `samples/KEY.jsonl` what each item was answered. KEY is a
digest of everything that decides the numbers: weights, tokenizer, prompts and data, number format, seed and harness. Both are sealed
by sha256: a pair that was altered or cut since is computed again.
`scores.csv`, `comparison.csv` and the rest are made from these files alone.
"""

import dataclasses
import functools
import hashlib
import json
import random
import re
import shutil
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

from model_card.records import shown_metric

from . import models, scores
from .arguments import Refusal
from .checkpoints import digest_of, well_formed
from .harness import render_chat
from .hub import NoAnswer, NotAllowed, Reference, reference, refs_of
from .runs import csv_text, read_json, read_jsonl, say, sha256, write_json, write_text
from .tasks import EvalTask, clusters_of
from .tokenizers import tokenizer_record

COLUMNS = (
    "model revision commit adapter base_model base_revision base_commit step tokens task variant factor version n_shot metric value stderr low high chance n limit chat_template dtype seed prefix_id "
    "truncated harness sandbox date"
).split()


# ---- which models ----


@dataclasses.dataclass(frozen=True)
class Model:
    """One model of an evaluation: base, adapter on it or none, and where in its run it stands, as far as a record says so."""

    name: str
    base: models.Located
    adapter: models.Located | None = None
    step: int | None = None
    tokens: int | None = None

    @property
    def has_chat_format(self) -> bool:
        return (self.adapter or self.base).folder.joinpath("chat_template.jinja").exists()

    @functools.cached_property
    def weights(self) -> tuple[str, str | None]:
        """sha256 of the base's weights and config, and of the adapter's; read once."""
        return models.model_digest(self.base.folder), models.model_digest(self.adapter.folder) if self.adapter else None


def expand(asked: list[str]) -> list[Model]:
    """Models of references: `path`, `org/name@revision`, `...@step-*` (all of them, in order), each `+adapter`. Raises Refusal."""
    found = []
    for text in asked:
        base, plus, adapter = text.partition("+")
        names = _steps(base) if base.endswith("@step-*") else [base]
        for name in names:
            found.append(_model(name, adapter if plus else None))
    if repeated := [model.name for model in found if sum(other.name == model.name for other in found) > 1]:
        raise Refusal(f"--models {repeated[0]} is given twice.")
    places: dict[tuple, str] = {}
    for model in found:
        place = tuple(one and one.folder.resolve() for one in (model.base, model.adapter))
        if place in places:
            raise Refusal(f"--models {places[place]} {model.name} is one model, given twice.")
        places[place] = model.name
    return found


def _steps(text: str) -> list[str]:
    """`place@step-*` as one reference a step, oldest first."""
    place = text.removesuffix("@step-*")
    if Path(place).is_dir():
        steps = sorted(int(path.name.removeprefix("checkpoint-")) for path in Path(place).glob("checkpoint-*") if path.name[11:].isdigit())
        names = [f"{place}@step-{step}" for step in steps]
    else:
        from .publishing import newest_first, step_of

        try:
            tags = refs_of(place)[1]
            steps = {step_of(tag)[0]: tag for tag, _ in reversed(newest_first(tags))}  # of step-N and step-N-2 the last is the run's
            steps = steps or {int(tag[5:]): tag for tag in tags if re.fullmatch("step-[0-9]+", tag)}  # of another project
            names = [f"{place}@{steps[step]}" for step in sorted(steps)]
        except (NoAnswer, NotAllowed) as error:
            raise Refusal(
                f"--models {text}: no folder here has this name, and the Hub says: {error}. Make it first, give another name, or run the same command "
                "again when the Hub answers."
            ) from None
    if not names:
        raise Refusal(f"--models {text}: {place} has no steps, neither checkpoints in a folder nor tags on the Hub.")
    return names


def _locate(name: str) -> models.Located:
    """As `models.locate`; `folder@step-N` is the folder's checkpoint-N."""
    folder, at, step = name.rpartition("@step-")
    if at and Path(folder).is_dir():
        checkpoint = Path(folder) / f"checkpoint-{int(step) if step.isdigit() else step}"
        return dataclasses.replace(models.locate(str(checkpoint), argument="--models"), name=name)
    return models.locate(name, argument="--models")


def _model(name: str, adapter: str | None) -> Model:
    base, extra = _locate(name), _locate(adapter) if adapter else None
    if base.adapter and extra is None:  # an adapter alone: its own record names its base
        record = read_json(base.folder / "adapter_config.json")
        named, revision = record.get("base_model_name_or_path"), record.get("revision")
        if not named:
            raise Refusal(f"--models {name} is an adapter that does not name its base: give BASE+{name}.")
        place = named if reference(named) is None or not revision else str(Reference(named, revision))
        base, extra = _locate(place), base
    if extra is not None:
        if not extra.adapter:
            raise Refusal(f"--models {name}+{adapter}: {adapter} is no adapter (it has no adapter_config.json).")
        models.check_base(extra, base)
    last = extra or base
    step, tokens = _place(last.folder)
    return Model(name if not adapter else f"{name}+{adapter}", base, extra, step, tokens)


def _place(folder: Path) -> tuple[int | None, int | None]:
    """(step, training tokens) of a checkpoint, a published revision, or a finished run."""
    for record in ("revision.json", "manifest.json"):
        if well_formed(found := read_json(folder / record)):
            return found["step"], found["tokens"]
    log = [entry for entry in read_jsonl(folder / "log.jsonl") if "tokens" in entry]
    return (log[-1]["step"], log[-1]["tokens"]) if log else (None, None)


# ---- records ----


def chosen(task: EvalTask, limit: int | None, seed: int) -> dict[str, list[int]]:
    """Numbers of the items of each leaf: all, or a seeded sample of `limit` over the whole task, which any variant of it shares."""
    sizes = {leaf: len(task.items(leaf)) for leaf in task.leaves}
    places = [(place, number) for place, size in enumerate(sizes.values()) for number in range(size)]
    if limit is not None and limit < len(places):
        places = random.Random(seed).sample(places, limit)
    found = {leaf: sorted(number for at, number in places if at == place) for place, leaf in enumerate(sizes)}
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
        """The record of a pair that is there and as it was written, samples and all; else None, and why is said, for it is computed again."""
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
            say(f"WARNING   results/{key}: {wrong}, so it is computed again")
        return None if wrong else record

    def samples(self, key: str) -> list[dict]:
        return read_jsonl(self.folder / "samples" / f"{key}.jsonl")

    def save(self, key: str, record: dict, samples: list[dict]) -> None:
        """Samples first: a result is there only when they are, and it is sealed like a checkpoint, by their sha256 and its own."""
        path = self.folder / "samples" / f"{key}.jsonl"
        write_text(path, "".join(json.dumps(sample, sort_keys=True, default=str) + "\n" for sample in samples))
        record = {**record, "samples": {"size": path.stat().st_size, "sha256": sha256(path)}}
        write_json(self.folder / "results" / f"{key}.json", {**record, "digest": digest_of(record)})


def key_of(model: Model, tokenizer_sha: str, dtype: str, task: EvalTask, prompts: str, seed: int, limit: int | None, prefix: int) -> str:
    """What two evaluations must agree in to be one: 16 hex digits and a readable beginning."""
    parts = [
        *model.weights,
        tokenizer_sha,
        dtype,
        [task.name, task.version, task.n_shot, task.chat, prompts],
        seed,
        limit,
        prefix,
        harness(),
    ]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    name = re.sub(r"[^\w.-]+", "-", f"{model.name.strip('./')}--{task.name}").strip("-")
    return f"{name[:120]}--{digest}"


def where_from(model: Model) -> dict:
    """Which files a model is: revision and commit of what was asked for, an adapter where there is one, and of its base in columns of their own."""
    own = model.adapter or model.base
    found = {"revision": own.revision, "commit": own.commit, "adapter": None, "base_model": None, "base_revision": None, "base_commit": None}
    if model.adapter:
        found |= {
            "adapter": model.adapter.name,
            "base_model": model.base.name,
            "base_revision": model.base.revision,
            "base_commit": model.base.commit,
        }
    return found


def harness() -> str:
    """Name and version of what computed the numbers."""
    return f"lm-eval {version('lm-eval')}"


def samples_of(task: EvalTask, found: dict) -> list[dict]:
    """lm-eval's samples as records: one an item, what it was answered and what that is worth, and what it shares with others."""
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
                "metrics": {name: list(value) if isinstance(value, tuple) else value for name, value in metrics.items()},
            }
            if asked.OUTPUT_TYPE == "multiple_choice":
                nats = [answer[0] for answer in row["filtered_resps"]]
                options = list(asked.doc_to_choice(row["doc"])) if not asked.multiple_input else [" "] * len(nats)
                placed = asked.meant(row["doc"]) if hasattr(asked, "meant") else list(range(len(options)))  # lm-eval's own tasks have none
                lengths = [len(option) for option in options] if "acc_norm" in metrics else [1] * len(options)
                best = int(np.argmax(np.array(nats[: len(options)]) / np.array(lengths)))
                record |= {"nats": nats, "meant": placed[best], "options": len(options)}
            elif asked.OUTPUT_TYPE == "generate_until":
                record["answer"] = row["filtered_resps"][0] if isinstance(row["filtered_resps"][0], str) else row["filtered_resps"][0][0]
            kept.append(record)
    return kept


def metrics_of(samples: list[dict]) -> dict[str, dict]:
    """{metric: value, error, interval, n} of samples: means, and bits per byte as a ratio of sums; others have no per-item value."""
    found = {}
    strata = [sample["leaf"] for sample in samples]
    clusters = [sample["cluster"] for sample in samples]
    for name in {metric for sample in samples for metric in sample["metrics"]}:
        values = [sample["metrics"][name] for sample in samples]
        if name == "bits_per_byte":
            found[name] = scores.ratio([-nats / np.log(2) for nats, _ in values], [count for _, count in values], clusters)
        elif all(isinstance(value, int | float) for value in values):
            found[name] = scores.ratio(values, None, clusters, strata)
    return dict(sorted(found.items()))


# ---- asking ----


@dataclasses.dataclass(frozen=True)
class Settings:
    """How models are asked: what every record of an evaluation has in common."""

    dtype: str
    seed: int
    batch_tokens: int | None
    tokenizer_name: str | None
    unsafe: bool


def ask(store: Store, model: Model, tasks: list[tuple[EvalTask, int | None]], settings: Settings, done) -> list[dict]:
    """The records of a model for (task, limit) pairs: those that are there, and the others computed. `done(record, fresh)` after each.

    The model is loaded only if something is to be computed, and let go of afterwards. Raises Refusal.
    """
    from . import harness as lm_harness
    from . import sandbox

    digests = store.digests
    tokenizer = models.load_tokenizer(model.adapter if model.adapter and _has_tokenizer(model.adapter) else model.base, settings.tokenizer_name)
    sha, prefix = tokenizer_record(tokenizer)["sha256"], tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    lm, records = None, []
    for task, limit in tasks:
        if task.chat and not tokenizer.chat_template:
            raise Refusal(f"{model.name} has no chat format (its tokenizer has no chat template): leave out --apply_chat_template.")
        items = chosen(task, limit, settings.seed)
        prompts = (task.name, limit, settings.seed, sha if task.chat else None)  # the same for every model, but for a chat format
        if prompts not in digests:
            digests[prompts] = prompts_digest(task, items, tokenizer, settings.seed)
        key = key_of(model, sha, settings.dtype, task, digests[prompts], settings.seed, limit, prefix)
        record = store.result(key)
        if fresh := record is None:
            lm = lm or _load(model, tokenizer, settings)
            before = lm.truncated
            found = lm_harness.run(lm, {leaf: task.leaves[leaf] for leaf in items}, items, settings.seed, task.chat, settings.unsafe)
            samples = samples_of(task, found)
            metrics = metrics_of(samples)
            wanted = {name for leaf in items for name in task.leaves[leaf].aggregation()}
            if missing := sorted(wanted - {name for sample in samples for name in sample["metrics"]}):
                raise Refusal(f"{task.name}: lm-eval returned no {', '.join(missing)}. Its metric needs the network, or a package that is not here.")
            record = {
                **{name: getattr(model, name) for name in ("step", "tokens")},
                "key": key,
                "model": model.name,
                **where_from(model),
                "task": task.name,
                "base": task.base,
                "dataset": task.dataset,
                "variant": task.variant,
                "factor": task.factor,
                "version": task.version,
                "n_shot": task.n_shot,
                "limit": limit,
                "chat_template": task.chat,
                "dtype": settings.dtype,
                "seed": settings.seed,
                "prefix_id": prefix,
                "truncated": lm.truncated - before,
                "harness": harness(),
                "sandbox": ", ".join(sandbox.protections()) if task.unsafe else None,
                "date": time.strftime("%Y-%m-%d", time.gmtime()),
                "chance": float(np.mean([1 / sample["options"] for sample in samples])) if all("options" in sample for sample in samples) else None,
                "metrics": metrics,
            }
            store.save(key, record, samples)
        records.append(record)
        done(record, fresh)
    return records


def _has_tokenizer(located: models.Located) -> bool:
    return (located.folder / "tokenizer.json").exists()


def _load(model: Model, tokenizer, settings: Settings):
    """A SharedContextLM of a model; its begin, end and padding ids are mended to the tokenizer's, which is said."""
    import torch

    from .harness import SharedContextLM

    loaded = models.load_model(model.base, settings.dtype)
    models.check_vocabulary(model.name, loaded.get_input_embeddings().num_embeddings, tokenizer)
    models.check_language_model(model.name, loaded)
    if said := models.mend_ids(loaded, tokenizer):
        say(f"{model.name}: {said}")
    if model.adapter:
        loaded = models.attach(loaded, model.adapter)
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return SharedContextLM(loaded.to(device).eval(), tokenizer, settings.batch_tokens)


# ---- tables ----


def rows_of(record: dict) -> list[dict]:
    """Rows of `scores.csv` of one result."""
    return [{**{name: record.get(name) for name in COLUMNS}, "metric": metric, **found} for metric, found in record["metrics"].items()]


def write_scores(folder: Path, records: list[dict]) -> None:
    """`scores.csv` and `scores.json`, in the order in which models and tasks were asked for."""
    rows = [row for record in records for row in rows_of(record)]
    write_text(folder / "scores.csv", csv_text(COLUMNS, rows))
    write_json(folder / "scores.json", [{name: row[name] for name in COLUMNS} for row in rows])


def runs_of(found: list[Model]) -> dict[Path, list[str]]:
    """{run folder: names of its models} of those that are in folders of this machine: the run's own, its checkpoints', and adapters on them."""
    runs: dict[Path, list[str]] = {}
    for model in found:
        for located in (model.base, model.adapter):
            if located and located.repo is None:
                folder = located.folder.parent if located.folder.name.startswith("checkpoint-") else located.folder
                if (read_json(folder / "run.json") or {}).get("identity"):
                    runs.setdefault(folder, []).append(model.name)
    return runs


def hand_over(out: Path, run: Path, own: list[str]) -> None:
    """Put an evaluation's tables into `RUN/evaluation/NAME`, where the run's card finds them; `own`: which of its models are the run's."""
    place = run / "evaluation" / out.resolve().name
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    for name in ("scores.json", "comparison.csv", "sensitivity.json", "robustness.json", "generalisation.json", "contamination.json"):
        if (out / name).exists():
            shutil.copyfile(out / name, place / name)
    files = {path.name: sha256(path) for path in sorted(place.iterdir())}
    write_json(place / "run.json", {**read_json(out / "run.json"), "of": {"id": read_json(run / "run.json")["id"], "models": own, "files": files}})


# ---- pairs ----

PAIRS = ("task variant metric first second difference stderr low high p p_holm detectable n only_first only_second").split()


def pair(first: list[dict], second: list[dict], metric: str, names: tuple[str, str]) -> dict:
    """The paired difference second - first of two sample lists, a row of `comparison.csv`. Raises Refusal where they are not of the same items."""

    def keyed(samples):
        return {(sample["leaf"], sample["doc_id"], sample["filter"]): sample for sample in samples}

    a, b = keyed(first), keyed(second)
    if a.keys() != b.keys() or any(a[key]["item"] != b[key]["item"] for key in a):
        raise Refusal(f"{names[0]} and {names[1]} were not asked the same items, so nothing can be said of their difference.")
    keys = sorted(a)
    strata, clusters = [key[0] for key in keys], [a[key]["cluster"] for key in keys]
    values = [(a[key]["metrics"][metric], b[key]["metrics"][metric]) for key in keys]
    if metric == "bits_per_byte":
        found = scores.ratio([(x[0] - y[0]) / np.log(2) for x, y in values], [x[1] for x, _ in values], clusters)
    else:
        found = scores.ratio([y - x for x, y in values], None, clusters, strata)
    row = {
        "metric": metric,
        "first": names[0],
        "second": names[1],
        "difference": found["value"],
        **{k: found[k] for k in ("stderr", "low", "high", "n")},
    }
    row |= {"p": _p_of(found), "detectable": scores.detectable(found["stderr"])}
    if all(value in (0, 1) for both in values for value in both if not isinstance(value, list)) and metric != "bits_per_byte":
        test = scores.mcnemar([x == 1 for x, _ in values], [y == 1 for _, y in values])
        row |= {"p": test["p"], "only_first": test["only_first"], "only_second": test["only_second"]}
    return row


def _p_of(found: dict) -> float | None:
    """Two-sided p of a difference from its error, normal."""
    from scipy import stats

    if not found["stderr"]:
        return None if found["stderr"] is None else float(found["value"] == 0)
    return float(2 * stats.norm.sf(abs(found["value"]) / found["stderr"]))


def compare(records: list[dict], samples_of_key, most: int = 12) -> list[dict]:
    """Rows of `comparison.csv`: for each task all pairs of models, or, of more than `most`, neighbours and each against the first.

    Holm's adjustment is over the pairs of one task.
    """
    rows = []
    by_task: dict[tuple, list[dict]] = {}
    for record in records:
        if not record["factor"]:
            by_task.setdefault((record["task"], record["variant"]), []).append(record)
    for (task, variant), group in by_task.items():
        metric = shown_metric(group[0]["metrics"])
        pairs = [(i, j) for j in range(len(group)) for i in range(j) if len(group) <= most or i in (0, j - 1)]
        loaded = [samples_of_key(record["key"]) for record in group]
        found = [pair(loaded[i], loaded[j], metric, (group[i]["model"], group[j]["model"])) for i, j in pairs]
        judged = [row for row in found if row["p"] is not None]
        for row, adjusted in zip(judged, scores.holm([row["p"] for row in judged]), strict=True):
            row["p_holm"] = adjusted
        rows += [{"task": task, "variant": variant, **row} for row in found]
    return rows


# ---- kinds of text ----


def generalisation(records: list[dict], samples_of_key, inside: str, reference_model: str | None) -> list[dict]:
    """How each model does on each kind of text against its own kind, `inside`: the gap in bits per byte, and whether likelihood tells them apart.

    auroc: the probability that a text of the other kind has more bits per byte (0.5: not told apart; below: it is easier);
    auroc_two_sided: by the distance from the mean of its own kind; auroc_ratio: by the bits per byte that the model needs more than
    `reference_model`, which takes out how hard a text is in itself. Rows are JSON.
    """
    texts = [record for record in records if "bits_per_byte" in record["metrics"] and not record["factor"]]
    per_text = {(r["model"], r["task"]): _bits_of_texts(samples_of_key(r["key"])) for r in texts}
    rows = []
    for record in texts:
        model, task = record["model"], record["task"]
        found = record["metrics"]["bits_per_byte"]
        row = {"model": model, "task": task, "bits_per_byte": found["value"], "low": found["low"], "high": found["high"], "texts": found["n"]}
        if task != inside and (model, inside) in per_text:
            own, other = per_text[model, inside], per_text[model, task]
            centre = float(np.mean(own))
            row |= {
                "gap": found["value"] - _record(texts, model, inside)["metrics"]["bits_per_byte"]["value"],
                "auroc": scores.auroc(own, other),
                "auroc_two_sided": scores.auroc([abs(x - centre) for x in own], [abs(x - centre) for x in other]),
            }
            if reference_model and reference_model != model and (reference_model, task) in per_text and (reference_model, inside) in per_text:
                less = [[x - y for x, y in zip(per_text[model, t], per_text[reference_model, t], strict=True)] for t in (inside, task)]
                row["auroc_ratio"] = scores.auroc(*less)
        rows.append(row)
    return rows


def _record(records: list[dict], model: str, task: str) -> dict:
    return next(record for record in records if record["model"] == model and record["task"] == task)


def _bits_of_texts(samples: list[dict]) -> list[float]:
    return [-nats / np.log(2) / count for nats, count in (sample["metrics"]["bits_per_byte"] for sample in samples)]


# ---- variants ----


def spreads(records: list[dict], samples_of_key, names: set[str]) -> list[dict]:
    """What the variants of these names do to each model, factor by factor and all together: rows of `scores.sensitivity`. JSON."""
    groups: dict[tuple, list[dict]] = {}
    for record in records:
        if record["task"] in names:
            groups.setdefault((record["model"], record["base"]), []).append(record)
    rows = []
    for (model, task), group in groups.items():
        loaded = {record["key"]: samples_of_key(record["key"]) for record in group}
        first = next(record for record in group if record["factor"] == "reference")
        metric = shown_metric(first["metrics"])
        for factor in ["all", *dict.fromkeys(record["factor"] for record in group if record is not first)]:
            chosen_ones = [first] + [record for record in group if record is not first and factor in ("all", record["factor"])]
            lists = [loaded[record["key"]] for record in chosen_ones]
            if any([(s["doc_id"], s["item"]) for s in one] != [(s["doc_id"], s["item"]) for s in lists[0]] for one in lists):
                raise Refusal(f"the variants of {task} were not asked the same items.")
            correct = [[s["metrics"][metric] for s in one] for one in lists]
            row = {"model": model, "task": task, "factor": factor, "metric": metric, "variants": [record["variant"] for record in chosen_ones]}
            row["changes"] = [scores.ratio(np.subtract(one, correct[0]), None, [s["cluster"] for s in lists[0]]) for one in correct[1:]]
            if all("meant" in s for one in lists for s in one):
                meant, options = [[s["meant"] for s in one] for one in lists], [s["options"] for s in lists[0]]
                row |= scores.sensitivity(correct, meant, options, [s["cluster"] for s in lists[0]])
                row["flips_of_correct"] = _flips_of_correct(np.array(correct))
            rows.append(row)
    return rows


def _flips_of_correct(correct: np.ndarray) -> float | None:
    """Of the items that are right as they are, the share that a variant gets wrong, on average."""
    right = correct[0] == 1
    return float((correct[1:, right] == 0).mean()) if right.any() and len(correct) > 1 else None


# ---- contamination ----


def contaminated(asked: list[EvalTask], records: list[dict], store: Store, prepared: str, limit: int | None, seed: int) -> list[dict]:
    """For each task the share of items that the training text holds in part, and each model's score with and without them. JSON."""
    from . import contamination

    places = {}
    for task in asked:
        for leaf, numbers in chosen(task, limit, seed).items():
            for number in numbers:
                places[f"{task.name}|{leaf}|{number}"] = _text_of(task.leaves[leaf], task.leaves[leaf].eval_docs[number])
    found = contamination.overlap(places, contamination.prepared_documents(prepared))
    rows = []
    for task in asked:
        shares = {name: share for name, share in found.items() if name.startswith(f"{task.name}|")}
        row = {"task": task.name, "prepared": Path(prepared).name, **contamination.report(shares), "models": {}}
        for record in records:
            if record["task"] == task.name:
                metric = shown_metric(record["metrics"])
                values = {f"{task.name}|{s['leaf']}|{s['doc_id']}": s["metrics"][metric] for s in store.samples(record["key"])}
                if metric == "bits_per_byte":
                    values = {name: -nats / np.log(2) / count for name, (nats, count) in values.items()}
                row["models"][record["model"]] = {"metric": metric, **contamination.split_scores(values, shares)}
        rows.append(row)
    return rows


def _text_of(task, item) -> str:
    """The words of an item: the question and its right answer, or the text."""
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return task.doc_to_target(item)
    target = task.doc_to_target(item)
    if task.config.doc_to_choice is not None and isinstance(target, int) and not task.multiple_input:
        target = (item.get("choices") if isinstance(item.get("choices"), list) else task.doc_to_choice(item))[target]
    question = item["question"] if "question" in item else task.doc_to_text(item)
    return f"{question} {target}"
