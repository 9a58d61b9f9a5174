"""Tasks by name: the embedded ones, lm-eval's own on local data, and bits per byte of a text."""

import difflib
import functools
import glob
import importlib.metadata
import importlib.util
import itertools
import json
import re
from pathlib import Path

from ...data.formats import Skipped, TextFile, Unreadable, kind_of, parts, rows, skipped_lines, utf8_text
from ...data.sources import ReadOptions, absent, inventory, resolve
from ...data.tokenizer import END_OF_TEXT
from ...distributed import print_main
from ...errors import Refusal
from .. import metrics
from .definition import EvalTask, bits_per_byte, sample_texts
from .embedded import EMBEDDED

# ---- by name ----


def build(names: list[str], task_data: dict[str, str], n_shots: dict[str, int], chat: bool) -> list[EvalTask]:
    """EvalTasks of embedded and built-in tasks and groups. Raises Refusal for a name or data that is not there, with
    what to do.

    `task_data` points a built-in task at a folder of its data; `n_shots`: few-shot examples by task, "" for all.
    """
    if unknown := set(task_data) - set(names):
        raise Refusal(f"--task_data {min(unknown)}=...: {min(unknown)} is not among --tasks ({', '.join(names)}).")
    if unknown := set(n_shots) - {"", *names}:
        raise Refusal(
            f"--num_fewshot {min(unknown)}={n_shots[min(unknown)]}: {min(unknown)} is not among --tasks"
            f" ({', '.join(names)})."
        )
    found = []
    for name in names:
        shots = n_shots.get(name, n_shots.get(""))
        leaves = {name: EMBEDDED[name]()} if name in EMBEDDED else _builtin(_manager(name), name, task_data.get(name))
        for leaf, task in leaves.items():
            wanted = shots if shots is not None else int(task.config.num_fewshot or 0)
            if wanted and task.config.output_type == "loglikelihood_rolling":
                if name in n_shots:
                    raise Refusal(
                        f"--num_fewshot {name}={wanted}: {leaf} is text, which has no examples: leave it out."
                    )
                print_main(f"examples  {leaf} is text and has none: --num_fewshot {wanted} is for the other tasks")
                wanted = 0
            task.set_config(key="num_fewshot", value=wanted)
            if not wanted:
                continue
            apart = task.fewshot_cfg.split is not None or task.fewshot_cfg.samples
            if not (apart or task.has_training_docs() or (task.has_validation_docs() and task.has_test_docs())):
                raise Refusal(
                    f"--num_fewshot {wanted}: {leaf} has one split and no examples set aside, so an item's own answer"
                    " could stand in its prompt. Use 0."
                )
            there = len(list(task.fewshot_docs()))
            there -= task.fewshot_cfg.split is not None and task.fewshot_cfg.split == (
                task.config.test_split or task.config.validation_split
            )
            if wanted > there:
                raise Refusal(f"--num_fewshot {wanted}: {leaf} has {there:,} examples to show: {there} at most.")
        found.append(EvalTask(name, leaves, int(next(iter(leaves.values())).config.num_fewshot), name, chat=chat))
    return found


def _manager(name: str):
    """lm-eval's index of the one file that defines a task; of all its tasks (some seconds) for groups and for what no
    single file defines.
    """
    from lm_eval.tasks import TaskManager

    own = re.compile(rf"^task:\s*['\"]?{re.escape(name)}['\"]?\s*$", re.MULTILINE).search
    files = [path for path, text in _texts() if name in text and own(text)]
    if len(files) == 1:
        near = TaskManager(include_path=str(files[0].parent), include_defaults=False)
        if name in near.task_index and near.task_index[name].kind.name in ("TASK", "PY_TASK"):
            return near
    return _whole_index()


@functools.cache
def _texts() -> list[tuple[Path, str]]:
    """(file, text) of every definition that comes with lm-eval."""
    root = Path(importlib.util.find_spec("lm_eval").submodule_search_locations[0]) / "tasks"
    return [(path, path.read_text(encoding="utf-8", errors="replace")) for path in sorted(root.rglob("*.yaml"))]


@functools.cache
def _whole_index():
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _builtin(manager, name: str, folder: str | None) -> dict:
    """{leaf: task} of a built-in task or group, on its own data or on a local copy in `folder`."""
    if name not in manager.task_index:
        near = difflib.get_close_matches(name, [*EMBEDDED, *manager.all_tasks], 3, 0.5)
        raise Refusal(
            f"--tasks {name}: no such task{f'; near: {chr(44).join(near)}' if near else ''}. Embedded, without network:"
            f" {', '.join(EMBEDDED)}."
        )
    if name.startswith("humaneval") or name.startswith("mbpp"):
        raise Refusal(
            f"--tasks {name} loads a metric from the Hub when it is read: use embedded_humaneval, the same 164"
            " problems, in a sandbox."
        )
    from datasets.exceptions import DatasetsError

    metrics.local_metrics()
    try:
        leaves = (
            dict(manager.load([name])["tasks"])
            if folder is None
            else _on_local_data(manager, name, Path(folder).expanduser())
        )
        metrics.check(name, leaves)
        return leaves
    except (ImportError, AttributeError, TypeError, SyntaxError) as error:
        metrics.check(name, {})
        raise Refusal(f"--tasks {name} cannot be made: {' '.join(str(error).split())[:200]}") from None
    except (ConnectionError, FileNotFoundError, OSError, ValueError, KeyError, RuntimeError, DatasetsError) as error:
        metrics.check(name, {})
        cause = (
            error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error
        )  # "An error occurred" is all that the other says
        reason = f"it has no split {error}" if isinstance(error, KeyError) else " ".join(str(cause).split())[:200]
        hint = f"give a local copy of it: --task_data {name}=FOLDER"
        if folder:
            hint = "its splits are wanted there, as SPLIT.jsonl, SPLIT.parquet, or as `save_to_disk` writes them"
        raise Refusal(f"--tasks {name}: its data cannot be read ({reason}): {hint}.") from None


def _on_local_data(manager, name: str, folder: Path) -> dict:
    """A built-in task or group with `dataset_path` on a folder: as `save_to_disk`, a dataset's own layout, or
    SPLIT.jsonl / SPLIT.parquet.
    """
    import tempfile

    import yaml
    from lm_eval.tasks import TaskManager

    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder")
    paths = [path for path in sorted(folder.iterdir()) if path.suffix in (".jsonl", ".json", ".parquet")]
    for path in paths:
        if why := absent(str(path)):
            raise OSError(f"{path.name} is {why}")
    entry = manager.task_index[name]
    with tempfile.TemporaryDirectory() as temporary:
        local = {"dataset_path": str(folder.resolve())}
        if paths and not (folder / "README.md").exists():
            kind = "parquet" if {path.suffix for path in paths} == {".parquet"} else "json"
            files = {
                path.stem.split("-")[0]: glob.escape(_without_odd_rows(path.resolve(), Path(temporary)))
                for path in paths
            }  # `datasets` reads globs
            local = {"dataset_path": kind, "dataset_name": None, "dataset_kwargs": {"data_files": files}}
        config = {"group": f"{name}_local", "task": [name], **local}
        if entry.kind.name in ("TASK", "PY_TASK"):
            config = {"include": str(entry.yaml_path), "task": name, **local}
        Path(temporary, "local.yaml").write_text(yaml.safe_dump(config))
        if "include" in config:
            return dict(TaskManager(include_path=temporary, include_defaults=False).load([name])["tasks"])
        return dict(TaskManager(include_path=temporary).load([config["group"]])["tasks"])


def _without_odd_rows(path: Path, aside: Path) -> str:
    """A split of jsonl or parquet whose rows are all UTF-8: the file itself, or a copy in `aside` less the others,
    which are said. Raises Refusal.
    """
    import pyarrow.parquet

    skipped, records = Skipped(), []
    if path.suffix == ".json":
        return str(path)
    for part in parts(TextFile(str(path), path.name, kind_of(str(path)))):
        texts = part.raw.schema.names if part.kind == "parquet" else ()
        texts = {
            name for name in texts if str(part.raw.schema.field(name).type) in ("string", "large_string")
        }  # others may hold any bytes
        for number, record in rows(part):
            good = _is_utf8(record, texts)
            records.append(record if good else None)
            if not good:
                skipped.add("not UTF-8", f"{path.name}:{number}")
    if not skipped.reasons:
        return str(path)
    for line in skipped_lines(skipped.reasons):
        print_main(f"not read  {line}")
    copy = aside / path.name
    if path.suffix == ".parquet":
        table = pyarrow.parquet.read_table(path)
        pyarrow.parquet.write_table(table.filter(pyarrow.array([record is not None for record in records])), copy)
    else:
        copy.write_text(
            "".join(json.dumps(record) + "\n" for record in records if record is not None), encoding="utf-8"
        )
    return str(copy)


def _is_utf8(record: dict, texts: set[str]) -> bool:
    """Whether all text of a row is UTF-8. `texts`: its columns of text, where the file says so."""
    values = record.values()
    if any(isinstance(record[name], bytes) and utf8_text(record[name]) is None for name in texts) or any(
        isinstance(value, Unreadable) and value == "not UTF-8" for value in values
    ):
        return False
    return utf8_text(json.dumps(record, ensure_ascii=False, default=lambda value: "")) is not None


def text_task(name: str, path: str) -> EvalTask:
    """Bits per byte of local or Hub text: DOCUMENTS of its first 2,000, cut to DOCUMENT_CHARACTERS; says what is
    read and which rows are none. Raises Refusal.

    A file of plain text is divided at END_OF_TEXT, whatever the models' tokenizers are: all are asked the same.
    """
    if name in EMBEDDED or not re.fullmatch(r"[\w.-]+", name):
        raise Refusal(
            f"--texts {name}={path}: choose another name, of letters, digits, dots and dashes, which no embedded task"
            " has."
        )
    skipped = Skipped()
    try:
        source = resolve(path, options=ReadOptions(separator=END_OF_TEXT))
    except Refusal as refusal:
        raise Refusal(str(refusal).replace(f"--dataset {path}", f"--texts {name}={path}")) from None
    print_main(f"text      {name}: {inventory(source, hints=False)}")
    documents = source.documents(skipped)
    found = [{"text": document.text, "document": document.id} for document in itertools.islice(documents, 2000)]
    if not found:
        raise Refusal(
            f"--texts {name}={path} holds no text: {'; '.join(skipped_lines(skipped.reasons)) or 'no documents'}."
        )
    for line in skipped_lines(skipped.reasons):
        print_main(f"not read  {name}: {line}")
    return EvalTask(name, {name: bits_per_byte(name, sample_texts(found, name))}, 0, name)
