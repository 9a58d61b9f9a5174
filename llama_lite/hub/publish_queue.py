"""The queue of revisions on disk, and the thread that publishes them while training goes on."""

import contextlib
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from model_card import card

from .. import formatting
from ..checkpoint import store, verify
from ..distributed import print_main
from ..errors import Refusal
from ..files import append_jsonl, flush_folder, read_json, read_jsonl, write_json, write_text
from ..run_folder import RunFolder
from . import queue_limit
from .client import HubPermissionError, HubUnavailable, check_no_private_values, reason
from .repository import NO_CARD, Repository
from .revision import REVISION, STEP_PREFIX, is_final, step_of, tag_of, write_revision

LOSSES = "losses.json"  # of a queue entry: what its row in checkpoints.csv says
FIRST_WAIT, LONGEST_WAIT = 1.0, 300.0  # seconds between two tries


# ---- the queue ----


class Publisher:
    """A queue in a run folder and the thread that publishes its entries. Use it on rank 0 only.

    export_to: `export_to(checkpoint, folder)` writes the root files of a revision. state: which revisions include
    training state (--publish_training_state). every: --publish_steps. limit: GiB that the queue may take
    (--publish_queue_limit); beyond, training state of what waits is dropped, oldest first. name: suffix of the queue,
    for a run that publishes two repositories.
    """

    def __init__(
        self,
        run: RunFolder,
        repository: Repository,
        export_to: Callable[[Path, Path], None],
        state: str,
        every: int | None,
        limit: float | None = None,
        name: str = "",
    ):
        self.run, self.repository, self.export_to, self.state, self.every = run, repository, export_to, state, every
        self.card_folder = Path(run.path) / name.strip("-")  # whose records the card describes
        self.folder = Path(run.path) / f"queue{name}"
        self.published = Path(run.path) / f"published{name}.jsonl"
        rows = read_jsonl(superseded_of(self.published))
        repository.superseded = {row["revision"] for row in rows if row["repo"] == repository.repo}
        self.limit = queue_limit.default_limit(self.folder) if limit is None else int(limit * 2**30)
        self.lock = threading.Lock()  # an entry that is being published keeps what it has
        self.failure: str | None = None
        self.blocked = False  # only the user can resolve the failure: waiting is of no use
        self.lost: list[int] = []  # steps whose revision is no longer on the Hub and whose checkpoint is not here
        self.not_evaluated: list[int] = []  # steps that `catch_up` left to the evaluation that they wait for
        self.wake, self.stopping, self.thread = threading.Event(), False, None

    def check(self, required: bool) -> None:
        """Check before the first step that revisions can be published, and print a warning if not. Raises Refusal
        instead when the Hub is `required`.
        """
        try:
            with tempfile.TemporaryDirectory() as folder:  # the run's identity, as every revision will contain it
                write_json(Path(folder) / REVISION, (read_json(self.run.path / "run.json") or {}).get("identity") or {})
                check_no_private_values({REVISION: Path(folder) / REVISION})
            self._reconcile(self.repository.prepare())
        except (Refusal, HubPermissionError, HubUnavailable) as error:
            problem = f"--push_to_hub {self.repository.repo}: {error}"
            if required:
                raise Refusal(
                    f"{problem}. Fix it, or train without --hub_required and publish later with --publish_only."
                ) from None
            print_main(
                f"WARNING   {problem}. Training goes on; revisions wait in {self.folder}, and --publish_only publishes"
                " them."
            )
            self.run.event("hub", reason=str(error))

    def add(self, checkpoint: Path) -> None:
        """Queue a committed checkpoint if it is to be published, by hard links (by a copy where the disk has none),
        with the losses of its step. What cannot be queued is recorded, and training goes on.
        """
        manifest = verify.read_manifest(checkpoint)
        if not is_published(manifest["step"], self.every, is_final(manifest)):
            return
        try:
            self._add(checkpoint, manifest)
        except OSError as error:  # a full disk, most of all
            shutil.rmtree(self.folder / f".{tag_of(manifest['step'])}", ignore_errors=True)
            text = reason(error, self.run.path.resolve())
            with contextlib.suppress(OSError):  # where the event does not fit either
                self.run.event("not queued", revision=tag_of(manifest["step"]), reason=text)
            print_main(f"WARNING   {tag_of(manifest['step'])} is not queued, and training goes on: {text}")
            return
        self._drop_state_while(
            lambda files: queue_limit.queue_bytes(self.folder) > self.limit,
            f"the queue takes more than {formatting.size(self.limit)}",
        )
        self.wake.set()

    def _add(self, checkpoint: Path, manifest: dict) -> None:
        step = manifest["step"]
        with_state = queue_limit.carries_state(self.state, step, is_final(manifest))
        ignored = None if with_state else lambda _, names: [name for name in names if queue_limit.is_state(name)]
        entry, staging = self.folder / tag_of(step), self.folder / f".{tag_of(step)}"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        try:
            shutil.copytree(checkpoint, staging / "checkpoint", ignore=ignored, copy_function=os.link)
        except OSError:
            shutil.rmtree(staging / "checkpoint", ignore_errors=True)
            shutil.copytree(checkpoint, staging / "checkpoint", ignore=ignored)
        if not with_state:
            queue_limit.leave_out_state(staging)
        write_json(staging / LOSSES, losses_at(read_jsonl(self.run.path / "log.jsonl"), step))
        discard(entry)
        os.rename(staging, entry)
        flush_folder(self.folder)

    def make_room(self, num_bytes: int) -> None:
        """Drop training state of what waits, oldest first, where the disk lacks space for `num_bytes` and it gives
        some: training does not stop for the queue.
        """

        def gives_needed_space(files: list[Path]) -> bool:
            lacking = shutil.disk_usage(self.run.path).free < num_bytes * 1.05
            return lacking and any(path.stat().st_nlink == 1 for path in files)

        self._drop_state_while(gives_needed_space, "the disk has no space for the next checkpoint")

    def _drop_state_while(self, needed: Callable[[list[Path]], bool], why: str) -> None:
        """Drop the training state of waiting entries, oldest first, of those for whose files it is `needed`."""
        for step, entry in queued(self.folder):
            with self.lock:
                files = queue_limit.state_files(entry)
                size = queue_limit.drop_state(entry, files) if files and needed(files) else 0
            if size:
                text = f"{why}, so {formatting.size(size)} of training state were removed from it; its model stays"
                self.run.event("training state dropped", revision=tag_of(step), reason=text)
                print_main(f"WARNING   {tag_of(step)} will be published without training state: {text}")

    def _reconcile(self, tags: dict[str, str]) -> None:
        """Compare the record of published revisions with the repository's tags, and correct it where others changed
        something there. Raises as `Repository.claim`.

        A revision whose tag was deleted or moved is tagged again. One that no longer exists is removed from the record,
        so it is published again where its checkpoint exists. Revisions that were published to another repository and
        exist in this one, too (it was renamed), are recorded as published here.
        """
        repo, rows = self.repository.repo, read_jsonl(self.published)
        available = dict(store.checkpoints(self.run.path)) | dict(queued(self.folder))
        published_here = {row["step"] for row in rows if row["repo"] == repo}
        rows_kept, missing = [], []
        for row in rows:
            step, tag, commit = row["step"], row["revision"], row["commit"]
            if row["repo"] != repo:
                revision = None if step in published_here else self.repository.find(step, None, tags)
                rows_kept.append(
                    {**row, "repo": repo, "revision": revision[0], "commit": revision[1]} if revision else row
                )
            elif tags.get(tag) == commit:
                rows_kept.append(row)
            elif revision := self.repository.find(step, commit, tags):
                rows_kept.append({**row, "revision": revision[0], "commit": revision[1]})
                if tag not in tags:
                    print_main(f"hub       {repo}@{tag} was deleted; it is tagged again")
                elif revision[0] != tag:
                    print_main(
                        f"hub       {repo}@{tag} is now somebody else's tag and is kept: this run's revision is"
                        f" {revision[0]}"
                    )
            else:
                missing.append(step)
        if missing:
            self.lost = [step for step in missing if step not in available]
            republished = _list_tags([step for step in missing if step in available])
            consequences = [
                f"{republished} will be published again" if republished else "",
                f"{_list_tags(self.lost)} cannot be: no checkpoint here" if self.lost else "",
            ]
            text = (
                f"{_list_tags(missing)} of {repo} was published, but is no longer there (deleted, or the repository was"
                f" created again): {'; '.join(filter(None, consequences))}"
            )
            print_main(f"WARNING   {text}")
            self.run.event("hub", reason=text)
        if rows_kept != rows:
            write_text(self.published, "".join(json.dumps(row) + "\n" for row in rows_kept))

    def catch_up(self) -> None:
        """Queue the checkpoints that are neither queued nor published: after a crash, or where the run did not publish
        to this repository before. One whose evaluation is due waits for it.
        """
        for leftover in self.folder.glob(".*") if self.folder.exists() else ():
            shutil.rmtree(leftover, ignore_errors=True)
        for step, checkpoint in reversed(store.checkpoints(self.run.path)):
            if not verify.read_manifest(checkpoint):
                continue
            if is_evaluation_due(self.run.path, checkpoint, step):
                self.not_evaluated.append(step)
                print_main(f"hub       {tag_of(step)} is queued when the resumed run has evaluated it")
            else:
                self.add_missing(checkpoint)

    def add_missing(self, checkpoint: Path) -> None:
        """Queue a committed checkpoint that is neither queued nor published."""
        step = verify.read_manifest(checkpoint)["step"]
        published = {record["step"] for record in read_jsonl(self.published) if record["repo"] == self.repository.repo}
        if step not in published and step not in {queued_step for queued_step, _ in queued(self.folder)}:
            self.add(checkpoint)

    def start(self) -> None:
        """Start the thread that publishes queued checkpoints."""
        self.thread = threading.Thread(target=self._work, name="publisher", daemon=True)
        self.thread.start()

    def _work(self) -> None:
        """Publish entries, oldest first, until `stop`; a failed entry is tried again after a growing delay."""
        delay = FIRST_WAIT
        while not self.stopping:
            self.wake.clear()
            waiting = queued(self.folder)
            if not waiting:
                self.wake.wait(1.0)
                continue
            try:
                self._publish(*waiting[0])
                delay, self.failure, self.blocked = FIRST_WAIT, None, False
                (self.folder / "last_failure.json").unlink(missing_ok=True)
            except Exception as error:  # whatever it is, training goes on, and this checkpoint stays first in the queue
                shutil.rmtree(waiting[0][1] / "export", ignore_errors=True)  # it is made anew
                self._record_failure(error, waiting[0][0])
                deadline = time.monotonic() + delay
                while time.monotonic() < deadline and not self.stopping:
                    time.sleep(0.05)
                delay = min(delay * 2, LONGEST_WAIT)

    def _publish(self, step: int, entry: Path) -> None:
        """Publish one entry, record it and remove it from the queue; a corrupt entry is removed only."""
        with self.lock:
            write_text(entry / queue_limit.ATTEMPTED, "")
            dropped = queue_limit.is_without_state(entry)
        problems = verify.find_corruption(entry / "checkpoint", tuple(verify.STATE_FILES) if dropped else ())
        if problems:
            print_main(
                f"hub       {tag_of(step)} was damaged on this disk before it was published: {'; '.join(problems)}"
            )
            self.run.event("not published", revision=tag_of(step), problems=problems)
            discard(entry)
            return
        final = is_final(verify.read_manifest(entry / "checkpoint"))
        with_state = queue_limit.carries_state(self.state, step, final) and not dropped
        tag = self.repository.claim(step)
        row = {"step": step, "repo": self.repository.repo, "revision": tag, "state": with_state}
        files = write_revision(entry, self.repository.run, self.export_to, with_state, self._card(row, step))
        write_text(entry / "cover.md", self._card(row))
        commit, is_main = self.repository.publish(
            files, tag, final, losses_of(entry), {"README.md": entry / "cover.md"}
        )
        append_jsonl(self.published, {**row, "commit": commit})
        discard(entry)
        self.run.event("published", revision=tag, repo=self.repository.repo, commit=commit)
        note = "" if tag == tag_of(step) else f"; {tag_of(step)} is somebody else's tag and is kept"
        print_main(f"hub       {self.repository.repo}@{tag} is published{' and is main' if is_main else ''}{note}")

    def _card(self, row: dict, step: int | None = None) -> str:
        """The card of a revision that is about to be published, or, without a step, of main.

        Contradictory or unreadable records do not prevent publishing: the card then states what is wrong with them.
        """
        try:
            records = card.read(self.card_folder, step)
            records.published.append(row)
            return card.render(records, self.repository.repo)
        except Exception as error:  # of records that somebody has altered, whatever they hold
            return f"{NO_CARD}{reason(error, self.run.path.resolve(), self.run.path)}\n"

    def _publish_card(self) -> None:
        """Publish the card of a finished run, with its figures, on main."""
        published = any(row["repo"] == self.repository.repo for row in read_jsonl(self.published))
        if (read_json(self.run.path / "status.json") or {}).get("status") != "finished" or not published:
            return
        try:
            path = card.write(self.card_folder, self.repository.repo)
            cover = {"README.md": path} | {
                f"figures/{figure.name}": figure for figure in sorted((self.card_folder / "figures").glob("*.png"))
            }
            if self.repository.publish_card(cover):
                print_main(f"hub       the card of {self.repository.repo} is on main")
        except (card.CardError, Refusal, HubPermissionError, HubUnavailable) as error:
            print_main(
                f"WARNING   the card of {self.repository.repo} is not on main: {error}. --publish_only tries again."
            )

    def _record_failure(self, error: Exception, step: int) -> None:
        """Print and record a failure, once per reason and not once per try."""
        text = (
            str(error)
            if isinstance(error, Refusal | HubUnavailable | HubPermissionError)
            else reason(error, self.run.path.resolve())
        )
        self.blocked = isinstance(error, Refusal | HubPermissionError)
        if text != self.failure:
            self.failure = text
            with contextlib.suppress(OSError):  # a full disk has no space for the record either
                self.run.event("not yet published", revision=tag_of(step), reason=text)
                write_json(self.folder / "last_failure.json", {"revision": tag_of(step), "reason": text})
            print_main(f"hub       {tag_of(step)} waits: {text}")

    def drain(self, timeout: float, stop_requested: Callable[[], object] = bool) -> bool:
        """Wait until the queue is empty; returns False when `timeout` seconds were not enough, when only the user can
        resolve the failure, or when `stop_requested()` is true.
        """
        deadline, announced = time.monotonic() + timeout, None
        try:
            while (waiting := queued(self.folder)) and time.monotonic() < deadline:
                if self.blocked or stop_requested():
                    break
                if announced != len(waiting):
                    announced = len(waiting)
                    print_main(
                        f"hub       waiting for {announced} revision{'s' if announced > 1 else ''} (for"
                        f" {timeout:.0f} s at most; --publish_only continues later)"
                    )
                self.wake.set()
                time.sleep(0.1)
        finally:
            self.stop()
        if not queued(self.folder):
            self._publish_card()
        return not queued(self.folder)

    def stop(self) -> None:
        """Stop the thread after its current entry; after 5 seconds, a request that hangs is left to the daemon
        thread.
        """
        self.stopping = True
        self.wake.set()
        if self.thread:
            self.thread.join(5)
            self.thread = None
            for line in queue_lines(self.folder):
                print_main(f"hub       {line}")


def queued(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the entries of a queue, oldest first."""
    entries = (
        [(step_of(path.name)[0], path) for path in folder.glob(f"{STEP_PREFIX}*") if step_of(path.name)]
        if folder.exists()
        else []
    )
    return sorted(entries)


def superseded_of(published: Path) -> Path:
    """The record of revisions of a run that went back: their steps are published again, under further names."""
    return published.with_name(published.name.replace("published", "superseded", 1))


def supersede(run: Path, step: int) -> None:
    """A run goes back to `step`: what waits of later steps is not published, and what is published stays on the Hub, as
    revisions that the run no longer counts among its own.
    """
    for folder in run.glob("queue*"):
        for later, entry in queued(folder):
            if later > step:
                discard(entry)
    for path in run.glob("published*.jsonl"):
        rows = read_jsonl(path)
        if gone := [row for row in rows if row["step"] > step]:
            for row in gone:
                append_jsonl(superseded_of(path), row)
            write_text(path, "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step))
            names = ", ".join(row["revision"] for row in gone[:3]) + (" ..." if len(gone) > 3 else "")
            print_main(
                f"hub       {names}: of the steps that are made again; they stay, and the new ones get other names"
            )


def queue_lines(folder: Path) -> list[str]:
    """Number, size and last failure of a queue's entries as lines for the log and the plan; none for an empty queue."""
    waiting = queued(folder)
    if not waiting:
        return []
    size = queue_limit.queue_bytes(folder)
    failure = read_json(folder / "last_failure.json")
    summary = (
        f"{len(waiting)} revisions wait to be published ({formatting.size(size)}):"
        f" {', '.join(entry.name for _, entry in waiting[:5])}"
    )
    return [
        summary + (" ..." if len(waiting) > 5 else ""),
        *([f"last failure ({failure['revision']}): {failure['reason']}"] if failure else []),
    ]


def _list_tags(steps: list[int]) -> str:
    """The tags of steps as text, the first five by name."""
    return ", ".join(tag_of(step) for step in steps[:5]) + (f" and {len(steps) - 5} more" if len(steps) > 5 else "")


def discard(entry: Path) -> None:
    """Remove a queue entry; it leaves the queue in one atomic rename."""
    if entry.exists():
        doomed = entry.with_name(f".done-{entry.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(entry, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def losses_of(entry: Path) -> dict:
    """{loss, eval_loss} of a queue entry (nats per token), "" where there is none."""
    if losses := read_json(entry / LOSSES):
        return losses
    checkpoint = entry / "checkpoint"  # queued by an earlier version, which evaluated before it saved
    log, step = read_json(checkpoint / "trainer_state.json")["log_history"], verify.read_manifest(checkpoint)["step"]
    return losses_at(log, step)


def losses_at(log: list[dict], step: int) -> dict:
    """{loss, eval_loss} of a step (nats per token): the last training loss that was logged up to it, and the validation
    loss that was measured at it; "" where there is none.
    """
    losses = {"loss": "", "eval_loss": ""}
    for entry in log:
        if "loss" in entry and entry["step"] <= step:
            losses["loss"] = entry["loss"]
        if "eval_loss" in entry and entry["step"] == step:
            losses["eval_loss"] = entry["eval_loss"]
    return losses


def is_evaluation_due(run: Path, checkpoint: Path, step: int) -> bool:
    """Whether the evaluation of a checkpoint's step is still to be made: it was saved before, and neither losses nor a
    failure of that evaluation are recorded in the `run` folder.
    """
    if not (read_json(checkpoint / "progress.json") or {}).get("evaluation_due"):
        return False
    measured = any("eval_loss" in entry and entry["step"] == step for entry in read_jsonl(run / "log.jsonl"))
    return not measured and not any(
        event["event"] == "evaluation failed" and event["at_step"] == step for event in read_jsonl(run / "events.jsonl")
    )


def is_published(step: int, every: int | None, last: bool) -> bool:
    """Whether the checkpoint of a step is published. every: --publish_steps. last: whether it is the run's last one,
    which always is.
    """
    return last or every is None or step % every == 0
