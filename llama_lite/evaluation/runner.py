"""Evaluations as records: each (model, task) is kept as it ends, is never computed twice, and never mixed with another.

`results/KEY.json` holds the scores of one pair and what they are of, `samples/KEY.jsonl` what each item was answered.
KEY is a digest of everything that decides the numbers: weights, tokenizer, prompts and data, number format, seed and
harness. Both are sealed by sha256: a pair that was altered or cut since is computed again. `scores.csv`,
`comparison.csv` and the rest are made from these files alone.
"""

import dataclasses
import hashlib
import itertools
import os
import shutil
import time
from pathlib import Path

import numpy as np

from ..data.tokenizer import tokenizer_record
from ..distributed import print_main
from ..errors import Refusal
from ..files import read_json, sha256, write_json
from ..models import loading
from .resolve import Model
from .store import Store, chosen, harness_version, key_of, metrics_of, prompts_digest, samples_of, where_from
from .tasks.definition import EvalTask

# ---- asking ----


@dataclasses.dataclass(frozen=True)
class Settings:
    """How models are asked: what every record of an evaluation has in common."""

    dtype: str
    seed: int
    batch_tokens: int | None
    tokenizer_name: str | None
    unsafe: bool


def evaluate_model(
    store: Store, model: Model, tasks: list[tuple[EvalTask, int | None]], settings: Settings, done
) -> list[dict]:
    """The records of a model for (task, limit) pairs: those that are there, and the others computed. `done(record,
    fresh)` after each.

    The model is loaded only if something is to be computed, and let go of afterwards. Raises Refusal.
    """
    from . import lm as evaluation_lm
    from .tasks import sandbox

    digests = store.digests
    tokenizer = model.tokenizer(settings.tokenizer_name)
    sha, prefix = (
        tokenizer_record(tokenizer)["sha256"],
        (tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id),
    )
    lm, records = None, []
    for task, limit in tasks:
        if task.chat and not tokenizer.chat_template:
            raise Refusal(
                f"{model.name} has no chat format (its tokenizer has no chat template): leave out"
                " --apply_chat_template."
            )
        items = chosen(task, limit, settings.seed)
        prompts = (
            task.name,
            limit,
            settings.seed,
            (sha, str(tokenizer.chat_template)) if task.chat else None,
        )  # the same for every model, but for a chat format
        if prompts not in digests:
            digests[prompts] = prompts_digest(task, items, tokenizer, settings.seed)
        key = key_of(model, sha, settings.dtype, task, digests[prompts], settings.seed, limit, prefix)
        record = store.result(key)
        if fresh := record is None:
            lm = lm or _load(model, tokenizer, settings)
            before = lm.truncated
            found = evaluation_lm.run(
                lm, {leaf: task.leaves[leaf] for leaf in items}, items, settings.seed, task.chat, settings.unsafe
            )
            samples = samples_of(task, found)
            metrics = metrics_of(samples)
            wanted = {name for leaf in items for name in task.leaves[leaf].aggregation()}
            if missing := sorted(wanted - {name for sample in samples for name in sample["metrics"]}):
                raise Refusal(
                    f"{task.name}: lm-eval returned no {', '.join(missing)}. Its metric needs the network, or a package"
                    " that is not here."
                )
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
                "harness": harness_version(),
                "sandbox": ", ".join(sandbox.protections()) if task.unsafe else None,
                "date": time.strftime("%Y-%m-%d", time.gmtime()),
                "chance": (
                    float(np.mean([1 / sample["options"] for sample in samples]))
                    if all("options" in sample for sample in samples)
                    else None
                ),
                "metrics": metrics,
            }
            store.save(key, record, samples)
        records.append(record)
        done(record, fresh)
    return records


def _load(model: Model, tokenizer, settings: Settings):
    """A SharedContextLM of a model; its begin, end and padding ids are mended to the tokenizer's, which is said."""
    import torch

    from .lm import SharedContextLM

    loaded = loading.load_model(model.base, settings.dtype)
    loading.check_vocabulary(model.name, loaded.get_input_embeddings().num_embeddings, tokenizer)
    loading.check_language_model(model.name, loaded)
    if said := loading.align_special_tokens(loaded, tokenizer):
        print_main(f"{model.name}: {said}")
    if model.adapter:
        loaded = loading.attach(loaded, model.adapter)
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return SharedContextLM(loaded.to(device).eval(), tokenizer, settings.batch_tokens)


def runs_of(found: list[Model]) -> dict[Path, list[str]]:
    """{run folder: names of its models} of those that are in folders of this machine: the run's own, its checkpoints',
    and adapters on them.
    """
    runs: dict[Path, list[str]] = {}
    for model in found:
        for located in (model.base, model.adapter):
            if located and located.repo is None:
                folder = located.folder.parent if located.folder.name.startswith("checkpoint-") else located.folder
                if (read_json(folder / "run.json") or {}).get("identity"):
                    runs.setdefault(folder, []).append(model.name)
    return runs


def copy_to_run(out: Path, run: Path, own: list[str]) -> None:
    """Put an evaluation's tables into `RUN/evaluation/NAME`, where the run's card finds them; `own`: which of its
    models are the run's.

    They replace those of the same evaluation, told by the path of its folder. Where another one has NAME, they go to
    NAME-2 (-3 ...), which is said.
    """
    record, name = read_json(out / "run.json"), out.resolve().name
    folder = hashlib.sha256(os.fsencode(out.resolve())).hexdigest()[:16]
    path = _path_in_run(run / "evaluation", name, folder, record)
    if path.name != name:
        print_main(
            f"scores    go to {path}: the folder of another evaluation has the name {name}, too, and its scores stay"
        )
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    for table in (
        "scores.json",
        "comparison.csv",
        "sensitivity.json",
        "robustness.json",
        "generalisation.json",
        "contamination.json",
    ):
        if (out / table).exists():
            shutil.copyfile(out / table, path / table)
    files = {table.name: sha256(table) for table in sorted(path.iterdir())}
    of = {"id": read_json(run / "run.json")["id"], "models": own, "folder": folder, "files": files}
    write_json(path / "run.json", {**record, "of": of})


def _path_in_run(parent: Path, name: str, folder: str, record: dict) -> Path:
    """Where under `parent` an evaluation's tables belong. name: of its folder; folder: digest of that folder's path,
    which tells it from others; record: its run.json.
    """
    kept = {path.parent: read_json(path) for path in sorted(parent.glob("*/run.json"))}
    of = {path: one.get("of") or {} for path, one in kept.items() if isinstance(one, dict)}
    for path, known in of.items():
        if known.get("folder") == folder:
            return path
        # Of earlier versions, which kept no folder: the same evaluation is one that asks the same of the same models.
        if path.name == name and "folder" not in known and kept[path].get("arguments") == record["arguments"]:
            return path
    names = itertools.chain([name], (f"{name}-{count}" for count in itertools.count(2)))
    return next(parent / one for one in names if parent / one not in of)
