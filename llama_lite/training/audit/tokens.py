"""Where the tokens of an audited run are: prepared folders that are here, dataset repositories, or the text itself."""

import dataclasses
import os
import re
from pathlib import Path

from ...config.arguments import REPOSITORY
from ...config.pretrain import DataArguments
from ...data.installed import INSTALLED
from ...data.recipes import ROOT, TEXT_ARGUMENTS, TOKEN_ARGUMENTS
from ...data.shards import read_manifest
from ...errors import Differs, Refusal
from ...hub.client import Reference, reference
from ...hub.download import pull_prepared
from .record import tokens_of
from .segments import Segment
from .sources import FolderSource, HubSource

GIVEN = ("prepared_dir", "prepared_hub_id", "dataset")  # what an auditor can say about the tokens
WITH_FOLDERS = ("mixture", "validation", "allow_epochs_of")  # arguments of runs over several folders, which name them


@dataclasses.dataclass(frozen=True)
class TokenLocation:
    """Where one prepared folder of a run is. recorded: its name in the run's arguments. fingerprint: what its tokens
    must have. folder: where it is here, or will be; None where it is made from the text. ref: where it is downloaded
    from. is_given: whether the auditor chose it.
    """

    recorded: str | None
    fingerprint: str
    folder: str | None
    ref: Reference | None = None
    is_given: bool = False

    def __str__(self) -> str:
        return (f"{self.ref} in " if self.ref else "") + (self.folder or "prepared from the text")


def token_locations(source: HubSource | FolderSource, segment: Segment, given: dict) -> list[TokenLocation]:
    """Where each prepared folder of the run is. given: {argument: value} of GIVEN. Raises Refusal."""
    records = tokens_of(segment.holder.manifest, f"{source.where}@{segment.holder.name}")
    if not given:
        return [_locate(source, record, len(records) == 1) for record in records]
    if len(records) > 1:
        raise Refusal(
            f"--audit: this run read {len(records)} prepared folders, which --{next(iter(given))} cannot stand for: put"
            f" them where it recorded them ({', '.join(str(record['folder']) for record in records)})."
        )
    (record,), ref = records, reference(given.get("prepared_hub_id", ""))
    if "prepared_hub_id" in given and ref is None:
        raise Refusal(f"--prepared_hub_id {given['prepared_hub_id']}: a dataset on the Hub is owner/name@revision.")
    folder = given.get("prepared_dir") or (_folder_of(ref.repo, record) if ref else None)
    return [TokenLocation(record["folder"], record["fingerprint"], folder, ref, True)]


def _locate(source: HubSource | FolderSource, record: dict, is_only: bool) -> TokenLocation:
    """Where the tokens of a record are: here, on the Hub, or, of the only folder of a run, in their text."""
    recorded, expected = record["folder"], record["fingerprint"]
    for folder in (recorded, *_folders_of(source.settings())):
        manifest = read_manifest(Path(folder)) if folder else None
        if manifest and manifest["fingerprint"] == expected:
            return TokenLocation(recorded, expected, folder)
    if hub := record["hub"]:
        folder = _folder_of(recorded or hub["id"], record)
        return TokenLocation(recorded, expected, folder, Reference(hub["id"], hub["commit"]))
    if is_only and _is_public(record):
        return TokenLocation(recorded, expected, None)
    problem = (
        f"--audit: tokens of this run (fingerprint {expected[:12]}) are not here, and it records no dataset of them"
    )
    if not is_only:
        raise Refusal(f"{problem}: it read several folders, so put this one where it was, {recorded}.")
    raise Refusal(
        f"{problem}: give their folder with --prepared_dir, their dataset repository with --prepared_hub_id owner/name,"
        " or the text with --dataset."
    )


def _folder_of(name: str, record: dict) -> str:
    """A folder for downloaded tokens that no other tokens have. It ends as `name` does: a mixture names its folders
    after their last parts.
    """
    parts = [part for part in Path(name).parts[-2:] if re.fullmatch(r"\w[\w.-]*", part)]
    return str(Path(ROOT, f"audited-{record['fingerprint'][:8]}", *(parts or ["tokens"])))


def _folders_of(settings: dict) -> list[str]:
    """The prepared folders that the `settings` of a run's own folder name."""
    items = [*settings.get("mixture", []), *(item.partition("=")[2] for item in settings.get("validation", []))]
    return [settings.get("prepared_dir") or "", *(item.partition("=")[0] for item in items)]


def _is_public(record: dict) -> bool:
    """Whether a record names a text that anybody can get."""
    dataset = str((record["recipe"] or {}).get("dataset"))
    return dataset in INSTALLED or bool(REPOSITORY.fullmatch(dataset) and not os.path.exists(dataset))


def fetch_tokens(locations: list[TokenLocation]) -> None:
    """Download the tokens that are not here, and check that all are the run's (rank 0). Raises Refusal, and Differs for
    other tokens where the run's own record leads to.
    """
    for location in locations:
        if location.ref:
            pull_prepared(location.ref, DataArguments(prepared_dir=location.folder), {}, set())
        check_tokens(location, location.folder)


def check_tokens(location: TokenLocation, folder: str | None) -> None:
    """Raise Refusal, or Differs where the run's own record leads to them, for other tokens than the run's in a folder;
    one that is not there is left alone.
    """
    manifest = read_manifest(Path(folder)) if folder else None
    if manifest is None or manifest["fingerprint"] == location.fingerprint:
        return
    text = (
        f"{folder} holds the tokens {manifest['fingerprint'][:12]}, the run was trained on {location.fingerprint[:12]}"
    )
    if location.is_given:
        raise Refusal(f"--audit: {text}: give the run's tokens.")
    raise Differs(f"the tokens that the run records are others: {text}")


def token_arguments(
    source: HubSource | FolderSource, segment: Segment, locations: list[TokenLocation], given: dict
) -> dict:
    """{argument: value} that lead the script to the tokens in `locations`. Raises Refusal."""
    record = segment.holder.manifest.get("rerun") or {"arguments": {}, "tokens": [{"recipe": None}]}
    own = {name: source.settings()[name] for name in WITH_FOLDERS if source.settings().get(name)}
    named = {name: record["arguments"][name] for name in WITH_FOLDERS if record["arguments"].get(name)} | own
    moved = {location.recorded: location.folder for location in locations if location.recorded and location.folder}
    found = {name: [_moved(item, name, moved) for item in items] for name, items in named.items()}
    if "mixture" in named:
        return found
    if locations[0].folder:
        return found | {"prepared_dir": locations[0].folder}
    recipe = record["tokens"][0]["recipe"] or {}
    return found | _recipe_arguments(recipe) | {"dataset": given.get("dataset") or recipe["dataset"]}


def _moved(item: str, name: str, moved: dict[str, str]) -> str:
    """An item of an argument of WITH_FOLDERS with the folder where it is here: `data/web=0.7`, `code=data/code`."""
    first, equals, second = str(item).partition("=")
    if name == "validation":
        return f"{first}{equals}{moved.get(second, second)}"
    return f"{moved.get(first, first)}{equals}{second}"


def _recipe_arguments(recipe: dict) -> dict:
    """The arguments of preparation that a recipe holds, but the location of the text. Raises Refusal."""
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
