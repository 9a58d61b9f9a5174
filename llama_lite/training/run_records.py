"""A run by its records, in a folder or published: the order in which it read its data, and where its tokens are."""

import dataclasses
import re
import tempfile
from pathlib import Path

from ..data.removal import Removal, read_removal
from ..data.shards import altered, read_manifest
from ..errors import Refusal
from ..files import read_json
from ..hub import download
from ..hub.client import HubPermissionError, HubUnavailable, Reference, fetch, reference
from ..hub.local_names import check_misspelt
from ..hub.revision import STATE
from .reading_order import ReadingOrder, order_of_checkpoint, reading_order


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """name: as it was given. folders: where the run's own records say that its tokens are. removal: what it did not
    read.
    """

    name: str
    order: ReadingOrder
    folders: list[str]
    removal: Removal | None = None


def read_run(name: str) -> RunRecord:
    """The run in a folder, up to a checkpoint if it is one's, or that of a published revision. Raises Refusal."""
    folder, step = Path(name).expanduser(), None
    if match := re.fullmatch("checkpoint-([0-9]+)", folder.name):
        folder, step = folder.parent, int(match[1])
    run = read_json(folder / "run.json")
    if isinstance(run, dict):
        if run.get("kind") != "pretrain":
            raise Refusal(f"{name} is a run of run_{run.get('kind')}.py: only pretraining reads prepared tokens.")
        if "identity" not in run:
            raise Refusal(f"{name} was made by a version that did not record what it read: it cannot be traced.")
        order = reading_order(folder, run)
        removal = read_removal(folder, run["identity"]["data"])
        return RunRecord(name, order if step is None else order.up_to(step), _recorded_folders(run), removal)
    check_misspelt("RUN", name)
    ref = None if folder.exists() else reference(name)
    if ref is None:
        raise Refusal(
            f"{name} is not the folder of a run (it has no run.json), nor a revision such as you/name@step-N."
        )
    try:
        commit, record = download.read_revision(ref)
        progress = _progress(ref, commit, record)
    except (HubUnavailable, HubPermissionError) as error:
        raise Refusal(f"{name}: {error}. Run the same command again when the Hub answers.") from None
    if "tokens_per_step" not in record["identity"]["data"]:
        raise Refusal(f"{name} is not a revision of run_pretrain.py: only pretraining reads prepared tokens.")
    read_removal(Path(str(ref)), record["identity"]["data"])  # refuses: a revision does not say what was left out
    return RunRecord(name, order_of_checkpoint(record["identity"]["data"], record["step"], progress), [])


def _progress(ref: Reference, commit: str, record: dict) -> dict:
    """`progress.json` of a published revision; {} where it was published without training state."""
    name = f"{STATE}/progress.json"
    if name not in record["files"]:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        return read_json(fetch(ref, commit, name, Path(folder))) or {}


def _recorded_folders(run: dict) -> list[str]:
    """The prepared folders that `run.json` names."""
    values = {**run.get("given", {}), **run.get("settings", {})}
    mixture = values.get("mixture") or []
    folders = list(mixture) if isinstance(mixture, dict) else [item.rpartition("=")[0] for item in mixture]
    return [*folders, *([values["prepared_dir"]] if values.get("prepared_dir") else [])]


def find_prepared(
    record: RunRecord, fingerprints: list[str], folders: list[str], hub_ids: list[str]
) -> dict[str, tuple[Path, dict]]:
    """{fingerprint: (prepared folder, manifest)} of the tokens that a run read.

    folders, hub_ids: of the command; tokens on the Hub are downloaded and verified. Raises Refusal where some are not
    found.
    """
    folders = list(dict.fromkeys([*folders, *_pulled(folders, hub_ids), *record.folders]))
    found = {}
    for folder in map(Path, folders):
        manifest = read_manifest(folder)
        if manifest is None and (folder / "manifest.json").exists():
            raise altered(folder)
        if manifest:
            found.setdefault(manifest["fingerprint"], (folder, manifest))
    if missing := [one[:12] for one in fingerprints if one not in found]:
        looked = ", ".join(folders)
        raise Refusal(
            f"{record.name} read tokens with the fingerprint {', '.join(missing)}, which"
            f" {f'are not in {looked}' if looked else 'its records name no folder of'}. Name the prepared folder with"
            " --prepared_dir, or the dataset that holds it on the Hub with --prepared_hub_id."
        )
    return {fingerprint: found[fingerprint] for fingerprint in fingerprints}


def _pulled(folders: list[str], hub_ids: list[str]) -> list[str]:
    """The folders into which tokens of the Hub were downloaded."""
    if not hub_ids:
        return []
    from ..config.pretrain import DataArguments  # here, since it takes seconds: it imports transformers' arguments

    pulled = []
    for number, hub_id in enumerate(hub_ids):
        ref = reference(hub_id)
        if ref is None:
            raise Refusal(f"--prepared_hub_id {hub_id}: not the id of a dataset on the Hub, such as you/tokens.")
        into = folders[number] if len(folders) == len(hub_ids) else None
        pulled.append(download.pull_prepared(ref, DataArguments(prepared_dir=into), {}, set()))
    return pulled
