"""Where a run begins: in its own folder, in a checkpoint of the Hub, from another model's weights, or at step 0.

All of it happens on rank 0, before any model is made.
"""

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from ..checkpoint import integrity, store, verify
from ..checkpoint.identity import changed_arithmetic, check_changes
from ..config.fields import names
from ..distributed import print_main, run_on_main
from ..errors import Interrupted, Refusal
from ..files import read_json, read_jsonl, write_json
from ..folder_kinds import check_folder
from ..hub import client, download, export, publish_queue, revision
from ..hub.client import HubPermissionError, HubUnavailable, reference
from ..kernels import block_attention
from ..machine.parallelism import SHARDED_OPTIMIZERS as ADAMW
from ..models.loading import check_weights, describe_mismatch
from ..models.presets import load_model_config
from ..models.references import FREE_FIELDS, need_weights
from ..run_folder import RunFolder
from . import trainer
from .decisions import DEFAULT_HOURS


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
    print_main(
        f"{run.path} is finished ({steps} steps): nothing to do. To train longer, raise --max_steps and add"
        " --allow_changes max_steps."
    )
    run.record_end = False
    return True


def begin_run(run: RunFolder, record: dict, start: trainer.ResumePoint) -> None:
    """Write `run.json`, and the events of what changed since the checkpoint; restore the log of its step, without an
    evaluation that is due, and so is made again; say where the run begins.
    """
    run_on_main(_new_run, run, record, start.checkpoint is None)
    run_on_main(
        lambda: run.rewind_log(
            read_json(start.checkpoint / "trainer_state.json")["log_history"] if start.checkpoint else []
        )
    )
    for kind in ("hyperparameters", "data", "layout", "environment"):
        if start.changed.get(kind):
            run.event("changed", kind=kind, fields={name: list(values) for name, values in start.changed[kind].items()})
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
            other := other_fields(*map(load_model_config, map(str, (folder, checkpoint))))
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


# by kind: arguments that a run without `settings` in its record did not give were these, before they followed from text
# and machine
OLD_DEFAULTS = {
    "pretrain": {
        "model_config": "demo",
        "tokenizer": "gpt2",
        "vocab_size": 4096,
        "text_column": "text",
        "validation_tokens": 100_000_000,
        "prepared_dir": "data/demo",
        "block_size": 1024,
        "tokens_per_step": 524_288,
        "order": "sequential",
        "eval_windows": None,
        "sample_prompts": ["Hello, I am a language model,"],
        "logging_steps": 10,
        "eval_steps": 250,
        "save_steps": 250,
        "save_total_limit": 3,
        "per_device_train_batch_size": 8,
    },
    "sft": {
        "eval_rows": 400,
        "max_length": 1024,
        "long_rows": "drop",
        "skip_held_out": False,
        "sequences_per_step": 16,
        "probe_rows": 8,
        "compared_prompts": 8,
        "sampled_answers": 64,
        "answer_tokens": 96,
        "logging_steps": 10,
        "eval_steps": 100,
        "save_steps": 100,
        "save_total_limit": 3,
        "per_device_train_batch_size": 8,
    },
}

SWITCHES = ("compile_layers", "fused_loss")
EVAL_ORDERS = ("sequential", "shuffled")  # of --eval_order


def recorded_values(output_dir: str, mode: str, repo: str | None) -> dict:
    """{argument: value} of the run that a command goes on with, and its `order_version`; empty where it begins a new
    one.

    mode: --resume_from_checkpoint; repo: where the run publishes, used if the folder has no checkpoint. What the newest
    checkpoint says wins over what the run began with. Never refuses: what is wrong with the run is said when it is
    resumed.
    """
    where = reference(mode)
    if (
        where
        and (read_json(Path(output_dir) / "run.json") or {}).get("resumed_from") == str(where)
        and store.checkpoints(Path(output_dir))
    ):
        mode, where = "auto", None  # the same command again: it goes on from where it got to
    folder = Path(mode if mode not in ("auto", "must", "never") else output_dir)
    if mode == "never":
        return {}
    run, identity, manifest = {}, None, None
    if where is None and folder.is_dir():
        steps = store.checkpoints(folder)
        manifests = [verify.read_manifest(path) for path in [path for _, path in steps] or [folder]]
        manifest = next((found for found in manifests if found), None)
        identity = manifest and manifest["identity"]
        # a checkpoint, whose record lies beside it
        of_a_run = identity is not None and not steps and not (folder / "run.json").exists()
        run = read_json((folder.parent if of_a_run else folder) / "run.json") or {}
        begun = any(entry["event"] in ("started", "resumed") for entry in read_jsonl(folder / "events.jsonl"))
        if identity is None and not begun and (read_json(folder / "status.json") or {}).get("status") == "refused":
            run = {}  # what was refused before its first step is not what this command goes on with
        identity = identity or run.get("identity")
    if identity is None and (where or (repo and mode == "auto")):
        with contextlib.suppress(Refusal, HubUnavailable, HubPermissionError):
            ref, record = (
                (where, download.read_revision(where)[1]) if where else next(download.resumable(repo), (None, {}))
            )
            identity = record.get("identity")
            manifest = _published_manifest(ref, record) if identity else None
    if identity is None:
        return {}
    values = run.get("settings") or ({**OLD_DEFAULTS.get(run["kind"], {}), **run["given"]} if "given" in run else {})
    hyperparameters, switches = identity["hyperparameters"], identity["environment"].get("switches", {})
    values = {
        **values,
        **hyperparameters,
        **{
            name: identity["data"][name]
            for name in identity["data"]
            if name in ("order", "block_size", "tokens_per_step")
        },
    }
    if "order" in identity["data"]:
        values = {**_evaluated(manifest), **values}
        values.setdefault("eval_order", "sequential")  # of runs from before it was an argument
    values |= {name: switches[name] for name in SWITCHES if name in switches} | {
        "order_version": identity["data"].get("order_version", 1),
        **block_attention.arguments_of(switches.get("attention")),
    }
    return values


def _published_manifest(ref: client.Reference, record: dict) -> dict | None:
    """The manifest of the checkpoint in a revision, whose `revision.json` is `record`; None where it was published
    without training state. Raises HubUnavailable or HubPermissionError.
    """
    name = f"{revision.STATE}/{verify.MANIFEST}"
    if name not in record["files"]:
        return None
    with tempfile.TemporaryDirectory() as folder:
        return read_json(client.fetch(ref, client.commit_of(ref), name, Path(folder)))


def _evaluated(manifest: dict | None) -> dict:
    """The arguments of the manifest of a checkpoint that say which validation windows are measured; none of one from
    before they were recorded.
    """
    record = manifest.get("rerun") if isinstance(manifest, dict) else None
    arguments = record.get("arguments") if isinstance(record, dict) else None
    found = arguments if isinstance(arguments, dict) else {}
    windows, order = found.get("eval_windows"), found.get("eval_order")
    kept = {"eval_windows": windows} if type(windows) is int and windows > 0 else {}
    return kept | ({"eval_order": order} if order in EVAL_ORDERS else {})


def values_to_continue(run, training, repo: str | None) -> dict:
    """As `recorded_values`; empty for --suggest and for --dry_run with --hours, which are about a new run.

    run, training: the arguments. Raises Refusal for hours that the run was not begun with: its steps stay as they are.
    """
    if run.suggest or (run.dry_run and "hours" in run.explicit_args):
        return {}
    found = recorded_values(training.output_dir, training.resume_from_checkpoint, repo)
    if found and "hours" in run.explicit_args and run.hours != found.get("hours"):
        derived = not found.get("hours") or found["hours"] == DEFAULT_HOURS
        began = "another length" if derived else f"--hours {found['hours']:g}"
        raise Refusal(
            f"--hours {run.hours:g}: the run in {training.output_dir} was started with {began}, and its"
            f" {found.get('max_steps', 0):,} steps stay. Leave --hours out to continue it; give another --output_dir"
            " for another run, or --max_steps N --allow_changes max_steps to make this one longer."
        )
    return found


# ---- queues (rank 0) ----


def open_queues(publishers: list, required: bool) -> None:
    """Begin to publish, after a look at the repository. Raises Refusal where the Hub is `required` and cannot be."""
    for publisher in publishers:
        publisher.check(required)
        publisher.catch_up()
        publisher.start()


def publish_queued(publishers: list, timeout: float) -> None:
    """Publish what waits in the queues of a finished run, for `timeout` seconds at most each."""
    for publisher in publishers:
        if publish_queue.queued(publisher.folder):
            publisher.start()
            publisher.drain(timeout)


def publish_rest(publishers: list, checkpoint: Path, timeout: float) -> None:
    """Queue what only the last checkpoint gives (a merged model), and wait for all queues."""
    for publisher in publishers[1:]:
        publisher.add(checkpoint)
        publisher.start()
    for publisher in publishers:
        publisher.drain(timeout)


def publish_waiting(run: RunFolder, publishers: list, timeout: float) -> None:
    """Publish what waits in the queues of a run, and what should. Raises Interrupted when some of it still waits."""
    left, lost, due = [], [], []
    for publisher in publishers:
        publisher.check(required=True)
        publisher.catch_up()
        publisher.start()
        if not publisher.drain(timeout):
            left += publish_queue.queue_lines(publisher.folder)
        lost += publisher.lost
        due += publisher.not_evaluated
    if left:
        raise Interrupted("; ".join(left))
    missing = [f"{len(lost)} revisions that are gone from the Hub and from this machine"] if lost else []
    missing += [f"step {due[0]:,}, whose evaluation the resumed run makes"] if due else []
    print_main(f"everything in {run.path} is published{', except ' + ' and '.join(missing) if missing else ''}")


# ---- the checkpoint to begin from (rank 0) ----


def _find_start(run, kind: str, identity: dict, options: ResumeOptions) -> trainer.ResumePoint:
    """The checkpoint to begin from: cleans up the folder, downloads from the Hub, verifies, compares identities."""

    def report(folder, problems=("a run that went back to an older checkpoint",)):
        print_main(f"SET ASIDE {folder.name}: {'; '.join(problems)}")
        run.event("set aside", checkpoint=folder.name, problems=list(problems))

    check_folder("output_dir", run.path, kind)
    store.recover_interrupted(run.path)
    (run.path / "stop").unlink(missing_ok=True)
    without = tuple(names(options.resume_without))
    mode = _from_hub(run, kind, identity, options)
    folder = store.resolve(run.path, mode, without, report)
    if folder and folder.parent.resolve() != run.path.resolve():
        integrity.check_state(
            folder, str(folder), tuple(prefix for part in without for prefix in verify.STATE_FILES[part])
        )
    start = trainer.read_resume_point(folder, without)
    if folder is None:
        return start
    allowed = ",".join([*names(options.allow_changes), *options.also_allowed(run, start)])
    start.changed = check_changes(start.manifest["identity"], identity, start.step, allowed)
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


def init_folder(run, init_from: str, config, ids: int = 0) -> Path:
    """The folder of the weights that `--init_from` means, downloaded where it is a revision. Raises Refusal where they
    need another model.

    ids: of the tokenizer. Each must have a row in the weights; only rows beyond, which are padding, may be missing.
    """
    where, folder = reference(init_from), Path(init_from).expanduser()
    if where:
        try:
            folder = download.pull_model(where)[1]
        except (HubUnavailable, HubPermissionError) as error:
            raise Refusal(f"--init_from {where}: {error}. Run the same command again when the Hub answers.") from None
    integrity.check_model(init_from, folder)
    need_weights(folder)
    if (folder / "config.json").exists():
        theirs = load_model_config(str(folder.absolute()))
        check_same_model(init_from, theirs, config)
        if theirs.get_text_config().vocab_size < ids:
            raise Refusal(
                f"--init_from {init_from} has a vocabulary of {theirs.get_text_config().vocab_size:,} ids, but this"
                f" run's tokenizer has {ids:,}: prepare the text with the tokenizer of those weights (--tokenizer"
                " FOLDER)."
            )
        if said := describe_mismatch(theirs, config.bos_token_id, config.eos_token_id):
            print_main(f"init      {init_from}: {said}")
    check_weights(folder, config)
    return folder


def check_same_model(init_from: str, theirs, config) -> None:
    """Raise Refusal where weights of the config `theirs` are not those of a model of this one."""
    if other := other_fields(theirs, config):
        shown = [f"{name} is {there} there and {here} here" for name, (there, here) in list(other.items())[:6]]
        raise Refusal(
            f"--init_from {init_from} is another model: {'; '.join(shown)}{' ...' if len(other) > 6 else ''}. Leave out"
            " --model_config, or give the config.json of those weights."
        )


def other_fields(theirs, config) -> dict[str, tuple]:
    """{field: (theirs, this one's)} of what must be equal for the weights of one config to be those of the other: the
    kind and tying first.
    """
    found = [{**one.to_dict(), "tie_word_embeddings": one.tie_word_embeddings} for one in (theirs, config)]
    names = [
        "model_type",
        "tie_word_embeddings",
        *sorted({*found[0], *found[1]} - {"model_type", "tie_word_embeddings"}),
    ]
    other = {name: (found[0].get(name), found[1].get(name)) for name in names if not FREE_FIELDS.search(name)}
    return {name: both for name, both in other.items() if both[0] != both[1]}


def _new_run(run, record: dict, begins: bool) -> None:
    """`run.json` of a run's first start, or of one from no checkpoint (`begins`): an earlier start that kept nothing,
    because it was refused or killed, may have had other arguments. A run that began on the Hub keeps its id. The
    `status.json` of an end before this start goes.
    """
    (run.path / "status.json").unlink(missing_ok=True)
    there = read_json(run.path / "run.json") or {}
    if begins:
        write_json(run.path / "run.json", record)
    elif "identity" not in there:
        write_json(run.path / "run.json", record | there)
