"""The folders of a mixture in a run: found or downloaded, and what a resume does to their order."""

import dataclasses
from pathlib import Path

from ..config.pairs import hub_ids, mixture_weights, validation_folders
from ..data.dataset import MixedWindows, TokenWindows
from ..data.prepared import PreparedFolder, PreparedTokens, read_mixture, read_validation
from ..data.run_windows import weights_of, windows_of_run
from ..data.shards import verify_prepared
from ..distributed import print_main
from ..errors import Refusal
from ..hub import client, download
from .data_plan import source_rows
from .plan import Plan
from .trainer import ResumePoint

# ---- the folders (rank 0) ----


def pull_folders(data) -> None:
    """Download the folders that --prepared_hub_id of a mixture names, where they are not here. data: DataArguments."""
    for folder, repo in hub_ids(data.prepared_hub_id).items():
        one = dataclasses.replace(data, prepared_dir=folder, mixture=[])
        download.pull_prepared(_reference(folder, repo), one, {}, set())


def push_folders(data, private: bool | None, said: dict) -> None:
    """Publish the folders that --prepared_hub_id of a mixture names, each as a dataset. said: HubArguments.card. Raises
    Refusal.
    """
    for folder, repo in hub_ids(data.prepared_hub_id).items():
        download.push_prepared(Path(folder), _reference(folder, repo).repo, private, said)


def _reference(folder: str, repo: str) -> client.Reference:
    """A Hub id of a --prepared_hub_id. Raises Refusal."""
    if found := client.reference(repo):
        return found
    raise Refusal(f"--prepared_hub_id {folder}={repo}: a dataset on the Hub is owner/name, or owner/name@revision.")


def find_mixture(data, verify: str) -> list[PreparedFolder]:
    """The folders of --mixture, verified; [] where there is none. data: DataArguments. verify: as of `verify_prepared`.
    Raises Refusal.
    """
    parts = read_mixture(mixture_weights(data.mixture)) if data.mixture else []
    for part in parts:
        verify_prepared(part.folder, part.manifest, verify)
    return parts


def find_validation(data, folders: list[PreparedFolder], verify: str) -> list[PreparedFolder]:
    """The folders of --validation, verified. folders: those that are trained on, as far as they are prepared. Raises
    Refusal.
    """
    sets = read_validation(validation_folders(data.validation), folders, bool(data.mixture))
    for part in sets:
        verify_prepared(part.folder, part.manifest, verify)
    return sets


def check_before_preparing(data, tokens: dict, sets: list[PreparedFolder]) -> None:
    """Raise Refusal where a text that is not prepared yet gets a tokenizer of its own, which no validation set has.

    tokens: a manifest, or an estimate of one.
    """
    if "estimated" in tokens and sets and data.tokenizer == "train":
        raise Refusal(
            f"--validation {sets[0].name}: {sets[0].folder} has another tokenizer than the one that would be trained on"
            f" {data.dataset}. Prepare the text first, with --prepare_only, and then the validation set with"
            f" --tokenizer {data.prepared_dir}/tokenizer; or give --tokenizer {sets[0].folder}/tokenizer."
        )


# ---- the order, and what a resume does to it ----


def training_windows(
    tokens: PreparedTokens, data: dict, plan: Plan, start: ResumePoint
) -> tuple[TokenWindows | MixedWindows, list[str]]:
    """The windows of a run, and the names of the folders of a mixture in the order of their counts ([] of one text).

    data: `identity["data"]` of the run. Sets `start.order_history` of a mixture.
    """
    history = order_history(start, data)
    train = windows_of_run(tokens.by_fingerprint, data, plan.steps, history)
    if not tokens.is_mixture:
        return train, []
    start.order_history = history
    names = {fingerprint: name for entry in history for fingerprint, name in entry.get("names", {}).items()}
    sources = [names.get(fingerprint, fingerprint[:12]) for fingerprint in train.fingerprints]
    if len(history) > 1:
        counts = train.counts(start.step * plan.windows_per_step)
        read = ", ".join(f"{name} {n * plan.block_size:,}" for name, n in zip(sources, counts, strict=True))
        print_main(f"mixture   its folders go on at step {start.step:,} where they stopped; tokens read: {read}")
    return train, sources


def rows_at_end(tokens: PreparedTokens, train: MixedWindows) -> list[dict]:
    """`source_rows` of a mixture at the end of a run, by what it will have read."""
    counts = dict(zip(train.fingerprints, train.counts(len(train)), strict=True))
    read = [counts[part.manifest["fingerprint"]] for part in tokens.folders]
    return source_rows(tokens.manifest, train.block_size, len(train), read)


def order_history(start: ResumePoint, data: dict) -> list[dict]:
    """What happened to the order of a run up to where it begins now, for `windows_of_run` and the next checkpoint.

    data: `identity["data"]` of the run.
    """
    if "mixture" not in data:
        return [{"step": start.data_start}]
    if start.checkpoint is None:
        return [_entry(0, data)]
    saved, history = start.manifest["identity"]["data"], start.progress.get("order_history")
    if history is None or "mixture" not in saved:
        began = start.progress["data_start"]
        history = [_entry(0, saved), *([{"step": began}] if began else [])]
    last = next(entry["weights"] for entry in reversed(history) if "weights" in entry)
    if last != weights_of(data):
        history = [*history, _entry(start.step, data)]
    return [*history, {"step": start.step}] if "data" in start.without else history


def _entry(step: int, data: dict) -> dict:
    """The entry of a history for weights that count from a step on."""
    names = {part["data"]: name for name, part in data.get("mixture", {}).items()}
    return {"step": step, "weights": weights_of(data), **({"names": names} if names else {})}
