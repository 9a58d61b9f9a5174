"""Publishes scores on main of the model's repository; each row names the revision and commit that was evaluated.

Published tags never move, so scores of a revision go to main, those of all revisions in one commit: all of them to
`scores.csv`, those of main's own model also to `.eval_results/*.yaml` and the card's model-index. A value that differs
from an older one is added; the older one stays. What others wrote stays: rows, columns, results in the card, and files
of the same name.
"""

import csv
import io
import tempfile
from pathlib import Path

import yaml

from model_card.records import metric_and_filter, shown_metric
from model_card.sections.evaluation import index_entry

from ..digests import sha256
from ..distributed import print_main
from ..errors import Refusal
from ..files import csv_text, read_json, write_text
from ..hub.client import (
    Reference,
    check_no_private_values,
    commit_of,
    fetch,
    files_of,
    foreign_files,
    refs_of,
    token,
)
from ..hub.commits import TRIES, commit_files, hub_errors_as_refusals
from ..hub.revision import RESULTS, REVISION, SCORES_TITLE, STEP, STEP_PREFIX, as_record
from ..models.references import Located
from .resolve import Model
from .store import COLUMNS, rows_of

TABLE = "scores.csv"
ERRORS = ("stderr", "low", "high", "clusters")  # of a score, as a version of this package estimates them
HARNESS_URL = "https://github.com/EleutherAI/lm-evaluation-harness"  # source of this project's results in a card


def push_scores(evaluated: list[tuple[Model, list[dict]]]) -> None:
    """Publish the scores of models, (model, its records) each, on main of their repositories (the adapter's, for a
    model with an adapter), in one commit per repository. Raises Refusal.

    A model in a folder has no repository; a message says so. Pushing the same scores again changes nothing.
    """
    groups: dict[str, list[tuple[Model, list[dict]]]] = {}
    for model, records in evaluated:
        if (repo := _located(model).repo) is None:
            print_main(f"hub       {model.name} is a folder: its scores stay here")
        else:
            groups.setdefault(repo, []).append((model, records))
    if groups and token() is None:
        raise Refusal("--push_to_hub: no token: run `hf auth login`, or set HF_TOKEN.")
    for repo, group in groups.items():
        with hub_errors_as_refusals(f"--push_to_hub {repo}", "The scores are kept here; run the same command again."):
            if not any(_push(repo, group) for _ in range(TRIES)):
                raise Refusal(f"--push_to_hub {repo}: main kept changing. Run the same command again.")
        names = [model.name for model, _ in group]
        which = names[0] if len(names) == 1 else f"{len(names)} models ({names[0]} to {names[-1]})"
        print_main(f"hub       scores of {which} are on main of {repo}")


def _located(model: Model) -> Located:
    """What the scores of a model are of: its adapter, or else the model itself."""
    return model.adapter or model.base


def _push(repo: str, group: list[tuple[Model, list[dict]]]) -> bool:
    """One try: a commit with the scores of all models of a repository; False when main moved meanwhile. Raises
    Refusal and the client's errors.
    """
    head = commit_of(Reference(repo, "main"))
    entries = files_of(repo, head)
    _check_commits(repo, group)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        old_table = _read_text(repo, head, TABLE, folder, errors="replace") if TABLE in entries else ""
        if not is_own_table(old_table):
            raise Refusal(
                f"--push_to_hub {repo}: {TABLE} on its main is no table of this project, and is not written"
                " over. Give it another name there, and run the same command again. The scores are kept here."
            )
        rows = [row for model, records in group for record in records for row in _rows(repo, model, record)]
        files = {TABLE: merged(old_table, rows)}
        shown = {  # of main's own model, one of each task: the same files can be evaluated under two names
            record["task"]: record
            for model, records in group
            if _is_model_on_main(_located(model), head, entries, folder)
            for record in records
        }
        if shown:
            files |= eval_results(list(shown.values()), repo)
        if shown and "README.md" in entries:
            try:
                card = _read_text(repo, head, "README.md", folder)
                files["README.md"] = with_index(card, repo, list(shown.values()))
            except (ValueError, yaml.YAMLError) as error:
                print_main(
                    f"WARNING   the card of {repo} gets no scores: its metadata cannot be read"
                    f" ({' '.join(str(error).split())[:200]})"
                )
        return _commit(repo, head, files, group, folder)


def _commit(repo: str, head: str, files: dict[str, str], group: list[tuple[Model, list[dict]]], folder: Path) -> bool:
    """Commit those of `files` ({path: text}) that differ upon `head`, none where none does; a line names those that
    are somebody else's, which stay. False when main moved meanwhile. Raises Refusal and the client's errors.
    """
    written = {name: folder / "new" / name for name in files}
    for name, text in files.items():
        written[name].parent.mkdir(parents=True, exist_ok=True)
        write_text(written[name], text)
    check_no_private_values(written)
    merged_files = {name: path for name, path in written.items() if name in (TABLE, "README.md")}
    results = {name: path for name, path in written.items() if name not in merged_files}
    changed, foreign = foreign_files(repo, head, results, f"{SCORES_TITLE}.*")
    for name in foreign:
        print_main(f"hub       {name} on main of {repo} is somebody else's and stays: the score is in {TABLE}")
    revisions = list(dict.fromkeys(_located(model).revision or "main" for model, _ in group))
    title = f"{SCORES_TITLE}{revisions[0] if len(revisions) == 1 else f'{len(revisions)} revisions'}"
    return commit_files(repo, merged_files | changed, title, head)


def _read_text(repo: str, head: str, name: str, folder: Path, errors: str = "strict") -> str:
    """The text of a file of main."""
    return fetch(Reference(repo, "main"), head, name, folder).read_text(encoding="utf-8", errors=errors)


def _rows(repo: str, model: Model, record: dict) -> list[dict]:
    """Rows of `scores.csv` of a record: the model is its repository, a base in a folder the folder's name."""
    base = {"base_model": model.base.folder.name} if model.adapter and not model.base.repo else {}
    return rows_of({**record, "model": repo, **base})


def _check_commits(repo: str, group: list[tuple[Model, list[dict]]]) -> None:
    """Raise Refusal when scores were computed on another commit than their revision has now. Tags `step-N` alone are
    compared: they do not move.
    """
    tags = refs_of(repo)[1]
    for model, records in group:
        revision, current_commit = _located(model).revision, None
        if revision and revision.startswith(STEP_PREFIX):
            tagged = tags.get(revision) if STEP.fullmatch(revision) else None
            current_commit = tagged or commit_of(Reference(repo, revision))
        for record in records:
            if record["commit"] is None or (current_commit and record["commit"] != current_commit):
                raise Refusal(
                    f"--push_to_hub: the scores of {record['model']} on {record['task']} are of commit"
                    f" {record['commit']}, and {repo}@{revision or 'main'} is {current_commit or 'another'} now:"
                    " evaluate again in another --output_dir."
                )


def _is_model_on_main(located: Located, head: str, entries: dict, folder: Path) -> bool:
    """Whether the evaluated files are those of main."""
    weights = [name for name in entries if name in ("model.safetensors", "adapter_model.safetensors")]
    if not weights:
        return False
    name, record = weights[0], as_record(read_json(located.folder / REVISION))
    recorded = record["files"] if record else located.remote_weights.files if located.remote_weights else {}
    entry, path = entries[name], located.folder / name
    local_sha = recorded[name]["sha256"] if name in recorded else sha256(path) if path.exists() else None
    main_sha = entry.lfs.sha256 if entry.lfs else sha256(fetch(Reference(located.repo, "main"), head, name, folder))
    return local_sha == main_sha


def is_own_table(text: str) -> bool:
    """Whether a text is a `scores.csv` of this project (others may have added rows and columns), or empty."""
    table = csv.DictReader(io.StringIO(text))
    try:
        list(table)
    except csv.Error:
        return False
    return not text.strip() or {"model", "revision", "commit", "metric", "value"} <= set(table.fieldnames or ())


def merged(old_table: str, rows: list[dict]) -> str:
    """The text of `scores.csv` with rows added that it does not contain yet; a row that differs in its interval alone
    replaces the one that is there. Columns that others added stay, last.
    """
    table = csv.DictReader(io.StringIO(old_table))
    table_rows = list(table)
    columns = [*COLUMNS, *(name for name in table.fieldnames or () if name and name not in COLUMNS)]
    positions = {_identity(row): position for position, row in enumerate(table_rows)}
    for row in rows:
        row = {name: "" if row.get(name) is None else str(row[name]) for name in COLUMNS}
        position = positions.setdefault(_identity(row), len(table_rows))
        if position == len(table_rows):
            table_rows.append(row)
        elif any((table_rows[position].get(name) or "") != row[name] for name in ERRORS):
            table_rows[position] = {**table_rows[position], **row}
    return csv_text(columns, table_rows)


def _identity(row: dict) -> tuple:
    """What makes a row of `scores.csv` another one. Tables of earlier versions have no column `filter`."""
    columns = {**row, "filter": row.get("filter") or "none"}
    return tuple(columns.get(name) or "" for name in COLUMNS if name not in ("date", *ERRORS))


def eval_results(records: list[dict], repo: str) -> dict[str, str]:
    """{path: text} of `.eval_results/TASK.yaml` in the Hub's format, for the tasks whose data is a dataset on the
    Hub.
    """
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    files = {}
    for record in records:
        if record.get("dataset"):
            metric = shown_metric(record["metrics"])
            value = record["metrics"][metric]
            sample = f" (a sample, --limit {record['limit']})" if record.get("limit") else ""
            interval = "no 95 % interval"
            if value.get("low") is not None:
                interval = f"95 % interval {value['low']:.4f} to {value['high']:.4f}"
            notes = (
                f"{metric}, {record['n_shot']} examples, n {value['n']}{sample}, {interval}, standard error"
                f" {value['stderr']}, {record['dtype']}, {record['harness']}, commit {record['commit']}"
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
    """A card with the scores in its model-index. Results of other tasks, and those that others added, stay. Raises
    ValueError or yaml.YAMLError for malformed metadata.
    """
    from huggingface_hub import RepoCard

    parsed = RepoCard(card)  # its model-index as it is; ModelCard would join results of others with these
    index = parsed.data.get("model-index") or [{"name": repo.split("/")[-1], "results": []}]
    if not (isinstance(index, list) and all(isinstance(m, dict) and isinstance(m.get("results"), list) for m in index)):
        raise ValueError("its model-index is not a list of models with results")
    results = [_index_result(record) for record in records]
    names = {result["dataset"]["name"] for result in results}
    index[0]["results"] = [
        *(result for result in index[0]["results"] if not _is_own_result(result, names)),
        *results,
    ]
    parsed.data["model-index"] = index
    return str(parsed)


def _index_result(record: dict) -> dict:
    """The score of a record as a result of a model-index."""
    from huggingface_hub.repocard_data import eval_results_to_model_index

    key = shown_metric(record["metrics"])
    metric, filter_name = metric_and_filter(key)
    row = {**record, **record["metrics"][key], "metric": metric, "filter": filter_name}
    entry = index_entry(row, record.get("dataset") or record["task"])
    return eval_results_to_model_index("", [entry])[0]["results"][0]


def _is_own_result(result: object, tasks: set[str]) -> bool:
    """Whether a result of a model-index is this project's, of one of the `tasks`."""
    try:
        return result["dataset"]["name"] in tasks and result["source"]["url"] == HARNESS_URL
    except (KeyError, TypeError):
        return False
