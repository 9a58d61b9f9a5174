"""Tasks by name: the embedded ones (embedded.py defines them), lm-eval's own on local data, and bits per byte of a
text.
"""

import difflib
import functools
import glob
import importlib.metadata
import importlib.util
import itertools
import json
import re
from pathlib import Path

from ...data.cutting import parts
from ...data.encodings import utf8_text
from ...data.formats import Skipped, TextFile, Unreadable, kind_of, skipped_lines
from ...data.inspection import absent
from ...data.row_formats import rows
from ...data.sources import inventory, resolve
from ...data.text_source import ReadOptions
from ...data.tokenizer import END_OF_TEXT
from ...distributed import print_main
from ...errors import Refusal
from ...files import read_json
from .. import metrics
from . import own
from .definition import DOCUMENT_CHARACTERS, EvalTask, bits_per_byte, examples_are_items, sample_texts
from .embedded import EMBEDDED

SAVED = "state.json"  # in the folder of a Dataset that `save_to_disk` wrote
METADATA = ("dataset_infos.json",)  # of a dataset's older versions, beside its files
BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}  # of `datasets`, by the ending of a split's files

# ---- by name ----


def build(
    names: list[str],
    task_data: dict[str, str],
    n_shots: dict[str, int],
    chat: bool,
    questions: dict[str, str] | None = None,
    include_path: str | None = None,
) -> list[EvalTask]:
    """EvalTasks of embedded and built-in tasks and groups, and of one's own. Raises Refusal for an unknown name or
    missing data.

    task_data: {built-in task: folder with its data}. n_shots: {task: number of few-shot examples}, "" for all tasks.
    chat: apply the model's chat template. questions: {name: JSONL file or folder}, tasks after `names`. include_path:
    folder with task definitions in lm-eval's format.
    """
    questions = questions or {}
    if include_path is not None and not Path(include_path).expanduser().is_dir():
        raise Refusal(f"--include_path {include_path} is no folder.")
    if unknown := set(task_data) - set(names):
        raise Refusal(f"--task_data {min(unknown)}=...: {min(unknown)} is not among --tasks ({', '.join(names)}).")
    if unknown := set(n_shots) - {"", *names, *questions}:
        raise Refusal(
            f"--num_fewshot {min(unknown)}={n_shots[min(unknown)]}: {min(unknown)} is not among --tasks"
            f" ({', '.join(names)})."
        )
    tasks = []
    for name in [*names, *questions]:
        requested = n_shots.get(name, n_shots.get(""))
        if name in questions:
            leaves = own.load(_free_name("questions", name, questions[name]), questions[name])
        elif name in EMBEDDED:
            leaves = {name: EMBEDDED[name]()}
        else:
            leaves = _builtin(_manager(name, include_path), name, task_data.get(name))
        for leaf, task in leaves.items():
            _set_examples(name, leaf, task, requested, name in n_shots)
        n_shot, is_own = (
            int(next(iter(leaves.values())).config.num_fewshot),
            name in questions or include_path is not None,
        )
        tasks.append(EvalTask(name, leaves, n_shot, name, chat=chat, own=is_own and name not in EMBEDDED))
    return tasks


def _set_examples(name: str, leaf: str, task, requested: int | None, by_name: bool) -> None:
    """Set the number of few-shot examples of a leaf of the task `name`: `requested`, or its own. by_name: it was
    requested for this task. Raises Refusal.
    """
    num_examples = requested if requested is not None else int(task.config.num_fewshot or 0)
    if num_examples and task.config.output_type == "loglikelihood_rolling":
        if by_name:
            raise Refusal(f"--num_fewshot {name}={num_examples}: {leaf} is text, which has no examples: leave it out.")
        print_main(f"examples  {leaf} is text and has none: --num_fewshot {num_examples} is for the other tasks")
        num_examples = 0
    task.set_config(key="num_fewshot", value=num_examples)
    if not num_examples:
        return
    has_own_examples = task.fewshot_cfg.split is not None or task.fewshot_cfg.samples
    if not (has_own_examples or task.has_training_docs() or (task.has_validation_docs() and task.has_test_docs())):
        raise Refusal(
            f"--num_fewshot {num_examples}: {leaf} has one split and no examples set aside, so an item's own"
            " answer could stand in its prompt. Use 0."
        )
    _leave_out_own_item(task)
    available = len(list(task.fewshot_docs()))
    # lm-eval draws one more where it leaves out the item itself, and where a task names neither of the two splits
    draws_one_more = task.fewshot_cfg.split is not None or task.fewshot_cfg.sampler == "default"
    available -= draws_one_more and task.fewshot_cfg.split == task.config.test_split
    if num_examples > available:
        raise Refusal(f"--num_fewshot {num_examples}: {leaf} has {available:,} few-shot examples: {available} at most.")


def _leave_out_own_item(task) -> None:
    """Name the split of a task's examples and that of its items as lm-eval wants them, if they are one split: it leaves
    out the item itself only where `fewshot_split` is `test_split`, and not where items come from `validation_split`, or
    examples from `training_split`.
    """
    if examples_are_items(task):
        task.fewshot_cfg.split = task.config.test_split = task.config.test_split or task.config.validation_split


def _free_name(flag: str, name: str, path: str) -> str:
    """A name that the user gives to a task. Raises Refusal for one that an embedded task has, or that is no name."""
    if name in EMBEDDED or not re.fullmatch(r"[\w.-]+", name):
        raise Refusal(
            f"--{flag} {name}={path}: choose another name, of letters, digits, dots and dashes, which no embedded task"
            " has."
        )
    return name


def _manager(name: str, include_path: str | None = None):
    """lm-eval's TaskManager for the one file that defines a task; for groups, and where no single file defines it, for
    all tasks (takes some seconds). What `include_path` defines comes before lm-eval's own.
    """
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        folder = str(Path(include_path).expanduser())
        if name in (manager := TaskManager(include_path=folder, include_defaults=False)).task_index:
            # a group may name tasks of lm-eval
            is_task = manager.task_index[name].kind.name in ("TASK", "PY_TASK")
            return manager if is_task else TaskManager(include_path=folder)
    defines_task = re.compile(rf"^task:\s*['\"]?{re.escape(name)}['\"]?\s*$", re.MULTILINE).search
    files = [path for path, text in _definition_files() if name in text and defines_task(text)]
    if len(files) == 1:
        manager = TaskManager(include_path=str(files[0].parent), include_defaults=False)
        if name in manager.task_index and manager.task_index[name].kind.name in ("TASK", "PY_TASK"):
            return manager
    return _whole_index()


@functools.cache
def _definition_files() -> list[tuple[Path, str]]:
    """(path, text) of every task definition that lm-eval contains."""
    root = Path(importlib.util.find_spec("lm_eval").submodule_search_locations[0]) / "tasks"
    return [(path, path.read_text(encoding="utf-8", errors="replace")) for path in sorted(root.rglob("*.yaml"))]


@functools.cache
def _whole_index():
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _builtin(manager, name: str, folder: str | None) -> dict:
    """{leaf: task} of a built-in task or group, on its own data or on a local copy in `folder`. Raises Refusal."""
    if name not in manager.task_index:
        close_matches = difflib.get_close_matches(name, [*EMBEDDED, *manager.all_tasks], 3, 0.5)
        raise Refusal(
            f"--tasks {name}: no such task{f'; near: {chr(44).join(close_matches)}' if close_matches else ''}."
            f" Embedded, without network: {', '.join(EMBEDDED)}."
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
        raise Refusal(f"--tasks {name} cannot be built: {' '.join(str(error).split())[:200]}") from None
    except (ConnectionError, FileNotFoundError, OSError, ValueError, KeyError, RuntimeError, DatasetsError) as error:
        metrics.check(name, {})
        # "An error occurred" is all that the other says
        cause = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error
        reason = f"it has no split {error}" if isinstance(error, KeyError) else " ".join(str(cause).split())[:200]
        hint = f"give a local copy of it: --task_data {name}=FOLDER"
        if folder:
            hint = (
                "the folder must hold its splits as SPLIT.jsonl, SPLIT.parquet, or as `save_to_disk` writes a"
                " DatasetDict"
            )
        raise Refusal(f"--tasks {name}: its data cannot be read ({reason}): {hint}.") from None


def _on_local_data(manager, name: str, folder: Path) -> dict:
    """A built-in task or group with `dataset_path` on a folder: a dataset's own layout, SPLIT.jsonl / SPLIT.parquet,
    also in shards, or what `save_to_disk` writes. Raises ValueError or OSError for files that cannot be its data.
    """
    import tempfile

    import yaml
    from lm_eval.tasks import TaskManager

    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder")
    folder = folder.absolute()
    saved = _saved_splits(folder)
    splits = saved or _named_splits(folder)
    for path in itertools.chain(*splits.values()):
        if problem := absent(str(path)):
            raise OSError(f"{path.name} is {problem}")
    entry = manager.task_index[name]
    with tempfile.TemporaryDirectory() as temporary:
        local = {"dataset_path": str(folder)}
        if saved or (splits and not (folder / "README.md").exists()):
            kind = "arrow" if saved else _kind_of_splits(splits)
            files: dict[str, list[str]] = {}
            for split, paths in splits.items():
                read = [str(path) if saved else _copy_valid_rows(path, Path(temporary)) for path in paths]
                files[split] = list(map(glob.escape, read))  # `datasets` reads globs
            local = {"dataset_path": kind, "dataset_name": None, "dataset_kwargs": {"data_files": files}}
        config = {"group": f"{name}_local", "task": [name], **local}
        if entry.kind.name in ("TASK", "PY_TASK"):
            config = {"include": str(entry.yaml_path), "task": name, **local}
        Path(temporary, "local.yaml").write_text(yaml.safe_dump(config))
        if "include" in config:
            return dict(TaskManager(include_path=temporary, include_defaults=False).load([name])["tasks"])
        return dict(TaskManager(include_path=temporary).load([config["group"]])["tasks"])


def _saved_splits(folder: Path) -> dict[str, list[Path]]:
    """{split: its .arrow files, in order} of a folder to which `save_to_disk` wrote a DatasetDict; {} of any other.
    Raises ValueError for one Dataset, whose split has no name.
    """
    if (folder / SAVED).exists():
        raise ValueError("`save_to_disk` wrote one Dataset there: save a DatasetDict, which names its splits")
    states = {path.parent: read_json(path) or {} for path in sorted(folder.glob(f"*/{SAVED}"))}
    return {
        split.name: [split / file["filename"] for file in state["_data_files"]]
        for split, state in states.items()
        if "_data_files" in state
    }


def _named_splits(folder: Path) -> dict[str, list[Path]]:
    """{split: its files, in order} of the files SPLIT.jsonl, SPLIT.json or SPLIT.parquet of a folder. The files of a
    split in shards are SPLIT-00000-of-00002.parquet and so on.
    """
    splits: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix in BUILDERS and path.name not in METADATA:
            splits.setdefault(path.stem.split("-")[0], []).append(path)
    return splits


def _kind_of_splits(splits: dict[str, list[Path]]) -> str:
    """The builder of `datasets` that reads the files of all splits. Raises ValueError for files of several kinds."""
    for paths in splits.values():
        if len({path.suffix for path in paths}) > 1:  # perhaps the same rows twice
            raise ValueError(f"{', '.join(path.name for path in paths)} are one split in files of several kinds")
    kinds = {BUILDERS[path.suffix] for paths in splits.values() for path in paths}
    if len(kinds) > 1:
        raise ValueError("some of its splits are parquet and others JSON")
    return kinds.pop()


def _copy_valid_rows(path: Path, copy_folder: Path) -> str:
    """Path of a jsonl or parquet split with only UTF-8 rows: the file itself, or a copy in `copy_folder` without the
    other rows, which are reported. Raises Refusal.
    """
    import pyarrow.parquet

    skipped, records = Skipped(), []
    if path.suffix == ".json":
        return str(path)
    for file_part in parts(TextFile(str(path), path.name, kind_of(str(path)))):
        text_columns = file_part.raw.schema.names if file_part.kind == "parquet" else ()
        # others may hold any bytes
        text_columns = {
            name for name in text_columns if str(file_part.raw.schema.field(name).type) in ("string", "large_string")
        }
        for number, record in rows(file_part):
            valid = _is_utf8(record, text_columns)
            records.append(record if valid else None)
            if not valid:
                skipped.add("not UTF-8", f"{path.name}:{number}")
    if not skipped.reasons:
        return str(path)
    for line in skipped_lines(skipped.reasons):
        print_main(f"not read  {line}")
    copy = copy_folder / path.name
    if path.suffix == ".parquet":
        table = pyarrow.parquet.read_table(path)
        pyarrow.parquet.write_table(table.filter(pyarrow.array([record is not None for record in records])), copy)
    else:
        copy.write_text(
            "".join(json.dumps(record) + "\n" for record in records if record is not None), encoding="utf-8"
        )
    return str(copy)


def _is_utf8(record: dict, text_columns: set[str]) -> bool:
    """Whether all text of a row is UTF-8. text_columns: its text columns, as far as the file declares them."""
    values = record.values()
    if any(isinstance(record[name], bytes) and utf8_text(record[name]) is None for name in text_columns) or any(
        isinstance(value, Unreadable) and value == "not UTF-8" for value in values
    ):
        return False
    return utf8_text(json.dumps(record, ensure_ascii=False, default=lambda value: "")) is not None


def text_task(name: str, path: str) -> EvalTask:
    """A task of bits per byte of local or Hub text: DOCUMENTS of its first 2,000, cut to DOCUMENT_CHARACTERS; what is
    read and skipped rows are reported. Raises Refusal.

    Plain text files are split at END_OF_TEXT for every tokenizer, so all models get the same items.
    """
    _free_name("texts", name, path)
    skipped = Skipped()
    try:
        source = resolve(path, options=ReadOptions(separator=END_OF_TEXT))
    except Refusal as refusal:
        raise Refusal(str(refusal).replace(f"--dataset {path}", f"--texts {name}={path}")) from None
    print_main(f"text      {name}: {inventory(source, hints=False)}")
    documents = source.documents(skipped)
    texts = []
    for document in itertools.islice(documents, 2000):
        if document.text[:DOCUMENT_CHARACTERS].isspace():
            skipped.add(f"blank in the first {DOCUMENT_CHARACTERS:,} characters", document.id)
        else:
            texts.append({"text": document.text, "document": document.id})
    if not texts:
        raise Refusal(
            f"--texts {name}={path} holds no text: {'; '.join(skipped_lines(skipped.reasons)) or 'no documents'}."
        )
    for line in skipped_lines(skipped.reasons):
        print_main(f"not read  {name}: {line}")
    return EvalTask(name, {name: bits_per_byte(name, sample_texts(texts, name))}, 0, name)
