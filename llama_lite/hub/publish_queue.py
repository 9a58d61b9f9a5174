"""The queue of revisions on disk, and the thread that publishes them while training goes on."""

import json
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path

from model_card import card

from .. import formatting
from ..checkpoint import store, verify
from ..distributed import print_main
from ..errors import Refusal
from ..files import append_jsonl, flush_folder, read_json, read_jsonl, write_json, write_text
from .client import HubPermissionError, HubUnavailable, nothing_private, reason
from .repository import NO_CARD, Repository
from .revision import REVISION, is_final, step_of, tag_of, write_revision

FIRST_WAIT, LONGEST_WAIT = 1.0, 300.0  # seconds between two tries


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
        """Tell before the first step what will keep revisions from the Hub. Raises Refusal, too, when the Hub is
        `required`.
        """
        try:
            with tempfile.TemporaryDirectory() as folder:  # what every revision says of the run, before there is one
                write_json(Path(folder) / REVISION, (read_json(self.run.path / "run.json") or {}).get("identity") or {})
                nothing_private({REVISION: Path(folder) / REVISION})
            self._compare(self.repository.prepare())
        except (Refusal, HubPermissionError, HubUnavailable) as error:
            what = f"--push_to_hub {self.repository.repo}: {error}"
            if required:
                raise Refusal(
                    f"{what}. Mend it, or train without --hub_required and publish later with --publish_only."
                ) from None
            print_main(
                f"WARNING   {what}. Training goes on; revisions wait in {self.folder}, and --publish_only publishes"
                " them."
            )
            self.run.event("hub", reason=str(error))

    def add(self, checkpoint: Path) -> None:
        """Queue a sealed checkpoint, by hard links (by a copy where the disk has none), if it is to be published."""
        manifest = verify.read_manifest(checkpoint)
        step = manifest["step"]
        if not is_published(step, self.every, is_final(manifest)):
            return
        entry, aside = self.folder / tag_of(step), self.folder / f".{tag_of(step)}"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        try:
            shutil.copytree(checkpoint, aside / "checkpoint", copy_function=os.link)
        except OSError:
            shutil.rmtree(aside / "checkpoint", ignore_errors=True)
            shutil.copytree(checkpoint, aside / "checkpoint")
        discard(entry)
        os.rename(aside, entry)
        flush_folder(self.folder)
        self.wake.set()

    def _compare(self, tags: dict[str, str]) -> None:
        """Hold the record of what was published against the repository's tags, and correct it where others changed
        something there. Raises as `claim`.

        A revision whose tag was deleted or moved is tagged again. One that is gone is recorded no longer, and so is
        published again where its checkpoint is here. Of a run that published elsewhere before, what is here too (the
        repository was renamed) counts as published here.
        """
        repo, rows = self.repository.repo, read_jsonl(self.published)
        there = dict(store.checkpoints(self.run.path)) | dict(queued(self.folder))
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
                    print_main(f"hub       {repo}@{tag} was deleted, and is there again")
                elif found[0] != tag:
                    print_main(
                        f"hub       {repo}@{tag} is somebody else's tag now, and stays: this run's revision is"
                        f" {found[0]}"
                    )
            else:
                gone.append(step)
        if gone:
            self.lost = [step for step in gone if step not in there]
            again = _named([step for step in gone if step in there])
            ways = [
                f"{again} will be published again" if again else "",
                f"{_named(self.lost)} cannot be: no checkpoint here" if self.lost else "",
            ]
            text = (
                f"{_named(gone)} of {repo} was published, and is gone from there (deleted, or the repository made"
                f" anew): {'; '.join(filter(None, ways))}"
            )
            print_main(f"WARNING   {text}")
            self.run.event("hub", reason=text)
        if kept != rows:
            write_text(self.published, "".join(json.dumps(row) + "\n" for row in kept))

    def catch_up(self) -> None:
        """Queue the checkpoints that are neither queued nor published: a crash came between, or publishing is new,
        there or at all.
        """
        done = {record["step"] for record in read_jsonl(self.published) if record["repo"] == self.repository.repo}
        for leftover in self.folder.glob(".*") if self.folder.exists() else ():
            shutil.rmtree(leftover, ignore_errors=True)
        there = {step for step, _ in queued(self.folder)}
        for step, checkpoint in reversed(store.checkpoints(self.run.path)):
            if step not in done and step not in there and verify.read_manifest(checkpoint):
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
        wrong = verify.find_corruption(entry / "checkpoint")
        if wrong:
            print_main(f"hub       {tag_of(step)} was damaged on this disk before it was published: {'; '.join(wrong)}")
            self.run.event("not published", revision=tag_of(step), problems=wrong)
            discard(entry)
            return
        final = is_final(verify.read_manifest(entry / "checkpoint"))
        state = self.state == "all" or (self.state == "final" and final)
        tag = self.repository.claim(step)
        row = {"step": step, "repo": self.repository.repo, "revision": tag, "state": state}
        files = write_revision(entry, self.repository.run, self.export_to, state, self._card(row, step))
        write_text(entry / "cover.md", self._card(row))
        commit, is_main = self.repository.publish(
            files, tag, final, losses_at(entry / "checkpoint"), {"README.md": entry / "cover.md"}
        )
        append_jsonl(self.published, {**row, "commit": commit})
        discard(entry)
        self.run.event("published", revision=tag, repo=self.repository.repo, commit=commit)
        other = "" if tag == tag_of(step) else f"; {tag_of(step)} is somebody else's tag, and stays"
        print_main(f"hub       {self.repository.repo}@{tag} is published{' and is main' if is_main else ''}{other}")

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
            cover = {"README.md": path} | {
                f"figures/{one.name}": one for one in sorted((self.place / "figures").glob("*.png"))
            }
            if self.repository.publish_cover(cover):
                print_main(f"hub       the card of {self.repository.repo} is on main")
        except (card.CardError, Refusal, HubPermissionError, HubUnavailable) as error:
            print_main(
                f"WARNING   the card of {self.repository.repo} is not on main: {error}. --publish_only tries again."
            )

    def _failed(self, error: Exception, step: int) -> None:
        """Say a failure once, not once a try."""
        text = (
            str(error)
            if isinstance(error, Refusal | HubUnavailable | HubPermissionError)
            else reason(error, self.run.path.resolve())
        )
        self.blocked = isinstance(error, Refusal | HubPermissionError)
        if text != self.failure:
            self.failure = text
            self.run.event("not yet published", revision=tag_of(step), reason=text)
            write_json(self.folder / "last_failure.json", {"revision": tag_of(step), "reason": text})
            print_main(f"hub       {tag_of(step)} waits: {text}")

    def drain(self, timeout: float) -> bool:
        """Wait until the queue is empty; False when `timeout` seconds were not enough, or only the user can help."""
        deadline, announced = time.monotonic() + timeout, None
        while (waiting := queued(self.folder)) and time.monotonic() < deadline and not self.blocked:
            if announced != len(waiting):
                announced = len(waiting)
                print_main(
                    f"hub       waiting for {announced} revision{'s' if announced > 1 else ''} (for {timeout:.0f} s at"
                    " most; --publish_only goes on later)"
                )
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
                print_main(f"hub       {line}")


def queued(folder: Path) -> list[tuple[int, Path]]:
    """(step, entry) of what waits in a queue, oldest first."""
    found = (
        [(step_of(path.name)[0], path) for path in folder.glob("step-*") if step_of(path.name)]
        if folder.exists()
        else []
    )
    return sorted(found)


def queue_lines(folder: Path) -> list[str]:
    """What waits in a queue, how large it is, and why, for the log and the plan."""
    waiting = queued(folder)
    if not waiting:
        return []
    size = sum(path.stat().st_size for _, entry in waiting for path in (entry / "checkpoint").iterdir())
    failure = read_json(folder / "last_failure.json")
    first = (
        f"{len(waiting)} revisions wait to be published ({formatting.size(size)}):"
        f" {', '.join(entry.name for _, entry in waiting[:5])}"
    )
    return [
        first + (" ..." if len(waiting) > 5 else ""),
        *([f"last failure ({failure['revision']}): {failure['reason']}"] if failure else []),
    ]


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


def losses_at(checkpoint: Path) -> dict:
    """The last training and validation loss before a checkpoint, as it logged them."""
    found = {"loss": "", "eval_loss": ""}
    for entry in read_json(checkpoint / "trainer_state.json")["log_history"]:
        found.update({key: entry[key] for key in found if key in entry})
    return found


def is_published(step: int, every: int | None, last: bool) -> bool:
    """Whether the checkpoint of a step becomes a revision. `every`: --publish_steps; last: whether it ends the run,
    which always is.
    """
    return last or every is None or step % every == 0
