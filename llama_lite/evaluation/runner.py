"""Runs evaluations and keeps one record per (model, task): a pair is stored as it ends and computed only once.

`results/KEY.json` holds the scores of one pair and its settings, `samples/KEY.jsonl` the answer to each item. KEY is a
digest of everything that decides the numbers: weights, tokenizer, prompts and data, number format, seed and harness.
Both files carry a digest: a pair that was altered or truncated since is computed again. `scores.csv`, `comparison.csv`
and the other tables are made from these files alone.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from model_card.report import items

from ..chat_format import rendering
from ..data.tokenizer import tokenizer_record
from ..digests import sha256
from ..distributed import print_main
from ..errors import Problems, Refusal
from ..files import read_json, write_json, write_text
from ..formatting import shortened
from ..kernels.probe import context_of
from ..models import loading
from ..models.references import fetch_weights, load_config
from . import estimates
from .resolve import Model
from .store import Store, chosen, harness_version, key_of, metrics_of, prompts_digest, samples_of, where_from
from .tasks.definition import EvalTask

# ---- evaluating ----


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings that all records of an evaluation share.

    dtype: of the weights ("float32" ...). batch_tokens: tokens per forward pass (None: by device). tokenizer_name: of
    another tokenizer than the model's. unsafe: generated code may be run.
    """

    dtype: str
    seed: int
    batch_tokens: int | None
    tokenizer_name: str | None
    unsafe: bool


def evaluate_model(
    store: Store,
    model: Model,
    tasks: list[tuple[EvalTask, int | None]],
    settings: Settings,
    on_record: Callable[[int, dict, bool], None],
    takes: Callable[[int], bool] = lambda position: True,
    on_progress: Callable[[int, float], None] = lambda position, fraction: None,
) -> dict[int, dict]:
    """{position: record} of a model for the (task, limit) pairs that `takes(position)` is true for: stored ones are
    reused, the others computed.

    Calls `on_progress(position, fraction)` after each batch of a pair, and `on_record(position, record, computed)`
    after the pair. The model is loaded only if something is to be computed. Raises Refusal.
    """
    tokenizer = model.tokenizer(settings.tokenizer_name)
    lm, records = None, {}
    for position, (task, limit) in enumerate(tasks):
        if not takes(position):
            continue
        if task.chat and not tokenizer.chat_template:
            raise Refusal(
                f"{model.name} has no chat format (its tokenizer has no chat template): leave out"
                " --apply_chat_template."
            )
        items = chosen(task, limit, settings.seed)
        key = _key(store, model, tokenizer, (task, limit), settings)
        record = _kept(store, key, task, model)
        if computed := record is None:
            lm = lm or _load(model, tokenizer, settings, [task for task, _ in tasks])
            lm.on_progress = functools.partial(on_progress, position)
            samples, num_truncated = _run_task(lm, task, items, settings)
            prefix_id = _prefix_id(tokenizer)
            record = _make_record(key, model, task, limit, settings, prefix_id, num_truncated, samples)
            store.save(key, record, samples)
        records[position] = record
        on_record(position, record, computed)
    return records


def _kept(store: Store, key: str, task: EvalTask, model: Model) -> dict | None:
    """The stored record of a pair, its statistics as they are today, from its answers; None where there is none, or
    where an earlier version kept what is no mean of items as one, which is reported. The record may spell the model, or
    where it is from, in another way, as `runs/demo/`, which it loses.
    """
    if (record := store.result(key)) is None:
        return None
    samples = store.samples(key)
    if pooled := estimates.pooled_in_kept(samples, task.leaves):
        print_main(
            f"WARNING   results/{key}: {', '.join(sorted(pooled))} is no mean of its items, as an earlier version kept"
            " it, so it is computed again"
        )
        return None
    if (named := record | {"model": model.name} | where_from(model)) != record:
        record = named
        store.save_record(key, record)
    return {**record, "metrics": metrics_of(samples)}


def check_answers(models: list[Model], work: list[list[tuple[EvalTask, int | None]]], confirmed: bool) -> None:
    """Raise Refusal, with all of it, for tasks whose answers leave no room for a prompt in a model's context, and for
    code that would be run and is not `confirmed`.
    """
    from .lm import no_room, too_long_answers

    problems, unsafe, without_room = Problems(), set(), {}
    for model, pairs in zip(models, work, strict=True):
        generating = [task for task, _ in pairs if task.generates]
        context = context_of(load_config(model.base)) or math.inf if generating else 0
        for task in generating:
            too_long = too_long_answers(task.leaves, context)
            for name, tokens in too_long.items():
                without_room.setdefault((name, tokens, context), []).append(model.name)
            if task.unsafe and not too_long:
                unsafe.add(task.name)
    for (name, tokens, context), names in without_room.items():
        more = f" and of {len(names) - 1} more models" if len(names) > 1 else ""
        problems.append(no_room(name, tokens, f"{names[0]}{more}", context))
    for name in sorted(unsafe if not confirmed else ()):
        problems.append(
            f"--tasks {name} runs code that a model wrote: add --confirm_run_unsafe_code (it runs in a sandbox; the log"
            " lists its protections)."
        )
    problems.end()


def kept_pairs(
    store: Store, models: list[Model], work: list[list[tuple[EvalTask, int | None]]], settings: Settings
) -> set[tuple[int, int]]:
    """The (model, task) pairs, as positions in `models` and in each model's `work`, whose results are there."""
    kept = set()
    for number, model in enumerate(models):
        if not store.has_results:
            break
        tokenizer = model.tokenizer(settings.tokenizer_name)
        for position, pair in enumerate(work[number]):
            if store.holds(_key(store, model, tokenizer, pair, settings)):
                kept.add((number, position))
    return kept


def _key(store: Store, model: Model, tokenizer, pair: tuple[EvalTask, int | None], settings: Settings) -> str:
    """The key of a (task, limit) pair of a model."""
    task, limit = pair
    tokenizer_sha = tokenizer_record(tokenizer)["sha256"]
    # prompts are the same for every model, except in a chat format
    chat_format = (tokenizer_sha, str(tokenizer.chat_template)) if task.chat else None
    prompts, digests = (task.name, limit, settings.seed, chat_format), store.digests
    if prompts not in digests:
        digests[prompts] = prompts_digest(task, chosen(task, limit, settings.seed), tokenizer, settings.seed)
    prefix_id = _prefix_id(tokenizer)
    digest = digests[prompts]
    # what earlier versions computed in another way
    if task.is_text and adds_begin(tokenizer):
        digest += " without a begin-of-text of the tokenizer's own"
    if task.generates and loading.generation_settings(model.base.folder):
        digest += " without the generation config of the model's authors"
    if task.counts_right_options:
        digest += " with the number of right options"
    return key_of(model, tokenizer_sha, settings.dtype, task, digest, settings.seed, limit, prefix_id)


def adds_begin(tokenizer) -> bool:
    """Whether a tokenizer puts its begin-of-text before every text."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def _prefix_id(tokenizer) -> int:
    """The id before a text without context: the tokenizer's begin-of-text, or else end-of-text."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def _run_task(lm, task: EvalTask, items: dict[str, list[int]], settings: Settings) -> tuple[list[dict], int]:
    """(sample records of a task's `items`, number of requests that were truncated); a line names the metrics that have
    no value per item. Raises Refusal where lm-eval leaves out a metric of the task.
    """
    from . import lm as evaluation_lm

    truncated_before = lm.truncated
    leaves = {leaf: task.leaves[leaf] for leaf in items}
    results = evaluation_lm.run(lm, leaves, items, settings.seed, task.chat, settings.unsafe)
    samples = samples_of(task, results)
    expected = {name for leaf in leaves.values() for name in leaf.aggregation()}
    pooled = {name for sample in samples for name in sample.get("pooled", ())}
    if missing := sorted(expected - pooled - {name for sample in samples for name in sample["metrics"]}):
        raise Refusal(
            f"{task.name}: lm-eval returned no {', '.join(missing)}. Its metric needs the network, or a package"
            " that is not here."
        )
    if not metrics_of(samples):
        raise Refusal(
            f"{task.name}: none of its metrics ({', '.join(sorted(expected))}) has a value for each item, so it has no"
            " interval and no pairs here. Use lm_eval for it."
        )
    if pooled:
        print_main(
            f"not shown {task.name}: {', '.join(sorted(pooled))}, which lm-eval computes from all items together: there"
            " is no value per item, and so no interval and no pair (lm_eval shows it)"
        )
    return samples, lm.truncated - truncated_before


def _make_record(
    key: str,
    model: Model,
    task: EvalTask,
    limit: int | None,
    settings: Settings,
    prefix_id: int,
    num_truncated: int,
    samples: list[dict],
) -> dict:
    """The record of one (model, task) pair: what was computed with which settings, and its metrics."""
    from .tasks import sandbox

    return {
        "step": model.step,
        "tokens": model.tokens,
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
        "prefix_id": prefix_id,
        "truncated": num_truncated,
        "harness": harness_version(),
        "sandbox": ", ".join(sandbox.protections()) if task.unsafe else None,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "chance": _chance_level(samples),
        "metrics": metrics_of(samples),
    }


def _chance_level(samples: list[dict]) -> float | None:
    """Expected accuracy of random guessing; None where a sample has no options, or it is not known how many of them are
    right.
    """
    if not all("options" in sample and sample.get("right", 1) is not None for sample in samples):
        return None
    return float(np.mean([sample.get("right", 1) / sample["options"] for sample in samples]))


def _load(model: Model, tokenizer, settings: Settings, tasks: list[EvalTask]):
    """A SharedContextLM of a model on the available device, its weights downloaded where they are still on the Hub; its
    begin, end and padding ids are set to the tokenizer's, and a difference is printed, as are settings of the authors
    that `tasks` do not follow. Raises Refusal for a task that the model cannot answer.
    """
    from .lm import SharedContextLM, check_generation, inference_device

    fetch_weights(model.base)
    loaded = loading.load_model(model.base, settings.dtype)
    loading.check_vocabulary(model.name, loaded.get_input_embeddings().num_embeddings, tokenizer)
    loading.check_language_model(model.name, loaded)
    if mismatch := loading.align_special_tokens(loaded, tokenizer):
        print_main(f"{model.name}: {mismatch}")
    if model.adapter:
        loaded = loading.attach(loaded, model.adapter)
    lm = SharedContextLM(loaded.to(inference_device()).eval(), tokenizer, settings.batch_tokens)
    for task in tasks:
        check_generation(lm, task.leaves)
    left_out = loading.generation_settings(model.base.folder)
    if left_out and any(task.generates for task in tasks):
        listed = shortened(", ".join(f"{name} {value}" for name, value in left_out.items()))
        print_main(f"{model.name}: answers follow the task; its generation_config.json is left out ({listed})")
    described = any(task.chat and leaf.config.description for task in tasks for leaf in task.leaves.values())
    if described and not rendering.takes_system(tokenizer):
        print_main(f"{model.name}: its chat template has no system message: a task's description begins the first turn")
    return lm


def runs_of(models: list[Model]) -> dict[Path, list[str]]:
    """{run folder: names of its models} for models in local run folders: the run's own, its checkpoints, and adapters
    on them.
    """
    runs: dict[Path, list[str]] = {}
    for model in models:
        for located in (model.base, model.adapter):
            if located and located.repo is None:
                folder = located.folder.parent if located.folder.name.startswith("checkpoint-") else located.folder
                if (read_json(folder / "run.json") or {}).get("identity"):
                    runs.setdefault(folder, []).append(model.name)
    return runs


def copy_to_run(out: Path, run: Path, model_names: list[str]) -> None:
    """Copy an evaluation's tables to `RUN/evaluation/NAME`, where the run's card finds them, and its answers to items
    without their texts. `model_names`: those of its models that belong to the run.

    They replace those of the same evaluation, recognized by the path of its folder. Where another evaluation has NAME,
    they go to NAME-2 (-3 ...), and a line says so.
    """
    record, name = read_json(out / "run.json"), out.resolve().name
    path_digest = hashlib.sha256(os.fsencode(out.resolve())).hexdigest()[:16]
    folder = _path_in_run(run / "evaluation", name, path_digest, record)
    if folder.name != name:
        print_main(
            f"scores    go to {folder}: the folder of another evaluation has the name {name}, too, and its scores stay"
        )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for table in (
        "scores.json",
        "comparison.csv",
        "sensitivity.json",
        "robustness.json",
        "generalisation.json",
        "contamination.json",
    ):
        if (out / table).exists():
            shutil.copyfile(out / table, folder / table)
    if grids := items.grids(out, read_json(out / "scores.json")):
        write_text(folder / items.NAME, json.dumps(grids, separators=(",", ":")) + "\n")
    files = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    run_id = read_json(run / "run.json")["id"]
    of_run = {"id": run_id, "models": model_names, "folder": path_digest, "files": files}
    write_json(folder / "run.json", {**record, "of": of_run})


def _path_in_run(parent: Path, name: str, path_digest: str, record: dict) -> Path:
    """The folder under `parent` for an evaluation's tables. name: of the evaluation's folder; path_digest: digest of
    that folder's path, which distinguishes it from others; record: its run.json.
    """
    read = {path.parent: read_json(path) for path in sorted(parent.glob("*/run.json"))}
    records = {path: other for path, other in read.items() if isinstance(other, dict)}
    for path, other in records.items():
        source = other.get("of") or {}
        if source.get("folder") == path_digest:
            return path
        # records of earlier versions have no folder: there, the same evaluation is one with the same arguments
        if path.name == name and "folder" not in source and other.get("arguments") == record["arguments"]:
            return path
    names = itertools.chain([name], (f"{name}-{count}" for count in itertools.count(2)))
    return next(parent / candidate for candidate in names if parent / candidate not in records)
