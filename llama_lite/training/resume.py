"""Where a run begins: at a checkpoint of its own folder or of the Hub, or at step 0.

All of it happens on rank 0, before any model is made.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from transformers import AutoConfig

from ..checkpoint import integrity, store, verify
from ..checkpoint.identity import changed_arithmetic, check_changes, model_differences
from ..config.fields import names
from ..distributed import print_main, run_on_main
from ..errors import Interrupted, Refusal
from ..files import read_json, write_json
from ..folder_kinds import check_folder
from ..hub import client, download, export, publish_queue, revision
from ..hub.client import HubPermissionError, HubUnavailable, reference
from ..machine.parallelism import SHARDED_OPTIMIZERS as ADAMW
from ..models.loading import check_fits
from ..models.presets import load_model_config
from ..processes import seconds_since_start
from ..run_folder import RunFolder
from . import trainer
from .initial_weights import differing_fields


@dataclasses.dataclass(frozen=True)
class ResumeOptions:
    """The arguments about resuming, by name. repo: where the run publishes, None if it does not. also_allowed: the
    fields of the identity that may differ from the checkpoint's for another reason than `allow_changes`; may raise
    Refusal (rank 0).
    """

    resume_from_checkpoint: str
    resume_without: str
    allow_changes: str
    repo: str | None
    hub_required: bool
    also_allowed: Callable[[RunFolder, trainer.ResumePoint], Iterable[str]] = lambda run, start: ()


def find_start(run: RunFolder, record: dict, options: ResumeOptions) -> trainer.ResumePoint:
    """Where the run begins, the same on every rank. Cleans up its folder. Raises Refusal.

    record: what is to become `run.json` (kind, identity, `given`: the explicit arguments ...).
    """
    start = run_on_main(_find_start, run, record["kind"], record["identity"], options)
    run_on_main(_check_initial, run, record, start)
    run.step = start.step
    return start


def run_id_of(run: RunFolder, identity: dict, begins: bool = False) -> str:
    """The id in `run.json`, or that of a run which begins with this identity.

    begins: from no checkpoint. Then the id of an earlier start with another identity counts only where something was
    published, or waits to be.
    """
    there = read_json(run.path / "run.json") or {}
    is_other = begins and there.get("identity") not in (None, identity)
    if "id" not in there or (is_other and not any((run.path / name).exists() for name in ("published.jsonl", "queue"))):
        return revision.run_id(identity)
    return there["id"]


def is_finished(run: RunFolder, start: trainer.ResumePoint, steps: int) -> bool:
    """Whether a run of `steps` steps is finished; if so, a line says it and the end is not recorded again. Raises
    Refusal for a run that has made more steps.
    """
    if start.step > steps:
        raise Refusal(
            f"--max_steps {steps:,}: the run in {run.path} is already at step {start.step:,}. Give at least that"
            " number, or another --output_dir."
        )
    if not (
        start.step >= steps
        and run.is_finished()
        and run_on_main(has_model, run.path, run.path / f"checkpoint-{start.step}")
    ):
        return False
    new = [*start.changed.get("hyperparameters", ()), *start.changed.get("data", ())]
    unused = f", and the new {', '.join(new)} is not used" if new else ""
    print_main(
        f"{run.path} is finished ({steps} steps): nothing to do{unused}. To train longer: --max_steps N (in place of"
        f" --hours or --num_train_epochs) --allow_changes {','.join(dict.fromkeys([*new, 'max_steps']))}"
    )
    run.record_end = False
    return True


def begin_run(run: RunFolder, record: dict, start: trainer.ResumePoint) -> None:
    """Write `run.json`; restore the log of the checkpoint's step, without an evaluation that is due, and so is made
    again; say where the run begins.
    """
    run_on_main(_new_run, run, record, start.checkpoint is None)
    run_on_main(
        lambda: run.rewind_log(
            read_json(start.checkpoint / "trainer_state.json")["log_history"] if start.checkpoint else []
        )
    )
    print_main(
        f"start     {f'step {start.step}, from {start.checkpoint}' if start.checkpoint else 'step 0, a new run'} in"
        f" {run.path}"
    )


def has_model(folder: Path, checkpoint: Path) -> bool:
    """Whether a finished run's model or adapter is complete and equals its last checkpoint; prints why it is to be
    written again if not.
    """
    weights = "adapter_model.safetensors" if (folder / "adapter_config.json").is_file() else "model*.safetensors"
    try:
        if not any(folder.glob(weights)) or not any(
            (folder / name).is_file() for name in ("config.json", "adapter_config.json")
        ):
            raise Refusal("its files are not there")
        integrity.check_model(str(folder), folder)
        if checkpoint.is_dir() and not export.is_export(checkpoint, folder):
            problem = f"it is not that of {checkpoint.name}"
        elif (checkpoint / "config.json").is_file() and (
            other := differing_fields(*map(load_model_config, map(str, (folder, checkpoint))))
        ):
            name, (there, was) = next(iter(other.items()))
            problem = f"{name} in its config.json is {there}, and {was} in {checkpoint.name}"
        else:
            return True
    except Refusal as refusal:
        problem = str(refusal)
    print_main(f"repairing {folder}: the finished model is written again from the last checkpoint: {problem}")
    return False


def _check_initial(run: RunFolder, record: dict, start: trainer.ResumePoint) -> None:
    """Raise Refusal for an --init_from that a run which goes on did not begin from: its checkpoint's weights count."""
    there, asked = read_json(run.path / "run.json") or {}, record["given"].get("init_from")
    before = there.get("given", {}).get("init_from")
    if (
        start.checkpoint
        and "given" in there
        and asked not in (None, before)
        and not (before and Path(asked).resolve() == Path(before).resolve())
    ):
        raise Refusal(
            f"--init_from {asked}: the run in {run.path} began from {before or 'random weights'} and continues from its"
            f" checkpoint at step {start.step}. Leave it out, or give another --output_dir."
        )


# ---- the checkpoint to begin from (rank 0) ----


def _find_start(run, kind: str, identity: dict, options: ResumeOptions) -> trainer.ResumePoint:
    """The checkpoint to begin from: cleans up the folder, downloads from the Hub, verifies, compares identities."""

    def report(folder, problems=("a run that went back to an older checkpoint",)):
        print_main(f"SET ASIDE {folder.name}: {'; '.join(problems)}")
        run.event("set aside", checkpoint=folder.name, problems=list(problems))

    check_folder("output_dir", run.path, kind)
    store.recover_interrupted(run.path)
    _check_stop_file(run.path / "stop")
    without = tuple(names(options.resume_without))
    mode = _from_hub(run, kind, identity, options)
    if mode not in ("auto", "must", "never"):
        _check_own(run.path, Path(mode))
    folder = store.resolve(run.path, mode, without, report)
    if folder and folder.parent.resolve() != run.path.resolve():
        integrity.check_state(
            folder, str(folder), tuple(prefix for part in without for prefix in verify.STATE_FILES[part])
        )
    start = trainer.read_resume_point(folder, without)
    if folder is None:
        return start
    allowed = ",".join([*names(options.allow_changes), *options.also_allowed(run, start)])
    problem = _other_weights(start, identity) if kind == "pretrain" else ""
    start.changed = check_changes(start.manifest["identity"], identity, start.step, allowed, run.path, problem)
    if "optimizer" not in without:
        _check_optimizer(start.changed["hyperparameters"])
    if other := dict.fromkeys([*start.changed["environment"], *changed_arithmetic(start.changed)]):
        print_main(
            f"WARNING   another {', '.join(other)} than when {folder.name} was saved: equal within tolerance, not bit"
            " for bit"
        )
    if mode not in ("auto", "must"):
        store.supersede_newer(run.path, folder, start.step, report)
        publish_queue.supersede(run.path, start.step)
    return start


def _other_weights(start: trainer.ResumePoint, identity: dict) -> str:
    """Why a checkpoint's weights are not those of the model of this identity; "" where they are."""
    if not model_differences(start.manifest["identity"], identity):
        return ""
    try:
        check_fits(start.checkpoint, start.checkpoint.name, AutoConfig.for_model(**identity["model"]))
    except Refusal as refusal:
        return str(refusal)
    return ""


def _check_stop_file(file: Path) -> None:
    """Raise Interrupted for a file `stop` that was made since this command began. It goes, as an older one does."""
    made = file.stat().st_mtime if file.exists() else 0.0
    file.unlink(missing_ok=True)
    if made > time.time() - seconds_since_start():
        raise Interrupted(f"{file} was made before the first step. Run the same command again to continue.")


def _check_own(run: Path, checkpoint: Path) -> None:
    """Raise Refusal for a checkpoint of another folder where the run has checkpoints of its own."""
    if checkpoint.is_dir() and checkpoint.resolve().parent != run.resolve() and (own := store.checkpoints(run)):
        raise Refusal(
            f"--resume_from_checkpoint {checkpoint}: {run} holds a run already, whose newest checkpoint is at step"
            f" {own[0][0]:,}. Use `auto` to continue it, or another --output_dir."
        )


def _check_optimizer(changed: dict[str, tuple]) -> None:
    """Raise Refusal if the requested optimizer cannot load the state that was saved."""
    for name in ("optim", "optim_args"):
        then, now = changed.get(name, (None, None))
        if then != now and not {then, now} <= {*ADAMW}:
            raise Refusal(
                f"--{name} {now} cannot use the saved state of {then}. Restore the old value, or add --resume_without"
                " optimizer to start without optimizer state."
            )


def _from_hub(run, kind: str, identity: dict, options: ResumeOptions) -> str:
    """Bring a checkpoint from the Hub into the run folder where `resume_from_checkpoint` means one; returns the mode
    that is left.
    """
    mode = options.resume_from_checkpoint
    record, where = read_json(run.path / "run.json") or {}, reference(mode)
    if where and record.get("resumed_from") == str(where) and store.checkpoints(run.path):
        return "auto"  # the same command again: it goes on from where it got to
    if where and "identity" in record:
        raise Refusal(
            f"--resume_from_checkpoint {where}: {run.path} holds a run already. Use `auto` to continue it, or another"
            " --output_dir."
        )
    if where:
        _pull(run, kind, where)
        return "must"
    if mode != "auto" or not options.repo or store.checkpoints(run.path):
        return mode
    refused, found = None, download.resumable(options.repo)
    while step := _next(found, options, refused):
        where, theirs = step
        try:
            check_changes(theirs["identity"], identity, theirs["step"], options.allow_changes)
        except Refusal as refusal:
            raise Refusal(
                f"{where.repo} belongs to another run, so choose another --hub_model_id, or continue that run:"
                f" {refusal}"
            ) from None
        try:
            _pull(run, kind, where)
            return "must"
        except client.Damaged as damage:
            print_main(f"WARNING   {where} is passed over for an older revision: {damage}")
            (run.path / "run.json").unlink(missing_ok=True)
            refused = refused or damage
    if refused:
        raise refused
    return mode


def _next(found, options: ResumeOptions, refused: Refusal | None):
    """The next of the revisions `found` on the Hub, None where there is no more, or where nobody answers, which is
    said, or refused.
    """
    try:
        return next(found, None)
    except (HubUnavailable, HubPermissionError) as error:
        if options.hub_required or refused:
            raise Refusal(f"--push_to_hub {options.repo}: {error}. Fix that, or leave out --hub_required.") from None
        print_main(f"WARNING   cannot find out whether {options.repo} has checkpoints of this run: {error}")
        return None


def _pull(run, kind: str, where) -> None:
    """The training state of a revision as a checkpoint of the run folder, whose `run.json` says where it is from.
    Raises Refusal.
    """
    try:
        write_json(
            run.path / "run.json",
            {"kind": kind, "id": download.read_revision(where)[1]["run"], "resumed_from": str(where)},
        )
        download.pull_checkpoint(where, run.path)
    except (HubUnavailable, HubPermissionError) as error:
        raise Refusal(
            f"{where} cannot be downloaded: {error}. Run the same command again when the Hub answers."
        ) from None


def _new_run(run, record: dict, begins: bool) -> None:
    """`run.json` of a run's first start, or of one from no checkpoint (`begins`): an earlier start that kept nothing,
    because it was refused or killed, may have had other arguments. A run that began on the Hub keeps its id. The
    `status.json` of an end before this start goes.
    """
    (run.path / "status.json").unlink(missing_ok=True)
    there = read_json(run.path / "run.json") or {}
    if begins:
        write_json(run.path / "run.json", record)
        return
    whole = there if "identity" in there else record | there
    if "last_start" in record:
        whole["last_start"] = record["last_start"]
    write_json(run.path / "run.json", whole)
