"""One model repository on the Hub: commits, tags and main, where others may write at the same time."""

import contextlib
import csv
import io
import re
import tempfile
from pathlib import Path

from model_card import card
from model_card.card import YOURS, renew

from ..digests import sha256
from ..distributed import print_main
from ..errors import Refusal
from ..files import csv_text, read_json, write_json, write_text
from .client import (
    HubPermissionError,
    HubUnavailable,
    NotOnHub,
    Reference,
    check_no_private_values,
    fetch,
    files_of,
    foreign_files,
    last_titles,
    refs_of,
    to_hub_error,
    token,
)
from .revision import (
    BRANCH,
    INDEX,
    RESULTS,
    REVISION,
    SCORES_TITLE,
    STATE,
    TITLE,
    as_record,
    has_content_of,
    newest_first,
    same_content,
    step_of,
    tag_of,
)

COLUMNS = ("step", "tokens", "loss", "eval_loss", "revision", "commit")
CARD_TITLE = "Card"  # title of this project's commits of card and figures on main
NO_CARD = "No card can be made: "
TAKEN = "somebody else made the tag {tag} meanwhile: the next try takes another name"
MOST_TAGS = 100  # tags of a repository, newest first, whose records are read


# ---- one revision to the Hub ----


class Repository:
    """One run's model repository. Its methods raise Refusal, HubPermissionError or HubUnavailable, and are idempotent.

    run: the run's id.
    """

    def __init__(self, repo: str, private: bool | None, run: str):
        self.repo, self.private, self.run = repo, private, run
        self.is_owner = False  # a revision of this run is there; from then on, nothing that others do changes this
        self.records: dict[str, dict | None] = {}  # {commit: its revision.json}; commits do not change
        self.own_commits: dict[tuple[str, int], bool] = {}  # {(commit, step): whether it is this run's revision}
        self.superseded: set[str] = set()  # tags of steps that the run has gone back behind
        self.reported: set[str] = set()  # messages that were printed

    def _call(self, name: str, *args, **kwargs):
        """A method of HfApi, its errors translated."""
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
        try:
            return getattr(HfApi(), name)(*args, **kwargs)
        except Exception as error:  # the client raises its own, httpx2's, ValueError, RuntimeError and OSError
            raise to_hub_error(error) from None

    def prepare(self) -> dict[str, str]:
        """Create the repository if it does not exist, and check that this run may write to it; returns {tag:
        commit}.
        """
        if token() is None:
            raise HubPermissionError("no token: run `hf auth login`, or set HF_TOKEN")
        role = self._call("whoami").get("auth", {}).get("accessToken", {}).get("role")
        if role == "read":
            raise HubPermissionError("the token can only read: make one with the right to write")
        return self._open()[1]

    def _open(self) -> tuple[dict[str, str], dict[str, str]]:
        """({branch: commit}, {tag: commit}) of the repository, which is created if it does not exist. Raises Refusal
        where it belongs to another run.
        """
        self._call("create_repo", self.repo, private=self.private, exist_ok=True)
        heads, tags = refs_of(self.repo)
        if not self.is_owner:
            owner = self.owner(heads, tags)
            if owner not in (None, self.run):
                newest = next((tag for tag, _ in newest_first(tags)), "main")
                raise Refusal(
                    f"{self.repo} belongs to another run ({owner}, this is {self.run}): choose another --hub_model_id,"
                    f" or continue that run with --resume_from_checkpoint {self.repo}@{newest}."
                )
            self.is_owner = owner is not None
        return heads, tags

    def owner(self, heads: dict[str, str], tags: dict[str, str]) -> str | None:
        """Id of the run that publishes here, None where none has: the run of the branch's first checkpoint, else of the
        newest tag, else of main.

        Only the records of revisions decide; files that people add do not count.
        """
        if BRANCH in heads:
            for commit in reversed(self._call("list_repo_commits", self.repo, revision=heads[BRANCH])):
                if commit.title.startswith(TITLE) and (record := self.record(commit.commit_id)):
                    return record["run"]
        for commit in [commit for _, commit in newest_first(tags)][:MOST_TAGS] + [
            heads[name] for name in ("main",) if name in heads
        ]:
            if record := self.record(commit):
                return record["run"]
        return None

    def record(self, commit: str) -> dict | None:
        """`revision.json` of a commit, or None where it is missing or malformed."""
        if commit not in self.records:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    self.records[commit] = as_record(
                        read_json(fetch(Reference(self.repo, commit), commit, REVISION, Path(folder)))
                    )
                except NotOnHub:
                    self.records[commit] = None
        return self.records[commit]

    def claim(self, step: int) -> str:
        """The tag for this run's revision of a step: the first name that is free or is this run's already. Tags of
        others stay. Raises as `_open`.
        """
        return self._available_tag(step, self._open()[1])

    def _available_tag(self, step: int, tags: dict[str, str]) -> str:
        number = 1
        while (tag := tag_of(step, number)) in tags and (tag in self.superseded or not self._is_own(tags[tag], step)):
            number += 1
        return tag

    def find(self, step: int, commit: str | None, tags: dict[str, str]) -> tuple[str, str] | None:
        """(tag, commit) of this run's revision of a step that was published as `commit` (None: in another repository),
        None where it does not exist.

        Where its tag was deleted or moved to somebody else's commit, the commit is tagged again, and main's index is
        updated.
        """
        if not self.is_owner:
            return None
        tag = self._available_tag(step, tags)
        if tag in tags:
            return tag, tags[tag]
        if commit is None or not self._is_own(commit, step):
            return None
        self._tag(tag, commit)
        self._update_main({}, self.record(commit), (tag, commit), False, {}, {})
        return tag, commit

    def _is_own(self, commit: str, step: int) -> bool:
        """Whether a commit is a revision of this run at a step, unaltered."""
        if (commit, step) not in self.own_commits:
            record = self.record(commit)
            matches = record is not None and (record["run"], record["step"]) == (self.run, step)
            self.own_commits[commit, step] = matches and not self._mismatched_files(commit, record, {})
        return self.own_commits[commit, step]

    def publish(
        self, files: dict[str, Path], tag: str, final: bool, losses: dict, card_files: dict[str, Path]
    ) -> tuple[str, bool]:
        """Publish one revision as `tag` (see `claim`): commit, read back, tag, then update main with `card_files`.

        files: {path in the revision: file}. losses: further columns of its row in checkpoints.csv. Returns (its commit,
        whether it is main's model now). A second call changes nothing.
        """
        record = read_json(files[REVISION])
        heads, tags = self._open()
        if tag in tags:
            commit = tags[tag]
            if self._differing_files(commit, files, record):
                if not self._is_own(commit, record["step"]):
                    raise HubUnavailable(TAKEN.format(tag=tag))
                raise Refusal(
                    f"{self.repo}@{tag} exists with other content, and revisions are never overwritten. Choose another"
                    " --hub_model_id."
                )
        else:
            commit = self._commit(files, record, heads, tags)
            if mismatched := self._differing_files(commit, files, record):
                raise HubUnavailable(f"the Hub holds other files than were sent: {', '.join(mismatched[:3])}")
            self._tag(tag, commit)
        return commit, self._update_main(files, record, (tag, commit), final, losses, card_files)

    def publish_card(self, card_files: dict[str, Path]) -> bool:
        """Put a card and its figures on main where they differ; returns whether something was sent. Raises CardError,
        too.

        A figure whose last commit is not this project's is somebody else's, and stays.
        """
        head = refs_of(self.repo)[0]["main"]
        with tempfile.TemporaryDirectory() as folder:
            merged = self._merge_card(card_files, head, Path(folder), same_weights=True)
            changed, foreign = foreign_files(self.repo, head, merged, CARD_TITLE)
            for name in foreign:
                self._print_once(
                    f"{name} on main of {self.repo} is somebody else's and is kept: move it away, and --publish_only"
                    " publishes this run's own"
                )
            if changed:
                self._replace("main", head, changed, CARD_TITLE, set())
        return bool(changed)

    def _merge_card(self, card_files: dict[str, Path], head: str, folder: Path, same_weights: bool) -> dict[str, Path]:
        """`card_files` with a card that keeps what others wrote into main's card: a person's text, and scores; this
        project's scores only with `same_weights` on main. Raises CardError where that text cannot be found.
        """
        current_card = self._read_text(head, "README.md", folder) if "README.md" in card_files else None
        if current_card is None:
            return card_files
        card_text = card_files["README.md"].read_text(encoding="utf-8")
        write_text(folder / "README.md", keep_user_text(card_text, current_card, same_weights))
        return {**card_files, "README.md": folder / "README.md"}

    def _read_text(self, commit: str, name: str, folder: Path) -> str | None:
        """The text of a commit's file, None where it has no such file. Invalid UTF-8 is replaced."""
        try:
            return fetch(Reference(self.repo, commit), commit, name, folder / "old").read_text(
                encoding="utf-8", errors="replace"
            )
        except NotOnHub:
            return None

    def _commit(self, files: dict[str, Path], record: dict, heads: dict[str, str], tags: dict[str, str]) -> str:
        """The commit with exactly these files: one that a crash left without a tag, anywhere in the branch, else a new
        one.
        """
        if BRANCH not in heads:
            root = self._call("list_repo_commits", self.repo)[-1].commit_id
            self._call("create_branch", self.repo, branch=BRANCH, revision=root, exist_ok=True)
            heads = refs_of(self.repo)[0]
        head, title = heads[BRANCH], f"{TITLE}{record['step']:,} ({record['tokens']:,} tokens)"
        if head not in tags.values():  # after the last tag there is an untagged commit, ours or somebody else's
            for commit in self._call("list_repo_commits", self.repo, revision=head):
                if commit.title == title and not self._differing_files(commit.commit_id, files, record):
                    return commit.commit_id
        return self._replace(BRANCH, head, files, title, set(files_of(self.repo, head)))

    def _replace(self, branch: str, head: str, files: dict[str, Path], title: str, existing: set[str]) -> str:
        """One commit that adds `files` and deletes the other `existing` ones; returns its id. Raises HubUnavailable
        when the branch has moved from `head`.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        check_no_private_values(files)
        operations = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
        operations += [CommitOperationDelete(name) for name in sorted(existing - set(files) - {".gitattributes"})]
        return self._call(
            "create_commit", self.repo, operations, commit_message=title, revision=branch, parent_commit=head
        ).oid

    def _differing_files(self, commit: str, files: dict[str, Path], expected: dict) -> list[str]:
        """Names of the files in which a commit differs from the revision with the record `expected`."""
        stored = self.record(commit)
        if stored is None or stored["run"] != self.run or not same_content(stored, expected):
            return [REVISION]
        return self._mismatched_files(commit, stored, files)

    def _mismatched_files(self, commit: str, record: dict, files: dict[str, Path]) -> list[str]:
        """Files of a commit that are missing, additional, or differ from its record. `files`: the local ones, which
        save downloads.
        """
        entries = files_of(self.repo, commit)

        def is_same(name: str, expected: dict) -> bool:
            entry = entries[name]
            if entry.size != expected["size"] or entry.lfs:
                return entry.size == expected["size"] and entry.lfs.sha256 == expected["sha256"]
            if name in files and sha256(files[name]) == expected["sha256"]:
                return has_content_of(entry, files[name])
            with tempfile.TemporaryDirectory() as folder:
                return sha256(fetch(Reference(self.repo, commit), commit, name, Path(folder))) == expected["sha256"]

        allowed = {*record["files"], REVISION, ".gitattributes"}
        return sorted(set(entries) - allowed) + [
            name for name, expected in record["files"].items() if name not in entries or not is_same(name, expected)
        ]

    def _tag(self, tag: str, commit: str) -> None:
        self._call("create_tag", self.repo, tag=tag, revision=commit, exist_ok=True)
        if refs_of(self.repo)[1].get(tag) != commit:
            raise HubUnavailable(TAKEN.format(tag=tag))

    def _update_main(
        self,
        files: dict[str, Path],
        record: dict,
        tag_and_commit: tuple[str, str],
        final: bool,
        losses: dict,
        card_files: dict[str, Path],
    ) -> bool:
        """Put a revision's row in checkpoints.csv, the card and, for a finished run only, the model on main; files of
        others stay. Scores of the weights that the model replaces go. Returns whether the model is on main now.
        """
        heads, tags = refs_of(self.repo)
        head, (tag, commit) = heads["main"], tag_and_commit
        with tempfile.TemporaryDirectory() as folder:
            old_index = self._read_text(head, INDEX, Path(folder)) or ""
            new_index = self._index(
                old_index,
                tags,
                {"step": record["step"], "tokens": record["tokens"], **losses, "revision": tag, "commit": commit},
            )
            index = Path(folder) / "new.csv"
            index.write_text(new_index, encoding="utf-8")
            model, deletions, same_weights, title = {}, set(), True, f"Index: {tag}"
            if final:
                model, deletions, same_weights = self._model_on_main(files, record, (tag, head), Path(folder))
                title = f"The finished model, step {record['step']:,}" if model else title
            try:
                card_files = self._merge_card(card_files, head, Path(folder), same_weights)
            except card.CardError as error:
                self._print_once(f"the card on main of {self.repo} stays as it is: {error}")
                card_files = {name: path for name, path in card_files.items() if name != "README.md"}
            if final or new_index != old_index:
                self._replace("main", head, {INDEX: index, **card_files, **model}, title, deletions)
        return bool(model)

    def _model_on_main(
        self, files: dict[str, Path], record: dict, tag_and_head: tuple[str, str], folder: Path
    ) -> tuple[dict[str, Path], set[str], bool]:
        """({path on main: file} of the model of a revision, files on main that it replaces, whether main has these
        weights already); ({}, set(), True) where a file of somebody else is in its place. tag_and_head: the
        revision's tag, main's commit. folder: for its record.
        """
        tag, head = tag_and_head
        model = self._write_model_record(files, record, folder)
        existing, own_files = files_of(self.repo, head), self._own_files_on_main(head, model)
        same = {name for name in model if name in existing and has_content_of(existing[name], model[name])}
        if foreign := [name for name in model if name in existing and name not in own_files | same]:
            self._print_once(
                f"{', '.join(foreign[:3])} on main of {self.repo} is somebody else's and is kept: the finished"
                f" model is {self.repo}@{tag} (revision={tag!r}). To have it on main, remove that file and"
                " upload the files of the revision (hf download, hf upload)."
            )
            return {}, set(), True
        if all(name in same for name in model if name.endswith(".safetensors")):
            return model, own_files, True
        titles = last_titles(self.repo, head, [name for name in existing if name.startswith(f"{RESULTS}/")])
        return model, own_files | {name for name, title in titles.items() if title.startswith(SCORES_TITLE)}, False

    def _write_model_record(self, files: dict[str, Path], record: dict, folder: Path) -> dict[str, Path]:
        """{path on main: file} of the model of a revision, with a `revision.json` without training state and card,
        which is written into `folder`.
        """
        model_record = {
            **record,
            "files": {
                name: file for name, file in record["files"].items() if not name.startswith((f"{STATE}/", "README.md"))
            },
        }
        write_json(folder / REVISION, model_record)
        return {name: files[name] for name in model_record["files"]} | {REVISION: folder / REVISION}

    def _own_files_on_main(self, head: str, files: dict[str, Path]) -> set[str]:
        """Files on main that are this run's and unaltered since, by its record there. `files`: see
        `_mismatched_files`.
        """
        record = self.record(head)
        if record is None or record["run"] != self.run:
            return set()
        return {*record["files"], REVISION} - set(self._mismatched_files(head, record, files))

    def _index(self, old_index: str, tags: dict[str, str], new_row: dict) -> str:
        """`checkpoints.csv` with the row of a revision, ordered by step. Rows of this run that somebody removed are
        added again; rows of others stay, last.
        """
        rows = {}
        with contextlib.suppress(csv.Error):  # a text that is not a table
            for fields in csv.DictReader(io.StringIO(old_index)):
                old_row = {name: fields.get(name) or "" for name in COLUMNS}
                if old_row["revision"]:
                    rows[old_row["revision"]] = old_row
        for tag, commit in newest_first(tags)[:MOST_TAGS]:
            if tag not in rows and self._is_own(commit, step_of(tag)[0]):
                record = self.record(commit)
                rows[tag] = {"step": record["step"], "tokens": record["tokens"], "revision": tag, "commit": commit}
        step = step_of(new_row["revision"])[0]
        same_step = {tag: old_row for tag, old_row in rows.items() if step_of(tag) and step_of(tag)[0] == step}
        for old_row in same_step.values():
            new_row = {**old_row, **new_row}
        rows = {tag: old_row for tag, old_row in rows.items() if tag not in same_step} | {new_row["revision"]: new_row}
        step_tags = sorted((tag for tag in rows if step_of(tag)), key=step_of)
        return csv_text(COLUMNS, [rows[name] for name in [*step_tags, *(name for name in rows if not step_of(name))]])

    def _print_once(self, text: str) -> None:
        if text not in self.reported:
            self.reported.add(text)
            print_main(f"hub       {text}")


def keep_user_text(card_text: str, old_card: str, same_weights: bool = False) -> str:
    """A new card with what people wrote into the current one: the text between its marks, or, of a README without
    marks, all of it; and metadata of their own. same_weights: as `model_card.card.renew`. Raises CardError.
    """
    if YOURS[0] not in old_card and YOURS[1] not in old_card and not old_card.startswith(NO_CARD):
        head = re.match(r"---\n.*?\n---\n|", old_card, flags=re.DOTALL)[0]
        words = old_card[len(head) :].strip()
        old_card = head + "\n".join([YOURS[0], *([words] if words else []), YOURS[1]])
    return renew(card_text, old_card, same_weights)
