"""Making the steps of a segment again: its arguments, and a scratch folder in which the script runs."""

import gc
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import yaml

from ... import provenance
from ...distributed import WORLD_SIZE, run_on_main
from ...errors import Differs, Interrupted, Refusal
from ...files import read_json, read_jsonl, write_json, write_text
from ...processes import StopSignals
from .record import arguments_of_identity, arguments_without_record, contradictions, recorded_arguments
from .segments import Segment
from .sources import FolderSource, HubSource

STATES = ("start", "holder")  # of a segment, which decide what is made
QUIET = {  # what a rerun leaves out: none of it changes a step or a logged value
    "save_steps": 0,
    "sample_tokens": 0,
    "eval_tasks": [],
    "report_to": "none",
}


# ---- arguments ----


def rerun_arguments(source: HubSource | FolderSource, segment: Segment) -> tuple[dict, list[str]]:
    """({argument: value} with which the steps are made again, what cannot be compared, in words). Raises Refusal, and
    Differs where the records contradict each other.
    """
    holder = segment.holder
    name = f"{source.where}@{holder.name}"
    decided, recorded = arguments_of_identity(holder.manifest["identity"]), recorded_arguments(holder.manifest, name)
    missing: list[str] = []
    if recorded is None:
        recorded, missing = arguments_without_record(holder.trainer_state, source.settings())
    elif found := contradictions(recorded, decided):
        raise Differs(f"the records of {name} contradict each other: {'; '.join(found)}")
    arguments = {**recorded, **decided}
    processes = holder.manifest["identity"]["layout"]["processes"]
    if processes != WORLD_SIZE:
        batch = arguments["per_device_train_batch_size"]
        arguments["per_device_train_batch_size"] = _nearest_batch(_windows(arguments), batch)
    changed = segment.changes()
    names = [*changed["hyperparameters"], *changed["data"]]
    return arguments | ({"allow_changes": ",".join(names)} if names else {}), missing


def other_batch(arguments: dict) -> dict:
    """The arguments with another micro-batch, smaller if possible; without one, with the loss computed the other way,
    which rounds otherwise, too. Raises Refusal for float16, which has no other way.
    """
    windows, batch = _windows(arguments), arguments["per_device_train_batch_size"]
    sizes = [size for size in range(1, windows + 1) if windows % size == 0 and size != batch]
    if not sizes:
        if arguments.get("precision") == "float16":
            raise Refusal(
                "--audit: this machine rounds otherwise, and by how much cannot be measured in float16 with one window"
                " per process and step. Launch fewer processes, or audit on the machine that trained it."
            )
        return {**arguments, "fused_loss": not arguments.get("fused_loss", True)}
    smaller = [size for size in sizes if size < batch]
    return {**arguments, "per_device_train_batch_size": max(smaller) if smaller else min(sizes)}


def _windows(arguments: dict) -> int:
    """Windows of a step in this process. Raises Refusal where the processes cannot share them."""
    windows = arguments["tokens_per_step"] // arguments["block_size"]
    if windows % WORLD_SIZE:
        raise Refusal(f"--audit: {WORLD_SIZE} processes cannot share the {windows} windows of a step: launch fewer.")
    return windows // WORLD_SIZE


def _nearest_batch(windows: int, batch: int) -> int:
    """The largest micro-batch of at most `batch` windows that divides those of a step."""
    return max(size for size in range(1, min(windows, batch) + 1) if windows % size == 0)


# ---- running ----


def catch_signals() -> None:
    """Let signals end an audit at once."""
    StopSignals(lambda: None).end_at_once("in the audit; steps that were made again are kept.")


def rerun_segment(segment: Segment, arguments: dict, folder: Path, device: torch.device, main: Callable) -> None:
    """Make the steps of a segment in `folder`, as a run that resumes from the start and stops at the end. Continues
    where an interrupted audit stopped. device: what computes. main: the training script's. Call it on all ranks.

    Raises what the script raises: Refusal (ProbeDiffers where the start's weights do not give their recorded loss),
    Interrupted, Unhealthy.
    """
    run_on_main(_forget_other, segment, arguments, folder, device)
    if run_on_main(_is_done, segment, folder):
        return
    config = run_on_main(_begin, segment, arguments, folder)
    try:
        main(["--config", config])
    except Interrupted:  # so ends --stop_after_step, too
        if not run_on_main(_is_done, segment, folder):
            raise
    finally:
        catch_signals()  # in place of the script's, which waits for a step to end
    gc.collect()  # the model and its optimizer, before the next ones
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _forget_other(segment: Segment, arguments: dict, folder: Path, device: torch.device) -> None:
    """Remove what an earlier audit left in `folder`, if it is of another start, of other arguments, or by other code,
    packages or hardware (rank 0).
    """
    states = {name: state and state.manifest.get("digest") for name, state in vars(segment).items() if name in STATES}
    made = {name: value for name, value in provenance.provenance(device).items() if name != "command"}
    of = json.loads(json.dumps({"states": states, "arguments": arguments, "made": made}, default=str))
    path = folder.with_name(f"{folder.name}.json")
    if read_json(path) != of:
        shutil.rmtree(folder, ignore_errors=True)
        write_json(path, of)


def _is_done(segment: Segment, folder: Path) -> bool:
    """Whether a rerun has reached the end of its segment (rank 0)."""
    return (folder / f"checkpoint-{segment.last}" / "manifest.json").is_file()


def _begin(segment: Segment, arguments: dict, folder: Path) -> str:
    """Put the start's checkpoint into `folder`, and the arguments into a YAML file, whose path is returned (rank 0)."""
    folder.mkdir(parents=True, exist_ok=True)
    source = segment.start or segment.holder
    model = folder.with_name(f"{folder.name}-model")
    model.mkdir(exist_ok=True)
    shutil.copyfile(source.checkpoint / "config.json", model / "config.json")
    if segment.start and not any(folder.glob("checkpoint-*")):
        staging = folder / f".pulled-{segment.first}"
        shutil.rmtree(staging, ignore_errors=True)
        _copy(segment.start.checkpoint, staging)
        os.rename(staging, folder / f"checkpoint-{segment.first}")
    if not (folder / "run.json").exists():
        write_json(folder / "run.json", {"kind": "pretrain", "id": segment.holder.run})
    values = {
        **arguments,
        **QUIET,
        "model_config": str(model),
        "output_dir": str(folder),
        "resume_from_checkpoint": "must" if segment.start else "auto",
        "stop_after_step": segment.last,
    }
    path = folder.with_name(f"{folder.name}.yaml")
    write_text(path, yaml.safe_dump(values))
    return str(path)


def _copy(source: Path, target: Path) -> None:
    """A copy of a folder, by hard links where the disk has them."""
    try:
        shutil.copytree(source, target, copy_function=os.link)
    except OSError:
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)


def results_of(segment: Segment, folder: Path) -> tuple[list[dict], Path, dict]:
    """(log after the start, last checkpoint, identity) of a rerun (rank 0)."""
    log = read_jsonl(folder / "log.jsonl")[len(segment.start.log) if segment.start else 0 :]
    return log, folder / f"checkpoint-{segment.last}", read_json(folder / "run.json")["identity"]
