"""The arguments of the run that a command goes on with: what its record and its newest checkpoint say."""

import contextlib
import json
import tempfile
from pathlib import Path

from ..checkpoint import store, verify
from ..config.run_values import INTERVALS
from ..errors import Refusal
from ..files import read_json, read_jsonl
from ..hub import client, download, revision
from ..hub.client import HubPermissionError, HubUnavailable, reference
from ..kernels import block_attention
from .decisions import DEFAULT_HOURS

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


def comparable_args(given: dict) -> dict:
    """The explicit arguments by which a command is recognised as the same one, as JSON reads them again."""
    return json.loads(json.dumps({name: value for name, value in given.items() if name != "stop_after_step"}))


def is_repeated(output_dir: str, given: dict) -> bool:
    """Whether a run's last start was by a command with these explicit arguments, and it has saved a checkpoint since.

    The command then goes on from what was saved. It does not begin once more at --resume_from_checkpoint FOLDER, or
    --resume_without a state.
    """
    record, steps = read_json(Path(output_dir) / "run.json") or {}, store.checkpoints(Path(output_dir))
    last = record.get("last_start", {"given": record.get("given", {}), "step": 0})  # without: of an older version
    return bool(steps) and steps[0][0] > last["step"] and comparable_args(last["given"]) == comparable_args(given)


def recorded_values(output_dir: str, mode: str, repo: str | None, max_steps: int | None = None) -> dict:
    """{argument: value} of the run that a command goes on with, and its `order_version`; empty where it begins a new
    one.

    mode: --resume_from_checkpoint; repo: where the run publishes, used if the folder has no checkpoint; max_steps: as
    the command gives it, if it does. What the newest checkpoint says wins over what the run began with. Never refuses:
    what is wrong with the run is said when it is resumed.
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
    return _without_old_intervals(values, run, max_steps)


def _without_old_intervals(values: dict, run: dict, max_steps: int | None) -> dict:
    """The values without intervals that nobody gave and that followed from another length than today's. run: the run's
    record.
    """
    began = run.get("settings", {}).get("max_steps", 0)
    if began <= 0 or (max_steps or values.get("max_steps")) == began:
        return values
    return {name: values[name] for name in values if name not in INTERVALS or name in run.get("given", {})}


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
    asked = run.explicit_args.get("max_steps")
    found = recorded_values(training.output_dir, training.resume_from_checkpoint, repo, asked)
    if found and "hours" in run.explicit_args and run.hours != found.get("hours"):
        hours, steps = found.get("hours") or DEFAULT_HOURS, found.get("max_steps", 0)
        began = "another length" if hours == DEFAULT_HOURS else f"--hours {hours:g}"
        more = int(steps * run.hours / hours)
        again = " (and --allow_epochs, where that reads a folder again)" if found.get("mixture") else ""
        way = f"--max_steps {more} --allow_changes max_steps{again}"
        longer = f" To make it about that long: {way}." if more > steps else ""
        raise Refusal(
            f"--hours {run.hours:g}: the run in {training.output_dir} was started with {began}, and its"
            f" {steps:,} steps stay. Leave --hours out to continue it.{longer} For another run with its values:"
            f" --config {training.output_dir} --hours {run.hours:g} --output_dir OTHER."
        )
    return found
