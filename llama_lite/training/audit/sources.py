"""The states of a run that an audit begins and ends with: revisions on the Hub, or checkpoints in a folder.

Every file is verified before it is read, and nothing is executed.
"""

import contextlib
import csv
import dataclasses
from pathlib import Path

from ...checkpoint import integrity, store, verify
from ...errors import Differs, Refusal
from ...files import read_json, read_jsonl
from ...folder_kinds import kind_of_folder
from ...hub import download
from ...hub.client import HubPermissionError, HubUnavailable, Reference, fetch, files_of, reference, refs_of
from ...hub.revision import INDEX, REVISION, STATE, newest_first, step_of, tag_of
from .record import is_auditable

STATE_FILE = "trainer_state.json"


@dataclasses.dataclass
class State:
    """One state of a run. name: its tag, or its folder's name. run: the run's id, "" where a folder has none.
    checkpoint: its training state; None where it was published without. model: the published model's folder; None in a
    folder of checkpoints.
    """

    step: int
    name: str
    run: str
    manifest: dict
    checkpoint: Path | None
    model: Path | None = None
    commit: str | None = None
    record: dict = dataclasses.field(default_factory=dict)
    digest: str | None = None  # of its manifest

    @property
    def tokens_per_step(self) -> int:
        return self.manifest["identity"]["data"]["tokens_per_step"]

    @property
    def log(self) -> list[dict]:
        """Every entry that was logged up to this state was saved."""
        return self.trainer_state["log_history"]

    @property
    def trainer_state(self) -> dict:
        return read_json(self.checkpoint / STATE_FILE)

    def file_records(self) -> dict[str, dict]:
        """{name: its record in the manifest} of the files of the training state."""
        return self.manifest["files"]


def source_of(where: str, folder: Path) -> "HubSource | FolderSource":
    """The run that `where` names: owner/name on the Hub, or a folder. folder: for downloads. Raises Refusal."""
    repo = reference(where)
    if repo is None and not Path(where).is_dir():
        raise Refusal(f"--audit {where}: neither the folder of a run nor owner/name on the Hub.")
    return HubSource(repo.repo, folder) if repo else FolderSource(Path(where))


class HubSource:
    """The revisions of a repository. folder: where they are downloaded to."""

    def __init__(self, repo: str, folder: Path):
        self.where, self.folder = repo, folder
        self.tags = dict(reversed(newest_first(refs_of(repo)[1])))
        if not self.tags:
            raise Refusal(f"--audit {repo}: no revisions (tags {tag_of(1)} ...) on the Hub that this account can see.")
        self.states: dict[str, State] = {}

    def name_of(self, step: int, number: int) -> str | None:
        """The tag of a step; None where there is none."""
        tag = tag_of(step, number)
        return tag if tag in self.tags else None

    def later_names(self, step: int) -> list[str]:
        """The tags of steps after `step`, in order."""
        return [tag for tag in self.tags if step_of(tag)[0] > step]

    def open(self, name: str) -> State:
        """The state of a tag: its records are downloaded and verified. Raises Refusal."""
        if name in self.states:
            return self.states[name]
        ref = Reference(self.where, name)
        with _hub_errors(ref):
            commit, record = download.read_revision(ref)
            self.states[name] = self._state(ref, commit, record)
        return self.states[name]

    def _state(self, ref: Reference, commit: str, record: dict) -> State:
        if unnamed := sorted(set(files_of(self.where, commit)) - {*record["files"], REVISION, ".gitattributes"}):
            # an adapter, say, which transformers would load with the model
            raise Differs(f"{ref} holds {unnamed[0]}, which its {REVISION} does not name")
        folder, checkpoint, manifest = self.folder / f"{ref.revision}-{commit[:8]}", None, record
        if f"{STATE}/{verify.MANIFEST}" in record["files"]:
            download.pull_revision(ref, commit, record, folder, records_only=True)
            checkpoint = folder / STATE
            manifest = _checked_manifest(checkpoint, str(ref))
            for key in ("step", "tokens", "identity"):
                if manifest[key] != record[key]:
                    raise Differs(f"{ref}: its revision.json and its {STATE} contradict each other in {key}")
        step = step_of(ref.revision)[0]
        if record["step"] != step:
            raise Differs(f"{ref} holds step {record['step']:,}, not {step:,}")
        _need_pretraining(record["identity"], str(ref))
        digest = record["files"].get(f"{STATE}/{verify.MANIFEST}", {}).get("sha256")
        return State(step, ref.revision, record["run"], manifest, checkpoint, folder, commit, record, digest)

    def pull(self, state: State) -> None:
        """Download and verify all files of a state. Raises Refusal."""
        ref = Reference(self.where, state.name)
        with _hub_errors(ref):
            download.pull_revision(ref, state.commit, state.record, state.model)

    def num_bytes(self, state: State) -> int:
        """Bytes that `pull` downloads at most."""
        return sum(file["size"] for file in state.record["files"].values())

    def settings(self) -> dict:
        """Arguments that only the folder of a run records."""
        return {}

    def evaluated(self, state: State) -> dict:
        """{eval_loss: ...} that checkpoints.csv shows for a state; {} where it shows none."""
        with contextlib.suppress(Refusal, HubUnavailable, HubPermissionError, csv.Error, ValueError, OSError):
            path = fetch(Reference(self.where), refs_of(self.where)[0]["main"], INDEX, self.folder)
            for row in csv.DictReader(path.read_text(encoding="utf-8").splitlines()):
                if row.get("commit") == state.commit and row.get("revision") == state.name and row.get("eval_loss"):
                    return {"eval_loss": float(row["eval_loss"])}
        return {}


class FolderSource:
    """The checkpoints in the folder of a run."""

    def __init__(self, folder: Path):
        if kind_of_folder(folder) != "pretrain":
            raise Refusal(f"--audit {folder}: not the folder of a pretraining run.")
        self.where, self.folder = str(folder), folder
        self.paths = dict(reversed(store.checkpoints(folder)))
        self.run = read_json(folder / "run.json") or {}

    def name_of(self, step: int, number: int) -> str | None:
        """The name of the checkpoint of a step; None where there is none."""
        return self.paths[step].name if step in self.paths else None

    def later_names(self, step: int) -> list[str]:
        """The checkpoints of steps after `step`, in order."""
        return [path.name for there, path in self.paths.items() if there > step]

    def open(self, name: str) -> State:
        """The state of a checkpoint. Raises Refusal."""
        folder = self.folder / name
        manifest = _checked_manifest(folder, str(folder))
        _need_pretraining(manifest["identity"], str(folder))
        return State(manifest["step"], name, self.run.get("id", ""), manifest, folder, digest=manifest["digest"])

    def pull(self, state: State) -> None:
        """Verify all files of a state. Raises Refusal."""
        name = str(state.checkpoint)
        if problems := verify.find_corruption(state.checkpoint):
            raise Refusal(f"{name} is damaged: {'; '.join(problems)}. Audit other checkpoints.")
        integrity.check_state(state.checkpoint, name)
        integrity.check_model(name, state.checkpoint)

    def num_bytes(self, state: State) -> int:
        """Bytes that `pull` downloads."""
        return 0

    def settings(self) -> dict:
        """The `settings` of run.json, which has what older checkpoints lack."""
        return self.run.get("settings") or {}

    def evaluated(self, state: State) -> dict:
        """The entry of log.jsonl with the validation loss of a state; {} where there is none."""
        entries = [entry for entry in read_jsonl(self.folder / "log.jsonl") if entry.get("step") == state.step]
        return next((entry for entry in entries if "eval_loss" in entry), {})


def _checked_manifest(folder: Path, name: str) -> dict:
    """The manifest of a checkpoint whose small files are what it says. Raises Refusal."""
    manifest = verify.read_manifest(folder)
    if manifest is None:
        raise Refusal(f"{name}: {verify.MANIFEST} is missing or altered, so nothing in it can be verified.")
    verify.require_state(manifest, ())
    state = integrity.read_object(folder / STATE_FILE, f"{STATE_FILE} of {name}")
    entries = state.get("log_history")
    well_formed = isinstance(entries, list) and all(
        isinstance(entry, dict) and isinstance(entry.get("step"), int) for entry in entries
    )
    if not well_formed:
        raise Refusal(f"{name}: {STATE_FILE} holds no log. Audit other states.")
    if state.get("global_step") != manifest["step"] or any(entry["step"] > manifest["step"] for entry in entries):
        raise Differs(f"{name}: its {STATE_FILE} is of another step than its manifest, {manifest['step']:,}")
    return manifest


def _need_pretraining(identity: dict, name: str) -> None:
    """Raise Refusal where an identity is not that of a pretraining run."""
    if not is_auditable(identity):
        raise Refusal(f"--audit {name}: not a state of a pretraining run, and only those can be audited.")


@contextlib.contextmanager
def _hub_errors(ref: Reference):
    """Turn errors of the Hub into a Refusal."""
    try:
        yield
    except (HubUnavailable, HubPermissionError) as error:
        raise Refusal(f"--audit {ref}: {error}. Run the same command again when the Hub answers.") from None
