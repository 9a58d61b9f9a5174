"""Making the steps of a segment again: its arguments, its tokens, and a scratch folder in which the script runs."""

import gc
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import yaml

from ...config.arguments import REPOSITORY
from ...data.installed import INSTALLED
from ...data.preparation import ROOT, TEXT_ARGUMENTS, TOKEN_ARGUMENTS
from ...data.shards import read_manifest
from ...distributed import WORLD_SIZE, run_on_main
from ...errors import Differs, Interrupted, Refusal
from ...files import read_json, read_jsonl, write_json, write_text
from ...processes import StopSignals
from .record import arguments_of_identity, arguments_without_record, contradictions, recorded_arguments, tokens_of
from .segments import Segment
from .sources import FolderSource, HubSource

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
    which rounds otherwise, too.
    """
    windows, batch = _windows(arguments), arguments["per_device_train_batch_size"]
    sizes = [size for size in range(1, windows + 1) if windows % size == 0 and size != batch]
    if not sizes:
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


# ---- tokens ----


def token_arguments(source: HubSource | FolderSource, segment: Segment, given: dict) -> dict:
    """The arguments that lead to the tokens of the run. given: those of the auditor, which win. Raises Refusal."""
    records = tokens_of(segment.holder.manifest, f"{source.where}@{segment.holder.name}")
    record = records[0]
    if {"prepared_dir", "prepared_hub_id", "dataset"} & given.keys():
        return given | (_recipe_arguments(record) if "dataset" in given else {}) | given
    for folder in (record["folder"], source.settings().get("prepared_dir")):
        manifest = read_manifest(Path(folder)) if folder else None
        if manifest and manifest["fingerprint"] == record["fingerprint"]:
            return {"prepared_dir": folder}
    if hub := record["hub"]:
        folder = ROOT / f"{hub['id'].partition('/')[2]}-{record['fingerprint'][:8]}"
        return {
            "prepared_hub_id": hub["id"] + (f"@{hub['commit']}" if hub["commit"] else ""),
            "prepared_dir": str(folder),
        }
    dataset = str((record["recipe"] or {}).get("dataset"))
    if dataset in INSTALLED or (REPOSITORY.fullmatch(dataset) and not os.path.exists(dataset)):
        return _recipe_arguments(record) | {"dataset": dataset}
    raise Refusal(
        f"--audit: the tokens of this run (fingerprint {record['fingerprint'][:12]}) are not here, and the run does not"
        " record where on the Hub they are: give their folder with --prepared_dir, their dataset repository with"
        " --prepared_hub_id owner/name, or the text with --dataset."
    )


def _recipe_arguments(record: dict) -> dict:
    """The arguments of preparation that a recipe holds, but the place of the text."""
    recipe = record["recipe"] or {}
    tokenizer = str(recipe.get("tokenizer"))
    if recipe and (tokenizer not in ("train", "gpt2") and not REPOSITORY.fullmatch(tokenizer)):
        raise Refusal(
            f"--audit: the tokens were made with a tokenizer of the run's owner ({tokenizer}), so they cannot be made"
            " from the text here: give them with --prepared_dir or --prepared_hub_id."
        )
    names = [name for name in (*TEXT_ARGUMENTS, *TOKEN_ARGUMENTS) if name != "dataset"]
    rules = recipe.get("curation")
    found = {name: recipe[name] for name in names if recipe.get(name) not in (None, [])}
    return found | (rules if isinstance(rules, dict) else {})


def check_tokens(segment: Segment, folder: str | None, is_given: bool) -> None:
    """Raise Refusal, or Differs for those that the run's own record leads to, where a folder holds other tokens than
    the run's. is_given: whether the auditor chose it.
    """
    expected = tokens_of(segment.holder.manifest, segment.holder.name)[0]["fingerprint"]
    manifest = read_manifest(Path(folder)) if folder else None
    if manifest and manifest["fingerprint"] != expected:
        text = f"{folder} holds the tokens {manifest['fingerprint'][:12]}, and the run was trained on {expected[:12]}"
        if is_given:
            raise Refusal(f"--audit: {text}: give the run's tokens.")
        raise Differs(f"the tokens that the run records are others: {text}")


# ---- running ----


def rerun_segment(segment: Segment, arguments: dict, folder: Path, main: Callable) -> None:
    """Make the steps of a segment in `folder`, as a run that resumes from the start and stops at the end. Continues
    where an interrupted audit stopped. main: the training script's. Call it on all ranks.

    Raises what the script raises: Refusal (ProbeDiffers where the start's weights do not give their recorded loss),
    Interrupted, Unhealthy.
    """
    if run_on_main(_is_done, segment, folder):
        return
    config = run_on_main(_begin, segment, arguments, folder)
    try:
        main(["--config", config])
    except Interrupted:  # so ends --stop_after_step, too
        if not run_on_main(_is_done, segment, folder):
            raise
    finally:
        StopSignals(lambda: None)  # in place of the script's, which waits for a step to end
    gc.collect()  # the model and its optimizer, before the next ones
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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
