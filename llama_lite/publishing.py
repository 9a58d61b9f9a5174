"""What a published revision holds, and how every checkpoint gets to the Hub, in order, once, whatever happens.

A checkpoint that is to be published is hard-linked into `queue/step-NNNNNN` of the run folder, so that rotation cannot
take it away. One thread of rank 0 works the queue off: export, one commit on the branch `checkpoints`, read back, tag.
A tag appears only when its revision is whole, and no revision is ever written over. What others commit, tag or edit in the
repository stays, and keeps no revision back: ours is the commit whose tree is ours, and it gets the first tag that is free.
"""

import contextlib
import csv
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import threading
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, GenerationConfig

from model_card import card
from model_card.card import YOURS, renew

from . import checkpoints, runs
from .arguments import Refusal
from .hub import STEP, NoAnswer, NotAllowed, Reference, fetch, files_of, nothing_private, reason, refs_of, token, translated
from .plan import is_published
from .runs import append_jsonl, csv_text, flush_folder, read_json, read_jsonl, say, sha256, write_json, write_text
from .tokenizers import read_tokenizer, vocabulary_size

FORMAT = "llama_lite.revision/1"
BRANCH, INDEX, REVISION, STATE = "checkpoints", "checkpoints.csv", "revision.json", "training_state"
ADAPTER = ("adapter_model.safetensors", "adapter_config.json", "base.json")  # of a checkpoint, as they are in its revision
COLUMNS = ("step", "tokens", "loss", "eval_loss", "revision", "commit")
RECORDS = ("README.md", f"{STATE}/{checkpoints.MANIFEST}", f"{STATE}/trainer_state.json")  # hold times: two equal runs differ in them
TITLE = "Checkpoint of step "  # of our commits on the branch
COVER = "Card"  # of our commits of card and figures on main
NO_CARD = "No card can be made: "
TAKEN = "somebody else made the tag {tag} meanwhile: the next try takes another name"
MOST_TAGS = 100  # of a repository, newest first, whose records are looked at
FIRST_WAIT, LONGEST_WAIT = 1.0, 300.0  # seconds between two tries


# ---- what a revision holds ----


def export_model(checkpoint: Path, folder: Path, dtype: str) -> None:
    """Write the model of a checkpoint in `dtype`, its vocabulary cut to the tokenizer's (rows beyond it were padding).

    Works on files alone, so that training goes on meanwhile. Same checkpoint, same bytes.
    """
    checkpoint, folder = Path(checkpoint), Path(folder)
    tokenizer = read_tokenizer(checkpoint)
    rows, end = vocabulary_size(tokenizer), tokenizer.eos_token_id
    begin = end if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    padding = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    tensors = {}
    for path in sorted(checkpoint.glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (a safetensors handle is no dict)
                tensor = file.get_tensor(name)
                tensors[name] = _cast(tensor[:rows] if name in checkpoints.VOCABULARY else tensor, getattr(torch, dtype))
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    config.use_cache, config.dtype = True, getattr(torch, dtype)
    config.bos_token_id, config.eos_token_id = begin, end
    if any(name in tensors for name in checkpoints.VOCABULARY):
        config.vocab_size = rows
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    GenerationConfig(bos_token_id=begin, eos_token_id=end, pad_token_id=padding).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    flush_folder(folder)


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor.to(dtype)` in parts too small for torch to share out between threads.

    This thread works beside the training. Were it to open an OpenMP team of its own, there would be more threads than
    cores, and libgomp would let the training's threads sleep between any two operations from then on.
    """
    result = torch.empty(tensor.shape, dtype=dtype)
    for source, target in zip(tensor.reshape(-1).split(2**14), result.view(-1).split(2**14), strict=True):
        target.copy_(source)
    return result


def tag_of(step: int, number: int = 1) -> str:
    """`step-000250`; `step-000250-2` and so on where that name is somebody else's."""
    return f"step-{step:06d}" + (f"-{number}" if number > 1 else "")


def step_of(tag: str) -> tuple[int, int] | None:
    """(step, number) of a tag that `tag_of` makes, as numbers; None for any other name, which is a person's."""
    match = STEP.fullmatch(tag)
    found = (int(match[1]), int(match[2] or 1)) if match else None
    return found if found and tag_of(*found) == tag else None


def run_id(identity: dict) -> str:
    """16 hex digits of what a run is when it first starts; it stays when `--allow_changes` alters the run."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def export_adapter(checkpoint: Path, folder: Path) -> None:
    """Write the adapter of a checkpoint: its weights (float32), config, base record and tokenizer. Same checkpoint, same bytes."""
    checkpoint, folder = Path(checkpoint), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ADAPTER:
        shutil.copyfile(checkpoint / name, folder / name)
    read_tokenizer(checkpoint).save_pretrained(folder)
    flush_folder(folder)


def is_export(checkpoint: Path, folder: Path) -> bool:
    """Whether the weights of a whole model or adapter in `folder` are what `export_model` or `export_adapter` makes of a verified checkpoint.

    Of an adapter and its records by the manifest's sha256, of a model tensor by tensor, in the dtype and with the vocabulary that it has there.
    """
    files = checkpoints.read_manifest(checkpoint)["files"]
    if "adapter_model.safetensors" in files:
        return all((folder / name).is_file() and sha256(folder / name) == files[name]["sha256"] for name in ADAPTER)
    if not (folder / "model.safetensors").is_file():
        return False
    with safe_open(folder / "model.safetensors", "pt") as model:
        left = set(model.keys())
        for path in sorted(checkpoint.glob("model*.safetensors")):
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 (a safetensors handle is no dict)
                    if name not in left:
                        return False
                    left.remove(name)
                    there, tensor = model.get_tensor(name), file.get_tensor(name)
                    tensor = tensor[: len(there)] if name in checkpoints.VOCABULARY else tensor
                    if not torch.equal(_cast(tensor, there.dtype), there):
                        return False
    return not left


def write_revision(entry: Path, run: str, export_to, state: bool, text: str) -> dict[str, Path]:
    """Export the queued checkpoint `entry` by `export_to(checkpoint, folder)`, write its card `text` and `revision.json`; returns {path in the revision: file}."""
    checkpoint, export = entry / "checkpoint", entry / "export"
    shutil.rmtree(export, ignore_errors=True)
    manifest = checkpoints.read_manifest(checkpoint)
    export_to(checkpoint, export)
    write_text(export / "README.md", text)
    files = {path.name: path for path in sorted(export.iterdir())}
    if state:
        files |= {f"{STATE}/{name}": checkpoint / name for name in [*manifest["files"], checkpoints.MANIFEST]}
    known = {f"{STATE}/{name}": record for name, record in manifest["files"].items()}
    record = {
        "format": FORMAT,
        "run": run,
        "step": manifest["step"],
        "tokens": manifest["tokens"],
        "identity": manifest["identity"],
        "files": {name: known.get(name) or {"size": path.stat().st_size, "sha256": sha256(path)} for name, path in files.items()},
    }
    write_json(export / REVISION, record)
    return {**files, REVISION: export / REVISION}


def as_record(value) -> dict | None:
    """A `revision.json` of this project, or None for JSON of any other kind."""
    whole = checkpoints.well_formed(value) and value.get("format") == FORMAT and isinstance(value.get("run"), str)
    return value if whole else None


def is_final(manifest: dict) -> bool:
    """Whether a checkpoint is the last one of its run."""
    return manifest["step"] >= manifest["identity"]["hyperparameters"]["max_steps"]


def same_content(first: dict, second: dict) -> bool:
    """Whether two `revision.json` mean the same revision: every file but the records that hold times."""

    def content(record):
        return record["step"], {name: file["sha256"] for name, file in record["files"].items() if name not in RECORDS}

    return content(first) == content(second)


# ---- one revision to the Hub ----


class Repository:
    """One run's model repository. Its methods raise Refusal, NotAllowed or NoAnswer, and can be called again."""

    def __init__(self, repo: str, private: bool | None, run: str):
        self.repo, self.private, self.run = repo, private, run
        self.owned = False  # whether a revision of this run is there: from then on nothing that others do takes the repository away
        self.records: dict[str, dict | None] = {}  # revision.json of commits, which do not change
        self.own: dict[tuple[str, int], bool] = {}  # whether a commit is this run's revision of a step
        self.said: set[str] = set()

    def _call(self, name: str, *args, **kwargs):
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
        try:
            return getattr(HfApi(), name)(*args, **kwargs)
        except Exception as error:  # the client raises its own, httpx2's, ValueError, RuntimeError and OSError
            raise translated(error) from None

    def prepare(self) -> dict[str, str]:
        """Make the repository if it is not there, and see that this run may write to it; returns {tag: commit}."""
        if token() is None:
            raise NotAllowed("no token: run `hf auth login`, or set HF_TOKEN")
        role = self._call("whoami").get("auth", {}).get("accessToken", {}).get("role")
        if role == "read":
            raise NotAllowed("the token can only read: make one with the right to write")
        return self._open()[1]

    def _open(self) -> tuple[dict[str, str], dict[str, str]]:
        """({branch: commit}, {tag: commit}) of the repository, made if it is not there. Raises Refusal where it is another run's."""
        self._call("create_repo", self.repo, private=self.private, exist_ok=True)
        heads, tags = refs_of(self.repo)
        if not self.owned:
            owner = self.owner(heads, tags)
            if owner not in (None, self.run):
                newest = next((tag for tag, _ in newest_first(tags)), "main")
                raise Refusal(
                    f"{self.repo} belongs to another run ({owner}, this is {self.run}): choose another --hub_model_id, or go on with that run by "
                    f"--resume_from_checkpoint {self.repo}@{newest}."
                )
            self.owned = owner is not None
        return heads, tags

    def owner(self, heads: dict[str, str], tags: dict[str, str]) -> str | None:
        """Id of the run that publishes here, None where none has: whose checkpoint the branch got first, else whose the newest tag or main is.

        Judged by the records of revisions alone; what people add beside them says nothing.
        """
        if BRANCH in heads:
            for commit in reversed(self._call("list_repo_commits", self.repo, revision=heads[BRANCH])):
                if commit.title.startswith(TITLE) and (record := self.record(commit.commit_id)):
                    return record["run"]
        for commit in [commit for _, commit in newest_first(tags)][:MOST_TAGS] + [heads[name] for name in ("main",) if name in heads]:
            if record := self.record(commit):
                return record["run"]
        return None

    def record(self, commit: str) -> dict | None:
        """`revision.json` of a commit, or None where it has none that is one."""
        if commit not in self.records:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    self.records[commit] = as_record(read_json(fetch(Reference(self.repo, commit), commit, REVISION, Path(folder))))
                except Refusal:
                    self.records[commit] = None
        return self.records[commit]

    def claim(self, step: int) -> str:
        """The tag of this run's revision of a step: the first name that is free, or ours already; another's on other content stays. Raises as `_open`."""
        return self._name(step, self._open()[1])

    def _name(self, step: int, tags: dict[str, str]) -> str:
        number = 1
        while (tag := tag_of(step, number)) in tags and not self._is_own(tags[tag], step):
            number += 1
        return tag

    def find(self, step: int, commit: str | None, tags: dict[str, str]) -> tuple[str, str] | None:
        """(tag, commit) of this run's revision of a step that was published as `commit` (None: in another repository), None where there is none.

        Where its tag was deleted, or is on somebody else's commit now, the commit is tagged again, and main's index says so.
        """
        if not self.owned:
            return None
        tag = self._name(step, tags)
        if tag in tags:
            return tag, tags[tag]
        if commit is None or not self._is_own(commit, step):
            return None
        self._tag(tag, commit)
        self._update_main({}, self.record(commit), (tag, commit), False, {}, {})
        return tag, commit

    def _is_own(self, commit: str, step: int) -> bool:
        """Whether a commit is a revision of this run at a step, unaltered."""
        if (commit, step) not in self.own:
            record = self.record(commit)
            named = record is not None and (record["run"], record["step"]) == (self.run, step)
            self.own[commit, step] = named and not self._wrong(commit, record, {})
        return self.own[commit, step]

    def publish(self, files: dict[str, Path], tag: str, final: bool, losses: dict, cover: dict[str, Path]) -> tuple[str, bool]:
        """Put one revision on the Hub as `tag` (see `claim`): commit, read back, tag, then main with `cover` (the card).

        Returns (its commit, whether it is main's model now). Doing it again changes nothing.
        """
        ours = read_json(files[REVISION])
        heads, tags = self._open()
        if tag in tags:
            commit = tags[tag]
            if self._faults(commit, files, ours):
                if not self._is_own(commit, ours["step"]):
                    raise NoAnswer(TAKEN.format(tag=tag))
                raise Refusal(f"{self.repo}@{tag} is there with other content, and no revision is written over. Choose another --hub_model_id.")
        else:
            commit = self._commit(files, ours, heads, tags)
            if wrong := self._faults(commit, files, ours):
                raise NoAnswer(f"the Hub holds other files than were sent: {', '.join(wrong[:3])}")
            self._tag(tag, commit)
        return commit, self._update_main(files, ours, (tag, commit), final, losses, cover)

    def publish_cover(self, cover: dict[str, Path]) -> bool:
        """Put a card and its figures on main, where they are not what is there; whether something was sent. Raises CardError, too.

        A figure whose last commit is not one of ours is somebody else's, and stays.
        """
        head = refs_of(self.repo)[0]["main"]
        entries = files_of(self.repo, head)
        with tempfile.TemporaryDirectory() as folder:
            wanted = self._renewed(cover, head, Path(folder))
            new = {name: path for name, path in wanted.items() if name not in entries or not _is(entries[name], path)}
            if drawn := [name for name in new if name in entries and name != "README.md"]:
                for entry in self._call("get_paths_info", self.repo, drawn, expand=True, revision=head):
                    if entry.last_commit is None or entry.last_commit.title != COVER:
                        del new[entry.path]
                        self._say_once(
                            f"{entry.path} on main of {self.repo} is somebody else's and stays: move it away, and --publish_only puts this run's there"
                        )
            if new:
                self._replace("main", head, new, COVER, set())
        return bool(new)

    def _renewed(self, cover: dict[str, Path], head: str, folder: Path) -> dict[str, Path]:
        """A cover whose card keeps what main's card has from others: a person's words, and scores. Raises CardError where that cannot be told."""
        old = self._text(head, "README.md", folder) if "README.md" in cover else None
        if old is None:
            return cover
        write_text(folder / "README.md", with_words(cover["README.md"].read_text(encoding="utf-8"), old))
        return {**cover, "README.md": folder / "README.md"}

    def _text(self, commit: str, name: str, folder: Path) -> str | None:
        """A text of a commit, None where it has none; what is not UTF-8 in it is replaced."""
        try:
            return fetch(Reference(self.repo, commit), commit, name, folder / "old").read_text(encoding="utf-8", errors="replace")
        except Refusal:
            return None

    def _commit(self, files: dict[str, Path], ours: dict, heads: dict[str, str], tags: dict[str, str]) -> str:
        """The commit whose files are exactly ours: one that a crash left without a tag, wherever in the branch it is, else a new one."""
        if BRANCH not in heads:
            root = self._call("list_repo_commits", self.repo)[-1].commit_id
            self._call("create_branch", self.repo, branch=BRANCH, revision=root, exist_ok=True)
            heads = refs_of(self.repo)[0]
        head, title = heads[BRANCH], f"{TITLE}{ours['step']:,} ({ours['tokens']:,} tokens)"
        if head not in tags.values():  # behind the last tag there is a commit of ours that has none yet, or one of others
            for commit in self._call("list_repo_commits", self.repo, revision=head):
                if commit.title == title and not self._faults(commit.commit_id, files, ours):
                    return commit.commit_id
        return self._replace(BRANCH, head, files, title, set(files_of(self.repo, head)))

    def _replace(self, branch: str, head: str, files: dict[str, Path], title: str, there: set[str]) -> str:
        """One commit that adds `files` and deletes the rest of `there`; returns its id. NoAnswer when the branch has moved from `head`."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        nothing_private(files)
        operations = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
        operations += [CommitOperationDelete(name) for name in sorted(there - set(files) - {".gitattributes"})]
        return self._call("create_commit", self.repo, operations, commit_message=title, revision=branch, parent_commit=head).oid

    def _faults(self, commit: str, files: dict[str, Path], ours: dict) -> list[str]:
        """What keeps a commit from being this revision and nothing else: names of files, none where it is."""
        record = self.record(commit)
        if record is None or record["run"] != self.run or not same_content(record, ours):
            return [REVISION]
        return self._wrong(commit, record, files)

    def _wrong(self, commit: str, record: dict, files: dict[str, Path]) -> list[str]:
        """Files of a commit that are missing, too many, or not as its record says. `files`: those of this disk, which save downloads."""
        entries = files_of(self.repo, commit)

        def same(name: str, expected: dict) -> bool:
            entry = entries[name]
            if entry.size != expected["size"] or entry.lfs:
                return entry.size == expected["size"] and entry.lfs.sha256 == expected["sha256"]
            if name in files and sha256(files[name]) == expected["sha256"]:
                return _is(entry, files[name])
            with tempfile.TemporaryDirectory() as folder:
                return sha256(fetch(Reference(self.repo, commit), commit, name, Path(folder))) == expected["sha256"]

        wanted = {*record["files"], REVISION, ".gitattributes"}
        return sorted(set(entries) - wanted) + [name for name, expected in record["files"].items() if name not in entries or not same(name, expected)]

    def _tag(self, tag: str, commit: str) -> None:
        self._call("create_tag", self.repo, tag=tag, revision=commit, exist_ok=True)
        if refs_of(self.repo)[1].get(tag) != commit:
            raise NoAnswer(TAKEN.format(tag=tag))

    def _update_main(self, files: dict[str, Path], ours: dict, at: tuple[str, str], final: bool, losses: dict, cover: dict[str, Path]) -> bool:
        """The row of this revision in checkpoints.csv, the card, and, of a finished run only, the model; what others put there stays.

        Whether the model is on main now.
        """
        heads, tags = refs_of(self.repo)
        head, (tag, commit) = heads["main"], at
        with tempfile.TemporaryDirectory() as folder:
            text = self._text(head, INDEX, Path(folder)) or ""
            table = self._index(text, tags, {"step": ours["step"], "tokens": ours["tokens"], **losses, "revision": tag, "commit": commit})
            index = Path(folder) / "new.csv"
            index.write_text(table, encoding="utf-8")
            try:
                cover = self._renewed(cover, head, Path(folder))
            except card.CardError as error:
                self._say_once(f"the card on main of {self.repo} stays as it is: {error}")
                cover = {name: path for name, path in cover.items() if name != "README.md"}
            wanted, stale, title, is_main = {INDEX: index, **cover}, set(), f"Index: {tag}", False
            if final:
                record = {**ours, "files": {name: file for name, file in ours["files"].items() if not name.startswith((f"{STATE}/", "README.md"))}}
                write_json(Path(folder) / REVISION, record)
                model = {name: files[name] for name in record["files"]} | {REVISION: Path(folder) / REVISION}
                there, own = files_of(self.repo, head), self._mains_own(head, model)
                theirs = [name for name in model if name in there and name not in own and not _is(there[name], model[name])]
                if theirs:
                    self._say_once(
                        f"{', '.join(theirs[:3])} on main of {self.repo} is somebody else's and stays: the finished model is {self.repo}@{tag} "
                        f"(revision={tag!r}). To have it on main, take that away and upload the files of the revision (hf download, hf upload)."
                    )
                else:
                    is_main, wanted, stale, title = True, wanted | model, own, f"The finished model, step {ours['step']:,}"
            if final or table != text:
                self._replace("main", head, wanted, title, stale)
        return is_main

    def _mains_own(self, head: str, files: dict[str, Path]) -> set[str]:
        """Files on main that are this run's: what its record there names, as it names them. What was altered since is somebody else's. `files`: see `_wrong`."""
        record = self.record(head)
        if record is None or record["run"] != self.run:
            return set()
        return {*record["files"], REVISION} - set(self._wrong(head, record, files))

    def _index(self, text: str, tags: dict[str, str], row: dict) -> str:
        """`checkpoints.csv` with the row of a revision, in the order of steps. Rows of ours that somebody took out come back, a person's stay, last."""
        kept = {}
        with contextlib.suppress(csv.Error):  # a text that is no table
            for line in csv.DictReader(io.StringIO(text)):
                found = {name: line.get(name) or "" for name in COLUMNS}
                if found["revision"]:
                    kept[found["revision"]] = found
        for tag, commit in newest_first(tags)[:MOST_TAGS]:
            if tag not in kept and self._is_own(commit, step_of(tag)[0]):
                record = self.record(commit)
                kept[tag] = {"step": record["step"], "tokens": record["tokens"], "revision": tag, "commit": commit}
        step = step_of(row["revision"])[0]
        before = {tag: line for tag, line in kept.items() if step_of(tag) and step_of(tag)[0] == step}
        for line in before.values():
            row = {**line, **row}
        kept = {tag: line for tag, line in kept.items() if tag not in before} | {row["revision"]: row}
        ours = sorted((tag for tag in kept if step_of(tag)), key=step_of)
        return csv_text(COLUMNS, [kept[name] for name in [*ours, *(name for name in kept if not step_of(name))]])

    def _say_once(self, text: str) -> None:
        if text not in self.said:
            self.said.add(text)
            say(f"hub       {text}")


def with_words(card_text: str, old: str) -> str:
    """A card with what people wrote into the one that is there: between its marks, or, of a README without any, all of it. Raises CardError."""
    if YOURS[0] not in old and YOURS[1] not in old and not old.startswith(NO_CARD):
        words = re.sub(r"\A---\n.*?\n---\n", "", old, flags=re.DOTALL).strip()
        old = "\n".join([YOURS[0], *([words] if words else []), YOURS[1]])
    return renew(card_text, old)


def newest_first(tags: dict[str, str]) -> list[tuple[str, str]]:
    """(tag, commit) of the tags of this project's form, by their numbers; others are people's."""
    return sorted(((tag, commit) for tag, commit in tags.items() if step_of(tag)), key=lambda one: step_of(one[0]), reverse=True)


# ---- the queue ----


class Publisher:
    """A queue of a run folder and the thread that works it off. All of it happens on rank 0.

    `export_to(checkpoint, folder)` writes what a revision has at its root. A run that publishes two things has two
    queues, told apart by `name`.
    """

    def __init__(self, run, repository: Repository, export_to, state: str, every: int | None, name: str = ""):
        self.run, self.repository, self.export_to, self.state, self.every = run, repository, export_to, state, every
        self.place = Path(run.path) / name.strip("-")  # whose card it is
        self.folder = Path(run.path) / f"queue{name}"
        self.published = Path(run.path) / f"published{name}.jsonl"
        self.failure: str | None = None
        self.blocked = False  # only the user can help: waiting is of no use
        self.lost: list[int] = []  # steps whose revision is gone from the Hub, and whose checkpoint from here
        self.wake, self.ending, self.thread = threading.Event(), False, None

    def check(self, required: bool) -> None:
        """Tell before the first step what will keep revisions from the Hub. Raises Refusal, too, when the Hub is `required`."""
        try:
            with tempfile.TemporaryDirectory() as folder:  # what every revision says of the run, before there is one
                write_json(Path(folder) / REVISION, (read_json(self.run.path / "run.json") or {}).get("identity") or {})
                nothing_private({REVISION: Path(folder) / REVISION})
            self._compare(self.repository.prepare())
        except (Refusal, NotAllowed, NoAnswer) as error:
            what = f"--push_to_hub {self.repository.repo}: {error}"
            if required:
                raise Refusal(f"{what}. Mend it, or train without --hub_required and publish later with --publish_only.") from None
            say(f"WARNING   {what}. Training goes on; revisions wait in {self.folder}, and --publish_only publishes them.")
            self.run.event("hub", reason=str(error))

    def add(self, checkpoint: Path) -> None:
        """Queue a sealed checkpoint, by hard links (by a copy where the disk has none), if it is to be published."""
        manifest = checkpoints.read_manifest(checkpoint)
        step = manifest["step"]
        if not is_published(step, self.every, is_final(manifest)):
            return
        place, aside = self.folder / tag_of(step), self.folder / f".{tag_of(step)}"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        try:
            shutil.copytree(checkpoint, aside / "checkpoint", copy_function=os.link)
        except OSError:
            shutil.rmtree(aside / "checkpoint", ignore_errors=True)
            shutil.copytree(checkpoint, aside / "checkpoint")
        discard(place)
        os.rename(aside, place)
        flush_folder(self.folder)
        self.wake.set()

    def _compare(self, tags: dict[str, str]) -> None:
        """Hold the record of what was published against the repository's tags, and correct it where others changed something there. Raises as `claim`.

        A revision whose tag was deleted or moved is tagged again. One that is gone is recorded no longer, and so is published again where its
        checkpoint is here. Of a run that published elsewhere before, what is here too (the repository was renamed) counts as published here.
        """
        repo, rows = self.repository.repo, read_jsonl(self.published)
        there = dict(checkpoints.checkpoints(self.run.path)) | dict(queued(self.folder))
        here = {row["step"] for row in rows if row["repo"] == repo}
        kept, gone = [], []
        for row in rows:
            step, tag, commit = row["step"], row["revision"], row["commit"]
            if row["repo"] != repo:
                found = None if step in here else self.repository.find(step, None, tags)
                kept.append({**row, "repo": repo, "revision": found[0], "commit": found[1]} if found else row)
            elif tags.get(tag) == commit:
                kept.append(row)
            elif found := self.repository.find(step, commit, tags):
                kept.append({**row, "revision": found[0], "commit": found[1]})
                if tag not in tags:
                    say(f"hub       {repo}@{tag} was deleted, and is there again")
                elif found[0] != tag:
                    say(f"hub       {repo}@{tag} is somebody else's tag now, and stays: this run's revision is {found[0]}")
            else:
                gone.append(step)
        if gone:
            self.lost = [step for step in gone if step not in there]
            again = _named([step for step in gone if step in there])
            ways = [f"{again} will be published again" if again else "", f"{_named(self.lost)} cannot be: no checkpoint here" if self.lost else ""]
            text = f"{_named(gone)} of {repo} was published, and is gone from there (deleted, or the repository made anew): {'; '.join(filter(None, ways))}"
            say(f"WARNING   {text}")
            self.run.event("hub", reason=text)
        if kept != rows:
            write_text(self.published, "".join(json.dumps(row) + "\n" for row in kept))

    def catch_up(self) -> None:
        """Queue the checkpoints that are neither queued nor published: a crash came between, or publishing is new, there or at all."""
        done = {record["step"] for record in read_jsonl(self.published) if record["repo"] == self.repository.repo}
        for leftover in self.folder.glob(".*") if self.folder.exists() else ():
            shutil.rmtree(leftover, ignore_errors=True)
        there = {step for step, _ in queued(self.folder)}
        for step, checkpoint in reversed(checkpoints.checkpoints(self.run.path)):
            if step not in done and step not in there and checkpoints.read_manifest(checkpoint):
                self.add(checkpoint)

    def start(self) -> None:
        """Begin to work the queue off in the background."""
        self.thread = threading.Thread(target=self._work, name="publisher", daemon=True)
        self.thread.start()

    def _work(self) -> None:
        wait = FIRST_WAIT
        while not self.ending:
            self.wake.clear()
            waiting = queued(self.folder)
            if not waiting:
                self.wake.wait(1.0)
                continue
            try:
                self._publish(*waiting[0])
                wait, self.failure, self.blocked = FIRST_WAIT, None, False
                (self.folder / "last_failure.json").unlink(missing_ok=True)
            except Exception as error:  # whatever it is, training goes on, and this checkpoint stays first in the queue
                self._failed(error, waiting[0][0])
                deadline = time.monotonic() + wait
                while time.monotonic() < deadline and not self.ending:
                    time.sleep(0.05)
                wait = min(wait * 2, LONGEST_WAIT)

    def _publish(self, step: int, entry: Path) -> None:
        wrong = checkpoints.problems(entry / "checkpoint")
        if wrong:
            say(f"hub       {tag_of(step)} was damaged on this disk before it was published: {'; '.join(wrong)}")
            self.run.event("not published", revision=tag_of(step), problems=wrong)
            discard(entry)
            return
        final = is_final(checkpoints.read_manifest(entry / "checkpoint"))
        state = self.state == "all" or (self.state == "final" and final)
        tag = self.repository.claim(step)
        row = {"step": step, "repo": self.repository.repo, "revision": tag, "state": state}
        files = write_revision(entry, self.repository.run, self.export_to, state, self._card(row, step))
        write_text(entry / "cover.md", self._card(row))
        commit, is_main = self.repository.publish(files, tag, final, losses_at(entry / "checkpoint"), {"README.md": entry / "cover.md"})
        append_jsonl(self.published, {**row, "commit": commit})
        discard(entry)
        self.run.event("published", revision=tag, repo=self.repository.repo, commit=commit)
        other = "" if tag == tag_of(step) else f"; {tag_of(step)} is somebody else's tag, and stays"
        say(f"hub       {self.repository.repo}@{tag} is published{' and is main' if is_main else ''}{other}")

    def _card(self, row: dict, step: int | None = None) -> str:
        """The card of a revision that is about to be published, or, without a step, of main.

        Records that contradict each other do not keep a revision from the Hub: the card says what is wrong with them.
        """
        try:
            records = card.read(self.place, step)
            records.published.append(row)
            return card.render(records, self.repository.repo)
        except card.CardError as error:
            return f"{NO_CARD}{error}\n"

    def _cover(self) -> None:
        """Put the card of a finished run, with its figures, on main."""
        published = any(row["repo"] == self.repository.repo for row in read_jsonl(self.published))
        if (read_json(self.run.path / "status.json") or {}).get("status") != "finished" or not published:
            return
        try:
            path = card.write(self.place, self.repository.repo)
            cover = {"README.md": path} | {f"figures/{one.name}": one for one in sorted((self.place / "figures").glob("*.png"))}
            if self.repository.publish_cover(cover):
                say(f"hub       the card of {self.repository.repo} is on main")
        except (card.CardError, Refusal, NotAllowed, NoAnswer) as error:
            say(f"WARNING   the card of {self.repository.repo} is not on main: {error}. --publish_only tries again.")

    def _failed(self, error: Exception, step: int) -> None:
        """Say a failure once, not once a try."""
        text = str(error) if isinstance(error, Refusal | NoAnswer | NotAllowed) else reason(error, self.run.path.resolve())
        self.blocked = isinstance(error, Refusal | NotAllowed)
        if text != self.failure:
            self.failure = text
            self.run.event("not yet published", revision=tag_of(step), reason=text)
            write_json(self.folder / "last_failure.json", {"revision": tag_of(step), "reason": text})
            say(f"hub       {tag_of(step)} waits: {text}")

    def drain(self, timeout: float) -> bool:
        """Wait until the queue is empty; False when `timeout` seconds were not enough, or only the user can help."""
        deadline, told = time.monotonic() + timeout, None
        while (waiting := queued(self.folder)) and time.monotonic() < deadline and not self.blocked:
            if told != len(waiting):
                told = len(waiting)
                say(f"hub       waiting for {told} revision{'s' if told > 1 else ''} (for {timeout:.0f} s at most; --publish_only goes on later)")
            self.wake.set()
            time.sleep(0.1)
        self.stop()
        if not queued(self.folder):
            self._cover()
        return not queued(self.folder)

    def stop(self) -> None:
        """End the thread after what it is doing; a request that hangs is left to die with the process."""
        self.ending = True
        self.wake.set()
        if self.thread:
            self.thread.join(5)
            self.thread = None
            for line in queue_lines(self.folder):
                say(f"hub       {line}")


def queued(folder: Path) -> list[tuple[int, Path]]:
    """(step, entry) of what waits in a queue, oldest first."""
    found = [(step_of(path.name)[0], path) for path in folder.glob("step-*") if step_of(path.name)] if folder.exists() else []
    return sorted(found)


def queue_lines(folder: Path) -> list[str]:
    """What waits in a queue, how large it is, and why, for the log and the plan."""
    waiting = queued(folder)
    if not waiting:
        return []
    size = sum(path.stat().st_size for _, entry in waiting for path in (entry / "checkpoint").iterdir())
    failure = read_json(folder / "last_failure.json")
    first = f"{len(waiting)} revisions wait to be published ({runs.size(size)}): {', '.join(entry.name for _, entry in waiting[:5])}"
    return [first + (" ..." if len(waiting) > 5 else ""), *([f"last failure ({failure['revision']}): {failure['reason']}"] if failure else [])]


def _named(steps: list[int]) -> str:
    """The tags of steps, five of them."""
    return ", ".join(tag_of(step) for step in steps[:5]) + (f" and {len(steps) - 5} more" if len(steps) > 5 else "")


def discard(entry: Path) -> None:
    """Remove a queue entry in one step."""
    if entry.exists():
        doomed = entry.with_name(f".done-{entry.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(entry, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _is(entry, path: Path) -> bool:
    """Whether a file of the Hub is this one."""
    if entry.lfs:
        return entry.lfs.sha256 == sha256(path)
    data = path.read_bytes()
    return entry.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def losses_at(checkpoint: Path) -> dict:
    """The last training and validation loss before a checkpoint, as it logged them."""
    found = {"loss": "", "eval_loss": ""}
    for entry in read_json(checkpoint / "trainer_state.json")["log_history"]:
        found.update({key: entry[key] for key in found if key in entry})
    return found
