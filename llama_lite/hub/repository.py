"""One model repository on the Hub: commits, tags, main, and what others do there meanwhile."""

import contextlib
import csv
import io
import re
import tempfile
from pathlib import Path

from model_card import card
from model_card.card import YOURS, renew

from ..distributed import print_main
from ..errors import Refusal
from ..files import csv_text, read_json, sha256, write_json, write_text
from .client import (
    HubPermissionError,
    HubUnavailable,
    Reference,
    fetch,
    files_of,
    nothing_private,
    refs_of,
    token,
    translated,
)
from .revision import (
    BRANCH,
    INDEX,
    REVISION,
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

COVER = "Card"  # of our commits of card and figures on main

NO_CARD = "No card can be made: "

TAKEN = "somebody else made the tag {tag} meanwhile: the next try takes another name"

MOST_TAGS = 100  # of a repository, newest first, whose records are looked at


# ---- one revision to the Hub ----


class Repository:
    """One run's model repository. Its methods raise Refusal, HubPermissionError or HubUnavailable, and can be called
    again.
    """

    def __init__(self, repo: str, private: bool | None, run: str):
        self.repo, self.private, self.run = repo, private, run
        # whether a revision of this run is there: from then on nothing that others do takes the repository away
        self.owned = False
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
            raise HubPermissionError("no token: run `hf auth login`, or set HF_TOKEN")
        role = self._call("whoami").get("auth", {}).get("accessToken", {}).get("role")
        if role == "read":
            raise HubPermissionError("the token can only read: make one with the right to write")
        return self._open()[1]

    def _open(self) -> tuple[dict[str, str], dict[str, str]]:
        """({branch: commit}, {tag: commit}) of the repository, made if it is not there. Raises Refusal where it is
        another run's.
        """
        self._call("create_repo", self.repo, private=self.private, exist_ok=True)
        heads, tags = refs_of(self.repo)
        if not self.owned:
            owner = self.owner(heads, tags)
            if owner not in (None, self.run):
                newest = next((tag for tag, _ in newest_first(tags)), "main")
                raise Refusal(
                    f"{self.repo} belongs to another run ({owner}, this is {self.run}): choose another --hub_model_id,"
                    f" or go on with that run by --resume_from_checkpoint {self.repo}@{newest}."
                )
            self.owned = owner is not None
        return heads, tags

    def owner(self, heads: dict[str, str], tags: dict[str, str]) -> str | None:
        """Id of the run that publishes here, None where none has: whose checkpoint the branch got first, else whose the
        newest tag or main is.

        Judged by the records of revisions alone; what people add beside them says nothing.
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
        """`revision.json` of a commit, or None where it has none that is one."""
        if commit not in self.records:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    self.records[commit] = as_record(
                        read_json(fetch(Reference(self.repo, commit), commit, REVISION, Path(folder)))
                    )
                except Refusal:
                    self.records[commit] = None
        return self.records[commit]

    def claim(self, step: int) -> str:
        """The tag of this run's revision of a step: the first name that is free, or ours already; another's on other
        content stays. Raises as `_open`.
        """
        return self._name(step, self._open()[1])

    def _name(self, step: int, tags: dict[str, str]) -> str:
        number = 1
        while (tag := tag_of(step, number)) in tags and not self._is_own(tags[tag], step):
            number += 1
        return tag

    def find(self, step: int, commit: str | None, tags: dict[str, str]) -> tuple[str, str] | None:
        """(tag, commit) of this run's revision of a step that was published as `commit` (None: in another repository),
        None where there is none.

        Where its tag was deleted, or is on somebody else's commit now, the commit is tagged again, and main's index
        says so.
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

    def publish(
        self, files: dict[str, Path], tag: str, final: bool, losses: dict, cover: dict[str, Path]
    ) -> tuple[str, bool]:
        """Put one revision on the Hub as `tag` (see `claim`): commit, read back, tag, then main with `cover` (the
        card).

        Returns (its commit, whether it is main's model now). Doing it again changes nothing.
        """
        ours = read_json(files[REVISION])
        heads, tags = self._open()
        if tag in tags:
            commit = tags[tag]
            if self._faults(commit, files, ours):
                if not self._is_own(commit, ours["step"]):
                    raise HubUnavailable(TAKEN.format(tag=tag))
                raise Refusal(
                    f"{self.repo}@{tag} is there with other content, and no revision is written over. Choose another"
                    " --hub_model_id."
                )
        else:
            commit = self._commit(files, ours, heads, tags)
            if wrong := self._faults(commit, files, ours):
                raise HubUnavailable(f"the Hub holds other files than were sent: {', '.join(wrong[:3])}")
            self._tag(tag, commit)
        return commit, self._update_main(files, ours, (tag, commit), final, losses, cover)

    def publish_cover(self, cover: dict[str, Path]) -> bool:
        """Put a card and its figures on main, where they are not what is there; whether something was sent. Raises
        CardError, too.

        A figure whose last commit is not one of ours is somebody else's, and stays.
        """
        head = refs_of(self.repo)[0]["main"]
        entries = files_of(self.repo, head)
        with tempfile.TemporaryDirectory() as folder:
            wanted = self._renewed(cover, head, Path(folder))
            new = {
                name: path
                for name, path in wanted.items()
                if name not in entries or not has_content_of(entries[name], path)
            }
            if drawn := [name for name in new if name in entries and name != "README.md"]:
                for entry in self._call("get_paths_info", self.repo, drawn, expand=True, revision=head):
                    if entry.last_commit is None or entry.last_commit.title != COVER:
                        del new[entry.path]
                        self._say_once(
                            f"{entry.path} on main of {self.repo} is somebody else's and stays: move it away, and"
                            " --publish_only puts this run's there"
                        )
            if new:
                self._replace("main", head, new, COVER, set())
        return bool(new)

    def _renewed(self, cover: dict[str, Path], head: str, folder: Path) -> dict[str, Path]:
        """A cover whose card keeps what main's card has from others: a person's words, and scores. Raises CardError
        where that cannot be told.
        """
        old = self._text(head, "README.md", folder) if "README.md" in cover else None
        if old is None:
            return cover
        write_text(folder / "README.md", with_words(cover["README.md"].read_text(encoding="utf-8"), old))
        return {**cover, "README.md": folder / "README.md"}

    def _text(self, commit: str, name: str, folder: Path) -> str | None:
        """A text of a commit, None where it has none; what is not UTF-8 in it is replaced."""
        try:
            return fetch(Reference(self.repo, commit), commit, name, folder / "old").read_text(
                encoding="utf-8", errors="replace"
            )
        except Refusal:
            return None

    def _commit(self, files: dict[str, Path], ours: dict, heads: dict[str, str], tags: dict[str, str]) -> str:
        """The commit whose files are exactly ours: one that a crash left without a tag, wherever in the branch it is,
        else a new one.
        """
        if BRANCH not in heads:
            root = self._call("list_repo_commits", self.repo)[-1].commit_id
            self._call("create_branch", self.repo, branch=BRANCH, revision=root, exist_ok=True)
            heads = refs_of(self.repo)[0]
        head, title = heads[BRANCH], f"{TITLE}{ours['step']:,} ({ours['tokens']:,} tokens)"
        if (
            head not in tags.values()
        ):  # behind the last tag there is a commit of ours that has none yet, or one of others
            for commit in self._call("list_repo_commits", self.repo, revision=head):
                if commit.title == title and not self._faults(commit.commit_id, files, ours):
                    return commit.commit_id
        return self._replace(BRANCH, head, files, title, set(files_of(self.repo, head)))

    def _replace(self, branch: str, head: str, files: dict[str, Path], title: str, there: set[str]) -> str:
        """One commit that adds `files` and deletes the rest of `there`; returns its id. HubUnavailable when the branch
        has moved from `head`.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        nothing_private(files)
        operations = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
        operations += [CommitOperationDelete(name) for name in sorted(there - set(files) - {".gitattributes"})]
        return self._call(
            "create_commit", self.repo, operations, commit_message=title, revision=branch, parent_commit=head
        ).oid

    def _faults(self, commit: str, files: dict[str, Path], ours: dict) -> list[str]:
        """What keeps a commit from being this revision and nothing else: names of files, none where it is."""
        record = self.record(commit)
        if record is None or record["run"] != self.run or not same_content(record, ours):
            return [REVISION]
        return self._wrong(commit, record, files)

    def _wrong(self, commit: str, record: dict, files: dict[str, Path]) -> list[str]:
        """Files of a commit that are missing, too many, or not as its record says. `files`: those of this disk, which
        save downloads.
        """
        entries = files_of(self.repo, commit)

        def same(name: str, expected: dict) -> bool:
            entry = entries[name]
            if entry.size != expected["size"] or entry.lfs:
                return entry.size == expected["size"] and entry.lfs.sha256 == expected["sha256"]
            if name in files and sha256(files[name]) == expected["sha256"]:
                return has_content_of(entry, files[name])
            with tempfile.TemporaryDirectory() as folder:
                return sha256(fetch(Reference(self.repo, commit), commit, name, Path(folder))) == expected["sha256"]

        wanted = {*record["files"], REVISION, ".gitattributes"}
        return sorted(set(entries) - wanted) + [
            name for name, expected in record["files"].items() if name not in entries or not same(name, expected)
        ]

    def _tag(self, tag: str, commit: str) -> None:
        self._call("create_tag", self.repo, tag=tag, revision=commit, exist_ok=True)
        if refs_of(self.repo)[1].get(tag) != commit:
            raise HubUnavailable(TAKEN.format(tag=tag))

    def _update_main(
        self, files: dict[str, Path], ours: dict, at: tuple[str, str], final: bool, losses: dict, cover: dict[str, Path]
    ) -> bool:
        """The row of this revision in checkpoints.csv, the card, and, of a finished run only, the model; what others
        put there stays.

        Whether the model is on main now.
        """
        heads, tags = refs_of(self.repo)
        head, (tag, commit) = heads["main"], at
        with tempfile.TemporaryDirectory() as folder:
            text = self._text(head, INDEX, Path(folder)) or ""
            table = self._index(
                text,
                tags,
                {"step": ours["step"], "tokens": ours["tokens"], **losses, "revision": tag, "commit": commit},
            )
            index = Path(folder) / "new.csv"
            index.write_text(table, encoding="utf-8")
            try:
                cover = self._renewed(cover, head, Path(folder))
            except card.CardError as error:
                self._say_once(f"the card on main of {self.repo} stays as it is: {error}")
                cover = {name: path for name, path in cover.items() if name != "README.md"}
            wanted, stale, title, is_main = {INDEX: index, **cover}, set(), f"Index: {tag}", False
            if final:
                record = {
                    **ours,
                    "files": {
                        name: file
                        for name, file in ours["files"].items()
                        if not name.startswith((f"{STATE}/", "README.md"))
                    },
                }
                write_json(Path(folder) / REVISION, record)
                model = {name: files[name] for name in record["files"]} | {REVISION: Path(folder) / REVISION}
                there, own = files_of(self.repo, head), self._mains_own(head, model)
                theirs = [
                    name
                    for name in model
                    if name in there and name not in own and not has_content_of(there[name], model[name])
                ]
                if theirs:
                    self._say_once(
                        f"{', '.join(theirs[:3])} on main of {self.repo} is somebody else's and stays: the finished"
                        f" model is {self.repo}@{tag} (revision={tag!r}). To have it on main, take that away and upload"
                        " the files of the revision (hf download, hf upload)."
                    )
                else:
                    is_main, wanted, stale, title = (
                        True,
                        wanted | model,
                        own,
                        f"The finished model, step {ours['step']:,}",
                    )
            if final or table != text:
                self._replace("main", head, wanted, title, stale)
        return is_main

    def _mains_own(self, head: str, files: dict[str, Path]) -> set[str]:
        """Files on main that are this run's: what its record there names, as it names them. What was altered since is
        somebody else's. `files`: see `_wrong`.
        """
        record = self.record(head)
        if record is None or record["run"] != self.run:
            return set()
        return {*record["files"], REVISION} - set(self._wrong(head, record, files))

    def _index(self, text: str, tags: dict[str, str], row: dict) -> str:
        """`checkpoints.csv` with the row of a revision, in the order of steps. Rows of ours that somebody took out come
        back, a person's stay, last.
        """
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
            print_main(f"hub       {text}")


def with_words(card_text: str, old: str) -> str:
    """A card with what people wrote into the one that is there: between its marks, or, of a README without any, all of
    it. Raises CardError.
    """
    if YOURS[0] not in old and YOURS[1] not in old and not old.startswith(NO_CARD):
        words = re.sub(r"\A---\n.*?\n---\n", "", old, flags=re.DOTALL).strip()
        old = "\n".join([YOURS[0], *([words] if words else []), YOURS[1]])
    return renew(card_text, old)
