"""Scores on the Hub: on main of the model's repository, each row naming the revision and commit that it was computed
on.

Published tags never move, so scores of a revision go to main: `scores.csv` for all of them, `.eval_results/*.yaml` and
the card's model-index for main's own model only. A value that differs from an older one is added, and the older one
stays.
"""

import csv
import io
import tempfile
from pathlib import Path

import yaml

from model_card.records import shown_metric

from ..distributed import print_main
from ..errors import Refusal
from ..files import csv_text, read_json, write_text
from ..hub.client import (
    HubPermissionError,
    HubUnavailable,
    Reference,
    commit_of,
    fetch,
    files_of,
    nothing_private,
    token,
    translated,
)
from ..hub.revision import REVISION, as_record
from .resolve import Model
from .store import COLUMNS, rows_of

TABLE, RESULTS = "scores.csv", ".eval_results"

TRIES = 5  # when somebody else writes to main meanwhile


def push_scores(model: Model, records: list[dict]) -> None:
    """Put the scores of a model on main of its repository (the adapter's, where there is one). Raises Refusal.

    A model in a folder has no repository, and that is said. Pushing the same scores again changes nothing.
    """
    located = model.adapter or model.base
    if located.repo is None:
        print_main(f"hub       {model.name} is a folder: its scores stay here")
        return
    if token() is None:
        raise Refusal("--push_to_hub: no token: run `hf auth login`, or set HF_TOKEN.")
    try:
        for _ in range(TRIES):
            if _push(located, model, records):
                return
    except (HubUnavailable, HubPermissionError) as error:
        raise Refusal(
            f"--push_to_hub {located.repo}: {error}. The scores are kept here; run the same command again."
        ) from None
    raise Refusal(f"--push_to_hub {located.repo}: main kept changing. Run the same command again.")


def _push(located, model: Model, records: list[dict]) -> bool:
    """One try; False when main moved meanwhile."""
    from huggingface_hub import CommitOperationAdd, HfApi

    head = commit_of(Reference(located.repo, "main"))
    there = files_of(located.repo, head)
    _of_what_is_published(located, records, head, there)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        old = (
            fetch(Reference(located.repo, "main"), head, TABLE, folder).read_text(encoding="utf-8", errors="replace")
            if TABLE in there
            else ""
        )
        named = {"model": str(located.repo)} | (
            {"base_model": model.base.folder.name} if model.adapter and not model.base.repo else {}
        )
        files = {TABLE: merged(old, [row for record in records for row in rows_of({**record, **named})])}
        if _is_mains(located, head, there, folder):
            files |= eval_results(records, located.repo)
            if "README.md" in there:
                try:
                    card = fetch(Reference(located.repo, "main"), head, "README.md", folder).read_text(encoding="utf-8")
                    files["README.md"] = with_index(card, located.repo, records)
                except (ValueError, yaml.YAMLError) as error:
                    print_main(
                        f"WARNING   the card of {located.repo} stays without scores: its metadata cannot be read"
                        f" ({' '.join(str(error).split())[:200]})"
                    )
        written = {name: folder / "new" / name for name in files}
        for name, text in files.items():
            written[name].parent.mkdir(parents=True, exist_ok=True)
            write_text(written[name], text)
        nothing_private(written)
        operations = [CommitOperationAdd(name, str(path)) for name, path in written.items()]
        title = f"Scores of {located.revision or 'main'}"
        try:
            HfApi().create_commit(located.repo, operations, commit_message=title, revision="main", parent_commit=head)
        except Exception as error:  # the client raises its own, httpx2's, ValueError and OSError
            if getattr(getattr(error, "response", None), "status_code", None) == 412:
                return False
            raise translated(error) from None
    print_main(f"hub       scores of {model.name} are on main of {located.repo}")
    return True


def _of_what_is_published(located, records: list[dict], head: str, there: dict) -> None:
    """Raise Refusal when the scores are of other files than the revision has now."""
    now = commit_of(Reference(located.repo, located.revision)) if located.revision else head
    for record in records:
        if record["commit"] is None or (
            located.revision and located.revision.startswith("step-") and record["commit"] != now
        ):
            raise Refusal(
                f"--push_to_hub: the scores of {record['model']} on {record['task']} are of commit {record['commit']},"
                f" and {located.repo}@{located.revision} is {now} now: evaluate again in another --output_dir."
            )


def _is_mains(located, head: str, there: dict, folder: Path) -> bool:
    """Whether the evaluated files are those of main."""
    weights = [name for name in there if name in ("model.safetensors", "adapter_model.safetensors")]
    if not weights:
        return False
    own = as_record(read_json(located.folder / REVISION))
    entry = there[weights[0]]
    from ..files import sha256

    path = located.folder / weights[0]
    ours = own["files"][weights[0]]["sha256"] if own else sha256(path) if path.exists() else None
    theirs = entry.lfs.sha256 if entry.lfs else sha256(fetch(Reference(located.repo, "main"), head, weights[0], folder))
    return ours == theirs


def merged(old: str, rows: list[dict]) -> str:
    """The text of `scores.csv` with rows added; a row that is there is not there twice."""
    kept = list(csv.DictReader(io.StringIO(old)))
    seen = {_identity(row) for row in kept}
    for row in rows:
        row = {name: "" if row.get(name) is None else str(row[name]) for name in COLUMNS}
        if _identity(row) not in seen:
            seen.add(_identity(row))
            kept.append(row)
    return csv_text(COLUMNS, kept)


def _identity(row: dict) -> tuple:
    return tuple(row.get(name, "") for name in COLUMNS if name != "date")


def eval_results(records: list[dict], repo: str) -> dict[str, str]:
    """`.eval_results/TASK.yaml` in the Hub's own form, for the tasks whose data is a dataset of the Hub."""
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    files = {}
    for record in records:
        if record.get("dataset"):
            metric = shown_metric(record["metrics"])
            value = record["metrics"][metric]
            notes = (
                f"{metric}, {record['n_shot']} examples, n {value['n']}, standard error {value['stderr']},"
                f" {record['dtype']}, {record['harness']}, commit {record['commit']}"
            )
            entry = EvalResultEntry(
                dataset_id=record["dataset"],
                task_id=record["task"],
                value=value["value"],
                date=record["date"],
                notes=notes,
            )
            files[f"{RESULTS}/{record['task']}.yaml"] = yaml.safe_dump(
                eval_result_entries_to_yaml([entry]), sort_keys=False
            )
    return files


def with_index(card: str, repo: str, records: list[dict]) -> str:
    """A card whose model-index has the scores; results of other tasks in it stay."""
    from huggingface_hub import EvalResult, ModelCard

    parsed = ModelCard(card, ignore_metadata_errors=True)
    parsed.data.model_name = parsed.data.model_name or repo.split("/")[-1]
    new = []
    for record in records:
        metric = shown_metric(record["metrics"])
        new.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=record.get("dataset") or record["task"],
                dataset_name=record["task"],
                metric_type=metric,
                metric_value=round(record["metrics"][metric]["value"], 6),
                metric_name=metric,
                source_name=record["harness"],
                source_url="https://github.com/EleutherAI/lm-evaluation-harness",
            )
        )
    names = {result.dataset_name for result in new}
    parsed.data.eval_results = [
        result for result in parsed.data.eval_results or [] if result.dataset_name not in names
    ] + new
    return str(parsed)
