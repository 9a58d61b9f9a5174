"""A run that goes on without some documents (`--without_documents`): from which checkpoint it may."""

import functools
import shutil
from collections.abc import Mapping
from pathlib import Path

from ..checkpoint import store
from ..data.dataset import MixedWindows, TokenWindows
from ..data.removal import FIELD, FILE, Removal, exclude, find_removal, first_use, read_removal, removal_lines
from ..data.run_windows import windows_of_run
from ..distributed import print_main, run_on_main
from ..errors import Refusal
from ..files import read_json, write_json
from ..run_folder import RunFolder
from .mixture import order_history
from .trainer import ResumePoint


class RemovalOfRun:
    """The documents that a run does not read, or none. Raises Refusal for a list that cannot be applied.

    session: of the run, which it tells from which checkpoints it may go on. run_args: RunArguments. prepared:
    {fingerprint: (prepared folder, its manifest)}.
    """

    def __init__(self, session, run_args, prepared: Mapping[str, tuple[Path, dict]]):
        self.session, self.removal = session, None
        if run_args.without_documents is None:
            return
        self.removal, found = run_on_main(find_removal, run_args.without_documents, prepared, run_args.block_size)
        print_main("\n".join(removal_lines(self.removal, found)))
        session.also_allowed = functools.partial(check_removal, self.removal, prepared)

    def identity(self) -> dict:
        """What of `identity["data"]` says that documents are left out."""
        return {FIELD: self.removal.identity()} if self.removal else {}

    def apply(self, train: TokenWindows | MixedWindows) -> None:
        """Replace the windows in those of the run, whose folder then says which."""
        if self.removal:
            exclude(train, self.removal)
            run_on_main(write_json, self.session.run.path / FILE, self.removal.record())


def check_removal(
    removal: Removal, prepared: Mapping[str, tuple[Path, dict]], run: RunFolder, start: ResumePoint
) -> tuple[str, ...]:
    """The fields of the identity that may differ from the checkpoint's because of a removal (rank 0): none where the
    run began with it.

    The steps before `start` must have read none of the windows that are removed, so that the run ends as one from step
    0 would. prepared: {fingerprint: (prepared folder, its manifest)}. Raises Refusal.
    """
    if start.checkpoint is None:
        return ()
    saved = start.manifest["identity"]["data"]
    if saved.get(FIELD) == removal.identity():
        return ()
    try:
        _check(removal, prepared, run, start, saved)
    except Refusal:
        if start.checkpoint.parent.resolve() == run.path.resolve() and _is_pulled(run):
            shutil.rmtree(start.checkpoint)  # else the corrected command would find it
        raise
    record = read_json(run.path / "run.json") or {}
    record.pop("id", None)  # of the run on the Hub: this is another one, with a repository of its own
    if record:
        write_json(run.path / "run.json", record)
    return (FIELD,)


def _check(removal: Removal, prepared, run: RunFolder, start: ResumePoint, saved: dict) -> None:
    """Raise Refusal where a run with this removal cannot begin from a checkpoint of a run without it. saved:
    `identity["data"]` of that run.
    """
    if start.checkpoint.parent.resolve() == run.path.resolve() and not _is_pulled(run):
        raise Refusal(
            f"--without_documents: the run in {run.path} goes on as it began, with what it has read. Give the new one"
            f" an --output_dir (and --hub_model_id) of its own, and --resume_from_checkpoint {start.checkpoint}."
        )
    if start.without:
        raise Refusal(
            f"--resume_without {','.join(start.without)}: a run without listed documents ends as one from step 0 only"
            " if it takes everything from the checkpoint. Leave it out."
        )
    if other := sorted(name for name in {*_data(saved)} if name not in prepared):
        raise Refusal(
            f"--without_documents: the run of {start.checkpoint} read other tokens (fingerprint {other[0][:12]}), so"
            " where it read a document is not known. Give the folder that it was trained on."
        )
    per_step = saved["tokens_per_step"] // saved["block_size"]
    train = windows_of_run(prepared, saved, start.step, order_history(start, saved))
    if before := read_removal(start.checkpoint.parent, saved):
        if not removal.includes(before):
            raise Refusal(
                f"--without_documents: the run of {start.checkpoint} does not read some documents that this list lacks,"
                " and a list can only grow. Add them, or start from a checkpoint that was trained with them."
            )
        exclude(train, before)
    position = first_use(train, removal)
    if position is not None:
        last = position // per_step
        raise Refusal(
            f"--resume_from_checkpoint {start.checkpoint}: step {last + 1:,} of its run read a listed document, so its"
            f" weights hold it. {_earlier(start.checkpoint, last)}"
        )


def _data(saved: dict) -> list[str]:
    """Fingerprints of the folders that a run read."""
    return [part["data"] for part in saved["mixture"].values()] if "mixture" in saved else [saved["data"]]


def _is_pulled(run: RunFolder) -> bool:
    """Whether a run folder holds nothing but a checkpoint of the Hub."""
    record = read_json(run.path / "run.json") or {}
    return "resumed_from" in record and "identity" not in record


def _earlier(checkpoint: Path, last: int) -> str:
    """What to start from instead of a checkpoint: the newest beside it that is not after step `last`."""
    steps = [step for step, _ in store.checkpoints(checkpoint.parent) if step <= last]
    if steps:
        return f"Start from {checkpoint.parent / f'checkpoint-{max(steps)}'}."
    return (
        f"Start from a checkpoint or a revision of step {last:,} or before, or from step 0 (leave"
        " --resume_from_checkpoint out)."
    )
